"""Every method on one task: one start, one budget, one frontier, and the model that a target picks."""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thresher.comparing import keeping
from thresher.comparing.clock import Clock, wall_clock
from thresher.comparing.contest import Budget, Contest, Progress, wanted
from thresher.comparing.contestants import (
    Contestant,
    Given,
    Plan,
    TooFewPasses,
    applicable,
    contestants,
    labelled,
    stage_settings,
)
from thresher.comparing.judging import Part, RowsQuality, parts
from thresher.comparing.keeping import Kept
from thresher.comparing.standings import Standing, Target, apply, frontier, pick
from thresher.errors import DataError, OptionError
from thresher.model import attach, attachment_of, find_encoder, save
from thresher.policy import PolicyConfig, Stage
from thresher.settings import is_number, is_whole
from thresher.targets import kind_of_labels, refuse_one_answer
from thresher.tasks.given import as_rows
from thresher.training.identity import digest, weights

if TYPE_CHECKING:
    import datasets

SPEEDUPS = (1.25, 1.5, 2.0, 2.5, 3.0, 4.0)
LOSS = 0.01  # the target where none is given
TRAINED_AT = 2.0


@dataclass(frozen=True)
class Comparison:
    """What a comparison found.

    label: the name of the quality. baseline: the quality of the start on the rows that settings are chosen on and on those that
        they are judged by, whose names and numbers `parts` has.
    standings: every point of every contestant. frontier: those that no other beats, chosen without a look at the judged rows.
    pick: what meets the target; None where nothing does, and then `nearest` is what comes nearest.
    passes: what each contestant read in training. left_out, missed: why a contestant has no points, or none for a target.
    settings, versions: what a second run needs.
    """

    directory: Path
    label: str
    target: Target
    baseline: tuple[float, float]
    parts: tuple[tuple[str, int], tuple[str, int]]
    standings: tuple[Standing, ...]
    frontier: tuple[Standing, ...]
    pick: Standing | None
    nearest: Standing | None
    passes: Mapping[str, int]
    left_out: Mapping[str, str]
    missed: Mapping[str, Mapping[str, str]]
    settings: Mapping[str, Any]
    versions: Mapping[str, str]

    @property
    def best(self) -> Path | None:
        """The directory of the picked model."""
        return None if self.pick is None else self.directory / keeping.BEST

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        names = ("chosen", "judged")
        return {
            "directory": str(self.directory),
            "metric": self.label,
            "target": {self.target.kind: self.target.value},
            "baseline": dict(zip(names, self.baseline, strict=True)),
            "parts": {
                name: {"what": what, "rows": count} for name, (what, count) in zip(names, self.parts, strict=True)
            },
            "points": [one.to_dict() for one in self.standings],
            "frontier": [one.to_dict() for one in self.frontier],
            "pick": None if self.pick is None else self.pick.to_dict(),
            "nearest": None if self.nearest is None else self.nearest.to_dict(),
            "best": None if self.best is None else str(self.best),
            "passes": dict(self.passes),
            "left_out": dict(self.left_out),
            "missed": {name: dict(of) for name, of in self.missed.items()},
            "settings": dict(self.settings),
            "versions": dict(self.versions),
        }


