"""The ragged batch against plain Python lists."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from thresher.errors import DataError
from thresher.packed import PackedTokens

WIDE = 3


@dataclass
class Case:
    """A padded batch, and chains of keep masks over its real tokens (named by row and column)."""

    width: int
    columns: list[list[int]]  # the columns of each row's real tokens
    keeps: list[dict[tuple[int, int], bool]]
    protected: set[tuple[int, int]]

    @property
    def hidden(self) -> torch.Tensor:
        batch = len(self.columns)
        return torch.arange(1.0, batch * self.width * WIDE + 1).view(batch, self.width, WIDE)

    @property
    def mask(self) -> torch.Tensor:
        out = torch.zeros(len(self.columns), self.width, dtype=torch.int64)
        for row, columns in enumerate(self.columns):
            out[row, columns] = 1
        return out

    @property
    def segments(self) -> torch.Tensor:
        return torch.arange(self.width).remainder(2).repeat(len(self.columns), 1)

    def protected_mask(self) -> torch.Tensor:
        out = torch.zeros(len(self.columns), self.width, dtype=torch.bool)
        for row, column in self.protected:
            out[row, column] = True
        return out

    def pack(self, **options: Any) -> PackedTokens:
        return PackedTokens.pack(
            self.hidden, self.mask, segments=self.segments, protected=self.protected_mask(), **options
        )


@st.composite
def cases(draw: st.DrawFn) -> Case:
    width = draw(st.integers(1, 7))
    columns = []
    for _ in range(draw(st.integers(1, 4))):
        size = draw(st.integers(1, width))
        start = 0 if draw(st.booleans()) else width - size
        columns.append(list(range(start, start + size)))
    places = [(r, c) for r, cs in enumerate(columns) for c in cs]
    keeps = [{p: draw(st.booleans()) for p in places} for _ in range(draw(st.integers(0, 3)))]
    protected = set(draw(st.lists(st.sampled_from(places), max_size=2)))
    return Case(width, columns, keeps, protected)


def place_of(tokens: PackedTokens) -> list[tuple[int, int]]:
    rows, positions = tokens.layout.rows.tolist(), tokens.positions.tolist()
    places = list(zip(rows, positions, strict=True))
    if tokens.alive is not None:
        return [p for p, alive in zip(places, tokens.alive.tolist(), strict=True) if alive]
    return places


def every_place(tokens: PackedTokens) -> list[tuple[int, int]]:
    return list(zip(tokens.layout.rows.tolist(), tokens.positions.tolist(), strict=True))


class Naive:
    """What packing, keeping and restoring mean, on dictionaries."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.state = {(r, c): case.hidden[r, c].tolist() for r, cs in enumerate(case.columns) for c in cs}
        self.alive = list(self.state)
        self.safe = case.protected | {(r, cs[0]) for r, cs in enumerate(case.columns)}

    def keep(self, wanted: dict[tuple[int, int], bool]) -> None:
        self.alive = [p for p in self.alive if wanted[p] or p in self.safe]

    def grow(self) -> None:
        """A layer: every living state changes."""
        for place in self.alive:
            self.state[place] = [2 * x + 1 for x in self.state[place]]

    def restored(self, fill: str) -> list[list[list[float]]]:
        out = [[[0.0] * WIDE for _ in range(self.case.width)] for _ in self.case.columns]
        for row, columns in enumerate(self.case.columns):
            kept = [self.state[row, c] for c in columns if (row, c) in self.alive]
            mean = [sum(x) / len(kept) for x in zip(*kept, strict=True)]
            for c in columns:
                if (row, c) in self.alive or fill == "carry":
                    out[row][c] = self.state[row, c]
                elif fill == "mean":
                    out[row][c] = mean
        return out


def walk(case: Case, tokens: PackedTokens, naive: Naive) -> PackedTokens:
    for wanted in case.keeps:
        tokens = tokens.keep(torch.tensor([wanted[p] for p in every_place(tokens)]))
        tokens = tokens.with_hidden(2 * tokens.hidden + 1)
        naive.keep(wanted)
        naive.grow()
    return tokens


@given(cases(), st.sampled_from(["carry", "mean", "zero"]), st.booleans())
def test_pack_keep_restore_agree_with_lists(case: Case, fill: Any, simulated: bool) -> None:
    naive = Naive(case)
    tokens = case.pack(carry=fill == "carry", simulated=simulated)
    assert tokens.layout.original.tolist() == [len(cs) for cs in case.columns]
    tokens = walk(case, tokens, naive)
    assert place_of(tokens) == naive.alive  # order and original positions
    assert tokens.lengths.tolist() == [sum(p[0] == row for p in naive.alive) for row in range(len(case.columns))]
    if not simulated:
        assert len(tokens.hidden) == len(naive.alive)  # really gone
    expected = torch.tensor(naive.restored(fill))
    torch.testing.assert_close(tokens.restore(fill, case.mask), expected, rtol=1e-6, atol=0)


