"""FLOPs of one layer, by its sizes. A multiply-add is 2 FLOPs. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


class Widths(Protocol):
    """The sizes of an encoder that its FLOPs depend on."""

    @property
    def hidden(self) -> int: ...
    @property
    def intermediate(self) -> int: ...
    @property
    def gated(self) -> bool: ...


@dataclass(frozen=True)
class Sizes:
    """`Widths` as an exported model carries them. midpoint: whether tokens drop before the feed-forward; before: whether they
    drop before the layer they count as dropped at."""

    layers: int
    hidden: int
    intermediate: int
    gated: bool = False
    midpoint: bool = True
    before: bool = False


def layer_flops(geometry: Widths, read: int, fed: int) -> int:
    """One layer for one row: `read` tokens attend, `fed` tokens pass the feed-forward."""
    d = geometry.hidden
    wide = (6 if geometry.gated else 4) * geometry.intermediate
    return 8 * read * d * d + 4 * read * read * d + fed * d * wide
