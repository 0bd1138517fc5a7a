"""The small networks that speak after a layer. Each takes PackedTokens and sees nothing but a row's own tokens."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thresher.linears import Derived, TanhLinear, applies
from thresher.packed import Layout, PackedTokens

NO_ANSWER = -1e4  # far below any logit; yet sums and losses of it stay finite, in half precision too


def first_states(tokens: PackedTokens) -> Tensor:
    """[B, D], the state of each row's first token, which no policy drops."""
    if tokens.layout.single:
        return tokens.hidden[:1]
    return tokens.hidden[tokens.layout.cu_seqlens[:-1].to(torch.int64)]


def sum_in_rows(values: Tensor, layout: Layout) -> Tensor:
    """values: [T, D] → [B, D]."""
    if layout.single:
        return values.sum(0, keepdim=True)
    return values.new_zeros(len(layout.lengths), values.shape[1]).index_add(0, layout.rows, values)


class LinearBranch(nn.Module):
    """A linear layer on the first token's state: [B, C]."""

    def __init__(self, size: int, outputs: int) -> None:
        super().__init__()
        self.classify = nn.Linear(size, outputs)

    def forward(self, tokens: PackedTokens) -> Tensor:
        return self.classify(first_states(tokens))  # type: ignore[no-any-return]

    @staticmethod
    def flops(size: int, outputs: int) -> int:
        return 2 * size * outputs


class PooledBranch(nn.Module):
    """A pooler as BERT's and a linear layer, on the first token's state: [B, C]."""

    def __init__(self, size: int, outputs: int) -> None:
        super().__init__()
        self.pool = TanhLinear(size, size)
        self.classify = nn.Linear(size, outputs)

    def forward(self, tokens: PackedTokens) -> Tensor:
        return self.classify(self.pool(first_states(tokens)))  # type: ignore[no-any-return]

    @staticmethod
    def flops(size: int, outputs: int) -> int:
        return 2 * size * size + 2 * size * outputs


