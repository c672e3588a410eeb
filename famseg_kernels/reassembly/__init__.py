"""Content-aware reassembly of features (CARAFE; FAMSeg section 3.3, Fig. 3)."""