def compare(
    model: Any,
    rows: datasets.Dataset,
    tokenizer: Any,
    directory: str | Path,
    *,
    validation: datasets.Dataset | Part,
    test: datasets.Dataset | Part | None = None,
    quality: RowsQuality | None = None,
    label: str = "quality",
    methods: Sequence[Given] | None = None,
    unions: Sequence[Given] = (),
    passes: int = 5000,
    speedups: Sequence[float] = SPEEDUPS,
    speedup: float | None = None,
    max_loss: float | None = None,
    fine_tune: bool = False,
    start_passes: int | None = None,
    trained_at: float | None = None,
    evaluations: int = 100,
    sampler: str = "nsga2",
    overrides: Mapping[str, Any] | None = None,
    fitting: Callable[[PolicyConfig], PolicyConfig] | None = None,
    clock: Clock | None = Clock(),  # noqa: B008 (frozen)
    seed: int = 0,
    notes: Mapping[str, Any] | None = None,
    on_step: Callable[[str], object] | None = None,
    on_share: Callable[[float], object] | None = None,
    **training: Any,
) -> Comparison:
    """Train and measure every method that applies, and pick the model that meets a target.

    model: what everyone starts from, a Hugging Face encoder with its head or a SentenceTransformer; it is attached to, and
        with `fine_tune` (for a head that is new) trained first, on `start_passes` examples (None: as many as `passes`).
    rows: encoded rows to train on. validation: those that settings are chosen on; without `test` one half of them, and the
        other half judges. quality: from predictions and the rows they are of to a number, higher is better; None: likeness to
        the start. Or give both as `Part`s. label: its name.
    methods: names ("ltp", "fastbert", "ltp+fastbert") or settings; None: all methods, early exits and unions of the two, with
        their defaults, and the untrained controls. Those that cannot be trained on these rows are left out, see
        `Comparison.left_out`. unions: more of them. fitting: what the task adds to a method's settings.
    passes: examples that each method reads forward and backward; what a teacher reads is not counted. AdapLeR, which sharpens
        from epoch to epoch, spends few of them on as many rows as give it three epochs.
    speedup / max_loss: the target, met on the rows for choosing; without one, a loss of 0.01. speedups: what else every method
        is set to. trained_at: the speedup that methods train for which learn a single one; None: the target, but at most 4
        or the largest of `speedups`; without a speedup as target 2. It holds for every run in `directory`.
    evaluations, sampler: of methods that search retention configurations.
    overrides: settings of every training stage, e.g. {"batch_size": 32}. training: what else `training.run_stage` takes.
    clock: how wall-clock is taken of the points of the frontier; None: it is not.
    on_step: called with a line as each piece of work begins; on_share: with the share of all of it that is done.

    `directory` gets comparison.json, comparison.html and frontier.svg, the picked model in best, the start in start, and each
    method in methods. The same call goes on where another was interrupted, and trains nothing twice; another target, or more
    methods, use what is there. Raises OptionError when the directory is of a run with other settings.
    """
    from thresher.comparing.page import write_page

    target = Target.of(speedup, max_loss, LOSS)
    directory, rows = Path(directory), as_rows(rows)
    _check(rows, passes, evaluations, speedups, trained_at)
    if labelled(rows):
        refuse_one_answer(rows, kind_of_labels(find_encoder(model)))
    targets = [*(one for one in (Target("speedup", float(v)) for v in sorted({*speedups})) if one != target), target]
    of_stages = stage_settings(overrides, labels=labelled(rows))
    asked = [_fitted(one, fitting) for one in contestants(methods, unions)]
    chosen, judged = parts(validation, test, quality, seed)
    first = (passes if start_passes is None else start_passes) if fine_tune else 0
    settings: dict[str, Any] = {
        "model": weights(model, head=not fine_tune),
        "fine_tune": fine_tune,
        "start_passes": first,
        "rows": digest(rows),
        "chosen": chosen.digest,
        "judged": judged.digest,
        "quality": label,
        "passes": passes,
        "evaluations": evaluations,
        "sampler": sampler,
        "stages": of_stages,
        "precision": training.get("precision", "auto"),
        "seed": seed,
    }
    settings = keeping.same_run(directory, settings, {"trained_at": trained_at})
    if settings["trained_at"] is None:
        # A target that nobody reaches is nothing to train for.
        most = max(*SPEEDUPS, *speedups)
        settings["trained_at"] = TRAINED_AT if target.kind == "max_loss" else min(target.value, most)
    budget = Budget(passes, first, settings["trained_at"], evaluations, sampler, of_stages)
    progress = Progress(on_step or (lambda _: None), on_share or (lambda _: None))
    contest = Contest(
        directory, rows, tokenizer, chosen, judged, budget,
        label=label, seed=seed, notes=notes or {}, training=training, progress=progress,
    )  # fmt: skip
    learning = contest.plan_start() if fine_tune else None
    plans, left_out = _plans(contest, asked, model, strict=methods is not None)
    keeping.begin(directory, settings)
    kept = {one: Kept(contest.place(one), one.to_dict()) for one in plans}
    baseline = _held(contest, model, learning, plans, kept, targets, clock)
    standings = _standings(kept, targets)
    best = frontier(standings)
    picked, nearest = pick(best, target, baseline[0])
    comparison = Comparison(
        directory=directory,
        label=label,
        target=target,
        baseline=baseline,
        parts=((chosen.name, len(chosen.rows)), (judged.name, len(judged.rows))),
        standings=standings,
        frontier=best,
        pick=picked,
        nearest=nearest,
        passes={one.name: plan.passes for one, plan in plans.items()},
        left_out=left_out,
        missed=_missed(kept, targets),
        settings={**settings, "methods": [one.to_dict() for one in plans]},
        versions=_versions(),
    )
    _save_best(contest, plans, comparison)
    keeping.write_json(directory / keeping.RESULT, comparison.to_dict())
    write_page(comparison, directory)
    progress.within(1.0)
    return comparison


def _check(
    rows: datasets.Dataset, passes: int, evaluations: int, speedups: Sequence[float], trained_at: float | None
) -> None:
    if not all(is_whole(count) and count >= 1 for count in (passes, evaluations)):
        raise OptionError(
            f"passes and evaluations must be whole numbers of at least 1, not {passes!r} and {evaluations!r}."
        )
    if not len(rows):
        raise DataError("There are no rows to train on; give at least one.")
    if not all(is_number(value) and 1.0 < value < math.inf for value in speedups):
        raise OptionError(f"speedups must be above 1, not {', '.join(map(str, speedups))}.")
    if trained_at is not None and not (is_number(trained_at) and 1.0 < trained_at < math.inf):
        raise OptionError(f"trained_at, the speedup that methods train for, must be above 1, not {trained_at}.")


def _fitted(one: Contestant, fitting: Callable[[PolicyConfig], PolicyConfig] | None) -> Contestant:
    if one.policy is None or fitting is None:
        return one
    return replace(one, policy=fitting(one.policy))


