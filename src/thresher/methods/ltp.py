"""Learned Token Pruning (Kim et al., KDD 2022), and the two threshold rules it is compared with.

A token is dropped at layer l when the attention mass it receives is below a threshold of that layer. Thresholds are
learned in a soft
stage: the layer's output is multiplied by sigmoid((s - theta_l) / T), and the mean of that mask is a loss. Then they
are fixed, tokens really drop, and the model trains on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from thresher.errors import OptionError
from thresher.evidence import NOTHING, Evidence, Wanted
from thresher.packed import PackedTokens
from thresher.parts.rules import keep_above
from thresher.parts.scores import attention_mass, relative
from thresher.policy import Batch, Geometry, Point, Policy, PolicyConfig, Stage, Trace

MASK = "ltp mask"


@dataclass(frozen=True, kw_only=True)
class Thresholds(PolicyConfig):
    """A threshold that rises with depth: layer l of L drops what scores below `threshold` * l / L, times `strength`."""

    threshold: float = 0.01
    relative: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.threshold <= 1.0:
            raise OptionError(f"threshold must lie between 0 and 1, not {self.threshold!r}.")


@dataclass(frozen=True, kw_only=True)
class RisingThreshold(Thresholds):
    """Fixed thresholds in LTP's rising shape, not learned."""

    method: ClassVar[str] = "rising-threshold"


@dataclass(frozen=True, kw_only=True)
class RelativeThreshold(Thresholds):
    """Drop what receives less than a share of the row's largest attention mass; the same share at every layer."""

    method: ClassVar[str] = "relative-threshold"
    threshold: float = 0.1
    relative: ClassVar[bool] = True


@dataclass(frozen=True, kw_only=True)
class LTP(Thresholds):
    """Learned Token Pruning: drop what receives less attention than a threshold learned for each layer.

    `threshold` is where the last layer starts (layer l starts at threshold * l / L).

    temperature: T of the soft mask. penalty: lambda, the weight of the mean mask in the soft stage's loss.
    """

    method: ClassVar[str] = "ltp"
    temperature: float = 1e-3
    penalty: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.temperature > 0 and self.penalty >= 0):
            raise OptionError("temperature must be above 0 and penalty at least 0.")


class ThresholdPolicy(Policy[Thresholds]):
    """Drop what scores below the layer's threshold."""

    def __init__(self, config: Thresholds, geometry: Geometry) -> None:
        super().__init__(config, geometry)
        depth = torch.arange(1, geometry.layers + 1, dtype=torch.float32) / geometry.layers
        start = torch.full_like(depth, config.threshold) if config.relative else config.threshold * depth
        self.theta: Tensor
        self.set_thresholds(start)

    def set_thresholds(self, start: Tensor) -> None:
        """start: [L], the threshold of each layer."""
        self.register_buffer("theta", start, persistent=False)

    def wants(self, layer: int) -> Wanted:
        if self.mode == "hard":  # the mass only selects: no gradient flows through it
            return NOTHING if self.config.strength == 0 else Wanted(mass=True, detached=True)
        return Wanted(mass=True)

    def score(self, tokens: PackedTokens, evidence: Evidence) -> Tensor:
        mass = attention_mass(tokens, evidence)
        return relative(mass, tokens) if self.config.relative else mass

    def act(self, point: Point, layer: int, tokens: PackedTokens, evidence: Evidence, trace: Trace) -> PackedTokens:
        if point is not Point.AFTER_ATTENTION or self.config.strength == 0:
            return tokens
        return tokens.keep(keep_above(self.score(tokens, evidence), self.theta[layer - 1] * self.config.strength))


class LTPPolicy(ThresholdPolicy):
    """Learned thresholds: soft while they train, hard after."""

    config: LTP

    def set_thresholds(self, start: Tensor) -> None:
        self.theta = nn.Parameter(start)

    def act(self, point: Point, layer: int, tokens: PackedTokens, evidence: Evidence, trace: Trace) -> PackedTokens:
        if self.mode != "soft":
            return super().act(point, layer, tokens, evidence, trace)
        if point is not Point.AFTER_LAYER:
            return tokens
        distance = (self.score(tokens, evidence) - self.theta[layer - 1]) / self.config.temperature
        mask = torch.sigmoid(distance).masked_fill(tokens.layout.protected, 1.0)
        trace.add(MASK, mask.mean())
        return tokens.with_hidden(tokens.hidden * mask.unsqueeze(1).to(tokens.hidden.dtype))

    def stages(self) -> tuple[Stage, ...]:
        """The paper's second and third stage; the first is ordinary fine-tuning."""
        return (
            Stage(name="soft", mode="soft", learning_rate=2e-5, policy_learning_rate=2e-5),
            Stage(name="hard", mode="hard", learning_rate=2e-5),
        )

    def auxiliary_loss(self, trace: Trace, batch: Batch) -> Tensor | None:
        """penalty * (1 / L) * sum over layers of the mean mask; only in the soft stage."""
        masks = trace.auxiliary.get(MASK)
        if self.mode != "soft" or not masks:
            return None
        return self.config.penalty * torch.stack(masks).mean()
