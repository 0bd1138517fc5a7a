"""The models of `long_range.py`: classes of transformers at one small size, and how each of them takes a padded batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature
from typing import Any

import datasets
import torch
import transformers as hf
from torch import Tensor

from long_range_data import CLS, FIRST, PAD, SEP


@dataclass(frozen=True)
class Shape:
    """The one size of all models. tokens: the longest row. window: tokens that local attention sees, landmarks, latents."""

    tokens: int
    vocabulary: int
    classes: int
    layers: int
    hidden: int
    heads: int
    window: int

    def common(self, **more: Any) -> dict[str, Any]:
        """Settings that BERT-like configurations share; BERT's initial spread, scaled to this width."""
        return {
            "vocab_size": self.vocabulary,
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "intermediate_size": 2 * self.hidden,
            "max_position_embeddings": self.tokens,
            "initializer_range": 0.02 * (768 / self.hidden) ** 0.5,
            "num_labels": self.classes,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
            "pad_token_id": PAD,
            "bos_token_id": CLS,
            "eos_token_id": SEP,
            "sep_token_id": SEP,
            **more,
        }


def _modernbert(shape: Shape) -> hf.PretrainedConfig:
    # Two thirds of the width, since a gated feed-forward has three matrices instead of two.
    kinds = ["sliding_attention" if layer % 3 else "full_attention" for layer in range(shape.layers)]
    settings = shape.common(
        intermediate_size=4 * shape.hidden // 3, local_attention=shape.window, layer_types=kinds, cls_token_id=CLS
    )
    return hf.ModernBertConfig(**{k: v for k, v in settings.items() if not k.endswith("dropout_prob")})


def _perceiver(shape: Shape) -> hf.PretrainedConfig:
    return hf.PerceiverConfig(
        vocab_size=shape.vocabulary,
        max_position_embeddings=shape.tokens,
        num_latents=shape.window,
        d_latents=shape.hidden,
        d_model=shape.hidden,
        num_self_attends_per_block=shape.layers,
        num_self_attention_heads=shape.heads,
        num_cross_attention_heads=shape.heads,
        self_attention_widening_factor=2,
        cross_attention_widening_factor=2,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.02 * (768 / shape.hidden) ** 0.5,
        num_labels=shape.classes,
    )


CONFIGS: dict[str, Callable[[Shape], hf.PretrainedConfig]] = {
    "bert": lambda s: hf.BertConfig(**s.common()),
    "modernbert": _modernbert,
    "longformer": lambda s: hf.LongformerConfig(
        # Positions count from behind the padding's id.
        **s.common(attention_window=s.window, max_position_embeddings=s.tokens + PAD + 1)
    ),
    "big-bird": lambda s: hf.BigBirdConfig(**s.common(block_size=s.window // 2, num_random_blocks=2)),
    "nystromformer": lambda s: hf.NystromformerConfig(
        **s.common(num_landmarks=s.window, segment_means_seq_len=s.tokens, conv_kernel_size=s.window // 2 + 1)
    ),
    "perceiver": _perceiver,
    "fnet": lambda s: hf.FNetConfig(**s.common(type_vocab_size=1)),
}


def build(name: str, shape: Shape, seed: int = 0) -> Any:
    """An untrained classifier of this size, in eval mode."""
    hf.set_seed(seed)
    return hf.AutoModelForSequenceClassification.from_config(CONFIGS[name](shape)).eval()


Batch = dict[str, Tensor]


def padded(rows: datasets.Dataset, tokens: int) -> Batch:
    """All rows as tensors, the ids and their mask [n, tokens]."""
    ids = torch.full((len(rows), tokens), PAD)
    for at, row in enumerate(rows["input_ids"]):
        ids[at, : len(row)] = torch.tensor(row)
    return {"input_ids": ids, "attention_mask": (ids != PAD).long(), "labels": torch.tensor(rows["labels"][:])}


def pick(batch: Batch, index: Any) -> Batch:
    return {name: value[index] for name, value in batch.items()}


def forward(model: Any, batch: Batch) -> Tensor:
    """The logits; FNet takes no mask, so it mixes the padding in."""
    given = {
        name: batch[name] for name in ("input_ids", "attention_mask") if name in signature(model.forward).parameters
    }
    if model.config.model_type == "nystromformer":
        # The [N, N] mask that transformers makes of a row's own does not fit the landmarks; one that is made already does.
        hidden = 1.0 - given["attention_mask"][:, None, None].to(model.dtype)
        given["attention_mask"] = hidden * torch.finfo(model.dtype).min
    return model(**given).logits


def random_batch(shape: Shape, rows: int) -> Batch:
    ids = torch.randint(FIRST, shape.vocabulary, (rows, shape.tokens), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
