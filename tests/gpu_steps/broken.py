"""A step that does not come up."""

raise ImportError("no module named cuda_of_tomorrow")
