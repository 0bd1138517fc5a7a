"""A scorer and its store say what the scorer and a cache in memory say, however the store was filled."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pairs.scoring import QUERY, scorer
from thresher.errors import DataError, OptionError, StoreError
from thresher.pairs.cache import Cache
from thresher.pairs.keeping import Added, Index, _best
from thresher.pairs.store import CandidateStore

KINDS = ("mixencoder", "dual", "colbert")
STORAGES = ("float32", "float16", "int8")
COUNT, BATCH = 23, 7
IDS = [f"c{i:02}" for i in range(COUNT)]


def texts(count: int = COUNT) -> list[str]:
    draw = random.Random(0)
    return [" ".join(f"w{draw.randrange(5, 64)}" for _ in range(draw.randint(0, 14))) for _ in range(count)]


ROWS = list(zip(IDS, texts(), strict=True))


def cached(made: Any, storage: Any) -> Cache:
    """What the store should hold, of the same batches."""
    parts = [ROWS[at : at + BATCH] for at in range(0, COUNT, BATCH)]
    return Cache.concat(
        [made.encode_candidates([t for _, t in part], [i for i, _ in part], storage=storage) for part in parts]
    )


@pytest.fixture(scope="module")
def dual() -> Any:
    return scorer("dual")


# What it says.


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_store_scores_and_ranks_as_a_cache_does(kind: str, storage: str, tmp_path: Path) -> None:
    made = scorer(kind)
    cache = cached(made, storage)
    with Index.create(made, tmp_path, dtype=storage) as index:
        assert index.add(ROWS, batch=BATCH) == Added(COUNT, 0, 0)
    with Index.open(made, tmp_path, dtype=storage) as index:
        assert len(index) == COUNT
        assert index.store.schema.ragged == (kind == "colbert")
        for size in (None, 1, 5, COUNT):
            assert torch.equal(index.score(QUERY, chunk=size), made.score(QUERY, cache, chunk=size))
            assert index.rank(QUERY, 6, chunk=size) == made.rank(QUERY, cache, 6, chunk=size)
        assert index.rank(QUERY, None) == index.rank(QUERY, COUNT + 5) == made.rank(QUERY, cache)
        subset = random.Random(1).sample(IDS, 9)
        assert torch.equal(index.score(QUERY, subset, chunk=4), made.score(QUERY, cache.select(subset), chunk=4))
        assert index.rank(QUERY, 3, subset, chunk=4) == made.rank(QUERY, cache.select(subset), 3, chunk=4)
        kept = index.store.read(IDS, stored=True)
        assert np.array_equal(kept.vectors.reshape(cache.data.shape), cache.data.numpy())
        if cache.scales is not None:
            assert np.array_equal(kept.scales["vectors"].reshape(-1), cache.scales.numpy())


def test_classes_are_scored_and_not_ranked(tmp_path: Path) -> None:
    made = scorer("mixencoder", classes=3)
    with Index.create(made, tmp_path, dtype="float32") as index:
        index.add(ROWS, batch=BATCH)
        assert torch.equal(index.score(QUERY), made.score(QUERY, cached(made, "float32")))
        with pytest.raises(OptionError, match="3 classes does not rank"):
            index.rank(QUERY)
    with Index.create(scorer("mixencoder", classes=1), tmp_path / "one") as index:
        index.add(ROWS)
        scores = index.score(QUERY)
        assert scores.shape[0] == COUNT
        assert [score for _, score in index.rank(QUERY, 2)] == scores.flatten().sort(descending=True)[0][:2].tolist()


def test_of_equals_the_smaller_id_comes_first(dual: Any, tmp_path: Path) -> None:
    names = random.Random(2).sample(IDS, COUNT)
    with Index.create(dual, tmp_path) as index:
        index.add([(name, "w9 w10") for name in names], batch=4)
        zeros = np.zeros((COUNT, 1, 32))  # whose scores are the same to the last bit, wherever they stand
        index.store.update(IDS, zeros)
        index.store.delete(["c03"])
        index.store.add(["c03"], zeros[:1])
        assert [name for name, _ in index.rank(QUERY, 5, chunk=COUNT)] == IDS[:5]
        assert [name for name, _ in index.rank(QUERY, None, chunk=COUNT)] == IDS
        assert [name for name, _ in index.rank(QUERY, 2, ["c09", "c04", "c05"])] == ["c04", "c05"]


@given(st.lists(st.lists(st.integers(-3, 3), min_size=1, max_size=4), min_size=1, max_size=5), st.integers(1, 9))
def test_the_best_are_those_of_sorting_all(chunks: list[list[int]], k: int) -> None:
    scores = [float(score) for chunk in chunks for score in chunk]
    names = iter(random.Random(0).sample(range(99), len(scores)))
    ids = [[f"c{next(names):02}" for _ in chunk] for chunk in chunks]
    every = sorted(zip([name for chunk in ids for name in chunk], scores, strict=True), key=lambda x: (-x[1], x[0]))
    assert _best(np.array(scores, np.float32), ids, k) == every[:k]
    assert _best(np.array(scores, np.float32), ids, None) == every


def test_a_score_that_is_no_number(dual: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Index.create(dual, tmp_path) as index:
        index.add(ROWS)
        score = type(dual).score_blocks
        monkeypatch.setattr(type(dual), "score_blocks", lambda *given: score(*given) * float("nan"))
        with pytest.raises(DataError, match="is no number"):
            index.rank(QUERY, 1)


# How it is filled.


class Stop(Exception):
    pass


def stopping(after: int) -> Iterator[tuple[str, str]]:
    yield from ROWS[:after]
    raise Stop


def test_an_interruption_loses_a_batch_at_most(dual: Any, tmp_path: Path) -> None:
    done: list[int] = []
    with Index.create(dual, tmp_path / "a") as index, pytest.raises(Stop):
        index.add(stopping(16), batch=BATCH, on_done=done.append)
    assert done == [7, 7]
    with Index.open(dual, tmp_path / "a") as index:
        assert sorted(index.store.ids()) == IDS[:14]
        assert index.add(ROWS, batch=BATCH, on_done=done.append) == Added(9, 14, 0)
        assert index.add(ROWS, batch=3) == Added(0, COUNT, 0)
        assert sum(done[2:]) == COUNT
        with Index.create(dual, tmp_path / "b") as whole:
            whole.add(ROWS, batch=BATCH)
            assert index.rank(QUERY, None) == whole.rank(QUERY, None)


def test_what_is_there_is_not_encoded_again(dual: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Index.create(dual, tmp_path) as index:
        index.add(ROWS)
        monkeypatch.setattr(dual, "candidate_states", None)
        assert index.add((name, "w5") for name in IDS) == Added(0, COUNT, 0)


def test_cut_candidates_are_said_once(dual: Any, tmp_path: Path) -> None:
    long = " ".join(["w9"] * 40)
    with Index.create(dual, tmp_path) as index:
        with pytest.warns(UserWarning, match=r"^2 of 4 candidates were longer than the limit and were cut\.$") as said:
            found = index.add([("a", long), ("b", "w9"), ("c", long), ("d", "")], batch=1)
        assert len(said) == 1 and found == Added(4, 0, 2)
        with pytest.warns(UserWarning, match="query is longer"):
            index.rank(long)


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([("a", "w9"), ("", "w9")], "empty id"),
        ([("a", "w9"), ("b", "w9"), ("a", "w9")], "'a' is given twice"),
        ([(3, "w9")], "is a text, not 3"),
        ([("a", None)], "not None"),
        ([("a",)], "an id with its text, not"),
        (["ab"], "an id with its text, not 'ab'"),
    ],
)
def test_bad_candidates(dual: Any, tmp_path: Path, rows: Any, says: str) -> None:
    for batch in (1, 9):
        with Index.create(dual, tmp_path / str(batch)) as index:
            with pytest.raises(DataError, match=says):
                index.add(rows, batch=batch)
            # One given twice is an error the second time too, when the first of them is there from before.
            with pytest.raises(DataError, match=says):
                index.add(rows, batch=batch)


def test_bad_questions(dual: Any, tmp_path: Path) -> None:
    with Index.create(dual, tmp_path) as index:
        with pytest.raises(DataError, match="no candidates"):
            index.rank(QUERY)
        index.add(ROWS)
        for kind, says, settings in (
            (OptionError, "whole number of candidates, at least 1, not 0", {"k": 0}),
            (OptionError, "at least 1, not 1.5", {"k": 1.5}),
            (OptionError, "whole number of candidates, at least 1, not 0", {"chunk": 0}),
            (DataError, "no candidates", {"ids": []}),
            (DataError, "'c01' is given twice", {"ids": ["c01", "c01"]}),
            (StoreError, "'zz' is not in", {"ids": ["c01", "zz"]}),
        ):
            with pytest.raises(kind, match=says):
                index.rank(QUERY, **settings)
        with pytest.raises(OptionError, match="at least 1, not"):
            index.add(ROWS, batch=0)
        with pytest.raises(DataError):
            index.rank(None)  # type: ignore[arg-type]


# Whose it is.


def test_another_scorer_is_refused(dual: Any, tmp_path: Path) -> None:
    Index.create(dual, tmp_path).close()
    taught = scorer("dual")
    with torch.no_grad():
        next(taught.parameters()).view(-1)[0] += 1e-3
    for other in (taught, scorer("dual", pooling="mean"), scorer("mixencoder")):
        with pytest.raises(StoreError, match="was made with fingerprint") as error:
            Index.open(other, tmp_path)
        assert "\n" not in str(error.value)
    with pytest.raises(StoreError, match="dtype 'float16', not dtype 'int8'"):
        Index.open(dual, tmp_path, dtype="int8")
    with pytest.raises(StoreError, match="already"):
        Index.create(dual, tmp_path)
    schema = CandidateStore.open(tmp_path).schema
    assert (schema.strategy, schema.fingerprint) == (dual.signature, dual.fingerprint())
    assert (schema.k, schema.dim, schema.ragged) == (1, 32, False)


@pytest.mark.parametrize("kind", ["mixencoder", "poly", "colbert", "virt", "deformer"])
def test_every_scorer_that_keeps_vectors_has_a_store(kind: str, tmp_path: Path) -> None:
    made = scorer(kind)
    with Index.create(made, tmp_path, dtype="float32") as index:
        index.add(ROWS, batch=BATCH)
        assert index.rank(QUERY, 5) == made.rank(QUERY, cached(made, "float32"), 5)


def test_a_cross_encoder_has_none(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="'cross' computes nothing of a candidate"):
        Index.create(scorer("cross"), tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_a_model_that_has_become_no_number_adds_nothing(tmp_path: Path) -> None:
    made = scorer("dual")
    with torch.no_grad():
        made.encoder.get_input_embeddings().weight[9] = float("nan")
    with Index.create(made, tmp_path) as index:
        with pytest.raises(StoreError, match="holds NaN"):
            index.add([("a", "w9"), ("b", "w10")])
        assert len(index) == 0


def test_a_handle_that_another_writer_has_left_behind_adds_what_is_missing(dual: Any, tmp_path: Path) -> None:
    with Index.create(dual, tmp_path / "s") as index:
        index.add([("a", "w5"), ("b", "w6")])
    stale, other = Index.open(dual, tmp_path / "s"), Index.open(dual, tmp_path / "s")
    with other:
        other.store.delete(["a"])
        other.add([("z", "w7")])
    with stale:
        assert stale.add([("a", "w5"), ("z", "w7")]) == Added(1, 1, 0)
    with Index.open(dual, tmp_path / "s") as now:
        assert sorted(now.store.ids()) == ["a", "b", "z"]


@pytest.mark.parametrize("kind", KINDS)
def test_texts_that_changed_are_replaced_and_others_go(kind: str, tmp_path: Path) -> None:
    made = scorer(kind, lexical=4)
    changed = [(ROWS[3][0], "w7 w8 w9"), (ROWS[20][0], "w40"), (ROWS[0][0], "")]
    with Index.create(made, tmp_path / "one", dtype="float32") as index:
        index.add(ROWS, batch=BATCH)
        index.update(iter(changed))
        index.delete([ROWS[5][0], ROWS[6][0]])
        index.update([])
        assert len(index) == COUNT - 2
        found = index.rank(QUERY, None)
        for bad, says in (
            ([*changed, ("nobody", "w5")], "'nobody' is not in"),
            ([*changed, changed[0]], "is given twice"),
            ([("c01", 7)], "is expected, not 7"),
        ):
            with pytest.raises((DataError, StoreError), match=says):
                index.update(bad)  # type: ignore[arg-type]
        with pytest.raises(StoreError, match="'nobody' is not in"):
            index.delete(["c01", "nobody"])
        assert index.rank(QUERY, None) == found
    rows = {name: text for name, text in [*ROWS, *changed] if name not in (ROWS[5][0], ROWS[6][0])}
    expected = made.rank(QUERY, made.encode_candidates(list(rows.values()), list(rows)))
    assert dict(found) == pytest.approx(dict(expected), rel=1e-5, abs=1e-5)


def test_what_is_no_collection_of_candidates(dual: Any, tmp_path: Path) -> None:
    with Index.create(dual, tmp_path) as index:
        for wrong in (None, "text", 7):
            for change in (index.add, index.update):
                with pytest.raises(DataError, match="are ids with their texts, not"):
                    change(wrong)


def test_a_flipped_bit_is_not_ranked(dual: Any, tmp_path: Path) -> None:
    with Index.create(dual, tmp_path) as index:
        index.add(ROWS)
    (file,) = tmp_path.glob("segment-*")
    content = bytearray(file.read_bytes())
    content[-9] ^= 1
    file.write_bytes(content)
    for ask in (lambda index: index.rank(QUERY), lambda index: index.score(QUERY)):
        with pytest.raises(StoreError, match=f"{file.name} .*checksum differs"):
            ask(Index.open(dual, tmp_path))


def test_weights_that_are_no_numbers_give_no_ranking() -> None:
    made = scorer("dual")
    with torch.no_grad():
        next(iter(made.encoder.parameters())).fill_(torch.nan)
    for ask in (
        lambda: made.rank(QUERY, ["w5", "w6"]),
        lambda: made.predict([("w5", "w6")]),
        lambda: made.score(QUERY, ["w5", "w6"]),
    ):
        with pytest.raises(DataError, match="is no number"):
            ask()
