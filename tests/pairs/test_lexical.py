"""Token overlap beside a scorer: BM25 written out, nothing before training, the same from cache and store, and learned."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pairs.scoring import KINDS, QUERY, TEXTS, mean_rank, scorer, toy
from thresher.errors import DataError, OptionError, StoreError
from thresher.pairs import Index, PairLoss, load, train
from thresher.pairs.lexical import Lexical

CACHED = [kind for kind in KINDS if kind != "cross"]
QUIET = {"use_cpu": True, "progress": False, "precision": "float32"}
ids = st.lists(st.integers(0, 19), max_size=12)


def loud(kind: str, **settings: Any) -> Any:
    """A scorer whose lexical signal weighs something."""
    made = scorer(kind, lexical=8, **settings)
    assert made.lexical is not None
    made.lexical.count(made.candidate_rows(TEXTS)[0])
    with torch.no_grad():
        made.lexical.slow_weight.fill_(0.03)
    return made


@given(st.lists(ids, min_size=1, max_size=5), ids)
def test_against_bm25_written_out(texts: list[list[int]], query: list[int]) -> None:
    special, most = [0, 1], 3
    made = Lexical(20, special, most, 6)
    made.count(texts)
    with torch.no_grad():
        made.slow_weight.fill_(0.02)
    different = {tuple(text) for text in texts}
    tokens = any(texts)
    average = sum(map(len, different)) / len(different) if tokens else 6

    def idf(token: int) -> float:
        if token in special:
            return 0.0
        if not tokens:
            return 1.0
        df = sum(token in text for text in different)
        return math.log(1 + (len(different) - df + 0.5) / (df + 0.5))

    def tf(token: int, text: list[int]) -> float:
        count = text.count(token)
        return count * 2.2 / (count + 1.2 * (0.25 + 0.75 * len(text) / average))

    found = made(made.asked(query), made.terms(texts))
    total = sum(idf(token) for token in set(query))
    for text, value in zip(texts, found.tolist(), strict=True):
        kept = sorted({t for t in text if t not in special}, key=lambda t: (-round(idf(t) * tf(t, text), 5), t))[:most]
        expected = sum(idf(token) * tf(token, text) for token in kept if token in query)
        # A weight is kept in 8 bits. Where two tokens weigh the same, either may be the one that is kept.
        if len(set(text) - set(special)) <= most:
            assert value == pytest.approx(2.0 * expected / total if total else 0.0, abs=2.0 * 2.2 / 255)


def test_terms_are_the_strongest_sorted_and_compact() -> None:
    made = Lexical(50, [0], 3, 4)
    made.count([[5, 9], [5, 7], [5, 8, 9]])
    (row,) = made.terms([[9, 5, 7, 8, 8]])
    assert (row >> 8).tolist() == [7, 8, 9]  # 5 is everywhere
    codes = (row & 255).tolist()
    assert codes[1] > codes[0] == codes[2] > 0
    assert row.dtype is torch.int32 and made.terms([[]]).tolist() == [[0, 0, 0]]


def test_the_weight_takes_no_room_in_the_norm_that_gradients_are_clipped_to() -> None:
    """Else all other gradients would be cut to next to nothing; the weight itself is that of the score, to the bit."""
    made = loud("mixencoder")
    assert made.lexical is not None and torch.equal(made.lexical.weight, 100.0 * made.lexical.slow_weight)
    scores = made.compare_each(made.ask(made.query_rows([QUERY])[0]), [made.offer(made.candidate_rows(TEXTS)[0])])[0]
    (-(scores / 0.05).log_softmax(0)[0]).backward()
    norms = {name: p.grad.norm() for name, p in made.named_parameters() if p.grad is not None}
    own = norms.pop("lexical.slow_weight")
    assert 0.0 < own < 0.1 * torch.stack(list(norms.values())).norm()


@pytest.mark.parametrize("kind", CACHED)
def test_nothing_changes_before_training(kind: str) -> None:
    plain, made = scorer(kind), scorer(kind, lexical=8)
    cache = made.encode_candidates(TEXTS)
    assert torch.equal(made.score(QUERY, cache), plain.score(QUERY, plain.encode_candidates(TEXTS)))
    assert cache.terms is not None and cache.terms.shape == (len(TEXTS), 8)
    assert cache.nbytes == plain.encode_candidates(TEXTS).nbytes + len(TEXTS) * 8 * 4


@pytest.mark.parametrize("kind", CACHED)
def test_the_signal_adds_to_the_score_and_goes_everywhere(kind: str, tmp_path: Path) -> None:
    plain, made = scorer(kind), loud(kind)
    names = [f"c{i}" for i in range(len(TEXTS))]
    cache = made.encode_candidates(TEXTS, names)
    scores = made.score(QUERY, cache)
    rows = made.query_rows([QUERY])[0]
    with torch.no_grad():
        signal = made.lexical(made.lexical.asked(rows[0]), cache.terms)
    added = scores - plain.score(QUERY, plain.encode_candidates(TEXTS))
    torch.testing.assert_close(added, signal, rtol=1e-4, atol=1e-4)
    assert signal[2] > 0 and signal[5] > signal[2] and signal[0] == signal[3] == 0
    torch.testing.assert_close(made.score(QUERY, cache.select(["c5", "c2"])), scores[[5, 2]])
    halves = type(cache).concat([cache.select(names[:2]), cache.select(names[2:])])
    torch.testing.assert_close(made.score(QUERY, halves, chunk=4), scores)
    with Index.create(made, tmp_path / "store", dtype="float32") as index:
        index.add(list(zip(names, TEXTS, strict=True)), batch=4)
        torch.testing.assert_close(index.score(QUERY, names), scores)
    made.save(tmp_path / "scorer")
    with Index.open(load(tmp_path / "scorer"), tmp_path / "store") as index:
        torch.testing.assert_close(index.score(QUERY, names, chunk=2), scores)
        index.store.verify()


def test_what_was_built_without_it_is_refused(tmp_path: Path) -> None:
    plain, made = scorer("dual"), loud("dual")
    with Index.create(plain, tmp_path) as index:
        index.add([("a", "w9")])
    with pytest.raises(StoreError, match="without the terms that this scorer compares"):
        Index.open(made, tmp_path)
    cache = plain.encode_candidates(["w9"])
    with pytest.raises(DataError, match="The cache was made by"):
        made.score("w9", cache)
    with pytest.raises(DataError, match="encoded without"):
        made.score_blocks("w9", [cache.block(0, 1)])


def test_other_counts_are_another_scorer(tmp_path: Path) -> None:
    made = loud("dual")
    with Index.create(made, tmp_path):
        pass
    made.lexical.count([[30, 31]])
    with pytest.raises(StoreError, match="fingerprint"):
        Index.open(made, tmp_path)


@pytest.mark.parametrize("settings", [{"lexical": -1}, {"lexical": 4, "classes": 2}])
def test_settings_that_cannot_be(settings: dict[str, int]) -> None:
    with pytest.raises(OptionError, match="lexical="):
        scorer("dual", **settings)
    with pytest.raises(OptionError, match="reads the tokens themselves"):
        scorer("cross", lexical=4)


def test_training_finds_the_common_word(tmp_path: Path) -> None:
    """Few steps at a small rate: what the vectors learn is little, the one weight is enough."""
    rows, options = toy(24, low=20), {"epochs": 8, "batch_size": 8, "learning_rate": 2e-4, "warmup": 0.0, **QUIET}
    plain, made = scorer("dual", similarity="cosine"), scorer("dual", similarity="cosine", lexical=8)
    for one, place in ((plain, "plain"), (made, "lexical")):
        train(one, rows, tmp_path / place, loss=PairLoss(temperature=0.05, negatives=0), **options)
    assert made.lexical.weight > 0.1 and float(made.lexical.idf.max()) > 1
    assert mean_rank(made, rows) > mean_rank(plain, rows) + 0.1
