"""The ragged batch: every real token side by side, no padding anywhere."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from thresher.errors import DataError

Fill = Literal["carry", "mean", "zero"]


def being_exported() -> bool:
    """Whether torch is recording the operators that run, for a graph that must be right for every input."""
    return torch._C._get_tracing_state() is not None


def on_cuda(tensor: Tensor) -> bool:
    """Whether the host runs ahead of this tensor's device, so that reading a value back makes it wait."""
    return tensor.is_cuda


@dataclass(frozen=True)
class Layout:
    """Where the tokens of a ragged batch lie. Shared by every tensor of one length; replaced only when tokens drop.

    lengths: [B] int64, tokens each row has now (all >= 1).
    positions: [T] int64, column of each token in the padded input; rising within a row.
    segments: [T] int64, 0 for question or context, 1 for context or response.
    protected: [T] bool, tokens that no policy may drop.
    original: [B] int64, tokens each row had when it was packed.
    width: N, columns of the padded input.
    numbers: [B] int64, the row of the padded input that each row is, rising; None: they are all there.
    whole: rows of the padded input, where some have left.
    """

    lengths: Tensor
    positions: Tensor
    segments: Tensor
    protected: Tensor
    original: Tensor
    width: int
    numbers: Tensor | None = None
    whole: int = 0

    @property
    def single(self) -> bool:
        """Whether there is one row: then its tokens are the batch, and nothing has to be told apart. Also the case that is
        exported, which must not branch on data."""
        return len(self.lengths) == 1

    @property
    def height(self) -> int:
        """Rows of the padded input, those that left included."""
        return len(self.lengths) if self.numbers is None else self.whole

    @cached_property
    def sizes(self) -> list[int]:
        """`lengths` on the host."""
        if self.single:
            return [len(self.positions)]
        return self.lengths.tolist()  # type: ignore[no-any-return]

    @cached_property
    def rows(self) -> Tensor:
        """[T] int64, the row each token belongs to."""
        if self.single:
            return torch.zeros_like(self.positions)
        index = torch.arange(len(self.lengths), device=self.lengths.device)
        return torch.repeat_interleave(index, self.lengths, output_size=len(self.positions))

    @cached_property
    def flat(self) -> Tensor:
        """[T] int64, index of each token in the padded input flattened to B * N."""
        if self.numbers is not None:
            return self.spread(self.numbers) * self.width + self.positions
        if self.single:
            return self.positions
        return self.rows * self.width + self.positions

    @cached_property
    def cu_seqlens(self) -> Tensor:
        """[B + 1] int32, where each row starts; the last entry is T."""
        zero = self.lengths.new_zeros(1)
        return torch.cat([zero, self.lengths.cumsum(0)]).to(torch.int32)

    @cached_property
    def unbroken(self) -> bool:
        """Whether nothing was dropped and no row has a gap: then tokens lie as far apart here as in the input."""
        if self.lengths is not self.original:
            return False  # without asking the device
        ends = self.cu_seqlens.to(torch.int64)
        span = self.positions[ends[1:] - 1] - self.positions[ends[:-1]] + 1
        return bool((span == self.lengths).all())

    def knowing(self, sizes: list[int]) -> Layout:
        """This layout, told what `sizes` would have to fetch."""
        self.__dict__["sizes"] = sizes
        return self

    def count(self, mask: Tensor) -> Tensor:
        """[B] int64, the tokens of each row where `mask` ([T] bool) is True, counted where the tokens are."""
        ones = mask.to(torch.int64)
        if self.single:
            return ones.sum(0, keepdim=True)
        return ones.new_zeros(len(self.lengths)).index_add(0, self.rows, ones)

    def spread(self, values: Tensor) -> Tensor:
        """[B] values of rows for every token: [T], or what broadcasts to it."""
        return values if self.single else values[self.rows]

    def largest(self, values: Tensor) -> Tensor:
        """[B], the largest of each row's `values` ([T], none negative)."""
        if self.single:
            return values.amax(0, keepdim=True)
        return values.new_zeros(len(self.lengths)).scatter_reduce(0, self.rows, values, "amax", include_self=False)

    def staying(self, rows: Tensor, index: Tensor, sizes: list[int]) -> Layout:
        """The layout of the rows that stay. rows: [K] int64; index: their tokens; sizes: their lengths."""
        lengths = self.lengths[rows]
        layout = replace(
            self,
            lengths=lengths,
            original=lengths if self.original is self.lengths else self.original[rows],
            positions=self.positions[index],
            segments=self.segments[index],
            protected=self.protected[index],
            numbers=rows if self.numbers is None else self.numbers[rows],
            whole=self.height,
        )
        return layout.knowing(sizes)

    def select(self, index: Tensor, lengths: Tensor | None = None) -> Layout:
        """The layout of the tokens at `index` ([K] int64, rising). lengths: [B], how many they are, if that is known."""
        if lengths is None:
            lengths = _count(index) if self.single else torch.bincount(self.rows[index], minlength=len(self.lengths))
        return replace(
            self,
            lengths=lengths,
            positions=self.positions[index],
            segments=self.segments[index],
            protected=self.protected[index],
        )


