"""How Thresher enters an encoder without copying its code: one general entrance, a short file where a family needs more."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from transformers import PreTrainedModel

from thresher.backbones.general import Entrance, Instead, enter_general
from thresher.backbones.modernbert import enter_modernbert
from thresher.backbones.mpnet import enter_mpnet
from thresher.errors import UnsupportedModelError

FAMILIES: dict[str, Callable[[PreTrainedModel], Entrance]] = {
    "albert": enter_general,
    "bert": enter_general,
    "camembert": enter_general,
    "distilbert": enter_general,
    "electra": enter_general,
    "ernie": enter_general,
    "modernbert": enter_modernbert,
    "mpnet": enter_mpnet,
    "roberta": enter_general,
    "xlm-roberta": enter_general,
}


def enter(model: nn.Module) -> Entrance:
    """Find where to pack, act and unpack. Raises UnsupportedModelError, naming the family and the supported ones."""
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(
            f"{type(model).__name__} is not a Hugging Face model (PreTrainedModel), a SentenceTransformer or a CrossEncoder."
        )
    config, family = model.config, model.config.model_type
    supported = ", ".join(sorted(FAMILIES))
    if getattr(config, "is_decoder", False) or getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{type(model).__name__} is a decoder; Thresher drops tokens in encoders only ({supported})."
        )
    if family not in FAMILIES:
        raise UnsupportedModelError(
            f"The family {family!r} ({type(model).__name__}) is not supported; supported are {supported}."
        )
    return FAMILIES[family](model)


__all__ = ["FAMILIES", "Entrance", "Instead", "enter"]
