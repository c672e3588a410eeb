"""Settings of famseg-train by name: the nine combinations of the paper's Table 2, and its text's AdamW then SGD."""
