"""What a method is to the engine: a policy that takes tokens and gives tokens, and the trace of one forward pass."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from enum import Enum
from typing import ClassVar, Generic, Literal, TypeVar

import torch
from torch import Tensor, nn

from thresher.backbones.general import Geometry as Geometry
from thresher.errors import OptionError
from thresher.evidence import NOTHING, Evidence, Wanted
from thresher.packed import PackedTokens
from thresher.settings import Settings, is_number, is_whole

Mode = Literal["off", "soft", "hard"]
Batch = Mapping[str, Tensor]  # what a training step is given: inputs, labels, and what only a policy reads


class Point(Enum):
    """Where a policy may act. On pre-norm families AFTER_ATTENTION is acted at AFTER_LAYER."""

    BEFORE_LAYER = "before layer"
    AFTER_ATTENTION = "after attention"
    AFTER_LAYER = "after layer"


@dataclass(frozen=True, kw_only=True)
class PolicyConfig(Settings):
    """Settings of one method: the user's API, and what is saved.

    protect_segments: segments of which no token may be dropped, e.g. (0,) for the question in extractive QA.
    protect_ids: token ids that may not be dropped, e.g. the separators. The first token always stays.
    segment_end: the token id that closes the first segment, where the family has no token types and its configuration does not
        name the separator (DistilBERT).
    strength: the one knob that calibration turns. 0 keeps everything, 1 is the configuration as written, larger reads
    less.
    """

    method: ClassVar[str] = ""
    exports: ClassVar[bool] = True  # whether the decision can be written as operators of a graph
    # When a fit searches retention configurations: before the stages, which then train under them, or on the trained model.
    searches: ClassVar[Literal["", "before", "after"]] = ""
    point: ClassVar[Point] = Point.AFTER_ATTENTION  # where tokens drop
    # The rows it is for: "pairs" have two segments, "answers" say where in them the answer lies (or the evidence for it).
    serves: ClassVar[Literal["any", "pairs", "answers"]] = "any"
    labelled: ClassVar[bool] = False  # whether it learns from labels, however its stages are set
    least_epochs: ClassVar[int] = (
        1  # that its schedule needs: a comparison trains it on fewer rows rather than for fewer
    )
    control: ClassVar[bool] = False  # what every method has to beat: it chooses blindly, and is compared untrained

    protect_segments: tuple[int, ...] = ()
    protect_ids: tuple[int, ...] = ()
    segment_end: int | None = None
    strength: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.strength < float("inf"):
            raise OptionError(f"strength must be a number of at least 0, not {self.strength!r}.")

    @classmethod
    def called(cls) -> str:
        return f"method {cls.method!r}"


@dataclass
class Trace:
    """What happened in one forward pass. Made for the pass, never stored in the model.

    reads: for each layer, the tokens of each row that its attention read and that its feed-forward read.
    asking: for each layer, the tokens of each row that attended, where an exit freezes some; empty: all that are in `reads`.
    frozen: (layer, flat index of the tokens that froze after it), kept when `record` is set.
    dropped: (layer, flat index of the tokens dropped there), kept when `record` is set.
    auxiliary: per-layer tensors that a method's loss needs, by name.
    kept: positions left after each layer, kept while a graph is traced.
    exited_at: for each row, the layer after which it left early; the number of layers where the answer is the head's own.
    asked: for each layer with an exit's branch, the tokens of each row that it read.
    branches: what each branch said, [B, C], [B, N, 2] or [B, N, C], kept while an exit is trained.
    handed: (layer, rows, flat index of their tokens, states) of rows of an encoder without a head that left after it, kept when
        `record` is set.
    """

    record: bool = False
    mask: Tensor | None = None
    reads: list[tuple[list[int], list[int]]] = field(default_factory=list)
    dropped: list[tuple[int, Tensor]] = field(default_factory=list)
    auxiliary: dict[str, list[Tensor]] = field(default_factory=dict)
    original: list[int] = field(default_factory=list)
    kept: list[Tensor] = field(default_factory=list)
    exited_at: list[int] = field(default_factory=list)
    asked: list[list[int]] = field(default_factory=list)
    branches: list[Tensor] = field(default_factory=list)
    asking: list[list[int]] = field(default_factory=list)
    frozen: list[tuple[int, Tensor]] = field(default_factory=list)
    handed: list[tuple[int, Tensor, Tensor, Tensor]] = field(default_factory=list)

    def add(self, name: str, value: Tensor) -> None:
        self.auxiliary.setdefault(name, []).append(value)

    def dropped_at(self) -> Tensor:
        """[B, N] int64: the layer at which each token was dropped, 0 = kept to the end, -1 = padding. Needs `record`."""
        return self._layers_of(self.dropped)

    def frozen_at(self) -> Tensor:
        """[B, N] int64: the layer after which each token froze, 0 = never, -1 = padding. Needs `record`."""
        return self._layers_of(self.frozen)

    def _layers_of(self, events: list[tuple[int, Tensor]]) -> Tensor:
        if not self.record or self.mask is None:
            raise OptionError("This trace did not record what became of which token; use tracing(record=True).")
        out = torch.zeros_like(self.mask, dtype=torch.int64).masked_fill(~self.mask.bool(), -1)
        for layer, flat in events:
            out.view(-1)[flat] = layer
        return out


_sink: ContextVar[tuple[list[Trace], bool] | None] = ContextVar("thresher_traces", default=None)


@contextlib.contextmanager
def tracing(record: bool = False, *, passed_on: bool = False) -> Iterator[list[Trace]]:
    """Collect the trace of every forward pass made inside the block, by this thread.

    record: also keep which tokens were dropped where. passed_on: whether a block around this one gets them too, when it ends.
    """
    traces: list[Trace] = []
    outer = _sink.get() if passed_on else None
    token = _sink.set((traces, record or (outer is not None and outer[1])))
    try:
        yield traces
    finally:
        _sink.reset(token)
        if outer is not None:
            outer[0].extend(traces)


def new_trace() -> Trace:
    sink = _sink.get()
    trace = Trace(record=bool(sink and sink[1]))
    if sink:
        sink[0].append(trace)
    return trace


@dataclass(frozen=True)
class Retained:
    """What the passes of a block read instead of what their policy is configured to, see `retaining`."""

    retention: tuple[float, ...]
    skip: frozenset[int] = frozenset()


_retained: ContextVar[Retained | None] = ContextVar("thresher_retained", default=None)


@contextlib.contextmanager
def retaining(retention: Sequence[float], skip: Iterable[int] = ()) -> Iterator[None]:
    """Inside this block passes of this thread read by another retention configuration than the policy's own.

    retention: the fraction of its own length that a row keeps after each layer, one for each layer, never rising; policies
        that keep no fractions do not look at it. skip: layers (from 1) that are left out whole, as LayerDrop does in
        training; no token drops there.
    """
    token = _retained.set(Retained(tuple(retention), frozenset(skip)))
    try:
        yield
    finally:
        _retained.reset(token)


def retained() -> Retained | None:
    """The retention configuration of the block that this pass runs in, if it runs in one."""
    return _retained.get()


@dataclass(frozen=True)
class Draw:
    """One of the passes that a training step makes over its batch, and what its answers are worth.

    reads: the retention configuration of this pass; None for what the policy is set to.
    label_weight: of the task's loss. distil_weight: of the distance to what the teacher says.
    from_first: the teacher is the step's first pass (in-place distillation) instead of the stage's own.
    reverse: KL(student || teacher) instead of KL(teacher || student).
    """

    reads: Retained | None = None
    label_weight: float = 1.0
    distil_weight: float = 0.0
    from_first: bool = False
    reverse: bool = False

    def applied(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self.reads is None else retaining(self.reads.retention, self.reads.skip)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One training stage of a method; every setting can be overridden.

    mode: how the policy acts: "off" (plain model), "soft" (differentiable), "hard" (tokens really drop).
    epochs, learning_rate, batch_size, warmup (share of the steps), weight_decay: as in transformers.
    policy_learning_rate: for the policy's own parameters; None leaves them fixed. predictor_learning_rate: for those among them
        that learn with the model (`Policy.with_the_model`); None: learning_rate.
    exit_learning_rate: for the exit's branches, which all speak in such a stage while nobody leaves; with learning_rate=0 they
    alone learn, and nothing goes back through the model. None: the stage runs without the exit.
    exit_samples: whether tokens freeze during such a stage, where the exit freezes any.
    label_weight, distil_weight: weights of the task's loss and of what the stock model says (KL on logits, cosine on
    embeddings).
    dropout: whether the model's own dropout is on; learning from the stock model goes better without.
    configurations: retention configurations, one of which is drawn for each step; empty: the policy's own.
    keeps: the model of the "last" epoch, or of the "fastest", tokens really dropping, that loses at most a point on the
        validation rows (or what the target allows); where a speedup is the target, of the last all the same.
    """

    name: str
    mode: Mode
    epochs: float = 1.0
    learning_rate: float = 5e-5
    policy_learning_rate: float | None = None
    predictor_learning_rate: float | None = None
    exit_learning_rate: float | None = None
    exit_samples: bool = False
    batch_size: int = 16
    warmup: float = 0.06
    weight_decay: float = 0.01
    label_weight: float = 1.0
    distil_weight: float = 0.0
    dropout: bool = True
    configurations: tuple[tuple[float, ...], ...] = ()
    keeps: Literal["last", "fastest"] = "last"

    def __post_init__(self) -> None:
        rates = ("policy_learning_rate", "predictor_learning_rate", "exit_learning_rate")
        numbers = ("epochs", "learning_rate", "warmup", "weight_decay", "label_weight", "distil_weight", *rates)
        for name in numbers:
            value = getattr(self, name)
            if not (value is None and name in rates) and not (is_number(value) and math.isfinite(value)):
                raise OptionError(f"The stage {self.name!r} cannot have {name}={value!r}.")
        checks = {
            "epochs": self.epochs > 0,
            "batch_size": is_whole(self.batch_size) and self.batch_size >= 1,
            "learning_rate": self.learning_rate >= 0,
            **{name: getattr(self, name) is None or getattr(self, name) >= 0 for name in rates},
            "warmup": 0 <= self.warmup <= 1,
            "weight_decay": self.weight_decay >= 0,
            "label_weight": self.label_weight >= 0,
            "distil_weight": self.distil_weight >= 0,
            "keeps": self.keeps in ("last", "fastest"),
        }
        for name, holds in checks.items():
            if not holds:
                raise OptionError(f"The stage {self.name!r} cannot have {name}={getattr(self, name)!r}.")

    @property
    def exits(self) -> bool:
        """Whether it is the exit's, in which branches speak."""
        return self.exit_learning_rate is not None


