"""What a fit trains: what is attached, by which stages, and the settings that a user gives them."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any

import torch

from thresher.errors import OptionError, nearest
from thresher.exits import ExitConfig
from thresher.model import attach, attachment_of, find_encoder, is_attached, set_config
from thresher.policy import PolicyConfig, Stage
from thresher.protection import with_segments

FINE_TUNE = Stage(name="fine-tune", mode="off")


def attach_new(
    model: Any, policy: PolicyConfig | str | None, exit: ExitConfig | str | None, tokenizer: Any, seed: int
) -> None:
    """Attach what one fit trains: drawn from `seed` whatever ran before, and told by the tokenizer where a first text ends."""
    if policy is None and is_attached(model) and (before := attachment_of(model).policy) is not None:
        warnings.warn(
            f"The method {before.config.method!r} that the model has is taken off, as fit was given none; give its settings "
            "(thresher.policy_of(model).config) to train with it.",
            stacklevel=3,
        )
    with torch.random.fork_rng():  # the caller's draws go on as they were
        torch.manual_seed(seed)
        attach(model, policy, exit=exit)
    if (attached := attachment_of(model).policy) is not None:
        told = with_segments(attached.config, tokenizer, find_encoder(model))
        if told is not attached.config:
            set_config(model, told)


def stages_of(model: Any) -> tuple[Stage, ...]:
    """Of what is attached: the method's own, then the exit's."""
    attachment = attachment_of(model)
    parts = (attachment.policy, attachment.exit)
    return tuple(stage for part in parts if part is not None for stage in part.stages())


def planned(
    model: Any, stages: tuple[Stage, ...] | None, overrides: Mapping[str, Any], *, fine_tune: bool
) -> tuple[Stage, ...]:
    """The stages of one fit, those given or what is attached's own.

    overrides: settings of every stage ({"epochs": 2}), or of one by name ({"soft.learning_rate": 1e-4}).
    Raises OptionError for a setting or a stage that there is not, one that the policy does not take, and nothing to train
        or to learn from.
    """
    attachment = attachment_of(model)
    plan = stages_of(model) if stages is None else stages
    if stages is None and attachment.policy is None and attachment.exit is None:
        raise OptionError("There is nothing to train; give fit a method, an exit, or both.")
    if fine_tune:
        plan = (FINE_TUNE, *plan)
    _refuse_unknown(overrides, plan)
    plan = tuple(_overridden(stage, overrides) for stage in plan)
    for stage in plan:
        if stage.exits:
            continue
        if not (stage.label_weight or stage.distil_weight or stage.policy_learning_rate):
            raise OptionError(
                f"The stage {stage.name!r} has nothing to learn from; give it a label_weight or a distil_weight above 0."
            )
        if attachment.policy is not None:
            attachment.policy.check(stage)
    return plan


def _refuse_unknown(overrides: Mapping[str, Any], plan: tuple[Stage, ...]) -> None:
    settings = {f.name for f in dataclasses.fields(Stage)} - {"name"}
    names = {stage.name for stage in plan}
    for key in overrides:
        name, _, setting = key.rpartition(".")
        if setting not in settings:
            raise OptionError(f"A stage has no setting {setting!r}{nearest(setting, settings)}")
        if name and name not in names:
            raise OptionError(f"The method has no stage {name!r}{nearest(name, names)}")


def _overridden(stage: Stage, overrides: Mapping[str, Any]) -> Stage:
    changes = {}
    for key, value in overrides.items():
        name, _, setting = key.rpartition(".")
        # A model that does not learn stays so, unless told otherwise by name.
        fixed = setting == "learning_rate" and stage.learning_rate == 0
        if name == stage.name or (not name and not fixed):
            changes[setting] = value
    stage = dataclasses.replace(stage, **changes)
    if stage.exits and stage.learning_rate == 0:  # what the model says is nobody's lesson
        return dataclasses.replace(stage, label_weight=0.0, distil_weight=0.0)
    return stage


__all__ = ["FINE_TUNE", "attach_new", "planned", "stages_of"]
