"""What a model is for, as the command line needs it and as it is saved with it: how to read rows, what answers say."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar, Self

import datasets
import numpy as np

from thresher.cli.data import NAMED, read_rows
from thresher.cli.screen import notice
from thresher.cli.truth import Truth
from thresher.errors import CheckpointError, OptionError, nearest
from thresher.model import find_encoder
from thresher.policy import PolicyConfig
from thresher.protection import with_segments
from thresher.tasks.data import name_columns
from thresher.tasks.dialogues import dialogues
from thresher.tasks.features import EncodedRows, encode_texts
from thresher.tasks.long_texts import EncodedLongTexts, window_readings
from thresher.tasks.ranking import ranking_metrics
from thresher.tasks.reading import Reading
from thresher.tasks.responses import ResponseTask, Utterances
from thresher.tasks.retrieval import agreement
from thresher.tasks.text import TextTask, canonical

Scores = dict[str, float]
RANKING = ("R@1", "MAP", "MRR", "P@1")


@dataclass(frozen=True)
class Work:
    """columns: the names of the columns it was fitted with, see `map_columns`. max_length: tokens of a row, None for what the
    model can read. Of itself the work of a model that only `bench` and `explain` take."""

    kind: ClassVar[str] = "other"
    metric: ClassVar[str] = "cosine"  # the name of what `quality` gives
    scored: ClassVar[bool] = False  # by labels

    columns: Mapping[str, str] = field(default_factory=dict)
    max_length: int | None = None

    def notes(self) -> dict[str, Any]:
        """`attachment.notes["task"]`."""
        return {
            "kind": self.kind,
            "label_names": None,
            "num_labels": None,
            "pair": False,
            "columns": dict(self.columns),
            "max_length": self.max_length,
            "metric": self.metric,
        }

    @staticmethod
    def from_notes(notes: Mapping[str, Any], *, file: str = "thresher.json", again: str = "fit") -> Work:
        """file, again: what an error calls the file of the notes, and what makes it."""
        from thresher.cli.kinds import KINDS

        try:
            made: Work = KINDS.get(notes["kind"], Work)._noted(notes)
            return made
        except (KeyError, TypeError, ValueError, OptionError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise CheckpointError(
                f"The task noted in {file} is not readable ({reason}); {again} the model again."
            ) from error

    @classmethod
    def _noted(cls, notes: Mapping[str, Any]) -> Self:
        return cls(dict(notes["columns"]), notes["max_length"])

    def named(self, rows: datasets.Dataset, columns: Mapping[str, str]) -> datasets.Dataset:
        """Rows with the columns the task reads: `columns` first, then those it was fitted with, where they are there."""
        if self.kind in NAMED:
            columns = {new: old for new, old in columns.items() if old in rows.column_names}
        return name_columns(rows, columns, self.columns)

    def read(
        self,
        data: str,
        columns: Mapping[str, str],
        *,
        limit: int | None = None,
        seed: int = 0,
        labelled: bool = True,
        skip_bad: bool = False,
    ) -> datasets.Dataset:
        """The rows of `data` to answer, see `read_rows`; `named` is still to come."""
        return read_rows(
            data,
            split="test",
            limit=limit,
            seed=seed,
            kind=self.kind,
            columns=columns,
            usual=self.columns,
            labelled=labelled,
            skip_bad=skip_bad,
        )

    def settled(self, rows: datasets.Dataset, columns: Mapping[str, str]) -> Work:
        """The same with what the first rows decide."""
        return self

    def in_windows(self, stride: int) -> Work:
        """The same, reading long texts in windows."""
        raise OptionError(
            f"--windows is for classification and regression of single texts and for tagging; this is {self.kind}."
        )

    def with_no_answer(self, threshold: float) -> Work:
        """The same, giving no answer where that scores so much above the best one."""
        raise OptionError(f"--no-answer is for questions about passages; this is {self.kind}.")

    def remark(self, predictions: np.ndarray, truth: Truth | None) -> str | None:
        """What a user should know of answers beside their scores."""
        return None

    def unlabelled(self, rows: datasets.Dataset) -> datasets.Dataset:
        """Rows whose labels, if any, are left unread."""
        rows = canonical(rows)
        return rows.remove_columns([name for name in rows.column_names if name not in ("text", "text_pair")])

    def shown(self, rows: datasets.Dataset) -> list[str]:
        """What each answer to unlabelled `rows` is about."""
        return [" | ".join(map(str, row.values())) for row in rows]

    def texts(self, rows: datasets.Dataset, tokenizer: Any, limit: int) -> Sequence[tuple[str, ...] | Reading]:
        """Of each answer to unlabelled `rows` the text or the pair, or how it is read, for a token map."""
        return [tuple(row.values()) for row in rows]

    def encode(
        self,
        rows: datasets.Dataset,
        tokenizer: Any,
        limit: int,
        *,
        labels: bool,
        training: bool = False,
        quiet: bool = False,
    ) -> EncodedRows:
        """Token ids and, where `labels` (then required) or there are any, labels; says what was cut or empty unless `quiet`."""
        encoded = self._encode(rows, tokenizer, limit, labels, training)
        if not quiet and (remark := encoded.notice()) is not None:
            notice(remark)
        return encoded

    def _encode(self, rows: datasets.Dataset, tokenizer: Any, limit: int, labels: bool, training: bool) -> EncodedRows:
        given = canonical(rows)
        pair = "text_pair" in given.column_names
        return encode_texts(given, ["text", "text_pair"] if pair else ["text"], tokenizer, limit)

    def fitting(self, config: PolicyConfig, tokenizer: Any, model: Any) -> PolicyConfig:
        """A method's settings with what this task gives them where they leave it open."""
        return config

    def quality(self, truth: Truth | None, reference: np.ndarray) -> Callable[[np.ndarray], float] | None:
        """What a target is about: the metric on labels, likeness to the `reference` embeddings, or None (agreement)."""
        return lambda predictions: agreement(predictions, reference)["cosine"]

    def metrics(self, predictions: np.ndarray, truth: Truth | None, reference: np.ndarray) -> Scores:
        """The task's metrics where there are labels, and how alike the answers are to `reference`, the undropped model's."""
        return self.scores(predictions, truth) | self.alike(predictions, reference)

    def scores(self, predictions: np.ndarray, truth: Truth | None) -> Scores:
        """The task's metrics; none without labels, and none of embeddings."""
        return {}

    def alike(self, predictions: np.ndarray, reference: np.ndarray) -> Scores:
        """How alike two sets of answers to the same rows are: agreement, or pearson, or cosine."""
        return {"cosine": agreement(predictions, reference)["cosine"]}

    def answers(self, predictions: np.ndarray, encoded: EncodedRows) -> list[dict[str, Any]]:
        """Each answer to `encoded` rows as plain values, by name."""
        return [{"embedding": row.tolist()} for row in predictions]


