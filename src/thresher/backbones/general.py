"""The general entrance: layers through transformers' own records, no table of families."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from thresher.errors import UnsupportedModelError
from thresher.packed import Fill

READS_EVERY_TOKEN = ("ForQuestionAnswering", "ForTokenClassification", "ForMaskedLM", "ForPreTraining")


@dataclass(frozen=True)
class Geometry:
    """The sizes of an encoder that policies and the FLOPs count need. Layers are counted 1..layers.

    head: the width of a head; None: hidden / heads, as it is unless heads were removed.
    """

    layers: int
    hidden: int
    heads: int
    intermediate: int
    gated: bool = False
    head: int | None = None

    @property
    def attention(self) -> int:
        """The width of queries, keys and values, all heads together."""
        return self.hidden if self.head is None else self.heads * self.head


@dataclass(frozen=True)
class Instead:
    """A method of one of the model's modules, and what a pass runs in its place.

    function: called with the module, a function that takes what transformers' attention interface takes, and the method's
    own arguments. It and all it holds can be copied and pickled.
    """

    module: nn.Module
    name: str
    function: Callable[..., Any]


@dataclass(frozen=True)
class Entrance:
    """Where the engine enters a model.

    base: the module whose call is one pass. layers: the distinct layer modules. calls: how often layers run in a pass
    (ALBERT calls one layer many times). midpoints: for each distinct layer, the module whose output the feed-forward
    reads and which may be shortened (post-norm families), or None. tail: a module after the last layer that works
    token by token; unpacking waits for it. fill: what the model's head wants to find in a dropped token's place.
    segment_end: the id that closes a segment in families without token types, or None.
    position_bias: makes, for one pass, what maps the original positions [..., n] of a row's tokens to what is added to their
    attention logits, [..., H, n, n]; None where nothing is.
    instead: what else runs in a pass, in families that do not use transformers' attention interface.
    """

    base: nn.Module
    layers: tuple[nn.Module, ...]
    calls: int
    midpoints: tuple[nn.Module | None, ...]
    geometry: Geometry
    fill: Fill
    tail: nn.Module | None = None
    segment_end: int | None = None
    position_bias: Callable[[], Callable[[Tensor], Tensor]] | None = None
    instead: tuple[Instead, ...] = ()


def enter_general(model: PreTrainedModel) -> Entrance:
    base = model.base_model
    layers = find_layers(base)
    config = model.config
    return Entrance(
        base=base,
        layers=layers,
        calls=config.num_hidden_layers * getattr(config, "inner_group_num", 1),
        midpoints=tuple(post_norm_midpoint(layer) for layer in layers),
        geometry=geometry(model),
        fill=head_fill(model),
        segment_end=config.eos_token_id if getattr(config, "type_vocab_size", 2) == 1 else None,
    )


def find_layers(base: nn.Module) -> tuple[nn.Module, ...]:
    """The encoder's layers, by the class that transformers itself records hidden states from."""
    record = (getattr(base, "_can_record_outputs", None) or {}).get("hidden_states")
    layer_class = getattr(record, "target_class", record)
    layers = tuple(m for m in base.modules() if isinstance(layer_class, type) and isinstance(m, layer_class))
    if not layers or not base._supports_attention_backend:
        raise UnsupportedModelError(
            f"{type(base).__name__} does not use transformers' attention interface in this version of transformers."
        )
    return layers


def post_norm_midpoint(layer: nn.Module) -> nn.Module | None:
    """The module that ends attention's residual and norm, found by shape: an `attention` child that holds a LayerNorm (BERT,
    RoBERTa, ELECTRA, ALBERT), or a `sa_layer_norm` beside it (DistilBERT)."""
    beside = getattr(layer, "sa_layer_norm", None)
    if beside is not None:
        return beside  # type: ignore[no-any-return]
    attention = getattr(layer, "attention", None)
    if attention is not None and any(isinstance(m, nn.LayerNorm) for m in attention.modules()):
        return attention  # type: ignore[no-any-return]
    return None


def geometry(model: PreTrainedModel, *, gated: bool = False) -> Geometry:
    config = model.config
    intermediate = getattr(config, "intermediate_size", None) or config.hidden_dim
    removed = (removed_heads(config) or [[]])[0]  # as many in every layer
    heads = config.num_attention_heads
    return Geometry(
        layers=config.num_hidden_layers * getattr(config, "inner_group_num", 1),
        hidden=config.hidden_size,
        heads=heads - len(removed),
        intermediate=intermediate,
        gated=gated,
        head=config.hidden_size // heads if removed else None,
    )


def takes_types(encoder: PreTrainedModel) -> bool:
    """Whether the family tells the two texts of a pair apart by token types."""
    known = "token_type_ids" in inspect.signature(type(encoder).forward).parameters
    return known and getattr(encoder.config, "type_vocab_size", 0) > 1


def removed_heads(config: Any) -> list[list[int]]:
    """For each layer the heads that `backbones.heads.remove_heads` took, by their numbers in the whole model; empty where it
    took none."""
    return getattr(config, "removed_heads", None) or []


def head_fill(model: PreTrainedModel) -> Fill:
    """Heads that read every token get a dropped token's last state; pooling heads average the kept tokens."""
    return "carry" if type(model).__name__.endswith(READS_EVERY_TOKEN) else "mean"
