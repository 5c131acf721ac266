"""Errors of the delta library. The server maps them to HTTP in one place (``server/errors.py``)."""

from __future__ import annotations

LONGEST_FIELD = 512  # as long as a tensor's name may be


class DeltaError(ValueError):
    """A delta, or a backbone, that cannot be used as asked.

    ``field`` names what is wrong (a config key, a tensor, a file), cut to LONGEST_FIELD characters; the message says what
    to do about it.
    """

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field if field is None else field[:LONGEST_FIELD]


class InvalidDelta(DeltaError):
    """The files are not a delta this library can read exactly (unknown keys, bad shapes, NaN, ...)."""


class UnsupportedDelta(DeltaError):
    """A well-formed delta of a method, option or architecture that is not served."""


class UnsupportedBackbone(DeltaError):
    """A backbone architecture without a table of sites."""
