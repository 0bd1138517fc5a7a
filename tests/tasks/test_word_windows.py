"""Windows over rows of words against naive loops, and taggers that read long rows through them."""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import Any

import hypothesis
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers import tokenizer
from tasks.test_tagging import NAMES, ROWS, SILENT, by_hand, pieces, rows_of
from thresher.errors import DataError, OptionError
from thresher.tasks.encoded_tags import EncodedLongTags
from thresher.tasks.tagging import TaggingTask, repaired
from thresher.tasks.word_windows import WordWindows

SIZES = st.lists(st.lists(st.integers(0, 4), max_size=14), min_size=1, max_size=4)


def windows_of(encoded: EncodedLongTags, row: int) -> list[int]:
    return [number for number, owner in enumerate(encoded.owners) if owner == row]


@hypothesis.settings(max_examples=60)
@given(SIZES, st.integers(1, 9), st.data())
def test_windows_cover_every_word_share_little_and_are_as_long_as_they_can_be(
    sizes: list[list[int]], room: int, data: st.DataObject
) -> None:
    shared = data.draw(st.integers(0, room - 1))
    found = WordWindows.over(sizes, room, shared)
    for row, of in enumerate(sizes):
        spans = [span for owner, span in zip(found.owners, found.spans, strict=True) if owner == row]
        assert spans[0][0] == 0 and spans[-1][1] == len(of)
        for start, end in spans:
            assert sum(of[start:end]) <= room or end - start == 1
            assert end == len(of) or sum(of[start : end + 1]) > room
        for (start, end), (after, _) in pairwise(spans):
            assert start < after <= end and sum(of[after:end]) <= shared
            assert after == start + 1 or sum(of[after - 1 : end]) > shared
    assert found.owners == sorted(found.owners)


@hypothesis.settings(max_examples=60)
@given(SIZES, st.integers(1, 9), st.data())
def test_a_word_is_at_home_where_it_sees_most_on_its_poorer_side(
    sizes: list[list[int]], room: int, data: st.DataObject
) -> None:
    found = WordWindows.over(sizes, room, data.draw(st.integers(0, room - 1)))
    for row, homes in enumerate(found.homes()):
        at = [0, *accumulate(sizes[row])]
        for word, home in enumerate(homes):
            seen = {}
            for number, (owner, (start, end)) in enumerate(zip(found.owners, found.spans, strict=True)):
                if owner == row and start <= word < end:
                    left = at[word] - at[start] if start else np.inf
                    right = at[end] - at[word + 1] if end < len(sizes[row]) else np.inf
                    seen[number] = min(left, right)
            assert home == max(seen, key=lambda number: (seen[number], -number))
    numbered = [[(row, word) for word in range(len(of))] for row, of in enumerate(sizes)]
    assert found.joined(found.parts(numbered)) == numbered


@hypothesis.settings(max_examples=25)
@given(ROWS, st.integers(4, 20), st.data())
def test_every_word_is_read_and_answered_once(
    pairs: list[list[tuple[str, str]]], limit: int, data: st.DataObject
) -> None:
    words = [[word for word, _ in row] for row in pairs]
    tags = [repaired([tag for _, tag in row]) for row in pairs]
    task = TaggingTask(NAMES, windows=data.draw(st.integers(0, limit - 3)))
    found = task.encode(rows_of(words, tags), pieces(), limit)
    assert isinstance(found, EncodedLongTags) and found.words == words and found.tags == tags
    said = np.zeros((len(found.rows), limit, len(NAMES)))
    for row, (texts, wanted) in enumerate(zip(words, tags, strict=True)):
        for word, (text, tag) in enumerate(zip(texts, wanted, strict=True)):
            window, place = found.homes[row][word], found.firsts[row][word]
            assert window in windows_of(found, row)
            own = by_hand([text], [NAMES.index(tag)], 999)[0][1:-1]
            assert (place < 0) == (not own)
            if own:
                assert found.rows["input_ids"][window][place] == own[0]
                assert found.rows["labels"][window][place] == NAMES.index(tag)
                said[window, place, NAMES.index(tag)] = 1.0
    silent = [[word in ("", SILENT) for word in row] for row in words]
    expected = [
        ["O" if gone else tag for tag, gone in zip(row, left, strict=True)]
        for row, left in zip(tags, silent, strict=True)
    ]
    assert found.predicted(said) == expected
    assert found.silent == sum(map(sum, silent)) and found.lost == 0
    assert max(map(len, found.rows["input_ids"])) <= limit


