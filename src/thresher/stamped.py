"""Settings in JSON that vouch for a file of weights: read whole and matching, or refused in one sentence. Needs no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from thresher.errors import CheckpointError

DIGEST = "weights_sha256"


def sha256(path: Path) -> str:
    """Of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_settings(
    file: Path,
    fields: Mapping[str, type | tuple[type, ...]],
    version: int,
    what: str,
    *,
    defaults: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The settings in `file`, written in format `version`, with the types that they must have.

    what: the thing that was saved, for the messages. defaults: of fields that may be missing. Raises CheckpointError for a file
    that is corrupted or of another format.
    """
    try:
        found = {**(defaults or {}), **json.loads(file.read_text(encoding="utf-8"))}
        given = found["format"]
        wrong = [name for name, kind in {**fields, DIGEST: str}.items() if not isinstance(found[name], kind)]
        if given == version and wrong:
            raise TypeError(", ".join(f"{name} is {found[name]!r}" for name in wrong))
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{file} is corrupted ({type(error).__name__}: {error}); save the {what} again."
        ) from error
    if given != version:
        raise CheckpointError(
            f"{file} has format {given!r}, this version reads {version}; use a matching version of thresher."
        )
    return found


def check_weights(weights: Path, settings: Path, digest: str, what: str) -> None:
    """Raises CheckpointError where the weights are missing, or not those that `settings` was written with."""
    if not weights.is_file():
        raise CheckpointError(
            f"{weights.parent} has {settings.name} but no {weights.name}; copy the whole directory or save the {what} again."
        )
    if sha256(weights) != digest:
        raise CheckpointError(
            f"{weights} is not the file that {settings.name} was written with (checksum differs); save the {what} again."
        )
