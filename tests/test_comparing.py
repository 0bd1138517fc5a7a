"""Every method on one task: who takes part, what each may read, which rows choose and which judge, and what is picked."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import thresher
from helpers import dataset, make, tokenizer
from thresher.comparing import Clock, Comparison, Part, compare, contest
from thresher.comparing.contestants import TRAINED_ON, contestants, draws_of, plan, stages_of, steps_for
from thresher.comparing.judging import halves, parts
from thresher.comparing.page import report_of, verdict
from thresher.comparing.standings import Standing, Target, Worth, frontier, pick
from thresher.errors import DataError, OptionError, TargetError
from thresher.exits import EXIT_CONFIGS
from thresher.measure.run import run, run_packed
from thresher.methods import CONFIGS
from thresher.model import policy_of
from thresher.policy import Stage
from thresher.training import stages

METHODS = ("attention-mass", "length-adaptive", "random")
TINY = Clock(rows=6, batch_size=3, rounds=1)


def accuracy(predictions: np.ndarray, rows: Any) -> float:
    return float((predictions.argmax(-1) == np.array(rows["labels"])).mean())


def compared(directory: Path, **options: Any) -> Comparison:
    settings: dict[str, Any] = {
        "validation": dataset(24, seed=1),
        "quality": accuracy,
        "methods": METHODS,
        "passes": 32,
        "speedups": (1.3,),
        "speedup": 1.6,
        "evaluations": 3,
        "sampler": "evolutionary",
        "overrides": {"batch_size": 8},
        "precision": "float32",
        "use_cpu": True,
        "clock": TINY,
    }
    return compare(make("bert", layers=2), dataset(24), tokenizer(), directory, **(settings | options))


class Trainings:
    """Counts what is trained; `stop` raises KeyboardInterrupt instead of training so many."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.done: list[str] = []
        self.stop: int | None = None
        real = stages.run_stage

        def counted(model: Any, stage: Stage, rows: Any, tokens: Any, directory: Path, **options: Any) -> Any:
            if len(self.done) == self.stop:
                raise KeyboardInterrupt
            place = Path(directory).parts  # .../methods/NAME/training, or a folder of its own there for each stage
            self.done.append(f"{place[len(place) - place[::-1].index('training') - 2]}/{stage.name}")
            return real(model, stage, rows, tokens, directory, **options)

        for module in ("thresher.training.recipe", "thresher.comparing.contest"):
            monkeypatch.setattr(import_module(module), "run_stage", counted)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    return compared(tmp_path_factory.mktemp("compared") / "out")


# --- contestants and budgets ---------------------------------------------------------------------------------------------


def test_everyone_is_every_method_exit_and_union_and_the_controls() -> None:
    names = [one.name for one in contestants(None)]
    assert {*CONFIGS, *EXIT_CONFIGS, TRAINED_ON, "ltp+fastbert", "ltp+settled-span"} <= set(names)
    assert all(set(name.split("+")) <= {*CONFIGS, *EXIT_CONFIGS, TRAINED_ON} for name in names)
    assert not any(one.trains for one in contestants(["random", "first", "last"]))
    assert all(one.trains for one in contestants(None) if one.name not in ("random", "first", "last"))


@pytest.mark.parametrize(
    ("methods", "match"),
    [
        (["ltq"], "There is no method 'ltq'; did you mean 'ltp'"),
        (["ltp", "ltp"], "'ltp' is given twice"),
        ([], "at least one method"),
        (["ltp+fastbirt"], "There is no method 'fastbirt'; did you mean 'fastbert'"),
        (["ltp+ase"], "one method and one exit, such as ltp\\+fastbert, not 'ltp\\+ase'"),
    ],
)
def test_unknown_contestants(methods: list[str], match: str) -> None:
    with pytest.raises(OptionError, match=match):
        contestants(methods)


