"""Frontiers, and the search that finds them: against naive references, interrupted and resumed, on models, as a command."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable
from itertools import combinations_with_replacement, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import thresher
from commands import call, fails, ok, synthetic, write_rows
from helpers import build, config_of, dataset, make, settings, tokenizer
from thresher.errors import CheckpointError, DataError, OptionError, TargetError
from thresher.frontier import Frontier, Point, configured
from thresher.measure.run import prepared, run, run_packed
from thresher.methods import CONFIGS
from thresher.model import attachment_of, policy_of, set_config, set_speedup
from thresher.proposals import Space
from thresher.searching import FILE, search, search_frontier

SAMPLERS = ("nsga2", "evolutionary", "random")

# --- the frontier ----------------------------------------------------------------------------------------------------

# Few distinct values, so that ties are common.
_POINTS = st.lists(
    st.tuples(st.integers(10, 16).map(lambda v: v / 10), st.integers(0, 6).map(lambda v: v / 8)), max_size=12
)


def frontier(*values: tuple[float, float]) -> Frontier:
    """Each point's retention says where it was given."""
    return Frontier(tuple(Point((1 / (i + 1),), *pair) for i, pair in enumerate(values)))


def area(values: list[tuple[float, float]], reference: tuple[float, float]) -> float:
    """The rectangles between all coordinates that some point is above and to the right of."""
    xs, ys = (sorted({reference[i], *(v[i] for v in values if v[i] > reference[i])}) for i in (0, 1))
    return sum(
        (right - left) * (top - bottom)
        for left, right in pairwise(xs)
        for bottom, top in pairwise(ys)
        if any(x >= right and y >= top for x, y in values)
    )


@given(_POINTS)
def test_a_frontier_is_what_nothing_beats(values: list[tuple[float, float]]) -> None:
    def beats(q: tuple[float, float], p: tuple[float, float]) -> bool:
        return q[0] >= p[0] and q[1] >= p[1] and q != p

    kept = sorted({p for p in values if not any(beats(q, p) for q in values)})
    found = frontier(*values)
    assert [(p.speedup, p.quality) for p in found.points] == kept
    assert [p.retention for p in found.points] == [(1 / (values.index(p) + 1),) for p in kept]


@given(_POINTS, st.sampled_from([(1.0, 0.0), (1.2, 0.3), (0.5, -1.0)]))
def test_hypervolume_is_the_area_below(values: list[tuple[float, float]], reference: tuple[float, float]) -> None:
    assert frontier(*values).hypervolume(reference) == pytest.approx(area(values, reference))


@given(_POINTS, st.floats(0.9, 1.7))
def test_at_gives_the_best_of_those_fast_enough(values: list[tuple[float, float]], speedup: float) -> None:
    fast = [quality for ratio, quality in values if ratio >= speedup]
    if fast:
        point = frontier(*values).at(speedup)
        assert point.speedup >= speedup
        assert point.quality == max(fast)
    else:
        with pytest.raises(TargetError):
            frontier(*values).at(speedup)


def test_at_names_the_nearest_there_is() -> None:
    found = frontier((1.0, 0.9), (1.876, 0.8))
    with pytest.raises(TargetError, match=r"speedup of 2\.00x; the nearest has 1\.87x"):
        found.at(2.0)
    assert found.at(1.87).speedup == 1.876  # what was named can be had
    with pytest.raises(TargetError, match="has no points"):
        frontier().at(1.0)


@given(_POINTS, st.integers(2, 6))
def test_thinning_drops_what_costs_least(values: list[tuple[float, float]], limit: int) -> None:
    found = frontier(*values)
    thin = found.thinned(limit)
    assert len(thin.points) == min(limit, len(found.points))
    assert not found.points or (thin.points[0], thin.points[-1]) == (found.points[0], found.points[-1])
    left = [(p.speedup, p.quality) for p in found.points]
    while len(left) > limit:
        left = max(
            (left[:i] + left[i + 1 :] for i in range(1, len(left) - 1)), key=lambda rest: area(rest, (0.0, -1.0))
        )
    assert thin.hypervolume((0.0, -1.0)) == pytest.approx(area(left, (0.0, -1.0)), abs=0.02)


def test_thinning_by_hand() -> None:
    found = frontier((1.0, 0.9), (1.1, 0.89), (2.0, 0.85), (2.05, 0.8), (3.0, 0.5))
    assert [p.speedup for p in found.thinned(4).points] == [
        1.0,
        2.0,
        2.05,
        3.0,
    ]  # loses .1 x .04; others .9 x .05, .05 x .3
    assert [p.speedup for p in found.thinned(3).points] == [1.0, 2.0, 3.0]  # then .05 x .3 rather than 1 x .05
    with pytest.raises(OptionError, match="at least 2"):
        found.thinned(1)


