"""Loading what others wrote: the errors of transformers, tokenizers and safetensors as one sentence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from thresher.errors import CheckpointError, ThresherError, first_line

MISFIT = "ignore_mismatched_sizes"  # transformers names it where sizes differ, having logged which

T = TypeVar("T")


def loaded(load: Callable[[], T], source: Any, kind: str = "") -> T:
    """What `load` makes of `source`, a directory or a name on the hub. kind: what it should have been, for the message.

    Raises CheckpointError for whatever goes wrong except a missing package, which is an ImportError still.
    """
    try:
        return load()
    except (ThresherError, ImportError):
        raise
    except Exception as error:  # tokenizers raises nothing narrower for a file that it does not understand
        wanted = f" as {kind}" if kind else ""
        if Path(source).expanduser().is_dir():
            raise CheckpointError(f"{source} does not load{wanted}: {_reason(Path(source), error)}.") from error
        if names_a_place(str(source)):
            raise CheckpointError(f"There is no directory {source}.") from error
        raise CheckpointError(
            f"{str(source)!r} is no local directory, and the hub did not give it{wanted or ' as a model'}: "
            f"{first_line(error)}."
        ) from error


def names_a_place(name: str) -> bool:
    """Whether a name can only be a path: the hub's have one slash at most."""
    return name.startswith((".", "~", "/")) or name.count("/") > 1


def _reason(directory: Path, error: Exception) -> str:
    if not (directory / "config.json").is_file():
        return "it has no config.json; copy the whole directory"
    if MISFIT in str(error):
        return "config.json names other sizes than the weights have"
    if not _is_object(directory / "config.json"):
        return "config.json is no JSON object"
    return first_line(error)


def _is_object(file: Path) -> bool:
    """Whether a file, if it is there, holds settings by name."""
    if not file.is_file():
        return True
    try:
        return isinstance(json.loads(file.read_bytes()), dict)
    except ValueError:
        return False
