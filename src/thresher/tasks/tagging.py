"""Token classification: words with BIO tags, the subwords a model reads of them, and entities as seqeval counts them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import datasets
from transformers import PreTrainedTokenizerBase

from thresher.errors import DataError, OptionError, nearest
from thresher.settings import is_whole
from thresher.targets import IGNORED
from thresher.tasks.encoded_tags import EncodedLongTags, EncodedTags, entities
from thresher.tasks.features import length_limit
from thresher.tasks.long_texts import STRIDE
from thresher.tasks.reading import Reading
from thresher.tasks.tag_rows import BIO, OUTSIDE, canonical, declared_tags, has_tags, repaired, tags_of, words_of
from thresher.tasks.word_windows import WordWindows

METRICS = ("f1", "precision", "recall")

_BATCH = 1000  # rows tokenised at a time
_KEPT = ("input_ids", "attention_mask", "token_type_ids")
_NUMBERS = datasets.Sequence(datasets.Value("int64"))


@dataclass(frozen=True)
class TaggingTask:
    """A task that gives every word a BIO tag, by the logits of its first token.

    Attributes:
        names: the tags in the order of a model's outputs, O among them.
        windows: None cuts long rows. A number reads them whole, in windows of whole words that share at most this many tokens
            with the next (True: 64): `encode` then gives `EncodedLongTags`, a row a window.

    Raises:
        OptionError: names that are not BIO, twice there, or without O or any type; or windows that are no whole number.
    """

    names: tuple[str, ...]
    windows: int | None = None

    def __post_init__(self) -> None:
        if self.windows is True:
            object.__setattr__(self, "windows", STRIDE)
        if self.windows is not None and (not is_whole(self.windows) or self.windows < 0):
            raise OptionError(f"Windows share a whole number of tokens, 0 or more, not {self.windows!r}.")
        for name in self.names:
            if not isinstance(name, str) or not BIO.fullmatch(name):
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
            OptionError: the tokenizer is slow, `max_length` has no room for a token beside the special ones, or windows
                that share so many tokens would never get on.
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
        numbers = None if tags is None else [self._numbers(row, number) for number, row in enumerate(tags, start=1)]
        windows = None if self.windows is None else self._cut(words, tokenizer, limit)
        shown = words if windows is None else windows.parts(words)
        batch = _Batch(limit)
        for start in range(0, len(shown), _BATCH):
            batch.add(tokenizer, shown[start : start + _BATCH])
        if numbers is not None:
            batch.label(numbers if windows is None else windows.parts(numbers))
        firsts = batch.firsts if windows is None else windows.joined(batch.firsts)
        owners = list(range(len(words))) if windows is None else windows.owners
        kept = {row for row, places in enumerate(firsts) if not training or any(place >= 0 for place in places)}
        if not kept:
            raise DataError("There is no row with a word to learn from.")
        about: dict[str, Any] = {
            "rows": batch.rows(),
            "max_length": limit,
            "truncated": batch.truncated,
            "empty": sum(not words[row] for row in kept),
            "names": self.names,
            "words": words,
            "firsts": firsts,
            "tags": tags,
            "lost": batch.lost,
            "silent": batch.silent if windows is None else sum(not size for of in windows.sizes for size in of),
            "begun": 0 if given is None or tags is None else _differing(given, tags),
            "left_out": len(words) - len(kept),
        }
        encoded = (
            EncodedTags(**about) if windows is None else EncodedLongTags(**about, owners=owners, homes=windows.homes())
        )
        if len(kept) == len(words):
            return encoded
        return encoded.select([number for number, row in enumerate(owners) if row in kept])

    def readings(
        self, words: Sequence[Sequence[str]], tokenizer: PreTrainedTokenizerBase, max_length: int | None = None
    ) -> list[Reading]:
        """Every row that `encode` makes of `words`, with its text. Arguments and errors as there."""
        shown = words
        if self.windows is not None:
            shown = self._cut(words, tokenizer, length_limit(tokenizer, max_length)).parts(words)
        return [Reading.of_words(row, tokenizer, max_length) for row in shown]

    def _cut(self, words: Sequence[Sequence[str]], tokenizer: PreTrainedTokenizerBase, limit: int) -> WordWindows:
        assert self.windows is not None
        room = limit - tokenizer.num_special_tokens_to_add()
        if self.windows >= room:
            raise OptionError(
                f"A window of {limit} tokens has room for {room} of the words, so neighbouring ones share 0 to {room - 1} "
                f"of them, not {self.windows}."
            )
        sizes = []
        for start in range(0, len(words), _BATCH):
            batch = [list(row) for row in words[start : start + _BATCH]]
            found = _tokens(tokenizer, batch)
            sizes += [_sizes(found.word_ids(i), len(row)) for i, row in enumerate(batch)]
        return WordWindows.over(sizes, room, self.windows)

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


def _differing(one: Sequence[Sequence[str]], other: Sequence[Sequence[str]]) -> int:
    return sum(a != b for left, right in zip(one, other, strict=True) for a, b in zip(left, right, strict=True))


def _sizes(word_ids: Sequence[int | None], count: int) -> list[int]:
    """Of each of `count` words how many tokens it is."""
    found = Counter(word_ids)
    return [found[word] for word in range(count)]


def _firsts(word_ids: Sequence[int | None], count: int) -> list[int]:
    """Of each of `count` words the place of its first token, -1 for one without."""
    places = [-1] * count
    for place, word in enumerate(word_ids):
        if word is not None and places[word] < 0:
            places[word] = place
    return places


__all__ = [
    "METRICS",
    "EncodedLongTags",
    "EncodedTags",
    "TaggingTask",
    "canonical",
    "entities",
    "read_words_apart",
    "repaired",
]
