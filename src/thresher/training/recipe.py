"""A method's stages one after the other, resumable, with calibration where the method starts to drop."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from accelerate import PartialState

from thresher import checkpoint
from thresher.calibration import Calibration, Quality, agreement, calibrate
from thresher.errors import OptionError, TargetError, nearest
from thresher.exits import ExitConfig
from thresher.frontier import Frontier
from thresher.measure.run import run_packed
from thresher.model import Attachment, attach, attachment_of, find_encoder, policy_of, save, set_config
from thresher.policy import PolicyConfig, Stage
from thresher.training import frontiers
from thresher.training.learner import stock_copy
from thresher.training.resuming import begin, by_one, refuse_another_run
from thresher.training.salient import COLUMN, with_saliency
from thresher.training.stages import run_stage, trains_on_cpu

FIRST_GUESS = 2.0


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
    exit: an early exit, trained after the method on the model that drops tokens (after LTP: Magic Pyramid, He et al., 2021), or
        alone where `policy` is None.
    speedup / max_loss: the target, met on `validation` (see calibrate): before tokens first drop in training, and at
    the end. With a method and an exit the method first meets its share, the root of the speedup or half of the loss, and the
    exit is then set so that both together meet the target.
    fine_tune: begin with ordinary fine-tuning, for a model whose head is new.
    stages: instead of the method's own. overrides: settings for every stage ({"epochs": 2}) or one
    ({"soft.learning_rate": 1e-4}). A run that was interrupted goes on where it stopped when called again with the same
    directory; OptionError if it was called with other settings there.
    search: for a method that searches retention configurations on `validation` (ASE before it trains under them,
        Length-Adaptive Transformer after): settings of `thresher.search`. The target then picks from the frontier.
    on_start: called once with the predictions on `validation` of the model that the method starts from (fine-tuned,
    nothing dropped): what gains and losses are counted from.
    notes: saved with the model (`attachment_of(model).notes`), e.g. what task it was trained for.
    arguments: anything else run_stage takes.
    Under torchrun every process calls it with the same arguments, and a directory that all of them see; the main one writes.
    """
    work = Path(directory) / "training"
    attach(model, policy, exit=exit)
    attachment = attachment_of(model)
    attachment.notes.update(notes or {})
    plan = stages if stages is not None else _stages(attachment)
    if fine_tune:
        plan = (Stage(name="fine-tune", mode="off"), *plan)
    plan = tuple(_override(stage, overrides or {}, plan) for stage in plan)
    searches = attachment.policy.config.searches if attachment.policy is not None else ""
    targeted = speedup is not None or max_loss is not None
    if (targeted or searches) and validation is None:
        what = "A target needs validation rows to be met on" if targeted else "A search needs validation rows"
        raise OptionError(f"{what}; give validation=.")
    if search and not searches:
        name = "none" if attachment.policy is None else attachment.policy.config.method
        raise OptionError(f"The method {name!r} searches no retention configurations.")
    processes = PartialState(cpu=trains_on_cpu(arguments))
    for stage in plan:
        if attachment.policy is not None and stage.exit_learning_rate is None:
            attachment.policy.check(stage)
    if attachment.exit is not None:
        attachment.exit.mode = "off"  # until it is trained
    settings = _settings(model, plan, rows, seed)
    refuse_another_run(work, settings)
    by_one(processes, lambda: begin(work, settings))
    teacher = reference = frontier = None
    share = _share(attachment, speedup, max_loss)

    def settle(speedup: float | None, max_loss: float | None) -> None:
        """Set how much the policy drops."""
        nonlocal frontier
        if searches and validation is not None and reference is not None:
            judge = quality or agreement(reference, model)
            if frontier is None:
                frontier = _search(model, validation, quality, reference, work, search or {}, seed, processes)
            else:
                frontier = frontiers.measured(model, validation, judge, frontier)
            frontiers.settle(model, frontier, speedup, None if max_loss is None else float(judge(reference)) - max_loss)
        elif validation is not None and targeted:
            calibrate(model, validation, speedup=speedup, max_loss=max_loss, quality=quality, reference=reference)

    for number, stage in enumerate(plan, start=1):
        done = work / f"{number}-{stage.name}" / "done"
        if stage.distil_weight and teacher is None:  # also when this stage is done: later ones have it
            teacher = stock_copy(model)
        wanted = max_loss is not None or on_start is not None or searches
        if wanted and validation is not None and reference is None and stage.name != "fine-tune":
            reference = run_packed(model, validation).predictions
            if on_start:
                on_start(reference)
        exiting = stage.exit_learning_rate is not None
        if stage.mode == "hard" and not exiting and searches == "before" and not stage.configurations:
            frontier = _search(model, validation, quality, reference, work, search or {}, seed, processes)
            frontier.at(share[0] or 1.0)  # rather now than after hours of training
            stage = dataclasses.replace(stage, configurations=frontier.configurations)
        whole = (done / checkpoint.SETTINGS).is_file()  # written last: the stage was saved whole
        if exiting and attachment.policy is not None and (searches or not whole):
            settle(*share)
        if whole:
            _take_over(model, done)
            continue
        if stage.mode == "hard" and not exiting and not searches and validation is not None and targeted:
            _first_drop(model, validation, share[0])
        if on_stage:
            on_stage(stage)
        salient = attachment.policy is not None and attachment.policy.learns_saliency and not exiting
        if stage.mode != "off" and salient and COLUMN not in rows.column_names:
            rows = with_saliency(model, rows, work, processes, progress=bool(arguments.get("progress", True)))
        run_stage(model, stage, rows, tokenizer, done.parent, teacher=teacher, seed=seed, **arguments)
        by_one(processes, partial(_keep, model, done))
    if attachment.exit is None:
        settle(speedup, max_loss)
    else:
        attachment.exit.mode = "leave"
        if validation is not None and targeted:
            calibrate(
                model,
                validation,
                speedup=speedup,
                max_loss=max_loss,
                quality=quality,
                reference=reference,
                knob="exit",
            )
    by_one(processes, lambda: _finish(model, tokenizer, directory, work))
    return model


