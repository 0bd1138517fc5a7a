"""The state of one forward pass: the tokens from layer to layer, what the policy did to them, and the rows that left."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from thresher.backbones import Entrance
from thresher.evidence import NO_EVIDENCE, NOTHING, Evidence, Wanted
from thresher.exits import Exit, TokEEExit
from thresher.exits.base import Memory
from thresher.frozen import Asking
from thresher.outputs import Edits
from thresher.packed import PackedTokens, being_exported
from thresher.policy import Point, Policy, Trace, new_trace, retained
from thresher.timing import mark


class Pass:
    """Made when the encoder is called, dropped when it returns; never shared by threads.

    policy, exit: None where nothing is dropped and nobody leaves. edits: where the answers of rows that leave go.
    over: whether every row has left, so that the layers to come have nothing to do. asking: the tokens that the next layer is
    for, where it is not for all. beside: what the last layer to run returned after its states, if it returned a tuple.
    """

    def __init__(
        self,
        entrance: Entrance,
        policy: Policy[Any] | None,
        exit: Exit[Any] | None,
        edits: Edits | None,
        *,
        mask: Tensor | None,
        segments: Tensor | None,
        protected: Tensor | None,
        simulated: bool,
    ) -> None:
        self.policy, self.exit, self.edits = policy, exit, edits
        self.mask = mask
        self.segments = segments
        self.protected = protected
        self.layers = entrance.calls
        self.carry = entrance.fill == "carry"
        self.position_bias = None if entrance.position_bias is None else entrance.position_bias()
        self.simulated = simulated
        drawn = retained() if policy is not None else None
        self._skip = drawn.skip if drawn is not None else ()
        self._exporting = being_exported()
        self.trace: Trace = new_trace()
        self.layer = 0
        self.tokens: PackedTokens | None = None
        self.wanted: Wanted = NOTHING
        self.evidence: Evidence = NO_EVIDENCE
        self.over = False
        self.asking: Asking | None = None
        self._active: list[int] | None = None  # of each row of the input the tokens that are not frozen; None: all
        self.beside: tuple[Any, ...] | None = None
        self._remembered: Memory | None = None
        self._there: list[int] = []  # the rows still there, those of `tokens`
        self._gone: set[int] = set()  # rows that left in a simulated pass, where their tokens stay

    def begin_layer(self, hidden: Tensor) -> PackedTokens:
        """hidden: [B, N, D] at the first layer, [1, T, D] later."""
        self.layer += 1
        mark("norms" if self.tokens is not None else "embed")
        if self.tokens is None:
            tokens = PackedTokens.pack(
                hidden,
                self.mask,
                segments=self.segments,
                protected=self.protected,
                carry=self.carry and self.policy is not None,
                simulated=self.simulated,
            )
            self.trace.original = tokens.layout.sizes
            self.trace.exited_at = [self.layers] * len(tokens.layout.lengths)
            self._there = list(range(len(tokens.layout.lengths)))
            if self.trace.record:
                self.trace.mask = hidden.new_ones(hidden.shape[:2]) if self.mask is None else self.mask
            mark("pack")
        else:
            tokens = self.tokens.with_hidden(hidden[0])
        self.tokens = tokens
        self.evidence = NO_EVIDENCE
        tokens = self._entered = self.act(Point.BEFORE_LAYER, tokens)
        self.wanted = self.policy.wants(self.layer) if self.policy else NOTHING
        self._reads_attention = self._reads_feed_forward = self._sizes(tokens)
        return tokens

    def act(self, point: Point, tokens: PackedTokens) -> PackedTokens:
        if self.policy is not None:
            mark("norms")
            after = self.policy.act(point, self.layer, tokens, self.evidence, self.trace)
            if self.trace.record and after is not tokens:
                self._note_dropped(tokens, after)
            tokens = after
            mark("select")
        self.tokens = tokens
        return tokens

    def after_attention(self, hidden: Tensor) -> PackedTokens:
        assert self.tokens is not None
        tokens = self.act(Point.AFTER_ATTENTION, self.tokens.with_hidden(hidden[0]))
        self._reads_feed_forward = self._sizes(tokens)
        return tokens

    def end_layer(self, hidden: Tensor, *, also_after_attention: bool) -> PackedTokens:
        assert self.tokens is not None
        if self.layer in self._skip:  # computed and thrown away: only training leaves layers out
            self.tokens, reads = self._entered, [0] * len(self._reads_attention)
            self.trace.reads.append((reads, reads))
            return self.tokens
        tokens = self.tokens.with_hidden(hidden[0])
        if tokens.frozen is not None and self.asking is None:  # the layer has renewed them too
            tokens = tokens.with_hidden(torch.where(tokens.frozen.unsqueeze(1), self._entered.hidden, tokens.hidden))
        if also_after_attention:
            tokens = self.act(Point.AFTER_ATTENTION, tokens)
        tokens = self.act(Point.AFTER_LAYER, tokens)
        self.trace.reads.append((self._reads_attention, self._active or self._reads_feed_forward))
        if isinstance(self.exit, TokEEExit):
            self.trace.asking.append(self._active or self._reads_attention)
        if self._exporting:
            self.trace.kept.append(tokens.positions)
        if self.exit is not None and self.layer < self.layers:
            if isinstance(self.exit, TokEEExit) and self.exit.mode != "record":
                tokens = self.tokens = self._freeze(self.exit, tokens)
            else:
                tokens = self.tokens = self._leave(self.exit, tokens)
            mark("select")
        return tokens

    def skip_layer(self) -> None:
        """A layer that nobody is left to run."""
        self.layer += 1
        nothing = [0] * len(self.trace.original)
        self.trace.reads.append((nothing, nothing))
        if self.layer < self.layers:
            self.trace.asked.append(nothing)
        if isinstance(self.exit, TokEEExit):
            self.trace.asking.append(nothing)

    def end(self) -> None:
        """After the last layer: what the head's answers have to be changed by."""
        policy, tokens = self.policy, self.tokens
        if self.edits is None or policy is None or tokens is None:
            return
        if not policy.dropped_may_answer and tokens.departed:
            self.edits.silent.append(torch.cat([flat for _, flat in tokens.departed]))

    def _leave(self, exit: Exit[Any], tokens: PackedTokens) -> PackedTokens:
        """The tokens of the rows that stay after this layer; the answers of the others are noted."""
        said = exit.says(self.layer, tokens)
        self.trace.asked.append(self._whole() if exit.config.answers_dropped else self._sizes(tokens))
        if exit.mode != "leave":
            self.trace.branches.append(said)
            return tokens
        leaving, self._remembered = exit.decide(self.layer, said, self._remembered)
        if leaving is None:
            return tokens
        flags: list[bool] = leaving.tolist()  # the one time that leaving makes the host wait
        out = [row for row, leaves in zip(self._there, flags, strict=True) if leaves and row not in self._gone]
        if not out:
            return tokens
        for row in out:
            self.trace.exited_at[row] = self.layer
        assert self.edits is not None
        numbers = tokens.layout.numbers
        if self.simulated:
            self._gone.update(out)
            index = torch.tensor(out, device=said.device)
        elif len(out) == len(flags):
            self.over = True
            index = torch.arange(len(out), device=said.device)
        else:
            index = torch.nonzero_static(leaving, size=len(out)).squeeze(1)
        self.edits.left.append((index if numbers is None else numbers[index], said[index]))
        if self.simulated or self.over:
            return tokens
        if self._remembered is not None:
            staying = torch.nonzero_static(~leaving, size=len(flags) - len(out)).squeeze(1)
            self._remembered = tuple(one[staying] for one in self._remembered)
        self._there = [row for row, leaves in zip(self._there, flags, strict=True) if not leaves]
        return tokens.without(leaving, flags)

    def _freeze(self, exit: TokEEExit, tokens: PackedTokens) -> PackedTokens:
        """The tokens, with those frozen that are certain after this layer, and without the rows of which all are; the answers
        are noted."""
        layout, frozen = tokens.layout, tokens.frozen
        if exit.mode == "sample":
            self.trace.branches.append(exit.says(self.layer, tokens))
        self.trace.asked.append(self._active or self._sizes(tokens))
        if frozen is None:
            frozen, active = (
                torch.zeros_like(layout.protected),
                torch.arange(len(layout.positions), device=layout.flat.device),
            )
        else:
            active = torch.nonzero_static(~frozen, size=sum(self._active or ())).squeeze(1)
        said = exit.speak(self.layer, tokens.hidden[active])
        stops, self._remembered = exit.freeze(said.detach(), layout, active, self._remembered)
        frozen = frozen.index_copy(0, active, stops)
        counts: list[int] = layout.count(~frozen).tolist()  # the one time that freezing makes the host wait
        stopped = len(active) - sum(counts)
        if not stopped:
            return tokens
        settled = torch.nonzero_static(stops, size=stopped).squeeze(1)
        flat = layout.flat[active[settled]]
        if self.trace.record:
            self.trace.frozen.append((self.layer, flat))
        self._active = self._of_input(counts)
        tokens = replace(tokens, frozen=frozen)
        if exit.mode == "sample":  # the head answers for frozen tokens too, and learns to
            return tokens
        assert self.edits is not None
        self.edits.frozen.append((flat, said[settled]))
        return self._without_settled(tokens, [count == 0 for count in counts], [count for count in counts if count])

    def _without_settled(self, tokens: PackedTokens, gone: list[bool], asking: list[int]) -> PackedTokens:
        """The tokens of the rows that are not `gone`, all their tokens being frozen. asking: active tokens of those rows."""
        for row, leaves in zip(self._there, gone, strict=True):
            if leaves and row not in self._gone:
                self.trace.exited_at[row] = self.layer
                self._gone.update([row] if self.simulated else [])
        self.over = not asking and not self.simulated
        if self.simulated or self.over:
            return tokens
        if any(gone):
            tokens = tokens.without(torch.tensor(gone, device=tokens.hidden.device), gone)
            self._there = [row for row, leaves in zip(self._there, gone, strict=True) if not leaves]
        assert tokens.frozen is not None
        self.asking = Asking(torch.nonzero_static(~tokens.frozen, size=sum(asking)).squeeze(1), asking)
        return tokens

    def _sizes(self, tokens: PackedTokens) -> list[int]:
        """Tokens of each row of the input that are still read: none of a row that left."""
        return self._of_input(tokens.lengths.tolist() if self.simulated else tokens.layout.sizes)

    def _whole(self) -> list[int]:
        """Tokens that each row came with: none of a row that left."""
        return self._of_input([self.trace.original[row] for row in self._there])

    def _of_input(self, sizes: list[int]) -> list[int]:
        """What is known of the rows still there, for each row of the input: 0 of a row that left."""
        if len(sizes) == len(self.trace.original) and not self._gone:
            return sizes
        every = [0] * len(self.trace.original)
        for row, size in zip(self._there, sizes, strict=True):
            every[row] = 0 if row in self._gone else size
        return every

    def _note_dropped(self, before: PackedTokens, after: PackedTokens) -> None:
        flat = before.layout.flat if before.alive is None else before.layout.flat[before.alive]
        left = after.layout.flat if after.alive is None else after.layout.flat[after.alive]
        dropped = flat[~torch.isin(flat, left)]
        if self._gone:
            gone = torch.tensor(sorted(self._gone), device=dropped.device)
            dropped = dropped[~torch.isin(dropped // before.layout.width, gone)]
        self.trace.dropped.append((self.layer, dropped))


__all__ = ["Pass"]
