"""Inside a layer: where its query, key and value, its attention output and its feed-forward are. One function a layer shape."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from thresher.backbones import enter
from thresher.errors import UnsupportedModelError


@dataclass(frozen=True)
class OpenedLayer:
    """The parts of a post-norm layer: x = out_norm(out(attention(h)) + h), then down_norm(down(activation(up(x))) + x).

    attention: the module whose first argument is what query, key and value read; during a pass that is [1, T, D].
    out_dropout, down_dropout: after `out` and `down`; None where the family has none.
    scale: of the attention logits. dropout: the module whose p is that of attention probabilities.
    """

    attention: nn.Module
    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    out: nn.Linear
    out_dropout: nn.Module | None
    out_norm: nn.Module
    up: nn.Linear
    activation: Callable[[Tensor], Tensor]
    down: nn.Linear
    down_dropout: nn.Module | None
    down_norm: nn.Module
    heads: int
    scale: float
    dropout: nn.Dropout


def _bert(layer: Any) -> OpenedLayer:
    inner, output = layer.attention.self, layer.attention.output
    return OpenedLayer(
        attention=layer.attention,
        query=inner.query,
        key=inner.key,
        value=inner.value,
        out=output.dense,
        out_dropout=output.dropout,
        out_norm=output.LayerNorm,
        up=layer.intermediate.dense,
        activation=layer.intermediate.intermediate_act_fn,
        down=layer.output.dense,
        down_dropout=layer.output.dropout,
        down_norm=layer.output.LayerNorm,
        heads=inner.num_attention_heads,
        scale=inner.scaling,
        dropout=inner.dropout,
    )


def _distilbert(layer: Any) -> OpenedLayer:
    attention, feed_forward = layer.attention, layer.ffn
    return OpenedLayer(
        attention=attention,
        query=attention.q_lin,
        key=attention.k_lin,
        value=attention.v_lin,
        out=attention.out_lin,
        out_dropout=None,
        out_norm=layer.sa_layer_norm,
        up=feed_forward.lin1,
        activation=feed_forward.activation,
        down=feed_forward.lin2,
        down_dropout=feed_forward.dropout,
        down_norm=layer.output_layer_norm,
        heads=attention.n_heads,
        scale=attention.scaling,
        dropout=attention.dropout,
    )


OPENED: dict[str, Callable[[Any], OpenedLayer]] = {
    "bert": _bert,
    "camembert": _bert,
    "distilbert": _distilbert,
    "electra": _bert,
    "ernie": _bert,
    "roberta": _bert,
    "xlm-roberta": _bert,
}


def open_layers(model: PreTrainedModel) -> tuple[OpenedLayer, ...]:
    """The parts of every layer, first to last.

    Raises UnsupportedModelError, naming the family and those whose layers can be opened, also where a version of transformers
    has built the layer another way.
    """
    layers = enter(model).layers
    family = model.config.model_type
    if family not in OPENED:
        raise UnsupportedModelError(
            f"The layers of the family {family!r} ({type(model).__name__}) cannot be opened; they can for "
            f"{', '.join(sorted(OPENED))}."
        )
    try:
        return tuple(OPENED[family](layer) for layer in layers)
    except AttributeError as error:
        raise UnsupportedModelError(
            f"The layers of {type(model).__name__} are built otherwise in this version of transformers: {error}."
        ) from error
