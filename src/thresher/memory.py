"""What the C library does with memory that a layer has freed."""

from __future__ import annotations

import ctypes

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
    try:
        library = ctypes.CDLL(None)
        _ = library.gnu_get_libc_version
    except (AttributeError, OSError, TypeError):  # the last where there is no library of the process itself (Windows)
        return False
    return bool(library.mallopt(MMAP_THRESHOLD, LARGE)) and bool(library.mallopt(TRIM_THRESHOLD, LARGE))


__all__ = ["keep_memory"]