@given(cases())
def test_simulated_and_physical_drops_restore_the_same(case: Case) -> None:
    for fill in ("carry", "mean", "zero"):
        physical = walk(case, case.pack(carry=fill == "carry"), Naive(case))
        simulated = walk(case, case.pack(carry=fill == "carry", simulated=True), Naive(case))
        assert torch.equal(physical.lengths, simulated.lengths)
        torch.testing.assert_close(physical.restore(fill, case.mask), simulated.restore(fill, case.mask))


@given(cases())
def test_what_a_token_carries_stays_with_it(case: Case) -> None:
    tokens = case.pack()
    weight = tokens.layout.flat.to(torch.float32)
    tokens = PackedTokens(tokens.hidden, tokens.layout, log_weight=weight)
    for wanted in case.keeps:
        tokens = tokens.keep(torch.tensor([wanted[p] for p in every_place(tokens)]))
        layout = tokens.layout
        assert tokens.log_weight is not None
        assert tokens.log_weight.tolist() == layout.flat.tolist()
        assert tokens.segments.tolist() == [p % 2 for p in layout.positions.tolist()]
        safe = Naive(case).safe
        assert layout.protected.tolist() == [p in safe for p in every_place(tokens)]
        starts = [0]
        for size in layout.sizes:
            starts.append(starts[-1] + size)
        assert layout.cu_seqlens.tolist() == starts
        torch.testing.assert_close(tokens.hidden, case.hidden.view(-1, WIDE)[layout.flat])


@given(cases())
def test_a_simulated_drop_hides_the_key_and_a_physical_one_shortens_the_batch(case: Case) -> None:
    tokens, hidden = case.pack(), case.pack(simulated=True)
    for wanted in case.keeps:
        naive = Naive(case)
        naive.keep(wanted)
        dropped = [p for p in every_place(hidden) if p not in naive.alive]
        after = hidden.keep(torch.tensor([wanted[p] for p in every_place(hidden)]))
        assert len(after.hidden) == len(hidden.hidden)
        if after.log_weight is not None:
            gone = {p for p, w in zip(every_place(after), after.log_weight.tolist(), strict=True) if w == -float("inf")}
            assert gone == set(dropped)
        else:
            assert not dropped
        assert len(tokens.keep(torch.tensor([wanted[p] for p in every_place(tokens)])).hidden) == len(naive.alive)


@pytest.mark.parametrize("simulated", [False, True])
@pytest.mark.parametrize("fill", ["carry", "mean", "zero"])
def test_gradients_flow_through_keep_and_restore(fill: Any, simulated: bool) -> None:
    hidden = torch.randn(2, 4, WIDE, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]])
    keep = torch.tensor([True, False, True, True, True, True, False])

    def through(x: torch.Tensor) -> torch.Tensor:
        tokens = PackedTokens.pack(x, mask, carry=fill == "carry", simulated=simulated)
        tokens = tokens.with_hidden(tokens.hidden**2).keep(keep)
        return tokens.with_hidden(tokens.hidden**3).restore(fill, mask)

    assert torch.autograd.gradcheck(through, (hidden,))
    (gradient,) = torch.autograd.grad(through(hidden).sum(), hidden)
    assert gradient[1, 0].abs().sum() == 0  # padding
    assert bool((gradient[0, 1].abs().sum() > 0) == (fill == "carry"))  # dropped


def test_without_drops_and_padding_restore_is_the_packed_tensor_itself() -> None:
    hidden = torch.randn(2, 3, WIDE)
    tokens = PackedTokens.pack(hidden)
    assert tokens.hidden.data_ptr() == hidden.data_ptr()
    assert torch.equal(tokens.restore("mean"), hidden)


def test_keeping_everything_is_the_same_object() -> None:
    tokens = PackedTokens.pack(torch.randn(2, 3, WIDE))
    assert tokens.keep(torch.ones(6, dtype=torch.bool)) is tokens


def test_the_first_real_token_stays_also_behind_left_padding() -> None:
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    tokens = PackedTokens.pack(torch.randn(2, 4, WIDE), mask).keep(torch.zeros(6, dtype=torch.bool))
    assert every_place(tokens) == [(0, 2), (1, 0)]


def test_a_row_of_padding_is_refused_by_its_number() -> None:
    mask = torch.tensor([[1, 1], [1, 0], [0, 0]])
    with pytest.raises(DataError, match=r"Row 2 .*padding"):
        PackedTokens.pack(torch.randn(3, 2, WIDE), mask)


@pytest.mark.parametrize("kind", [torch.bool, torch.int64, torch.float32])
def test_masks_of_any_type_are_read(kind: torch.dtype) -> None:
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]]).to(kind)
    hidden = torch.randn(2, 3, WIDE)
    tokens = PackedTokens.pack(hidden, mask)
    assert tokens.layout.sizes == [2, 3]
    restored = tokens.keep(torch.tensor([True, False, True, True, False])).restore("mean", mask)
    torch.testing.assert_close(restored[0, 1], hidden[0, 0])
    assert restored[0, 2].abs().sum() == 0
