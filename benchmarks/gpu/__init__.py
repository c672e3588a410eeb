"""`python -m benchmarks.gpu`: whether the kernels are right on this GPU, how fast they are, and beside what."""
