"""What an early exit is to the engine: a branch a layer, and a rule by which rows leave. And the heads that exits serve."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Generic, Literal, Self, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from thresher.errors import OptionError
from thresher.packed import PackedTokens
from thresher.policy import Batch, Geometry, Stage, Trace
from thresher.settings import Settings

Kind = Literal["classes", "labels", "value", "span", "tags", "states"]
Memory = tuple[Tensor, ...]  # what a rule knows of each row from the layers before, [B, ...] each

SERVED = "ForSequenceClassification, ForTokenClassification or ForQuestionAnswering"


@dataclass(frozen=True)
class Head:
    """What a model's head says of a row: one of several classes, any of several labels, one value, a span of its tokens, a
    tag of every token; or, of an encoder that has none, the states of its tokens.

    outputs: numbers it says. sigmoid: whether its one value is the logit of a probability.
    """

    kind: Kind
    outputs: int
    sigmoid: bool = False


def head_of(model: PreTrainedModel) -> Head:
    """Raises OptionError for a head that no exit can answer for."""
    name, config = type(model).__name__, model.config
    if model.base_model is model:
        return Head("states", config.hidden_size)
    if name.endswith("ForQuestionAnswering"):
        return Head("span", 2)
    if name.endswith("ForTokenClassification"):
        if (config.num_labels or 0) < 2:
            raise OptionError(f"An early exit for tags needs two or more of them, and this {name} has one.")
        return Head("tags", config.num_labels or 0)
    if not name.endswith("ForSequenceClassification"):
        raise OptionError(
            f"An early exit answers in place of a head for whole inputs, spans or tags ({SERVED}), or hands out what an "
            f"encoder without a head ends with, and {name} is none of these."
        )
    several = config.problem_type == "multi_label_classification"
    if config.num_labels == 1:
        return Head("value", 1, sigmoid=several)
    if config.problem_type == "regression":
        raise OptionError(f"An early exit serves regression to one value, and this {name} has {config.num_labels}.")
    return Head("labels" if several else "classes", config.num_labels or 2)


@dataclass(frozen=True, kw_only=True)
class ExitConfig(Settings):
    """Settings of one exit: the user's API, and what is saved.

    strength: the one knob that calibration turns. 0 lets nobody leave, 1 is the configuration as written, larger lets rows
    leave earlier: thresholds are scaled by it, a patience is divided by it and rounded up.
    after: the layers after which rows may leave, counted from 1; None: every one but the last. Elsewhere no branch is asked and
    none costs anything, and a patience counts only the layers that are.
    """

    method: ClassVar[str] = ""
    serves: ClassVar[tuple[Kind, ...]] = ()
    scaled: ClassVar[tuple[str, ...]] = ()  # the settings that `strength` scales
    unscaled: ClassVar[tuple[str, ...]] = ("strength", "after")  # what else may be set without training again
    exports: ClassVar[bool] = True  # whether its decision can be written as operators of a graph
    answers_dropped: ClassVar[bool] = False  # whether its branches read the last states of dropped tokens too

    strength: float = 1.0
    after: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.strength < float("inf"):
            raise OptionError(f"strength must be a number of at least 0, not {self.strength!r}.")
        after = self.after
        if after is not None and (not after or min(after) < 1 or list(after) != sorted(set(after))):
            raise OptionError(f"after must be layers, counted from 1 and rising, or none for all of them, not {after}.")

    @classmethod
    def at_run_time(cls) -> tuple[str, ...]:
        """What `set_exit` may change without training again."""
        return (*cls.scaled, *cls.unscaled)

    @property
    def labelled(self) -> bool:
        """Whether its branches learn from labels."""
        return False

    def may_leave(self, layer: int) -> bool:
        """Whether `after` lets a row leave after this layer."""
        return self.after is None or layer in self.after

    @classmethod
    def called(cls) -> str:
        return f"exit {cls.method!r}"


# Branches alone, under what the policy drops.
ALONE = Stage(
    name="exit", mode="hard", epochs=3, learning_rate=0.0, exit_learning_rate=2e-4, label_weight=0.0, dropout=False
)
# Branches and model learn from labels together.
TOGETHER = Stage(name="exit", mode="hard", epochs=3, learning_rate=2e-5, exit_learning_rate=2e-4, label_weight=0.0)

ConfigT = TypeVar("ConfigT", bound=ExitConfig)
Mode = Literal["off", "record", "sample", "leave"]


class Exit(nn.Module, Generic[ConfigT]):
    """One method of leaving early. Holds its configuration and its branches, never the state of a pass.

    A branch stands after every layer but the last, whose answer is the head's own. Subclasses say what a branch is, when a row
    leaves, and how branches learn.

    mode: "off" (no branch runs), "record" (every branch speaks and nobody leaves: training), "sample"
    (the same, and tokens freeze, where the exit freezes any), "leave".
    Raises OptionError for a head that the exit does not serve, and for a model of one layer.
    """

    def __init__(self, config: ConfigT, geometry: Geometry, head: Head) -> None:
        super().__init__()
        if head.kind not in config.serves:
            served, given = _named(config.serves), _named((head.kind,))
            raise OptionError(f"The exit {config.method!r} serves {served}, not {given}; take {TAKE[head.kind]}.")
        if geometry.layers < 2:
            raise OptionError("An early exit needs a layer to leave out, and this model has one layer.")
        self.config, self.geometry, self.head = config, geometry, head
        self.check(config)
        self.check_after(config)
        self.mode: Mode = "leave"
        self.branches = nn.ModuleList(self.branch() for _ in range(geometry.layers - 1))

    def configured(self, config: ConfigT) -> Self:
        """The same branches under other settings, for the passes that start from now on. Raises OptionError as `check`."""
        self.check(config)
        self.check_after(config)
        new = copy.copy(self)
        new.config = config
        return new

    def check(self, config: ConfigT) -> None:
        """Raises OptionError for settings that have no sense for this model."""

    def check_after(self, config: ConfigT) -> None:
        """Raises OptionError for a layer after which no branch stands."""
        last = self.geometry.layers - 1
        if config.after is not None and max(config.after) > last:
            raise OptionError(f"after names layer {max(config.after)}; rows may leave after layers 1 to {last}.")

    def asks(self, layer: int) -> bool:
        """Whether the branch after this layer speaks."""
        return self.mode != "leave" or self.config.may_leave(layer)

    def follow(self, device: torch.device, training: bool) -> None:
        """Be where and in the mode that the model is: an exit is no submodule of it."""
        if self.training is not training:
            self.train(training)
        if next(self.parameters()).device != device:
            self.to(device)

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Layers, hidden size and outputs: what its branches were made for."""
        return self.geometry.layers, self.geometry.hidden, self.head.outputs

    @property
    def idle(self) -> bool:
        """Whether no branch need run."""
        return self.mode == "off" or (self.mode == "leave" and self.config.strength == 0)

    def branch(self) -> nn.Module:
        """A new branch, called with PackedTokens."""
        raise NotImplementedError

    def says(self, layer: int, tokens: PackedTokens) -> Tensor:
        """What the branch after `layer` (from 1) says of the rows still there: logits [B, C] float32, [B, N, 2] of spans, or
        [B, N, C] of tags."""
        branch = self.branches[layer - 1]
        said: Tensor = branch(tokens.with_hidden(tokens.hidden.to(next(branch.parameters()).dtype)))
        # A cast of what is float32 already would stand at the end of an exported graph, where quantizers stumble over it.
        return said if said.dtype == torch.float32 else said.float()

    def decide(self, layer: int, said: Tensor, before: Memory | None) -> tuple[Tensor | None, Memory | None]:
        """Which rows leave after `layer`, [B] bool, None where none can; and what the next layer has to know.

        said: as `says` gave it. before: what this gave at the layer before, of the rows still there; None at the first.
        """
        raise NotImplementedError

    def auxiliary_loss(self, trace: Trace, outputs: Tensor, batch: Batch) -> Tensor | None:
        """What a training stage of the exit adds to the loss; None outside one.

        trace: of the pass over `batch`, with what every branch said. outputs: what the model said, logits as `says` gives them.
        Raises DataError where labels are needed and missing.
        """
        if self.mode not in ("record", "sample") or not trace.branches:
            return None
        return self.loss(trace.branches, outputs, batch)

    def loss(self, branches: list[Tensor], outputs: Tensor, batch: Batch) -> Tensor:
        raise NotImplementedError

    def stages(self) -> tuple[Stage, ...]:
        """How the exit is trained after its policy: by default the branches alone, under what the policy drops."""
        return (ALONE,)

    def overhead_flops(self, n: int) -> int:
        """One branch's work for a row of n tokens (a multiply-add is 2)."""
        raise NotImplementedError

    def leaving_flops(self, n: int) -> int:
        """What is done once more for a row of n tokens when it leaves."""
        return 0