def test_a_row_that_fits_is_read_as_without_windows() -> None:
    words = [["w5abc", "w6", "w7"], [], ["w8"]]
    plain = TaggingTask(NAMES).encode(rows_of(words), pieces(), 12, require_tags=False)
    found = TaggingTask(NAMES, windows=2).encode(rows_of(words), pieces(), 12, require_tags=False)
    assert isinstance(found, EncodedLongTags)
    assert found.rows.to_dict() == plain.rows.to_dict() and found.firsts == plain.firsts
    assert found.owners == [0, 1, 2] and found.notice() == plain.notice() == "1 row is empty"


def long_rows(count: int = 4) -> tuple[list[list[str]], list[list[str]]]:
    words = [[f"w{5 + (i + row) % 5}" for i in range(3 + 5 * row)] for row in range(count)]
    return words, [["B-PER" if word == "w7" else "O" for word in row] for row in words]


def test_rows_that_are_drawn_keep_their_windows_together() -> None:
    words, tags = long_rows()
    found = TaggingTask(NAMES, windows=2).encode(rows_of(words, tags), pieces(), 8)
    assert isinstance(found, EncodedLongTags)
    said = np.random.default_rng(0).normal(size=(len(found.rows), 8, len(NAMES)))
    every = found.predicted(said)
    for drawn in ([2, 0, 2, 2], [3], [1, 1]):
        index = [window for row in drawn for window in windows_of(found, row)]
        some = found.select(index)
        assert some.words == [words[row] for row in drawn] and some.tags == [tags[row] for row in drawn]
        assert some.predicted(said[index]) == [every[row] for row in drawn]
        assert some.rows["input_ids"][:] == [found.rows["input_ids"][window] for window in index]
    with pytest.raises(DataError, match="do not fit"):
        found.predicted(said[:-1])


def test_what_is_said_of_windows() -> None:
    words, tags = long_rows()
    found = TaggingTask(NAMES, windows=2).encode(rows_of(words, tags), pieces(), 8)
    assert found.unit == "windows"
    assert found.notice() == "3 of 4 rows are longer than 8 tokens and read in 9 windows"
    cut = TaggingTask(NAMES, windows=0).encode(rows_of([["w5", "w6abcabc", "w7"]]), pieces(), 6, require_tags=False)
    assert (
        cut.notice() == "1 of 1 rows is longer than 6 tokens and read in 3 windows; 1 word longer than a window was cut"
    )
    taught = TaggingTask(NAMES, windows=2).encode(
        rows_of([*words, [], [SILENT]], [*tags, [], ["O"]]), pieces(), 8, training=True
    )
    assert taught.left_out == 2 and taught.words == words


@pytest.mark.parametrize("windows", [-1, 1.5, "4"])
def test_windows_that_are_no_number_of_tokens_are_refused(windows: Any) -> None:
    with pytest.raises(OptionError, match="a whole number of tokens"):
        TaggingTask(NAMES, windows)


def test_windows_that_never_get_on_are_refused() -> None:
    assert TaggingTask(NAMES, windows=True).windows == 64
    with pytest.raises(OptionError, match="A window of 8 tokens has room for 6 of the words.*share 0 to 5.*not 6"):
        TaggingTask(NAMES, windows=6).encode(rows_of([["w5"]]), tokenizer(), 8, require_tags=False)
