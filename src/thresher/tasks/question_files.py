"""The layouts in which questions about passages are published, read into one form that is not yet checked."""

from __future__ import annotations

import gzip
import json
import re
import string
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thresher.errors import DataError
from thresher.tasks.data import still_usual
from thresher.tasks.files import kind_of, what_is_wrong

SUFFIXES = (".json", ".json.gz", ".jsonl", ".jsonl.gz")
"""The endings of files that `read_questions` reads."""

IN_SQUAD = "which SQuAD's layout has here"

NOWHERE = -1
"""The start of an answer that is accepted but does not stand in the context (MRQA, HotpotQA)."""


@dataclass
class RawQuestion:
    """A question as a file holds it: nothing here is known to be what it should be.

    Attributes:
        place: what an error calls it where it has no id: "line 7", "question 3".
        id, question, context: texts, if all is well; the id may be None.
        answers: pairs of a text and its start; None where the file says nothing of answers.
        evidence: [start, end) in the context; None where the file says nothing of evidence.
        problem: what is wrong with it, if that showed before; a sentence without its subject and its full stop.
    """

    place: str
    id: Any = None
    question: Any = None
    context: Any = None
    answers: list[tuple[Any, Any]] | None = None
    evidence: list[Any] | None = None
    problem: str = ""


def read_questions(
    path: Path, columns: Mapping[str, str] | None = None, usual: Mapping[str, str] | None = None
) -> Iterator[RawQuestion]:
    """The questions of a file, in order, one at a time.

    columns: fields by another name, {"question": "query"}, in whichever layout; a question without one of them is bad. usual:
    as `columns`, but only where they are there.

    Layouts: SQuAD's (1.1 and 2.0: data, paragraphs, qas); one object a line or a list of objects, each a question with
    question, context and answers {text, answer_start}, a passage with qas (MRQA), or a question with supporting_facts
    (HotpotQA).

    Raises:
        DataError: the file cannot be read, is cut short, or is in none of these layouts.
    """
    names = _Names(columns or {}, usual or {})
    if ".jsonl" in path.name.lower():
        return _of_objects(_parsed_lines(path), "line", names)
    content = _whole(path)
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        if _is_object(content.lstrip().split("\n", 1)[0]):  # a .json file of one object a line
            return _of_objects(_parsed_lines(path), "line", names)
        raise DataError(f"{path} {_invalid(error)}; is the file whole?") from error
    if isinstance(found, dict) and "data" in found:
        if not isinstance(found["data"], list):
            raise DataError(f"{path} has no list 'data', {IN_SQUAD}.")
        return _squad(found["data"], names)
    if isinstance(found, dict):
        found = [found]
    if not isinstance(found, list):
        raise DataError(f"{path} holds a {kind_of(found)}, where questions are expected.")
    return _of_objects(enumerate(found, start=1), "question", names)


def raw_question(place: str, row: Mapping[str, Any]) -> RawQuestion:
    """A row of its own columns: question and context, and id, answers and evidence where they are there."""
    raw = RawQuestion(place, row.get("id"), row.get("question"), row.get("context"))
    raw.answers, raw.problem = _answers(row.get("answers"))
    raw.evidence = row.get("evidence")
    return raw


