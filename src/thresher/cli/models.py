"""Models by the words of the command line: a saved directory, a plain checkpoint, a hub name or the built-in one."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import datasets
import torch
import transformers
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    set_seed,
)

import thresher
from thresher import checkpoint
from thresher.backbones import FAMILIES
from thresher.checkpoint import SETTINGS
from thresher.cli.data import NAMED, holds_dialogues, holds_questions, holds_tags
from thresher.cli.question_work import QuestionWork, no_answer
from thresher.cli.screen import notice
from thresher.cli.tagging_work import TaggingWork, tags_of_head, tags_to_learn
from thresher.cli.work import EmbeddingWork, ResponseWork, TextWork, Work
from thresher.errors import CheckpointError, OptionError
from thresher.exported.directory import is_exported
from thresher.measure import run as running
from thresher.measure.run import Run
from thresher.model import attachment_of, find_encoder
from thresher.tasks.answering import QuestionTask
from thresher.tasks.features import DEFAULT_MAX_LENGTH, EncodedRows
from thresher.tasks.responses import ResponseTask, prepare
from thresher.tasks.tagging import read_words_apart
from thresher.tasks.text import TextTask, canonical

BUILT_IN = "minilm"
PROBABILITY = "multi_label_classification"  # of one label: what transformers learns by binary cross-entropy
ATTENTION_DROPOUT = ("attention_probs_dropout_prob", "attention_dropout")  # 0 lets training use the fast kernels too
NEW_HEAD = (None, "MaskedLM", "PreTraining")  # checkpoints without a trained head for any task

T = TypeVar("T")

# One display at a time: the command's own.
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
datasets.disable_progress_bars()


@dataclass(frozen=True)
class Opened:
    """A model with something attached, its tokenizer, and what it is for."""

    model: Any
    tokenizer: Any
    work: Work

    @property
    def has_policy(self) -> bool:
        return attachment_of(self.model).policy is not None

    def limit(self, asked: int | None = None) -> int:
        """Tokens to read of a row: as asked, as fitted, else what tokenizer and model can read, at most 512."""
        asked = self.work.max_length if asked is None else asked
        most = min(reach(self.model), self.tokenizer.model_max_length)
        if asked is None:
            return int(min(most, DEFAULT_MAX_LENGTH))
        if asked > reach(self.model):
            raise OptionError(
                f"A maximum length of {asked} is more than the {reach(self.model)} tokens the model can read."
            )
        return asked

    def encode(
        self,
        rows: datasets.Dataset,
        columns: dict[str, str],
        *,
        labels: bool = False,
        max_length: int | None = None,
        training: bool = False,
    ) -> EncodedRows:
        """The rows, by the columns the task reads, as token ids; labels are required where `labels`."""
        named = self.work.named(rows, columns)
        return self.work.encode(named, self.tokenizer, self.limit(max_length), labels=labels, training=training)

    def answer(
        self,
        rows: datasets.Dataset,
        *,
        batch_size: int | None = None,
        on_done: Callable[[int], object] | None = None,
    ) -> Run:
        """What the model says of encoded rows. on_done: called with the number of rows just done."""
        return running.run(self.model, rows, batch_size=batch_size, on_batch=on_done)

    def save(self, directory: Path) -> None:
        """The model with its policy and tokenizer, all or nothing."""
        with checkpoint.staged(directory) as staging:
            self.model.save_pretrained(str(staging))
            if not hasattr(self.model, "tokenizer"):
                self.tokenizer.save_pretrained(str(staging))

    def text_work(self) -> Work:
        """The task. Raises OptionError for a model whose answers no command can score."""
        if self.work.kind == "other":
            raise OptionError(
                f"{type(self.model).__name__} neither a classifier, a regressor, a question answerer nor a sentence "
                "embedder; thresher bench and thresher explain take it, and thresher.attach() does from Python."
            )
        return self.work


def open_model(name: str, device: str, *, plain_is_news: bool = True, speedup: float | None = None) -> Opened:
    """What `fit` saved; or a plain checkpoint, packed with nothing dropped, which is said. On `device` (cpu, cuda).

    speedup: the point of its frontier to run at.
    """
    path = find(name)
    if (Path(path) / SETTINGS).is_file():
        model = thresher.load(path, device=device, speedup=speedup)
    elif speedup is not None:
        raise OptionError(f"{name} is a plain checkpoint, which has no frontier to pick --speedup from.")
    else:
        model = thresher.attach(_plain(path, device))
        if plain_is_news:
            notice(f"{name} is a plain checkpoint: it runs packed and drops nothing")
    noted = attachment_of(model).notes.get("task")
    work = Work.from_notes(noted) if noted is not None else _guessed(model)
    return Opened(model, _tokenizer(model, path), work)


def open_in_float32(name: str, *, speedup: float | None = None) -> Opened:
    """The model on the CPU in float32, whatever it was saved in: what is quantized and exported."""
    opened = open_model(name, "cpu", speedup=speedup)
    if (dtype := find_encoder(opened.model).dtype) is not torch.float32:
        notice(f"{name} was saved in {str(dtype).removeprefix('torch.')} and is computed in float32 here")
        opened.model.float()
    return opened


def open_start(
    name: str,
    rows: datasets.Dataset,
    device: str,
    *,
    kind: str | None,
    metric: str | None,
    columns: dict[str, str],
    max_length: int | None,
    seed: int,
    labels: bool = True,
) -> tuple[Opened, bool]:
    """The model to train on `rows`, packed, on `device`; and whether its head is new, and so has to be fine-tuned first."""
    path = find(name)
    rows = rows if kind in NAMED else Work().named(rows, columns)
    set_seed(seed)
    if kind == "embedding":
        if metric not in (None, "cosine"):
            raise OptionError(f"Embeddings are scored by cosine, not by {metric!r}.")
        model = thresher.attach(_sentence_transformer(path, device))
        return Opened(model, model.tokenizer, EmbeddingWork(columns, max_length)), False
    config = _config(path)
    trained = _head(config) == "SequenceClassification"
    if not labels and _head(config) in NEW_HEAD:
        raise OptionError(f"{name} has no trained head to learn from, so --no-labels cannot work; give labels.")
    if kind == "response" or (kind is None and holds_dialogues(rows)):
        return _selector(path, config, device, metric, columns, max_length)
    if kind == "qa" or (kind is None and holds_questions(rows)):
        return _answerer(path, config, device, rows, metric, columns, max_length)
    if kind == "tagging" or (kind is None and holds_tags(rows)):
        return _tagger(path, config, device, rows, metric, columns, max_length)
    if config.model_type in FAMILIES and not trained and _head(config) not in NEW_HEAD:
        raise OptionError(
            f"{name} is a {config.architectures[0]}, which has no head for {kind or 'classification or regression'}; give a "
            "sequence-classification checkpoint, or an encoder without a head."
        )
    if trained:
        task = _task_of_head(config, rows, kind, metric)
        model = _load(path, lambda: AutoModelForSequenceClassification.from_pretrained(path))
    else:
        task = TextTask.infer(rows, kind=kind, metric=metric)  # type: ignore[arg-type]
        options: dict[str, Any] = {"num_labels": task.num_labels, "ignore_mismatched_sizes": True}
        if task.label_names:
            options["id2label"] = dict(enumerate(task.label_names))
            options["label2id"] = {label: number for number, label in enumerate(task.label_names)}
        model = _load(path, lambda: AutoModelForSequenceClassification.from_pretrained(path, **options))
    thresher.attach(model.eval().to(device))
    return Opened(model, _tokenizer(model, path), TextWork(columns, max_length, text=task)), not trained


def _selector(
    path: str, config: Any, device: str, metric: str | None, columns: dict[str, str], max_length: int | None
) -> tuple[Opened, bool]:
    """A model that selects responses by one logit, of a checkpoint that does or of an encoder."""
    trained = _head(config) == "SequenceClassification"
    if trained and not _selects(config):
        raise OptionError(
            f"The checkpoint's head has {config.num_labels} outputs that are no probability of a response; give an encoder "
            "without a head to train a new one."
        )
    options = {"num_labels": 1, "problem_type": PROBABILITY}
    model = _load(path, lambda: AutoModelForSequenceClassification.from_pretrained(path, **options))
    tokenizer = _tokenizer(model, path)
    prepare(model, tokenizer)
    thresher.attach(model.eval().to(device))
    work = ResponseWork(columns, max_length or _pair_length(model), measure=metric or "R@1")
    return Opened(model, tokenizer, work), not trained


def _answerer(
    path: str,
    config: Any,
    device: str,
    rows: datasets.Dataset,
    metric: str | None,
    columns: dict[str, str],
    max_length: int | None,
) -> tuple[Opened, bool]:
    """A model that answers by a span, of a checkpoint that does or of an encoder."""
    if _head(config) not in (*NEW_HEAD, "QuestionAnswering"):
        raise OptionError(
            f"The checkpoint is a {config.architectures[0]}, whose head finds no answers; give a question-answering "
            "checkpoint, or an encoder without a head."
        )
    threshold = no_answer(rows)
    config.num_labels = 2  # start and end
    _no_attention_dropout(config)
    model = _load(path, lambda: AutoModelForQuestionAnswering.from_pretrained(path, config=config))
    thresher.attach(model.eval().to(device))
    work = QuestionWork(columns, max_length or _window_length(model), measure=metric or "f1", threshold=threshold)
    return Opened(model, _tokenizer(model, path), work), _head(config) != "QuestionAnswering"


def _tagger(
    path: str,
    config: Any,
    device: str,
    rows: datasets.Dataset,
    metric: str | None,
    columns: dict[str, str],
    max_length: int | None,
) -> tuple[Opened, bool]:
    """A model that gives words tags, of a checkpoint that does or of an encoder."""
    new = _head(config) in NEW_HEAD
    task = tags_to_learn(config, rows, new=new)
    if new:
        _no_attention_dropout(config)
    model = _load(path, lambda: AutoModelForTokenClassification.from_pretrained(path, config=config))
    thresher.attach(model.eval().to(device))
    tokenizer = _load(path, lambda: AutoTokenizer.from_pretrained(path, **({"add_prefix_space": True} if new else {})))
    if new:
        read_words_apart(tokenizer)
    return Opened(model, tokenizer, TaggingWork(columns, max_length, tagging=task, measure=metric or "f1")), new


def _no_attention_dropout(config: Any) -> None:
    for name in ATTENTION_DROPOUT:
        if hasattr(config, name):
            setattr(config, name, 0.0)


def _window_length(model: Any) -> int:
    """Tokens of a question and a part of its passage: as on SQuAD, or what the model can read."""
    return min(QuestionTask().max_length, reach(model))


def _pair_length(model: Any) -> int:
    """Tokens of a context and a response: as BERT-FP, or what the model can read."""
    return min(ResponseTask().max_length, reach(model))


def _selects(config: Any) -> bool:
    """Whether a head says with one logit how probable it is that a response fits."""
    return bool(config.num_labels == 1 and config.problem_type == PROBABILITY)


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
    if name.startswith((".", "~", "/")) or name.count("/") > 1:
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


def _plain(path: str, device: str) -> Any:
    if (Path(path) / "modules.json").is_file():
        return _sentence_transformer(path, device)
    config = _config(path)
    name = (config.architectures or [""])[0]
    kind = getattr(transformers, name, AutoModel)
    return _load(path, lambda: kind.from_pretrained(path)).eval().to(device)


def _config(path: str) -> Any:
    return _load(path, lambda: AutoConfig.from_pretrained(path))


def _head(config: Any) -> str | None:
    found = re.search(r"For([A-Z]\w*)$", (config.architectures or [""])[0])
    return found.group(1) if found else None


def _sentence_transformer(path: str, device: str) -> Any:
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise OptionError('Embeddings need sentence-transformers: pip install "thresher[embed]".') from error
    return _load(path, lambda: SentenceTransformer(path, device=device)).eval()


def _tokenizer(model: Any, path: str) -> Any:
    own = getattr(model, "tokenizer", None)
    return own if own is not None else _load(path, lambda: AutoTokenizer.from_pretrained(path))


def _load(path: str, how: Callable[[], T]) -> T:
    """What transformers loads, its many errors as one sentence."""
    try:
        return how()
    except (OSError, SafetensorError, ValueError, RuntimeError, KeyError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        if Path(path).is_dir():
            raise CheckpointError(f"{path} does not load: {reason}.") from error
        raise CheckpointError(
            f"{path!r} is no local directory, and the hub did not give it as a model: {reason}."
        ) from error


def real_names(names: Iterable[str]) -> tuple[str, ...] | None:
    """The names of a head's classes, unless they are transformers' stand-ins."""
    found = tuple(names)
    return None if all(re.fullmatch(r"LABEL_\d+", name) for name in found) else found


def _names(config: Any) -> tuple[str, ...] | None:
    return real_names(config.id2label[number] for number in range(config.num_labels))


def _task_of_head(config: Any, rows: datasets.Dataset, kind: str | None, metric: str | None) -> TextTask:
    own = "regression" if config.num_labels == 1 else "classification"
    if kind is not None and kind != own:
        raise OptionError(
            f"The checkpoint's head has {config.num_labels} output{'s' if config.num_labels > 1 else ''}, which is {own}, "
            f"not {kind}; give an encoder without a head to train a new one."
        )
    pair = "text_pair" in canonical(rows).column_names
    return TextTask(own, config.num_labels, _names(config) if own == "classification" else None, pair, metric or "")  # type: ignore[arg-type]


def _guessed(model: Any) -> Work:
    """The task of a plain checkpoint; whether it reads pairs, the rows say later."""
    config = find_encoder(model).config
    if hasattr(model, "encode"):
        return EmbeddingWork()
    if _head(config) == "QuestionAnswering":
        return QuestionWork(max_length=_window_length(model), open=True)
    if (task := tags_of_head(config)) is not None:
        return TaggingWork(tagging=task)
    if _head(config) != "SequenceClassification":
        return Work()
    if _selects(config):
        return ResponseWork(max_length=_pair_length(model))
    kind = "regression" if config.num_labels == 1 else "classification"
    names = _names(config) if kind == "classification" else None
    return TextWork(text=TextTask(kind, config.num_labels, names), any_pair=True)  # type: ignore[arg-type]
