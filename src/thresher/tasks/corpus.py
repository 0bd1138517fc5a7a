"""The built-in corpus: the language reference that every Python installation carries, cut into sections."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pydoc_data.topics import topics
from typing import Literal, get_args

from thresher.errors import DataError

NAME = "python-docs"
"""The name under which `thresher.tasks.data.load_rows` knows this corpus."""

CorpusSplit = Literal["train", "test"]

TARGET_CHARS = 850  # about 225 WordPiece tokens of this text, which is rich in code and punctuation
MIN_WORDS = 40

_UNDERLINE = re.compile(r"^\s*([*=\-~^])\1{2,}\s*$", re.MULTILINE)
_WRAPPED_HYPHEN = re.compile(r"(?<=\w)-\n\s*(?=\w)")


@dataclass(frozen=True)
class Section:
    """A stretch of one topic, of about 225 WordPiece tokens.

    Attributes:
        id: `topic/number`, unique in the corpus.
        topic: the reference topic it was cut from.
        text: paragraphs joined by a single newline; inside a paragraph, words are joined by single spaces.
    """

    id: str
    topic: str
    text: str


def python_docs(split: CorpusSplit | str | None = None) -> list[Section]:
    """The language reference in `pydoc_data.topics` as sections, sorted by topic.

    A paragraph that several topics repeat is kept only where it first stands, since a sentence should have one right
    section. The text follows the Python version; for one version the result is always the same.

    Args:
        split: "train" or "test", which share no topic and hold about half of the sections each; None for all.

    Raises:
        DataError: the split is neither.
    """
    if split is not None and split not in get_args(CorpusSplit):
        raise DataError(f"The built-in corpus '{NAME}' has no split '{split}'; it has train and test.")
    by_topic = _sections_by_topic()
    if split is not None:
        kept = _topics_of(split, {topic: len(sections) for topic, sections in by_topic.items()})
        by_topic = {topic: sections for topic, sections in by_topic.items() if topic in kept}
    return [section for sections in by_topic.values() for section in sections]


def _sections_by_topic() -> dict[str, list[Section]]:
    seen: set[str] = set()
    by_topic = {}
    for topic in sorted(topics):
        fresh = []
        for paragraph in _paragraphs(topics[topic]):
            if paragraph not in seen:
                seen.add(paragraph)
                fresh.append(paragraph)
        by_topic[topic] = [
            Section(f"{topic}/{number}", topic, text) for number, text in enumerate(_join(fresh), start=1)
        ]
    return by_topic


def _paragraphs(text: str) -> list[str]:
    """Blocks between blank lines, without heading underlines and line wrapping; drawn tables, no text, are left out."""
    unwrapped = _WRAPPED_HYPHEN.sub("-", _UNDERLINE.sub("", text))
    blocks = (" ".join(block.split()) for block in re.split(r"\n\s*\n", unwrapped))
    return [block for block in blocks if block and not block.startswith("+--")]


def _join(paragraphs: Iterable[str]) -> list[str]:
    """Neighbouring paragraphs joined into texts near `TARGET_CHARS`, none under `MIN_WORDS` words."""
    groups: list[list[str]] = []
    size = 0
    for paragraph in paragraphs:
        # A section is closed where stopping short of the target misses it by less than going past it would.
        if not groups or size + len(paragraph) / 2 > TARGET_CHARS:
            groups.append([])
            size = 0
        groups[-1].append(paragraph)
        size += len(paragraph)

    texts: list[str] = []
    carried = ""
    for group in groups:
        text = "\n".join([carried, *group] if carried else group)
        short = len(text.split()) < MIN_WORDS
        if short and texts:
            texts[-1] += "\n" + text
            carried = ""
        elif short:
            carried = text  # nothing before it to join: it opens the next section, or is dropped with its topic
        else:
            texts.append(text)
            carried = ""
    return texts


def _topics_of(split: str, sizes: dict[str, int]) -> set[str]:
    """Topics are dealt in the order of their hash, each to the side with fewer sections so far."""
    sides: dict[str, set[str]] = {"train": set(), "test": set()}
    totals = dict.fromkeys(sides, 0)
    for topic in sorted(sizes, key=lambda name: hashlib.sha256(name.encode()).digest()):
        smaller = min(totals, key=lambda side: totals[side])
        sides[smaller].add(topic)
        totals[smaller] += sizes[topic]
    return sides[split]