def _plans(
    contest: Contest, asked: Sequence[Contestant], model: Any, *, strict: bool
) -> tuple[dict[Contestant, Plan], dict[str, str]]:
    """What each contestant that applies trains, and why the others do not.

    strict: whether all were asked for, so that a budget too small for one is an error. Raises OptionError when none applies.
    """
    able, left_out = applicable(asked, model, contest.rows, contest.budget.overrides)
    if not able:
        why = "; ".join(f"{name}: {reason.rstrip('.')}" for name, reason in left_out.items())
        raise OptionError(f"No method can be trained on these rows ({why}).")
    plans: dict[Contestant, Plan] = {}
    short: list[TooFewPasses] = []
    for one in able:
        try:
            plans[one] = contest.plan(one, model)
        except OptionError as error:
            if isinstance(error, TooFewPasses):
                short.append(error)
            elif strict:
                raise
            left_out[one.name] = str(error)
    attach(model)
    if strict and short:  # all at once, by the one that takes most
        raise max(short, key=lambda error: error.least)
    return plans, left_out


def _held(
    contest: Contest,
    model: Any,
    learning: Stage | None,
    plans: Mapping[Contestant, Plan],
    kept: Mapping[Contestant, Kept],
    targets: Sequence[Target],
    clock: Clock | None,
) -> tuple[float, float]:
    """Train the start and every contestant, set each to all targets, and time the frontier; what is `kept` already is not done
    again. targets: that of the run last. Returns the start's quality on the rows for choosing and for judging."""
    target, progress = targets[-1], contest.progress
    for of in kept.values():
        of.reopen(target)
    progress.costs += _costs(contest, plans, kept, targets, clock)
    progress.step("the start")
    contest.make_start(model, learning)
    baseline = contest.baseline()
    for one, plan in plans.items():
        done = all(kept[one].has(each.key) for each in wanted(one, targets))
        progress.step(f"{one.name}, as kept" if done else one.name)
        if not done:
            contest.settle(one, contest.trained(one, plan), kept[one], targets, target)
    progress.step("wall-clock")
    if clock is not None:
        _time(contest, plans, kept, frontier(_standings(kept, targets)), clock)
    return baseline


def _costs(
    contest: Contest,
    plans: Mapping[Contestant, Plan],
    kept: Mapping[Contestant, Kept],
    targets: Sequence[Target],
    clock: Clock | None,
) -> list[float]:
    """What each step takes, about, in forward passes over one example: the start, every contestant, wall-clock."""
    timing = 0.0 if clock is None else 3.0 * clock.rounds * clock.rows * len(plans)  # of half of them, six ways each
    return [
        contest.cost_of_start(),
        *(contest.cost(one, plan, kept[one], targets) for one, plan in plans.items()),
        timing,
    ]


def _standings(kept: Mapping[Contestant, Kept], targets: Sequence[Target]) -> tuple[Standing, ...]:
    """What was found for these targets, each setting once, of each contestant by rising speedup."""
    found: list[Standing] = []
    for one, of in kept.items():
        own = (of.found[target.key] for target in wanted(one, targets) if target.key in of.found)
        once = {str(sorted(standing.setting.items())): standing for standing in own}
        found += sorted(once.values(), key=lambda standing: standing.judged.speedup)
    return tuple(found)


def _missed(kept: Mapping[Contestant, Kept], targets: Sequence[Target]) -> dict[str, dict[str, str]]:
    keys = [target.key for target in targets]
    found = {one.name: {key: of.missed[key] for key in keys if key in of.missed} for one, of in kept.items()}
    return {name: reasons for name, reasons in found.items() if reasons}


def _time(
    contest: Contest,
    plans: Mapping[Contestant, Plan],
    kept: Mapping[Contestant, Kept],
    best: Sequence[Standing],
    clock: Clock,
) -> None:
    """Take the wall-clock of the points of the frontier that have none, or one taken otherwise."""
    how = asdict(clock)
    names = {one.name: one for one in plans}
    for number, standing in enumerate(best, start=1):
        one = names[standing.contestant]
        taken = standing.measured
        if taken is None or taken["clock"] != how:
            model = contest.trained(one, plans[one])
            apply(model, standing.setting)
            taken = {**wall_clock(model, contest.judged.rows, clock), "clock": how}
            found = kept[one].found
            for key, same in found.items():
                if same.setting == standing.setting:
                    found[key] = replace(same, measured=taken)
            kept[one].write()
        contest.progress.within(number / len(best))


def _save_best(contest: Contest, plans: Mapping[Contestant, Plan], comparison: Comparison) -> None:
    """The picked model as a directory of its own; none where nothing was picked."""
    place, picked = contest.directory / keeping.BEST, comparison.pick
    with keeping.replaced(place, empty=picked is None) as new:
        if picked is not None:
            one = next(one for one in plans if one.name == picked.contestant)
            model = contest.trained(one, plans[one])
            apply(model, picked.setting)
            attachment_of(model).notes.update({**contest.notes, "comparison": picked.to_dict()})
            save(model, new)
            contest.tokenizer.save_pretrained(str(new))


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("thresher", "torch", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found


__all__ = ["LOSS", "SPEEDUPS", "Comparison", "compare"]
