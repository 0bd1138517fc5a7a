"""Attention on the CPU with its probabilities in sight, a few heads at a time.

All heads of a long row at once fill the caches several times over, and torch multiplies them with MKL, which on processors
that are not Intel's falls to a fraction of its speed there. As many heads at a time as there are threads keep their maps in the
cache while evidence is read from them: evidence then costs little, and memory is a few n x n maps instead of one for each head.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from thresher.linears import fast_kernels, has_onednn

# Measured with 12 heads of 32: below, one product for all heads wins; above PLAIN, one thread also beats the flash kernel.
PROBABILITIES_FROM = 192
PLAIN_FROM = 448


def heads_apart(query: Tensor, n: int, *, probabilities: bool) -> bool:
    """Whether `attend_by_head` is the fastest way for a row of n tokens. query: any tensor of the call."""
    if n < PROBABILITIES_FROM or query.device.type != "cpu" or query.dtype is not torch.float32:
        return False
    if not (has_onednn() and fast_kernels()):
        return False
    return probabilities or (n >= PLAIN_FROM and torch.get_num_threads() == 1)


def attend_by_head(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    bias: Tensor | None = None,
    on_heads: Callable[[Tensor], object] | None = None,
) -> Tensor:
    """One row's attention without gradients.

    query, key, value: [H, n, d] float32. bias: [1 or H, 1 or n, n], added to the logits. on_heads: called with the
    probabilities [h, n, n] of some heads after others, which it may read but not keep.
    Returns the context [H, n, d].
    """
    together = min(torch.get_num_threads(), len(query))
    times, weighed = (_times, _weighed) if together == 1 else (_all_times, torch.bmm)
    query = (query * scale).contiguous()
    out = torch.empty_like(query)
    for start in range(0, len(query), together):
        heads = slice(start, start + together)
        logits = times(query[heads], key[heads])
        if bias is not None:
            logits += bias[heads] if len(bias) > 1 else bias
        probabilities = torch.softmax(logits, -1)
        if on_heads is not None:
            on_heads(probabilities)
        out[heads] = weighed(probabilities, value[heads])
    return out


def _all_times(query: Tensor, key: Tensor) -> Tensor:
    return torch.bmm(query, key.transpose(1, 2))


def _times(query: Tensor, key: Tensor) -> Tensor:
    """The same for one head, through oneDNN."""
    logits: Tensor = torch.ops.mkldnn._linear_pointwise(query[0], key[0].contiguous(), None, "none", [], "")
    return logits.unsqueeze(0)


def _weighed(probabilities: Tensor, value: Tensor) -> Tensor:
    columns = value[0].t().contiguous()
    context: Tensor = torch.ops.mkldnn._linear_pointwise(probabilities[0], columns, None, "none", [], "")
    return context.unsqueeze(0)


__all__ = ["attend_by_head", "heads_apart"]
