"""The ragged batch: every real token side by side, no padding anywhere."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from thresher.errors import DataError

Fill = Literal["carry", "mean", "zero"]


@dataclass(frozen=True)
class Layout:
    """Where the tokens of a ragged batch lie. Shared by every tensor of one length; replaced only when tokens drop.

    lengths: [B] int64, tokens each row has now (all >= 1).
    positions: [T] int64, column of each token in the padded input; rising within a row.
    segments: [T] int64, 0 for question or context, 1 for context or response.
    protected: [T] bool, tokens that no policy may drop.
    original: [B] int64, tokens each row had when it was packed.
    width: N, columns of the padded input.
    """

    lengths: Tensor
    positions: Tensor
    segments: Tensor
    protected: Tensor
    original: Tensor
    width: int

    @cached_property
    def sizes(self) -> list[int]:
        """`lengths` on the host."""
        return self.lengths.tolist()  # type: ignore[no-any-return]

    @cached_property
    def rows(self) -> Tensor:
        """[T] int64, the row each token belongs to."""
        index = torch.arange(len(self.lengths), device=self.lengths.device)
        return torch.repeat_interleave(index, self.lengths, output_size=len(self.positions))

    @cached_property
    def flat(self) -> Tensor:
        """[T] int64, index of each token in the padded input flattened to B * N."""
        return self.rows * self.width + self.positions

    @cached_property
    def cu_seqlens(self) -> Tensor:
        """[B + 1] int32, where each row starts; the last entry is T."""
        zero = self.lengths.new_zeros(1)
        return torch.cat([zero, self.lengths.cumsum(0)]).to(torch.int32)

    def select(self, index: Tensor) -> Layout:
        """The layout of the tokens at `index` ([K] int64, rising)."""
        lengths = torch.bincount(self.rows[index], minlength=len(self.lengths))
        return replace(
            self,
            lengths=lengths,
            positions=self.positions[index],
            segments=self.segments[index],
            protected=self.protected[index],
        )


@dataclass(frozen=True)
class PackedTokens:
    """The one currency between engine and policies.

    hidden: [T, D].
    layout: where the T tokens lie.
    log_weight: [T] added to every attention logit on that key, or None. Soft removal is a negative number here.
    alive: [T] bool or None. None means that a drop is physical. A tensor means that drops are simulated: the
        token stays in place, invisible as a key and ignored as a query (the path that gradients and tests compare).
    departed: states of dropped tokens with their flat index, when `carry` asks for them at the end.
    """

    hidden: Tensor
    layout: Layout
    log_weight: Tensor | None = None
    alive: Tensor | None = None
    carry: bool = False
    departed: tuple[tuple[Tensor, Tensor], ...] = ()

    @classmethod
    def pack(
        cls,
        hidden: Tensor,
        mask: Tensor | None = None,
        *,
        segments: Tensor | None = None,
        protected: Tensor | None = None,
        carry: bool = False,
        simulated: bool = False,
    ) -> PackedTokens:
        """Pack a padded batch.

        hidden: [B, N, D]; mask, segments, protected: [B, N], nonzero mask = real token. Padding may be on either side.
        The first real token of every row is protected whatever `protected` says.
        Raises DataError when a row has no real token.
        """
        batch, width, size = hidden.shape
        if mask is None:
            mask = hidden.new_ones(batch, width, dtype=torch.bool)
        mask = mask.to(torch.bool)
        lengths = mask.sum(1)
        if batch and not bool(lengths.all()):
            row = int((lengths == 0).nonzero()[0, 0])
            raise DataError(f"Row {row} of the batch is all padding (no attention-mask entry is 1); leave it out.")
        index = mask.reshape(-1).nonzero().squeeze(1)
        first = index.new_zeros(len(index), dtype=torch.bool)
        first[(lengths.cumsum(0) - lengths)] = True
        pick = lambda x: x.reshape(-1)[index]  # noqa: E731
        layout = Layout(
            lengths=lengths,
            positions=index % width,
            segments=pick(segments).to(torch.int64) if segments is not None else torch.zeros_like(index),
            protected=first if protected is None else first | pick(protected),
            original=lengths,
            width=width,
        )
        every = len(index) == batch * width
        packed = hidden.reshape(-1, size) if every else hidden.reshape(-1, size)[index]
        alive = torch.ones_like(first) if simulated else None
        return cls(packed, layout, alive=alive, carry=carry)

    @property
    def lengths(self) -> Tensor:
        """[B] int64, tokens of each row that are still read."""
        if self.alive is None:
            return self.layout.lengths
        return torch.bincount(self.layout.rows[self.alive], minlength=len(self.layout.lengths))

    @property
    def positions(self) -> Tensor:
        return self.layout.positions

    @property
    def segments(self) -> Tensor:
        return self.layout.segments

    def with_hidden(self, hidden: Tensor) -> PackedTokens:
        """The same tokens with new states [T, D]."""
        return replace(self, hidden=hidden)

    def keep(self, mask: Tensor) -> PackedTokens:
        """Drop every token where `mask` ([T] bool) is False; protected tokens stay."""
        mask = mask | self.layout.protected
        if self.alive is not None:
            return self._silence(mask)
        index = mask.nonzero().squeeze(1)
        if len(index) == len(mask):
            return self
        departed = self.departed
        if self.carry:
            gone = (~mask).nonzero().squeeze(1)
            departed = (*departed, (self.hidden[gone], self.layout.flat[gone]))
        return replace(
            self,
            hidden=self.hidden[index],
            layout=self.layout.select(index),
            log_weight=None if self.log_weight is None else self.log_weight[index],
            departed=departed,
        )

    def _silence(self, mask: Tensor) -> PackedTokens:
        assert self.alive is not None
        gone = (self.alive & ~mask).nonzero().squeeze(1)
        departed = self.departed
        if self.carry and len(gone):
            departed = (*departed, (self.hidden[gone], self.layout.flat[gone]))
        weight = self.hidden.new_zeros(len(mask)) if self.log_weight is None else self.log_weight
        weight = weight.masked_fill(~mask, float("-inf"))
        return replace(self, alive=self.alive & mask, log_weight=weight, departed=departed)

    def gather(self) -> PackedTokens:
        """Kept and carried tokens together again in their original order, ready for whatever reads every token."""
        hidden, flat = self.hidden, self.layout.flat
        if self.alive is not None:
            index = self.alive.nonzero().squeeze(1)
            hidden, flat = hidden[index], flat[index]
        if self.departed:
            hidden = torch.cat([hidden, *(h for h, _ in self.departed)])
            flat = torch.cat([flat, *(f for _, f in self.departed)])
            order = flat.argsort()
            hidden, flat = hidden[order], flat[order]
        rows = flat // self.layout.width
        layout = replace(
            self.layout,
            lengths=torch.bincount(rows, minlength=len(self.layout.lengths)),
            positions=flat % self.layout.width,
            segments=torch.zeros_like(flat),
            protected=torch.ones_like(flat, dtype=torch.bool),
        )
        return PackedTokens(hidden, layout)

    def restore(self, fill: Fill, mask: Tensor | None = None) -> Tensor:
        """Unpack to [B, N, D].

        fill: what a dropped position holds. "carry" its own last state, "mean" the mean of its row's kept tokens (so
        that a mean-pooling head averages the kept tokens only), "zero" nothing. Padding is zero.
        mask: [B, N], the real tokens; needed by "mean".
        """
        tokens = self.gather()
        layout, batch = tokens.layout, len(tokens.layout.lengths)
        size = tokens.hidden.shape[-1]
        if len(layout.positions) == batch * layout.width:
            return tokens.hidden.view(batch, layout.width, size)
        if fill == "mean" and mask is not None and not torch.equal(layout.lengths, layout.original):
            total = tokens.hidden.new_zeros(batch, size).index_add(0, layout.rows, tokens.hidden)
            mean = total / layout.lengths.unsqueeze(1).to(total.dtype)
            out = (mean.unsqueeze(1) * mask.unsqueeze(2).to(mean.dtype)).reshape(-1, size)
        else:
            out = tokens.hidden.new_zeros(batch * layout.width, size)
        out = out.index_copy(0, layout.flat, tokens.hidden)
        return out.view(batch, layout.width, size)
