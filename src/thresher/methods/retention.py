"""Retention configurations: each layer keeps a given fraction of the row's own length. Training-free.

The score is attention mass (PoWER-BERT's and LAT's significance), or a baseline that any score has to beat. Tokens
drop after attention's residual and norm, before the feed-forward of the same layer. SpAtten's cascade top-k is here
too: it is a retention configuration with a rule of its own for the fractions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import ClassVar, TypeVar

from torch import Tensor

from thresher.errors import OptionError
from thresher.evidence import NOTHING, Evidence, Wanted
from thresher.packed import PackedTokens
from thresher.parts import scores
from thresher.parts.rules import interpolate, keep_count, keep_fraction
from thresher.policy import Geometry, Point, Policy, PolicyConfig, Trace, retained

# About 2.2x fewer FLOPs on six layers; drawn for six and interpolated for other depths.
DEFAULT_CURVE = (0.8, 0.6, 0.45, 0.3, 0.2, 0.1)


@dataclass(frozen=True, kw_only=True)
class Retention(PolicyConfig):
    """retention: the fraction of its original length that a row keeps after each layer; one for each layer, never rising.

    None: a curve that falls to a tenth. strength raises every fraction to that power.
    min_tokens: no row is cut below this many tokens, so short queries survive beside long documents.
    """

    retention: tuple[float, ...] | None = None
    min_tokens: int = 1
    score: ClassVar[str] = "attention-mass"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.min_tokens < 1:
            raise OptionError(f"min_tokens must be at least 1, not {self.min_tokens!r}.")
        if self.retention is None:
            return
        if not self.retention or not all(0.0 < f <= 1.0 for f in self.retention):
            raise OptionError(f"retention must be fractions above 0 and at most 1, one a layer, not {self.retention}.")
        if any(b > a for a, b in pairwise(self.retention)):
            raise OptionError(
                f"retention must not rise from layer to layer (a dropped token stays dropped), not {self.retention}."
            )

    def fractions(self, geometry: Geometry) -> tuple[float, ...]:
        """One fraction for each layer, strength applied."""
        if self.retention is None:
            curve = interpolate(DEFAULT_CURVE, geometry.layers)
        elif len(self.retention) != geometry.layers:
            raise OptionError(
                f"retention has {len(self.retention)} fractions but the model has {geometry.layers} layers; give one for each."
            )
        else:
            curve = self.retention
        return tuple(f**self.strength for f in curve)

    def layer_counts(self, geometry: Geometry) -> tuple[int, ...] | None:
        """Instead of fractions: the number of tokens that each layer keeps of any row, strength applied."""
        return None

    def scoring(self) -> tuple[scores.Score, Wanted]:
        """What rates the tokens, and the evidence it needs."""
        return scores.SCORES[self.score]


@dataclass(frozen=True, kw_only=True)
class AttentionMass(Retention):
    """Keep the tokens that receive most attention (the score of PoWER-BERT and LAT). Works without any training.

    off_diagonal: leave out what a token gives itself, as PoWER-BERT does.
    counts: instead of fractions, the number of tokens each layer keeps of any row, as PoWER-BERT and LAT write their
    retention configurations; divided by strength.
    """

    method: ClassVar[str] = "attention-mass"
    off_diagonal: bool = False
    counts: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.counts is None:
            return
        if self.retention is not None:
            raise OptionError("Give retention (fractions of each row) or counts (the same for every row), not both.")
        if not self.counts or any(c < 1 for c in self.counts):
            raise OptionError(f"counts must be at least 1, one a layer, not {self.counts}.")
        if any(b > a for a, b in pairwise(self.counts)):
            raise OptionError(f"counts must not rise from layer to layer, not {self.counts}.")

    def layer_counts(self, geometry: Geometry) -> tuple[int, ...] | None:
        if self.counts is None:
            return None
        if len(self.counts) != geometry.layers:
            raise OptionError(
                f"counts has {len(self.counts)} entries but the model has {geometry.layers} layers; give one for each."
            )
        if self.strength == 0:
            return None  # the fractions, to the power of 0, keep everything
        return tuple(max(round(count / self.strength), self.min_tokens) for count in self.counts)

    def scoring(self) -> tuple[scores.Score, Wanted]:
        return scores.SCORES["attention-mass-off-diagonal" if self.off_diagonal else self.score]


@dataclass(frozen=True, kw_only=True)
class RandomTokens(Retention):
    """Keep random tokens: what every score has to beat."""

    method: ClassVar[str] = "random"
    control: ClassVar[bool] = True
    exports: ClassVar[bool] = False  # its hash shifts bits of 64-bit integers, which ONNX does not
    score: ClassVar[str] = "random"
    seed: int = 0

    def scoring(self) -> tuple[scores.Score, Wanted]:
        return partial(scores.random, seed=self.seed), NOTHING


@dataclass(frozen=True, kw_only=True)
class FirstTokens(Retention):
    """Keep the first tokens."""

    method: ClassVar[str] = "first"
    control: ClassVar[bool] = True
    score: ClassVar[str] = "first"


@dataclass(frozen=True, kw_only=True)
class LastTokens(Retention):
    """Keep the last tokens (and the first one, which heads read)."""

    method: ClassVar[str] = "last"
    control: ClassVar[bool] = True
    score: ClassVar[str] = "last"


@dataclass(frozen=True, kw_only=True)
class CascadeTopK(Retention):
    """SpAtten's cascade, a baseline of the LTP paper: a straight line down to `keep_rate` at the last layer.

    The first ceil(.15 L) layers keep everything. strength raises keep_rate to that power.
    """

    method: ClassVar[str] = "cascade-top-k"
    keep_rate: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.keep_rate <= 1.0:
            raise OptionError(f"keep_rate must be above 0 and at most 1, not {self.keep_rate!r}.")

    def fractions(self, geometry: Geometry) -> tuple[float, ...]:
        layers, rate = geometry.layers, self.keep_rate**self.strength
        unpruned = math.ceil(0.15 * layers)
        steps = max(layers - unpruned, 1)
        return tuple(1.0 - (1.0 - rate) * max(layer - unpruned, 0) / steps for layer in range(1, layers + 1))


RetentionT = TypeVar("RetentionT", bound=Retention)


class RetentionPolicy(Policy[RetentionT]):
    """Any score with the fraction rule, under the policy's own configuration or that of a `retaining` block."""

    def __init__(self, config: RetentionT, geometry: Geometry) -> None:
        super().__init__(config, geometry)
        self.fractions = config.fractions(geometry)
        self.fixed_counts = config.layer_counts(geometry)
        self.score, self.wanted = config.scoring()

    def curve(self) -> tuple[float, ...]:
        """The fraction of its original length that a row keeps after each layer, in this pass."""
        now = retained()
        if now is None:
            return self.fractions
        if len(now.retention) != self.geometry.layers:
            raise OptionError(
                f"The retention configuration has {len(now.retention)} fractions but the model has {self.geometry.layers} "
                "layers; give one for each."
            )
        return now.retention

    def counts(self) -> tuple[int, ...] | None:
        """Instead of `curve`: the number of tokens of any row that each layer keeps, in this pass."""
        return None if retained() is not None else self.fixed_counts

    def kept_before(self, layer: int) -> float:
        """The fraction of its original length with which a row reaches `layer`."""
        now = retained()
        left_out = now.skip if now is not None else ()
        earlier = [fraction for at, fraction in enumerate(self.curve()[: layer - 1], 1) if at not in left_out]
        return earlier[-1] if earlier else 1.0

    def drops_at(self, layer: int) -> bool:
        now = retained()
        if now is not None and layer in now.skip:
            return False
        counts = self.counts()
        if counts is not None:
            return layer == 1 or counts[layer - 1] < counts[layer - 2]
        return self.curve()[layer - 1] < self.kept_before(layer)

    def wants(self, layer: int) -> Wanted:
        return self.wanted if self.drops_at(layer) else NOTHING

    def act(self, point: Point, layer: int, tokens: PackedTokens, evidence: Evidence, trace: Trace) -> PackedTokens:
        if point is not self.config.point or not self.drops_at(layer):
            return tokens
        return tokens.keep(self.selected(self.score(tokens, evidence), tokens, layer))

    def selected(self, score: Tensor, tokens: PackedTokens, layer: int) -> Tensor:
        """[T] bool, what `layer` keeps."""
        counts = self.counts()
        if counts is not None:
            return keep_count(score, tokens, counts[layer - 1])
        return keep_fraction(score, tokens, self.curve()[layer - 1], self.config.min_tokens)
