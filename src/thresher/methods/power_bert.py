"""PoWER-BERT (Goyal et al., ICML 2020): how many tokens each layer keeps is learned, as a soft weight for each rank.

Soft-extract: at layer l the token of rank k by attention received is multiplied by r_l[k], which starts at 1, stays in [0, 1]
and is pulled towards 0 by the loss; sum(r_l) is then the layer's number of tokens. Afterwards tokens really drop, and the
model trains on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from thresher.errors import OptionError
from thresher.evidence import Evidence, Wanted
from thresher.methods.retention import Retention, RetentionPolicy
from thresher.packed import PackedTokens
from thresher.parts import scores
from thresher.parts.rules import ranks
from thresher.policy import Batch, Geometry, Point, Stage, Trace, retained


@dataclass(frozen=True, kw_only=True)
class PowerBert(Retention):
    """Keep the tokens that receive most attention, how many at each layer is learned.

    slots: N, the entries of a layer's retention vector. absolute: an entry is a rank and the numbers of tokens are the same
        for every row, as in the paper (ranks from N on share the last entry); otherwise an entry is 1/N of a row's ranks, so
        that rows of any length keep the same share of themselves.
    penalty: lambda, the weight of sum over layers of l * |r_l|_1 in the soft stage's loss.
    retention: leave it out; it is what training finds.
    """

    method: ClassVar[str] = "power-bert"
    slots: int = 64
    absolute: bool = False
    penalty: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.slots < 1:
            raise OptionError(f"slots must be at least 1, not {self.slots!r}.")
        if self.penalty < 0:
            raise OptionError(f"penalty must be at least 0, not {self.penalty!r}.")

    def scoring(self) -> tuple[scores.Score, Wanted]:
        return scores.SCORES["attention-mass-off-diagonal"]


class PowerBertPolicy(RetentionPolicy[PowerBert]):
    """Soft weights by rank while they train, their sums as a retention configuration after."""

    def __init__(self, config: PowerBert, geometry: Geometry) -> None:
        super().__init__(config, geometry)
        self.retain = nn.Parameter(torch.ones(geometry.layers, config.slots))
        self._derived: tuple[int, tuple[float, ...], tuple[int, ...]] | None = None

    def derived(self) -> tuple[tuple[float, ...], tuple[int, ...]]:
        """The configuration in r: fractions and counts, k_l = max(1, min(k_(l-1), floor(sum r_l))), strength applied."""
        version = self.retain._version
        if self._derived is None or self._derived[0] != version:
            sums = torch.cummin(self.retain.detach().double().sum(1), 0).values
            slots, strength = self.config.slots, self.config.strength
            fractions = tuple((max(s, 1.0) / slots) ** strength for s in sums.tolist())
            counts = tuple(max(1, int(slots * f + 1e-6)) for f in fractions)
            self._derived = version, fractions, counts
        return self._derived[1:]

    def curve(self) -> tuple[float, ...]:
        learned = self.config.retention is None and retained() is None
        return self.derived()[0] if learned else super().curve()

    def counts(self) -> tuple[int, ...] | None:
        learned = self.config.absolute and self.config.retention is None and retained() is None
        return self.derived()[1] if learned else None

    def wants(self, layer: int) -> Wanted:
        return self.wanted if self.mode == "soft" else super().wants(layer)

    def act(self, point: Point, layer: int, tokens: PackedTokens, evidence: Evidence, trace: Trace) -> PackedTokens:
        if self.mode != "soft":
            return super().act(point, layer, tokens, evidence, trace)
        if point is not Point.AFTER_ATTENTION:
            return tokens
        weight = self.retain[layer - 1][self._slot(ranks(self.score(tokens, evidence), tokens), tokens)]
        weight = weight.masked_fill(tokens.layout.protected, 1.0)
        return tokens.with_hidden(tokens.hidden * weight.unsqueeze(1).to(tokens.hidden.dtype))

    def _slot(self, place: Tensor, tokens: PackedTokens) -> Tensor:
        """[T] int64, the entry of the retention vector for each token's rank."""
        slots = self.config.slots
        if self.config.absolute:
            return place.clamp(max=slots - 1)
        return (place * slots).div(tokens.layout.spread(tokens.layout.original), rounding_mode="floor")

    def after_step(self) -> None:
        with torch.no_grad():
            self.retain.clamp_(0.0, 1.0)

    def auxiliary_loss(self, trace: Trace, batch: Batch) -> Tensor | None:
        """penalty * sum over layers l of l * |r_l|_1, only in the soft stage."""
        if self.mode != "soft":
            return None
        depth = torch.arange(1, self.geometry.layers + 1, device=self.retain.device)
        return self.config.penalty * (depth * self.retain.abs().sum(1)).sum()

    def stages(self) -> tuple[Stage, ...]:
        """The paper's soft extraction and re-training; the first of its three steps is ordinary fine-tuning."""
        return (
            Stage(name="soft", mode="soft", learning_rate=3e-5, policy_learning_rate=3e-3),
            Stage(name="hard", mode="hard", learning_rate=3e-5),
        )
