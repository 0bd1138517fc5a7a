"""What the C library does with memory that a layer has freed."""

from __future__ import annotations

import ctypes
from typing import Any

# mallopt's parameters (malloc.h), and more than a layer ever asks for at once.
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
LARGE = 2**30


def keep_memory() -> bool:
    """Have this process keep the memory that torch frees, to use it again. Call once, before the first pass.

    glibc gives large blocks back to the system as soon as they are free, so that layers ask for their activations anew and
    the system clears them page by page; how often depends on the sizes that follow each other. Afterwards the process stays
    as large as it ever was. It holds for all that runs in the process; the command line does it itself.
    The environment variables MALLOC_TRIM_THRESHOLD_ and MALLOC_MMAP_THRESHOLD_ do the same from outside.

    Returns whether it was done: not where the C library is another one (macOS, Windows, Alpine).
    """
    library = _glibc()
    if library is None:
        return False
    return bool(library.mallopt(MMAP_THRESHOLD, LARGE)) and bool(library.mallopt(TRIM_THRESHOLD, LARGE))


def give_back_memory() -> None:
    """Give free memory back to the system, once: between pieces of long work, whose many sizes leave gaps that nothing that
    comes later fits into. Does nothing where the C library is another one."""
    library = _glibc()
    if library is not None:
        library.malloc_trim(0)


def _glibc() -> Any:
    try:
        library = ctypes.CDLL(None)
        _ = library.gnu_get_libc_version
    except (AttributeError, OSError, TypeError):  # the last where there is no library of the process itself (Windows)
        return None
    return library


__all__ = ["give_back_memory", "keep_memory"]
