"""The error of training."""


class TrainingError(RuntimeError):
    """Training cannot begin or go on; says where and why, and what to do."""
