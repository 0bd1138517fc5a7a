"""Checkpoints by the words of the command line: where they are, what their heads are for, how much they can read."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets
import transformers
from transformers import AutoConfig, AutoModel, AutoTokenizer

from thresher.checkpoint import SETTINGS
from thresher.errors import CheckpointError, OptionError
from thresher.exported.directory import is_exported
from thresher.foreign import loaded, names_a_place
from thresher.model import find_encoder
from thresher.tasks.answering import QuestionTask
from thresher.tasks.features import DEFAULT_MAX_LENGTH
from thresher.tasks.responses import ResponseTask

BUILT_IN = "minilm"
PROBABILITY = "multi_label_classification"  # of one label: what transformers learns by binary cross-entropy

# One display at a time: the command's own.
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
datasets.disable_progress_bars()


def find(name: str) -> str:
    """A local directory, the built-in model, or a hub name as it is."""
    path = Path(name).expanduser()
    if path.is_dir():
        if not any((path / file).is_file() for file in (SETTINGS, "config.json", "modules.json")):
            if is_exported(path):
                raise CheckpointError(
                    f"{path} is an exported graph, which only predict, evaluate and bench take; give the saved model that it "
                    "was exported from."
                )
            raise CheckpointError(f"{path} has no config.json, so it is not a saved model.")
        return str(path)
    if path.exists():
        raise CheckpointError(f"{path} is a file; give the directory of a saved model.")
    if name == BUILT_IN:
        from thresher.demo import built_in_encoder

        return str(built_in_encoder())
    if names_a_place(name):
        raise CheckpointError(f"There is no directory {path}.")
    return name


def reach(model: Any) -> int:
    """The most tokens the model can read."""
    config = find_encoder(model).config
    positions = getattr(config, "max_position_embeddings", None) or DEFAULT_MAX_LENGTH
    if config.model_type in ("roberta", "xlm-roberta", "camembert", "mpnet"):
        positions -= config.pad_token_id + 1  # their positions start after the padding's
    own = getattr(model, "max_seq_length", None)
    return min(positions, own) if own else positions


def plain_model(path: str, device: str) -> Any:
    """The model of a checkpoint that nothing was attached to, in eval mode."""
    if (Path(path) / "modules.json").is_file():
        return sentence_transformer(path, device)
    config = config_of(path)
    name = (config.architectures or [""])[0]
    kind = getattr(transformers, name, AutoModel)
    return loaded(lambda: kind.from_pretrained(path), path).eval().to(device)


def config_of(path: str) -> Any:
    """The configuration of the model at `path`."""
    return loaded(lambda: AutoConfig.from_pretrained(path), path)


def head_of(config: Any) -> str | None:
    """What the checkpoint's head is for, as its class says ("SequenceClassification"); None without one."""
    found = re.search(r"For([A-Z]\w*)$", (config.architectures or [""])[0])
    return found.group(1) if found else None


def sentence_transformer(path: str, device: str) -> Any:
    """Raises OptionError where the package is missing."""
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise OptionError('Embeddings need sentence-transformers: pip install "thresher[embed]".') from error
    return loaded(lambda: SentenceTransformer(path, device=device), path).eval()


def tokenizer_of(model: Any, path: str) -> Any:
    """The model's own, or the one at `path`."""
    own = getattr(model, "tokenizer", None)
    return own if own is not None else loaded(lambda: AutoTokenizer.from_pretrained(path), path)


def real_names(names: Iterable[str]) -> tuple[str, ...] | None:
    """The names of a head's classes, unless they are transformers' stand-ins."""
    found = tuple(names)
    return None if all(re.fullmatch(r"LABEL_\d+", name) for name in found) else found


def class_names(config: Any) -> tuple[str, ...] | None:
    """The names of the classes of a configuration's head, where they have some."""
    return real_names(config.id2label[number] for number in range(config.num_labels))


def selects(config: Any) -> bool:
    """Whether a head says with one logit how probable it is that a response fits."""
    return bool(config.num_labels == 1 and config.problem_type == PROBABILITY)


def window_length(model: Any) -> int:
    """Tokens of a question and a part of its passage: as on SQuAD, or what the model can read."""
    return min(QuestionTask().max_length, reach(model))


def pair_length(model: Any) -> int:
    """Tokens of a context and a response: as BERT-FP, or what the model can read."""
    return min(ResponseTask().max_length, reach(model))
