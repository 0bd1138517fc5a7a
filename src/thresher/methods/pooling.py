"""Pooling at a middle layer (LTC, SIGIR 2026): from there on the row is as many means of neighbours as a share of its length.

Nothing is scored and nothing is learned but the model itself, which is trained with the pooling in place.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from thresher.errors import OptionError
from thresher.evidence import Evidence
from thresher.packed import PackedTokens
from thresher.parts.pooling import pool_neighbours
from thresher.policy import Geometry, Point, Policy, PolicyConfig, Trace


@dataclass(frozen=True, kw_only=True)
class Pooling(PolicyConfig):
    """Average neighbouring tokens into one at a middle layer. Needs training more than methods that choose what they drop.

    ratio: means for each token that is not protected; strength raises it to that power.
    layer: before which layer, from 1; None: the first of the upper half.
    A head that reads every token finds a mean in the place of its first token, and of the others the state they had before.
    """

    method: ClassVar[str] = "pooling"
    point: ClassVar[Point] = Point.BEFORE_LAYER
    ratio: float = 0.5
    layer: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.ratio <= 1.0:
            raise OptionError(f"ratio must be above 0 and at most 1, not {self.ratio!r}.")
        if self.layer is not None and self.layer < 1:
            raise OptionError(f"layer is counted from 1, not {self.layer!r}.")


class PoolingPolicy(Policy[Pooling]):
    """The same share of every row."""

    def __init__(self, config: Pooling, geometry: Geometry) -> None:
        super().__init__(config, geometry)
        self.layer = geometry.layers // 2 + 1 if config.layer is None else config.layer
        if self.layer > geometry.layers:
            raise OptionError(f"layer is {self.layer} but the model has {geometry.layers} layers.")
        self.ratio = config.ratio**config.strength

    def act(self, point: Point, layer: int, tokens: PackedTokens, evidence: Evidence, trace: Trace) -> PackedTokens:
        if point is not Point.BEFORE_LAYER or layer != self.layer or self.ratio == 1.0:
            return tokens
        return pool_neighbours(tokens, self.ratio)


__all__ = ["Pooling", "PoolingPolicy"]
