"""Directional strip depthwise convolution (SegNeXt's MSCA core, FAMSeg section 3.2.1)."""
