"""For tests and benchmarks, this library's and others': cases of an operation, and whether a backend is right."""
