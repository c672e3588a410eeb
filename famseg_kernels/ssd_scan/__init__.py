"""Mamba-2 (SSD) scans: the 1D op and the 2D multi-direction op (FAMSeg section 3.2.2)."""
