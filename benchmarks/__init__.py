"""Benchmarks over the op specs; `pytest benchmarks/ --benchmark` times, without the flag it is a smoke test."""
