"""What the model is worth after each epoch of a stage, and the epochs that are kept.

AdapLeR (Modarressi et al., ACL 2022) takes the fastest epoch that loses at most a point, and averages what it learns from over
the best checkpoints of fine-tuning.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import TrainerCallback

from thresher.model import save
from thresher.training.resuming import by_one

POINT = 0.01  # what the fastest epoch may lose, where no other loss is given
BEST = 3  # checkpoints of fine-tuning that saliency is averaged over
FILE = "epochs.json"


@dataclass(frozen=True)
class Epoch:
    """number: from 1. speedup: of FLOPs. quality: on the validation rows, higher is better."""

    number: int
    speedup: float
    quality: float


Order = Callable[[Epoch], tuple[float, ...]]  # higher is better


def fastest(floor: float) -> Order:
    """The fastest of those whose quality is at least `floor`; where none is, the best."""
    return lambda epoch: (1.0, epoch.speedup) if epoch.quality >= floor - 1e-12 else (0.0, epoch.quality)


def best(epoch: Epoch) -> tuple[float, ...]:
    """The best first, of equals the later."""
    return epoch.quality, epoch.number


class Epochs(TrainerCallback):
    """Judges the model after each epoch, and keeps the models of the best ones in `directory`; a stage that goes on after an
    interruption finds there what was judged before.

    judge: the model as it is → its FLOPs speedup and its quality. most: how many are kept.
    """

    def __init__(
        self,
        model: Any,
        directory: Path,
        judge: Callable[[], tuple[float, float]],
        order: Order,
        most: int,
        processes: PartialState,
    ) -> None:
        self.model, self.directory, self.judge = model, directory, judge
        self.order, self.most, self.processes = order, most, processes

    def on_epoch_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        number = max(1, math.ceil((state.epoch or 0.0) - 1e-6))
        by_one(self.processes, lambda: self._judged(number))

    def _judged(self, number: int) -> None:
        before = [one for one in judged(self.directory) if one.number != number]
        # An epoch whose model is gone stays judged, behind those that there are: another order may have let it go.
        there = [one for one in before if (self.directory / str(one.number)).is_dir()]
        found = sorted([*there, Epoch(number, *self.judge())], key=self.order, reverse=True)
        if number in [one.number for one in found[: self.most]]:
            save(self.model, self.directory / str(number))
        self._note([*found, *sorted((one for one in before if one not in there), key=self.order, reverse=True)])
        for one in found[self.most :]:
            shutil.rmtree(self.directory / str(one.number), ignore_errors=True)

    def _note(self, found: list[Epoch]) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        new = self.directory / f".{FILE}"
        new.write_text(json.dumps([dataclasses.asdict(one) for one in found]) + "\n", encoding="utf-8")
        os.replace(new, self.directory / FILE)


def judged(directory: Path) -> list[Epoch]:
    """What `Epochs` judged in a directory, the best first; nothing where it was not at work."""
    file = directory / FILE
    return [Epoch(**one) for one in json.loads(file.read_text(encoding="utf-8"))] if file.is_file() else []


def kept(directory: Path) -> list[Path]:
    """The models that `Epochs` kept in a directory, the best first."""
    return [place for one in judged(directory) if (place := directory / str(one.number)).is_dir()]


__all__ = ["BEST", "POINT", "Epoch", "Epochs", "best", "fastest", "judged", "kept"]