@given(examples=st.integers(0, 300), rows=st.integers(1, 40), batch=st.integers(1, 50))
def test_steps_are_those_of_a_walk_through_the_rows(examples: int, rows: int, batch: int) -> None:
    steps = read = 0
    while True:  # one batch after the other, the last of an epoch smaller
        left = rows - read % rows
        size = min(batch, left)
        if read + size > examples or (size < batch and size < left):
            break
        steps, read = steps + 1, read + size
    assert steps_for(examples, rows, batch) == (steps, read)


@pytest.mark.parametrize(("passes", "rows", "batch"), [(5000, 700, 16), (64, 64, 16), (100, 100, 16), (97, 24, 8)])
def test_a_plan_stays_inside_its_budget_and_the_trainer_makes_its_steps(passes: int, rows: int, batch: int) -> None:
    soft, hard = Stage(name="soft", mode="soft"), Stage(name="hard", mode="hard", epochs=2.0)
    made = plan([soft, hard], lambda stage: 2 if stage.name == "hard" else 1, passes, rows, {"batch_size": batch}, "x")
    read = 0
    for stage, draws, share in zip(made.stages, (1, 2), (1 / 3, 2 / 3), strict=True):
        # As transformers.Trainer counts the steps of so many epochs.
        steps = int(np.ceil(stage.epochs * -(-rows // batch)))
        expected, examples = steps_for(int(passes * share + 1e-9) // draws, rows, batch)
        assert steps == expected
        read += examples * draws
    assert made.passes == read <= passes


@pytest.mark.parametrize(("passes", "drawn"), [(30, 10), (47, 15), (60, None)])
def test_what_is_scheduled_by_epochs_reads_few_rows_often(passes: int, drawn: int | None) -> None:
    soft = Stage(name="soft", mode="soft", epochs=5.0)
    made = plan([soft], lambda _: 1, passes, 20, {"batch_size": 5}, "x", 3)
    assert made.rows == drawn
    assert made.passes <= passes
    assert np.ceil(made.stages[0].epochs) == 3
    with pytest.raises(OptionError, match="give at least 30, or smaller batches"):
        plan([soft, soft], lambda _: 1, 29, 20, {"batch_size": 5}, "x", 3)


def test_a_pass_of_a_step_that_reads_several_times_counts_each(done: Comparison) -> None:
    # 24 rows in batches of 8: attention mass reads 32 once, Length-Adaptive 8 four times, and controls learn nothing.
    assert done.passes == {"attention-mass": 32, "length-adaptive": 32, "random": 0}


def test_passes_that_are_drawn_are_planned_by_their_mean() -> None:
    model = thresher.attach(make("bert", layers=2), thresher.TRBert(samples=7))
    alone, _ = stages_of(model)
    found = []
    for seed in range(12):  # half of the steps imitate in one pass, half read seven times
        torch.manual_seed(seed)
        found.append(draws_of(policy_of(model))(alone))
    assert set(found) == {found[0]}
    assert 3.5 <= found[0] <= 4.5


def test_a_budget_that_a_method_cannot_be_trained_in_leaves_it_out_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = Trainings(monkeypatch)
    with pytest.raises(OptionError, match="less than 3 epochs of one batch .* give at least 48"):
        compared(tmp_path, methods=("random", "adapler"), passes=8, clock=None)
    assert seen.done == []
    everyone = contestants(("attention-mass", "adapler"))
    monkeypatch.setattr(import_module("thresher.comparing.recipe"), "contestants", lambda *_: everyone)
    found = compared(tmp_path, methods=None, passes=8, clock=None)
    assert seen.done == ["attention-mass/distil"]
    assert "give at least 48, or smaller batches" in found.left_out["adapler"]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"speedup": "2"}, "speedup must be a number above 1, not '2'"),
        ({"speedup": None, "max_loss": "x"}, "max_loss must be a number of at least 0, not 'x'"),
        ({"speedup": None, "max_loss": float("nan")}, "max_loss must be a number of at least 0, not nan"),
        ({"passes": "x"}, "whole numbers of at least 1, not 'x'"),
        ({"passes": float("nan")}, "whole numbers of at least 1, not nan"),
        ({"methods": [5]}, "by its name or its settings, not as 5"),
        ({"methods": "fastbert"}, r"a list of names, such as \['fastbert'\]"),
        ({"speedups": ("2",)}, "speedups must be above 1"),
    ],
)
def test_arguments_of_a_wrong_kind_are_refused(options: dict[str, Any], match: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=match):
        compared(tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_short_budget_sharpens_adapler_on_fewer_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = []
    real = contest.fit

    def noted(model: Any, policy: Any, rows: Any, *others: Any, **options: Any) -> Any:
        trained.append((len(rows), [stage.epochs for stage in options["stages"]]))
        return real(model, policy, rows, *others, **options)

    monkeypatch.setattr(contest, "fit", noted)
    found = compared(tmp_path, methods=("adapler",), passes=48, clock=None)
    assert trained == [(8, [2.5, 2.5])]  # of 24 rows; the trainer rounds the epochs up
    assert found.passes == {"adapler": 48}
    assert {one.contestant for one in found.standings} == {"adapler"}


def test_a_budget_below_one_batch_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"31 passes is less than one batch of the stage 'length-drop' of length-adaptive; "
                                          r"give at least 32"):  # fmt: skip
        compared(tmp_path / "out", passes=31)
    assert not (tmp_path / "out").exists()


