"""The encoder that a new scorer begins with, with its tokenizer and its policy."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from thresher import checkpoint
from thresher.errors import OptionError
from thresher.foreign import loaded
from thresher.methods import CONFIGS, build
from thresher.model import attach, exit_of, policy_of
from thresher.policy import Policy, PolicyConfig

# Parts of the names of settings that say how an encoder was saved, or what heads and training take.
OF_NO_VECTOR = ("path", "version", "dtype", "architectures", "label", "problem_type", "dropout", "_map", "_attn")


def open_encoder(
    source: Any, policy: PolicyConfig | str | None, logits: int | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The attached encoder in a directory (or of a hub name), in eval mode, and its tokenizer.

    logits: where `source` is a model for sequence classification with so many, it keeps its head; None: never.
    policy: one that needs no training. None: what `source` was saved with, as it was trained. Its early exit is kept, unless
        that answers in place of a head that is not.
    Raises CheckpointError where nothing can be loaded from `source`, OptionError for a policy that knows nothing before it is
    trained, or does not fit the encoder.
    """
    kind = AutoModelForSequenceClassification if logits and _has_head(opened(AutoConfig, source), logits) else AutoModel
    encoder, tokenizer = opened(kind, source).eval(), opened(AutoTokenizer, source)
    _attach_saved(encoder, Path(source).expanduser(), policy, headed=kind is not AutoModel)
    return encoder, tokenizer


def settings_of(encoder: PreTrainedModel) -> dict[str, Any]:
    """Those on which what it makes of a text depends, beside its weights."""
    config = encoder.config.to_dict()
    return {name: config[name] for name in config if not any(part in name for part in OF_NO_VECTOR)}


def _has_head(config: Any, logits: int) -> bool:
    named = any(name.endswith("ForSequenceClassification") for name in config.architectures or ())
    return named and config.num_labels == logits


def opened(kind: Any, source: Any) -> Any:
    """What one of transformers' Auto classes loads from a directory or the hub. Raises CheckpointError."""
    return loaded(lambda: kind.from_pretrained(source), source, "an encoder with its tokenizer")


def _attach_saved(encoder: PreTrainedModel, path: Path, policy: PolicyConfig | str | None, *, headed: bool) -> None:
    """Attach what was saved, or `policy` in place of the saved one."""
    saved = checkpoint.read(path) if (path / checkpoint.SETTINGS).is_file() else None
    if saved is None or (policy is not None and saved.exit is None):
        attach(encoder, policy)
    else:
        exit = saved.exit if headed or (saved.exit is not None and "states" in saved.exit.serves) else None
        if exit is not saved.exit:
            warnings.warn(
                f"The early exit that {path} was saved with is left out: it looks at what the model's head says, and this "
                "scorer reads the encoder without that head.",
                stacklevel=4,
            )
        try:
            attach(encoder, saved.config if policy is None else policy, exit=exit)
        except OptionError as error:
            if policy is not None:
                raise
            raise checkpoint.mismatch(path, error) from error
        if policy is None and saved.config is not None:
            saved.load_policy(policy_of(encoder))
        if exit is not None:
            saved.load_exit(exit_of(encoder))
    if policy is not None:
        _refuse_untrained(policy_of(encoder))


def _refuse_untrained(policy: Policy[Any]) -> None:
    """Raises OptionError where a new policy has something to learn: training a scorer would not teach it."""
    if not policy.needs_training:
        return
    ready = [name for name, kind in CONFIGS.items() if not build(kind(), policy.geometry).needs_training]
    raise OptionError(
        f"The method {policy.config.method!r} knows nothing before it is trained, which training a scorer does not do; take "
        f"one that needs no training ({', '.join(ready)}), or leave the method out and give as the encoder the directory of a "
        "model that was fitted with it."
    )


__all__ = ["open_encoder", "opened", "settings_of"]
