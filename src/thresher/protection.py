"""Which tokens of a call no policy may drop."""

from __future__ import annotations

import torch
from torch import Tensor

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


__all__ = ["protected_tokens"]
