"""What a saved scorer's directory holds: the encoder's own checkpoint and tokenizer, scorer.safetensors and scorer.json."""

from __future__ import annotations

import json
from os import PathLike
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from transformers import AutoTokenizer

from thresher import model as models
from thresher.checkpoint import staged
from thresher.errors import CheckpointError, OptionError, nearest
from thresher.pairs.colbert import ColBERT
from thresher.pairs.cross import CrossEncoder
from thresher.pairs.deformer import DeFormer
from thresher.pairs.dual import DualEncoder
from thresher.pairs.encoders import opened
from thresher.pairs.mixencoder import MixEncoder
from thresher.pairs.poly import PolyEncoder
from thresher.pairs.scorer import Scorer
from thresher.pairs.virt import VIRT
from thresher.stamped import DIGEST, check_weights, read_settings, sha256

FORMAT = 1
SETTINGS = "scorer.json"
WEIGHTS = "scorer.safetensors"
ENCODER = "encoder."
OTHERS = "encoder_sha256"  # of the encoder's files of weights, by name
TOKENS = "tokens"  # that the tokenizer knows

SCORERS: dict[str, type[Scorer[Any]]] = {
    scorer.config_class.kind: scorer
    for scorer in (MixEncoder, DualEncoder, PolyEncoder, ColBERT, DeFormer, VIRT, CrossEncoder)
}


def scorer_class(kind: str) -> type[Scorer[Any]]:
    """Raises OptionError for a kind that there is not."""
    if kind not in SCORERS:
        raise OptionError(f"There is no scorer {kind!r}{nearest(str(kind), SCORERS)}")
    return SCORERS[kind]


def save(scorer: Scorer[Any], directory: Any) -> None:
    """Write a scorer, all or nothing: AutoModel and AutoTokenizer load the directory, `thresher.load` the encoder with its
    policy, `load` everything.

    Raises CheckpointError with the reason when it cannot be written; what was there before is then still there.
    """
    with staged(directory, last=SETTINGS) as staging:
        scorer.encoder.save_pretrained(str(staging))
        scorer.tokenizer.save_pretrained(str(staging))
        safetensors.torch.save_file(extra_state(scorer), staging / WEIGHTS)
        settings = {
            "format": FORMAT,
            "scorer": scorer.config.kind,
            "config": scorer.config.to_dict(),
            DIGEST: sha256(staging / WEIGHTS),
            OTHERS: {file.name: sha256(file) for file in _of_encoder(staging)},
            TOKENS: len(scorer.tokenizer),
        }
        (staging / SETTINGS).write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")


def extra_state(scorer: Scorer[Any]) -> dict[str, torch.Tensor]:
    """The weights that are not the encoder's, by name, on the CPU."""
    state = {name: value for name, value in scorer.state_dict().items() if not name.startswith(ENCODER)}
    return {name: value.detach().cpu().contiguous() for name, value in state.items()}


def load(directory: Any, *, device: str | torch.device | None = None) -> Any:
    """The scorer that `save` wrote, with the encoder's policy, in eval mode.

    Raises CheckpointError, saying which file is missing, corrupted, of another version or holds weights that are no numbers.
    """
    if not isinstance(directory, str | PathLike):
        raise CheckpointError(
            f"A scorer is loaded from the directory that it was saved to, not from {directory!r:.80}."
        )
    path = Path(directory)
    settings = _settings(path)
    encoder, tokenizer = models.load(path), opened(AutoTokenizer, path)
    if settings[TOKENS] not in (None, len(tokenizer)):
        raise CheckpointError(
            f"The tokenizer in {path} knows {len(tokenizer)} tokens and the scorer was saved with one that knows "
            f"{settings[TOKENS]}; copy the whole directory, tokenizer.json too."
        )
    try:
        scorer_type = scorer_class(settings["scorer"])
        scorer = scorer_type(encoder, tokenizer, scorer_type.config_class.from_dict(settings["config"]))
        extra = safetensors.torch.load_file(path / WEIGHTS)
        missing, unexpected = scorer.load_state_dict(extra, strict=False)
        lacking = [name for name in missing if not name.startswith(ENCODER)]
        if lacking or unexpected:
            raise ValueError(f"its weights do not fit ({', '.join([*lacking, *unexpected])})")
    except (OptionError, OSError, RuntimeError, SafetensorError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise CheckpointError(f"{path} does not load as the scorer that {SETTINGS} names: {reason}.") from error
    _refuse_what_is_no_number(scorer, path)
    return scorer.eval() if device is None else scorer.eval().to(device)


def _of_encoder(path: Path) -> list[Path]:
    return sorted(file for file in path.glob("model*.safetensors"))


def _settings(path: Path) -> dict[str, Any]:
    file = path / SETTINGS
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a directory; give the one that a scorer was saved to.")
    if not file.is_file():
        raise CheckpointError(
            f"{path} has no {SETTINGS}, so no scorer was saved there; make a new one with from_encoder, or train one."
        )
    fields: dict[str, Any] = {"scorer": str, "config": dict, OTHERS: dict, TOKENS: (int, type(None))}
    settings = read_settings(file, fields, FORMAT, "scorer", defaults={OTHERS: {}, TOKENS: None})
    for name, digest in {WEIGHTS: settings[DIGEST], **settings[OTHERS]}.items():
        check_weights(path / name, file, digest, "scorer")
    return settings


def _refuse_what_is_no_number(scorer: Scorer[Any], path: Path) -> None:
    for name, value in scorer.state_dict().items():
        if value.is_floating_point() and not value.isfinite().all():
            raise CheckpointError(
                f"{path} holds NaN or infinity in {name}, so it scores nothing; train or copy it again."
            )
