"""Training: configuration, phases and learning rates, the Lightning module, callbacks."""
