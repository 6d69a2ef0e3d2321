"""Training: options, objectives, the training loop and its files; aliases of EDM's module names."""
