"""An encoder whose process is killed as if memory had run out; in a module of its own, since workers import it."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

from thresher.scale import CandidateEncoder


class Killed(CandidateEncoder):
    """The process of each of the first `times` batches with `word` dies; marks of it are left beside the scorer."""

    word, times = "w13", 1

    def __call__(self, batch: Any) -> Any:
        marks = Path(self.directory).parent
        if any(self.word in text.split() for text in batch["text"]):
            died = len(list(marks.glob("died-*")))
            if died < self.times:
                (marks / f"died-{died}").touch()
                os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(batch)


class KilledAlways(Killed):
    times = 1000
