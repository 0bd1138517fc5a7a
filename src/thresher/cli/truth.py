"""What answers are judged by: labels, and whose they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from thresher.tasks.answering import EncodedQuestions
from thresher.tasks.features import EncodedRows
from thresher.tasks.long_texts import EncodedLongTexts
from thresher.tasks.tagging import EncodedLongTags, EncodedTags


@dataclass(frozen=True)
class Truth:
    """What answers are judged by. groups: the dialogue that each row belongs to, where rows are candidates. questions: what
    the rows are windows of, where they are; labels are then the texts that are right for each question. tags: the words that
    rows hold, where labels are the tags of these. texts: those that rows are windows of, where labels are theirs."""

    labels: Sequence[Any]
    groups: Sequence[int] | None = None
    questions: EncodedQuestions | None = None
    tags: EncodedTags | None = None
    texts: EncodedLongTexts | None = None

    @classmethod
    def of(cls, encoded: EncodedRows) -> Truth | None:
        """That of encoded rows; None where they have no labels."""
        if isinstance(encoded, EncodedQuestions):
            return None if encoded.accepted is None else cls(encoded.accepted, questions=encoded)
        if isinstance(encoded, EncodedTags):
            return None if encoded.tags is None else cls(encoded.tags, tags=encoded)
        if isinstance(encoded, EncodedLongTexts):
            return None if encoded.labels is None else cls(encoded.labels, texts=encoded)
        rows = encoded.rows
        if "labels" not in rows.column_names:
            return None
        return cls(list(rows["labels"]), list(rows["group"]) if "group" in rows.column_names else None)

    @property
    def owners(self) -> Sequence[int] | None:
        """Of every row what it is a window of, by number; None where rows are no windows."""
        if self.texts is not None:
            return self.texts.owners
        return self.tags.owners if isinstance(self.tags, EncodedLongTags) else None

    def select(self, index: Sequence[int] | np.ndarray) -> Truth:
        """That of the rows of these numbers; of windows all those of some texts or rows of words, one after the other."""
        if self.texts is not None:
            texts = self.texts.select(index)
            assert texts.labels is not None
            return replace(self, labels=texts.labels, texts=texts)
        if self.tags is not None:
            tags = self.tags.select(index)
            assert tags.tags is not None
            return replace(self, labels=tags.tags, tags=tags)
        groups = None if self.groups is None else [self.groups[i] for i in index]
        return replace(self, labels=[self.labels[i] for i in index], groups=groups)

    def joined(self, predictions: np.ndarray) -> np.ndarray:
        """An answer for each label, also where rows are windows of texts."""
        return predictions if self.texts is None else self.texts.averaged(predictions)
