"""The squares on the diagonal of one row's attention maps."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from thresher.packed import being_exported


def diagonal_tiles(probabilities: Tensor, size: int, out: Tensor | None = None) -> Tensor:
    """[ceil(n / size), h, size, size] from [h, n, n]; zero beyond n. out: of that shape, to write into."""
    if being_exported():
        return _traced(probabilities, size)
    heads, n, _ = probabilities.shape
    whole, rest = divmod(n, size)
    if out is None:
        out = probabilities.new_empty(whole + (rest > 0), heads, size, size)
    tiles = probabilities[:, : whole * size, : whole * size].unflatten(1, (whole, size)).unflatten(3, (whole, size))
    out[:whole] = tiles.diagonal(dim1=1, dim2=3).permute(3, 0, 1, 2)
    if rest:  # only here is anything beyond n: to clear all of it costs as much as to write it
        out[whole].zero_()
        out[whole, :, :rest, :rest] = probabilities[:, whole * size :, whole * size :]
    return out


def _traced(probabilities: Tensor, size: int) -> Tensor:
    """The same for any n, which is a tensor now: sums and ranges of it stay one, divisions into slices would not."""
    number = (probabilities.shape[1] + size - 1) // size
    padded = F.pad(probabilities, (0, size - 1, 0, size - 1))
    index = torch.arange(number).unsqueeze(1) * size + torch.arange(size)
    return padded[:, index.unsqueeze(2), index.unsqueeze(1)].transpose(0, 1)


__all__ = ["diagonal_tiles"]
