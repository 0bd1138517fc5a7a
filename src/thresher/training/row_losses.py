"""The task's loss of every row by itself, where transformers gives only the mean of a batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from thresher.errors import OptionError
from thresher.targets import IGNORED


def row_losses(outputs: Any, batch: Mapping[str, Tensor], *, sigmoid: bool = False) -> Tensor:
    """[B] float32, whose mean is the model's own loss (of taggers: where all rows have as many labels).

    outputs: of a model that classifies, regresses, tags or answers questions. batch: with its labels. sigmoid: logits
    are those of probabilities.
    Raises OptionError when outputs or labels are of another kind.
    """
    if "start_logits" in outputs and "start_positions" in batch:
        ends = [
            (outputs[f"{side}_logits"].float(), batch[f"{side}_positions"].reshape(-1)) for side in ("start", "end")
        ]
        # A position beyond the row, as of an answer that was cut off, teaches nothing.
        losses = [_cross_entropy(logits, at.masked_fill(at >= logits.shape[1], IGNORED)) for logits, at in ends]
        return (losses[0] + losses[1]) / 2
    logits, labels = outputs.get("logits"), batch.get("labels")
    if logits is None or labels is None:
        raise OptionError(
            "This stage needs the task's loss of every row: labels, and a model that classifies, tags or answers questions."
        )
    logits = logits.float()
    if logits.dim() == 3:
        of_tokens = _cross_entropy(logits.transpose(1, 2), labels)
        return of_tokens.sum(1) / (labels != IGNORED).sum(1).clamp(min=1)
    if sigmoid:
        wanted = labels.reshape(logits.shape).float()
        return F.binary_cross_entropy_with_logits(logits, wanted, reduction="none").mean(1)
    if logits.shape[1] > 1:
        return _cross_entropy(logits, labels.reshape(-1))
    return F.mse_loss(logits.squeeze(1), labels.reshape(-1).float(), reduction="none")


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="none")


__all__ = ["row_losses"]
