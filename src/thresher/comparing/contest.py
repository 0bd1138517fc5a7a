"""One start for everyone, the same budget, and what each contestant comes to: trained, set to speedups, judged, timed."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import TrainerCallback

from thresher.calibration import Knob, calibrate
from thresher.checkpoint import SETTINGS
from thresher.comparing.contestants import Contestant, Plan, draws_of, plan
from thresher.comparing.judging import Part
from thresher.comparing.keeping import METHODS, START, Kept
from thresher.comparing.standings import Standing, Target, Worth, apply
from thresher.errors import TargetError
from thresher.frontier import NOTE, Frontier, frontier_of
from thresher.measure.run import Run, run, run_packed
from thresher.memory import give_back_memory
from thresher.model import attach, attachment_of, find_encoder, load, save, set_exit
from thresher.policy import Stage
from thresher.training import fit
from thresher.training.plan import FINE_TUNE, stages_of
from thresher.training.stages import run_stage

if TYPE_CHECKING:
    import datasets

SAMPLE = 300  # rows that say how fast a strength is, which needs no labels
TOLERANCE = 0.03
# Of a target (the logarithm of a speedup), what a union's policy meets by itself; all of it only where the exit has too little.
SHARES = (1 / 3, 1 / 2, 2 / 3, 1.0)
MORE = Stage(name="trained-on", mode="off", learning_rate=3e-5)
UNDROPPED = Target("speedup", 1.0)
# What the parts of the work cost, in forward passes over one example.
BOTH_WAYS, OF_SEARCH, OF_CALIBRATION = 3.0, 0.6, 5.0


@dataclass(frozen=True)
class Budget:
    """passes: examples that each contestant reads forward and backward. start_passes: those of fine-tuning the start.
    overrides: settings of every stage. trained_at: the speedup that methods train for which learn a single one.
    evaluations, sampler: of those that search."""

    passes: int
    start_passes: int
    trained_at: float
    evaluations: int
    sampler: str
    overrides: Mapping[str, Any] = field(default_factory=dict)


class Progress:
    """The share of the whole work that is done. costs: what each step takes beside the others, by name."""

    def __init__(self, on_step: Callable[[str], object], on_share: Callable[[float], object]) -> None:
        self.on_step, self.on_share = on_step, on_share
        self.costs: list[float] = []
        self.begun = 0

    def step(self, text: str) -> None:
        self.begun += 1
        self.on_step(f"{self.begun}/{len(self.costs)} {text}")
        self.within(0.0)

    def within(self, share: float) -> None:
        """`share` of the present step is done."""
        total = sum(self.costs)
        if total:
            before, now = sum(self.costs[: self.begun - 1]), self.costs[self.begun - 1]
            self.on_share(min(1.0, (before + min(share, 1.0) * now) / total))


class Contest:
    """What all contestants share; see `thresher.comparing.recipe.compare` for the arguments."""

    def __init__(
        self,
        directory: Path,
        rows: datasets.Dataset,
        tokenizer: Any,
        chosen: Part,
        judged: Part,
        budget: Budget,
        *,
        label: str,
        seed: int,
        notes: Mapping[str, Any],
        training: Mapping[str, Any],
        progress: Progress,
    ) -> None:
        self.directory, self.rows, self.tokenizer, self.budget = directory, rows, tokenizer, budget
        self.label, self.seed, self.notes, self.training, self.progress = label, seed, dict(notes), training, progress
        self._parts = chosen, judged
        self.device: torch.device | None = None

    # --- the start ---------------------------------------------------------------------------------------------------

    def plan_start(self) -> Stage:
        """Fine-tuning as long as its budget. Raises OptionError when that is less than a batch."""
        passes, overrides = self.budget.start_passes, self.budget.overrides
        return plan([FINE_TUNE], lambda _: 1, passes, len(self.rows), overrides, "the start").stages[0]

    def make_start(self, model: Any, learning: Stage | None) -> None:
        """Keep the model that everyone starts from, fine-tuned first where there is a stage for it; made once."""
        directory = self.directory / START
        self.device = find_encoder(model).device
        if (directory / SETTINGS).is_file():
            return
        attach(model)
        if learning is not None:
            work = directory / "training"
            run_stage(model, learning, self.rows, self.tokenizer, work, **self._watched(self.training, 1.0))
            shutil.rmtree(work, ignore_errors=True)
        attachment_of(model).notes.update(self.notes)
        save(model, directory)
        self.tokenizer.save_pretrained(str(directory))

    def start(self) -> Any:
        """A copy of the start, packed."""
        return load(self.directory / START, device=self.device)

    @cached_property
    def _baseline(self) -> tuple[tuple[Part, np.ndarray], tuple[Part, np.ndarray]]:
        """The two parts with what the start says of their rows, packed, nothing dropped."""
        start = self.start()
        said = [run_packed(start, part.rows).predictions for part in self._parts]
        first, second = ((part.against(one, start), one) for part, one in zip(self._parts, said, strict=True))
        return first, second

    @property
    def chosen(self) -> Part:
        return self._baseline[0][0]

    @property
    def judged(self) -> Part:
        return self._baseline[1][0]

    def baseline(self) -> tuple[float, float]:
        """The quality of the start on the rows that settings are chosen on, and on those that they are judged by."""
        first, second = (part.worth(said) for part, said in self._baseline)
        return first, second

    # --- training ----------------------------------------------------------------------------------------------------

    def plan(self, one: Contestant, start: Any) -> Plan:
        """start: any copy of it; left with the contestant's policy attached.

        Raises OptionError when the contestant cannot be trained as long, or as briefly, as the budget lets it.
        """
        if not one.trains:
            return Plan((), 0)
        attach(start, one.policy, exit=one.exit)
        policy = attachment_of(start).policy
        stages = stages_of(start) if one.reads_less else (MORE,)
        passes, overrides = self.budget.passes, self.budget.overrides
        least = 1 if one.policy is None else one.policy.least_epochs
        made = plan(stages, draws_of(policy), passes, len(self.rows), overrides, one.name, least)
        for stage in made.stages:
            if policy is not None and not stage.exits:
                policy.check(stage)
        return made

    def cost_of_start(self) -> float:
        judging = float(sum(len(part.rows) for part in self._parts))
        made = (self.directory / START / SETTINGS).is_file()
        return judging + (0.0 if made else BOTH_WAYS * self.budget.start_passes)

    def cost(self, one: Contestant, plan: Plan, kept: Kept, targets: Sequence[Target]) -> float:
        """What is left to do for a contestant, about."""
        left = [target for target in wanted(one, targets) if not kept.has(target.key)]
        examples = len(self._parts[0].rows)
        cost = 1.0 + len(left) * (len(self._parts[1].rows) + OF_CALIBRATION * min(SAMPLE, examples) + examples)
        if not self._complete(one):
            cost += BOTH_WAYS * plan.passes + (OF_SEARCH * self.budget.evaluations * examples if one.searches else 0.0)
        return cost

    def trained(self, one: Contestant, plan: Plan) -> Any:
        """The contestant's model: loaded where it is complete, else trained, from where an interrupted training stopped."""
        if not one.trains:
            return attach(self.start(), one.policy)
        directory = self.place(one)
        if self._complete(one):
            shutil.rmtree(directory / "training", ignore_errors=True)
            return load(directory, device=self.device)
        if not one.reads_less:
            return self._trained_on(directory, plan.stages[0])
        options = {"search": self._search()} if one.searches else {}
        if one.searches and one.exit is None:  # it learns all speedups
            return self._fit(one, plan, options)
        try:
            return self._fit(one, plan, {**options, "speedup": self.budget.trained_at})
        except TargetError:  # it does not get there: it learns to drop what it does of itself
            return self._fit(one, plan, options)

    def place(self, one: Contestant) -> Path:
        return self.directory / METHODS / one.name

    def _complete(self, one: Contestant) -> bool:
        return one.trains and (self.place(one) / SETTINGS).is_file()

    def _fit(self, one: Contestant, plan: Plan, options: Mapping[str, Any]) -> Any:
        return fit(
            self.start(),
            one.policy,
            self._rows_for(plan),
            self.tokenizer,
            self.place(one),
            validation=self.chosen.rows,
            quality=self.chosen.quality,
            exit=one.exit,
            stages=plan.stages,
            notes=self.notes,
            **self._watched(self.training, 0.8, plan.stages),
            **options,
        )

    def _rows_for(self, plan: Plan) -> datasets.Dataset:
        if plan.rows is None:
            return self.rows
        drawn = np.random.default_rng(self.seed).permutation(len(self.rows))[: plan.rows]
        return self.rows.select(sorted(drawn.tolist()))

    def _trained_on(self, directory: Path, stage: Stage) -> Any:
        model, work = self.start(), directory / "training"
        run_stage(model, stage, self.rows, self.tokenizer, work, **self._watched(self.training, 0.9))
        save(model, directory)
        shutil.rmtree(work, ignore_errors=True)
        return model

    def _search(self) -> dict[str, Any]:
        tries, done = self.budget.evaluations, [0]

        def tried(_: object) -> None:
            done[0] += 1
            self.progress.within(0.5 * done[0] / tries)

        return {"evaluations": tries, "sampler": self.budget.sampler, "label": self.label, "on_evaluation": tried}

    def _watched(self, options: Mapping[str, Any], until: float, stages: Sequence[Stage] = ()) -> dict[str, Any]:
        """Arguments of a training whose steps move the present step of the whole work up to `until`."""
        lengths = [stage.epochs for stage in stages] or [1.0]
        watcher = _Watcher(self.progress, [until * length / sum(lengths) for length in lengths])
        return {
            "progress": False,
            "seed": self.seed,
            **options,
            "callbacks": [*options.get("callbacks", ()), watcher],
        }

    # --- settings, and what they are worth -----------------------------------------------------------------------------

    def settle(self, one: Contestant, model: Any, kept: Kept, targets: Sequence[Target], exact: Target) -> None:
        """Set the contestant to each target on the rows for choosing, and judge it; what is kept already is not done again.

        exact: the target that is met on all of these rows; other speedups are met on a sample of them, and nearly.
        """
        for target in wanted(one, targets):
            if kept.has(target.key):
                continue
            try:
                kept.found[target.key] = self._best(one, model, target, kept, exact=target == exact)
            except TargetError as error:
                kept.missed[target.key] = str(error)
            kept.write()
            give_back_memory()

    def _best(self, one: Contestant, model: Any, target: Target, kept: Kept, *, exact: bool) -> Standing:
        """Of a union, which can share a target out in several ways, what is best on the rows for choosing.

        Raises TargetError when the contestant does not meet the target in any way.
        """
        rows = self.chosen.rows if exact or target.kind == "max_loss" else self.chosen.sample(SAMPLE)
        tried: list[tuple[dict[str, Any], Run]] = []
        error: TargetError | None = None
        for share in SHARES if one.policy is not None and one.exit is not None else (1.0,):
            if tried and share == 1.0:
                break
            try:
                setting = self._setting(one, model, target, share, rows)
            except TargetError as missed:
                error = missed
                continue
            same = next((found for found in kept.found.values() if found.setting == setting), None)
            if same is not None and share == 1.0:
                return same
            apply(model, setting)
            tried.append((setting, run(model, self.chosen.rows)))
        if not tried:
            assert error is not None
            raise error
        quality = self.chosen.worth
        best = max(tried, key=lambda one: one[1].speedup if target.kind == "max_loss" else quality(one[1].predictions))
        return self._standing(one, model, target, *best)

    def _setting(
        self, one: Contestant, model: Any, target: Target, share: float, rows: datasets.Dataset
    ) -> dict[str, Any]:
        """share: of the target that the policy has to meet by itself, where an exit goes on from there.

        Raises TargetError when the contestant does not meet the target.
        """
        setting: dict[str, Any] = {}
        if one.policy is not None:
            if one.exit is not None:
                set_exit(model, strength=0.0)
            part = target.part(share)
            if NOTE in attachment_of(model).notes:
                found = frontier_of(attachment_of(model).notes)
                setting["retention"] = list(_point(found, part, self.baseline()[0] - part.value).retention)
            else:
                setting["strength"] = self._strength(model, part, rows, "policy")
            apply(model, setting)
        if one.exit is not None:
            setting["exit_strength"] = self._strength(model, target, rows, "exit")
        return setting

    def _strength(self, model: Any, target: Target, rows: datasets.Dataset, knob: Knob) -> float:
        if target.kind == "speedup":
            return calibrate(model, rows, speedup=target.value, tolerance=TOLERANCE, knob=knob).strength
        said, quality = self._baseline[0][1], self.chosen.quality
        return calibrate(model, rows, max_loss=target.value, quality=quality, reference=said, knob=knob).strength

    def _standing(
        self, one: Contestant, model: Any, target: Target, setting: Mapping[str, Any], choosing: Run
    ) -> Standing:
        """choosing: what the model under this setting said of the rows for choosing."""
        apply(model, setting)
        (part, _), (exam, before) = self._baseline
        judging = run(model, exam.rows)
        quality = exam.worth(judging.predictions)
        return Standing(
            one.name,
            target.key,
            setting,
            Worth(choosing.speedup, part.worth(choosing.predictions)),
            Worth(judging.speedup, quality),
            self.baseline()[1] - quality,
            exam.error(before, judging.predictions, self.seed),
        )


