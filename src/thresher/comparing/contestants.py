"""Who takes part in a comparison: methods, the controls they have to beat, early exits, and unions of a method and an exit."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch

from thresher.errors import OptionError, ThresherError, nearest
from thresher.exits import EXIT_CONFIGS, ExitConfig
from thresher.measure.run import run
from thresher.methods import CONFIGS
from thresher.model import attach, attachment_of, find_encoder
from thresher.policy import PolicyConfig, Stage
from thresher.targets import LABELS
from thresher.training.learner import Learner
from thresher.training.plan import stages_of
from thresher.training.salient import COLUMN as SALIENCY

if TYPE_CHECKING:
    import datasets

TRAINED_ON = "trained-on"  # the control that drops nothing: what more training alone gains
LOOKED_AT = 64  # rows that tell whether there are pairs
STEPS = 200  # that tell how many passes a step makes, where that is drawn
# Magic Pyramid (LTP and FastBERT), and the same of other methods: for classes, values and responses, answers, and tags.
UNIONS = (
    "ltp+fastbert",
    "attention-mass+fastbert",
    "adapler+fastbert",
    "ltp+pabee",
    "ase+pabee",
    "ltp+settled-span",
    "block-skim+settled-span",
    "ltp+sentee",
)
OF_A_METHOD = ("learning_rate", "policy_learning_rate", "predictor_learning_rate", "label_weight", "distil_weight")
WANTED = {
    "pairs": "needs rows of two texts",
    "answers": "needs rows that say where the answer, or the evidence for it, lies",
}


class TooFewPasses(OptionError):
    """least: how many it takes."""

    def __init__(self, least: int, reason: str) -> None:
        super().__init__(reason)
        self.least = least


@dataclass(frozen=True)
class Contestant:
    """policy: how tokens drop; None: they do not. exit: how rows leave early; None: they do not."""

    policy: PolicyConfig | None = None
    exit: ExitConfig | None = None

    @property
    def name(self) -> str:
        return "+".join(part.method for part in (self.policy, self.exit) if part is not None) or TRAINED_ON

    @property
    def reads_less(self) -> bool:
        return self.policy is not None or self.exit is not None

    @property
    def trains(self) -> bool:
        return self.policy is None or self.exit is not None or not self.policy.control

    @property
    def searches(self) -> bool:
        return self.policy is not None and bool(self.policy.searches)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        policy, exit = (None if part is None else part.to_dict() for part in (self.policy, self.exit))
        return {"name": self.name, "settings": policy, "exit": exit}


Given = str | PolicyConfig | ExitConfig | Contestant


def everyone() -> tuple[Contestant, ...]:
    """Every method and every exit with its defaults, the unions, and the controls."""
    methods = [Contestant(kind()) for kind in sorted(CONFIGS.values(), key=lambda kind: (kind.control, kind.method))]
    exits = [Contestant(exit=EXIT_CONFIGS[name]()) for name in sorted(EXIT_CONFIGS)]
    unions = [_contestant(name) for name in UNIONS if name.partition("+")[0] in CONFIGS]
    return (*methods, *exits, *unions, Contestant())


def contestants(methods: Sequence[Given] | None, unions: Sequence[Given] = ()) -> tuple[Contestant, ...]:
    """Those of `methods`, by name ("ltp", "fastbert", "ltp+fastbert") or by their settings; None: everyone.

    Raises OptionError for a name that is not known, for one that is given twice, and for no name.
    """
    if isinstance(methods, str):
        raise OptionError(f"methods is a list of names, such as [{methods!r}], not one of them.")
    given = everyone() if methods is None else methods
    found = tuple(_contestant(one) for one in (*given, *unions))
    names = [one.name for one in found]
    for name in names:
        if names.count(name) > 1:
            raise OptionError(f"The method {name!r} is given twice; a comparison has each once.")
    if not found:
        raise OptionError("A comparison needs at least one method.")
    return found


def _contestant(given: Given) -> Contestant:
    if isinstance(given, Contestant):
        return given
    if isinstance(given, PolicyConfig):
        return Contestant(given)
    if isinstance(given, ExitConfig):
        return Contestant(exit=given)
    if given == TRAINED_ON:
        return Contestant()
    if not isinstance(given, str):
        raise OptionError(f"A method is given by its name or its settings, not as {given!r}.")
    parts = given.split("+")
    for name in parts:
        if name not in CONFIGS and name not in EXIT_CONFIGS:
            raise OptionError(f"There is no method {name!r}{nearest(name, [*CONFIGS, *EXIT_CONFIGS, TRAINED_ON])}")
    methods, exits = ([name for name in parts if name in known] for known in (CONFIGS, EXIT_CONFIGS))
    if len(methods) > 1 or len(exits) > 1:
        raise OptionError(f"A union has one method and one exit, such as ltp+fastbert, not {given!r}.")
    return Contestant(
        CONFIGS[methods[0]]() if methods else None,
        EXIT_CONFIGS[exits[0]]() if exits else None,
    )


# --- who may --------------------------------------------------------------------------------------------------------------


def applicable(
    asked: Sequence[Contestant], start: Any, rows: datasets.Dataset, overrides: Mapping[str, Any]
) -> tuple[tuple[Contestant, ...], dict[str, str]]:
    """Those that can be trained on `rows` from `start`, and of the others why not, by name.

    A method says by `serves` which rows it is for; the rest is found by attaching it, reading one row, and asking each stage
    for its loss there. overrides: settings of every stage.
    """
    found, left_out = [], {}
    for one in asked:
        reason = _against(one, start, rows, overrides)
        if reason is None:
            found.append(one)
        else:
            left_out[one.name] = reason
    return tuple(found), left_out


def _against(one: Contestant, start: Any, rows: datasets.Dataset, overrides: Mapping[str, Any]) -> str | None:
    if not one.reads_less:
        return None if labelled(rows) else "has nothing to learn without labels"
    try:
        attach(start, one.policy, exit=one.exit)
        if one.policy is not None:
            serves = one.policy.serves
            end = one.policy.segment_end or attachment_of(start).engine.entrance.segment_end
            if (serves == "pairs" and not _pairs(rows, end)) or (serves == "answers" and not answered(rows)):
                return WANTED[serves]
        run(start, rows.select([0]))
        if one.trains:
            _learn_once(start, rows, overrides)
    except ThresherError as error:
        return str(error)
    return None


def _learn_once(model: Any, rows: datasets.Dataset, overrides: Mapping[str, Any]) -> None:
    """The loss of every stage on one row; a ThresherError says what it lacks."""
    attachment, device = attachment_of(model), find_encoder(model).device
    row = {name: torch.tensor([value], device=device) for name, value in rows[0].items()}
    if attachment.policy is not None and attachment.policy.learns_saliency:
        row.setdefault(SALIENCY, torch.ones(row["input_ids"].shape, device=device))
    for stage in stages_of(model):
        if attachment.policy is not None:
            attachment.policy.mode = stage.mode
        if attachment.exit is not None:
            attachment.exit.mode = "off" if not stage.exits else "record"
        with torch.enable_grad(), torch.random.fork_rng():  # some losses take gradients themselves
            Learner(model, overridden(stage, overrides), model)(**row)


def overridden(stage: Stage, overrides: Mapping[str, Any]) -> Stage:
    """A stage with other settings. What an exit's stage learns from, and at which rates, is the exit's affair."""
    if not stage.exits:
        return replace(stage, **overrides)
    return replace(stage, **{name: value for name, value in overrides.items() if name not in OF_A_METHOD})


def labelled(rows: datasets.Dataset) -> bool:
    return any(name in rows.column_names for name in LABELS)


def answered(rows: datasets.Dataset) -> bool:
    """Whether encoded rows say where the answer, or the evidence for it, lies."""
    return any(name in rows.column_names for name in ("start_positions", "evidence"))


def _pairs(rows: datasets.Dataset, segment_end: int | None) -> bool:
    """Whether any of the first rows has a second segment: by its types, or behind the token that ends the first one."""
    first = rows.select(range(min(LOOKED_AT, len(rows))))
    if "token_type_ids" in rows.column_names:
        return any(max(types, default=0) > 0 for types in first["token_type_ids"])
    return segment_end is not None and any(segment_end in ids[:-1] for ids in first["input_ids"])


# --- what each trains for its budget -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """The stages of a contestant, of lengths that share the budget. passes: the examples that they read in all. rows: how many
    different ones an epoch has; None: all."""

    stages: tuple[Stage, ...]
    passes: int
    rows: int | None = None


def plan(
    stages: Sequence[Stage],
    draws: Callable[[Stage], float],
    passes: int,
    rows: int,
    overrides: Mapping[str, Any],
    name: str,
    least_epochs: int = 1,
) -> Plan:
    """Stages that together read at most `passes` examples forward and backward, in the shares of their own epochs.

    draws: the passes that a step of a stage makes over its batch, on average. rows: those of an epoch. overrides: settings of
        every stage. least_epochs: what each stage has where it can, on fewer rows if need be; 1: on all of them.
    Raises OptionError when a stage would not get one batch.
    """
    chosen = [overridden(stage, overrides) for stage in stages]
    whole = sum(stage.epochs for stage in stages)
    some = None
    if least_epochs > 1:
        shares = [passes * own.epochs / whole / draws(one) for own, one in zip(stages, chosen, strict=True)]
        fewest = max(stage.batch_size for stage in chosen)
        fitting = max(fewest, int(min(shares) / least_epochs))
        if fitting < rows:
            rows = some = fitting
        for own, stage in zip(stages, chosen, strict=True):
            least = math.ceil(least_epochs * rows * draws(stage) * whole / own.epochs)
            if passes < least:
                raise TooFewPasses(
                    least,
                    f"A budget of {passes:,} passes is less than {least_epochs} epochs of one batch of the stage "
                    f"{stage.name!r} of {name}; give at least {least:,}, or smaller batches.",
                )
    planned, read = [], 0.0
    for own, stage in zip(stages, chosen, strict=True):
        of_step = draws(stage)
        share = int(passes * own.epochs / whole + 1e-9)
        steps, examples = steps_for(int(share / of_step), rows, stage.batch_size)
        if steps == 0:
            least = math.ceil(min(stage.batch_size, rows) * of_step * whole / own.epochs)
            raise TooFewPasses(
                least,
                f"A budget of {passes:,} passes is less than one batch of the stage {stage.name!r} of {name}; give at least "
                f"{least:,}, or smaller batches.",
            )
        # Half a step less, as the trainer rounds up: floats would make one step more of some.
        planned.append(replace(stage, epochs=(steps - 0.5) / math.ceil(rows / stage.batch_size)))
        read += examples * of_step
    return Plan(tuple(planned), round(read), some)


def steps_for(examples: int, rows: int, batch: int) -> tuple[int, int]:
    """How many batches of an endless walk through `rows` read at most so many examples, and how many they read.

    The last batch of an epoch has what is left of it.
    """
    epochs, rest = divmod(examples, rows)
    return epochs * math.ceil(rows / batch) + rest // batch, epochs * rows + rest // batch * batch


def draws_of(policy: Any) -> Callable[[Stage], float]:
    """How many passes a step makes under a policy, or none, on average; without drawing on anybody's random numbers, and the
    same whenever it is asked, for a plan tells one run from another."""

    def count(stage: Stage) -> float:
        if policy is None or stage.exits:
            return 1.0
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return sum(len(policy.draws(stage)) for _ in range(STEPS)) / STEPS

    return count


def stage_settings(overrides: Mapping[str, Any] | None, *, labels: bool) -> dict[str, Any]:
    """The settings of every stage: `overrides`, and without labels the start as the only teacher.

    Raises OptionError for what a stage does not have, and for its length, which is the budget's.
    """
    known = {field.name for field in fields(Stage)} - {"name", "mode", "epochs", "configurations"}
    for name in overrides or {}:
        if name == "epochs":
            raise OptionError("The budget of passes says how long stages are; leave out epochs.")
        if name not in known:
            raise OptionError(f"A stage has no setting {name!r}{nearest(name, known)}")
    return {**({} if labels else {"label_weight": 0.0, "distil_weight": 1.0}), **(overrides or {})}


__all__ = [
    "TRAINED_ON",
    "Contestant",
    "Given",
    "Plan",
    "TooFewPasses",
    "applicable",
    "contestants",
    "draws_of",
    "everyone",
    "labelled",
    "plan",
    "stage_settings",
    "stages_of",
    "steps_for",
]
