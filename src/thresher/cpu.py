"""Attention on the CPU with its probabilities in sight, a few heads at a time.

All heads of a long row at once fill the caches several times over, and memory of that size goes back to the system after each
layer and is faulted in again. So a few maps are computed into the same memory over and over, small enough to be still in
the cache while evidence is read from them: evidence then costs little, and memory is a few n x n maps instead of one for
each head, and of long rows some queries' share of one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from thresher.linears import fast_kernels, mkl_is_slow

# Measured with 12 heads of 32, up to two threads, on a processor on which MKL is slow. There oneDNN beats in large products the
# batched ones, which torch gives to MKL as it does those of the flash kernel, by more than a call for each head costs; it has
# no batched one to offer, so that many threads have too little to share.
ALONE_FROM = {1: 208, 2: 352}
PLAIN_FROM = {1: 240, 2: 48}  # from here on the flash kernel is slower even where nobody asks for probabilities
PLAIN_TO = {1: 64, 2: 256}  # and where MKL is fast, up to here
# Probabilities at a time, 1 MB; and 4 where MKL is fast, so that threads wait less often for each other.
TOGETHER, MORE = 2**18, 2**20
# By threads: tokens of a row whose map is too large for the caches, so that some queries are done at a time, and how many.
LONG_FROM, LONG = {1: 768}, 1024
QUERIES, SOME = {1: 256}, 512
LEARNING_TO = 384  # probabilities of a longer row are too many to keep for the backward pass


def heads_apart(query: Tensor, n: int, *, probabilities: bool) -> bool:
    """Whether `attend_by_head` is the fastest way for a row of n tokens. query: any tensor of the call."""
    if query.device.type != "cpu" or query.dtype is not torch.float32 or not fast_kernels():
        return False
    threads = torch.get_num_threads()
    return probabilities or (n >= PLAIN_FROM.get(threads, n + 1) if mkl_is_slow() else n <= PLAIN_TO.get(threads, 0))


def learns_from_probabilities(query: Tensor, n: int) -> bool:
    """Whether training on a row of n tokens is fastest with its probabilities kept, since the flash kernel's backward pass is
    slow in bfloat16. query: any tensor of the call."""
    return query.device.type == "cpu" and query.dtype is torch.bfloat16 and n <= LEARNING_TO


def memory_for(query: Tensor, sizes: Sequence[int], unit: int = 1) -> tuple[Tensor, Tensor]:
    """What `attend_by_head` works in, for rows of these sizes one after the other. query: [H, ..., d]."""
    size = max(_together(len(query), n) * n * _at_a_time(n, unit) for n in sizes)
    return query.new_empty(size), query.new_empty(size)


def all_at_once(query: Tensor, n: int, *, probabilities: bool) -> bool:
    """Whether `attend_at_once` is the fastest way for rows of up to n tokens. query: [H, ..., d]."""
    whole = _together(len(query), n) >= len(query) and _at_a_time(n, n) == n
    return whole and heads_apart(query, n, probabilities=probabilities)


def attend_at_once(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sizes: Sequence[int],
    scale: float,
    out: Tensor,
    on_heads: Sequence[Callable[[Tensor], object] | None],
) -> None:
    """The attention of rows so short that what is not a product counts: all heads and queries at once, nothing added to the
    logits, no gradients.

    query, key, value: [H, T, d] float32. sizes: the rows' lengths, T together. out: [T, H, d], where the context goes.
    on_heads: for each row, called with its probabilities [H, n, n]; it may read but not keep them.
    """
    heads, sizes = len(query), list(sizes)
    memory = query.new_empty(2, heads, max(sizes) ** 2)
    maps: dict[int, list[Tensor]] = {}
    keys, places = key.transpose(1, 2).split(sizes, 2), out.transpose(0, 1).split(sizes, 1)
    for n, q, k, v, place, read in zip(
        sizes, query.split(sizes, 1), keys, value.split(sizes, 1), places, on_heads, strict=True
    ):
        if n not in maps:
            maps[n] = [part.flatten()[: heads * n * n].view(heads, n, n) for part in memory]
        logits, probabilities = maps[n]
        torch.baddbmm(logits, q, k, beta=0, alpha=scale, out=logits)
        torch.softmax(logits, -1, out=probabilities)
        if read is not None:
            read(probabilities)
        place.copy_(torch.bmm(probabilities, v))


def attend_by_head(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    memory: tuple[Tensor, Tensor],
    out: Tensor,
    bias: Tensor | None = None,
    on_heads: Callable[[Tensor, slice | None], object] | None = None,
    unit: int = 1,
) -> None:
    """One row's attention without gradients.

    query, key, value: [H, n, d] float32. memory: of `memory_for`. out: [H, n, d], where the context goes. bias: [1 or H, 1 or
    n, n], added to the logits. on_heads: called with the probabilities [h, m, n] of some heads' queries after others, and which
    queries these are, None: all; it may read but not keep them. unit: where they are some, they begin at a multiple of so many.
    """
    heads, n, _ = query.shape
    together, step = _together(heads, n), _at_a_time(n, unit)
    columns = value.transpose(1, 2)
    multiply = _some_heads
    if _alone(n):
        multiply = _one_head
        query, key, columns = query.contiguous(), key.contiguous(), columns.contiguous()
    for start in range(0, heads, together):
        some = slice(start, min(start + together, heads))
        here = some.stop - start
        for first in range(0, n, step):
            asking = slice(first, min(first + step, n))
            size = here * (asking.stop - first) * n
            logits, probabilities = (part[:size].view(here, -1, n) for part in memory)
            found = multiply(query[some, asking], key[some], logits, scale)
            if bias is not None:
                by_head = bias[some] if len(bias) > 1 else bias
                found += by_head[:, asking] if bias.shape[1] > 1 else by_head
            weights = torch.softmax(found, -1, out=probabilities)
            if on_heads is not None:
                on_heads(weights, asking if step < n else None)
            out[some, asking].copy_(multiply(weights, columns[some]))


def _at_a_time(n: int, unit: int) -> int:
    """How many queries of a row of n tokens to compute at a time: all, or a multiple of `unit`."""
    threads = torch.get_num_threads()
    if n < LONG_FROM.get(threads, LONG):
        return n
    return min(n, max(QUERIES.get(threads, SOME) // unit, 1) * unit)


def _alone(n: int) -> bool:
    """Whether one head at a time is the fastest."""
    return n >= ALONE_FROM.get(torch.get_num_threads(), n + 1) and mkl_is_slow()


def _together(heads: int, n: int) -> int:
    """How many heads to compute at a time."""
    if _alone(n):
        return 1
    threads, some = torch.get_num_threads(), TOGETHER if mkl_is_slow() else MORE
    return min(heads, max(round(some / n**2 / threads), 1) * threads)


def _some_heads(x: Tensor, y: Tensor, out: Tensor | None = None, scale: float = 1.0) -> Tensor:
    """[h, n, m], [h, k, m] → scale * [h, n, k], in `out` where it is given."""
    if out is None:
        return torch.bmm(x, y.transpose(1, 2))
    return torch.baddbmm(out, x, y.transpose(1, 2), beta=0, alpha=scale, out=out)


def _one_head(x: Tensor, y: Tensor, out: Tensor | None = None, scale: float = 1.0) -> Tensor:
    """The same for h = 1, through oneDNN and in memory of its own."""
    asked = x[0] if scale == 1.0 else x[0] * scale
    found: Tensor = torch.ops.mkldnn._linear_pointwise(asked, y[0], None, "none", [], "")
    return found.unsqueeze(0)


__all__ = ["all_at_once", "attend_at_once", "attend_by_head", "heads_apart", "learns_from_probabilities", "memory_for"]
