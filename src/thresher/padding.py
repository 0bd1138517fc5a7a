"""Rows of unequal lengths as one tensor, for what takes nothing else."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def padded(rows: Sequence[Sequence[int]], fill: int, width: int | None = None) -> Tensor:
    """[B, N] int64, `fill` behind what is shorter. width: N; None: of the longest row."""
    # torch.tensor reads nested lists number by number, ten times as slowly: of short rows that is felt beside a forward pass.
    out = np.full((len(rows), width or max(map(len, rows))), fill, dtype=np.int64)
    for place, row in zip(out, rows, strict=True):
        place[: len(row)] = row
    return torch.from_numpy(out)


__all__ = ["padded"]
