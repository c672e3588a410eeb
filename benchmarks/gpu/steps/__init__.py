"""A step a file: `items(options)` says what it does. Their order and their shares of the time are in `__main__`."""
