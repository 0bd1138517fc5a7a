"""Exits for classes by how certain a branch is: FastBERT, DeeBERT, and the largest probability."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import torch
from torch import Tensor, nn

from thresher.errors import DataError, OptionError
from thresher.exits.base import Exit, ExitConfig, Kind, Memory, from_answers, from_labels
from thresher.exits.branches import AttentiveBranch, PooledBranch
from thresher.policy import Batch


@dataclass(frozen=True, kw_only=True)
class CertainExit(ExitConfig):
    """A row leaves when its branch's uncertainty is at most a threshold, times `strength`."""

    serves: ClassVar[tuple[Kind, ...]] = ("classes",)
    scaled: ClassVar[tuple[str, ...]] = ("threshold",)

    threshold: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.threshold <= self.highest():
            raise OptionError(f"threshold (tau) must lie between 0 and {self.highest():g}, not {self.threshold!r}.")

    def highest(self) -> float:
        return 1.0


@dataclass(frozen=True, kw_only=True)
class FastBERT(CertainExit):
    """FastBERT (Liu et al., ACL 2020): leave where the entropy of the classes, divided by its maximum log C, is at most
    `threshold` (the paper's speed).

    A branch is a self-attention of `width` and `heads` over the tokens still there; it learns what the model itself says at the
    end. reverse: by KL(branch || model), as the paper writes it, instead of KL(model || branch), as its authors computed it.
    """

    method: ClassVar[str] = "fastbert"
    width: int = 128
    heads: int = 2
    reverse: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.heads < 1 or self.width < 1 or self.width % self.heads:
            raise OptionError(f"width must be a multiple of heads, not {self.width} for {self.heads}.")


@dataclass(frozen=True, kw_only=True)
class DeeBERT(CertainExit):
    """DeeBERT (Xin et al., ACL 2020): leave where the entropy of the classes, in nats, is at most `threshold`.

    A branch is a pooler and a linear layer on the first token; it learns from labels.
    """

    method: ClassVar[str] = "deebert"
    threshold: float = 0.1

    @property
    def labelled(self) -> bool:
        return True

    def highest(self) -> float:
        return math.inf


@dataclass(frozen=True, kw_only=True)
class Confidence(CertainExit):
    """Leave where the largest probability is at least `threshold`; strength scales what it may lack of 1.

    A branch is DeeBERT's, and learns what the model itself says at the end.
    """

    method: ClassVar[str] = "confidence"
    threshold: float = 0.9


def entropy(logits: Tensor) -> Tensor:
    """[B, C] → [B], in nats."""
    logs = logits.log_softmax(-1)
    return -(logs.exp() * logs).sum(-1)


CertainT = TypeVar("CertainT", bound=CertainExit)


class ThresholdExit(Exit[CertainT]):
    """A row leaves when its uncertainty is at most the threshold."""

    def branch(self) -> nn.Module:
        return PooledBranch(self.geometry.hidden, self.head.outputs)

    def overhead_flops(self, n: int) -> int:
        return PooledBranch.flops(self.geometry.hidden, self.head.outputs)

    def uncertainty(self, said: Tensor) -> Tensor:
        """[B, C] → [B]."""
        return entropy(said)

    def bar(self) -> float:
        return self.config.threshold

    def decide(self, layer: int, said: Tensor, before: Memory | None) -> tuple[Tensor | None, Memory | None]:
        return self.uncertainty(said) <= self.bar() * self.config.strength, None

    def loss(self, branches: list[Tensor], outputs: Tensor, batch: Batch) -> Tensor:
        """The sum over branches of KL(model || branch)."""
        return torch.stack([from_answers(said, outputs) for said in branches]).sum()


class FastBERTExit(ThresholdExit[FastBERT]):
    """Normalised entropy, attentive branches, self-distillation."""

    def branch(self) -> nn.Module:
        return AttentiveBranch(self.geometry.hidden, self.config.width, self.config.heads, self.head.outputs)

    def overhead_flops(self, n: int) -> int:
        return AttentiveBranch.flops(n, self.geometry.hidden, self.config.width, self.config.heads, self.head.outputs)

    def uncertainty(self, said: Tensor) -> Tensor:
        return entropy(said) / math.log(self.head.outputs)

    def loss(self, branches: list[Tensor], outputs: Tensor, batch: Batch) -> Tensor:
        return torch.stack([from_answers(said, outputs, reverse=self.config.reverse) for said in branches]).sum()


class DeeBERTExit(ThresholdExit[DeeBERT]):
    """Entropy, pooled branches, cross-entropy with the labels."""

    def check(self, config: DeeBERT) -> None:
        most = math.log(self.head.outputs)
        if config.threshold > most:
            raise OptionError(
                f"threshold={config.threshold:g} is above log {self.head.outputs} = {most:.3f}, the largest entropy of "
                f"{self.head.outputs} classes: everything would leave after the first layer; give a smaller one."
            )

    def loss(self, branches: list[Tensor], outputs: Tensor, batch: Batch) -> Tensor:
        """The sum over branches of the cross-entropy."""
        labels = labels_of(batch)
        return torch.stack([from_labels(self.head, said, labels) for said in branches]).sum()


class ConfidenceExit(ThresholdExit[Confidence]):
    """The largest probability, pooled branches, self-distillation."""

    def uncertainty(self, said: Tensor) -> Tensor:
        return 1 - said.softmax(-1).amax(-1)

    def bar(self) -> float:
        return 1 - self.config.threshold


def labels_of(batch: Batch) -> Tensor:
    """Raises DataError where a batch has none."""
    if "labels" not in batch:
        raise DataError("These exits learn from labels, and the batch has none; give labels, or take fastbert.")
    return batch["labels"]
