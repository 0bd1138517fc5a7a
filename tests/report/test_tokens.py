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


FATES = st.lists(st.tuples(st.text(alphabet="ab \n\u200b{}[]<&«»\x1b", max_size=4), st.none() | st.integers(1, 3)))


@given(FATES, st.booleans())
def test_runs_are_made_of_their_tokens(fates: list[tuple[str, int | None]], frozen: bool) -> None:
    """Each token stands once, in order, in the run of its fate; what joins a run is all that is shown of it."""
    tokens, layers = tuple(token for token, _ in fates), tuple(layer for _, layer in fates)
    dropped = (None,) * len(fates) if frozen else layers
    token_map = TokenMap("t", tokens, dropped, 3, frozen_at=layers if frozen else None)
    found = runs(token_map)
    assert [number for run in found for _, _, number in run.parts] == list(range(len(fates)))
    for run in found:
        assert "".join(gap + body for gap, body, _ in run.parts) == run.body == run.body.strip()
        assert all((run.frozen_at if frozen else run.dropped_at) == layers[number] for _, _, number in run.parts)


def test_a_row_that_left_and_tokens_that_froze_are_told() -> None:
    left = TokenMap("t", ("a", " b", " c"), (1, None, None), 4, exited_at=2)
    assert left.left_early and left.remark == "2 of 3 tokens read until the row left after layer 2 of 4"
    stayed = TokenMap("t", ("a", " b"), (None, None), 4, exited_at=4)
    assert not stayed.left_early and stayed.remark == "2 of 2 tokens read to the end, all 4 layers; no early exit"
    assert TokenMap("t", ("a",), (None,), 4).remark == "1 of 1 tokens read to the end"
    frozen = TokenMap("t", ("a", " b", " c", " d"), (None,) * 4, 4, exited_at=4, frozen_at=(1, 1, None, 3))
    assert frozen.remark.endswith("no early exit; frozen: 2 after layer 1, 1 after layer 3")
    assert to_plain(frozen) == "{1:a b} c {3:d}"
    assert to_terminal(frozen).plain == "a b c d"
    styles = {to_terminal(frozen).plain[s.start : s.end]: str(s.style) for s in to_terminal(frozen).spans}
    assert styles["c"] == "bold" and styles["a b"].endswith("italic")
    assert legend(4, frozen=True).plain.endswith("frozen after that layer")


def test_a_map_checks_its_exit_and_its_frozen_tokens() -> None:
    for wrong in (0, 3):
        with pytest.raises(ThresherError, match="leaves after a layer from 1 to 2"):
            TokenMap("t", ("a",), (None,), layers=2, exited_at=wrong)
        with pytest.raises(ThresherError, match="each freeze after a layer from 1 to 2"):
            TokenMap("t", ("a",), (None,), layers=2, frozen_at=(wrong,))
    with pytest.raises(ThresherError, match="1 tokens each freeze"):
        TokenMap("t", ("a",), (None,), layers=2, frozen_at=(1, 1))


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


def test_page_shows_what_matters(hostile: str, read_page: Callable[[str], Any]) -> None:
    """A bar for each token, as high as its share of the largest; the largest in a table; a key; and nothing is obeyed."""
    tokens = (hostile, " and", " more", "  ")
    token_map = TokenMap("t", tokens, (None, 2, None, None), 2, saliency=(0.5, 0.125, 0.375, 0.0), saliency_by=hostile)
    page = read_page(to_html([token_map], "t"))
    bars = [a for a in page.all("span") if a.get("class") == "token"]
    assert [a["style"] for a in bars] == ["--s:1.00", "--s:0.25", "--s:0.75"]
    assert [a["title"] for a in bars] == [
        "50.0% of what matters", "12.5% of what matters, dropped at layer 2", "37.5% of what matters",
    ]  # fmt: skip
    assert f"The bar below a word is what it matters, by {hostile}:" in page.shown
    assert f"{hostile} and more" in page.shown
    table = page.shown[page.shown.index("dropped at layer") :]
    assert table.index("50.0%") < table.index("37.5%") < table.index("12.5%")
    assert len(page.all("script")) == 1 and "alert" not in page.scripts[0]


def test_page_without_a_saliency_has_no_bars(token_map: TokenMap, read_page: Callable[[str], Any]) -> None:
    page = read_page(to_html([token_map], "t"))
    assert "The bar below" not in page.shown
    assert not [a for a in page.all("span") if a.get("class") == "token"]
    assert page.all("table") == []


def test_page_with_a_saliency_of_nothing(read_page: Callable[[str], Any]) -> None:
    page = read_page(to_html([TokenMap("t", ("a",), (None,), 1, saliency=(0.0,), saliency_by="attention")], "t"))
    assert [a["style"] for a in page.all("span") if a.get("class") == "token"] == ["--s:0.00"]


def test_page_shows_where_a_row_left_and_tokens_froze(read_page: Callable[[str], Any]) -> None:
    left = TokenMap("t", ("a", " b", " c"), (1, None, None), 4, exited_at=2)
    frozen = TokenMap("u", ("d", " e"), (None, None), 4, exited_at=4, frozen_at=(None, 3))
    page = read_page(to_html([left, frozen], "t"))
    assert [a.get("data-left") for a in page.all("article")] == ["2", None]
    assert "until the row left after layer 2 of 4" in page.shown
    assert "frozen: its answer was settled, other words read it on" in page.shown
    runs_shown = [a for a in page.all("span") if "data-count" in a]
    assert [a["style"] for a in runs_shown] == ["--a:0.00", "--a:0.50", "--a:1.00", "--a:0.75"]
    assert [a.get("data-frozen") for a in runs_shown] == [None, None, None, "3"]
    assert [a["class"] for a in runs_shown] == ["run", "run kept", "run kept", "run frozen"]


def test_page_without_maps_has_no_slider(read_page: Callable[[str], Any]) -> None:
    page = read_page(to_html([], "nothing"))
    assert page.all("input") == []
