"""Which tokens of a call no policy may drop, and where the first text of a pair ends."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from thresher.backbones.general import takes_types
from thresher.errors import OptionError
from thresher.policy import PolicyConfig


def protected_tokens(config: PolicyConfig, ids: Tensor | None, segments: Tensor | None) -> Tensor | None:
    """[B, N] bool, or None when the policy protects nothing but the first token.

    ids, segments: [B, N] of the call, None where it gives none. Raises OptionError when the policy needs what is missing.
    """
    protected = None
    if config.protect_ids:
        if ids is None:
            raise OptionError("protect_ids needs input_ids; this call gives inputs_embeds, which name no tokens.")
        protected = _any_of(ids, config.protect_ids)
    if config.protect_segments:
        if segments is None:
            raise OptionError(
                "protect_segments needs token_type_ids, which this call does not give (DistilBERT has none); pass "
                "them, or protect tokens by protect_ids."
            )
        inside = _any_of(segments, config.protect_segments)
        protected = inside if protected is None else protected | inside
    return protected


def _any_of(values: Tensor, wanted: tuple[int, ...]) -> Tensor:
    """Whether each value is one of `wanted` (torch.isin, in operators that also export)."""
    return (values.unsqueeze(-1) == torch.tensor(wanted, device=values.device)).any(-1)


def with_segments(config: PolicyConfig, tokenizer: Any, encoder: Any) -> PolicyConfig:
    """Settings that know where the first text of a pair ends: the tokenizer's separator says it where the encoder is told no
    token types (DistilBERT). As they are where types tell it, or the settings do, or nothing is known of the tokenizer."""
    names = getattr(tokenizer, "model_input_names", None)
    end = getattr(tokenizer, "sep_token_id", None)
    if names is None or end is None or config.segment_end is not None:
        return config
    return config if "token_type_ids" in names and takes_types(encoder) else config.replace(segment_end=end)


__all__ = ["protected_tokens", "with_segments"]
