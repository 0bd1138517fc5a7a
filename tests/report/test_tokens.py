"""Token maps: the text survives, the layers are told, and nothing in a token is obeyed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thresher.errors import ThresherError
from thresher.report import TokenMap, legend, surface_tokens, to_html, to_plain, to_terminal
from thresher.report.tokens import _STAND_INS, runs, shade


def test_pieces_carry_the_space_before_them() -> None:
    assert surface_tokens("  The  film.", [(2, 5), (7, 11), (11, 12)]) == ["The", "  film", "."]


def test_special_tokens_show_their_names_apart_from_the_text() -> None:
    offsets = [(0, 0), (0, 1), (1, 3), (0, 0)]
    assert surface_tokens("abc", offsets, ["[CLS]", "a", "##bc", "[SEP]"]) == ["[CLS] ", "a", "bc", " [SEP]"]
    assert surface_tokens("abc", offsets) == ["", "a", "bc", ""]


def test_a_pair_reads_each_text_by_its_own_offsets() -> None:
    pieces = surface_tokens(
        ["who?", "not me"],
        [(0, 0), (0, 3), (3, 4), (0, 0), (0, 3), (4, 6), (0, 0)],
        ["[CLS]", "who", "?", "[SEP]", "not", "me", "[SEP]"],
        [None, 0, 0, None, 1, 1, None],
    )
    assert "".join(pieces) == "[CLS] who? [SEP] not me [SEP]"
    with pytest.raises(ThresherError, match="sequence_ids"):
        surface_tokens(["a", "b"], [(0, 1), (0, 1)])


def test_bytes_of_one_character_show_it_once() -> None:
    assert surface_tokens("a🌾b", [(0, 1), (1, 2), (1, 2), (1, 2), (2, 3)]) == ["a", "🌾", "", "", "b"]


@given(st.text(min_size=1), st.data())
def test_pieces_join_to_the_text(text: str, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), min_size=2)))
    offsets = list(zip(cuts[::2], cuts[1::2], strict=False))
    assert "".join(surface_tokens(text, offsets)) == text[offsets[0][0] : offsets[-1][1]]


@given(st.lists(st.tuples(st.text(), st.none() | st.integers(1, 3))))
def test_runs_keep_every_token_and_its_layer(pairs: list[tuple[str, int | None]]) -> None:
    token_map = TokenMap("t", tuple(t for t, _ in pairs), tuple(d for _, d in pairs), layers=3)
    found = runs(token_map)
    assert [d for run in found for d in [run.dropped_at] * run.count] == [d for _, d in pairs]
    printed = "".join(run.gap + run.body for run in found)
    assert printed.rstrip() == "".join(token_map.tokens).translate(_STAND_INS).rstrip()
    assert not any(c in printed for c in "\x00\x07\x1b\x7f\x9b\r")


def test_a_map_checks_its_layers() -> None:
    with pytest.raises(ThresherError, match="2 tokens and 1 layers"):
        TokenMap("t", ("a", "b"), (None,), layers=2)
    for wrong in (0, 3):
        with pytest.raises(ThresherError, match="from 1 to 2"):
            TokenMap("t", ("a",), (wrong,), layers=2)


def test_plain_marks_dropped_words(token_map: TokenMap) -> None:
    assert to_plain(token_map) == "[1:The] [3:film] [1:is] not dull[2:.]"
    merged = TokenMap("t", ("a", " b", "c", " d"), (2, 2, 2, None), layers=2)
    assert to_plain(merged) == "[2:a bc] d"


def test_terminal_dims_what_went_early(token_map: TokenMap) -> None:
    text = to_terminal(token_map)
    assert text.plain == "The film is not dull."
    styles = {text.plain[span.start : span.end]: str(span.style) for span in text.spans}
    grey = {word: int(styles[word][4:].split(",")[0]) for word in ("The", "film", ".")}
    assert grey["The"] < grey["."] < grey["film"]
    assert styles["not dull"] == "bold"


def test_legend_names_every_layer() -> None:
    assert legend(3).plain.split() == ["kept", "to", "the", "end", "dropped", "at", "layer", "1", "2", "3"]
    assert legend(1).plain.endswith(" 1")
    assert legend(3, answer=True).plain.removeprefix(legend(3).plain).strip() == "the answer"


def test_terminal_obeys_nothing_in_a_token() -> None:
    escaping = TokenMap("t", ("[bold]a", "\x1b[31mb\x07"), (None, 1), layers=1)
    assert to_terminal(escaping).plain == to_plain(escaping).replace("[1:", "").removesuffix("]")
    assert "\x1b" not in to_terminal(escaping).plain


def test_shade_rises_with_the_layer() -> None:
    shades = [shade(layer, 4) for layer in (1, 2, 3, 4, None)]
    assert shades[0] == 0 and shades[-1] == 1 and shades == sorted(set(shades))


def test_page_shows_every_word_with_its_layer(token_map: TokenMap, read_page: Callable[[str], Any]) -> None:
    page = read_page(to_html([token_map], "Two reviews"))
    assert "The film is not dull." in page.shown and "Two reviews" in page.shown and "positive, .98" in page.shown
    assert [a.get("data-dropped") for a in page.all("span") if "data-count" in a] == ["1", "3", "1", None, "2"]
    assert [a["max"] for a in page.all("input")] == ["4"]


def test_page_keeps_markup_in_tokens_inert(
    hostile: str, hostile_map: TokenMap, token_map: TokenMap, read_page: Callable[[str], Any]
) -> None:
    page = read_page(to_html([hostile_map, token_map], hostile))
    assert len(page.all("script")) == 1 and "alert" not in page.scripts[0]
    assert page.shown.count(hostile) >= 4


def test_page_without_maps_has_no_slider(read_page: Callable[[str], Any]) -> None:
    page = read_page(to_html([], "nothing"))
    assert page.all("input") == []