# Of each kind of head the exits that serve it.
TAKE: dict[Kind, str] = {
    "classes": "'fastbert', 'deebert', 'confidence' or 'pabee'",
    "labels": "'pabee'",
    "value": "'pabee'",
    "span": "'settled-span'",
    "tags": "'sentee' or 'tokee'",
    "states": "'settled-states'",
}


def _named(kinds: tuple[Kind, ...]) -> str:
    names = {
        "classes": "heads of two or more classes",
        "labels": "heads of labels that go together",
        "value": "heads of one label (values, probabilities)",
        "span": "question-answering heads",
        "tags": "tagging heads",
        "states": "encoders without a head",
    }
    return ", ".join(names[kind] for kind in kinds)


def from_labels(head: Head, logits: Tensor, labels: Tensor) -> Tensor:
    """The task's own loss of a branch. logits: [B, C]; labels: [B], or [B, C] of labels that go together.
    Of tags: [B, N, C], and [B, N] with -100 where there is none."""
    if head.kind in ("classes", "tags"):
        return F.cross_entropy(logits.flatten(0, -2), labels.reshape(-1))
    loss: Callable[..., Tensor] = F.binary_cross_entropy_with_logits
    if head.kind == "value" and not head.sigmoid:
        loss = F.mse_loss
    return loss(logits, labels.reshape(logits.shape).to(logits.dtype))


def rising(head: Head, every: list[Tensor], labels: Tensor) -> Tensor:
    """The mean over layers of the task's loss, layer l with weight l. every: what each says, last the model itself."""
    losses = torch.stack([from_labels(head, said, labels) for said in every])
    weights = torch.arange(1, len(every) + 1, device=losses.device, dtype=losses.dtype)
    return (weights * losses).sum() / weights.sum()


def from_answers(branch: Tensor, outputs: Tensor, *, reverse: bool = False) -> Tensor:
    """KL(outputs || branch) over the last dimension, or KL(branch || outputs) when `reverse`; outputs teach and do not learn.

    Of logits [B, C]; the mean over the rows.
    """
    ours, theirs = branch.log_softmax(-1), outputs.detach().float().log_softmax(-1)
    if reverse:
        ours, theirs = theirs, ours
    return F.kl_div(ours, theirs, log_target=True, reduction="batchmean")