def test_what_is_no_number_is_on_no_frontier() -> None:
    assert frontier((2.0, float("nan")), (3.0, float("-inf")), (1.0, 0.5)).configurations == ((1 / 3,),)


@given(_POINTS)
def test_a_frontier_survives_json(values: list[tuple[float, float]]) -> None:
    found = frontier(*values)
    assert Frontier.from_list(json.loads(json.dumps(found.to_list()))) == found


@pytest.mark.parametrize(
    "noted",
    [7, [7], [{"speedup": 1.0, "quality": 0.5}], [{"retention": [], "speedup": 1, "quality": 1}],
     [{"retention": ["x"], "speedup": 1, "quality": 1}]],
)  # fmt: skip
def test_a_frontier_that_is_not_readable(noted: Any) -> None:
    with pytest.raises(CheckpointError, match=r"thresher\.json is not readable .* search again"):
        Frontier.from_list(noted)


# --- the space -------------------------------------------------------------------------------------------------------

_SPACES = st.builds(Space.of, st.integers(1, 12), st.sampled_from([0.05, 0.055, 0.3]), st.sampled_from([0.01, 0.1]))


@given(_SPACES, st.data())
def test_ratios_make_configurations_and_back(space: Space, data: st.DataObject) -> None:
    ratio = st.floats(space.smallest, 1.0)
    made = space.product(data.draw(st.lists(ratio, min_size=space.layers, max_size=space.layers)))
    assert len(made) == space.layers
    assert all(space.smallest <= after <= before <= 1.0 for before, after in pairwise((1.0, *made)))
    assert all(fraction * space.steps == pytest.approx(round(fraction * space.steps)) for fraction in made)
    ratios = space.ratios(made)
    assert all(space.smallest <= one <= 1.0 for one in ratios)
    assert space.product(ratios) == made == space.onto(made)


@given(_SPACES)
def test_constant_ratios_reach_from_one_end_to_the_other(space: Space) -> None:
    configurations = space.constant()
    assert len(configurations) == 22
    assert configurations[:2] == [(space.smallest,) * space.layers, (1.0,) * space.layers]
    kept = [sum(one) / space.layers for one in (configurations[0], *configurations[2:], configurations[1])]
    steps = np.diff(kept)
    assert (steps >= -1e-9).all()
    assert steps.max() <= (1 - space.smallest) / 21 + 1.1 / space.steps


# --- searching a toy whose frontier is known -------------------------------------------------------------------------

LAYERS, GRID, LOWEST, REFERENCE = 5, 0.1, 0.1, (1.0, 0.0)
LOSS = np.array([0.6, 0.25, 0.1, 0.04, 0.01])


def toy(retention: tuple[float, ...]) -> tuple[float, float]:
    """Early layers lose more by dropping, and more the more they drop; work is what attention and feed-forward read."""
    kept = np.array(retention)
    work = (np.array([1.0, *retention[:-1]]) + 2 * kept).sum() / (3 * LAYERS)
    return 1.0 - float((LOSS * (1 - kept) ** 3).sum()), 1.0 / work


def looked(**options: Any) -> tuple[Frontier, Counter[tuple[float, ...]]]:
    """A search of the toy, and how often each configuration was evaluated."""
    asked: Counter[tuple[float, ...]] = Counter()

    def evaluate(retention: tuple[float, ...]) -> tuple[float, float]:
        asked[retention] += 1
        return toy(retention)

    return search_frontier(evaluate, LAYERS, **{"grid": GRID, "lowest": LOWEST, **options}), asked