@dataclass(frozen=True)
class EmbeddingWork(Work):
    kind: ClassVar[str] = "embedding"

    def _encode(self, rows: datasets.Dataset, tokenizer: Any, limit: int, labels: bool, training: bool) -> EncodedRows:
        return encode_texts(canonical(rows), ["text"], tokenizer, limit)


@dataclass(frozen=True, kw_only=True)
class TextWork(Work):
    """any_pair: of a plain checkpoint, whose rows decide whether it reads pairs."""

    scored: ClassVar[bool] = True
    text: TextTask
    any_pair: bool = False

    @property
    def kind(self) -> str:  # type: ignore[override]
        return self.text.kind

    @property
    def metric(self) -> str:  # type: ignore[override]
        return self.text.metric

    def notes(self) -> dict[str, Any]:
        text = self.text
        return super().notes() | {
            "label_names": list(text.label_names) if text.label_names else None,
            "num_labels": text.num_labels,
            "pair": None if self.any_pair else text.pair,
            **({} if text.windows is None else {"windows": text.windows}),
        }

    @classmethod
    def _noted(cls, notes: Mapping[str, Any]) -> Self:
        names = tuple(notes["label_names"]) if notes["label_names"] else None
        text = TextTask(
            notes["kind"], notes["num_labels"], names, bool(notes["pair"]), notes["metric"], notes.get("windows")
        )
        return cls(dict(notes["columns"]), notes["max_length"], text=text, any_pair=notes["pair"] is None)

    def settled(self, rows: datasets.Dataset, columns: Mapping[str, str]) -> Work:
        if not self.any_pair:
            return self
        pair = "text_pair" in canonical(self.named(rows, columns)).column_names
        return replace(self, text=replace(self.text, pair=pair), columns=columns, any_pair=False)

    def in_windows(self, stride: int) -> Work:
        return replace(self, text=replace(self.text, windows=stride))

    def texts(self, rows: datasets.Dataset, tokenizer: Any, limit: int) -> Sequence[tuple[str, ...] | Reading]:
        if self.text.windows is None:
            return super().texts(rows, tokenizer, limit)
        return window_readings(rows["text"][:], tokenizer, limit, stride=self.text.windows)

    def _encode(self, rows: datasets.Dataset, tokenizer: Any, limit: int, labels: bool, training: bool) -> EncodedRows:
        given = canonical(rows)
        if not labels and "label" in given.column_names and not any(v is not None for v in given["label"][:]):
            given = given.remove_columns("label")
        pair = "text_pair" in given.column_names if self.any_pair else self.text.pair
        return replace(self.text, pair=pair).encode(given, tokenizer, limit, require_labels=labels)

    def quality(self, truth: Truth | None, reference: np.ndarray) -> Callable[[np.ndarray], float] | None:
        return None if truth is None else lambda predictions: self.text.score(truth.joined(predictions), truth.labels)

    def metrics(self, predictions: np.ndarray, truth: Truth | None, reference: np.ndarray) -> Scores:
        """Answers are alike for whole texts where there are labels, else for the windows that rows may be."""
        scores = self.scores(predictions, truth)
        if truth is not None:
            predictions, reference = truth.joined(predictions), truth.joined(reference)
        alike = self.alike(predictions, reference)
        return scores | alike if self.kind != "regression" else scores or {"pearson with stock": alike["pearson"]}

    def scores(self, predictions: np.ndarray, truth: Truth | None) -> Scores:
        return {} if truth is None else self.text.metrics(truth.joined(predictions), truth.labels)

    def alike(self, predictions: np.ndarray, reference: np.ndarray) -> Scores:
        if self.kind == "regression":
            return {"pearson": self.text.metrics(predictions, reference.reshape(-1))["pearson"]}
        return {"agreement": float((predictions.argmax(-1) == reference.argmax(-1)).mean())}

    def answers(self, predictions: np.ndarray, encoded: EncodedRows) -> list[dict[str, Any]]:
        if isinstance(encoded, EncodedLongTexts):
            predictions = encoded.averaged(predictions)
        if self.kind == "regression":
            return [{"value": float(value)} for value in predictions.reshape(-1)]
        import torch

        names, (best, numbers) = self.text.label_names, torch.tensor(predictions).softmax(-1).max(-1)
        return [
            {"label": names[number] if names else number, "probability": probability}
            for probability, number in zip(best.tolist(), numbers.tolist(), strict=True)
        ]


