"""The weights of `famseg.load_pretrained`, and whose they are. `python -m benchmarks.pretrained` makes them."""