def test_the_samplers_find_more_of_the_known_frontier_than_chance() -> None:
    fractions = [k / 10 for k in range(10, 0, -1)]
    every = sorted((toy(one)[::-1] for one in combinations_with_replacement(fractions, LAYERS)), reverse=True)
    known = [pair for i, pair in enumerate(every) if pair[1] > max((quality for _, quality in every[:i]), default=-1.0)]
    best = area(known, REFERENCE)
    shares = {
        sampler: [
            looked(sampler=sampler, seed=seed, evaluations=90)[0].hypervolume(REFERENCE) / best for seed in range(4)
        ]
        for sampler in SAMPLERS
    }
    assert max(map(max, shares.values())) <= 1.0 + 1e-9
    for sampler in ("nsga2", "evolutionary"):
        assert np.mean(shares[sampler]) > 0.95
        assert 1 - np.mean(shares[sampler]) < 0.75 * (1 - np.mean(shares["random"]))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_nothing_is_evaluated_twice_and_the_seed_decides(sampler: str) -> None:
    found, asked = looked(sampler=sampler, evaluations=150, seed=3)
    assert set(asked.values()) == {1}
    assert asked.total() == 150
    for retention in asked:
        assert all(LOWEST <= after <= before <= 1.0 for before, after in pairwise((1.0, *retention)))
    again, same = looked(sampler=sampler, evaluations=150, seed=3)
    assert (again, list(same)) == (found, list(asked))
    assert list(looked(sampler=sampler, evaluations=150, seed=4)[1]) != list(asked)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_space_that_is_used_up_ends_the_search(sampler: str) -> None:
    asked: list[tuple[float, ...]] = []

    def evaluate(retention: tuple[float, ...]) -> tuple[float, float]:
        asked.append(retention)
        return retention[0], 1 / retention[0]

    found = search_frontier(evaluate, 1, evaluations=1000, sampler=sampler, grid=0.1, lowest=0.1)  # type: ignore[arg-type]
    assert sorted(asked) == [(k / 10,) for k in range(1, 11)]
    assert len(found.points) == 10


def test_what_to_start_from_comes_first_and_bad_values_last() -> None:
    start = ((0.9, 0.52, 0.5, 0.1, 0.1), (0.9, 0.5, 0.5, 0.1, 0.001))
    seen: list[Point] = []
    found = search_frontier(
        lambda c: (float("nan") if c[0] < 0.9 else c[-1], toy(c)[1]), LAYERS, start=start, evaluations=40, grid=GRID,
        lowest=LOWEST, on_evaluation=seen.append,
    )  # fmt: skip
    assert seen[0].retention == (0.9, 0.5, 0.5, 0.1, 0.1)
    assert seen[1].retention == (0.1,) * 5  # the second start is the first one on the grid
    assert len(seen) == 40
    assert any(point.quality == float("-inf") for point in seen)
    assert all(point.retention[0] >= 0.9 for point in found.points)
    assert search_frontier(toy, LAYERS, start=start, evaluations=1, grid=GRID, lowest=LOWEST).points[0].speedup > 1


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"evaluations": 0}, "evaluations must be at least 1"),
        ({"sampler": "nsga3"}, "no sampler 'nsga3'; did you mean 'nsga2'"),
        ({"grid": 0.0}, "grid must be"),
        ({"lowest": 1.0}, "lowest must be"),
        ({"start": [(0.5,)]}, "1 fractions but there are 5 layers"),
        ({"start": [(0.5, 0.6, 0.5, 0.5, 0.5)]}, "never rise"),
    ],
)
def test_settings_out_of_range(options: dict[str, Any], match: str) -> None:
    with pytest.raises(OptionError, match=match):
        looked(**options)
    with pytest.raises(OptionError, match="at least 1 layer"):
        search_frontier(toy, 0)


