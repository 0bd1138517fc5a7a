"""A layer in which only some tokens ask: the others are keys and values as they are, and cost nothing else."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thresher.backbones.opened import OpenedLayer
from thresher.packed import Layout, on_cuda
from thresher.timing import mark


@dataclass(frozen=True)
class Asking:
    """The tokens of a batch that are not frozen. index: [A] int64, rising. sizes: how many of each row, all >= 1."""

    index: Tensor
    sizes: list[int]


def run_layer(layer: OpenedLayer, hidden: Tensor, layout: Layout, asking: Asking) -> Tensor:
    """hidden: [1, T, D] → the same with the states of the tokens that ask renewed."""
    old = hidden[:, asking.index]
    heads = lambda x: x[0].unflatten(1, (layer.heads, -1)).transpose(0, 1)  # noqa: E731
    query, key, value = heads(layer.query(old)), heads(layer.key(hidden)), heads(layer.value(hidden))
    mark("norms")
    dropout = layer.dropout.p if layer.dropout.training else 0.0
    context = attend_some(query, key, value, layout, asking, layer.scale, dropout)
    mark("attention")
    attended = layer.out_norm(_dropped(layer.out_dropout, layer.out(context.flatten(1).unsqueeze(0))) + old)
    fed = layer.down(layer.activation(layer.up(attended)))
    new = layer.down_norm(_dropped(layer.down_dropout, fed) + attended)
    return hidden.index_copy(1, asking.index, new.to(hidden.dtype))


def _dropped(dropout: nn.Module | None, x: Tensor) -> Tensor:
    return x if dropout is None else dropout(x)


def attend_some(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, asking: Asking, scale: float, dropout: float = 0.0
) -> Tensor:
    """The tokens that ask attend to all of their row. query: [H, A, d]; key, value: [H, T, d] → [A, H, d]."""
    if on_cuda(query) and not layout.single:
        return attend_some_padded(query, key, value, layout, asking, scale, dropout)
    rows = zip(query.split(asking.sizes, 1), key.split(layout.sizes, 1), value.split(layout.sizes, 1), strict=True)
    found = [
        F.scaled_dot_product_attention(q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0), dropout_p=dropout, scale=scale)
        for q, k, v in rows
    ]
    return torch.cat([one[0].transpose(0, 1) for one in found])


def attend_some_padded(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, asking: Asking, scale: float, dropout: float = 0.0
) -> Tensor:
    """The same for all rows at once, padded: for devices where a call for each row costs more than padding."""
    lengths = layout.lengths
    rows, asked = layout.rows, torch.tensor(asking.sizes, device=lengths.device)
    most = max(layout.sizes)
    place, place_asked = _places(rows, lengths, most), _places(rows[asking.index], asked, max(asking.sizes))
    real = torch.arange(most, device=lengths.device) < lengths.unsqueeze(1)
    out = F.scaled_dot_product_attention(
        _padded(query, place_asked, len(lengths), max(asking.sizes)),
        _padded(key, place, len(lengths), most),
        _padded(value, place, len(lengths), most),
        attn_mask=real[:, None, None],
        dropout_p=dropout,
        scale=scale,
    )
    return out.transpose(1, 2).flatten(0, 1)[place_asked]


def _places(rows: Tensor, counts: Tensor, most: int) -> Tensor:
    """[T], where tokens of `rows` stand when each row is padded to `most`. counts: [B], tokens of each row."""
    starts = counts.cumsum(0) - counts
    return rows * most + torch.arange(len(rows), device=rows.device) - starts[rows]


def _padded(x: Tensor, place: Tensor, batch: int, most: int) -> Tensor:
    """[H, T, d] → [B, H, most, d]."""
    heads, _, dim = x.shape
    empty = x.new_zeros(batch * most, heads, dim)
    return empty.index_copy(0, place, x.transpose(0, 1)).view(batch, most, heads, dim).transpose(1, 2)


__all__ = ["Asking", "attend_some", "attend_some_padded", "run_layer"]
