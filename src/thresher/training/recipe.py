"""A method's stages one after the other, resumable, with calibration where the method starts to drop."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from accelerate import PartialState

from thresher import checkpoint
from thresher.calibration import Calibration, Quality, Turned, agreement, calibrate, check_target
from thresher.errors import DataError, OptionError, TargetError
from thresher.exits import ExitConfig
from thresher.frontier import Frontier
from thresher.measure.run import run, run_packed
from thresher.model import (
    Attachment,
    attachment_of,
    find_encoder,
    load,
    policy_of,
    save,
    set_config,
)
from thresher.policy import Mode, PolicyConfig, Stage
from thresher.targets import kind_of_labels, refuse_one_answer
from thresher.tasks.given import as_rows
from thresher.training import frontiers
from thresher.training.epochs import BEST, POINT, Epochs, best, fastest, judged, kept
from thresher.training.identity import digest, weights
from thresher.training.learner import stock_copy
from thresher.training.plan import FINE_TUNE, attach_new, planned
from thresher.training.resuming import begin, by_one, refuse_another_run
from thresher.training.salient import COLUMN, with_saliency
from thresher.training.stages import as_run, learns_from_labels, refuse_unfit, run_stage, trains_on_cpu

FIRST_GUESS = 2.0
EPOCHS = "epochs"  # a stage's folder of the epochs that were kept


def fit(
    model: Any,
    policy: PolicyConfig | str | None,
    rows: datasets.Dataset,
    tokenizer: Any,
    directory: str | Path,
    *,
    exit: ExitConfig | str | None = None,
    validation: datasets.Dataset | None = None,
    speedup: float | None = None,
    max_loss: float | None = None,
    quality: Quality | None = None,
    fine_tune: bool = False,
    stages: tuple[Stage, ...] | None = None,
    overrides: Mapping[str, Any] | None = None,
    search: Mapping[str, Any] | None = None,
    seed: int = 0,
    on_stage: Callable[[Stage], object] | None = None,
    on_start: Callable[[np.ndarray], object] | None = None,
    notes: Mapping[str, Any] | None = None,
    **arguments: Any,
) -> Any:
    """Train `model` with a method and save it to `directory`; the model comes back attached, in eval mode.

    model: a Hugging Face encoder with its task head, or a SentenceTransformer. rows, validation: encoded rows.
    policy: where tokens have no types (DistilBERT) the tokenizer's separator says where the first text ends.
    exit: an early exit, trained after the method on the model that drops tokens (after LTP: Magic Pyramid, He et al., 2021), or
        alone where `policy` is None.
    speedup / max_loss: the target, met on `validation` (see calibrate): before tokens first drop in training, and at
    the end. With a method and an exit the method first meets its share, the root of the speedup or half of the loss, and the
    exit is then set so that both together meet the target; where the exit cannot, the method does the rest of a speedup.
    fine_tune: begin with ordinary fine-tuning, for a model whose head is new.
    stages: instead of the method's own; those that distil learn from the model that the method starts from. overrides: settings
        for every stage ({"epochs": 2}) or one ({"soft.learning_rate": 1e-4}). A run that was interrupted goes on where it
        stopped when called again with the same directory; OptionError if it was called with other settings there.
    search: for a method that searches retention configurations on `validation` (ASE before it trains under them,
        Length-Adaptive Transformer after): settings of `thresher.search`. The target then picks from the frontier.
    on_start: called once with the predictions on `validation` of the model that the method starts from (fine-tuned,
    nothing dropped): what gains and losses are counted from.
    notes: saved with the model (`attachment_of(model).notes`), e.g. what task it was trained for.
    arguments: anything else run_stage takes.
    Under torchrun every process calls it with the same arguments, and a directory that all of them see; the main one writes.
    """
    rows, validation = as_rows(rows), None if validation is None else as_rows(validation)
    attach_new(model, policy, exit, tokenizer, seed)
    attachment_of(model).notes.update(notes or {})
    plan = planned(model, stages, overrides or {}, fine_tune=fine_tune)
    target = Target(speedup, max_loss)
    _refuse(model, target, validation, search)
    if not len(rows):
        raise DataError("There are no rows to train on.")
    for stage in plan:  # rather now than after the stages before it
        refuse_unfit(model, stage, rows)
        if (acting := attachment_of(model).policy) is not None and not stage.exits:
            acting.check(as_run(stage, arguments, len(rows)))
        if learns_from_labels(model, stage):
            refuse_one_answer(rows, kind_of_labels(find_encoder(model)))
    run = _Run(
        model,
        plan,
        rows,
        tokenizer,
        Path(directory) / "training",
        target=target,
        judging=None if validation is None else _Judging(validation, quality),
        search=search or {},
        seed=seed,
        on_stage=on_stage,
        on_start=on_start,
        arguments=arguments,
    )
    for number, stage in enumerate(plan, start=1):
        run.stage(number, stage)
    run.meet_target()
    by_one(run.processes, lambda: _finish(model, tokenizer, directory, run.work))
    return model


@dataclass(frozen=True)
class Target:
    """What `fit` is to reach on the validation rows: a speedup, or the most that may be lost; or neither."""

    speedup: float | None = None
    max_loss: float | None = None

    @property
    def given(self) -> bool:
        return self.speedup is not None or self.max_loss is not None

    def of_the_policy(self, attachment: Attachment) -> Target:
        """The part that the policy meets by itself: all of it, where there is no exit."""
        if attachment.exit is None:
            return self
        speedup = None if self.speedup is None else math.sqrt(self.speedup)
        return Target(speedup, None if self.max_loss is None else self.max_loss / 2)


def _refuse(model: Any, target: Target, validation: Any, search: Mapping[str, Any] | None) -> None:
    """Raises OptionError for a target or a search without rows to judge by, and a search that the method does not make."""
    check_target(target.speedup, target.max_loss)
    policy = attachment_of(model).policy
    searches = policy is not None and policy.config.searches
    if (target.given or searches) and validation is None:
        what = "A target needs validation rows to be met on" if target.given else "A search needs validation rows"
        raise OptionError(f"{what}; give validation=.")
    if search and not searches:
        name = "none" if policy is None else policy.config.method
        raise OptionError(f"The method {name!r} searches no retention configurations.")


@dataclass(frozen=True)
class _Judging:
    """The rows that a target is met on, and what answers to them are worth; None: how often they are those of the start."""

    rows: datasets.Dataset
    quality: Quality | None


class _Run:
    """One fit: its stages in their order, what is known of the model they began from, and the target in the end.

    reference: what the fine-tuned model says of the validation rows, nothing dropped. frontier: of a method that searches.
    """

    def __init__(
        self,
        model: Any,
        plan: tuple[Stage, ...],
        rows: datasets.Dataset,
        tokenizer: Any,
        work: Path,
        *,
        target: Target,
        judging: _Judging | None,
        search: Mapping[str, Any],
        seed: int,
        on_stage: Callable[[Stage], object] | None,
        on_start: Callable[[np.ndarray], object] | None,
        arguments: dict[str, Any],
    ) -> None:
        self.model, self.plan, self.rows, self.tokenizer, self.work = model, plan, rows, tokenizer, work
        self.target, self.judging, self.search, self.seed = target, judging, search, seed
        self.on_stage, self.on_start, self.arguments = on_stage, on_start, arguments
        self.processes = PartialState(cpu=trains_on_cpu(arguments))
        attachment = self.attachment = attachment_of(model)
        self.searches = attachment.policy.config.searches if attachment.policy is not None else ""
        self.share = target.of_the_policy(attachment)
        self.teacher: Any = None
        self.reference: np.ndarray | None = None
        self.frontier: Frontier | None = None
        if attachment.exit is not None:
            attachment.exit.mode = "off"  # until it is trained
        settings = _settings(model, plan, rows, seed) | {"precision": arguments.get("precision", "auto")}
        refuse_another_run(work, settings)
        by_one(self.processes, lambda: begin(work, settings))

    def stage(self, number: int, stage: Stage) -> None:
        """Train one stage, or take it over from an interrupted run."""
        done = self.work / f"{number}-{stage.name}" / "done"
        whole = (done / checkpoint.SETTINGS).is_file()  # written last: the stage was saved whole
        if stage.name != FINE_TUNE.name:
            self._ask_the_start()
            # Whichever stage distils, of the model that the method starts from, which a stage before it would have changed.
            if self.teacher is None and any(one.distil_weight for one in self.plan if one.name != FINE_TUNE.name):
                self.teacher = stock_copy(self.model)
        if stage.mode == "hard" and not stage.exits and self.searches == "before" and not stage.configurations:
            frontier = self._searched()
            frontier.at(self.share.speedup or 1.0)  # rather now than after hours of training
            stage = dataclasses.replace(stage, configurations=frontier.configurations)
        if stage.exits and self.attachment.policy is not None and (self.searches or not whole):
            self._settle(self.share)
        if whole:
            _take_over(self.model, done)
        else:
            self._train(stage, done)

    def _train(self, stage: Stage, done: Path) -> None:
        if stage.mode == "hard" and not stage.exits and not self.searches and self.judging and self.target.given:
            _first_drop(self.model, self.judging.rows, self.share.speedup)
        if self.on_stage:
            self.on_stage(stage)
        if stage.mode != "off" and not stage.exits and self._lacks_saliency():
            progress = bool(self.arguments.get("progress", True))
            self.rows = with_saliency(self._salient_models(), self.rows, self.work, self.processes, progress=progress)
        if stage.learning_rate:  # what is kept from now on is no epoch of a stage before
            self.attachment.notes.pop("epoch", None)
        epochs = self._epochs(stage, done.parent / EPOCHS)
        callbacks = [*self.arguments.get("callbacks", ()), *([] if epochs is None else [epochs])]
        run_stage(
            self.model,
            stage,
            self.rows,
            self.tokenizer,
            done.parent,
            teacher=self.teacher,
            seed=self.seed,
            **{**self.arguments, "callbacks": callbacks},
        )
        if epochs is not None and stage.keeps == "fastest" and (places := kept(epochs.directory)):
            _take_over(self.model, places[0])
            self.attachment.notes["epoch"] = {"stage": stage.name, **dataclasses.asdict(judged(epochs.directory)[0])}
        by_one(self.processes, partial(_keep, self.model, done))

    def _lacks_saliency(self) -> bool:
        policy = self.attachment.policy
        return policy is not None and policy.learns_saliency and COLUMN not in self.rows.column_names

    def _salient_models(self) -> list[Any]:
        """The best checkpoints of fine-tuning, or where there was none the model itself."""
        device = find_encoder(self.model).device
        tuned = [kept(place / EPOCHS) for place in self.work.glob(f"*-{FINE_TUNE.name}")]
        return [load(place, device=device) for places in tuned for place in places] or [self.model]

    def _epochs(self, stage: Stage, directory: Path) -> Epochs | None:
        """What judges the epochs of a stage, where it matters which one is kept."""
        if self.judging is None:
            return None
        if stage.name == FINE_TUNE.name:
            if not self._lacks_saliency() or self.judging.quality is None:
                return None
            return Epochs(self.model, directory, partial(self._worth, "off"), best, BEST, self.processes)
        if stage.keeps == "last" or self.target.speedup is not None:
            return None
        assert self.reference is not None
        allowed = POINT if self.share.max_loss is None else self.share.max_loss
        order = fastest(float(self._judge()(self.reference)) - allowed)
        return Epochs(self.model, directory, partial(self._worth, "hard"), order, 1, self.processes)

    def _worth(self, mode: Mode) -> tuple[float, float]:
        """The FLOPs speedup and the quality of the model as it is, its policy in this mode."""
        assert self.judging is not None
        policy = policy_of(self.model)
        before, policy.mode = policy.mode, mode
        try:
            found = run(self.model, self.judging.rows)
        finally:
            policy.mode = before
        return found.speedup, float(self._judge()(found.predictions))

    def meet_target(self) -> None:
        """Set how much the trained model drops, and how early rows leave."""
        exit = self.attachment.exit
        if exit is None:
            self._settle(self.target)
            return
        exit.mode = "leave"
        self._calibrate(self.target, knob="both")

    def _ask_the_start(self) -> None:
        """What the model says before it learns to drop, where that is asked for."""
        chooses = self.target.speedup is None and any(stage.keeps == "fastest" for stage in self.plan)
        wanted = self.target.max_loss is not None or self.on_start is not None or self.searches or chooses
        if wanted and self.judging is not None and self.reference is None:
            self.reference = run_packed(self.model, self.judging.rows).predictions
            if self.on_start:
                self.on_start(self.reference)

    def _settle(self, target: Target) -> None:
        """Set how much the policy drops."""
        if not self.searches or self.judging is None or self.reference is None:
            self._calibrate(target)
            return
        judge = self._judge()
        if self.frontier is None:
            self._searched()
        else:
            self.frontier = frontiers.measured(self.model, self.judging.rows, judge, self.frontier)
        assert self.frontier is not None
        floor = None if target.max_loss is None else float(judge(self.reference)) - target.max_loss
        frontiers.settle(self.model, self.frontier, target.speedup, floor)

    def _calibrate(self, target: Target, knob: Turned | None = None) -> None:
        if self.judging is not None and target.given:
            options: dict[str, Any] = {"quality": self.judging.quality, "reference": self.reference, "knob": knob}
            calibrate(self.model, self.judging.rows, speedup=target.speedup, max_loss=target.max_loss, **options)

    def _searched(self) -> Frontier:
        """The frontier of the model as it is now; made once, and only read by a run that goes on."""
        assert self.judging is not None
        judge, rows = self._judge(), self.judging.rows
        by_one(
            self.processes,
            lambda: frontiers.searched(self.model, rows, judge, self.work, self.search, self.seed),
        )
        self.frontier = frontiers.read(self.model, self.work)
        return self.frontier

    def _judge(self) -> Quality:
        assert self.judging is not None
        if self.judging.quality is not None:
            return self.judging.quality
        assert self.reference is not None
        return agreement(self.reference, self.model)


def _settings(model: Any, plan: tuple[Stage, ...], rows: datasets.Dataset, seed: int) -> dict[str, Any]:
    """What a run must have in common with the one it goes on with; a target may change, finished stages serve any."""
    policy, exit = attachment_of(model).policy, attachment_of(model).exit
    settings = {
        "model": weights(model, head=plan[0].name != FINE_TUNE.name),
        "method": policy.config.method if policy else None,
        "config": policy.config.to_dict() if policy else {},
        "exit": {"method": exit.config.method, **exit.config.to_dict()} if exit else None,
        "stages": [dataclasses.asdict(stage) for stage in plan],
        "rows": digest(rows),
        "seed": seed,
    }
    return json.loads(json.dumps(settings))  # type: ignore[no-any-return]


def _keep(model: Any, done: Path) -> None:
    """A finished stage, whose checkpoints have served."""
    save(model, done)
    for old in done.parent.glob("checkpoint-*"):
        shutil.rmtree(old, ignore_errors=True)


def _finish(model: Any, tokenizer: Any, directory: str | Path, work: Path) -> None:
    save(model, directory)
    tokenizer.save_pretrained(str(directory))
    shutil.rmtree(work, ignore_errors=True)  # last: until all is written, the same call goes on from there


def _first_drop(model: Any, validation: datasets.Dataset, speedup: float | None) -> None:
    """Set how much the first hard stage drops: the target, or a guess, which a method that cannot reach it may miss."""
    try:
        calibrate(model, validation, speedup=speedup or FIRST_GUESS)
    except TargetError:
        if speedup:
            raise


def _take_over(model: Any, done: Path) -> None:
    """Continue from a finished stage: its weights and what its policy had learned and been set to."""
    saved = checkpoint.read(done)
    loaded = saved.load_plain()
    find_encoder(model).load_state_dict(find_encoder(loaded).state_dict())
    attachment = attachment_of(model)
    if "epoch" in saved.notes:
        attachment.notes["epoch"] = saved.notes["epoch"]
    else:
        attachment.notes.pop("epoch", None)
    if saved.config is not None and attachment.policy is not None:
        set_config(model, saved.config)
        saved.load_policy(policy_of(model))
    if attachment.exit is not None:
        saved.load_exit(attachment.exit)


__all__ = ["Calibration", "fit"]
