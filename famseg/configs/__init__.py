"""Settings of famseg-train by name. Model and loss of a table's row do not set how long it is trained, or how fast.

Table 2 of FAMSeg and its text's AdamW then SGD; the rows of FAMSeg's Table 3 and of SC-UNeXt's Table 2.
"""
