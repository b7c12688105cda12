"""Training: matching, losses, optimisation, checkpoints, distributed runs, progress, the loop."""
