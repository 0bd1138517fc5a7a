"""Longer passages out of short ones: a paragraph among its neighbours in the article."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import datasets
from transformers import PreTrainedTokenizerBase

from thresher.errors import DataError
from thresher.tasks.framing import by_itself
from thresher.tasks.passages import Frame
from thresher.tasks.question_files import NOWHERE

BETWEEN = "\n"  # paragraphs
_BATCH = 1000  # texts tokenised at a time


def long_contexts(
    rows: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int = 512,
    seed: int = 0,
    among: datasets.Dataset | None = None,
) -> datasets.Dataset:
    """The same questions, each about its paragraph with as many neighbours as fit.

    Neighbours are whole paragraphs of the article, next to it on either side, in their order; which side grows is drawn, so
    that the answer may stand anywhere. A draw depends on the seed and the question's id alone. Where nothing fits, the
    paragraph stays by itself.

    Args:
        rows: the columns id, title, context, question and, where they are there, answers and evidence, as `questions` takes
            them. A title is that of the article.
        tokenizer: of the model that will read them, a fast one.
        max_length: the most tokens of question and passage together, special tokens included.
        among: rows whose paragraphs are the articles, in order; None: `rows` themselves.

    Returns:
        The same columns, the context longer; answers and evidence moved with their paragraph.

    Raises:
        DataError: a column is missing, or a paragraph of `rows` is not `among` those of its article.
        OptionError: see `QuestionTask.encode`.
    """
    among = rows if among is None else among
    for needed, given in (({"id", "title", "context", "question"}, rows), ({"title", "context"}, among)):
        if missing := sorted(needed - set(given.column_names)):
            raise DataError(f"Paragraphs find their neighbours by article, but the rows have no {', '.join(missing)}.")
    frame = Frame.of(tokenizer, max_length)
    articles = _articles(among)
    sizes = _sizes(tokenizer, [text for paragraphs in articles.values() for text in paragraphs])
    asked = _sizes(tokenizer, rows["question"])
    one, two = _ids(tokenizer, ["a", f"a{BETWEEN}a"])
    between = max(len(two) - 2 * len(one), 0)

    def longer(row: Mapping[str, Any]) -> dict[str, Any]:
        paragraphs = articles.get(row["title"], [])
        if row["context"] not in paragraphs:
            raise DataError(
                f"The passage of the question '{row['id']}' is no paragraph of the article '{row['title']}'."
            )
        room = frame.room - min(asked[row["question"]], frame.longest)
        draw = random.Random(f"{seed} {row['id']}")
        own = paragraphs.index(row["context"])
        first, last = _window(own, [sizes[text] for text in paragraphs], room, between, draw)
        before = sum(len(text) + len(BETWEEN) for text in paragraphs[first:own])
        return {"context": BETWEEN.join(paragraphs[first : last + 1]), **_moved(row, before)}

    made = [{**row, **longer(row)} for row in rows]
    return datasets.Dataset.from_list(made, features=rows.features)


def _articles(rows: datasets.Dataset) -> dict[str, list[str]]:
    """Of every title its paragraphs, each once, in the order in which they first stand."""
    found: dict[str, dict[str, None]] = {}
    for title, context in zip(rows["title"], rows["context"], strict=True):
        found.setdefault(title, {})[context] = None
    return {title: list(paragraphs) for title, paragraphs in found.items()}


def _sizes(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> dict[str, int]:
    """How many tokens each text has."""
    wanted = list(dict.fromkeys(texts))
    return {text: len(ids) for part in _parts(wanted) for text, ids in zip(part, _ids(tokenizer, part), strict=True)}


def _parts(texts: list[str]) -> Iterator[list[str]]:
    for start in range(0, len(texts), _BATCH):
        yield texts[start : start + _BATCH]


def _ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    return by_itself(tokenizer, texts)["input_ids"]  # type: ignore[no-any-return]


def _window(own: int, sizes: Sequence[int], room: int, between: int, draw: random.Random) -> tuple[int, int]:
    """The first and last of the neighbouring paragraphs around `own` that have room. between: tokens of what joins two."""
    first = last = own
    left = room - sizes[own]
    lean = (
        draw.random()
    )  # how likely the front is to grow: drawn once, or the paragraph would mostly stand in the middle
    while True:
        front = first > 0 and sizes[first - 1] + between <= left
        back = last + 1 < len(sizes) and sizes[last + 1] + between <= left
        if not front and not back:
            return first, last
        if front and (not back or draw.random() < lean):
            first -= 1
            left -= sizes[first] + between
        else:
            last += 1
            left -= sizes[last] + between


def _moved(row: Mapping[str, Any], by: int) -> dict[str, Any]:
    """The places in a row's context, so many characters further on."""
    found: dict[str, Any] = {}
    if (answers := row.get("answers")) is not None:
        starts = [start if start == NOWHERE else start + by for start in answers["answer_start"]]
        found["answers"] = {**answers, "answer_start": starts}
    if (evidence := row.get("evidence")) is not None:
        found["evidence"] = [[start + by, end + by] for start, end in evidence]
    return found
