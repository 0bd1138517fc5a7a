"""What an opened layer computes, on whatever rows it is given, with the CPU's fast kernels where no gradient is wanted."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from thresher.backbones.opened import OpenedLayer
from thresher.linears import FastLinear, has_onednn
from thresher.model import attachment_of


class Linears:
    """Linear layers by way of FastLinear, each laid out once: in int8 where the encoder computes its own so
    (`thresher.quantize`), with one scale for all that is given in a call."""

    def __init__(self, encoder: PreTrainedModel) -> None:
        self._encoder = [encoder]  # in a list: copied along, and no module of anybody's
        self._fast: dict[int, FastLinear] = {}

    def __call__(self, linear: nn.Linear, x: Tensor) -> Tensor:
        """x: [T, in] → [T, out]."""
        precision = attachment_of(self._encoder[0]).engine.precision
        if precision == "float32" and not has_onednn():
            return F.linear(x, linear.weight, linear.bias)
        fast = self._fast.get(id(linear))
        # Made again also after a copy, whose layers live elsewhere.
        if fast is None or fast.linear is not linear or fast.precision != precision:
            fast = self._fast[id(linear)] = FastLinear(linear, precision)
        return fast(x)


def by_head(x: Tensor, heads: int) -> Tensor:
    """[T, D] → [H, T, d]"""
    return x.view(len(x), heads, -1).transpose(0, 1)


def together(x: Tensor) -> Tensor:
    """[H, T, d] → [T, D]"""
    return x.transpose(0, 1).reshape(x.shape[1], -1)


def after_attention(layer: OpenedLayer, context: Tensor, residual: Tensor, linears: Linears) -> Tensor:
    """The rest of a layer behind attention: its output projection, norms and feed-forward. context, residual: [T, D]."""
    x = linears(layer.out, context)
    if layer.out_dropout is not None:
        x = layer.out_dropout(x)
    x = layer.out_norm(x + residual)
    y = linears(layer.down, layer.activation(linears(layer.up, x)))
    if layer.down_dropout is not None:
        y = layer.down_dropout(y)
    return layer.down_norm(y + x)  # type: ignore[no-any-return]