def _count(tokens: Tensor) -> Tensor:
    """[1] int64, how many there are: a tensor also while a graph is traced, where len() would be a constant."""
    if on_cuda(tokens):
        return torch.full((1,), len(tokens), device=tokens.device)  # copying a number there would wait
    return torch._shape_as_tensor(tokens)[:1].to(tokens.device)


def _places(mask: Tensor, count: int | None) -> Tensor:
    """[count] int64, where `mask` is True, rising. count: how often; None where counting costs no wait."""
    found = mask.nonzero() if count is None else torch.nonzero_static(mask, size=count)
    return found.squeeze(1)


@dataclass(frozen=True)
class PackedTokens:
    """The one currency between engine and policies.

    hidden: [T, D].
    layout: where the T tokens lie.
    log_weight: [T] added to every attention logit on that key, or None. Soft removal is a negative number here.
    alive: [T] bool or None. None means that a drop is physical. A tensor means that drops are simulated: the
        token stays in place, invisible as a key and ignored as a query (the path that gradients and tests compare).
    departed: states of dropped tokens with their flat index, when `carry` asks for them at the end.
    frozen: [T] bool or None, tokens that are still attended to and change no more.
    """

    hidden: Tensor
    layout: Layout
    log_weight: Tensor | None = None
    alive: Tensor | None = None
    carry: bool = False
    departed: tuple[tuple[Tensor, Tensor], ...] = ()
    frozen: Tensor | None = None

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
        sizes: list[int] | None = None
        if mask is None:
            index = torch.arange(batch * width, device=hidden.device)
            if on_cuda(hidden):
                lengths, sizes = index.new_full((batch,), width), [width] * batch
            else:
                lengths = torch._shape_as_tensor(hidden)[1:2].to(hidden.device).expand(batch)
        else:
            mask = mask.to(torch.bool)
            lengths = mask.sum(1)
            if on_cuda(mask):
                sizes = lengths.tolist()  # the one time that packing makes the host wait
            if batch and not (bool(lengths.all()) if sizes is None else all(sizes)):
                row = int((lengths == 0).nonzero()[0, 0])
                raise DataError(f"Row {row} of the batch is all padding (no attention-mask entry is 1); leave it out.")
            index = _places(mask.reshape(-1), None if sizes is None else sum(sizes))
        if batch == 1:
            first = index == index[0]
        else:
            first = torch.zeros_like(index, dtype=torch.bool)
            first[(lengths.cumsum(0) - lengths)] = True
        every = mask is None or len(index) == batch * width
        pick = lambda x: x.reshape(-1) if every else x.reshape(-1)[index]  # noqa: E731
        layout = Layout(
            lengths=lengths,
            positions=index if batch == 1 else index % width,
            segments=pick(segments).to(torch.int64) if segments is not None else torch.zeros_like(index),
            protected=first if protected is None else first | pick(protected),
            original=lengths,
            width=width,
        )
        layout = layout if sizes is None else layout.knowing(sizes)
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
        counts, sizes = None, None
        if on_cuda(mask):
            counts = self.layout.count(mask)
            sizes = counts.tolist()  # the one time that a drop makes the host wait
        index = _places(mask, None if sizes is None else sum(sizes))
        if len(index) == len(mask) and not being_exported():
            return self
        layout = self.layout.select(index, counts)
        layout = layout if sizes is None else layout.knowing(sizes)
        departed = self.departed
        if self.carry:
            gone = _places(~mask, None if sizes is None else len(mask) - len(index))
            departed = (*departed, (self.hidden[gone], self.layout.flat[gone]))
        return replace(
            self,
            hidden=self.hidden[index],
            layout=layout,
            log_weight=None if self.log_weight is None else self.log_weight[index],
            frozen=None if self.frozen is None else self.frozen[index],
            departed=departed,
        )

    def without(self, left: Tensor, gone: list[bool]) -> PackedTokens:
        """The tokens of the rows that stay: those that leave take theirs along, and are nothing at the end.

        left: [B] bool, the rows that leave; gone: the same on the host. At least one stays.
        """
        sizes = [size for size, leaves in zip(self.layout.sizes, gone, strict=True) if not leaves]
        rows = _places(~left, len(sizes))
        index = _places(self.layout.spread(~left), sum(sizes))
        return replace(
            self,
            hidden=self.hidden[index],
            layout=self.layout.staying(rows, index, sizes),
            log_weight=None if self.log_weight is None else self.log_weight[index],
            frozen=None if self.frozen is None else self.frozen[index],
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
        single, numbers = self.layout.single and self.layout.numbers is None, self.layout.numbers
        if single:
            lengths = _count(flat)
        elif self.departed and numbers is not None:  # some were dropped from rows that have left since
            numbers, lengths = None, flat.new_zeros(self.layout.height)
            lengths = lengths.index_add(0, flat // self.layout.width, torch.ones_like(flat))
        elif self.departed:
            lengths = self.layout.original  # whoever carries carries every dropped token
        elif self.alive is None:
            lengths = self.layout.lengths
        else:
            lengths = torch.bincount(flat // self.layout.width, minlength=len(self.layout.lengths))
        layout = replace(
            self.layout,
            lengths=lengths,
            positions=flat if single else flat % self.layout.width,
            segments=torch.zeros_like(flat),
            protected=torch.ones_like(flat, dtype=torch.bool),
            numbers=numbers,
        )
        return PackedTokens(hidden, layout)

    def restore(self, fill: Fill, mask: Tensor | None = None) -> Tensor:
        """Unpack to [B, N, D].

        fill: what a dropped position holds. "carry" its own last state, "mean" the mean of its row's kept tokens (so
        that a mean-pooling head averages the kept tokens only), "zero" nothing. Padding is zero, as is a row that left.
        mask: [B, N], the real tokens; None when there is no padding.
        """
        tokens = self.gather()
        layout, batch = tokens.layout, tokens.layout.height
        size = tokens.hidden.shape[-1]
        tracing = being_exported()  # a graph has one path: the longest
        if len(layout.positions) == batch * layout.width and not tracing:
            return tokens.hidden.view(batch, layout.width, size)
        if fill == "mean" and (tracing or _shorter(layout)):
            means = _row_means(tokens)
            if layout.numbers is not None:
                means = means.new_zeros(batch, size).index_copy(0, layout.numbers, means)
            out = means.unsqueeze(1).expand(batch, layout.width, size)
            if mask is not None:
                out = out * mask.unsqueeze(2).to(out.dtype)
            out = out.reshape(-1, size)
        else:
            out = tokens.hidden.new_zeros(batch * layout.width, size)
        out = out.index_copy(0, layout.flat, tokens.hidden)
        return out.view(batch, layout.width, size)


def _shorter(layout: Layout) -> bool:
    """Whether a row has fewer tokens than it was packed with; True also where telling would make the host wait for nothing."""
    if layout.lengths is layout.original:
        return False
    return on_cuda(layout.lengths) or not torch.equal(layout.lengths, layout.original)


def _row_means(tokens: PackedTokens) -> Tensor:
    """[B, D], the mean state of each row."""
    layout, hidden = tokens.layout, tokens.hidden
    if layout.single:
        return hidden.mean(0, keepdim=True)
    total = hidden.new_zeros(len(layout.lengths), hidden.shape[-1]).index_add(0, layout.rows, hidden)
    return total / layout.lengths.unsqueeze(1).to(total.dtype)
