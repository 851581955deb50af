"""The error of everything that is read."""

from __future__ import annotations

from pemt.config import PemtError


class DataError(PemtError):
    """Data that cannot be used: a missing file, a malformed row, a class with too few examples."""