def test_of_several_that_lack_passes_the_one_that_takes_most_is_told(tmp_path: Path) -> None:
    needs = {}
    for names in (("transkimmer",), ("adapler",), ("transkimmer", "adapler"), ("adapler", "transkimmer")):
        with pytest.raises(OptionError, match="give at least") as refused:
            compared(tmp_path / "out", methods=names, passes=1)
        needs[names] = str(refused.value)
    assert needs["transkimmer", "adapler"] == needs["adapler", "transkimmer"] == needs["adapler",]
    assert needs["transkimmer",] != needs["adapler",]


def test_methods_say_which_rows_they_are_for(tmp_path: Path) -> None:
    found = compared(tmp_path, methods=("ase", "block-skim", "random"), clock=None)
    assert {one.contestant for one in found.standings} == {"random"}
    assert "two texts" in found.left_out["ase"]
    assert "the answer" in found.left_out["block-skim"]
    with pytest.raises(OptionError, match=r"No method can be trained on these rows \(ase: needs rows of two texts\)"):
        compared(tmp_path / "other", methods=("ase",))
    assert not (tmp_path / "other").exists()


def test_pairs_are_seen_by_types(tmp_path: Path) -> None:
    def paired(rows: Any) -> Any:
        types = [[0] * (len(ids) // 2) + [1] * (len(ids) - len(ids) // 2) for ids in rows["input_ids"]]
        return rows.remove_columns("token_type_ids").add_column("token_type_ids", types)

    found = compare(
        make("bert", layers=2), paired(dataset(16)), tokenizer(), tmp_path, validation=paired(dataset(12, seed=1)),
        quality=accuracy, methods=("ase",), passes=16, evaluations=4, sampler="evolutionary", speedup=1.2, speedups=(),
        overrides={"batch_size": 8}, clock=None, precision="float32", use_cpu=True,
    )  # fmt: skip
    assert found.passes == {"ase": 16}
    assert found.standings[0].setting["retention"]


def test_without_labels_the_start_teaches(tmp_path: Path) -> None:
    plain = dataset(16, labels=None)
    found = compare(
        make("bert", layers=2), plain, tokenizer(), tmp_path, validation=dataset(12, seed=1, labels=None),
        methods=("attention-mass", TRAINED_ON), passes=16, speedup=1.3, speedups=(), overrides={"batch_size": 8},
        clock=None, precision="float32", use_cpu=True,
    )  # fmt: skip
    assert found.left_out == {TRAINED_ON: "has nothing to learn without labels"}
    assert found.baseline == (1.0, 1.0)
    assert found.settings["stages"]["label_weight"] == 0.0


def test_exits_and_unions_take_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A union trains both for one budget, and shares its speedup out as is best where settings are chosen."""
    seen = Trainings(monkeypatch)
    names = ("deebert", "settled-span", "attention-mass+deebert")
    assert contestants(names[:1], unions=names[2:]) == contestants([names[0], names[2]])
    found = compare(
        make("bert", layers=4), dataset(16), tokenizer(), tmp_path, validation=dataset(16, seed=1), quality=accuracy,
        methods=names, passes=32, speedup=1.3, speedups=(), overrides={"batch_size": 8},
        clock=TINY, precision="float32", use_cpu=True,
    )  # fmt: skip
    assert "serves question-answering heads" in found.left_out["settled-span"]
    assert seen.done == [
        "deebert/exit", "attention-mass+deebert/distil", "attention-mass+deebert/exit"
    ]  # fmt: skip
    assert all(0 < passes <= 32 for passes in found.passes.values())
    union = next(one for one in found.standings if one.contestant == "attention-mass+deebert")
    assert set(union.setting) == {"strength", "exit_strength"}
    assert all(one.chosen.speedup >= 1.3 for one in found.standings)
    assert found.pick is not None
    assert found.best is not None
    assert run(thresher.load(found.best), dataset(16, seed=1)).speedup > 1.2


# --- which rows choose, which judge --------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 6), min_size=2, max_size=40), st.integers(0, 3))
def test_halves_share_no_unit_and_lose_no_row(units: list[int], seed: int) -> None:
    if len(set(units)) < 2:
        with pytest.raises(DataError, match="at least two"):
            halves(units, seed)
        return
    first, second = halves(units, seed)
    assert sorted([*first, *second]) == list(range(len(units)))
    assert not {units[i] for i in first} & {units[i] for i in second}
    assert abs(len({units[i] for i in first}) - len({units[i] for i in second})) <= 1


def test_no_validation_rows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="There are no validation rows"):
        compared(tmp_path / "out", validation=dataset(24).select([]))
    with pytest.raises(DataError, match="no rows to judge them by"):
        compared(tmp_path / "out", test=dataset(24).select([]))
    with pytest.raises(DataError, match="no rows to train on"):
        compare(make("bert"), dataset(4).select([]), tokenizer(), tmp_path / "out", validation=dataset(4))
    with pytest.raises(OptionError, match="both as parts"):
        parts(Part(dataset(4)), dataset(4), None, 0)
    assert not (tmp_path / "out").exists()


def test_settings_are_chosen_on_one_half_and_judged_on_the_other(done: Comparison) -> None:
    validation = dataset(24, seed=1)
    first, second = halves(range(24), 0)
    assert [count for _, count in done.parts] == [12, 12]
    start = thresher.load(done.directory / "start")
    for number, index in enumerate((first, second)):
        rows = validation.select(index)
        assert done.baseline[number] == pytest.approx(accuracy(run_packed(start, rows).predictions, rows))
    for one in done.standings:
        model = thresher.attach(thresher.load(done.directory / "start"), "random")
        if one.contestant != "random":
            model = thresher.load(done.directory / "methods" / one.contestant)
        settings = dict(one.setting)
        thresher.set_config(model, policy_of(model).config.replace(**settings))
        for worth, index in ((one.chosen, first), (one.judged, second)):
            rows = validation.select(index)
            found = run(model, rows)
            assert worth.speedup == pytest.approx(found.speedup)
            assert worth.quality == pytest.approx(accuracy(found.predictions, rows))
        assert one.loss == pytest.approx(done.baseline[1] - one.judged.quality)


def test_the_target_holds_on_the_rows_for_choosing(done: Comparison) -> None:
    assert done.pick is not None
    met = [one for one in done.standings if one.chosen.speedup >= 1.6]
    assert {one.contestant for one in met} == set(METHODS)
    assert done.pick.chosen.quality == max(one.chosen.quality for one in met)


def test_the_error_of_a_mean_is_over_rows_and_else_by_bootstrap() -> None:
    rows = dataset(50)
    labels = np.array(rows["labels"])
    generator = np.random.default_rng(0)
    before, now = generator.normal(size=(2, 50, 2))
    right: Callable[[np.ndarray], np.ndarray] = lambda said: (said.argmax(-1) == labels).astype(float)  # noqa: E731
    exact = Part(rows, lambda said: float(right(said).mean()), each=right).error(before, now)
    differences = right(before) - right(now)
    assert exact == pytest.approx(np.sqrt(differences.var(ddof=1) / 50))
    drawn = Part.of(rows, accuracy, "rows").error(before, now)
    assert drawn == pytest.approx(exact, rel=0.35)
    assert drawn == Part.of(rows, accuracy, "rows").error(before, now)
    assert Part(rows, lambda said: 0.0).error(before, now) is None


def test_a_group_drawn_twice_is_two_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(import_module("thresher.comparing.judging"), "DRAWS", 5)
    rows = dataset(6).add_column("group", [0, 0, 1, 1, 2, 2])
    seen: list[list[int]] = []

    def quality(predictions: np.ndarray, drawn: Any) -> float:
        seen.append(list(drawn["group"]))
        return float(predictions.mean())

    Part.of(rows, quality, "rows").error(np.zeros((6, 1)), np.ones((6, 1)))
    assert all(groups == [0, 0, 1, 1, 2, 2] for groups in seen)


# --- the frontier and the pick -------------------------------------------------------------------------------------------


def standing(name: str, speedup: float, quality: float, judged: float = 0.5) -> Standing:
    return Standing(name, "", {"strength": speedup}, Worth(speedup, quality), Worth(speedup, judged), 0.9 - judged)


THREE = (standing("a", 1.5, 0.90), standing("b", 3.0, 0.80), standing("c", 2.9, 0.70, 0.99), standing("d", 1.0, 0.99))


def test_the_frontier_is_that_of_the_rows_for_choosing() -> None:
    assert [one.contestant for one in frontier(THREE)] == ["a", "b"]  # c is best where it is judged; d reads everything


@pytest.mark.parametrize(
    ("target", "picked", "nearest"),
    [
        (Target("speedup", 1.2), "a", None),
        (Target("speedup", 2.0), "b", None),
        (Target("speedup", 4.0), None, "b"),
        (Target("max_loss", 0.05), "a", None),
        (Target("max_loss", 0.10), "b", None),
        (Target("max_loss", 0.0), "a", None),
    ],
)
def test_picks(target: Target, picked: str | None, nearest: str | None) -> None:
    found = pick(THREE, target, 0.9)
    assert [None if one is None else one.contestant for one in found] == [picked, nearest]


def test_the_nearest_to_a_loss_is_the_best() -> None:
    found, nearest = pick(THREE, Target("max_loss", 0.01), 0.95)
    assert found is None
    assert nearest is not None
    assert nearest.contestant == "a"
    assert pick([], Target("speedup", 2.0), 0.9) == (None, None)


@pytest.mark.parametrize(
    ("speedup", "max_loss", "match"),
    [(2.0, 0.1, "one target"), (1.0, None, "above 1"), (None, -0.1, "at least 0"), (float("nan"), None, "above 1")],
)
def test_bad_targets(speedup: float | None, max_loss: float | None, match: str) -> None:
    with pytest.raises(OptionError, match=match):
        Target.of(speedup, max_loss, 0.01)
    assert Target.of(None, None, 0.01) == Target("max_loss", 0.01)


# --- what is written -----------------------------------------------------------------------------------------------------


def test_the_pick_is_a_model_that_loads_as_it_was_judged(done: Comparison) -> None:
    assert done.pick is not None
    assert done.best is not None
    model = thresher.load(done.best)
    rows = dataset(24, seed=1).select(halves(range(24), 0)[1])
    found = run(model, rows)
    assert found.speedup == pytest.approx(done.pick.judged.speedup)
    assert accuracy(found.predictions, rows) == pytest.approx(done.pick.judged.quality)
    assert (done.best / "tokenizer_config.json").is_file()


def test_the_result_is_plain_json(done: Comparison) -> None:
    said = json.loads((done.directory / "comparison.json").read_text())
    assert said == json.loads(json.dumps(done.to_dict()))
    assert said["pick"]["contestant"] == done.pick.contestant  # type: ignore[union-attr]
    assert {"torch", "transformers", "thresher", "python"} <= set(said["versions"])
    assert said["settings"]["passes"] == 32
    assert len(said["points"]) == len(done.standings)
    assert [one["name"] for one in said["settings"]["methods"]] == list(METHODS)


def test_the_points_of_the_frontier_are_timed_as_pairs(done: Comparison) -> None:
    assert done.frontier
    for one in done.frontier:
        assert one.measured is not None
        assert {"measured", "padding_only", "kernels"} <= set(one.measured)
        assert one.measured["rows"] == 6
    assert all(one.measured is None for one in done.standings if one not in done.frontier)


def test_the_report_says_what_was_done(done: Comparison) -> None:
    page = (done.directory / "comparison.html").read_text()
    assert "<svg" in page
    assert "http" not in page.replace("http://www.w3.org", "").replace("http-equiv", "")
    for name in METHODS:
        assert name in page
    for words in ("one half of the validation rows", "nothing was chosen on them", "Leaving out padding alone gains",
                  "packed, nothing dropped", "What each word means", "standard error"):  # fmt: skip
        assert words in page
    assert verdict(done) in report_of(done).summary
    assert (done.directory / "frontier.svg").read_text().startswith("<?xml")


# --- going on ------------------------------------------------------------------------------------------------------------


def test_an_interrupted_comparison_goes_on_and_trains_nothing_twice(
    done: Comparison, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = Trainings(monkeypatch)
    seen.stop = 1
    with pytest.raises(KeyboardInterrupt):
        compared(tmp_path)
    assert seen.done == ["attention-mass/distil"]
    assert not (tmp_path / "comparison.json").exists()
    seen.stop = None
    found = compared(tmp_path)
    assert seen.done == ["attention-mass/distil", "length-adaptive/length-drop"]
    assert found.standings == done.standings  # as if it had never stopped
    shares: list[float] = []
    assert compared(tmp_path, on_share=shares.append) == found
    assert len(seen.done) == 2
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


def test_another_target_and_more_methods_use_what_is_there(
    done: Comparison, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "out"
    shutil.copytree(done.directory, directory)
    seen = Trainings(monkeypatch)
    other = compared(directory, speedup=None, max_loss=2.0, methods=(*METHODS, "first", TRAINED_ON), clock=None)
    assert seen.done == ["trained-on/trained-on"]
    assert other.pick is not None
    assert other.pick.chosen.speedup == max(one.chosen.speedup for one in other.standings)
    (undropped,) = [one for one in other.standings if one.contestant == TRAINED_ON]
    assert (undropped.judged.speedup, undropped.setting) == (1.0, {})
    assert undropped not in other.frontier


def test_a_setting_found_on_a_sample_is_found_again_where_it_misses_what_is_now_the_target(
    done: Comparison, tmp_path: Path
) -> None:
    directory = tmp_path / "out"
    shutil.copytree(done.directory, directory)
    file = directory / "methods" / "attention-mass" / "standings.json"
    values = json.loads(file.read_text())
    values["found"]["speedup=1.3"]["chosen"]["speedup"] = 1.29  # as a sample may have it
    file.write_text(json.dumps(values))
    other = compared(directory, speedup=1.3, speedups=(1.6,), clock=None)
    found = {(one.contestant, one.target): one.chosen.speedup for one in other.standings}
    assert found["attention-mass", "speedup=1.3"] >= 1.3


def test_a_target_that_nobody_meets_keeps_the_results(done: Comparison, tmp_path: Path) -> None:
    directory = tmp_path / "out"
    shutil.copytree(done.directory, directory)
    found = compared(directory, speedup=1000.0, clock=None)
    assert found.pick is None
    assert found.nearest is not None
    assert found.best is None
    assert not (directory / "best").exists()
    assert found.nearest.contestant in verdict(found)
    assert "Nothing meets a FLOPs speedup of at least" in verdict(found)
    assert "speedup=1000" in found.missed["random"]
    assert json.loads((directory / "comparison.json").read_text())["pick"] is None


def test_a_pick_that_loses_more_than_allowed_on_the_judged_rows_is_said_to(done: Comparison) -> None:
    assert done.pick is not None
    for loss, words in ((0.02, "at most 2.0 points"), (0.05, "more than was asked for")):
        found = replace(done, target=Target("max_loss", 0.02), pick=replace(done.pick, loss=loss))
        assert words in verdict(found)
        assert ("more than was asked for" in verdict(found)) is (loss > 0.02)
    assert f"{done.parts[0][1]} rows" in verdict(found)
    assert "more than was asked for" not in verdict(replace(done, pick=replace(done.pick, loss=0.05)))  # a speedup's


def test_a_control_as_the_pick_is_said_to_be_one(done: Comparison) -> None:
    assert done.pick is not None
    for name in ("random", "first", "last"):
        assert "a control, which drops tokens blindly" in verdict(
            replace(done, pick=replace(done.pick, contestant=name))
        )
    assert "control" not in verdict(replace(done, pick=replace(done.pick, contestant="ltp")))


def test_nobody_trains_for_a_target_that_is_out_of_reach(tmp_path: Path) -> None:
    found = compared(tmp_path / "o", speedup=1000.0, speedups=(1.5, 5.0), methods=("random",), clock=None)
    assert found.settings["trained_at"] == 5.0


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"passes": 40}, "passes"),
        ({"seed": 1}, "chosen, judged, seed"),
        ({"validation": dataset(24, seed=2)}, "chosen, judged"),
        ({"overrides": {"batch_size": 4}}, "stages"),
        ({"trained_at": 3.0}, "trained_at"),
        ({"precision": "bfloat16"}, "precision"),
    ],
)
def test_other_settings_are_refused(done: Comparison, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(OptionError, match=rf"a comparison with other settings \({named}.*give another directory"):
        compared(done.directory, **changes)


def test_another_head_and_another_truth_are_refused(tmp_path: Path) -> None:
    def part(seed: int, truth: list[int]) -> Part:
        rows = dataset(12, seed=seed)
        return Part(rows, lambda predictions: accuracy(predictions, rows), name="rows", truth=truth)

    given = {"validation": part(1, [0]), "test": part(2, [0]), "quality": None, "methods": ("random",), "clock": None}
    compared(tmp_path, **given)
    with pytest.raises(OptionError, match=r"other settings \(judged"):
        compared(tmp_path, **{**given, "test": part(2, [1])})
    other = make("bert", layers=2)
    with torch.no_grad():
        other.classifier.weight.neg_()
    options = {**given, "passes": 32, "speedups": (1.3,), "speedup": 1.6, "overrides": {"batch_size": 8}}
    fixed = {"evaluations": 3, "sampler": "evolutionary", "precision": "float32", "use_cpu": True}
    with pytest.raises(OptionError, match=r"other settings \(model"):
        compare(other, dataset(24), tokenizer(), tmp_path, **options, **fixed)


def test_rows_of_one_answer_are_refused(tmp_path: Path) -> None:
    rows = dataset(24)
    same = rows.remove_columns("labels").add_column("labels", [1] * len(rows))
    with pytest.raises(DataError, match="Every row of the training data has the same label"):
        compare(make("bert"), same, tokenizer(), tmp_path / "new", validation=rows, methods=("random",))
    assert not (tmp_path / "new").exists()


def test_a_method_with_other_settings_is_refused(done: Comparison) -> None:
    with pytest.raises(OptionError, match=r"holds attention-mass with other settings \(settings\)"):
        compared(done.directory, methods=(thresher.AttentionMass(min_tokens=3),))


def test_the_directory_of_a_model_is_refused(done: Comparison) -> None:
    assert done.best is not None
    with pytest.raises(OptionError, match=r"holds a saved model \(thresher.json\); give a directory of its own"):
        compared(done.best)


@pytest.mark.parametrize("name", ["best", "start", "methods", "comparison.json"])
def test_what_a_comparison_would_write_over_is_left_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "thesis.txt").write_text("all of it")
    with pytest.raises(OptionError, match=f"holds {name} but no run.json of a comparison.*give another directory"):
        compared(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == [name]
    assert (tmp_path / name / "thesis.txt").read_text() == "all of it"


def test_damaged_files_are_named(done: Comparison, tmp_path: Path) -> None:
    directory = tmp_path / "out"
    shutil.copytree(done.directory, directory)
    file = directory / "methods" / "random" / "standings.json"
    file.write_text('{"about": 1')
    with pytest.raises(DataError, match=r"standings.json is damaged"):
        compared(directory)
    (directory / "run.json").write_text("[]")
    with pytest.raises(DataError, match=r"run.json is damaged.*so give another directory"):
        compared(directory)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"overrides": {"epochs": 3}}, "leave out epochs"),
        ({"overrides": {"batchsize": 3}}, "no setting 'batchsize'; did you mean 'batch_size'"),
        ({"passes": 0}, "passes and evaluations"),
        ({"speedups": (0.5,)}, "speedups must be above 1"),
        ({"trained_at": 0.5}, "trained_at, the speedup that methods train for, must be above 1, not 0.5"),
        ({"trained_at": float("nan")}, "trained_at"),
    ],
)
def test_settings_out_of_range(tmp_path: Path, options: dict[str, Any], match: str) -> None:
    with pytest.raises(OptionError, match=match):
        compared(tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_new_head_is_fine_tuned_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Trainings(monkeypatch)
    before = make("bert", layers=2).classifier.weight.detach().clone()
    options: dict[str, Any] = {
        "methods": ("random",),
        "speedups": (),
        "fine_tune": True,
        "start_passes": 16,
        "clock": None,
    }
    compared(tmp_path, **options)
    compared(tmp_path, **options)
    assert seen.done == ["start/fine-tune"]
    start = thresher.load(tmp_path / "start")
    assert not torch.equal(start.classifier.weight, before)
    assert not (tmp_path / "start" / "training").exists()


def test_a_method_that_does_not_reach_its_speedup_still_takes_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It trains as it is, and stands where it can."""
    real = import_module("thresher.training.recipe").calibrate

    def short(model: Any, rows: Any, *, speedup: float | None = None, **options: Any) -> Any:
        if speedup is not None and speedup > 1.5:
            raise TargetError("No setting reaches it.")
        return real(model, rows, speedup=speedup, **options)

    for module in ("thresher.training.recipe", "thresher.comparing.contest"):
        monkeypatch.setattr(import_module(module), "calibrate", short)
    found = compared(tmp_path, methods=("attention-mass",), clock=None)
    assert [one.target for one in found.standings] == ["speedup=1.3"]
    assert found.missed == {"attention-mass": {"speedup=1.6": "No setting reaches it."}}
    assert found.nearest == found.standings[0]
