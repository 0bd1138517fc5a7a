"""Token maps: a text with every word marked by the layer that stopped reading it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from thresher.errors import ThresherError
from thresher.report._support import needs, render_template

if TYPE_CHECKING:
    from rich.text import Text

# Control characters would be obeyed by a terminal and lone surrogates refused by it: show a stand-in for both.
_STAND_INS: dict[int, int] = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"}
_STAND_INS |= {ord("\r"): ord(" "), 0x7F: 0x2421}
_STAND_INS |= dict.fromkeys([*range(0x80, 0xA0), *range(0xD800, 0xE000)], 0xFFFD)

_EARLIEST_GREY, _LATEST_GREY = 105, 165  # both stay readable on a dark and on a light terminal


@dataclass(frozen=True)
class TokenMap:
    """One input as the model read it.

    `tokens` are the surface pieces in order (see `surface_tokens`); `dropped_at[i]` is the layer, counted from 1,
    at which token `i` was dropped, or None when it was read to the end; `note` is a remark such as "positive, .98";
    `answer` is [first, end) of the tokens that are the answer, where the answer is a piece of the text; `saliency` how much
    each token matters, where that was asked for.
    """

    title: str
    tokens: tuple[str, ...]
    dropped_at: tuple[int | None, ...]
    layers: int
    note: str = ""
    answer: tuple[int, int] | None = None
    saliency: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if len(self.tokens) != len(self.dropped_at):
            raise ThresherError(
                f"A token map needs one layer a token, got {len(self.tokens)} tokens and {len(self.dropped_at)} layers."
            )
        if self.saliency is not None and len(self.saliency) != len(self.tokens):
            raise ThresherError(f"A token map of {len(self.tokens)} tokens has {len(self.saliency)} saliencies.")
        if self.layers < 1 or any(d is not None and not 1 <= d <= self.layers for d in self.dropped_at):
            raise ThresherError(f"A token map's tokens are dropped at a layer from 1 to {self.layers}, or None (kept).")

        if self.answer is not None and not 0 <= self.answer[0] < self.answer[1] <= len(self.tokens):
            raise ThresherError(
                f"A token map's answer is [first, end) of its {len(self.tokens)} tokens, not {self.answer}."
            )

    @property
    def kept(self) -> int:
        """How many tokens were read to the end."""
        return sum(layer is None for layer in self.dropped_at)


@dataclass(frozen=True)
class Run:
    """Neighbouring tokens that went at the same layer, all inside the answer or all outside; `gap` is the white space
    before them, never shaded."""

    gap: str
    body: str
    dropped_at: int | None
    count: int
    answer: bool = False


def surface_tokens(
    text: str | Sequence[str],
    offsets: Sequence[tuple[int, int]],
    names: Sequence[str] | None = None,
    sequence_ids: Sequence[int | None] | None = None,
) -> list[str]:
    """The piece of text each token stands for, from a fast tokenizer's offsets.

    A piece carries whatever precedes it, so the pieces of a text join to that text, from its first token to its last.
    Special tokens, at (0, 0), show as their entry in `names` (the tokenizer's own tokens), set off by spaces, or as
    nothing without `names`. For a pair, give both texts and the encoding's `sequence_ids`.
    """
    texts = [text] if isinstance(text, str) else list(text)
    ids = sequence_ids
    if ids is None:
        if len(texts) > 1:
            raise ThresherError("The offsets of a pair are ambiguous; give the encoding's sequence_ids as well.")
        ids = [None if (start, end) == (0, 0) else 0 for start, end in offsets]
    if len(ids) != len(offsets) or (names is not None and len(names) != len(offsets)):
        raise ThresherError("Offsets, names and sequence_ids must describe the same tokens, one entry each.")

    pieces: list[str] = []
    reached: dict[int, int] = {}  # how far each text has been given out
    for i, (which, (start, end)) in enumerate(zip(ids, offsets, strict=True)):
        if which is None:
            name = names[i] if names is not None else ""
            before = " " if name and i > 0 else ""
            after = " " if name and i + 1 < len(ids) and ids[i + 1] is not None else ""
            pieces.append(before + name + after)
        else:
            # Byte-level pieces of one character share its offsets: the first shows it, the others are empty.
            begin = reached.get(which, start)
            pieces.append(texts[which][begin:end])
            reached[which] = max(begin, end)
    return pieces


def runs(token_map: TokenMap) -> list[Run]:
    """The map as stretches of text with one fate each, safe to print."""
    found: list[Run] = []
    carried = ""  # white space at a run's end belongs to the gap before the next
    first, end = token_map.answer or (0, 0)
    fates = [(layer, first <= i < end) for i, layer in enumerate(token_map.dropped_at)]
    for (layer, answer), group in groupby(zip(fates, token_map.tokens, strict=True), key=lambda pair: pair[0]):
        pieces = [piece for _, piece in group]
        text = carried + "".join(pieces).translate(_STAND_INS)
        body = text.strip()
        gap = text[: len(text) - len(text.lstrip())]
        carried = text[len(gap) + len(body) :]
        found.append(Run(gap, body, layer, len(pieces), answer))
    return found


def shade(dropped_at: int | None, layers: int) -> float:
    """How long a token was read: 0 when the first layer dropped it, 1 when it was kept."""
    return 1.0 if dropped_at is None else (dropped_at - 1) / layers


def to_plain(token_map: TokenMap) -> str:
    """The map without colours: kept words as they are, `[2:words]` for those dropped at layer 2, the answer in `«»`."""
    parts, inside = [], False
    for run in runs(token_map):
        if inside and not run.answer:
            parts.append("»")
        parts.append(run.gap + ("«" if run.answer and not inside else ""))
        parts.append(run.body if run.dropped_at is None or not run.body else f"[{run.dropped_at}:{run.body}]")
        inside = run.answer
    return "".join([*parts, "»"] if inside else parts)


def _terminal_style(dropped_at: int | None, layers: int) -> str:
    if dropped_at is None:
        return "bold"
    grey = round(_EARLIEST_GREY + (_LATEST_GREY - _EARLIEST_GREY) * (dropped_at - 1) / max(layers - 1, 1))
    return f"rgb({grey},{grey},{grey})"


def to_terminal(token_map: TokenMap) -> Text:
    """The map for a rich console: kept tokens bold, dropped ones the dimmer the earlier they went, the answer underlined."""
    with needs("rich"):
        from rich.text import Text
    text = Text()
    for run in runs(token_map):
        text.append(run.gap)
        text.append(run.body, _terminal_style(run.dropped_at, token_map.layers) + (" underline" if run.answer else ""))
    return text


def legend(layers: int, *, answer: bool = False) -> Text:
    """The key to `to_terminal` for a model of so many layers. answer: whether one is marked."""
    with needs("rich"):
        from rich.text import Text
    text = Text()
    text.append("kept to the end", _terminal_style(None, layers))
    text.append("   dropped at layer")
    for layer in range(1, layers + 1):
        text.append(" ")
        text.append(str(layer), _terminal_style(layer, layers))
    if answer:
        text.append("   ").append("the answer", "underline")
    return text


def to_html(maps: Sequence[TokenMap], title: str) -> str:
    """A self-contained page of token maps: no network, light and dark, with a slider for the layer reached."""
    return render_template("tokens.html.j2", title=title, maps=[map_view(one) for one in maps])


def map_view(token_map: TokenMap) -> dict[str, object]:
    """What the templates show of a map."""
    return {
        "title": token_map.title.translate(_STAND_INS),
        "note": token_map.note.translate(_STAND_INS),
        "layers": token_map.layers,
        "total": len(token_map.tokens),
        "kept": token_map.kept,
        "answer": token_map.answer is not None,
        "runs": [(run, f"{shade(run.dropped_at, token_map.layers):.2f}") for run in runs(token_map)],
        "plain": to_plain(token_map),
    }