@dataclass(frozen=True, kw_only=True)
class ResponseWork(Work):
    """Response selection: rows are dialogues with candidates, and each candidate is answered with a probability."""

    kind: ClassVar[str] = "response"
    scored: ClassVar[bool] = True
    response: ResponseTask = field(default_factory=ResponseTask)
    measure: str = "R@1"

    def __post_init__(self) -> None:
        if self.measure not in RANKING:
            raise OptionError(f"There is no metric '{self.measure}' for responses{nearest(self.measure, RANKING)}")

    @property
    def metric(self) -> str:  # type: ignore[override]
        return self.measure

    def notes(self) -> dict[str, Any]:
        read = self.response.utterances
        task = {"eos": self.response.eos, "utterances": None if read is None else asdict(read)}
        return super().notes() | {"pair": True, "response": task}

    @classmethod
    def _noted(cls, notes: Mapping[str, Any]) -> Self:
        task = notes["response"]
        read = None if task["utterances"] is None else Utterances(**task["utterances"])
        response = ResponseTask(eos=task["eos"], utterances=read)
        return cls(dict(notes["columns"]), notes["max_length"], response=response, measure=notes["metric"])

    def unlabelled(self, rows: datasets.Dataset) -> datasets.Dataset:
        """Dialogues with their candidates; also of single pairs, whose text is a context with a line for each utterance."""
        if "text_pair" in rows.column_names:
            pairs = zip(rows["text"], rows["text_pair"], strict=True)
            made = [{"context": c.split("\n"), "candidates": [r], "labels": [0]} for c, r in pairs]
            return datasets.Dataset.from_list(made)
        return dialogues(rows, labelled=False)

    def shown(self, rows: datasets.Dataset) -> list[str]:
        return [f"{row['context'][-1]} | {candidate}" for row in rows for candidate in row["candidates"]]

    def texts(self, rows: datasets.Dataset, tokenizer: Any, limit: int) -> Sequence[tuple[str, ...] | Reading]:
        return list(replace(self.response, max_length=limit).texts(rows, tokenizer))

    def _encode(self, rows: datasets.Dataset, tokenizer: Any, limit: int, labels: bool, training: bool) -> EncodedRows:
        encoded = replace(self.response, max_length=limit).encode(rows, tokenizer, negatives=1 if training else None)
        return replace(encoded, rows=encoded.rows.remove_columns("group")) if training else encoded

    def fitting(self, config: PolicyConfig, tokenizer: Any, model: Any) -> PolicyConfig:
        """Special tokens stay, which close utterances too; where there are no types, the separator ends the context."""
        if not config.protect_ids:
            special = (
                tokenizer.cls_token_id,
                tokenizer.sep_token_id,
                tokenizer.convert_tokens_to_ids(self.response.eos),
            )
            config = config.replace(protect_ids=tuple(sorted({i for i in special if i is not None})))
        return with_segments(config, tokenizer, find_encoder(model))

    def quality(self, truth: Truth | None, reference: np.ndarray) -> Callable[[np.ndarray], float] | None:
        return None if truth is None else lambda predictions: self._ranked(predictions, truth)[self.measure]

    def scores(self, predictions: np.ndarray, truth: Truth | None) -> Scores:
        if truth is None or not any(truth.labels):
            return {}
        return {name: value for name, value in self._ranked(predictions, truth).items() if name != "R@1"}

    def _ranked(self, predictions: np.ndarray, truth: Truth) -> Scores:
        found = ranking_metrics(predictions, truth.labels, truth.groups or [0] * len(truth.labels))
        return found | {"R@1": next(value for name, value in found.items() if name.endswith("@1"))}

    def alike(self, predictions: np.ndarray, reference: np.ndarray) -> Scores:
        return {"agreement": float(((predictions > 0) == (reference > 0)).mean())}

    def answers(self, predictions: np.ndarray, encoded: EncodedRows) -> list[dict[str, Any]]:
        return [{"probability": float(p)} for p in 1.0 / (1.0 + np.exp(-predictions.reshape(-1).astype(np.float64)))]
