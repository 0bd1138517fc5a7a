"""AdapLeR (Modarressi et al., ACL 2022): before each layer a small predictor says how much every token contributes.

Its scores are a distribution over the row; a token whose share is below eta / n, of the n tokens that came to the layer, is
dropped. The predictors learn the tokens' gradient-based saliency in the fine-tuned model. Meanwhile a removed token fades:
a negative number on the attention logits, steeper from epoch to epoch, until fading is dropping.

Two losses are minimised at once, each for its own parameters. Model and predictors learn the task and the saliency; the
thresholds eta, and theta, the share of the first token in the saliency of deeper layers, learn the task and the length.

After that, and beyond the paper, a hard stage: what is below the thresholds really drops, at the speedup that is asked for,
and the model learns on without it. The paper finds a speed by the weight phi of the length, with thousands of steps in which
thresholds move there; after fewer of them strength has to be turned up, and the model reads less than it ever learned to.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from thresher.errors import OptionError
from thresher.evidence import Evidence
from thresher.packed import PackedTokens
from thresher.parts.predictors import contribution_predictor, row_log_softmax, row_sums, soft_removal
from thresher.parts.rules import keep_above
from thresher.policy import Batch, Geometry, Point, Policy, PolicyConfig, Stage, Trace

CONTRIBUTIONS = (
    "adapler contributions"  # of each layer [T]: shares that sum to 1 over a row, logarithms while they learn
)
PLACES = "adapler places"  # of each layer [T]: flat index in the padded input
LENGTHS = "adapler lengths"  # of each layer [B]: how much of a row it reads
PRESENT = "adapler present"  # of each layer [T]: how much of a token came to it, without gradient
ROWS = "adapler rows"  # [T] the row of each token, and whether it is its row's first
LEAVES = "adapler leaves"  # eta and theta as leaves of one pass's graph
ENTERED = "adapler entered"  # the states that a layer was given

PAPER = {
    3: (50.0, 50.0),
    5: (10.0, 10.0),
    10: (10.0, 3.0),
}  # by the number of epochs: the first steepness and its growth
EPOCHS = 5
SHARP = 1e5  # where other numbers of epochs end, as the paper's do
SHARP_ENOUGH, TOO_SHARP = 1e4, 1e7
LEAST, MOST = 0.01, 1.0  # of eta
LEAST_SHARE = 1e-3  # of theta
CLIP = 1.0
LARGEST = 1e34  # of lambda, which a growth without bounds would take out of float32; far too sharp before
# A share that is just even is not below it, whatever rounding its sum took, which other rows of a batch change.
JUST = 1.0 - 1e-6


@dataclass(frozen=True, kw_only=True)
class AdapLeR(PolicyConfig):
    """Drop tokens of which a small learned predictor, before each layer, says that they contribute too little to the answer.

    Learns from the gradient-based saliency of the training rows, which a fit computes from the fine-tuned model; where it
    fine-tunes itself, from the three epochs that are best on the validation rows, averaged. Of a stage's epochs a fit keeps the
    fastest that loses at most a point there, unless a speedup is its target.

    threshold: where eta starts, the part of an even share of the row (1 / n) that a token must contribute; learned, from .01
        to 1. width: of a predictor's hidden layer.
    beta: how much of a kept token's attention logit the soft removal may take. steepness, growth: lambda, how steeply it
        falls, is steepness * growth ** epoch; None: the paper's for 3, 5 or 10 epochs, else from 10 to 1e5.
    gamma: the weight of the predictors' distance to the saliency. phi: the weight of the length, the tokens read summed over
        layers: the larger, the shorter it reads.
    hard_stage: whether the model learns on while tokens really drop, at the speedup that a fit is given (2x where it is given
        a loss, else as eta says); False: the paper's soft stage alone.
    """

    method: ClassVar[str] = "adapler"
    point: ClassVar[Point] = Point.BEFORE_LAYER
    least_epochs: ClassVar[int] = min(PAPER)
    threshold: float = 0.25
    width: int = 32
    beta: float = 0.1
    steepness: float | None = None
    growth: float | None = None
    gamma: float = 5e-3
    phi: float = 5e-4
    hard_stage: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not LEAST <= self.threshold <= MOST:
            raise OptionError(f"threshold must lie between {LEAST} and {MOST:g}, not {self.threshold!r}.")
        if self.width < 1:
            raise OptionError(f"width must be at least 1, not {self.width!r}.")
        for name in ("beta", "gamma", "phi"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise OptionError(f"{name} must be a number of at least 0, not {getattr(self, name)!r}.")
        for name, least in (("steepness", 0.0), ("growth", 1.0)):
            value = getattr(self, name)
            if value is not None and not least < value < math.inf:
                raise OptionError(f"{name} must be a number above {least:g}, or none, not {value!r}.")

    def schedule(self, epochs: int) -> tuple[float, ...]:
        """lambda of each epoch."""
        start, growth = PAPER.get(epochs, (10.0, None))
        start = self.steepness or start
        if self.growth is not None:
            growth = self.growth
        elif self.steepness is not None or growth is None:
            growth = max(SHARP / start, 1.0) ** (1.0 / max(epochs - 1, 1))
        found = [start]
        while len(found) < epochs:
            found.append(start * growth ** len(found) if found[-1] < LARGEST / growth else LARGEST)
        return tuple(found)


class AdapLeRPolicy(Policy[AdapLeR]):
    """A predictor and a threshold for every layer. Soft: tokens fade, by predictors that learn. Hard: they drop."""

    learns_saliency = True
    with_the_model = ("predictors.",)

    def __init__(self, config: AdapLeR, geometry: Geometry) -> None:
        super().__init__(config, geometry)
        self.predictors = nn.ModuleList(
            contribution_predictor(geometry.hidden, config.width) for _ in range(geometry.layers)
        )
        self.eta = nn.Parameter(torch.full((geometry.layers,), config.threshold))
        self.theta = nn.Parameter(torch.ones(geometry.layers))  # that of the first layer stays
        self.steepness = config.schedule(EPOCHS)[0]

    def act(self, point: Point, layer: int, tokens: PackedTokens, evidence: Evidence, trace: Trace) -> PackedTokens:
        if self.mode == "soft":
            if point is Point.BEFORE_LAYER:
                return self._fade(layer, tokens, trace)
            return self._hold_back(tokens, trace) if point is Point.AFTER_LAYER else tokens
        if point is not Point.BEFORE_LAYER or not (self.config.strength or trace.record):
            return tokens
        contribution = self.log_contribution(layer, tokens).exp()
        if trace.record:
            trace.add(CONTRIBUTIONS, contribution)
            trace.add(PLACES, tokens.layout.flat)
        if not self.config.strength:
            return tokens
        even = 1.0 / tokens.layout.spread(tokens.lengths).to(contribution.dtype)
        return tokens.keep(keep_above(contribution, self.eta[layer - 1] * (JUST * self.config.strength) * even))

    def log_contribution(self, layer: int, tokens: PackedTokens) -> Tensor:
        """[T] float32, the logarithm of each token's share; what has faded has faded from the shares too."""
        logits = self.predictors[layer - 1](tokens.hidden.float()).squeeze(1).float()
        return row_log_softmax(logits if tokens.log_weight is None else logits + tokens.log_weight, tokens)

    def _fade(self, layer: int, tokens: PackedTokens, trace: Trace) -> PackedTokens:
        """The tokens with the soft removal of this layer added to that of the layers before."""
        layout = tokens.layout
        if layer == 1:
            first = torch.zeros_like(layout.protected).index_fill(0, layout.cu_seqlens[:-1].to(torch.int64), True)
            trace.auxiliary[ROWS] = [layout.rows, first]
            trace.auxiliary[LEAVES] = [one.detach().clone().requires_grad_() for one in (self.eta, self.theta)]
        trace.add(PLACES, layout.flat)
        eta, theta = trace.auxiliary[LEAVES]
        before = tokens.log_weight
        if before is None:
            before = torch.zeros(len(layout.rows), device=layout.rows.device)
        share = self.log_contribution(layer, tokens)
        trace.add(CONTRIBUTIONS, share)
        trace.add(PRESENT, before.detach().exp())
        share = share.exp()
        if layer > 1:  # by value nothing; theta learns what a predictor would do that was taught theta times the share
            scale = torch.where(trace.auxiliary[ROWS][1], theta[layer - 1] / theta[layer - 1].detach(), 1.0)
            share = share * scale
            share = share / layout.spread(row_sums(share, layout))
        threshold = eta[layer - 1] / layout.spread(row_sums(before.exp(), layout))
        removal = soft_removal(share, threshold, self.steepness, self.config.beta)
        after = (before + removal.masked_fill(layout.protected, 0.0)).clamp(min=-1e4)
        if tokens.alive is not None:
            after = after.masked_fill(~tokens.alive, -math.inf)
        trace.add(LENGTHS, row_sums(after.exp(), layout))
        trace.auxiliary[ENTERED] = [tokens.hidden]
        return replace(tokens, log_weight=after)

    def _hold_back(self, tokens: PackedTokens, trace: Trace) -> PackedTokens:
        """Where a head reads every token, one that has faded keeps the state it came with, as one that is dropped will."""
        (entered,) = trace.auxiliary.pop(ENTERED)
        if not tokens.carry:
            return tokens
        assert tokens.log_weight is not None
        left = tokens.log_weight.exp().unsqueeze(1).to(entered.dtype)
        return tokens.with_hidden(left * tokens.hidden + (1.0 - left) * entered)

    def total_loss(self, task: Tensor, trace: Trace, batch: Batch) -> Tensor:
        """task + gamma * sum over layers l of (L - l + 1) * KL(saliency || contribution) for model and predictors;
        task + phi * mean over rows of the sum over layers of the length for eta and theta, whose gradient is clipped apart.

        The value is that of all three terms. Raises OptionError when the batch has no saliency.
        """
        lengths = trace.auxiliary.get(LENGTHS)
        if self.mode != "soft" or not lengths:
            return task
        length = self.config.phi * torch.stack(lengths).sum(0).mean()
        total = task + self.config.gamma * self._divergence(trace, batch) + length.detach()
        if not torch.is_grad_enabled():
            return total
        # Theirs is taken now, and handed to the parameters through a term that is zero; the leaves keep what is left away.
        leaves = trace.auxiliary[LEAVES]
        pulls = torch.autograd.grad(task + length, leaves, retain_graph=True, allow_unused=True, materialize_grads=True)
        for parameter, pull in zip((self.eta, self.theta), _clipped(pulls), strict=True):
            total = total + ((parameter - parameter.detach()) * pull).sum()
        return total

    def _divergence(self, trace: Trace, batch: Batch) -> Tensor:
        """The weighted sum of the divergences of a pass, a mean over rows."""
        saliency = batch.get("saliency")
        if saliency is None:
            raise OptionError(
                "AdapLeR learns from a column 'saliency', a number a token, and the batch has none; thresher.fit computes it, "
                "or add what thresher.saliency(model, rows) gives."
            )
        rows, first = trace.auxiliary[ROWS]

        def shares(values: Tensor) -> Tensor:
            sums = values.new_zeros(len(saliency)).index_add(0, rows, values)
            return values / sums[rows].clamp(min=1e-12)

        wanted = saliency.reshape(-1)[trace.auxiliary[PLACES][0]].float()
        layers = len(trace.auxiliary[CONTRIBUTIONS])
        total = wanted.new_zeros(())
        told = zip(trace.auxiliary[CONTRIBUTIONS], trace.auxiliary[PRESENT], self.theta.detach(), strict=True)
        for number, (said, present, theta) in enumerate(told):
            target = shares(wanted * present)
            if number:
                target = shares(torch.where(first, theta, 1.0) * target)
            distance = torch.xlogy(target, target) - target * said.clamp(min=-1e4)
            total = total + (layers - number) * distance.sum() / len(saliency)
        return total

    def check(self, stage: Stage) -> None:
        if stage.mode != "soft":
            return
        epochs = math.ceil(stage.epochs)
        if epochs < 2:
            raise OptionError(
                f"AdapLeR's soft removal sharpens from epoch to epoch, so its stage needs at least 2, not {stage.epochs:g}."
            )
        first, last = (self.config.schedule(epochs)[place] for place in (0, -1))
        if first < self.config.beta:
            raise OptionError(
                f"steepness begins at {first:.3g}, below beta={self.config.beta:g}, so that the first epoch would remove "
                "everything; raise it, or leave it out."
            )
        if not SHARP_ENOUGH <= last <= TOO_SHARP:
            raise OptionError(
                f"steepness * growth ** epoch ends at {last:.3g} after {epochs} epochs, but should end between "
                f"{SHARP_ENOUGH:g} (below, nothing is really removed) and {TOO_SHARP:g}; leave both out and they will fit."
            )

    def before_epoch(self, epoch: int, epochs: int) -> None:
        if self.mode == "soft":
            self.steepness = self.config.schedule(epochs)[min(epoch, epochs - 1)]

    def after_step(self) -> None:
        with torch.no_grad():
            self.eta.clamp_(LEAST, MOST)
            self.theta.clamp_(min=LEAST_SHARE)

    def stages(self) -> tuple[Stage, ...]:
        """The soft one has the paper's settings but for the predictors' rate: at the model's they need the paper's ten thousand
        steps to learn anything, at this one a few hundred."""
        soft = Stage(
            name="soft",
            mode="soft",
            epochs=EPOCHS,
            learning_rate=3e-5,
            policy_learning_rate=5e-4,
            predictor_learning_rate=1e-3,
            batch_size=32,
            keeps="fastest",
        )
        hard = Stage(name="hard", mode="hard", epochs=EPOCHS, learning_rate=2e-5, distil_weight=1.0, keeps="fastest")
        return (soft, hard) if self.config.hard_stage else (soft,)

    def overhead_flops(self, layer: int, n: int, entering: int | None = None) -> int:
        """The predictor's, over the tokens that come to the layer."""
        if self.mode == "hard" and self.config.strength == 0:
            return 0
        return (n if entering is None else entering) * 2 * self.config.width * (self.geometry.hidden + 1)


def _clipped(gradients: Sequence[Tensor]) -> list[Tensor]:
    """The same, together no longer than CLIP: they are steep where lambda is, and would shrink the model's with them."""
    norm = torch.stack([one.norm() for one in gradients]).norm()
    return [one * (CLIP / norm.clamp(min=CLIP)) for one in gradients]


__all__ = ["AdapLeR", "AdapLeRPolicy"]
