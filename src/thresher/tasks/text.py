"""Classification and regression of one text or of a pair."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import datasets
import numpy as np
from numpy.typing import ArrayLike
from transformers import PreTrainedTokenizerBase

from thresher.errors import DataError, OptionError, nearest
from thresher.tasks import labels as label_values
from thresher.tasks import scores
from thresher.tasks.data import map_columns
from thresher.tasks.features import EncodedRows, encode_texts
from thresher.tasks.given import as_rows
from thresher.tasks.long_texts import STRIDE, encode_windows

__all__ = ["EncodedRows", "Kind", "TextTask", "canonical"]

Kind = Literal["classification", "regression"]

PAIR_ALIASES = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("query", "passage"),
)
TEXT_ALIASES = ("sentence", "review", "content")
LABEL_ALIASES = ("labels", "target", "score", "stars")


def canonical(rows: datasets.Dataset) -> datasets.Dataset:
    """Rows with the columns `text`, `text_pair` for a pair, and `label` if there are labels.

    Columns of these names are taken as they are; otherwise the first common alias is (a pair before a single text). To
    use other columns, rename them first with `thresher.tasks.data.map_columns`.

    Raises:
        DataError: no column is known to be the text.
    """
    rows = as_rows(rows)
    there = rows.column_names
    mapping: dict[str, str] = {}
    if "text" not in there:
        pair = next((names for names in PAIR_ALIASES if set(names) <= set(there)), None)
        single = next((name for name in TEXT_ALIASES if name in there), None)
        if pair is not None:
            mapping["text"], mapping["text_pair"] = pair
        elif single is not None:
            mapping["text"] = single
        else:
            raise DataError(
                f"The rows have no column known to be the text (there are {', '.join(there)}): map one to 'text'."
            )
    label = next((name for name in LABEL_ALIASES if name in there), None)
    if "label" not in there and label is not None:
        mapping["label"] = label
    return map_columns(rows, mapping).with_format(None)


@dataclass(frozen=True)
class TextTask:
    """A task that gives one text, or a pair, a class or a value.

    Attributes:
        kind: "classification" or "regression".
        num_labels: the number of classes; 1 for regression.
        label_names: the names of the classes in the order of their numbers, if they have names.
        pair: whether a row has two texts.
        metric: the metric `score` gives; by default accuracy for classification and spearman for regression.
        windows: None cuts long texts. A number reads them whole, in windows that share this many tokens with the next
            (True: 64): `encode` then gives `EncodedLongTexts`, a row a window. Of single texts only.

    Raises:
        OptionError: an unknown kind or metric, numbers of labels that contradict each other, or windows of pairs.
    """

    kind: Kind
    num_labels: int
    label_names: tuple[str, ...] | None = None
    pair: bool = False
    metric: str = ""
    windows: int | None = None

    def __post_init__(self) -> None:
        if self.windows is True:
            object.__setattr__(self, "windows", STRIDE)
        if self.pair and self.windows is not None:
            raise OptionError("Windows are of single texts; leave them out, and the longer text of a pair is cut.")
        if self.kind not in get_args(Kind):
            raise OptionError(f"There is no text task '{self.kind}'{nearest(str(self.kind), get_args(Kind))}")
        if not self.metric:
            object.__setattr__(self, "metric", scores.DEFAULTS[self.kind])
        known = scores.METRICS[self.kind]
        if self.metric not in known:
            raise OptionError(f"There is no metric '{self.metric}' for {self.kind}{nearest(self.metric, known)}")
        if self.num_labels < 1 or (self.kind == "regression") != (self.num_labels == 1):
            raise OptionError(
                f"Regression has 1 label and classification 2 or more, but {self.kind} got {self.num_labels}."
            )
        if self.label_names is not None and len(self.label_names) != self.num_labels:
            raise OptionError(f"{len(self.label_names)} label names do not fit {self.num_labels} labels.")

    @classmethod
    def infer(
        cls,
        rows: datasets.Dataset,
        *,
        kind: Kind | None = None,
        label_names: Sequence[str] | None = None,
        metric: str | None = None,
        windows: int | None = None,
    ) -> TextTask:
        """The task that the columns and labels of rows suggest.

        Integer and string labels make a classification (strings are sorted into `label_names`), numbers with a
        fraction a regression. Where nothing names the classes, there are as many as the largest label says. Every label
        is checked.

        Args:
            rows: rows with canonical columns, or common aliases of them (see `canonical`).
            kind: overrides the guess, for instance where the scores of a regression all happen to be whole.
            label_names: the classes in the order a model was trained with; labels may then be names, numbers or absent.
            metric: the metric `score` gives; None for the default.
            windows: as the attribute.

        Raises:
            DataError: no text or label column, or a label that is missing or does not fit, named by its row (from 1).
            OptionError: an unknown kind or metric.
        """
        if kind is not None and kind not in get_args(Kind):
            raise OptionError(f"There is no text task '{kind}'{nearest(str(kind), get_args(Kind))}")
        rows = canonical(rows)
        pair = "text_pair" in rows.column_names
        labels = rows["label"][:] if "label" in rows.column_names else None
        if kind is None and label_names is None and labels is not None and any(map(label_values.has_fraction, labels)):
            kind = "regression"
        if kind == "regression":
            if labels is not None:
                label_values.values(labels)
            return cls("regression", 1, None, pair, metric or "", windows)
        names = tuple(label_names) if label_names is not None else _class_names(rows)
        if labels is None and names is None:
            there = ", ".join(rows.column_names)
            raise DataError(f"The rows have no column known to be the label (there are {there}): map one to 'label'.")
        numbers = label_values.class_numbers(labels or (), names, len(names) if names else None)
        count = len(names) if names else max(1, *numbers) + 1
        return cls("classification", count, names, pair, metric or "", windows)

    def encode(
        self,
        rows: datasets.Dataset,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int | None = None,
        *,
        require_labels: bool = True,
    ) -> EncodedRows:
        """Token ids of the texts and, as `labels`, class numbers or values; not padded.

        Args:
            rows: rows with canonical columns, or common aliases of them.
            tokenizer: the model's own.
            max_length: the most tokens a row may have, special tokens included; None for what the tokenizer says the
                model reads, but at most 512. Of a pair, the longer text is cut first.
            require_labels: False leaves `labels` out where the rows have no label column.

        Raises:
            DataError: a column is missing, a value is not a text, or a label is missing or does not fit (row from 1).
            OptionError: `max_length` has no room for a token beside the special ones; or windows cannot be made, see
                `encode_windows`.
        """
        rows = canonical(rows)
        there = ", ".join(rows.column_names)
        if self.pair != ("text_pair" in rows.column_names):
            expected, found = ("two texts", "one") if self.pair else ("one text", "two")
            raise DataError(f"The task reads {expected} a row, but these rows have {found} (there are {there}).")
        labels: list[int] | list[float] | None = None
        if "label" in rows.column_names:
            given = rows["label"][:]
            if self.kind == "regression":
                labels = label_values.values(given)
            else:
                labels = label_values.class_numbers(given, self.label_names, self.num_labels)
        elif require_labels:
            raise DataError(f"The rows have no column known to be the label (there are {there}): map one to 'label'.")
        if self.windows is not None:
            return encode_windows(rows, tokenizer, max_length, labels, stride=self.windows)
        return encode_texts(rows, ["text", "text_pair"] if self.pair else ["text"], tokenizer, max_length, labels)

    def metrics(self, predictions: ArrayLike, labels: ArrayLike) -> dict[str, float]:
        """Every metric of the kind.

        Classification gives accuracy, f1 (of class 1 where there are two classes, else the mean over the classes that
        occur) and matthews; regression gives pearson, spearman and mse. A correlation that is not defined, because one
        side is constant, counts as 0.

        Args:
            predictions: logits [B, C] for classification; values [B, 1] or [B] for regression.
            labels: [B], class numbers or values.

        Raises:
            DataError: shapes that do not fit, or no rows.
        """
        predicted, true = np.asarray(predictions), np.asarray(labels)
        rows = true.size
        fitting = [(rows, self.num_labels)] if self.kind == "classification" else [(rows, 1), (rows,)]
        if not rows or true.ndim != 1 or predicted.shape not in fitting:
            shapes = f"predictions {predicted.shape} and labels {true.shape}"
            raise DataError(f"Shapes do not fit {self.kind} with {self.num_labels} labels, or are empty: {shapes}.")
        if self.kind == "classification":
            return scores.classification(predicted.argmax(axis=1), true, self.num_labels)
        return scores.regression(predicted.reshape(rows), true)

    def score(self, predictions: ArrayLike, labels: ArrayLike) -> float:
        """The chosen metric; higher is always better, so `mse` comes negated. Arguments and errors as in `metrics`."""
        value = self.metrics(predictions, labels)[self.metric]
        return -value if self.metric in scores.LOWER_IS_BETTER else value


def _class_names(rows: datasets.Dataset) -> tuple[str, ...] | None:
    """The declared names of the label column, or the string labels in it, sorted; None where it has numbers."""
    if "label" not in rows.column_names:
        return None
    declared = rows.features["label"]
    if isinstance(declared, datasets.ClassLabel):
        return tuple(declared.names)
    labels = rows["label"][:]
    found = sorted({label for label in labels if isinstance(label, str)})
    if len(found) == 1 and None not in labels:
        raise DataError(f"Every row has the label '{found[0]}': a classification needs two classes or more.")
    return tuple(found) or None
