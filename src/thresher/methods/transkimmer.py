"""Transkimmer (Guan et al., ACL 2022): before each layer a small predictor says of every token whether it is read on.

In training the decision is drawn (Gumbel-softmax, straight-through) and a skimmed token is no key from then on, hidden before
the softmax: the authors' code multiplies after it, which leaves the other weights too small. A skimmed token keeps its vector
until the end. The mean fraction of tokens kept is a loss. Afterwards the decision is the larger logit, and tokens really drop.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thresher.errors import OptionError
from thresher.evidence import Evidence
from thresher.packed import PackedTokens
from thresher.parts.rules import margin
from thresher.policy import Batch, Geometry, Point, Policy, PolicyConfig, Stage, Trace

KEPT = "transkimmer kept"  # of each layer, the fraction of the real tokens that it read
ENTERED = "transkimmer entered"  # what a layer's end needs of its beginning: states, mask, who was skimmed


@dataclass(frozen=True, kw_only=True)
class Transkimmer(PolicyConfig):
    """Drop tokens of whose state a small learned predictor, before each layer, says that they need not be read on.

    bias: the last layer of a predictor starts at -bias for skimming and +bias for keeping, so that training starts from the
        model that reads everything. temperature: of the Gumbel-softmax. penalty: lambda, the weight of the mean kept
        fraction. strength shifts the difference of the two logits that a token needs, by 4 log(strength).
    """

    method: ClassVar[str] = "transkimmer"
    point: ClassVar[Point] = Point.BEFORE_LAYER
    bias: float = 5.0
    temperature: float = 1.0
    penalty: float = 0.3

    def __post_init__(self) -> None:
        super().__post_init__()
        if not math.isfinite(self.bias):
            raise OptionError(f"bias must be a number, not {self.bias!r}.")
        if not (self.temperature > 0 and self.penalty >= 0):
            raise OptionError("temperature must be above 0 and penalty at least 0.")


def skim_predictor(width: int, bias: float) -> nn.Sequential:
    """[T, width] → [T, 2], the logits of skimming and of keeping."""
    last = nn.Linear(width, 2)
    with torch.no_grad():
        last.bias.copy_(torch.tensor([-bias, bias]))
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.LayerNorm(width), nn.GELU(), last)


class TranskimmerPolicy(Policy[Transkimmer]):
    """A predictor before every layer, drawn from while it trains, taken at its word after."""

    def __init__(self, config: Transkimmer, geometry: Geometry) -> None:
        super().__init__(config, geometry)
        self.predictors = nn.ModuleList(skim_predictor(geometry.hidden, config.bias) for _ in range(geometry.layers))

    def act(self, point: Point, layer: int, tokens: PackedTokens, evidence: Evidence, trace: Trace) -> PackedTokens:
        if self.mode == "soft":
            if point is Point.BEFORE_LAYER:
                return self._hide(layer, tokens, trace)
            return self._carry(tokens, trace) if point is Point.AFTER_LAYER else tokens
        if point is not Point.BEFORE_LAYER or self.config.strength == 0:
            return tokens
        skim, keep = self.logits(layer, tokens).unbind(1)
        return tokens.keep(keep - skim >= margin(self.config.strength))

    def logits(self, layer: int, tokens: PackedTokens) -> Tensor:
        """[T, 2] float32"""
        return self.predictors[layer - 1](tokens.hidden.float()).float()  # type: ignore[no-any-return]

    def _hide(self, layer: int, tokens: PackedTokens, trace: Trace) -> PackedTokens:
        """The tokens with the newly skimmed ones hidden as by a simulated drop, differentiably.

        The mask m is 0 or 1 with the gradient of a probability. On the logits of a token that is a key, log m is 0 with the
        gradient of m; the sum of these over the layers so far is the gate that `_carry` needs.
        """
        protected = tokens.layout.protected
        alive = torch.ones_like(protected) if tokens.alive is None else tokens.alive
        gate = _gate(tokens, alive)
        mask = self._draw(self.logits(layer, tokens)).masked_fill(protected, 1.0)
        reads = mask.detach() > 0.5
        trace.add(KEPT, torch.where(alive, (1.0 + gate) * mask, 0.0).mean())
        trace.auxiliary[ENTERED] = [tokens.hidden, mask, alive & ~reads]
        weight = torch.where(alive & reads, gate + mask - 1.0, gate)
        if tokens.log_weight is not None:  # gone before: not to be revived by the sum
            weight = weight.masked_fill(~alive, -math.inf)
        return replace(tokens, alive=alive, log_weight=weight).keep(reads)

    def _draw(self, logits: Tensor) -> Tensor:
        """[T], 1 to keep and 0 to skim, straight-through; without noise in eval mode."""
        if self.training:
            return F.gumbel_softmax(logits, tau=self.config.temperature, hard=True)[:, 1]
        soft = (logits / self.config.temperature).softmax(1)[:, 1]
        return (logits[:, 1] >= logits[:, 0]).to(soft.dtype) + soft - soft.detach()

    def _carry(self, tokens: PackedTokens, trace: Trace) -> PackedTokens:
        """m * (layer's output) + (1 - m) * (its input), by value what each token has anyway, so that m learns what a layer
        does for the token's own vector."""
        entered, mask, gone = trace.auxiliary.pop(ENTERED)
        assert tokens.alive is not None
        new = (tokens.hidden - entered).detach()
        hidden = tokens.hidden + _gate(tokens, tokens.alive).unsqueeze(1).to(new.dtype) * new
        departed = tokens.departed
        if departed and bool(gone.any()):
            state, flat = departed[-1]
            departed = (*departed[:-1], (state + mask[gone].unsqueeze(1).to(new.dtype) * new[gone], flat))
        return replace(tokens, hidden=hidden, departed=departed)

    def auxiliary_loss(self, trace: Trace, batch: Batch) -> Tensor | None:
        """penalty * mean over layers of the fraction of real tokens kept; only while the predictors train."""
        kept = trace.auxiliary.get(KEPT)
        if self.mode != "soft" or not kept:
            return None
        return self.config.penalty * torch.stack(kept).mean()

    def stages(self) -> tuple[Stage, ...]:
        """One, in which model and predictors learn together."""
        return (Stage(name="skim", mode="soft", epochs=3.0, learning_rate=3e-5, policy_learning_rate=1e-3),)

    def overhead_flops(self, layer: int, n: int, entering: int | None = None) -> int:
        """The predictor's, over the tokens that come to the layer."""
        if self.mode == "hard" and self.config.strength == 0:
            return 0
        d = self.geometry.hidden
        return (n if entering is None else entering) * (2 * d * d + 4 * d)


def _gate(tokens: PackedTokens, alive: Tensor) -> Tensor:
    """[T] float32 zeros with the gradient of every mask that let a token through so far."""
    if tokens.log_weight is None:
        return torch.zeros(len(alive), device=alive.device)
    return torch.where(alive, tokens.log_weight, 0.0).float()


__all__ = ["Transkimmer", "TranskimmerPolicy", "skim_predictor"]
