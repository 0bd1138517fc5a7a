"""Token maps: a text with every word marked by the layer that stopped reading it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from thresher.errors import ThresherError
from thresher.report._support import needs, render_template
from thresher.report.console import MISSING, percent

if TYPE_CHECKING:
    from rich.text import Text

# Control characters would be obeyed by a terminal and lone surrogates refused by it: show a stand-in for both.
_STAND_INS: dict[int, int] = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"}
_STAND_INS |= {ord("\r"): ord(" "), 0x7F: 0x2421}
_STAND_INS |= dict.fromkeys([*range(0x80, 0xA0), *range(0xD800, 0xE000)], 0xFFFD)

_EARLIEST_GREY, _LATEST_GREY = 105, 165  # both stay readable on a dark and on a light terminal
SHOWN_TOKENS = 12  # of those that matter most


@dataclass(frozen=True)
class TokenMap:
    """One input as the model read it.

    `tokens` are the surface pieces in order (see `surface_tokens`); `dropped_at[i]` is the layer, counted from 1,
    at which token `i` was dropped, or None when it was read to the end; `note` is a remark such as "positive, .98";
    `answer` is [first, end) of the tokens that are the answer, where the answer is a piece of the text; `saliency` how much
    each token matters, where that was asked for, and `saliency_by` the name of the measure.

    Of a model with an exit, `exited_at` is the layer after which the row left, `layers` where it stayed. Where tokens
    freeze, `frozen_at[i]` is the layer after which the answer to token `i` was settled, or None: others read it on.
    """

    title: str
    tokens: tuple[str, ...]
    dropped_at: tuple[int | None, ...]
    layers: int
    note: str = ""
    answer: tuple[int, int] | None = None
    saliency: tuple[float, ...] | None = None
    saliency_by: str = ""
    exited_at: int | None = None
    frozen_at: tuple[int | None, ...] | None = None

    def __post_init__(self) -> None:
        if len(self.tokens) != len(self.dropped_at):
            raise ThresherError(
                f"A token map needs one layer a token, got {len(self.tokens)} tokens and {len(self.dropped_at)} layers."
            )
        if self.saliency is not None and len(self.saliency) != len(self.tokens):
            raise ThresherError(f"A token map of {len(self.tokens)} tokens has {len(self.saliency)} saliencies.")
        if self.layers < 1 or any(d is not None and not 1 <= d <= self.layers for d in self.dropped_at):
            raise ThresherError(f"A token map's tokens are dropped at a layer from 1 to {self.layers}, or None (kept).")
        if self.exited_at is not None and not 1 <= self.exited_at <= self.layers:
            raise ThresherError(
                f"A token map's row leaves after a layer from 1 to {self.layers}, not {self.exited_at}."
            )
        if self.frozen_at is not None and (
            len(self.frozen_at) != len(self.tokens)
            or any(f is not None and not 1 <= f <= self.layers for f in self.frozen_at)
        ):
            raise ThresherError(
                f"A token map's {len(self.tokens)} tokens each freeze after a layer from 1 to {self.layers}, or None (never)."
            )
        if self.answer is not None and not 0 <= self.answer[0] < self.answer[1] <= len(self.tokens):
            raise ThresherError(
                f"A token map's answer is [first, end) of its {len(self.tokens)} tokens, not {self.answer}."
            )

    @property
    def kept(self) -> int:
        """How many tokens were read to the end."""
        return sum(layer is None for layer in self.dropped_at)

    @property
    def left_early(self) -> bool:
        """Whether the row left before the last layer."""
        return self.exited_at is not None and self.exited_at < self.layers

    @property
    def remark(self) -> str:
        """How much of the row was read, and for how long, in words."""
        read = f"{self.kept} of {len(self.tokens)} tokens read"
        if self.left_early:
            said = f"{read} until the row left after layer {self.exited_at} of {self.layers}"
        else:
            said = f"{read} to the end" + (
                "" if self.exited_at is None else f", all {self.layers} layers; no early exit"
            )
        if self.frozen_at is None:
            return said
        layers = [layer for layer in self.frozen_at if layer is not None]
        counts = [f"{layers.count(layer)} after layer {layer}" for layer in sorted(set(layers))]
        return f"{said}; frozen: {', '.join(counts) or 'none'}"

    def most_salient(self) -> list[int]:
        """The numbers of the tokens that matter most, first the first; none without a saliency."""
        scores = self.saliency or ()
        return sorted(range(len(scores)), key=lambda i: -scores[i])[:SHOWN_TOKENS]


@dataclass(frozen=True)
class Run:
    """Neighbouring tokens with one fate (dropped, frozen, in the answer); `gap` is the white space before them, never shaded.

    parts: of each token the white space before it inside the run, what is shown of it, and its number.
    """

    gap: str
    body: str
    dropped_at: int | None
    count: int
    answer: bool = False
    frozen_at: int | None = None
    parts: tuple[tuple[str, str, int], ...] = ()


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
    carried = ""  # white space at a token's end belongs to the gap before the next
    first, end = token_map.answer or (0, 0)
    frozen = token_map.frozen_at or [None] * len(token_map.tokens)
    fates = [(token_map.dropped_at[i], frozen[i], first <= i < end) for i in range(len(token_map.tokens))]
    for (layer, settled, answer), group in groupby(range(len(fates)), key=fates.__getitem__):
        parts = []
        for number in group:
            text = carried + token_map.tokens[number].translate(_STAND_INS)
            body = text.strip()
            gap = text[: len(text) - len(text.lstrip())] if body else ""
            carried = text[len(gap) + len(body) :]
            parts.append((gap, body, number))
        lead = next((i for i, (_, body, _) in enumerate(parts) if body), 0)
        gap, body, number = parts[lead]
        parts[lead] = ("", body, number)
        whole = "".join(gap + body for gap, body, _ in parts)
        found.append(Run(gap, whole, layer, len(parts), answer, settled, tuple(parts)))
    return found


def shade(dropped_at: int | None, layers: int) -> float:
    """How long a token was read: 0 when the first layer dropped it, 1 when it was kept."""
    return 1.0 if dropped_at is None else (dropped_at - 1) / layers


def to_plain(token_map: TokenMap) -> str:
    """The map without colours: kept words as they are, `[2:words]` for those dropped at layer 2, `{2:words}` for those frozen
    after it, the answer in `«»`."""
    parts, inside = [], False
    for run in runs(token_map):
        if inside and not run.answer:
            parts.append("»")
        parts.append(run.gap + ("«" if run.answer and not inside else ""))
        body = run.body
        if body and run.frozen_at is not None:
            body = f"{{{run.frozen_at}:{body}}}"
        if body and run.dropped_at is not None:
            body = f"[{run.dropped_at}:{body}]"
        parts.append(body)
        inside = run.answer
    return "".join([*parts, "»"] if inside else parts)


def _terminal_style(dropped_at: int | None, layers: int, frozen_at: int | None = None) -> str:
    stopped = frozen_at if dropped_at is None else dropped_at
    if stopped is None:
        return "bold"
    grey = round(_EARLIEST_GREY + (_LATEST_GREY - _EARLIEST_GREY) * (stopped - 1) / max(layers - 1, 1))
    return f"rgb({grey},{grey},{grey})" + ("" if frozen_at is None else " italic")


def to_terminal(token_map: TokenMap) -> Text:
    """The map for a rich console: kept tokens bold, dropped ones the dimmer the earlier they went, frozen ones so in italics,
    the answer underlined."""
    with needs("rich"):
        from rich.text import Text
    text = Text()
    for run in runs(token_map):
        style = _terminal_style(run.dropped_at, token_map.layers, run.frozen_at)
        text.append(run.gap)
        text.append(run.body, style + (" underline" if run.answer else ""))
    return text


def legend(layers: int, *, answer: bool = False, frozen: bool = False) -> Text:
    """The key to `to_terminal` for a model of so many layers. answer: whether one is marked. frozen: whether tokens freeze."""
    with needs("rich"):
        from rich.text import Text
    text = Text()
    text.append("kept to the end", _terminal_style(None, layers))
    text.append("   dropped at layer")
    for layer in range(1, layers + 1):
        text.append(" ")
        text.append(str(layer), _terminal_style(layer, layers))
    if frozen:
        text.append("   ").append("frozen after that layer", "italic")
    if answer:
        text.append("   ").append("the answer", "underline")
    return text


def to_html(maps: Sequence[TokenMap], title: str) -> str:
    """A self-contained page of token maps: no network, light and dark, with a slider for the layer reached."""
    return render_template("tokens.html.j2", title=title, maps=[map_view(one) for one in maps])


def map_view(token_map: TokenMap) -> dict[str, object]:
    """What the templates show of a map."""
    stayed = 1.0 if token_map.exited_at is None else token_map.exited_at / token_map.layers
    shades = [
        stayed if (at := _stopped(run)) is None else min(stayed, shade(at, token_map.layers)) for run in runs(token_map)
    ]
    return {
        "title": token_map.title.translate(_STAND_INS),
        "note": token_map.note.translate(_STAND_INS),
        "remark": token_map.remark,
        "layers": token_map.layers,
        "total": len(token_map.tokens),
        "left": token_map.exited_at if token_map.left_early else None,
        "answer": token_map.answer is not None,
        "frozen": token_map.frozen_at is not None,
        "runs": [(run, f"{one:.2f}") for run, one in zip(runs(token_map), shades, strict=True)],
        "plain": to_plain(token_map),
        "saliency": None if token_map.saliency is None else _saliency_view(token_map),
    }


def _stopped(run: Run) -> int | None:
    """The layer from which on the run was not computed as before: dropped at it, or frozen just before it."""
    return run.dropped_at if run.frozen_at is None else run.frozen_at + 1


def _saliency_view(token_map: TokenMap) -> dict[str, object]:
    """Of each token its share and the height of its bar, from 0 to 1 for the largest; and a table of the largest."""
    assert token_map.saliency is not None
    most = max(token_map.saliency, default=0.0)
    return {
        "by": token_map.saliency_by.translate(_STAND_INS),
        "most": percent(most),
        "shares": [percent(one) for one in token_map.saliency],
        "bars": [f"{one / most if most > 0 else 0.0:.2f}" for one in token_map.saliency],
        "columns": saliency_columns(token_map),
        "rows": saliency_rows(token_map),
    }


def saliency_columns(token_map: TokenMap) -> tuple[str, ...]:
    """The head of `saliency_rows`."""
    return ("token", "share", "dropped at layer", *(() if token_map.frozen_at is None else ("frozen after layer",)))


def saliency_rows(token_map: TokenMap) -> list[tuple[str, ...]]:
    """The tokens that matter most, each with its share and the layer that dropped it; and where tokens freeze, the layer after
    which it did."""
    rows = []
    for i in token_map.most_salient():
        assert token_map.saliency is not None
        token = " ".join(token_map.tokens[i].translate(_STAND_INS).split())
        frozen = () if token_map.frozen_at is None else (str(token_map.frozen_at[i] or MISSING),)
        rows.append((token, percent(token_map.saliency[i]), str(token_map.dropped_at[i] or "kept"), *frozen))
    return rows
