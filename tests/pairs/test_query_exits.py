"""Queries that leave early: what every scorer makes of them, however many are read together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import thresher
from helpers import build, config_of, make, tokenizer
from leaving import scattered
from pairs.scoring import KINDS, QUERY, SETTINGS, TEXTS, scorer, toy
from thresher.backbones.opened import open_layers
from thresher.model import attachment_of, exit_of
from thresher.pairs import SCORERS, evaluate, load, pair_flops
from thresher.pairs.reading import passes, read, watch

CLOSE = 1e-4
QUERIES = [QUERY, "w5", "w6 w7 w8 w9 w10 w11 w12", "w13 w14", "w15 w16 w17"]
FRAMED = [[2, 25, 26, 27, 3], [2, 10, 3], [2, 11, 12, 13, 14, 15, 3], [2, 18, 19, 3]]
POLICIES = {"none": None, "attention-mass": thresher.AttentionMass(retention=(0.9, 0.8, 0.7, 0.6, 0.5))}


def leave(encoder: Any, policy: Any = None, tolerance: float = 2.0) -> None:
    thresher.attach(encoder, policy, exit=thresher.SettledStates(tolerance=tolerance))
    scattered(exit_of(encoder), 3)
    with torch.no_grad():
        for parameter in exit_of(encoder).parameters():
            parameter.mul_(0.2)


def some_leave(encoder: Any, policy: Any = None) -> None:
    """Set the tolerance so that of FRAMED some leave and some do not."""
    leave(encoder, policy)
    for tolerance in (0.02, 0.05, 0.08, 0.1, 0.12, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.8):
        thresher.set_exit(encoder, tolerance=tolerance)
        with passes() as traces, torch.no_grad():
            read(encoder, FRAMED, reduced=True)
        if len(set(traces[0].exited_at)) > 1:
            return
    raise AssertionError("all leave together")


@pytest.fixture
def encoder() -> Any:
    made = thresher.attach(make("bert", "base", 5))
    watch(open_layers(made))
    return made


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_what_enters_a_layer_is_what_the_rows_have_or_left_with(encoder: Any, policy: str) -> None:
    some_leave(encoder, POLICIES[policy])
    with torch.no_grad(), passes() as traces:
        together = read(encoder, FRAMED, entering=(2, 4, 5), reduced=True)
    left = traces[0].exited_at
    assert 2 <= min(left) < max(left)
    with torch.no_grad(), thresher.simulated_drops():
        simulated = read(encoder, FRAMED, entering=(2, 4, 5), reduced=True)
    for row, ids in enumerate(FRAMED):
        with torch.no_grad():
            alone = read(encoder, [ids], entering=(2, 4, 5), reduced=True)
        for layer in (2, 4, 5):
            single = alone.entering[layer].hidden
            for other in (together, simulated):
                torch.testing.assert_close(other.entering[layer].rows()[row], single, rtol=0, atol=CLOSE)
        for other in (together, simulated):
            assert other.last is not None
            assert alone.last is not None
            torch.testing.assert_close(other.last.rows()[row], alone.last.hidden, rtol=0, atol=CLOSE)
        if policy == "none":
            inputs = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.int64)}
            with torch.no_grad(), thresher.stock():
                states = encoder(**inputs, output_hidden_states=True).hidden_states
            for layer in (2, 4, 5):
                wanted = states[min(layer - 1, left[row])][0]
                torch.testing.assert_close(alone.entering[layer].hidden, wanted, rtol=0, atol=CLOSE)


def test_a_pass_that_stops_before_its_end_has_what_everybody_left_with(encoder: Any) -> None:
    leave(encoder)  # all of them, after layer 2
    with torch.no_grad():
        found = read(encoder, FRAMED, entering=(5,), last=False, reduced=True)
        earlier = read(encoder, FRAMED, entering=(3,), last=False)
    torch.testing.assert_close(found.entering[5].hidden, earlier.entering[3].hidden, rtol=0, atol=CLOSE)
    assert found.last is None or found.last.sizes == [len(ids) for ids in FRAMED]


@pytest.mark.parametrize("family", ["bert", "distilbert"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "cross"])
def test_scores_are_the_same_for_queries_read_together_and_alone(kind: str, family: str) -> None:
    made = scorer(kind, family, depth=5)
    plain = made.score(QUERIES[2], TEXTS)
    cache = made.encode_candidates(TEXTS)
    some_leave(made.encoder)
    for mine, theirs in zip(made.encode_candidates(TEXTS).blocks(9), cache.blocks(9), strict=True):
        torch.testing.assert_close(mine.values, theirs.values, rtol=0, atol=1e-6)  # candidates do not leave
    rows, _ = made.query_rows(QUERIES)
    with made.answering():
        asked = made.ask(rows)
        for query, one in zip(QUERIES, asked, strict=True):
            (block,) = cache.blocks(9)
            alone = torch.as_tensor(made.score(query, cache))
            torch.testing.assert_close(made.compare(one, block).cpu(), alone, rtol=0, atol=CLOSE)
            with thresher.simulated_drops():
                torch.testing.assert_close(torch.as_tensor(made.score(query, cache)), alone, rtol=0, atol=CLOSE)
    thresher.set_exit(made.encoder, strength=0.0)
    torch.testing.assert_close(
        torch.as_tensor(made.score(QUERIES[2], TEXTS)), torch.as_tensor(plain), rtol=0, atol=CLOSE
    )


@pytest.mark.parametrize("kind", ["mixencoder", "dual", "colbert"])
def test_a_query_that_leaves_costs_less(kind: str) -> None:
    made = scorer(kind, depth=5)
    thresher.attach(made.encoder)
    before = pair_flops(made, QUERY, TEXTS)
    leave(made.encoder)
    after = pair_flops(made, QUERY, TEXTS)
    assert after.reading < 0.7 * before.reading
    assert after.matching == before.matching


@pytest.mark.parametrize("kind", ["mixencoder", "dual"])
def test_a_scorer_keeps_the_exit_of_a_fitted_encoder(
    kind: str, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    fitted = build(config_of("bert", 4), "base")
    leave(fitted, tolerance=0.7)
    fitted.save_pretrained(tmp_path / "fitted")
    tokenizer().save_pretrained(tmp_path / "fitted")
    made = (
        SCORERS[kind].from_encoder(tmp_path / "fitted", max_query=20, max_candidate=20, **SETTINGS.get(kind, {})).eval()
    )
    assert exit_of(made.encoder).config == thresher.SettledStates(tolerance=0.7)
    made.save(tmp_path / "scorer")
    again = load(tmp_path / "scorer")
    assert again.score(QUERY, TEXTS) == pytest.approx(made.score(QUERY, TEXTS), abs=CLOSE)
    for mine, theirs in zip(exit_of(again.encoder).parameters(), exit_of(fitted).parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
    assert not [one for one in recwarn if "left out" in str(one.message)]
    found = evaluate(again, toy(12))
    assert 0.0 < found.metrics["MRR"] <= 1.0
    assert attachment_of(again.encoder).exit is not None


@pytest.mark.parametrize("kind", ["mixencoder", "dual", "cross"])
def test_a_trace_shows_where_a_query_or_a_pair_leaves(kind: str) -> None:
    made = scorer(kind, depth=5)
    leave(made.encoder)
    cache = made.encode_candidates(TEXTS)
    with thresher.tracing(record=True) as traces:
        made.score(QUERY, cache)
    assert traces
    assert {layer for trace in traces for layer in trace.exited_at} == {2}