def _stages(attachment: Attachment) -> tuple[Stage, ...]:
    """The policy's own, then the exit's."""
    if attachment.policy is None and attachment.exit is None:
        raise OptionError("There is nothing to train; give fit a method, an exit, or both.")
    policy = () if attachment.policy is None else attachment.policy.stages()
    return policy if attachment.exit is None else (*policy, *attachment.exit.stages())


def _share(attachment: Attachment, speedup: float | None, max_loss: float | None) -> tuple[float | None, float | None]:
    """The part of a target that the policy meets by itself: all of it, where there is no exit."""
    if attachment.exit is None:
        return speedup, max_loss
    return None if speedup is None else math.sqrt(speedup), None if max_loss is None else max_loss / 2


def _search(
    model: Any,
    validation: Any,
    quality: Quality | None,
    reference: Any,
    work: Path,
    options: Mapping[str, Any],
    seed: int,
    processes: PartialState,
) -> Frontier:
    """The frontier of the model as it is now; made once, and only read by a run that goes on."""
    judge = quality or agreement(reference, model)
    by_one(processes, lambda: frontiers.searched(model, validation, judge, work, options, seed))
    return frontiers.read(model, work)


def _settings(model: Any, plan: tuple[Stage, ...], rows: datasets.Dataset, seed: int) -> dict[str, Any]:
    """What a run must have in common with the one it goes on with; a target may change, finished stages serve any."""
    policy, exit = attachment_of(model).policy, attachment_of(model).exit
    ends = [rows[i]["input_ids"] for i in (0, -1)] if len(rows) else []
    settings = {
        "method": policy.config.method if policy else None,
        "config": policy.config.to_dict() if policy else {},
        "exit": {"method": exit.config.method, **exit.config.to_dict()} if exit else None,
        "stages": [dataclasses.asdict(stage) for stage in plan],
        "rows": [len(rows), ends],
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


def _override(stage: Stage, overrides: Mapping[str, Any], plan: tuple[Stage, ...]) -> Stage:
    known = {f.name for f in dataclasses.fields(Stage)} - {"name"}
    changes = {}
    for key, value in overrides.items():
        name, _, setting = key.rpartition(".")
        if setting not in known:
            raise OptionError(f"A stage has no setting {setting!r}{nearest(setting, known)}")
        if name and name not in {s.name for s in plan}:
            raise OptionError(f"The method has no stage {name!r}{nearest(name, {s.name for s in plan})}")
        fixed = (
            setting == "learning_rate" and stage.learning_rate == 0
        )  # a model that does not learn, unless told so by name
        if name == stage.name or (not name and not fixed):
            changes[setting] = value
    stage = dataclasses.replace(stage, **changes)
    if stage.exit_learning_rate is not None and stage.learning_rate == 0:  # what the model says is nobody's lesson
        return dataclasses.replace(stage, label_weight=0.0, distil_weight=0.0)
    return stage


def _take_over(model: Any, done: Path) -> None:
    """Continue from a finished stage: its weights and what its policy had learned and been set to."""
    saved = checkpoint.read(done)
    loaded = saved.load_plain()
    find_encoder(model).load_state_dict(find_encoder(loaded).state_dict())
    attachment = attachment_of(model)
    if saved.config is not None and attachment.policy is not None:
        set_config(model, saved.config)
        saved.load_policy(policy_of(model))
    if attachment.exit is not None:
        saved.load_exit(attachment.exit)


__all__ = ["Calibration", "fit"]
