"""Training: configuration, phases and learning rates, the loop and its checkpoints."""
