"""Files that are whole or not there, and the lock of the one writer."""

from __future__ import annotations

import contextlib
import mmap
import os
import weakref
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from thresher.errors import StoreError

TEMPORARY = ".tmp-"
LOCK = "lock"
Block = bytes | memoryview  # contiguous
STRIDE = 1 << 22  # bytes checked at a time


@dataclass(frozen=True)
class FileEntry:
    """A file as it was written: its name in the directory, its bytes, and their CRC-32."""

    name: str
    size: int
    crc: int


class NoStoreError(StoreError):
    """Nothing at a place is a store's."""


class MissingFileError(StoreError):
    """A file that the manifest names is not there: lost, or replaced since the manifest was read."""


def no_store(place: object) -> NoStoreError:
    return NoStoreError(f"{place} holds no candidate store; give the place of one, or create it.")


def damaged(path: Path, reason: str) -> StoreError:
    return StoreError(
        f"{path} is damaged ({reason}); restore it from a copy, or remove the store and index its candidates anew."
    )


def write_file(directory: Path, name: str, blocks: Iterable[Block]) -> FileEntry:
    """Write `blocks` one after another; the name appears when all of it is on the disk.

    Raises OSError, and leaves nothing behind.
    """
    temporary = directory / (TEMPORARY + name)
    size = crc = 0
    try:
        with temporary.open("wb") as file:
            for block in blocks:
                file.write(block)
                crc = zlib.crc32(block, crc)
                size += memoryview(block).nbytes
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, directory / name)
    except BaseException:
        remove(temporary)
        raise
    return FileEntry(name, size, crc)


def sync(directory: Path) -> None:
    """Make the names in `directory` last, as fsync does for what is in a file."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove(path: Path) -> None:
    """Unlink if possible; what stays is removed by the next writer."""
    with contextlib.suppress(OSError):
        os.unlink(path)


def mapped(directory: Path, entry: FileEntry) -> mmap.mmap:
    """The file, mapped for reading. Its size is checked here, its checksum by `checked`: that one has to read all of it.

    Raises MissingFileError, or StoreError where it has another size or cannot be read.
    """
    path = directory / entry.name
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size != entry.size:
                raise damaged(path, f"it has {size} bytes, not {entry.size}")
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError as error:
        raise MissingFileError(
            f"{path} is missing; restore it from a copy, or remove the store and index its candidates anew."
        ) from error
    except OSError as error:
        raise StoreError(f"Could not read {path}: {error.strerror or error}.") from error


def release(mapping: mmap.mmap) -> None:
    """Let go of the pages that were read: they stay in the system's cache, and no longer count as this process's memory."""
    if hasattr(mmap, "MADV_DONTNEED"):
        mapping.madvise(mmap.MADV_DONTNEED)


def checked(directory: Path, entry: FileEntry, mapping: mmap.mmap) -> None:
    """Read all of a mapped file. Raises StoreError where its checksum differs."""
    crc = 0
    with memoryview(mapping) as whole:
        for start in range(0, entry.size, STRIDE):
            crc = zlib.crc32(whole[start : start + STRIDE], crc)
            release(mapping)
    if crc != entry.crc:
        raise damaged(directory / entry.name, "its checksum differs")


class Lock:
    """Held from its making until `release`, until it is collected, or until the process is gone, killed or not."""

    def __init__(self, directory: Path) -> None:
        """Raises StoreError at once where another process, or another handle in this one, holds it."""
        try:
            import fcntl
        except ImportError as error:
            raise StoreError(
                f"{directory} cannot be changed on this system, which has no flock; use Linux or macOS."
            ) from error
        handle = -1
        try:
            handle = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            writer = os.pread(handle, 20, 0).decode("ascii", "replace").strip()
            os.close(handle)
            raise StoreError(
                f"{directory} is being written by another one (process {writer or 'unknown'}); "
                "wait until it is done, or close it first."
            ) from error
        except OSError as error:
            if handle >= 0:
                os.close(handle)
            raise StoreError(f"Could not lock {directory} for writing: {error.strerror or error}.") from error
        with contextlib.suppress(OSError):  # only for the message above; a full disk is no reason to fail
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
        self._close = weakref.finalize(self, os.close, handle)
        _LOCKS.add(self)

    @property
    def held(self) -> bool:
        return bool(self._close.alive)

    def release(self) -> None:
        self._close()


_LOCKS: weakref.WeakSet[Lock] = weakref.WeakSet()


def _leave_to_parent() -> None:
    """In a forked child: it would hold its parent's locks as well, and go on when that one is gone."""
    for lock in list(_LOCKS):
        lock.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_to_parent)


__all__ = [
    "LOCK",
    "TEMPORARY",
    "Block",
    "FileEntry",
    "Lock",
    "MissingFileError",
    "checked",
    "damaged",
    "mapped",
    "release",
    "remove",
    "sync",
    "write_file",
]
