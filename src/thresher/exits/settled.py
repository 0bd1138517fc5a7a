"""Exits by when the answer has stopped changing: PABEE, and the same for spans."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thresher.errors import OptionError, nearest
from thresher.exits.base import TOGETHER, Exit, ExitConfig, Kind, Memory, from_answers, rising
from thresher.exits.branches import NO_ANSWER, LinearBranch, SpanBranch, StateBranch
from thresher.exits.certain import labels_of
from thresher.policy import Batch, Stage

Pooling = Literal["mean", "first"]


@dataclass(frozen=True, kw_only=True)
class SettledExit(ExitConfig):
    """A row leaves when as many layers in a row as `patience` have said the same as the layer before them.

    So nobody leaves before layer patience + 1. None: half the layers. `strength` divides it.
    """

    scaled: ClassVar[tuple[str, ...]] = ("patience",)

    patience: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.patience is not None and self.patience < 1:
            raise OptionError(f"patience must be a whole number of at least 1, not {self.patience!r}.")


@dataclass(frozen=True, kw_only=True)
class PABEE(SettledExit):
    """PABEE (Zhou et al., NeurIPS 2020): leave when the prediction has stayed the same for `patience` layers, counted for each
    row.

    A branch is a linear layer on the first token; branches and model learn together from labels, layer l with weight l. A value
    is the same when it has moved by at most `tolerance`, times `strength`.
    """

    method: ClassVar[str] = "pabee"
    serves: ClassVar[tuple[Kind, ...]] = ("classes", "labels", "value")
    scaled: ClassVar[tuple[str, ...]] = ("patience", "tolerance")
    tolerance: float = 0.05

    @property
    def labelled(self) -> bool:
        return True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.tolerance < math.inf:
            raise OptionError(f"tolerance must be a number of at least 0, not {self.tolerance!r}.")


@dataclass(frozen=True, kw_only=True)
class SettledSpan(SettledExit):
    """For question answering: leave when the likeliest start and end have stayed the same for `patience` layers.

    A branch is a linear layer on every token still there, and learns what the model itself says of those at the end.
    """

    method: ClassVar[str] = "settled-span"
    serves: ClassVar[tuple[Kind, ...]] = ("span",)


@dataclass(frozen=True, kw_only=True)
class SettledStates(SettledExit):
    """For embedders, and for the query of a scorer: leave when the row's vector has turned by at most `tolerance` (1 - cosine)
    for `patience` layers. PABEE's rule, for what has no label to stay the same.

    patience: layers; `strength` scales the tolerance alone.
    pooling: what the row's vector is, the "mean" of its states or the "first" one: what the embedder makes of them.
    A branch is a linear map that stands in for the layers to come; it learns the vector that the model ends with. What a row
    that leaves hands out are its tokens' states under that map; to a layer that somebody else reads it hands those that it has.
    """

    method: ClassVar[str] = "settled-states"
    serves: ClassVar[tuple[Kind, ...]] = ("states",)
    scaled: ClassVar[tuple[str, ...]] = ("tolerance",)
    unscaled: ClassVar[tuple[str, ...]] = (*ExitConfig.unscaled, "patience")
    exports: ClassVar[bool] = False  # an exported chain ends with answers, not with states
    patience: int | None = 1
    tolerance: float = 0.05
    pooling: Pooling = "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.tolerance <= 2.0:
            raise OptionError(f"tolerance is of 1 - cosine and lies between 0 and 2, not {self.tolerance!r}.")
        if self.pooling not in (known := get_args(Pooling)):
            raise OptionError(f"There is no pooling {self.pooling!r}{nearest(str(self.pooling), known)}")


SettledT = TypeVar("SettledT", bound=SettledExit)


class PatientExit(Exit[SettledT]):
    """A row leaves when its answer has settled. Remembers of each row its last answer and for how many layers it has held."""

    def check(self, config: SettledT) -> None:
        """A patience must let somebody leave before the last layer."""
        layers = self.geometry.layers
        most = _most(layers, config)
        if layers < 3:
            raise OptionError(f"An exit with patience needs a model of at least 3 layers, and this one has {layers}.")
        if most < 1:
            raise OptionError(
                f"after names one layer, {config.after}; whether an answer has settled shows after two at least."
            )
        if config.patience is not None and config.patience > most:
            raise OptionError(
                f"With patience={config.patience} nobody leaves before the last of {layers} layers; give at most {most}."
            )

    def patience(self) -> int:
        given = self.config.patience
        layers = self.geometry.layers
        patience = max(1, min(layers // 2, _most(layers, self.config))) if given is None else given
        return max(1, math.ceil(min(patience / self.config.strength, self.geometry.layers)))

    def answer(self, said: Tensor) -> Tensor:
        """[B, K], what is compared from layer to layer."""
        raise NotImplementedError

    def same(self, now: Tensor, last: Tensor) -> Tensor:
        """[B] bool."""
        return (now == last).all(1)

    def decide(self, layer: int, said: Tensor, before: Memory | None) -> tuple[Tensor | None, Memory | None]:
        now = self.answer(said)
        if before is None:
            return None, (now, torch.zeros(len(now), dtype=torch.int64, device=now.device))
        last, held = before
        held = torch.where(self.same(now, last), held + 1, 0)
        patience = self.patience()
        return held >= patience if layer > patience else None, (now, held)


def _most(layers: int, config: SettledExit) -> int:
    """The longest patience with which a row may leave: its answer at one asked layer is what the others are compared with."""
    return (layers - 1 if config.after is None else len(config.after)) - 1


class PABEEExit(PatientExit[PABEE]):
    """Settled predictions, linear branches, trained with the model."""

    def branch(self) -> nn.Module:
        return LinearBranch(self.geometry.hidden, self.head.outputs)

    def overhead_flops(self, n: int) -> int:
        return LinearBranch.flops(self.geometry.hidden, self.head.outputs)

    def answer(self, said: Tensor) -> Tensor:
        if self.head.kind == "classes":
            return said.argmax(-1, keepdim=True)
        return said if self.head.kind == "value" else said > 0

    def same(self, now: Tensor, last: Tensor) -> Tensor:
        if self.head.kind == "value":
            return ((now - last).abs() <= self.config.tolerance * self.config.strength).all(1)
        return super().same(now, last)

    def loss(self, branches: list[Tensor], outputs: Tensor, batch: Batch) -> Tensor:
        return rising(self.head, [*branches, outputs.reshape(len(outputs), -1).float()], labels_of(batch))

    def stages(self) -> tuple[Stage, ...]:
        return (TOGETHER,)


class SettledSpanExit(PatientExit[SettledSpan]):
    """Settled spans, a linear layer on every token, self-distillation."""

    def branch(self) -> nn.Module:
        return SpanBranch(self.geometry.hidden)

    def overhead_flops(self, n: int) -> int:
        return SpanBranch.flops(n, self.geometry.hidden)

    def answer(self, said: Tensor) -> Tensor:
        return said.argmax(1)

    def loss(self, branches: list[Tensor], outputs: Tensor, batch: Batch) -> Tensor:
        """The sum over branches of KL(model || branch), over the tokens that the branch still has."""
        total = []
        for said in branches:
            wanted = torch.where(said == NO_ANSWER, NO_ANSWER, outputs.detach().float())
            total.append(from_answers(said.transpose(1, 2).flatten(0, 1), wanted.transpose(1, 2).flatten(0, 1)))
        return torch.stack(total).sum()


class SettledStatesExit(PatientExit[SettledStates]):
    """Settled vectors, a linear map of the states, self-distillation."""

    def branch(self) -> nn.Module:
        return StateBranch(self.geometry.hidden, self.config.pooling)

    def check(self, config: SettledStates) -> None:
        super().check(config)
        if config.pooling != self.config.pooling:
            raise OptionError(f"The branches learned the {self.config.pooling} state of a row; train them for another.")

    def patience(self) -> int:
        """As given whatever the strength: scaling the tolerance reaches every speedup by itself, a patience jumps over some."""
        return 1 if self.config.patience is None else self.config.patience

    def overhead_flops(self, n: int) -> int:
        return StateBranch.flops(self.geometry.hidden)

    def leaving_flops(self, n: int) -> int:
        return n * StateBranch.flops(self.geometry.hidden)

    def changed(self, layer: int, states: Tensor) -> Tensor:
        """[T, D] → [T, D], the states after `layer` as they would be at the end."""
        branch: Any = self.branches[layer - 1]
        changed: Tensor = branch.changed(states.to(branch.change.weight.dtype))
        return changed.to(states.dtype)

    def answer(self, said: Tensor) -> Tensor:
        return said

    def same(self, now: Tensor, last: Tensor) -> Tensor:
        return 1.0 - F.cosine_similarity(now, last, dim=-1) <= self.config.tolerance * self.config.strength

    def loss(self, branches: list[Tensor], outputs: Tensor, batch: Batch) -> Tensor:
        """The sum over branches of 1 - cosine."""
        wanted = outputs.detach().float()
        return torch.stack([(1.0 - F.cosine_similarity(said, wanted, dim=-1)).mean() for said in branches]).sum()