@dataclass(frozen=True)
class _Names:
    """What fields are called, see `read_questions`."""

    columns: Mapping[str, str]
    usual: Mapping[str, str]

    def of(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """An object by the names that are known here. Raises DataError, a sentence without its subject, for one that lacks a
        field."""
        lacking = next((old for old in self.columns.values() if old not in row), None)
        if lacking is not None:
            raise DataError(f"has no field '{lacking}' (there are {', '.join(map(str, row)) or 'none'})")
        renamed = {**still_usual(row, self.columns, self.usual), **self.columns}
        rest = {name: value for name, value in row.items() if name not in renamed and name not in renamed.values()}
        return rest | {new: row[old] for new, old in renamed.items()}

    def renames(self, name: str) -> bool:
        """Whether a field may be there under another name."""
        return name in self.columns or name in self.usual

    def inside(self, passage: Mapping[str, Any], question: Mapping[str, Any]) -> dict[str, Any]:
        """As `of`, of a question that stands inside its passage."""
        known = ("context", self.columns.get("context"), self.usual.get("context"))
        return self.of({name: value for name, value in passage.items() if name in known} | dict(question))


# --- layouts ---------------------------------------------------------------------------------------------------------


def _of_objects(objects: Iterable[tuple[int, Any]], unit: str, names: _Names) -> Iterator[RawQuestion]:
    """Objects with their numbers; one that is a DataError could not be parsed."""
    for number, found in objects:
        place = f"{unit} {number}"
        if isinstance(found, DataError):
            yield RawQuestion(place, problem=str(found))
        elif not isinstance(found, dict):
            yield RawQuestion(place, problem=f"is a {kind_of(found)}, where an object is expected")
        elif "header" in found and "context" not in found:
            continue
        elif "qas" in found:
            yield from _mrqa(place, found, names)
        elif "paragraphs" in found:
            yield from _squad([found], names, f"{place}, ")
        else:
            try:
                found = names.of(found)
            except DataError as error:
                yield RawQuestion(place, problem=str(error))
                continue
            yield (_hotpot if _is_hotpot(found) else raw_question)(place, found)


def _squad(articles: list[Any], names: _Names, where: str = "") -> Iterator[RawQuestion]:
    number = 0
    for count, article in enumerate(articles, start=1):
        place = f"{where}article {count}"
        if problem := _lacks(article, "paragraphs"):
            yield RawQuestion(place, problem=problem)
            continue
        for within, paragraph in enumerate(article["paragraphs"], start=1):
            problem = _lacks(paragraph, "qas")
            if not problem and "context" not in paragraph and not names.renames("context"):
                problem = f"has no 'context', {IN_SQUAD}"
            if problem:
                yield RawQuestion(f"{place}, paragraph {within}", problem=problem)
                continue
            for qa in paragraph["qas"]:
                number += 1
                yield _inside(f"{where}question {number}", paragraph, qa, names)


def _lacks(found: Any, name: str) -> str:
    """What is wrong with an object that should hold a list of this name, a sentence without its subject; "" for nothing."""
    if not isinstance(found, dict):
        return f"is a {kind_of(found)}, where an object is expected"
    return "" if isinstance(found.get(name), list) else f"has no list '{name}', {IN_SQUAD}"


def _inside(place: str, paragraph: dict[str, Any], qa: Any, names: _Names) -> RawQuestion:
    """A question of SQuAD's, of the paragraph that holds it."""
    if not isinstance(qa, dict):
        return RawQuestion(place, problem="is no object")
    try:
        row = names.inside(paragraph, qa)
    except DataError as error:
        return RawQuestion(place, qa.get("id"), problem=str(error))
    raw = RawQuestion(place, row.get("id"), row.get("question"), row.get("context"))
    raw.answers, raw.problem = ([], "") if row.get("is_impossible", False) else _answers(row.get("answers"))
    return raw


def _mrqa(place: str, row: dict[str, Any], names: _Names) -> Iterator[RawQuestion]:
    """The ends of MRQA's spans are included, and all of `answers` count as right, also those detected nowhere."""
    for qa in row["qas"] if isinstance(row["qas"], list) else [None]:
        if not isinstance(qa, dict):
            yield RawQuestion(place, problem="holds a question that is no object")
            continue
        try:
            qa = names.inside(row, qa)
        except DataError as error:
            yield RawQuestion(place, qa.get("qid", qa.get("id")), problem=str(error))
            continue
        raw = RawQuestion(place, qa.get("qid", qa.get("id")), qa.get("question"), qa.get("context"))
        if "answers" in qa or "detected_answers" in qa:
            try:
                raw.answers = _detected(raw.context, qa.get("detected_answers") or [], qa.get("answers") or [])
            except (KeyError, TypeError, ValueError):
                raw.problem = "has detected_answers that are no list of {text, char_spans}"
        yield raw


def _detected(context: Any, detected: list[Any], accepted: list[Any]) -> list[tuple[Any, Any]]:
    found: list[tuple[Any, Any]] = []
    for answer in detected:
        for start, last in answer["char_spans"]:
            text = context[start : last + 1]
            # The text of an answer may differ from the passage in case and spacing; what stands there is the answer.
            found.append((text if _loose(text) == _loose(answer["text"]) else answer["text"], start))
    there = {text for text, _ in found}
    return found + [(text, NOWHERE) for text in dict.fromkeys(accepted) if text not in there]


def _loose(text: str) -> str:
    return re.sub(rf"[\s{re.escape(string.punctuation)}]+", "", text).casefold()


def _is_hotpot(row: Mapping[str, Any]) -> bool:
    """Its test questions have no supporting facts, but a context of titles and sentences all the same."""
    context = row.get("context")
    if isinstance(context, list):
        return "supporting_facts" in row or any(isinstance(part, list) for part in context)
    return "supporting_facts" in row or (isinstance(context, dict) and "title" in context)


def _hotpot(place: str, row: dict[str, Any]) -> RawQuestion:
    """The paragraphs one below the other, each after its title; the answer where the supporting sentences first have it.

    "yes", "no" and others that do not stand in the passage are accepted answers that stand nowhere. The published files name
    some supporting sentences that no paragraph has; these are left out, but not all of a question's may be.
    """
    raw = RawQuestion(place, row.get("_id", row.get("id")), row.get("question"))
    try:
        raw.context, sentences = _joined(_pairs(row["context"], "title", "sentences"))
    except (KeyError, TypeError, ValueError):
        raw.problem = "has no context of titles and sentences, as HotpotQA writes it"
        return raw
    try:
        named = _pairs(row["supporting_facts"], "title", "sent_id") if row.get("supporting_facts") is not None else None
        facts = set(named or ())
    except (KeyError, TypeError, ValueError):
        raw.problem = "has supporting_facts that are no titles with numbers of sentences, as HotpotQA writes them"
        return raw
    if named is not None:
        raw.evidence = [[start, end] for name, start, end in sentences if name in facts]
        if named and not raw.evidence:
            raw.problem = f"names supporting facts of which its context has none, such as {list(named[0])}"
    answer = row.get("answer")
    if answer is not None:
        where = _first(raw.context, answer, raw.evidence or []) if isinstance(answer, str) else NOWHERE
        raw.answers = [(answer, where)]
    return raw


def _pairs(value: Any, first: str, second: str) -> list[tuple[Any, Any]]:
    """HotpotQA's own lists of pairs, or the two lists that the hub makes of them."""
    if isinstance(value, dict):
        return list(zip(value[first], value[second], strict=True))
    return [(one, other) for one, other in value]


def _joined(paragraphs: Sequence[tuple[str, Sequence[str]]]) -> tuple[str, list[tuple[tuple[str, int], int, int]]]:
    """The passage, and each sentence's (title, number), start and end in it."""
    parts: list[str] = []
    sentences = []
    length = 0
    for title, texts in paragraphs:
        parts.append(("\n" if parts else "") + title + ": ")
        length += len(parts[-1])
        for number, text in enumerate(texts):
            sentences.append(((title, number), length, length + len(text)))
            parts.append(text)
            length += len(text)
    return "".join(parts), [one for one in sentences if one[1] < one[2]]


def _first(context: str, answer: str, evidence: list[Any]) -> int:
    """Where the answer stands as words of its own, in the evidence if it does."""
    whole = re.compile(rf"(?<!\w){re.escape(answer)}(?!\w)")
    for start, end in [*evidence, (0, len(context))]:
        if answer and (found := whole.search(context, start, end)):
            return found.start()
    return NOWHERE


def _answers(value: Any) -> tuple[list[tuple[Any, Any]] | None, str]:
    """Answers as pairs, from a list of {text, answer_start} or from two lists; or what is wrong with them."""
    if value is None:
        return None, ""
    try:
        if isinstance(value, dict):
            return list(zip(value["text"], value["answer_start"], strict=True)), ""
        return [(one["text"], one["answer_start"]) for one in value], ""
    except (KeyError, TypeError, ValueError):
        return [], "has answers that are neither two lists, text and answer_start, nor a list of objects with these two"


# --- JSON ------------------------------------------------------------------------------------------------------------


def _whole(path: Path) -> str:
    content = "\n".join(line for _, line in _lines(path))
    if not content:
        raise DataError(f"{path} is empty; give a file with questions.")
    return content


def _parsed_lines(path: Path) -> Iterator[tuple[int, Any]]:
    for number, line in _lines(path):
        try:
            yield number, json.loads(line)
        except (ValueError, RecursionError) as error:
            yield number, DataError(_invalid(error))


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines that are not blank, with their numbers; one at a time, because these files are large."""
    number = 0
    try:
        with gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
                if line.strip():
                    yield number, line
    except UnicodeDecodeError as error:
        raise DataError(f"{path}, line {number}: the text is not UTF-8.") from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {str(error).rstrip('.')}.") from error


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def _invalid(error: Exception) -> str:
    return f"is not valid JSON ({what_is_wrong(error)})"


__all__ = ["NOWHERE", "SUFFIXES", "RawQuestion", "raw_question", "read_questions"]
