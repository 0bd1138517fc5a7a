"""The rows that leave one forward pass early, and the tokens that freeze in it: what an exit's decisions do to the tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from thresher.exits import Exit, SettledStatesExit, TokEEExit
from thresher.exits.base import Memory
from thresher.frozen import Asking
from thresher.outputs import Edits, Handed
from thresher.packed import PackedTokens
from thresher.policy import Trace


class Leaving:
    """Made when the rows of a pass are packed; never shared by threads.

    edits: where the answers of rows that leave go. over: whether every row has left, so that the layers to come have nothing to
    do. asking: the tokens that the next layer is for, where it is not for all. active: of each row of the input the tokens that
    are not frozen; None: all. gone: rows that left in a simulated pass, where their tokens stay.
    """

    def __init__(self, exit: Exit[Any], edits: Edits, trace: Trace, *, simulated: bool) -> None:
        self.exit, self.edits, self.trace, self.simulated = exit, edits, trace, simulated
        self.over = False
        self.asking: Asking | None = None
        self.active: list[int] | None = None
        self.gone: set[int] = set()
        self._there = list(range(len(trace.original)))  # the rows still there, those of the tokens
        self._remembered: Memory | None = None

    def after_layer(self, layer: int, tokens: PackedTokens) -> PackedTokens:
        """The tokens of the rows that stay after this layer; the answers of the others are noted."""
        exit, trace = self.exit, self.trace
        if not exit.asks(layer):
            return self.passed(tokens)
        said = exit.says(layer, tokens)
        trace.asked.append(self._whole() if exit.config.answers_dropped else self.sizes(tokens))
        if exit.mode != "leave":
            trace.branches.append(said)
            return tokens
        leaving, self._remembered = exit.decide(layer, said, self._remembered)
        if leaving is None:
            return tokens
        flags: list[bool] = leaving.tolist()  # the one time that leaving makes the host wait
        out = [row for row, leaves in zip(self._there, flags, strict=True) if leaves and row not in self.gone]
        if not out:
            return tokens
        for row in out:
            trace.exited_at[row] = layer
        if self.simulated:
            self.gone.update(out)
            index = torch.tensor(out, device=said.device)
        elif len(out) == len(flags):
            self.over = True
            index = torch.arange(len(out), device=said.device)
        else:
            index = torch.nonzero_static(leaving, size=len(out)).squeeze(1)
        places = out if self.simulated else [place for place, leaves in enumerate(flags) if leaves]
        self.answer(layer, tokens, places, index, said)
        if self.simulated or self.over:
            return tokens
        if self._remembered is not None:
            staying = torch.nonzero_static(~leaving, size=len(flags) - len(out)).squeeze(1)
            self._remembered = tuple(one[staying] for one in self._remembered)
        return self._without(tokens, leaving, flags)

    def passed(self, tokens: PackedTokens) -> PackedTokens:
        """The tokens as they are, after a layer at which nobody is asked."""
        self.trace.asked.append([0] * len(self.trace.original))
        return tokens

    def answer(self, layer: int, tokens: PackedTokens, places: list[int], index: Tensor, said: Tensor) -> None:
        """Note what rows that leave after `layer` answer. places: those of the rows in `tokens`; index: the same, [K] int64.
        said: of every row of `tokens`."""
        self.edits.left.append((self._rows_at(tokens, index), said[index]))

    def _rows_at(self, tokens: PackedTokens, index: Tensor) -> Tensor:
        """[K], the rows of the input at some places in `tokens`."""
        numbers = tokens.layout.numbers
        return index if numbers is None else numbers[index]

    def layer_ran(self, read: list[int]) -> None:
        """Note which tokens asked in a layer. read: of each row of the input the tokens that were attended to."""

    def layer_skipped(self, *, last: bool) -> None:
        """Note that nobody was left to run a layer."""
        if not last:
            self.trace.asked.append([0] * len(self.trace.original))

    def sizes(self, tokens: PackedTokens) -> list[int]:
        """Tokens of each row of the input that are still read: none of a row that left."""
        return self._of_input(tokens.lengths.tolist() if self.simulated else tokens.layout.sizes)

    def _whole(self) -> list[int]:
        """Tokens that each row came with: none of a row that left."""
        return self._of_input([self.trace.original[row] for row in self._there])

    def _of_input(self, sizes: list[int]) -> list[int]:
        """What is known of the rows still there, for each row of the input: 0 of a row that left."""
        if len(sizes) == len(self.trace.original) and not self.gone:
            return sizes
        every = [0] * len(self.trace.original)
        for row, size in zip(self._there, sizes, strict=True):
            every[row] = 0 if row in self.gone else size
        return every

    def _without(self, tokens: PackedTokens, leaving: Tensor, flags: list[bool]) -> PackedTokens:
        self._there = [row for row, leaves in zip(self._there, flags, strict=True) if not leaves]
        return tokens.without(leaving, flags)


class Handing(Leaving):
    """Rows of an encoder without a head: what they answer are their tokens' states."""

    exit: SettledStatesExit

    def answer(self, layer: int, tokens: PackedTokens, places: list[int], index: Tensor, said: Tensor) -> None:
        layout, rows = tokens.layout, self._rows_at(tokens, index)
        leave = torch.zeros_like(layout.lengths, dtype=torch.bool).index_fill(0, index, True)
        theirs = layout.spread(leave).expand(len(layout.positions))
        if tokens.alive is not None:
            found = (theirs & tokens.alive).nonzero().squeeze(1)
        else:
            found = torch.nonzero_static(theirs, size=sum(layout.sizes[place] for place in places)).squeeze(1)
        states = tokens.hidden[found]
        flat = layout.flat[found]
        self.edits.handed.append(Handed(rows, flat, self.exit.changed(layer, states)))
        if self.trace.record:
            self.trace.handed.append((layer, rows, flat, states))


