"""Questions about passages, answered by a span of them: SQuAD, MRQA, HotpotQA and rows of one's own in one form."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets

from thresher.errors import DataError, OptionError
from thresher.tasks.data import load_rows, local_file, name_columns
from thresher.tasks.files import kind_of
from thresher.tasks.given import as_rows
from thresher.tasks.question_files import NOWHERE, SUFFIXES, RawQuestion, raw_question, read_questions

_BATCH = 1000  # questions handled at a time, so that only one batch is ever held as Python lists
_SHOWN = 5  # ids of skipped rows that are named
OnBad = Callable[[str, str], object]
_TEXT = datasets.Value("string")
_NUMBER = datasets.Value("int64")
# Declared, because a batch of questions without answers would not show them.
_ANSWERS = {"text": datasets.Sequence(_TEXT), "answer_start": datasets.Sequence(_NUMBER)}
_EVIDENCE = datasets.Sequence(datasets.Sequence(_NUMBER))


@dataclass(frozen=True)
class Question:
    """One question, checked; the columns of a row.

    Attributes:
        answers: the texts that are right and where each starts in the context, in characters; none: it has no answer.
        evidence: [start, end) of what the answer rests on, in characters of the context.
    """

    id: str
    question: str
    context: str
    answers: tuple[tuple[str, int], ...] | None = None
    evidence: tuple[tuple[int, int], ...] | None = None


def load_questions(
    source: str | Path,
    *,
    split: str | None = None,
    limit: int | None = None,
    seed: int | None = None,
    columns: Mapping[str, str] | None = None,
    usual: Mapping[str, str] | None = None,
    labelled: bool | None = True,
    skip_bad: bool = False,
    on_bad: OnBad | None = None,
) -> datasets.Dataset:
    """Read questions, and on request shuffle them and keep the first few.

    Args:
        source: what `load_rows` takes, with columns that `questions` knows; or a .json or .jsonl file, also .gz, in the
            layout of SQuAD (1.1 or 2.0), MRQA or HotpotQA (see `read_questions`).
        split, limit, seed: as in `load_rows`; a limit counts questions.
        columns: those that the source calls otherwise, {"question": "query"}. usual: as `columns`, where they are there.
        labelled, skip_bad, on_bad: as in `questions`.

    Returns:
        The columns id, question, context, answers and evidence, see `questions`.

    Raises:
        DataError: the source or split is not there, or what is there is empty or malformed.
        OptionError: `limit` is below 1.
    """
    if limit is not None and limit < 1:
        raise OptionError(f"The limit on questions must be at least 1, not {limit}.")
    file = local_file(source, split)
    if file is not None and file.name.lower().endswith(SUFFIXES):
        bad = _Bad(skip_bad, on_bad)
        rows = _collect(read_questions(file, columns, usual), f"{file}, ", labelled, bad, f"{file} holds no questions.")
    else:
        rows = name_columns(load_rows(source, split=split), columns or {}, usual)
        rows = questions(rows, labelled=labelled, skip_bad=skip_bad, on_bad=on_bad)
    if seed is not None:
        rows = rows.shuffle(seed=seed, keep_in_memory=True)
    return rows if limit is None else rows.select(range(min(limit, len(rows))))


def questions(
    rows: datasets.Dataset,
    *,
    labelled: bool | None = True,
    skip_bad: bool = False,
    on_bad: OnBad | None = None,
) -> datasets.Dataset:
    """Questions in one form: `id`, `question`, `context`, `answers` and, where rows have it, `evidence`.

    Args:
        rows: the columns question and context; id (its number, from 1, stands in for it, marked with * where another is
            called that); answers, as {text: [...], answer_start: [...]} with starts in characters, no answers where the
            context holds none, and the start -1 for an answer that is accepted but stands nowhere in the context;
            evidence, as [start, end) of characters.
        labelled: True requires answers; None takes them where they are there; False leaves them unread, and the column
            out.
        skip_bad: leave out rows that are bad, and warn of how many and which; rather than stop at the first.
        on_bad: called with the id of each row that is left out and what is wrong with it, in place of the warning.

    Raises:
        DataError: there are no rows or not these columns, or a row (named by its id) has no context, an answer that
            does not stand where it says, evidence outside the context, or the id of another row.
    """
    rows = as_rows(rows)
    there = rows.column_names
    if not {"question", "context"} <= set(there) or (labelled and "answers" not in there):
        raise DataError(
            f"The rows are no questions about passages (there are {', '.join(there)}): they need question and context"
            f"{' and answers' if labelled else ''}."
        )
    batches = rows.with_format(None).iter(batch_size=_BATCH)
    plain = (dict(zip(batch, values, strict=True)) for batch in batches for values in zip(*batch.values(), strict=True))
    raw = (raw_question(f"Row {number}", row) for number, row in enumerate(plain, start=1))
    return _collect(raw, "", labelled, _Bad(skip_bad, on_bad), "There are no questions.")


def check(raw: RawQuestion, labelled: bool | None = True) -> Question:
    """A question that is what it should be.

    Raises:
        DataError: it is not; the message is a sentence without its subject.
    """
    if raw.problem:
        raise DataError(raw.problem)
    context, question = _text(raw.context, "context"), _text(raw.question, "question")
    if not context.strip():
        raise DataError("has an empty context; a question is asked about a passage")
    answers = None
    if labelled is not False and raw.answers is not None:
        answers = tuple(_placed(context, text, start) for text, start in raw.answers)
    elif labelled:
        raise DataError("says nothing of answers; give them, or an empty list where the context has none")
    evidence = None if raw.evidence is None else _spans(context, raw.evidence)
    return Question(_name(raw) or raw.place.rpartition(" ")[2], question, context, answers, evidence)


def _name(raw: RawQuestion) -> str | None:
    return None if raw.id is None else str(raw.id).encode("utf-8", "replace").decode()


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"has {'no' if value is None else f'a {kind_of(value)} as its'} {what}, which is a text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"has half a character (a lone surrogate) in its {what}, at {error.start}") from error
    return value


def _placed(context: str, text: Any, start: Any) -> tuple[str, int]:
    text = _text(text, "answer")
    if not text.strip():
        raise DataError("has an empty answer; a question without an answer has an empty list of them")
    if type(start) is not int or start < NOWHERE:
        raise DataError(f"says that its answer '{text}' starts at {start!r}, which is no place in its context")
    if start != NOWHERE and not context.startswith(text, start):
        there = context[start : start + len(text)]
        raise DataError(
            f"says that its answer '{text}' stands at character {start} of its context, where '{there}' does"
        )
    return text, start


def _spans(context: str, spans: Any) -> tuple[tuple[int, int], ...]:
    found = []
    for span in spans if isinstance(spans, list) else [spans]:
        whole = isinstance(span, list | tuple) and len(span) == 2 and all(type(edge) is int for edge in span)
        if not whole or not 0 <= span[0] < span[1] <= len(context):
            raise DataError(
                f"has the evidence {span!r}, which is no [start, end) in its context of {len(context)} characters"
            )
        found.append((span[0], span[1]))
    return tuple(found)


class _Bad:
    """What becomes of rows that are bad. skip: leave them out, rather than stop at the first."""

    def __init__(self, skip: bool, on_bad: OnBad | None) -> None:
        self.skip = skip
        self.on_bad = on_bad
        self.found: list[tuple[str, str]] = []

    def add(self, name: str, error: str) -> None:
        self.found.append((name, error))
        if self.on_bad is not None:
            self.on_bad(name, error)

    def warn(self) -> None:
        """Of all that were left out, unless each was told of."""
        if not self.found or self.on_bad is not None:
            return
        names = ", ".join(name for name, _ in self.found[:_SHOWN]) + (", ..." if len(self.found) > _SHOWN else "")
        are = "bad question is" if len(self.found) == 1 else "bad questions are"
        warnings.warn(f"{len(self.found)} {are} left out ({names}); the first {self.found[0][1]}.", stacklevel=4)


def _checked(found: Iterable[RawQuestion], where: str, labelled: bool | None, bad: _Bad) -> Iterator[Question]:
    """The questions that are well."""
    seen: set[str] = set()
    for number, raw in enumerate(found, start=1):
        try:
            one = check(raw, labelled)
            if not _name(raw):
                one = replace(one, id=_unused(str(number), seen))
            if one.id in seen:
                raise DataError("has the id of an earlier question; ids are unique")
        except DataError as error:
            name = _name(raw)
            if not bad.skip:
                subject = where + raw.place + ("" if name is None else f": the question '{name}'")
                raise DataError(f"{subject} {error}.") from error
            bad.add(raw.place if name is None else name, str(error))
            continue
        seen.add(one.id)
        yield one


def _unused(name: str, seen: set[str]) -> str:
    """The name, marked where a question is really called that."""
    while name in seen:
        name += "*"
    return name


def _collect(
    found: Iterable[RawQuestion], where: str, labelled: bool | None, bad: _Bad, nothing: str
) -> datasets.Dataset:
    """Questions as rows. where: what stands before a place in an error. nothing: the error where there are none."""
    made: list[datasets.Dataset] = []
    if labelled is None:
        found = list(found)
        labelled = True if any(raw.answers is not None for raw in found) else None
    checked = _checked(found, where, labelled, bad)
    features: dict[str, Any] = {}
    while batch := list(itertools.islice(checked, _BATCH)):
        features = features or _features(batch[0])
        _same_fields(batch, features)
        made.append(datasets.Dataset.from_dict(_columns(batch, features), features=datasets.Features(features)))
    bad.warn()
    if not made:
        raise DataError(nothing)
    return datasets.concatenate_datasets(made)


def _features(first: Question) -> dict[str, Any]:
    answers = {} if first.answers is None else {"answers": _ANSWERS}
    evidence = {} if first.evidence is None else {"evidence": _EVIDENCE}
    return {"id": _TEXT, "question": _TEXT, "context": _TEXT, **answers, **evidence}


def _same_fields(batch: list[Question], features: dict[str, Any]) -> None:
    for name in ("answers", "evidence"):
        for one in batch:
            if (getattr(one, name) is not None) != (name in features):
                has, others = ("has", "have not") if getattr(one, name) is not None else ("has no", "have")
                raise DataError(f"The question '{one.id}' {has} {name}, which those before it {others}.")


def _columns(batch: list[Question], features: dict[str, Any]) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = {
        name: [getattr(one, name) for one in batch] for name in ("id", "question", "context")
    }
    if "answers" in features:
        columns["answers"] = [
            {"text": [text for text, _ in one.answers or ()], "answer_start": [start for _, start in one.answers or ()]}
            for one in batch
        ]
    if "evidence" in features:
        columns["evidence"] = [[list(span) for span in one.evidence or ()] for one in batch]
    return columns
