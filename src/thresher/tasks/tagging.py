"""Token classification: words with BIO tags, the subwords a model reads of them, and entities as seqeval counts them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import datasets
import numpy as np
from numpy.typing import NDArray
from seqeval.metrics import classification_report
from seqeval.metrics.sequence_labeling import get_entities
from transformers import PreTrainedTokenizerBase

from thresher.errors import DataError, OptionError, nearest
from thresher.targets import IGNORED
from thresher.tasks.features import EncodedRows, length_limit
from thresher.tasks.tag_rows import BIO, OUTSIDE, canonical, declared_tags, has_tags, repaired, tags_of, words_of

METRICS = ("f1", "precision", "recall")

_BATCH = 1000  # rows tokenised at a time
_KEPT = ("input_ids", "attention_mask", "token_type_ids")
_NUMBERS = datasets.Sequence(datasets.Value("int64"))


@dataclass(frozen=True, kw_only=True)
class EncodedTags(EncodedRows):
    """Rows of words as token ids; `labels`, where there are tags, holds a tag's number on a word's first token and -100 on
    every other.

    Attributes:
        names: the tags, in the order of a model's outputs.
        words: of every row.
        firsts: of every word the place of its first token; -1 where it was cut off, or the tokenizer gives it no token.
        tags: of every word, in IOB2; None without tags.
        lost: how many words were cut off.
        silent: how many words the tokenizer gives no token for (a zero-width space by itself, for instance).
        begun: how many entities began with I- (see `repaired`).
        left_out: how many rows are not among these, as they have no word to learn from.
    """

    names: tuple[str, ...]
    words: list[list[str]]
    firsts: list[list[int]]
    tags: list[list[str]] | None = None
    lost: int = 0
    silent: int = 0
    begun: int = 0
    left_out: int = 0

    def notice(self) -> str | None:
        parts = []
        if self.truncated:
            rows = f"{self.truncated} of {len(self.rows)} rows {_were(self.truncated)}"
            cut = f"with {_count(self.lost, 'word')} cut off, which {_get(self.lost)} the tag O"
            end = cut if self.lost else "in the middle of the last word"
            parts.append(f"{rows} longer than {self.max_length} tokens, {end}")
        if self.silent:
            parts.append(f"{_count(self.silent, 'word')} without a token {_get(self.silent)} the tag O")
        if self.begun:
            begins = "entity begins" if self.begun == 1 else "entities begin"
            parts.append(f"{self.begun} {begins} with I-, which is read as B-")
        if self.empty:
            parts.append("1 row is empty" if self.empty == 1 else f"{self.empty} rows are empty")
        if self.left_out:
            parts.append(f"{_count(self.left_out, 'row')} without a word to learn from {_were(self.left_out)} left out")
        return "; ".join(parts) or None

    def select(self, index: Sequence[int] | NDArray[Any]) -> EncodedTags:
        """The rows of these numbers, some more than once where they are; the counts stay those of all."""
        numbers = [int(number) for number in index]
        words, firsts = [self.words[number] for number in numbers], [self.firsts[number] for number in numbers]
        tags = None if self.tags is None else [self.tags[number] for number in numbers]
        return replace(self, rows=self.rows.select(numbers), words=words, firsts=firsts, tags=tags)

    def predicted(self, predictions: NDArray[Any]) -> list[list[str]]:
        """A tag for every word of every row; O for words that were not read.

        Args:
            predictions: [rows, N, tags] logits, as `measure.run.run` gives them.

        Raises:
            DataError: the shape does not fit these rows.
        """
        rows, classes = len(self.firsts), len(self.names)
        if predictions.ndim != 3 or (len(predictions), predictions.shape[2]) != (rows, classes):
            raise DataError(f"Predictions {predictions.shape} do not fit {rows} rows and {classes} tags.")
        made = []
        last = max((place for firsts in self.firsts for place in firsts), default=-1)
        if last >= predictions.shape[1] or np.isnan(predictions).all():
            what = "are no numbers" if last < predictions.shape[1] else f"end before token {last}, which begins a word"
            raise DataError(f"Predictions {predictions.shape} {what}.")
        for logits, firsts in zip(predictions, self.firsts, strict=True):
            places = np.array(firsts, dtype=np.int64)
            best = logits[places].argmax(-1) if len(places) else places
            made.append(
                [self.names[tag] if place >= 0 else OUTSIDE for place, tag in zip(firsts, best.tolist(), strict=True)]
            )
        return made

    def metrics(self, predictions: NDArray[Any]) -> dict[str, float]:
        """F1, precision and recall of all entities together (0 to 1, 0 where nothing is there to count).

        An entity is right where its type and both its ends are; one in words that were not read is missed.

        Raises:
            DataError: the rows have no tags, or the shape does not fit.
        """
        return _scores(self._counted(predictions).get("micro avg", {}))

    def report(self, predictions: NDArray[Any]) -> dict[str, dict[str, float]]:
        """The same of each type by itself, with `support`, its number of true entities. Arguments and errors as there."""
        found = self._counted(predictions)
        return {
            kind: _scores(values) | {"support": float(values["support"])}
            for kind, values in found.items()
            if not kind.endswith(" avg")
        }

    def _counted(self, predictions: NDArray[Any]) -> dict[str, Any]:
        if self.tags is None:
            raise DataError("These rows come without tags, so there is nothing to judge by.")
        predicted = self.predicted(predictions)
        if all(tag == OUTSIDE for rows in (self.tags, predicted) for row in rows for tag in row):
            return {}
        found: dict[str, Any] = classification_report(self.tags, predicted, output_dict=True, zero_division=0)
        return found

    def agreement(self, predictions: NDArray[Any], reference: NDArray[Any]) -> float:
        """The share of words with the same tag in both, of [rows, N, tags] logits each; 1 where there are no words."""
        pairs = zip(self.predicted(predictions), self.predicted(reference), strict=True)
        same = [one == other for ours, theirs in pairs for one, other in zip(ours, theirs, strict=True)]
        return float(np.mean(same)) if same else 1.0


def entities(tags: Sequence[str]) -> list[tuple[str, int, int]]:
    """The type, the first word and the word after the last of each entity."""
    return [(kind, first, last + 1) for kind, first, last in get_entities(list(tags))]


@dataclass(frozen=True)
class TaggingTask:
    """A task that gives every word a BIO tag, by the logits of its first token.

    Attributes:
        names: the tags in the order of a model's outputs, O among them.

    Raises:
        OptionError: names that are not BIO, twice there, or without O or any type.
    """

    names: tuple[str, ...]

    def __post_init__(self) -> None:
        for name in self.names:
            if not BIO.fullmatch(name):
                raise OptionError(f"'{name}' is no BIO tag: these are O, and B- or I- with a type.")
        if OUTSIDE not in self.names or len(self.names) < 2 or len(set(self.names)) < len(self.names):
            raise OptionError(f"Tags are O and those of a type or more, each once, not {', '.join(self.names)}.")

    @classmethod
    def infer(cls, rows: datasets.Dataset) -> TaggingTask:
        """The task that the tags of rows suggest: their declared names (of a ClassLabel), else O and then B- and I- of every
        type, sorted.

        Raises:
            DataError: as in `encode`; or every tag is O.
        """
        rows = canonical(rows)
        tags = tags_of(rows, words_of(rows))
        if declared := declared_tags(rows):
            return cls(declared)
        types = sorted({tag[2:] for row in tags for tag in row if tag != OUTSIDE})
        if not types:
            raise DataError("Every tag is O: tagging needs entities to learn from.")
        return cls((OUTSIDE, *(f"{place}-{kind}" for kind in types for place in "BI")))

    def encode(
        self,
        rows: datasets.Dataset,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int | None = None,
        *,
        require_tags: bool = True,
        training: bool = False,
    ) -> EncodedTags:
        """Token ids of the words, and their tags on first tokens; not padded.

        A special token written out as a word is read as text. For tokenizers of bytes see `read_words_apart`.

        Args:
            rows: the columns tokens (a list of words) and tags (a list of as many BIO tags), or common aliases of them.
            tokenizer: the model's own, a fast one.
            max_length: the most tokens a row may have, special tokens included; None for what the tokenizer says the model
                reads, but at most 512. Words that do not fit are cut off, and counted.
            require_tags: False leaves tags out where there are none.
            training: leave out rows none of whose words has a token, which a loss has nothing to say about.

        Raises:
            DataError: there are no rows or a column is missing; or, named by its row (from 1), tokens are no texts, a tag is
                not BIO or of an unknown type, or there are not as many tags as tokens.
            OptionError: the tokenizer is slow, or `max_length` has no room for a token beside the special ones.
        """
        if not tokenizer.is_fast:
            raise OptionError(
                "Tags need a fast tokenizer (a tokenizer.json beside the model), which knows the words of its tokens; "
                f"{type(tokenizer).__name__} is none."
            )
        limit = length_limit(tokenizer, max_length)
        rows = canonical(rows)
        words = words_of(rows)
        given = tags_of(rows, words) if require_tags or has_tags(rows) else None
        tags = None if given is None else [repaired(row) for row in given]
        batch = _Batch(limit)
        for start in range(0, len(words), _BATCH):
            batch.add(tokenizer, words[start : start + _BATCH])
        if tags is not None:
            batch.label([self._numbers(row, number) for number, row in enumerate(tags, start=1)])
        kept = [i for i, row in enumerate(batch.firsts) if not training or any(place >= 0 for place in row)]
        if not kept:
            raise DataError("There is no row with a word to learn from.")
        made = batch.rows()
        return EncodedTags(
            rows=made if len(kept) == len(made) else made.select(kept),
            max_length=limit,
            truncated=batch.truncated,
            empty=sum(not words[i] for i in kept),
            names=self.names,
            words=[words[i] for i in kept],
            firsts=[batch.firsts[i] for i in kept],
            tags=None if tags is None else [tags[i] for i in kept],
            lost=batch.lost,
            silent=batch.silent,
            begun=sum(
                a != b for old, new in zip(given or (), tags or (), strict=True) for a, b in zip(old, new, strict=True)
            ),
            left_out=len(made) - len(kept),
        )

    def _numbers(self, tags: Sequence[str], row: int) -> list[int]:
        known = {name: number for number, name in enumerate(self.names)}
        for tag in tags:
            if tag not in known:
                raise DataError(f"Row {row} has the tag '{tag}', which the task does not know{nearest(tag, known)}")
        return [known[tag] for tag in tags]


def read_words_apart(tokenizer: PreTrainedTokenizerBase) -> None:
    """Let a tokenizer of bytes (RoBERTa's, ModernBERT's) read a word by itself as after a space, as its model learned words.

    For a head that is new; one that was trained reads words as it was trained. Saved with the tokenizer, except that of a
    class which sets this itself (RoBERTa's): load that with add_prefix_space=True.
    """
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    reader: Any = getattr(backend, "pre_tokenizer", None)
    if hasattr(reader, "add_prefix_space"):
        reader.add_prefix_space = True


class _Batch:
    """Rows on their way into token ids, counted.

    The first pass over a row is uncut: only that shows which words are nothing to the tokenizer, and which were cut off.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.columns: dict[str, list[list[int]]] = {}
        self.firsts: list[list[int]] = []
        self.truncated = self.lost = self.silent = 0

    def add(self, tokenizer: PreTrainedTokenizerBase, words: list[list[str]]) -> None:
        whole = _tokens(tokenizer, words)
        names = [name for name in _KEPT if name in whole]
        places = [_firsts(whole.word_ids(i), len(row)) for i, row in enumerate(words)]
        features = {name: list(whole[name]) for name in names}
        self.silent += sum(place < 0 for row in places for place in row)
        long = [i for i, ids in enumerate(features["input_ids"]) if len(ids) > self.limit]
        if long:
            cut = _tokens(tokenizer, [words[i] for i in long], truncation=True, max_length=self.limit)
            for number, i in enumerate(long):
                left = _firsts(cut.word_ids(number), len(words[i]))
                self.lost += sum(place >= 0 for place in places[i]) - sum(place >= 0 for place in left)
                places[i] = left
                for name in names:
                    features[name][i] = cut[name][number]
        self.truncated += len(long)
        self.firsts.extend(places)
        for name in names:
            self.columns.setdefault(name, []).extend(features[name])

    def label(self, numbers: list[list[int]]) -> None:
        """numbers: of every row the number of each word's tag."""
        made = []
        for ids, firsts, tags in zip(self.columns["input_ids"], self.firsts, numbers, strict=True):
            labels = [IGNORED] * len(ids)
            for place, tag in zip(firsts, tags, strict=True):
                if place >= 0:
                    labels[place] = tag
            made.append(labels)
        self.columns["labels"] = made

    def rows(self) -> datasets.Dataset:
        # Declared, because rows without words would not show their types.
        return datasets.Dataset.from_dict(
            self.columns, features=datasets.Features(dict.fromkeys(self.columns, _NUMBERS))
        )


def _tokens(tokenizer: PreTrainedTokenizerBase, words: list[list[str]], **options: Any) -> Any:
    return tokenizer(
        words,
        is_split_into_words=True,
        split_special_tokens=True,
        padding=False,
        return_attention_mask=True,
        verbose=False,
        **options,
    )


def _firsts(word_ids: Sequence[int | None], count: int) -> list[int]:
    """Of each of `count` words the place of its first token, -1 for one without."""
    places = [-1] * count
    for place, word in enumerate(word_ids):
        if word is not None and places[word] < 0:
            places[word] = place
    return places


def _scores(values: dict[str, Any]) -> dict[str, float]:
    names = {"f1": "f1-score", "precision": "precision", "recall": "recall"}
    return {name: float(values.get(theirs, 0.0)) for name, theirs in names.items()}


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _were(number: int) -> str:
    return "was" if number == 1 else "were"


def _get(number: int) -> str:
    return "gets" if number == 1 else "get"


__all__ = ["METRICS", "EncodedTags", "TaggingTask", "canonical", "entities", "read_words_apart", "repaired"]