class Freezing(Leaving):
    """TokEE's: tokens freeze one by one, and a row of which all are frozen leaves."""

    exit: TokEEExit

    def after_layer(self, layer: int, tokens: PackedTokens) -> PackedTokens:
        """The tokens, with those frozen that are certain after this layer, and without the rows of which all are; the answers
        are noted."""
        exit, trace = self.exit, self.trace
        if not exit.asks(layer):
            return self.passed(tokens)
        if exit.mode == "record":
            return super().after_layer(layer, tokens)
        layout, frozen = tokens.layout, tokens.frozen
        if exit.mode == "sample":
            trace.branches.append(exit.says(layer, tokens))
        trace.asked.append(self.active or self.sizes(tokens))
        if frozen is None:
            frozen = torch.zeros_like(layout.protected)
            active = torch.arange(len(layout.positions), device=layout.flat.device)
        elif self.asking is not None:
            active = self.asking.index
        else:
            active = torch.nonzero_static(~frozen, size=sum(self.active or ())).squeeze(1)
        said = exit.speak(layer, tokens.hidden[active])
        stops, self._remembered = exit.freeze(said.detach(), layout, active, self._remembered)
        frozen = frozen.index_copy(0, active, stops)
        # The one time that freezing makes the host wait.
        counts: list[int] = [len(active) - int(stops.sum())] if layout.single else layout.count(~frozen).tolist()
        stopped = len(active) - sum(counts)
        if not stopped:
            return tokens
        settled = torch.nonzero_static(stops, size=stopped).squeeze(1)
        flat = layout.flat[active[settled]]
        if trace.record:
            trace.frozen.append((layer, flat))
        self.active = self._of_input(counts)
        tokens = replace(tokens, frozen=frozen)
        if exit.mode == "sample":  # the head answers for frozen tokens too, and learns to
            return tokens
        self.edits.frozen.append((flat, said[settled]))
        return self._without_settled(layer, tokens, counts)

    def layer_ran(self, read: list[int]) -> None:
        self.trace.asking.append(self.active or read)

    def layer_skipped(self, *, last: bool) -> None:
        super().layer_skipped(last=last)
        self.trace.asking.append([0] * len(self.trace.original))

    def _without_settled(self, layer: int, tokens: PackedTokens, counts: list[int]) -> PackedTokens:
        """The tokens of the rows that still ask. counts: of each row the tokens that are not frozen."""
        settled = [count == 0 for count in counts]
        for row, leaves in zip(self._there, settled, strict=True):
            if leaves and row not in self.gone:
                self.trace.exited_at[row] = layer
                self.gone.update([row] if self.simulated else [])
        self.over = all(settled) and not self.simulated
        if self.simulated or self.over:
            return tokens
        if any(settled):
            tokens = self._without(tokens, torch.tensor(settled, device=tokens.hidden.device), settled)
        assert tokens.frozen is not None
        asking = [count for count in counts if count]
        self.asking = Asking(torch.nonzero_static(~tokens.frozen, size=sum(asking)).squeeze(1), asking)
        return tokens


def leaving_by(exit: Exit[Any], edits: Edits, trace: Trace, *, simulated: bool) -> Leaving:
    """What keeps the rows of one pass, packed just now, for this exit."""
    kind: type[Leaving] = Leaving
    if isinstance(exit, TokEEExit):
        kind = Freezing
    elif isinstance(exit, SettledStatesExit):
        kind = Handing
    return kind(exit, edits, trace, simulated=simulated)


__all__ = ["Freezing", "Handing", "Leaving", "leaving_by"]
