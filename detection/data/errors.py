"""The error of a data set that cannot be used: it names what is wrong, where, and the remedy."""

from __future__ import annotations


class DataError(ValueError):
    """A data set, an annotation file or an image is unusable.

    Example:
        >>> raise DataError("instances_val.json: the image list is empty.")
        Traceback (most recent call last):
        ...
        detection.data.errors.DataError: instances_val.json: the image list is empty.
    """


class DataWarning(UserWarning):
    """Part of a data set is not used; the message says how much of it, and why."""
