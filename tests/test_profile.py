"""Stages of a pass on one timeline, and batches by tokens."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st

import thresher
from helpers import batch, dataset, make, outputs_of, settings
from thresher import timing
from thresher.errors import OptionError
from thresher.measure.profile import profile
from thresher.measure.run import batches, run
from thresher.methods import CONFIGS
from thresher.timing import STAGES, mark, timeline


def test_marks_share_out_the_time_that_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 3.0, 7.0, 8.0, 20.0])
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    with timeline() as times:  # made by the real clock, hence the skip
        times.skip()
        mark("embed")
        mark("linear")
        mark("linear")
        mark("head")
        times.skip()
    mark("embed")  # nobody looks
    spent = {stage: seconds for stage, seconds in times.seconds.items() if seconds}
    assert spent == {"embed": 1.0, "linear": 6.0, "head": 1.0}


def test_a_profile_names_every_stage_that_a_dropping_model_has() -> None:
    model = thresher.attach(make("bert"), settings(CONFIGS["ltp"]))
    found = profile(model, dataset(12), rounds=2)
    for times in (found.packed, found.thresher):
        assert tuple(times) == STAGES
        for stage in ("embed", "pack", "linear", "attention", "norms", "restore", "head"):
            assert times[stage] > 0, stage
    assert found.packed["select"] == 0
    assert found.thresher["select"] > 0
    with pytest.raises(OptionError, match="at least 1 row and 1 round"):
        profile(model, dataset(12), rounds=0)
    with pytest.raises(OptionError, match="nothing attached"):
        profile(make("bert"), dataset(12))


def test_tokenising_is_timed_once_a_round_and_common_to_both_ways() -> None:
    model = thresher.attach(make("bert"), settings(CONFIGS["ltp"]))
    made: list[None] = []
    rounds: list[int] = []

    def tokenise() -> None:
        made.append(None)
        time.sleep(0.002)

    found = profile(model, dataset(6), rounds=2, batch_size=3, tokenise=tokenise, on_round=rounds.append)
    assert found.packed["tokenise"] == found.thresher["tokenise"] >= 0.002
    assert len(made) == 3  # with the warm-up
    assert rounds == [1, 2, 3]


def test_a_timeline_changes_no_answer() -> None:
    model = thresher.attach(make("bert"), settings(CONFIGS["ltp"]))
    plain = outputs_of(model, batch("bert"))
    with timeline():
        watched = outputs_of(model, batch("bert"))
    assert (plain["logits"] == watched["logits"]).all()


def rows_of(lengths: list[int]) -> Any:
    return datasets.Dataset.from_dict({"input_ids": [[1] * n for n in lengths]})


@given(st.lists(st.integers(1, 60), min_size=1, max_size=40), st.integers(1, 200))
def test_batches_by_tokens(lengths: list[int], tokens: int) -> None:
    made = batches(rows_of(lengths), tokens=tokens)
    assert sorted(i for index in made for i in index) == list(range(len(lengths)))
    sizes = [[lengths[i] for i in index] for index in made]
    flat = [n for size in sizes for n in size]
    assert flat == sorted(flat, reverse=True)
    for size, following in zip(sizes, [*sizes[1:], None], strict=True):
        assert sum(size) <= tokens or len(size) == 1
        assert following is None or sum(size) + following[0] > tokens  # none could have been fuller


def test_answers_come_back_in_the_callers_order_however_rows_are_batched() -> None:
    model = thresher.attach(make("bert"), settings(CONFIGS["ltp"]))
    rows = dataset(30)
    by_tokens, by_rows = run(model, rows).predictions, run(model, rows, batch_size=4).predictions
    assert by_tokens == pytest.approx(by_rows, abs=1e-5)