def wanted(one: Contestant, targets: Sequence[Target]) -> Sequence[Target]:
    """What a contestant is set to: one that drops nothing is as it is."""
    return targets if one.reads_less else [UNDROPPED]


class _Watcher(TrainerCallback):
    """Tells of the trainer's steps. shares: of the whole that each stage, in their order, is worth."""

    def __init__(self, progress: Progress, shares: Sequence[float]) -> None:
        self.progress, self.shares, self.stage = progress, shares, -1

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self.stage = min(self.stage + 1, len(self.shares) - 1)

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        now = self.shares[self.stage] * state.global_step / max(state.max_steps, 1)
        self.progress.within(sum(self.shares[: self.stage]) + now)


def _point(found: Frontier, target: Target, floor: float) -> Any:
    """What a searched frontier has for a target. Raises TargetError, naming the nearest, when it has nothing."""
    if target.kind == "speedup":
        return found.at(target.value)
    good = [point for point in found.points if point.speedup > 1.0 and point.quality >= floor - 1e-12]
    if not good:
        best = found.points[0]
        raise TargetError(
            f"No point of the frontier that drops anything stays at {floor:.4f} or above on these rows; the best has "
            f"{best.quality:.4f} at {best.speedup:.2f}x."
        )
    return good[-1]


__all__ = ["Budget", "Contest", "Progress", "wanted"]
