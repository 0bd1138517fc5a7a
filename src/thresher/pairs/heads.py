"""What turns two vectors, or one joint state, into a score or logits."""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thresher.errors import OptionError, nearest

Similarity = Literal["dot", "cosine"]


def check_choice(name: str, value: str, choices: object) -> None:
    """Raises OptionError for a setting that is none of a Literal's values."""
    known = get_args(choices)
    if value not in known:
        raise OptionError(f"There is no {name} {value!r}{nearest(str(value), known)}")


class PairHead(nn.Module):
    """An MLP on [a; b; |a - b|] (Reimers and Gurevych 2019; MixEncoder 3.2), or the vectors' similarity where classes is 0."""

    def __init__(self, size: int, classes: int, similarity: Similarity = "dot") -> None:
        super().__init__()
        check_choice("similarity", similarity, Similarity)
        self.size = size
        self.similarity = similarity
        self.mlp = None
        if classes:
            self.mlp = nn.Sequential(nn.Linear(3 * size, size), nn.GELU(), nn.Linear(size, classes))

    @property
    def flops(self) -> int:
        """Of one pair of vectors; a learned head's are left out, as everywhere."""
        return 2 * self.size if self.mlp is None else 0

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """a, b: [N, D] → [N], or [N, C] for C > 1 classes."""
        if self.mlp is not None:
            return _narrow(self.mlp(torch.cat([a, b, (a - b).abs()], -1)))
        if self.similarity == "cosine":
            return F.cosine_similarity(a, b, dim=-1)
        return (a * b).sum(-1)


class JointHead(nn.Module):
    """BERT's classifier on the first token of a pair that was read together: Linear, tanh, Linear."""

    def __init__(self, size: int, classes: int) -> None:
        super().__init__()
        self.dense = nn.Linear(size, size)
        self.out = nn.Linear(size, max(1, classes))

    def forward(self, first: Tensor) -> Tensor:
        """[N, D] → [N], or [N, C] for C > 1 classes."""
        return _narrow(self.out(torch.tanh(self.dense(first))))


def _narrow(logits: Tensor) -> Tensor:
    return logits.squeeze(-1) if logits.shape[-1] == 1 else logits
