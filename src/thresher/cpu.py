"""Attention on the CPU with its probabilities in sight, one head at a time.

torch multiplies batches of float32 matrices with MKL, which on processors that are not Intel's falls to a fraction of its
speed once a row has some 300 tokens. oneDNN does not, and one head's probabilities stay in the cache while evidence is read
from them: evidence then costs next to nothing, and memory is one n x n map instead of one for each head.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from thresher.linears import has_onednn

# Measured with 12 heads of 32: below, one product for all heads wins; above PLAIN, also over the flash kernel.
PROBABILITIES_FROM = 192
PLAIN_FROM = 448


def heads_apart(query: Tensor, n: int, *, probabilities: bool) -> bool:
    """Whether `attend_by_head` is the fastest way for a row of n tokens. query: any tensor of the call."""
    return (
        n >= (PROBABILITIES_FROM if probabilities else PLAIN_FROM)
        and query.device.type == "cpu"
        and query.dtype is torch.float32
        and has_onednn()
        and bool(torch.backends.mkldnn.enabled)  # type: ignore[attr-defined]
    )


def attend_by_head(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    bias: Tensor | None = None,
    on_head: Callable[[Tensor], object] | None = None,
) -> Tensor:
    """One row's attention without gradients.

    query, key, value: [H, n, d] float32. bias: [1 or n, n], added to every head's logits. on_head: called with each head's
    probabilities [n, n], which it may read but not keep.
    Returns the context [H, n, d].
    """
    product = torch.ops.mkldnn._linear_pointwise
    query, key = (query * scale).contiguous(), key.contiguous()
    columns = value.transpose(1, 2).contiguous()
    out = torch.empty_like(query)
    for head in range(len(query)):
        logits = product(query[head], key[head], None, "none", [], "")
        if bias is not None:
            logits += bias
        probabilities = torch.softmax(logits, -1)
        if on_head is not None:
            on_head(probabilities)
        out[head] = product(probabilities, columns[head], None, "none", [], "")
    return out


__all__ = ["attend_by_head", "heads_apart"]
