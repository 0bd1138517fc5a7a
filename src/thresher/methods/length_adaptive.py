"""Length-Adaptive Transformer (Kim and Cho, ACL 2021): train once with lengths drawn at random, search the lengths afterwards.

Every step runs the model whole (the task's loss), under the shortest configuration and under random ones (LengthDrop and
LayerDrop), which learn from what the whole one just said: the sandwich rule with in-place distillation. A dropped token's
last state is what heads that read every token find in its place (drop-and-restore).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from thresher.errors import OptionError
from thresher.methods.retention import Retention, RetentionPolicy
from thresher.policy import Draw, Retained, Stage


@dataclass(frozen=True, kw_only=True)
class LengthAdaptive(Retention):
    """Keep the tokens that receive most attention, of a model trained under random lengths.

    length_drop: p; a layer keeps between (1 - p) and all of what reaches it, drawn for every step.
    layer_drop: the probability that a random pass of a step leaves a layer out; such a layer drops no tokens.
    sandwich: random passes of a step beside the whole and the shortest one.
    reverse_kl: distil by KL(student || whole), as the authors' code does, instead of KL(whole || student).
    """

    method: ClassVar[str] = "length-adaptive"
    searches: ClassVar[Literal["", "before", "after"]] = "after"
    length_drop: float = 0.2
    layer_drop: float = 0.2
    sandwich: int = 2
    reverse_kl: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (0.0 <= self.length_drop < 1.0 and 0.0 <= self.layer_drop < 1.0):
            raise OptionError(
                f"length_drop and layer_drop must be at least 0 and below 1, not {self.length_drop} and {self.layer_drop}."
            )
        if self.sandwich < 0:
            raise OptionError(f"sandwich must be at least 0, not {self.sandwich}.")


class LengthAdaptivePolicy(RetentionPolicy[LengthAdaptive]):
    """Attention mass under whatever configuration a pass asks for."""

    def stages(self) -> tuple[Stage, ...]:
        return (Stage(name="length-drop", mode="hard", learning_rate=3e-5, distil_weight=1.0),)

    def draws(self, stage: Stage) -> Sequence[Draw]:
        """The sandwich: whole, shortest, random ones; each loss divided by their number."""
        layers, config = self.geometry.layers, self.config
        share = 1.0 / (config.sandwich + 2)
        # Without labels the whole model learns from what it was, or its answers would drift with those of the others.
        taught = 0.0 if stage.label_weight else stage.distil_weight
        whole = Draw(Retained((1.0,) * layers), stage.label_weight * share, taught * share)
        shortest = tuple((1.0 - config.length_drop) ** layer for layer in range(1, layers + 1))
        others = [Retained(shortest), *(self._random() for _ in range(config.sandwich))]
        learn = stage.distil_weight * share
        return (whole, *(Draw(reads, 0.0, learn, from_first=True, reverse=config.reverse_kl) for reads in others))

    def _random(self) -> Retained:
        layers, config = self.geometry.layers, self.config
        skip = frozenset(i + 1 for i in range(layers) if float(torch.rand(())) < config.layer_drop)
        kept, curve = 1.0, []
        for layer in range(1, layers + 1):
            if layer not in skip:
                kept *= 1.0 - config.length_drop * float(torch.rand(()))
            curve.append(kept)
        return Retained(tuple(curve), skip)
