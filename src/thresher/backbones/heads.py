"""Encoders that have lost attention heads: their linear layers are smaller, their checkpoints those of the whole model.

What is saved has the size that the configuration says, with zeros where the heads were, so that any transformers loads it as
the plain model and gives the same answers. The configuration notes which heads those are; `attach` removes them again.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from thresher.backbones.general import removed_heads
from thresher.backbones.opened import OpenedLayer, open_layers
from thresher.errors import OptionError


def remove_heads(model: PreTrainedModel, heads: Sequence[Sequence[int]]) -> None:
    """Remove attention heads from every layer, in place: queries, keys, values and what reads them really shrink.

    heads: for each layer their numbers, counted from 0 over the heads that it has; as many in every layer, and fewer than all.
    The width of a head stays. `state_dict` gives, and `load_state_dict` takes, the weights of the whole model.
    Raises OptionError for heads that are not there or not as many in every layer, UnsupportedModelError for a family whose
    layers cannot be opened.
    """
    layers = open_layers(model)
    if len(heads) != len(layers):
        raise OptionError(f"The model has {len(layers)} layers, and heads to remove are given for {len(heads)}.")
    gone = [sorted(set(some)) for some in heads]
    if len({len(some) for some in gone}) > 1:
        raise OptionError(f"Every layer must lose as many heads, not {[len(some) for some in gone]}.")
    for layer, some in zip(layers, gone, strict=True):
        if any(not 0 <= head < layer.heads for head in some) or len(some) >= layer.heads:
            raise OptionError(
                f"A layer of {layer.heads} heads must keep at least one; heads {some} cannot be removed from it."
            )
    whole = model.config.num_attention_heads
    before = removed_heads(model.config) or [[] for _ in layers]
    noted = []
    for layer, some, old in zip(layers, gone, before, strict=True):
        there = [head for head in range(whole) if head not in old]
        kept = [head for number, head in enumerate(there) if number not in some]
        _shrink(layer, there, kept, whole)
        noted.append([head for head in range(whole) if head not in kept])
    model.config.removed_heads = noted


def remove_noted_heads(model: PreTrainedModel) -> None:
    """Remove, in place, the heads that the configuration says are gone and that loading a checkpoint brought back as zeros."""
    noted = removed_heads(model.config)
    if not noted:
        return
    layers = open_layers(model)
    if layers[0].heads == model.config.num_attention_heads:
        model.config.removed_heads = None
        remove_heads(model, noted)


def _shrink(layer: OpenedLayer, there: list[int], kept: list[int], whole: int) -> None:
    """there, kept: heads before and after, by their numbers in the whole model."""
    width = layer.query.out_features // len(there)
    units = [head * width + i for head in kept for i in range(width)]
    present = {head * width + i: number * width + i for number, head in enumerate(there) for i in range(width)}
    index = torch.tensor([present[unit] for unit in units], device=layer.query.weight.device)
    for linear, dim in ((layer.query, 0), (layer.key, 0), (layer.value, 0), (layer.out, 1)):
        linear.weight = _selected(linear.weight, dim, index)
        if dim == 0:
            linear.out_features = len(units)
            if linear.bias is not None:
                linear.bias = _selected(linear.bias, dim, index)
        else:
            linear.in_features = len(units)
        _save_whole(linear, dim, units, whole * width)
    now = {"num_attention_heads": len(kept), "n_heads": len(kept), "all_head_size": len(units)}
    for module in layer.attention.modules():
        if layer.query in module.children():
            for name in now.keys() & vars(module).keys():
                setattr(module, name, now[name])


def _selected(parameter: Tensor, dim: int, index: Tensor) -> nn.Parameter:
    return nn.Parameter(parameter.detach().index_select(dim, index), requires_grad=parameter.requires_grad)


def _save_whole(linear: nn.Linear, dim: int, units: list[int], size: int) -> None:
    """Let the linear's weights be saved and loaded at the size that they had. dim: along which it shrank."""
    linear._state_dict_hooks.clear()
    linear._load_state_dict_pre_hooks.clear()
    linear.register_state_dict_post_hook(partial(_widen, dim, units, size))
    linear.register_load_state_dict_pre_hook(partial(_narrow, dim, units, size))


def _widen(dim: int, units: list[int], size: int, module: Any, state: dict[str, Tensor], prefix: str, _: Any) -> None:
    for name in _shortened(dim, state, prefix):
        small = state[name]
        if isinstance(small, nn.Parameter):  # asked for themselves (keep_vars), not to be saved
            continue
        shape = list(small.shape)
        shape[dim] = size
        state[name] = small.new_zeros(shape).index_copy_(dim, torch.tensor(units, device=small.device), small.detach())


def _narrow(dim: int, units: list[int], size: int, module: Any, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    for name in _shortened(dim, state, prefix):
        if state[name].shape[dim] == size:
            state[name] = state[name].index_select(dim, torch.tensor(units, device=state[name].device))


def _shortened(dim: int, state: dict[str, Tensor], prefix: str) -> list[str]:
    """The entries of a linear that has lost outputs (dim 0: weight and bias) or inputs (dim 1: weight)."""
    names = (f"{prefix}weight", f"{prefix}bias") if dim == 0 else (f"{prefix}weight",)
    return [name for name in names if name in state]
