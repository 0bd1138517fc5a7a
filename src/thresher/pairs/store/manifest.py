"""The manifest: the last committed state of a store, with a checksum of its own."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from thresher.errors import StoreError
from thresher.pairs.store.files import LOCK, TEMPORARY, FileEntry, damaged, no_store, remove, sync, write_file
from thresher.pairs.store.schema import Schema

FORMAT = 1
MANIFEST = "manifest.jsonl"
NAME = re.compile(r"segment-\d+\.seg|dead-\d+\.rows")
DEAD_BYTES = 4  # a row number is a uint32


@dataclass(frozen=True)
class SegmentEntry:
    """rows, tokens, id_bytes: how long its columns are (tokens: a ragged store's vectors). dead: rows to pass over."""

    file: FileEntry
    rows: int
    tokens: int
    id_bytes: int
    dead: FileEntry | None = None

    @property
    def live(self) -> int:
        return self.rows - (self.dead.size // DEAD_BYTES if self.dead else 0)


@dataclass(frozen=True)
class Manifest:
    """version: goes up with every change; next: the number of the next file, so that no name is ever used twice."""

    schema: Schema
    version: int = 1
    next: int = 1
    segments: tuple[SegmentEntry, ...] = ()

    @property
    def files(self) -> tuple[FileEntry, ...]:
        return tuple(f for s in self.segments for f in (s.file, s.dead) if f is not None)

    @property
    def count(self) -> int:
        return sum(segment.live for segment in self.segments)

    def write(self, directory: Path) -> None:
        """Replace the one that is there, and make it last. Raises OSError."""
        state = {"format": FORMAT, **asdict(self), "schema": self.schema.to_dict()}
        line = json.dumps(state).encode() + b"\n"
        sync(directory)  # the files it names come first
        write_file(directory, MANIFEST, [line, json.dumps({"checksum": _checksum(line)}).encode() + b"\n"])
        sync(directory)


def _checksum(line: bytes) -> str:
    return hashlib.blake2b(line, digest_size=16).hexdigest()


def exists(directory: Path) -> bool:
    return (directory / MANIFEST).is_file()


def read(directory: Path) -> Manifest:
    """Raises StoreError: no store there, another format, or a file that is not as it was written."""
    path = directory / MANIFEST
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise no_store(directory) from error
    except OSError as error:
        raise StoreError(f"Could not read {path}: {error.strerror or error}.") from error
    first, newline, second = content.partition(b"\n")
    line = first + newline
    if second != json.dumps({"checksum": _checksum(line)}).encode() + b"\n":
        raise damaged(path, "its checksum differs")
    try:
        state = json.loads(line)
        version = state.pop("format")
        if version == FORMAT:
            return _manifest(state)
    except (ValueError, KeyError, TypeError, AttributeError, StoreError) as error:
        raise damaged(path, f"{type(error).__name__}: {error}") from error
    raise StoreError(
        f"{path} has format {version!r}, this version reads {FORMAT}; index the candidates again with this version."
    )


def _manifest(state: dict[str, Any]) -> Manifest:
    segments = []
    for values in state["segments"]:
        file = FileEntry(**values["file"])
        dead = FileEntry(**values["dead"]) if values["dead"] else None
        for entry in (file, dead):
            if entry and not NAME.fullmatch(entry.name):
                raise ValueError(f"it names {entry.name!r}")
        segments.append(SegmentEntry(**{**values, "file": file, "dead": dead}))
    return Manifest(**{**state, "schema": Schema.from_dict(state["schema"]), "segments": tuple(segments)})


def holds_others(directory: Path) -> bool:
    """Whether a directory without a manifest holds more than a store that was killed while it was made would have left."""
    return directory.is_dir() and any(
        path.name != LOCK and not path.name.startswith(TEMPORARY) for path in directory.iterdir()
    )


def sweep(directory: Path, manifest: Manifest | None) -> None:
    """Remove what a writer that did not come to its end left behind. Only for who holds the lock."""
    named = {entry.name for entry in manifest.files} if manifest else set()
    for path in directory.iterdir():
        ours = path.name.startswith(TEMPORARY) or NAME.fullmatch(path.name)
        if ours and path.name not in named:
            remove(path)


__all__ = ["DEAD_BYTES", "FORMAT", "MANIFEST", "Manifest", "SegmentEntry", "exists", "holds_others", "read", "sweep"]
