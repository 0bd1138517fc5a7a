"""The rows that every way of running a model reads in `peers.py`, and how good its answers on them are.

A row is a dictionary of token id lists (`input_ids`, `token_type_ids` where the model has them), not padded. Without the data
lengths are drawn from a log-normal distribution, cut to the most tokens a row may have:

    imdb   median 245 tokens, sigma .71, at most 256    (one text)
    squad  median 160 tokens, sigma .39, at most 384    (question, context)
    wikiqa median  36 tokens, sigma .36, at most 128    (query, candidate)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Row = dict[str, list[int]]
Answers = list[NDArray[np.float32]]

LONGEST_ANSWER = 30  # tokens


@dataclass(frozen=True)
class Load:
    """Where the rows come from, and how long they are without the data. truncate: what gives way in a pair."""

    split: str
    max_tokens: int
    median: float
    sigma: float
    pair: bool
    head: str
    labels: int = 2
    truncate: str | bool = True


LOADS = {
    "imdb": Load("test", 256, 245, 0.71, False, "sequence"),
    "squad": Load("validation", 384, 160, 0.39, True, "question-answering", truncate="only_second"),
    "wikiqa": Load("test", 128, 36, 0.36, True, "sequence", labels=1),
}


@dataclass
class Examples:
    """labels: one a row, None without the data; groups: rows of one query share a number."""

    rows: list[Row]
    labels: list[Any] | None = None
    groups: list[int] = field(default_factory=list)

    def first(self, count: int) -> Examples:
        """That many rows, and those that complete the last query."""
        while self.groups and 0 < count < len(self.rows) and self.groups[count] == self.groups[count - 1]:
            count += 1
        labels = None if self.labels is None else self.labels[:count]
        return Examples(self.rows[:count], labels, self.groups[:count])


@dataclass
class Rows:
    """test: what is timed and judged; calibration: other rows, of the train split, for runtimes that want examples."""

    test: Examples
    calibration: list[Row]


def real(name: str, data_dir: Path, tokenizer: Any, *, test: int, calibration: int, max_tokens: int) -> Rows:
    """The rows of a data set, in an order drawn once. WikiQA comes in whole queries that have an answer."""
    from thresher.tasks.data import load_rows

    load = LOADS[name]

    def read(split: str, count: int) -> Examples:
        rows = load_rows(data_dir / name, split=split).shuffle(seed=0)
        out = Examples([], [])
        for number, row in enumerate(rows):
            if len(out.rows) >= count:
                break
            for texts, label in _texts(name, row):
                encoded = tokenizer(
                    *texts, truncation=load.truncate, max_length=max_tokens, return_offsets_mapping=name == "squad"
                )
                out.rows.append({k: list(encoded[k]) for k in ("input_ids", "token_type_ids") if k in encoded})
                out.labels.append(_spans(encoded, label) if name == "squad" else label)
                out.groups.append(number)
        return out.first(count)

    return Rows(read(load.split, test), read("train", calibration).rows)


def drawn(name: str, tokenizer: Any, *, test: int, calibration: int, max_tokens: int) -> Rows:
    """Random token ids whose lengths have the load's distribution."""
    load, rng = LOADS[name], np.random.default_rng(0)
    low = min(1000, len(tokenizer) // 2)

    def row() -> Row:
        tokens = int(np.clip(round(math.exp(rng.normal(math.log(load.median), load.sigma))), 8, max_tokens))
        first = max(tokens // 10, 2) if load.pair else tokens - 2
        ids = rng.integers(low, len(tokenizer), tokens - 2 - load.pair).tolist()
        parts = (ids[:first], ids[first:]) if load.pair else (ids,)
        return _framed(tokenizer, *parts)

    return Rows(Examples([row() for _ in range(test)]), [row() for _ in range(calibration)])


def of_length(rows: Sequence[Row], tokens: int, count: int) -> list[Row]:
    """Rows of exactly `tokens` tokens made from real ones: the last text goes on with those of the rows that follow."""
    out = []
    for i in range(count):
        row = {name: list(values) for name, values in rows[i % len(rows)].items()}
        end, types = row["input_ids"].pop(), row.get("token_type_ids")
        for j in range(1, tokens):
            if len(row["input_ids"]) >= tokens - 1:
                break
            row["input_ids"] += _last_text(rows[(i + j) % len(rows)])
        row["input_ids"] = [*row["input_ids"][: tokens - 1], end]
        if types:
            row["token_type_ids"] = (types + [types[-1]] * tokens)[:tokens]
        out.append(row)
    return [row for row in out if len(row["input_ids"]) == tokens]


def pad(rows: Sequence[Row], pad_id: int) -> dict[str, NDArray[np.int64]]:
    """The rows side by side as [B, N] arrays, with their attention mask."""
    width = max(len(row["input_ids"]) for row in rows)
    out = {}
    for name in rows[0]:
        out[name] = np.full((len(rows), width), pad_id if name == "input_ids" else 0, dtype=np.int64)
    out["attention_mask"] = np.zeros((len(rows), width), dtype=np.int64)
    for i, row in enumerate(rows):
        for name, values in row.items():
            out[name][i, : len(values)] = values
        out["attention_mask"][i, : len(row["input_ids"])] = 1
    return out


@dataclass(frozen=True)
class Quality:
    """measure: its name; value: 0 to 1; agreement and largest: with the stock model's answers, on the same rows."""

    measure: str
    value: float | None
    agreement: float
    largest: float

    def __str__(self) -> str:
        agreement = f"agrees {self.agreement:.3f}"
        return agreement if self.value is None else f"{self.measure} {self.value:.3f}, {agreement}"


def judge(name: str, answers: Answers, stock: Answers, examples: Examples, *, tuned: bool) -> Quality:
    """How good answers are (only of a fine-tuned model with labels), and how far from the stock model's.

    Agreement is the share of rows whose largest answer (start and end, for question answering) is in the same place; of
    queries with the same first candidate for a model with one score; of equal signs where there are no queries.
    """
    largest = max(float(np.abs(a - s).max()) for a, s in zip(answers, stock, strict=True))
    measure, value = "", None
    if name == "wikiqa" and answers[0].size == 2:  # of a head with two classes: how much more right than wrong
        answers, stock = ([a[1:] - a[:1] for a in said] for said in (answers, stock))
    if answers[0].size == 1 and examples.groups:
        by_query: dict[int, list[int]] = {}
        for i, group in enumerate(examples.groups):
            by_query.setdefault(group, []).append(i)
        agreement = float(
            np.mean([_best(answers, rows) == _best(stock, rows) for rows in by_query.values() if len(rows) > 1] or [1])
        )
    elif answers[0].size == 1:
        agreement = float(np.mean([(a > 0) == (s > 0) for a, s in zip(answers, stock, strict=True)]))
    else:
        agreement = float(np.mean([(a.argmax(0) == s.argmax(0)).all() for a, s in zip(answers, stock, strict=True)]))
    if tuned and examples.labels is not None:
        if name == "imdb" and answers[0].size == 2:
            measure = "accuracy"
            value = float(np.mean([a.argmax() == y for a, y in zip(answers, examples.labels, strict=True)]))
        elif name == "wikiqa" and answers[0].size == 1:
            measure, value = "MRR", float(np.mean([_reciprocal(answers, examples, q) for q in by_query.values()]))
        elif name == "squad" and answers[0].ndim == 2:
            measure = "token F1"
            value = float(np.mean([_token_f1(a, y) for a, y in zip(answers, examples.labels, strict=True)]))
    return Quality(measure, value, agreement, largest)


def _texts(name: str, row: dict[str, Any]) -> list[tuple[tuple[str, ...], Any]]:
    if name == "imdb":
        return [((row["text"],), row["label"])]
    if name == "squad":
        starts, texts = row["answers"]["answer_start"], row["answers"]["text"]
        spans = [(start, start + len(text)) for start, text in zip(starts, texts, strict=True)]
        return [((row["question"], row["context"]), spans)]
    if not any(row["labels"]):
        return []
    pairs = zip(row["candidates"], row["labels"], strict=True)
    return [((row["query"], candidate), label) for candidate, label in pairs]


def _spans(encoded: Any, answers: list[tuple[int, int]]) -> dict[str, Any]:
    """Answers as sets of token numbers, and the tokens that an answer may hold: those of the context."""
    offsets = encoded["offset_mapping"]
    context = [i for i, part in enumerate(encoded.sequence_ids()) if part == 1]
    return {
        "context": (context[0], context[-1]),
        "answers": [{i for i in context if offsets[i][0] < e and offsets[i][1] > s} for s, e in answers],
    }


def _token_f1(logits: NDArray[np.float32], label: dict[str, Any]) -> float:
    low, high = label["context"]
    starts, ends = logits[low : high + 1, 0], logits[low : high + 1, 1]
    total = np.triu(np.ones((len(starts), len(ends)), dtype=bool))
    total &= ~np.triu(np.ones_like(total), k=LONGEST_ANSWER)
    best = int(np.where(total, starts[:, None] + ends[None, :], -np.inf).argmax())
    said = set(range(low + best // len(ends), low + best % len(ends) + 1))
    return max((2 * len(said & gold) / (len(said) + len(gold)) for gold in label["answers"] if gold), default=0.0)


def _best(answers: Answers, rows: list[int]) -> int:
    return max(rows, key=lambda i: float(answers[i].item()))


def _reciprocal(answers: Answers, examples: Examples, rows: list[int]) -> float:
    order = sorted(rows, key=lambda i: -float(answers[i].item()))
    return next((1 / rank for rank, i in enumerate(order, 1) if examples.labels[i]), 0.0)


def _framed(tokenizer: Any, *parts: list[int]) -> Row:
    """Token ids with the special tokens around them."""
    first, last = tokenizer.cls_token_id, tokenizer.sep_token_id
    row: Row = {"input_ids": [first], "token_type_ids": [0]}
    for segment, part in enumerate(parts):
        row["input_ids"] += [*part, last]
        row["token_type_ids"] += [segment] * (len(part) + 1)
    if "token_type_ids" not in tokenizer.model_input_names:
        del row["token_type_ids"]
    return row


def _last_text(row: Row) -> list[int]:
    ids, types = row["input_ids"], row.get("token_type_ids")
    start = types.index(types[-1]) if types and types[-1] else 1
    return ids[start:-1]