class AttentiveBranch(nn.Module):
    """A narrow self-attention over the row's tokens, of which only the first one's result is computed: [B, C]."""

    def __init__(self, size: int, width: int, heads: int, outputs: int) -> None:
        super().__init__()
        self.heads = heads
        self.narrow = TanhLinear(size, width)
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        self.pool = TanhLinear(width, width)
        self.classify = nn.Linear(width, outputs)
        self._joined: Derived[tuple[Tensor, ...]] = Derived()

    def forward(self, tokens: PackedTokens) -> Tensor:
        # One query needs no key of every token: q (K n + b) is (q K) n and a number that is the same for all of them, which a
        # softmax does not see. Nor a value: what V makes of a weighted sum is the weighted sum of what it makes of each.
        # The leading axis tells an exported graph that this one map is of all tokens, and is to be int8 with the layers' own.
        narrow = tokens.with_hidden(self.narrow(tokens.hidden.unsqueeze(0)).squeeze(0))
        first = first_states(narrow)
        between = tuple(p for linear in self._between for p in (linear.weight, linear.bias))
        if applies(first, *between):
            to_sought, sought_bias, to_pooled, pooled_bias = self._joined.of(between, self._join)
            sought = F.linear(first, to_sought, sought_bias).unflatten(1, (self.heads, -1))
            pooled = F.linear(self._weighted_sums(sought, narrow).flatten(1), to_pooled, pooled_bias).tanh()
            return self.classify(pooled)  # type: ignore[no-any-return]
        self._joined.forget()
        query = self.query(first).unflatten(1, (self.heads, -1))
        sought = (query.unsqueeze(3) * self._by_head(self.key)).sum(2) / math.sqrt(query.shape[2])
        found = self._weighted_sums(sought, narrow)
        context = (found.unsqueeze(2) * self._by_head(self.value)).sum(3).flatten(1) + self.value.bias
        return self.classify(self.pool(self.out(context)))  # type: ignore[no-any-return]

    @property
    def _between(self) -> tuple[nn.Linear, ...]:
        """The linear layers that follow each other with nothing between them: query and key, value and out and pool."""
        return self.query, self.key, self.value, self.out, self.pool

    def _join(self) -> tuple[Tensor, ...]:
        """Weights and biases of the two maps that those layers are: of the first token's state to what each head seeks, and of
        what it finds to what is pooled."""
        heads, (width, _) = self.heads, self.key.weight.shape
        key, value = self._by_head(self.key) / math.sqrt(width // heads), self._by_head(self.value)
        query, bias = self._by_head(self.query), self.query.bias.view(heads, -1)
        pooled = self.pool.weight @ self.out.weight
        return (
            torch.einsum("hdw,hdv->hwv", key, query).reshape(heads * width, width),
            torch.einsum("hdw,hd->hw", key, bias).reshape(-1),
            torch.einsum("xhd,hdw->xhw", pooled.view(width, heads, -1), value).reshape(width, -1),
            pooled @ self.value.bias + self.pool.weight @ self.out.bias + self.pool.bias,
        )

    def _by_head(self, linear: nn.Linear) -> Tensor:
        """[H, W/H, W]"""
        return linear.weight.unflatten(0, (self.heads, -1))  # type: ignore[no-any-return]

    def _weighted_sums(self, sought: Tensor, tokens: PackedTokens) -> Tensor:
        """What each row and head seeks, [B, H, W] → the sum of the row's states [T, W], weighted by how much they are that."""
        layout, states, weight = tokens.layout, tokens.hidden, tokens.log_weight
        if layout.single:
            scores = (states @ sought[0].transpose(0, 1)).float()
            scores = scores if weight is None else scores + weight.float().unsqueeze(1)
            return (scores.softmax(0).to(states.dtype).transpose(0, 1) @ states).unsqueeze(0)
        # States are narrow, so that padding them costs less than telling rows apart in every operation.
        rows, width = layout.rows, max(layout.sizes)
        starts = layout.cu_seqlens[:-1].to(torch.int64)
        place = torch.arange(len(rows), device=rows.device) - starts[rows] + rows * width
        shape = len(starts) * width
        padded = states.new_zeros(shape, states.shape[1]).index_copy(0, place, states).view(len(starts), width, -1)
        weight = padded.new_zeros(len(rows), dtype=torch.float32) if weight is None else weight.float()
        bias = weight.new_full((shape,), float("-inf")).index_copy(0, place, weight)
        scores = torch.bmm(sought, padded.transpose(1, 2)).float() + bias.view(-1, 1, width)
        return torch.bmm(scores.softmax(-1).to(states.dtype), padded)

    @staticmethod
    def flops(n: int, size: int, width: int, heads: int, outputs: int) -> int:
        every = 2 * size * width + 4 * heads * width  # narrowed; score and sum of each head
        return n * every + 10 * width * width + 2 * width * outputs


class SpanBranch(nn.Module):
    """A linear layer on every token: start and end logits [B, N, 2] by column of the padded input, NO_ANSWER where none is."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.point = nn.Linear(size, 2)

    def forward(self, tokens: PackedTokens) -> Tensor:
        layout, logits = tokens.layout, self.point(tokens.hidden).float()
        if tokens.alive is not None:
            logits = logits.masked_fill(~tokens.alive.unsqueeze(1), NO_ANSWER)
        empty = logits.new_full((len(layout.lengths) * layout.width, 2), NO_ANSWER)
        place = layout.positions if layout.single else layout.rows * layout.width + layout.positions
        return empty.index_copy(0, place, logits).view(-1, layout.width, 2)  # type: ignore[no-any-return]

    @staticmethod
    def flops(n: int, size: int) -> int:
        return 4 * n * size


class StateBranch(nn.Module):
    """What the layers to come would still change, as one linear map of a state, added to it: [T, D] → [T, D] by `changed`.

    Called with the tokens it says the vector that is watched, [B, D]: the mean of a row's changed states, or the first one.
    New, it changes nothing.
    """

    def __init__(self, size: int, pooling: str) -> None:
        super().__init__()
        self.pooling = pooling
        self.change = nn.Linear(size, size)
        nn.init.zeros_(self.change.weight)
        nn.init.zeros_(self.change.bias)

    def changed(self, states: Tensor) -> Tensor:
        return states + self.change(states)  # type: ignore[no-any-return]

    def forward(self, tokens: PackedTokens) -> Tensor:
        if self.pooling == "first":
            return self.changed(first_states(tokens))
        hidden, lengths = tokens.hidden, tokens.lengths
        if tokens.alive is not None:
            hidden = hidden * tokens.alive.unsqueeze(1).to(hidden.dtype)
        # The map is linear: that of the mean is the mean of the map.
        return self.changed(sum_in_rows(hidden, tokens.layout) / lengths.unsqueeze(1).to(hidden.dtype))

    @staticmethod
    def flops(size: int) -> int:
        return 2 * size * size