ConfigT = TypeVar("ConfigT", bound=PolicyConfig)


class Policy(nn.Module, Generic[ConfigT]):
    """One method. Holds its configuration and its parameters, never the state of a pass.

    Subclasses say which evidence they want from a layer and what they do with the tokens at a point. The default reads
    everything. Train and eval mode follow the model's at every pass.

    dropped_may_answer: whether a question-answering head may point at a dropped token, whose last state it then reads.
    grain: tokens of a block where the method's own work is a polynomial in whole blocks.
    learns_saliency: whether training reads the saliency of the rows' tokens, which a fit asks of the model it starts from.
    with_the_model: beginnings of the names of parameters that decay as the model's do, and learn at a stage's
        predictor_learning_rate or the model's rate, not at the policy's.
    """

    dropped_may_answer: ClassVar[bool] = True
    grain: int = 1
    learns_saliency: ClassVar[bool] = False
    with_the_model: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: ConfigT, geometry: Geometry) -> None:
        super().__init__()
        self.config = config
        self.geometry = geometry
        self.mode: Mode = "hard"

    def follow(self, device: torch.device, training: bool) -> None:
        """Be where and in the mode that the model is: a policy is no submodule of it, so that its own calls do not tell."""
        if self.training is not training:
            self.train(training)
        one = next(itertools.chain(self.parameters(), self.buffers()), None)
        if one is not None and one.device != device:
            self.to(device)

    @property
    def needs_training(self) -> bool:
        """Whether it has numbers of its own to learn before what it drops means anything."""
        return any(True for _ in self.parameters())

    def wants(self, layer: int) -> Wanted:
        """Evidence from `layer`'s attention."""
        return NOTHING

    def act(self, point: Point, layer: int, tokens: PackedTokens, evidence: Evidence, trace: Trace) -> PackedTokens:
        """Tokens in, tokens out."""
        return tokens

    def auxiliary_loss(self, trace: Trace, batch: Batch) -> Tensor | None:
        """What a training stage adds to the task's loss; None outside a stage that adds something.

        trace: of the pass over `batch`, which has the labels too, whatever they weigh in the stage.
        """
        return None

    def total_loss(self, task: Tensor, trace: Trace, batch: Batch) -> Tensor:
        """What one pass of a training step minimises, `task` being what the stage asks of the model's answers.

        By default the sum of that and the auxiliary loss, for every parameter. A method whose parameters have losses of their
        own says here which gradient goes where.
        """
        auxiliary = self.auxiliary_loss(trace, batch)
        return task if auxiliary is None else task + auxiliary

    @property
    def reads_row_losses(self) -> bool:
        """Whether a training step now ends with `step_loss`."""
        return False

    def step_loss(self, traces: Sequence[Trace], losses: Sequence[Tensor], batch: Batch) -> Tensor | None:
        """What all passes of a training step add together, beside what each adds by itself.

        traces: of each pass. losses: of each pass [B], the task's loss of every row by itself.
        """
        return None

    def stages(self) -> tuple[Stage, ...]:
        """How the method is trained from a fine-tuned model: by default the model learns from its stock self."""
        return (Stage(name="distil", mode="hard", label_weight=0.0, distil_weight=1.0, dropout=False),)

    def draws(self, stage: Stage) -> Sequence[Draw]:
        """The passes of one training step. By default one, under a configuration drawn from the stage's."""
        reads = None
        if stage.configurations:
            reads = Retained(stage.configurations[int(torch.randint(len(stage.configurations), ()))])
        return (Draw(reads, stage.label_weight, stage.distil_weight),)

    def check(self, stage: Stage) -> None:
        """Raises OptionError when the method cannot be trained by this stage."""

    def before_stage(self, batches: Iterable[tuple[PackedTokens, Batch]]) -> None:
        """Called before a stage's first step with all rows of its data, as they would come to the first layer, without states.

        Each batch is made when it is asked for, so that a method without anything to count costs nothing.
        """

    def before_epoch(self, epoch: int, epochs: int) -> None:
        """Called before every epoch of a stage, counted from 0; epochs: how many there will be."""

    def after_step(self) -> None:
        """Called after every step of the optimizer, to keep parameters inside their bounds."""

    def overhead_flops(self, layer: int, n: int, entering: int | None = None) -> int:
        """The method's own work at one layer (a multiply-add is 2) for a row of which attention reads n tokens.

        entering: the tokens that came to the layer, which are more where some are dropped before it; None: n.
        """
        wanted = self.wants(layer)
        return (2 * wanted.mass + 4 * wanted.by_segment) * self.geometry.heads * n * n
