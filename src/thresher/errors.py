"""The errors a user can meet. Each message is one sentence that says what was wrong and what to do about it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ThresherError(Exception):
    """Base of every error raised on purpose; the command line prints its message and exits with status 2."""


class UnsupportedModelError(ThresherError):
    """The model's family or head cannot be entered."""


class DataError(ThresherError):
    """A data file, row, column or label is missing or malformed."""


class OptionError(ThresherError):
    """A method, option or setting is unknown or out of range."""


class CheckpointError(ThresherError):
    """A saved directory is incomplete, corrupted or belongs to another model."""


class StoreError(ThresherError):
    """A candidate store is damaged, busy or made for another model, or what was to go in or out of it is wrong."""


class TargetError(ThresherError):
    """A calibration target cannot be met."""


def first_line(error: Exception) -> str:
    """What an error of another library says, without the advice that follows and without a full stop."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def nearest(name: str, known: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the closest known names, or the list of them when none is close."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=2, cutoff=0.5)
    if close:
        return "; did you mean " + " or ".join(repr(c) for c in close) + "?"
    return "; known are " + ", ".join(names) + "."
