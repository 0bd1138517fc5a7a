"""TR-BERT (Ye et al., NAACL 2021): before two layers a small network says of every token whether it is read on.

The networks learn by reinforcement (REINFORCE). In one step the same batch is read several times, every time by other
decisions drawn from the networks' probabilities, and tokens really drop. The reward of a row is what it does not lose in the
task, less a price for what it keeps; that of its other passes is the baseline. In half of the steps of the first stage, in
which the model stays as it is, the networks imitate a guide instead: the tokens whose change between a selection point and a
later layer moves the task's loss most, to first order. Then model and networks learn together, the model from its teacher too.

A dropped token keeps its state until the end. Afterwards nothing is drawn: a token stays when it is more likely kept than not.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thresher.errors import OptionError
from thresher.evidence import Evidence
from thresher.packed import Layout, PackedTokens
from thresher.parts.predictors import contribution_predictor, row_sums
from thresher.parts.rules import margin, ranks
from thresher.policy import Batch, Draw, Geometry, Point, Policy, PolicyConfig, Stage, Trace

WIDTH = 32
# Of each selection point of a pass whose decisions are drawn:
LOG_PROBABILITY = "tr-bert log-probability"  # [B], that of all of a row's decisions together
KEPT = "tr-bert kept"  # [B], the share of its original tokens that a row keeps
# Of a pass that reads everything, for the guide:
LOGITS, STATES = "tr-bert logits", "tr-bert states"  # of each selection point [T], [T, D]
BACK = "tr-bert back"  # [T, D]
ROWS, FREE = "tr-bert rows", "tr-bert free"  # [T] int64, [T] bool: whether it may drop

How = Literal["drawn", "whole"]
_how: ContextVar[How | None] = ContextVar("thresher_tr_bert", default=None)


@dataclass(frozen=True, kw_only=True)
class TRBert(PolicyConfig):
    """Drop tokens before two layers, as networks decide that learn by reinforcement which tokens the task can do without.

    points: the layers before which tokens drop, from 1; None: layer 2 and the first of the upper half.
    penalty: alpha, the price of keeping everything; the higher, the less is read (.01 to 5 in the paper).
    samples: how often a step reads its batch. imitation: the share of the first stage's steps that imitate the guide.
    back: the layer after which the guide looks back; None: at three quarters of the depth.
    bias: where the networks' logit of keeping starts, so that training starts near the model that reads everything.
    strength shifts the logit that a token needs, by 4 log(strength).
    """

    method: ClassVar[str] = "tr-bert"
    labelled: ClassVar[bool] = True
    point: ClassVar[Point] = Point.BEFORE_LAYER
    points: tuple[int, ...] | None = None
    penalty: float = 0.5
    samples: int = 8
    imitation: float = 0.5
    back: int | None = None
    bias: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.points is not None and (not self.points or any(b <= a for a, b in pairwise((0, *self.points)))):
            raise OptionError(f"points must be layers from 1 in rising order, not {self.points}.")
        if not 0.0 <= self.penalty < math.inf:
            raise OptionError(f"penalty must be a number of at least 0, not {self.penalty!r}.")
        if self.samples < 2:
            raise OptionError(f"samples must be at least 2, one to compare with another, not {self.samples!r}.")
        if not 0.0 <= self.imitation <= 1.0:
            raise OptionError(f"imitation must lie between 0 and 1, not {self.imitation!r}.")
        if not math.isfinite(self.bias):
            raise OptionError(f"bias must be a number, not {self.bias!r}.")

    def places(self, layers: int) -> tuple[tuple[int, ...], int]:
        """The layers before which tokens drop and that after which the guide looks back, in a model of so many layers.

        Raises OptionError when it has no such layers, or the guide would look back from before a selection point.
        """
        points = self.points or tuple(sorted({min(2, layers), min(max(layers // 2 + 1, 3), layers)}))
        back = max(math.ceil(0.75 * layers), points[-1]) if self.back is None else self.back
        if points[-1] > layers:
            raise OptionError(f"points names layer {points[-1]} but the model has {layers}.")
        if not points[-1] <= back <= layers:
            raise OptionError(f"back must be a layer from {points[-1]}, the last point, to {layers}, not {back}.")
        return points, back


@dataclass(frozen=True)
class _Pass(Draw):
    """how: whether decisions are drawn or everything is read. learns: whether the model keeps what its gradient needs."""

    how: How = "drawn"
    learns: bool = False

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        token = _how.set(self.how)
        try:
            with contextlib.nullcontext() if self.learns else torch.no_grad():
                yield
        finally:
            _how.reset(token)


def policy_network(width: int, bias: float) -> nn.Sequential:
    """[T, width] → [T, 1], the logit of keeping."""
    network = contribution_predictor(width, WIDTH)
    nn.init.constant_(network[-1].bias, bias)  # type: ignore[arg-type]
    return network


class TRBertPolicy(Policy[TRBert]):
    """A network at each selection point: drawn from, or told by the guide, while it trains; taken at its word after."""

    def __init__(self, config: TRBert, geometry: Geometry) -> None:
        super().__init__(config, geometry)
        self.points, self.back = config.places(geometry.layers)
        self.networks = nn.ModuleList(policy_network(geometry.hidden, config.bias) for _ in self.points)

    @property
    def reads_row_losses(self) -> bool:
        return self.mode == "soft"

    def act(self, point: Point, layer: int, tokens: PackedTokens, evidence: Evidence, trace: Trace) -> PackedTokens:
        how = _how.get() if self.mode == "soft" else None
        if how == "whole" and point is Point.AFTER_LAYER and layer == self.back:
            trace.add(BACK, tokens.hidden.detach().requires_grad_())
            return tokens.with_hidden(trace.auxiliary[BACK][0])
        if point is not Point.BEFORE_LAYER or layer not in self.points:
            return tokens
        if how is not None:
            return self._draw(layer, tokens, trace) if how == "drawn" else self._note(layer, tokens, trace)
        if self.config.strength == 0:
            return tokens
        return tokens.keep(self.logits(layer, tokens) >= margin(self.config.strength))

    def logits(self, layer: int, tokens: PackedTokens) -> Tensor:
        """[T] float32, of keeping. No gradient goes on into the model: the networks read it and do not move it."""
        network = self.networks[self.points.index(layer)]
        return network(tokens.hidden.detach().float()).float().squeeze(1)  # type: ignore[no-any-return]

    @torch.enable_grad()  # also where the model around the networks keeps no graph
    def _draw(self, layer: int, tokens: PackedTokens, trace: Trace) -> PackedTokens:
        layout, logits = tokens.layout, self.logits(layer, tokens)
        alive = torch.ones_like(layout.protected) if tokens.alive is None else tokens.alive
        stays = (torch.rand_like(logits) < logits.detach().sigmoid()) | layout.protected
        said = F.logsigmoid(torch.where(stays, logits, -logits))
        trace.add(LOG_PROBABILITY, row_sums(said.masked_fill(layout.protected | ~alive, 0.0), layout))
        trace.add(KEPT, layout.count(stays & alive) / layout.original)
        return tokens.keep(stays)

    def _note(self, layer: int, tokens: PackedTokens, trace: Trace) -> PackedTokens:
        trace.add(LOGITS, self.logits(layer, tokens))
        trace.add(STATES, tokens.hidden.detach())
        trace.auxiliary[ROWS], trace.auxiliary[FREE] = [tokens.layout.rows], [~tokens.layout.protected]
        return tokens

    def step_loss(self, traces: Sequence[Trace], losses: Sequence[Tensor], batch: Batch) -> Tensor | None:
        """REINFORCE, or minus the log-likelihood of the guide's decisions."""
        if not traces or not traces[0].auxiliary.keys() & {BACK, KEPT}:
            return None
        if BACK in traces[0].auxiliary:
            return self._imitation(traces[0], losses[0])
        rewards = torch.stack([self.reward(trace, loss) for trace, loss in zip(traces, losses, strict=True)])
        logs = torch.stack([torch.stack(trace.auxiliary[LOG_PROBABILITY]).sum(0) for trace in traces])
        return -((rewards - rewards.mean(0)) * logs).mean()

    def reward(self, trace: Trace, loss: Tensor) -> Tensor:
        """[B], - loss - penalty * mean over the selection points of the share kept. loss: [B], the task's of each row."""
        return -loss.detach() - self.config.penalty * torch.stack(trace.auxiliary[KEPT]).mean(0)

    def _imitation(self, trace: Trace, loss: Tensor) -> Tensor:
        """The mean over decisions. Of a row the guide keeps at a point as many as the network would on average."""
        (back,), (rows,), (left,) = (trace.auxiliary[name] for name in (BACK, ROWS, FREE))
        (pull,) = torch.autograd.grad(loss.sum(), back)
        total, decisions = loss.new_zeros(()), 0
        for logits, state in zip(trace.auxiliary[LOGITS], trace.auxiliary[STATES], strict=True):
            expected = torch.zeros_like(loss).index_add(0, rows, logits.detach().sigmoid() * left)
            chosen = best(guide(pull, back, state), left, rows, expected.round())
            total = total + F.logsigmoid(torch.where(chosen, logits, -logits))[left].sum()
            decisions, left = decisions + int(left.sum()), chosen
        return -total / max(decisions, 1)

    def draws(self, stage: Stage) -> Sequence[Draw]:
        """While the model is fixed (learning_rate 0), a pass of the guide or passes by drawn decisions; else those, the first
        of which the model learns from."""
        if stage.mode != "soft":
            return super().draws(stage)
        if stage.learning_rate == 0 and float(torch.rand(())) < self.config.imitation:
            return (_Pass(None, 0.0, 0.0, how="whole", learns=True),)
        # The learning pass goes first: under autocast the others would leave weights in its cache that have no gradient.
        first = _Pass(None, stage.label_weight, stage.distil_weight, learns=True)
        other = _Pass(None, 0.0, 0.0)
        return (first if stage.learning_rate else other, *(other,) * (self.config.samples - 1))

    def stages(self) -> tuple[Stage, ...]:
        """The networks alone, then both."""
        return (
            Stage(name="policy", mode="soft", learning_rate=0.0, policy_learning_rate=1e-3, dropout=False),
            Stage(name="joint", mode="soft", learning_rate=3e-5, policy_learning_rate=1e-3, distil_weight=1.0),
        )

    def overhead_flops(self, layer: int, n: int, entering: int | None = None) -> int:
        """The network's, over the tokens that come to a selection point."""
        if layer not in self.points or (self.mode == "hard" and self.config.strength == 0):
            return 0
        return (n if entering is None else entering) * 2 * WIDTH * (self.geometry.hidden + 1)


def guide(pull: Tensor, back: Tensor, state: Tensor) -> Tensor:
    """[T] float32, |<dloss / dback, back - state>|: how much the loss would move, to first order, if a token's state at the
    later layer were still the one it has at the selection point. pull, back, state: [T, D]."""
    return (pull.float() * (back - state).detach().float()).sum(1).abs()


def best(score: Tensor, among: Tensor, rows: Tensor, count: Tensor) -> Tensor:
    """[T] bool, of each row the `count` ([B]) tokens of the highest score among those of `among` ([T] bool)."""
    lengths, zeros = torch.bincount(rows, minlength=len(count)), torch.zeros_like(rows)
    layout = Layout(lengths, zeros, zeros, zeros.bool(), lengths, len(rows))
    return (ranks(score, PackedTokens(score, layout, alive=among)) < layout.spread(count)) & among


__all__ = ["TRBert", "TRBertPolicy", "best", "guide", "policy_network"]
