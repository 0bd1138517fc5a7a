"""What is kept of candidates: slices, joins and rounding that is exact where it says so."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pairs.scoring import QUERY, TEXTS, scorer
from thresher.errors import DataError, OptionError
from thresher.pairs import Cache


def cache(lengths: tuple[int, ...] = (2, 1, 3), ids: Any = ("a", "b", "c"), seed: int = 0, scale: float = 1.0) -> Cache:
    generator = torch.Generator().manual_seed(seed)
    data = torch.randn(sum(lengths), 4, generator=generator) * scale
    return Cache(tuple(ids), data, torch.tensor(lengths), "x")


def test_select_and_vectors() -> None:
    whole = cache()
    some = whole.select(["c", "a"])
    assert some.ids == ("c", "a") and some.lengths.tolist() == [3, 2]
    assert torch.equal(some.data, whole.data[[3, 4, 5, 0, 1]])
    assert torch.equal(whole.vectors("b"), whole.data[2:3])
    for storage in ("float16", "int8"):
        kept = whole.to(storage)
        assert torch.equal(kept.select(["b"]).vectors("b"), kept.vectors("b"))
    with pytest.raises(DataError, match="no candidate with the id 'd' among the 3"):
        whole.select(["a", "d"])
    with pytest.raises(DataError, match="'a' is given twice"):
        whole.select(["a", "a"])
    with pytest.raises(DataError, match="no candidates"):
        whole.select([])


def test_concat_gives_back_what_was_apart() -> None:
    for storage in ("float32", "float16", "int8"):
        whole = cache().to(storage)
        again = Cache.concat([whole.select(["a"]), whole.select(["b", "c"])])
        assert again.ids == whole.ids and torch.equal(again.data, whole.data)
        assert torch.equal(again.block(0, 3).values, whole.block(0, 3).values)
    with pytest.raises(DataError, match="given twice"):
        Cache.concat([cache(), cache()])
    with pytest.raises(DataError, match="does not go with"):
        Cache.concat([cache(), cache(ids=("d", "e", "f")).to("int8")])
    with pytest.raises(DataError, match="no caches"):
        Cache.concat([])


def test_blocks_cover_everything_once() -> None:
    whole = cache()
    for size in (1, 2, 3, 9):
        blocks = list(whole.blocks(size))
        assert [len(block) for block in blocks] == [min(size, 3 - start) for start in range(0, 3, size)]
        assert torch.equal(torch.cat([block.values for block in blocks]), whole.data)
    block = whole.block(0, 3)
    assert block.owners.tolist() == [0, 0, 1, 2, 2, 2]
    assert torch.equal(block.select([2, 0]).values, whole.data[[3, 4, 5, 0, 1]])


@given(st.integers(0, 10**6), st.sampled_from([1e-30, 1e-3, 1.0, 37.0, 6e4 / 6]))
def test_rounding_twice_is_rounding_once(seed: int, scale: float) -> None:
    whole = cache(seed=seed, scale=scale)
    half = whole.to("float16")
    back = half.to("float32")
    assert torch.equal(back.data, whole.data.half().float())
    assert torch.equal(back.to("float16").data, half.data)
    small = whole.to("int8")
    again = small.to("float32").to("int8")
    assert torch.equal(again.data, small.data)
    assert small.scales is not None and again.scales is not None
    assert torch.equal(again.scales, small.scales)
    assert small.data.abs().amax(1).tolist() == [127] * 6
    error = (small.to("float32").data - whole.data).abs()
    assert bool((error <= 0.51 * small.scales.unsqueeze(1)).all())


def test_a_vector_of_zeros_stays_one() -> None:
    zeros = Cache((0,), torch.zeros(2, 4), torch.tensor([2]), "x")
    assert torch.equal(zeros.to("int8").to("float32").data, zeros.data)


def test_what_cannot_be_rounded() -> None:
    for value, storage, says in (
        (float("nan"), "int8", "NaN or infinity"),
        (float("inf"), "float16", "NaN or infinity"),
        (1e5, "float16", "65504"),
    ):
        bad = Cache((0,), torch.full((1, 4), value), torch.tensor([1]), "x")
        with pytest.raises(DataError, match=says):
            bad.to(storage)
    with pytest.raises(OptionError, match="no storage 'int4'"):
        cache().to("int4")
    with pytest.raises(OptionError, match="token ids|Token ids"):
        scorer("cross").encode_candidates(TEXTS).to("int8")


def test_what_does_not_fit_together() -> None:
    with pytest.raises(DataError, match="do not fit together"):
        Cache(("a",), torch.zeros(2, 4), torch.tensor([1]), "x")
    with pytest.raises(DataError, match="given twice"):
        cache(ids=("a", "b", "a"))
    with pytest.raises(DataError, match="True"):
        cache(ids=("a", "b", True))


@pytest.mark.parametrize("kind", ["mixencoder", "dual", "colbert", "virt"])
@pytest.mark.parametrize(("storage", "tolerance"), [("float16", 0.01), ("int8", 0.1)])
def test_scores_of_a_rounded_cache(kind: str, storage: Any, tolerance: float) -> None:
    made = scorer(kind)
    exact = made.encode_candidates(TEXTS)
    kept = made.encode_candidates(TEXTS, storage=storage)
    assert kept.storage == storage and torch.equal(kept.data, exact.to(storage).data)
    assert kept.nbytes < exact.nbytes / 1.9
    scores, rounded = made.score(QUERY, exact), made.score(QUERY, kept)
    assert (scores - rounded).abs().max() <= tolerance * scores.std() * 3
    torch.testing.assert_close(rounded, made.score(QUERY, kept.to("float32")), rtol=0, atol=0)
