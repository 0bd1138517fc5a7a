"""The model that training begins with: a checkpoint with a trained head, or an encoder that gets a new one."""

from __future__ import annotations

from typing import Any

import datasets
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    set_seed,
)

import thresher
from thresher.backbones import FAMILIES
from thresher.cli.checkpoints import (
    PROBABILITY,
    class_names,
    config_of,
    find,
    head_of,
    pair_length,
    selects,
    sentence_transformer,
    tokenizer_of,
    window_length,
)
from thresher.cli.data import NAMED, holds_dialogues, holds_questions, holds_tags
from thresher.cli.models import Opened
from thresher.cli.question_work import QuestionWork, no_answer
from thresher.cli.tagging_work import TaggingWork, tags_to_learn
from thresher.cli.work import EmbeddingWork, ResponseWork, TextWork, Work
from thresher.errors import OptionError
from thresher.foreign import loaded
from thresher.tasks.responses import prepare
from thresher.tasks.tagging import read_words_apart
from thresher.tasks.text import TextTask, canonical

ATTENTION_DROPOUT = ("attention_probs_dropout_prob", "attention_dropout")  # 0 lets training use the fast kernels too
NEW_HEAD = (None, "MaskedLM", "PreTraining")  # checkpoints without a trained head for any task


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
        model = thresher.attach(sentence_transformer(path, device))
        return Opened(model, model.tokenizer, EmbeddingWork(columns, max_length)), False
    config = config_of(path)
    trained = head_of(config) == "SequenceClassification"
    if not labels and head_of(config) in NEW_HEAD:
        raise OptionError(f"{name} has no trained head to learn from, so --no-labels cannot work; give labels.")
    if kind == "response" or (kind is None and holds_dialogues(rows)):
        return _selector(path, config, device, metric, columns, max_length)
    if kind == "qa" or (kind is None and holds_questions(rows)):
        return _answerer(path, config, device, rows, metric, columns, max_length)
    if kind == "tagging" or (kind is None and holds_tags(rows)):
        return _tagger(path, config, device, rows, metric, columns, max_length)
    if config.model_type in FAMILIES and not trained and head_of(config) not in NEW_HEAD:
        raise OptionError(
            f"{name} is a {config.architectures[0]}, which has no head for {kind or 'classification or regression'}; give a "
            "sequence-classification checkpoint, or an encoder without a head."
        )
    if trained:
        task = _task_of_head(config, rows, kind, metric)
        model = loaded(lambda: AutoModelForSequenceClassification.from_pretrained(path), path)
    else:
        task = TextTask.infer(rows, kind=kind, metric=metric)  # type: ignore[arg-type]
        options: dict[str, Any] = {"num_labels": task.num_labels, "ignore_mismatched_sizes": True}
        if task.label_names:
            options["id2label"] = dict(enumerate(task.label_names))
            options["label2id"] = {label: number for number, label in enumerate(task.label_names)}
        model = loaded(lambda: AutoModelForSequenceClassification.from_pretrained(path, **options), path)
    thresher.attach(model.eval().to(device))
    return Opened(model, tokenizer_of(model, path), TextWork(columns, max_length, text=task)), not trained


def _selector(
    path: str, config: Any, device: str, metric: str | None, columns: dict[str, str], max_length: int | None
) -> tuple[Opened, bool]:
    """A model that selects responses by one logit, of a checkpoint that does or of an encoder."""
    trained = head_of(config) == "SequenceClassification"
    if trained and not selects(config):
        raise OptionError(
            f"The checkpoint's head has {config.num_labels} outputs that are no probability of a response; give an encoder "
            "without a head to train a new one."
        )
    options = {"num_labels": 1, "problem_type": PROBABILITY}
    model = loaded(lambda: AutoModelForSequenceClassification.from_pretrained(path, **options), path)
    tokenizer = tokenizer_of(model, path)
    prepare(model, tokenizer)
    thresher.attach(model.eval().to(device))
    work = ResponseWork(columns, max_length or pair_length(model), measure=metric or "R@1")
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
    if head_of(config) not in (*NEW_HEAD, "QuestionAnswering"):
        raise OptionError(
            f"The checkpoint is a {config.architectures[0]}, whose head finds no answers; give a question-answering "
            "checkpoint, or an encoder without a head."
        )
    threshold = no_answer(rows)
    config.num_labels = 2  # start and end
    _no_attention_dropout(config)
    model = loaded(lambda: AutoModelForQuestionAnswering.from_pretrained(path, config=config), path)
    thresher.attach(model.eval().to(device))
    work = QuestionWork(columns, max_length or window_length(model), measure=metric or "f1", threshold=threshold)
    return Opened(model, tokenizer_of(model, path), work), head_of(config) != "QuestionAnswering"


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
    new = head_of(config) in NEW_HEAD
    task = tags_to_learn(config, rows, new=new)
    if new:
        _no_attention_dropout(config)
    model = loaded(lambda: AutoModelForTokenClassification.from_pretrained(path, config=config), path)
    thresher.attach(model.eval().to(device))
    tokenizer = loaded(lambda: AutoTokenizer.from_pretrained(path, **({"add_prefix_space": True} if new else {})), path)
    if new:
        read_words_apart(tokenizer)
    return Opened(model, tokenizer, TaggingWork(columns, max_length, tagging=task, measure=metric or "f1")), new


def _no_attention_dropout(config: Any) -> None:
    for name in ATTENTION_DROPOUT:
        if hasattr(config, name):
            setattr(config, name, 0.0)


def _task_of_head(config: Any, rows: datasets.Dataset, kind: str | None, metric: str | None) -> TextTask:
    own = "regression" if config.num_labels == 1 else "classification"
    if kind is not None and kind != own:
        raise OptionError(
            f"The checkpoint's head has {config.num_labels} output{'s' if config.num_labels > 1 else ''}, which is {own}, "
            f"not {kind}; give an encoder without a head to train a new one."
        )
    pair = "text_pair" in canonical(rows).column_names
    names = class_names(config) if own == "classification" else None
    return TextTask(own, config.num_labels, names, pair, metric or "")  # type: ignore[arg-type]
