"""PFGM++ and EDM: perturbation kernel, networks, losses, samplers and the training loop."""
