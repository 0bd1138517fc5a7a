"""Rows cut into blocks: runs of a row's tokens, of one size but for the last."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from thresher.packed import PackedTokens


@dataclass(frozen=True)
class Blocks:
    """The blocks of a ragged batch, row after row: K in all, ceil(n / size) of a row of n tokens, as in `Evidence.blocks`.

    Cut over the tokens that are there, counted from the row's first. Whoever drops whole blocks only finds the same blocks
    again in what is left: all but a row's last are full, so that the others close up to the same runs. Simulated drops leave
    every token in its place, and so every block.

    per_row: [B] int64, blocks of each row. of_token: [T] int64, the block of each token. number: K.
    """

    per_row: Tensor
    of_token: Tensor
    number: int

    @classmethod
    def of(cls, tokens: PackedTokens, size: int) -> Blocks:
        layout = tokens.layout
        length = layout.positions.shape[0]  # while a graph is traced a tensor, which len() is not
        place = torch.arange(length, device=layout.positions.device)
        if layout.single:
            number = (length + size - 1) // size
            return cls((layout.lengths + size - 1) // size, torch.div(place, size, rounding_mode="floor"), number)
        per_row = (layout.lengths + size - 1) // size
        first = per_row.cumsum(0) - per_row
        place = place - layout.cu_seqlens[:-1].to(torch.int64)[layout.rows]
        return cls(per_row, place // size + first[layout.rows], sum(-(-n // size) for n in layout.sizes))

    @property
    def rows(self) -> Tensor:
        """[K] int64, the row each block belongs to."""
        if len(self.per_row) == 1:
            return self.any(torch.zeros_like(self.of_token, dtype=torch.bool)).to(torch.int64)
        index = torch.arange(len(self.per_row), device=self.per_row.device)
        return torch.repeat_interleave(index, self.per_row, output_size=self.number)

    def any(self, mask: Tensor) -> Tensor:
        """[K] bool, whether `mask` ([T] bool) holds for a token of the block."""
        found = torch.zeros(self.number, dtype=torch.float32, device=mask.device)
        return found.scatter_add(0, self.of_token, mask.to(torch.float32)) > 0

    def ends(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """[K] each, the least and the greatest of `values` ([T] int64) in a block."""
        empty = values.new_zeros(self.number)
        least = empty.scatter_reduce(0, self.of_token, values, "amin", include_self=False)
        return least, empty.scatter_reduce(0, self.of_token, values, "amax", include_self=False)

    def spread(self, values: Tensor) -> Tensor:
        """[K] values of blocks for each of their tokens: [T]."""
        return values[self.of_token]


__all__ = ["Blocks"]
