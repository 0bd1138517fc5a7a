"""Token classification on the command line: rows are words, answers their tags and the entities that these make."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import datasets
import numpy as np

from thresher.cli.truth import Truth
from thresher.cli.work import Scores, Work
from thresher.errors import OptionError, nearest
from thresher.tasks.features import EncodedRows
from thresher.tasks.reading import Reading
from thresher.tasks.tagging import METRICS, EncodedTags, TaggingTask, canonical, entities


@dataclass(frozen=True, kw_only=True)
class TaggingWork(Work):
    """Tagging: rows are lists of words, and each word is answered with a tag."""

    kind: ClassVar[str] = "tagging"
    scored: ClassVar[bool] = True
    tagging: TaggingTask
    measure: str = "f1"

    def __post_init__(self) -> None:
        if self.measure not in METRICS:
            raise OptionError(f"There is no metric '{self.measure}' for tagging{nearest(self.measure, METRICS)}")

    @property
    def metric(self) -> str:  # type: ignore[override]
        return self.measure

    def notes(self) -> dict[str, Any]:
        tagging = self.tagging
        return super().notes() | {
            "label_names": list(tagging.names),
            "num_labels": len(tagging.names),
            **({} if tagging.windows is None else {"windows": tagging.windows}),
        }

    @classmethod
    def _noted(cls, notes: Mapping[str, Any]) -> Self:
        task = TaggingTask(tuple(notes["label_names"]), notes.get("windows"))
        return cls(dict(notes["columns"]), notes["max_length"], tagging=task, measure=notes["metric"])

    def in_windows(self, stride: int) -> Work:
        return replace(self, tagging=replace(self.tagging, windows=stride))

    def unlabelled(self, rows: datasets.Dataset) -> datasets.Dataset:
        """Words; also those of single texts, between white space."""
        if "text_pair" in rows.column_names and "text" in rows.column_names:
            raise OptionError("Tagging reads one text a row; leave --pair out.")
        if "text" in rows.column_names and "tokens" not in rows.column_names:
            return datasets.Dataset.from_dict({"tokens": [text.split() for text in rows["text"]]})
        return canonical(rows).select_columns(["tokens"])

    def shown(self, rows: datasets.Dataset) -> list[str]:
        return [" ".join(words) for words in rows["tokens"]]

    def texts(self, rows: datasets.Dataset, tokenizer: Any, limit: int) -> Sequence[tuple[str, ...] | Reading]:
        return self.tagging.readings(rows["tokens"][:], tokenizer, limit)

    def _encode(self, rows: datasets.Dataset, tokenizer: Any, limit: int, labels: bool, training: bool) -> EncodedRows:
        return self.tagging.encode(rows, tokenizer, limit, require_tags=labels, training=training)

    def quality(self, truth: Truth | None, reference: np.ndarray) -> Callable[[np.ndarray], float] | None:
        if truth is None or truth.tags is None:
            return None
        tags = truth.tags
        return lambda predictions: tags.metrics(predictions)[self.measure]

    def metrics(self, predictions: np.ndarray, truth: Truth | None, reference: np.ndarray) -> Scores:
        """Agreement is that of the words' tags where there are labels, else that of all tokens."""
        found = super().metrics(predictions, truth, reference)
        if truth is not None and truth.tags is not None:
            found["agreement"] = truth.tags.agreement(predictions, reference)
        return found

    def scores(self, predictions: np.ndarray, truth: Truth | None) -> Scores:
        """F1, precision and recall of all entities, and the F1 of each type that there is."""
        if truth is None or truth.tags is None:
            return {}
        types = truth.tags.report(predictions)
        return truth.tags.metrics(predictions) | {
            f"f1 of {kind}": values["f1"] for kind, values in types.items() if values["support"]
        }

    def alike(self, predictions: np.ndarray, reference: np.ndarray) -> Scores:
        real = ~np.isnan(reference).any(-1)
        return {"agreement": float((predictions[real].argmax(-1) == reference[real].argmax(-1)).mean())}

    def answers(self, predictions: np.ndarray, encoded: EncodedRows) -> list[dict[str, Any]]:
        """Of each row the entities, with their first word and the one after the last, and the tag of every word."""
        assert isinstance(encoded, EncodedTags)
        return [
            {
                "entities": [
                    {"type": kind, "text": " ".join(words[start:end]), "start": start, "end": end}
                    for kind, start, end in entities(tags)
                ],
                "tags": tags,
            }
            for words, tags in zip(encoded.words, encoded.predicted(predictions), strict=True)
        ]


def tags_to_learn(config: Any, rows: datasets.Dataset, *, new: bool) -> TaggingTask:
    """The tags of a head by its names; of a `new` one those of `rows`, which become its names.

    Raises OptionError for a head that gives other things.
    """
    task = TaggingTask.infer(rows) if new else tags_of_head(config)
    if task is None:
        raise OptionError(
            f"The checkpoint is a {config.architectures[0]}, whose head gives no BIO tags; give one whose head does, or an "
            "encoder without a head."
        )
    if new:
        config.id2label = dict(enumerate(task.names))
        config.label2id = {name: number for number, name in config.id2label.items()}
    return task


def tags_of_head(config: Any) -> TaggingTask | None:
    """The tags of a token-classification head by its names; None where these are no BIO tags, and for any other head."""
    if not (config.architectures or [""])[0].endswith("ForTokenClassification"):
        return None
    try:
        return TaggingTask(tuple(config.id2label[number] for number in range(config.num_labels)))
    except OptionError:
        return None
