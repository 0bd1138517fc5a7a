"""The state of one forward pass: the tokens from layer to layer, what the policy did to them, and the rows that left."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from thresher.backbones import Entrance
from thresher.evidence import NO_EVIDENCE, NOTHING, Evidence, Wanted
from thresher.exits import Exit
from thresher.frozen import Asking
from thresher.leaving import Leaving, leaving_by
from thresher.outputs import Edits
from thresher.packed import PackedTokens, being_exported
from thresher.policy import Point, Policy, Trace, new_trace, retained
from thresher.timing import mark


class Pass:
    """Made when the encoder is called, dropped when it returns; never shared by threads.

    policy, exit: None where nothing is dropped and nobody leaves. edits: where the answers of rows that leave go.
    beside: what the last layer to run returned after its states, if it returned a tuple.
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
        self.beside: tuple[Any, ...] | None = None
        self._leaving: Leaving | None = None

    @property
    def over(self) -> bool:
        """Whether every row has left, so that the layers to come have nothing to do."""
        return self._leaving is not None and self._leaving.over

    @property
    def asking(self) -> Asking | None:
        """The tokens that the next layer is for, where it is not for all."""
        return None if self._leaving is None else self._leaving.asking

    def begin_layer(self, hidden: Tensor) -> PackedTokens:
        """hidden: [B, N, D] at the first layer, [1, T, D] later."""
        self.layer += 1
        mark("norms" if self.tokens is not None else "embed")
        tokens = self.pack(hidden) if self.tokens is None else self.tokens.with_hidden(hidden.squeeze(0))
        self.tokens = tokens
        self.evidence = NO_EVIDENCE
        tokens = self._entered = self.act(Point.BEFORE_LAYER, tokens)
        self.wanted = self.policy.wants(self.layer) if self.policy else NOTHING
        self._reads_attention = self._reads_feed_forward = self._sizes(tokens)
        return tokens

    def pack(self, hidden: Tensor) -> PackedTokens:
        """The tokens as they come to the first layer. hidden: [B, N, D]."""
        tokens = PackedTokens.pack(
            hidden,
            self.mask,
            segments=self.segments,
            protected=self.protected,
            carry=self.carry and self.policy is not None,
            simulated=self.simulated,
        )
        trace = self.trace
        trace.original = tokens.layout.sizes
        trace.exited_at = [self.layers] * len(trace.original)
        if self.exit is not None:
            assert self.edits is not None
            self._leaving = leaving_by(self.exit, self.edits, trace, simulated=self.simulated)
        if trace.record:
            trace.mask = hidden.new_ones(hidden.shape[:2]) if self.mask is None else self.mask
        mark("pack")
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
        tokens = self.act(Point.AFTER_ATTENTION, self.tokens.with_hidden(hidden.squeeze(0)))
        self._reads_feed_forward = self._sizes(tokens)
        return tokens

    def end_layer(self, hidden: Tensor, *, also_after_attention: bool) -> PackedTokens:
        assert self.tokens is not None
        if self.layer in self._skip:  # computed and thrown away: only training leaves layers out
            self.tokens, reads = self._entered, [0] * len(self._reads_attention)
            self.trace.reads.append((reads, reads))
            return self.tokens
        tokens = self.tokens.with_hidden(hidden.squeeze(0))
        if tokens.frozen is not None and self.asking is None:  # the layer has renewed them too
            tokens = tokens.with_hidden(torch.where(tokens.frozen.unsqueeze(1), self._entered.hidden, tokens.hidden))
        if also_after_attention:
            tokens = self.act(Point.AFTER_ATTENTION, tokens)
        tokens = self.act(Point.AFTER_LAYER, tokens)
        if self._exporting:
            self.trace.kept.append(tokens.positions)
        leaving = self._leaving
        active = None if leaving is None else leaving.active
        self.trace.reads.append((self._reads_attention, active or self._reads_feed_forward))
        if leaving is not None:
            leaving.layer_ran(self._reads_attention)
            if self.layer < self.layers:
                tokens = self.tokens = leaving.after_layer(self.layer, tokens)
                mark("select")
        return tokens

    def skip_layer(self) -> None:
        """A layer that nobody is left to run."""
        self.layer += 1
        nothing = [0] * len(self.trace.original)
        self.trace.reads.append((nothing, nothing))
        if self._leaving is not None:
            self._leaving.layer_skipped(last=self.layer == self.layers)

    def end(self) -> None:
        """After the last layer: what the head's answers have to be changed by."""
        policy, tokens = self.policy, self.tokens
        if self.edits is None or policy is None or tokens is None:
            return
        if not policy.dropped_may_answer and tokens.departed:
            self.edits.silent.append(torch.cat([flat for _, flat in tokens.departed]))

    def _sizes(self, tokens: PackedTokens) -> list[int]:
        """Tokens of each row of the input that are still read: none of a row that left."""
        if self._leaving is not None:
            return self._leaving.sizes(tokens)
        return tokens.lengths.tolist() if self.simulated else tokens.layout.sizes

    def _note_dropped(self, before: PackedTokens, after: PackedTokens) -> None:
        flat = before.layout.flat if before.alive is None else before.layout.flat[before.alive]
        left = after.layout.flat if after.alive is None else after.layout.flat[after.alive]
        dropped = flat[~torch.isin(flat, left)]
        if self._leaving is not None and self._leaving.gone:
            gone = torch.tensor(sorted(self._leaving.gone), device=dropped.device)
            dropped = dropped[~torch.isin(dropped // before.layout.width, gone)]
        self.trace.dropped.append((self.layer, dropped))


__all__ = ["Pass"]
