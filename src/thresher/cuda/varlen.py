"""Flash attention over packed tokens, through torch's own variable-length kernel."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from thresher.packed import Layout

HALF = (torch.float16, torch.bfloat16)
LARGEST_HEAD = 128  # the kernel goes to 256, its backward on some GPUs only to 192; no encoder has heads that wide


@cache
def varlen_function() -> Callable[..., Any] | None:
    """torch's `varlen_attn`, None where torch has none."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn


@cache
def _options(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)  # torch 2.10 has neither scale nor window_size


@cache
def capable(device: int) -> bool:
    """Whether this GPU and this build of torch have the kernel. AMD's is another one, with windows of another meaning."""
    if torch.version.hip is not None or not torch.backends.cuda.is_flash_attention_available():
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def fits(query: Tensor, scale: float, window: int | None) -> bool:
    """Whether `flash` can do this. query: [H, T, d], any tensor of the call."""
    function, dim = varlen_function(), query.shape[-1]
    if function is None or query.dtype not in HALF or dim % 8 or dim > LARGEST_HEAD:
        return False
    options = _options(function)
    if "scale" not in options and not math.isclose(scale, 1.0 / math.sqrt(dim)):
        return False
    return (window is None or "window_size" in options) and capable(query.get_device())


def flash(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float, window: int | None = None
) -> tuple[Tensor, Tensor]:
    """Each row attends to itself.

    query, key, value: [H, T, d], float16 or bfloat16. window: in places of the batch; the same as original positions only
    where `layout.unbroken`.
    Returns the context [T, H, d] and the log-sum-exp of each query's logits, [H, T] float32. Gradients flow through the
    context; the kernel's backward takes the log-sum-exp for a constant, so nothing may be learned from it.
    """
    from torch.nn.attention.varlen import AuxRequest

    function = varlen_function()
    assert function is not None
    options: dict[str, Any] = {"return_aux": AuxRequest(lse=True)}
    if "scale" in _options(function):
        options["scale"] = scale
    if window is not None:
        options["window_size"] = (window, window)
    # Any strides but the last will do: transformers' heads are a view of [T, H * d], which is not copied here.
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    longest, starts = max(layout.sizes), layout.cu_seqlens
    context, lse = function(
        q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), starts, starts, longest, longest, **options
    )
    # The documentation says [T, H], the kernel and torch's own shape function say [H, T].
    return context, lse.detach() if lse.shape == query.shape[:2] else lse.detach().T


__all__ = ["capable", "fits", "flash", "varlen_function"]