def test_without_optuna(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(OptionError, match=r"needs optuna: pip install \"thresher\[search\]\""):
        looked(evaluations=2)
    assert looked(evaluations=2, sampler="evolutionary")[0].points


# --- going on --------------------------------------------------------------------------------------------------------


def interrupted(after: int, directory: Path, **options: Any) -> list[tuple[float, ...]]:
    asked: list[tuple[float, ...]] = []

    def evaluate(retention: tuple[float, ...]) -> tuple[float, float]:
        if len(asked) == after:
            raise KeyboardInterrupt
        asked.append(retention)
        return toy(retention)

    with pytest.raises(KeyboardInterrupt):
        search_frontier(evaluate, LAYERS, grid=GRID, lowest=LOWEST, directory=directory, **options)
    return asked


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_resumed_search_is_the_uninterrupted_one(sampler: str, tmp_path: Path) -> None:
    whole, asked = looked(sampler=sampler, evaluations=120)
    before = interrupted(30, tmp_path, sampler=sampler) + interrupted(41, tmp_path, sampler=sampler)
    seen: list[Point] = []
    found, after = looked(sampler=sampler, evaluations=120, directory=tmp_path, on_evaluation=seen.append)
    assert before + list(after) == list(asked)
    assert found == whole
    assert [point.retention for point in seen] == list(asked)  # those remembered too
    # The same again costs nothing, and so does a part of it; more goes on.
    assert looked(sampler=sampler, evaluations=120, directory=tmp_path) == (whole, Counter())
    part = looked(sampler=sampler, evaluations=60)[0]
    assert looked(sampler=sampler, evaluations=60, directory=tmp_path) == (part, Counter())
    assert looked(sampler=sampler, evaluations=125, directory=tmp_path)[1].total() == 5


@pytest.mark.parametrize("cut", [1, 9, 40])
def test_a_half_written_last_line_is_evaluated_again(cut: int, tmp_path: Path) -> None:
    whole, asked = looked(evaluations=40)
    interrupted(30, tmp_path)
    file = tmp_path / FILE
    file.write_bytes(file.read_bytes()[:-cut])
    found, after = looked(evaluations=40, directory=tmp_path)
    assert (found, list(after)) == (whole, list(asked)[29:])
    assert len({line for line in file.read_text().splitlines() if json.loads(line)}) == 41


def test_a_half_written_first_line_is_a_new_start(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text('{"layers": 5, "samp')
    assert looked(evaluations=5, directory=tmp_path)[1].total() == 5
    assert looked(evaluations=5, directory=tmp_path)[1].total() == 0


def test_a_quality_that_is_no_number_is_remembered(tmp_path: Path) -> None:
    asked: list[tuple[float, ...]] = []

    def evaluate(retention: tuple[float, ...]) -> tuple[float, float]:
        asked.append(retention)
        return float("nan"), 1.0

    for _ in range(2):
        assert search_frontier(evaluate, 2, evaluations=30, directory=tmp_path, sampler="evolutionary").points == ()
    assert len(asked) == 30
    assert "NaN" not in (tmp_path / FILE).read_text() and "Infinity" not in (tmp_path / FILE).read_text()


@pytest.mark.parametrize(
    ("options", "named"),
    [({"seed": 1}, "seed"), ({"lowest": 0.2, "sampler": "random"}, "sampler, lowest"), ({"about": {"rows": 3}}, "rows"),
     ({"start": [(0.5,) * 5]}, "start")],
)  # fmt: skip
def test_another_search_in_the_same_directory_is_refused(options: dict[str, Any], named: str, tmp_path: Path) -> None:
    looked(evaluations=3, directory=tmp_path)
    before = (tmp_path / FILE).read_text()
    with pytest.raises(OptionError, match=rf"other settings \({named}\); remove it, or give another directory"):
        looked(evaluations=3, directory=tmp_path, **options)
    assert (tmp_path / FILE).read_text() == before


@pytest.mark.parametrize("line", ["{", "[]", '{"retention": [1], "speedup": 1}', "7"])
def test_a_damaged_line_is_named(line: str, tmp_path: Path) -> None:
    looked(evaluations=3, directory=tmp_path)
    lines = (tmp_path / FILE).read_text().splitlines()
    (tmp_path / FILE).write_text("\n".join([*lines[:2], line, *lines[3:]]) + "\n")
    with pytest.raises(DataError, match="line 3 is damaged; remove that file to search anew"):
        looked(evaluations=3, directory=tmp_path)
    (tmp_path / FILE).write_text("\n".join([line, *lines[1:]]) + "\n")
    with pytest.raises((DataError, OptionError), match="line 1 is damaged|other settings"):  # JSON, of something else
        looked(evaluations=3, directory=tmp_path)


# --- models ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rows() -> Any:
    return dataset(24, high=24)


def attached(method: str = "attention-mass", **changes: Any) -> Any:
    return thresher.attach(make("bert"), settings(CONFIGS[method], **changes))


def alike(model: Any, rows: Any) -> Callable[[np.ndarray], float]:
    stock = run_packed(model, rows).predictions
    return lambda answers: 1.0 - float(np.abs(answers - stock).mean())


def test_prepared_batches_serve_as_the_rows(rows: Any) -> None:
    model = attached()
    ready = list(prepared(model, rows, 7))
    for _ in range(2):
        np.testing.assert_array_equal(run(model, ready).predictions, run(model, rows, batch_size=7).predictions)
    assert run(model, ready).speedup == run(model, rows).speedup > 1
    np.testing.assert_array_equal(
        run_packed(model, ready).predictions, run_packed(model, rows, batch_size=7).predictions
    )


def test_a_model_is_searched_saved_and_set(rows: Any, tmp_path: Path) -> None:
    model = attached(strength=0.7)
    config, quality = policy_of(model).config, alike(model, rows)
    found = search(model, rows, quality=quality, label="likeness", evaluations=40, limit=6)
    assert policy_of(model).config == config
    assert 3 <= len(found.points) <= 6
    assert found.points[0].speedup == 1.0 and found.points[0].quality == pytest.approx(1.0)
    notes = attachment_of(model).notes
    assert notes["frontier"] == found.to_list()
    assert notes["search"] == {"quality": "likeness", "rows": 24, "evaluations": 40, "sampler": "nsga2", "seed": 0}
    thresher.save(model, tmp_path)
    for point in found.points[1:]:
        loaded = thresher.load(tmp_path, speedup=point.speedup)
        assert policy_of(loaded).config == config.replace(retention=point.retention, strength=1.0)
        measured = run(loaded, rows)
        assert measured.speedup == pytest.approx(point.speedup)
        assert quality(measured.predictions) == pytest.approx(point.quality, abs=1e-6)
    assert policy_of(thresher.load(tmp_path)).config == config
    with pytest.raises(TargetError, match=r"speedup of 500\.00x; the nearest has"):
        thresher.load(tmp_path, speedup=500.0)
    set_speedup(model, 1.01)
    assert policy_of(model).config.retention == found.at(1.01).retention


def test_a_search_of_a_model_goes_on_only_with_the_same(rows: Any, tmp_path: Path) -> None:
    model = attached()
    quality = alike(model, rows)
    options: dict[str, Any] = {"quality": quality, "evaluations": 4, "directory": tmp_path}
    found = search(model, rows, **options)

    def never(answers: np.ndarray) -> float:
        raise AssertionError

    set_config(
        model, policy_of(model).config.replace(strength=0.5, retention=(0.5, 0.5, 0.5))
    )  # not what a search is of
    assert search(model, rows, **{**options, "quality": never}) == found
    for changed, named in ((dataset(24, seed=1, high=24), "rows"), (rows.select(range(20)), "rows")):
        with pytest.raises(OptionError, match=rf"other settings \({named}\)"):
            search(model, changed, **options)
    with pytest.raises(OptionError, match=r"other settings \(quality\)"):
        search(model, rows, label="accuracy", **options)
    set_config(model, policy_of(model).config.replace(min_tokens=3))
    with pytest.raises(OptionError, match=r"other settings \(settings\)"):
        search(model, rows, **options)
    set_config(model, policy_of(model).config.replace(min_tokens=1))
    with torch.no_grad():
        model.classifier.bias += 1
    with pytest.raises(OptionError, match=r"other settings \(model\)"):
        search(model, rows, **options)


def test_counts_make_way_for_a_retention() -> None:
    config = CONFIGS["attention-mass"](counts=(5, 4, 3), min_tokens=2, strength=3.0)  # type: ignore[call-arg]
    new = configured(config, (0.5, 0.4, 0.3))
    assert new == CONFIGS["attention-mass"](retention=(0.5, 0.4, 0.3), min_tokens=2)  # type: ignore[call-arg]


@pytest.mark.parametrize("method", ["ltp", "cascade-top-k"])
def test_methods_without_configurations_are_refused(method: str, rows: Any) -> None:
    model = attached(method)
    with pytest.raises(
        OptionError, match=rf"'{method}' has no retention configurations; those with them are .*attention-mass"
    ):
        search(model, rows, quality=lambda answers: 1.0)
    attachment_of(model).notes["frontier"] = [{"retention": [0.5, 0.4, 0.3], "speedup": 2.0, "quality": 0.9}]
    with pytest.raises(OptionError, match="no retention configurations"):
        set_speedup(model, 1.5)


def test_a_model_that_cannot_be_searched(rows: Any) -> None:
    model = attached()
    with pytest.raises(OptionError, match="at least one row"):
        search(model, rows.select([]), quality=lambda answers: 1.0)
    with pytest.raises(DataError, match="pearson is not a number for any configuration"):
        search(model, rows, quality=lambda answers: float("nan"), label="pearson", evaluations=2)
    assert "frontier" not in attachment_of(model).notes
    with pytest.raises(TargetError, match="no frontier to pick a speedup from; make one with thresher search"):
        set_speedup(model, 1.5)
    with pytest.raises(OptionError, match="no policy"):
        search(thresher.attach(make("bert")), rows, quality=lambda answers: 1.0)


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain checkpoint, rows, and a model that was searched."""
    root = tmp_path_factory.mktemp("search")
    build(config_of("bert", 2, num_labels=2), "sequence").save_pretrained(root / "clf")
    tokenizer().save_pretrained(root / "clf")
    data = write_rows(root / "rows.jsonl", synthetic())
    done = call("search", root / "clf", data, "--method", "attention-mass", "--evaluations", 12, "--out", root / "m",
                "--chart", root / "charts" / "f.svg", "--json")  # fmt: skip
    assert done.exit_code == 0, done.stderr
    (root / "said.json").write_text(done.stdout)
    return root


def test_the_command_saves_a_frontier_to_pick_from(place: Path) -> None:
    said = json.loads((place / "said.json").read_text())
    assert (said["method"], said["rows"], said["evaluations"], said["metric"]) == ("attention-mass", 40, 12, "accuracy")
    assert (place / "charts" / "f.svg").read_text().count("attention-mass")
    assert not (place / "m" / "search").exists()
    model = thresher.load(place / "m")
    assert attachment_of(model).notes["frontier"] == said["frontier"]
    last = said["frontier"][-1]
    ratio = last["speedup"] - 1e-6
    for command in ("evaluate", "bench", "predict"):
        more = ("--batch-size", 8, "--rounds", 1) if command == "bench" else ()
        got = ok(command, place / "m", place / "rows.jsonl", "--speedup", ratio, *more)
        assert got["flops" if command == "bench" else "speedup"] == pytest.approx(last["speedup"])
    evaluated = ok("evaluate", place / "m", place / "rows.jsonl", "--speedup", ratio)
    assert evaluated["thresher"]["accuracy"] == pytest.approx(last["quality"])
    assert evaluated["stock"]["accuracy"] == pytest.approx(said["stock"])


def test_the_command_in_place_without_labels_and_its_table(place: Path, tmp_path: Path) -> None:
    thresher.load(place / "m").save_pretrained(tmp_path / "m")
    tokenizer().save_pretrained(tmp_path / "m")
    texts = write_rows(tmp_path / "t.jsonl", [{"text": row["text"]} for row in synthetic()])
    done = call("search", tmp_path / "m", texts, "--evaluations", 5, "--sampler", "evolutionary", "--limit", 30)
    assert done.exit_code == 0, done.stderr
    assert "attention-mass on 30 rows, 5 configurations tried" in done.stdout
    assert "agreement" in done.stdout and "1.00x" in done.stdout
    assert f"thresher evaluate {tmp_path / 'm'} {texts} --speedup" in done.stdout
    assert attachment_of(thresher.load(tmp_path / "m")).notes["search"]["quality"] == "agreement"


def test_an_interrupted_command_goes_on(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = (
        "search",
        place / "clf",
        place / "rows.jsonl",
        "--method",
        "first",
        "--evaluations",
        8,
        "--out",
        tmp_path / "o",
    )
    calls, real = [], run

    def failing(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == stop:
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr("thresher.searching.run", failing)
    stop = 1
    done = call(*words)
    assert (done.exit_code, done.stdout) == (130, "")
    assert "nothing was written" in done.stderr
    assert not (tmp_path / "o").exists()
    stop = 5  # the fourth evaluation of the second attempt
    done = call(*words)
    assert (done.exit_code, done.stdout) == (130, "")
    assert f"kept in {tmp_path / 'o' / 'search'}; the same command goes on from there" in done.stderr
    fails(*words, "--seed", 5, match=r"other settings \(seed")
    stop, before = 0, len(calls)
    done = call(*words)
    assert done.exit_code == 0, done.stderr
    assert "Going on with the unfinished search" in done.stderr
    assert len(calls) - before == 8 - 3
    assert not (tmp_path / "o" / "search").exists()


def test_what_the_command_refuses(place: Path, tmp_path: Path) -> None:
    data = place / "rows.jsonl"
    fails("search", place / "clf", data, match="--method attention-mass --out DIR")
    fails("search", place / "clf", data, "--method", "first", match="give --out")
    fails("search", place / "clf", data, "--set", "min_tokens=2", match="--set needs --method")
    fails(
        "search", place / "clf", data, "--method", "ltp", "--out", tmp_path / "o", match="'ltp' has no retention conf"
    )
    fails("search", place / "m", data, "--chart", tmp_path / "c.pdf", match=r"--chart takes a \.svg or \.png file")
    fails("evaluate", place / "m", data, "--speedup", 99, match=r"No point of .* the nearest has \d")
    fails("evaluate", place / "clf", data, "--speedup", 2, match="plain checkpoint, which has no frontier")
    assert not (tmp_path / "o").exists()
    assert call("search", place / "m", data, "--sampler", "nsga3").exit_code == 2
