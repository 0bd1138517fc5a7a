"""FLOPs of one layer, by its sizes. A multiply-add is 2 FLOPs. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


class Widths(Protocol):
    """The sizes of an encoder that its FLOPs depend on."""

    @property
    def hidden(self) -> int: ...
    @property
    def attention(self) -> int: ...
    @property
    def intermediate(self) -> int: ...
    @property
    def gated(self) -> bool: ...


@dataclass(frozen=True)
class Sizes:
    """`Widths` as an exported model carries them. width: of queries, keys and values; None: hidden. midpoint: whether tokens
    drop before the feed-forward; before: whether they drop before the layer they count as dropped at."""

    layers: int
    hidden: int
    intermediate: int
    gated: bool = False
    midpoint: bool = True
    before: bool = False
    width: int | None = None

    @property
    def attention(self) -> int:
        return self.hidden if self.width is None else self.width


def layer_flops(geometry: Widths, read: int, fed: int, asking: int | None = None) -> int:
    """One layer for one row: `read` tokens are attended to, `fed` tokens pass the feed-forward.

    asking: the tokens that attend, which are fewer where some are frozen: these cost a key and a value. None: all.
    """
    d, attention = geometry.hidden, geometry.attention
    asking = read if asking is None else asking
    wide = (6 if geometry.gated else 4) * geometry.intermediate
    return 4 * (read + asking) * d * attention + 4 * asking * read * attention + fed * d * wide
