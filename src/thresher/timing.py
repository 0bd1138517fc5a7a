"""Where the time of a pass goes: marks on one timeline, which cost nothing while nobody looks."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field

STAGES = ("tokenise", "embed", "pack", "linear", "attention", "evidence", "select", "norms", "restore", "head")
"""norms: what is left of a layer, its norms, activations and residuals, and the hooks."""


@dataclass
class Timeline:
    """seconds: by stage, of every call inside the `timeline` block, by this thread."""

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    _last: float = field(default_factory=time.perf_counter)

    def mark(self, stage: str) -> None:
        now = time.perf_counter()
        self.seconds[stage] += now - self._last
        self._last = now

    def skip(self) -> None:
        """What happened since the last mark belongs to no stage."""
        self._last = time.perf_counter()


_current: ContextVar[Timeline | None] = ContextVar("thresher_timeline", default=None)


def mark(stage: str) -> None:
    """The time since the last mark was spent on `stage`."""
    if (now := _current.get()) is not None:
        now.mark(stage)


@contextlib.contextmanager
def timeline() -> Iterator[Timeline]:
    """Collect the time of what runs inside the block. Meaningful on the CPU; on a GPU kernels run behind the marks."""
    made = Timeline()
    token = _current.set(made)
    try:
        yield made
    finally:
        _current.reset(token)


__all__ = ["STAGES", "Timeline", "mark", "timeline"]
