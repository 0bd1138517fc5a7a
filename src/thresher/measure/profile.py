"""Where the time goes, by stage of a pass: what reading less saves, and what the engine and the method cost."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from thresher.engine import keep_everything
from thresher.errors import OptionError
from thresher.measure.run import answers, batches, collate
from thresher.model import attachment_of, evaluating, find_encoder
from thresher.timing import STAGES, timeline

if TYPE_CHECKING:
    import datasets


@dataclass(frozen=True)
class StageTimes:
    """Median seconds of each stage over the rows, once packed with nothing dropped and once as attached."""

    packed: dict[str, float]
    thresher: dict[str, float]


def profile(
    model: Any,
    rows: datasets.Dataset,
    *,
    batch_size: int | None = None,
    rounds: int = 5,
    tokenise: Callable[[], object] | None = None,
    on_round: Callable[[int], object] | None = None,
) -> StageTimes:
    """Run an attached model over encoded rows `rounds` times each way, interleaved, after one round of warm-up.

    batch_size: see `batches`. tokenise: makes the rows from their texts once more; it is timed once a round, and both
    ways have it in common. on_round: called with the number of the round just done, warm-up included (progress bars).
    Raises OptionError when there are no rows or the model is on a GPU, whose kernels run behind the host's clock.
    """
    attachment_of(model)
    encoder = find_encoder(model)
    if encoder.device.type != "cpu":
        raise OptionError("A profile by stage is read from the host's clock; on a GPU use torch.profiler.")
    if not len(rows) or rounds < 1:
        raise OptionError(f"A profile needs at least 1 row and 1 round, not {len(rows)} and {rounds}.")
    pad_id = encoder.config.pad_token_id or 0
    inputs = [collate(rows, index, pad_id) for index in batches(rows, batch_size)]
    ways = {"packed": keep_everything, "thresher": contextlib.nullcontext}
    seen: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    with evaluating(model), torch.inference_mode():
        for number in range(rounds + 1):
            tokenising = _seconds(tokenise)
            for way, how in ways.items():
                with how(), timeline() as times:
                    for batch in inputs:
                        times.skip()
                        answers(model, dict(batch))
                        times.mark("head")
                if number:
                    seen[way].append({**times.seconds, "tokenise": tokenising})
            if on_round:
                on_round(number + 1)
    return StageTimes(*(_medians(seen[way]) for way in ("packed", "thresher")))


def _seconds(work: Callable[[], object] | None) -> float:
    if work is None:
        return 0.0
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def _medians(rounds: list[dict[str, float]]) -> dict[str, float]:
    return {stage: float(np.median([one[stage] for one in rounds])) for stage in STAGES}


__all__ = ["StageTimes", "profile"]
