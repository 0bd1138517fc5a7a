"""Exits for tagging (Li et al., ACL 2021): SENTEE, by which rows leave, and TokEE, by which tokens stop changing."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, TypeVar, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thresher.errors import OptionError
from thresher.exits.base import ALONE, TOGETHER, Kind, Memory, from_answers, rising
from thresher.exits.branches import NO_ANSWER
from thresher.exits.certain import CertainExit, ThresholdExit, entropy, labels_of
from thresher.packed import Layout, PackedTokens
from thresher.policy import Batch, Stage

Teacher = Literal["answers", "labels"]


@dataclass(frozen=True, kw_only=True)
class TaggingConfig(CertainExit):
    """A token's uncertainty is the entropy of its tags, divided by its maximum log C.

    learns: from the model's own "answers", the branches alone, so that a model from which nobody leaves stays as it was; or
    from "labels", branches and model together, layer l with weight l, as the paper does.
    """

    serves: ClassVar[tuple[Kind, ...]] = ("tags",)
    answers_dropped: ClassVar[bool] = True

    learns: Teacher = "answers"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.learns not in (known := get_args(Teacher)):
            raise OptionError(f"An exit for tags learns from {' or '.join(known)}, not from {self.learns!r}.")

    @property
    def labelled(self) -> bool:
        return self.learns == "labels"


@dataclass(frozen=True, kw_only=True)
class SENTEE(TaggingConfig):
    """SENTEE (Li et al., ACL 2021): a row leaves when the largest uncertainty among its tokens is at most `threshold`.

    A branch is a linear layer on every token; tokens that a policy dropped are read, and answered, in their last state.
    """

    method: ClassVar[str] = "sentee"


@dataclass(frozen=True, kw_only=True)
class TokEE(TaggingConfig):
    """TokEE (Li et al., ACL 2021): a token freezes when the largest uncertainty in a window of `window` tokens around it is at
    most `threshold`.

    A frozen token asks nothing and changes no more, and is still attended to; its answer is that of the layer where it
    froze. A row whose tokens are all frozen leaves. Neighbours that are frozen already hold nobody back. Works without a
    policy, in families whose layers can be opened. Learns as SENTEE; from labels afterwards also with tokens that freeze
    (self-sampling), by a threshold drawn for each step between 0 and twice the given one, so that one training serves several.
    """

    method: ClassVar[str] = "tokee"
    unscaled: ClassVar[tuple[str, ...]] = (*TaggingConfig.unscaled, "window")
    exports: ClassVar[bool] = False  # layers for some of the tokens are the engine's own
    threshold: float = 0.15
    window: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window < 1 or self.window % 2 != 1:
            raise OptionError(f"window must be an odd number of tokens, the middle one included, not {self.window!r}.")


class TagBranch(nn.Module):
    """A linear layer on every token, dropped ones in their last state: [B, N, C] by column of the padded input, NO_ANSWER where
    no token is."""

    def __init__(self, size: int, outputs: int) -> None:
        super().__init__()
        self.tag = nn.Linear(size, outputs)

    def forward(self, tokens: PackedTokens) -> Tensor:
        layout, whole = tokens.layout, tokens.gather()
        logits = self.tag(whole.hidden).float()
        empty = logits.new_full((layout.height * layout.width, logits.shape[1]), NO_ANSWER)
        every = empty.index_copy(0, whole.layout.flat, logits).view(layout.height, layout.width, -1)
        return every if layout.numbers is None else every[layout.numbers]  # type: ignore[no-any-return]

    @staticmethod
    def flops(n: int, size: int, outputs: int) -> int:
        return 2 * n * size * outputs


TaggingT = TypeVar("TaggingT", bound=TaggingConfig)


# A linear layer needs larger steps than what is deeper.
OWN = replace(ALONE, exit_learning_rate=3e-3)


class TaggingExit(ThresholdExit[TaggingT]):
    """A linear layer on every token."""

    def branch(self) -> nn.Module:
        return TagBranch(self.geometry.hidden, self.head.outputs)

    def overhead_flops(self, n: int) -> int:
        return TagBranch.flops(n, self.geometry.hidden, self.head.outputs)

    def uncertainty(self, said: Tensor) -> Tensor:
        """[..., C] → [...]."""
        return entropy(said) / math.log(self.head.outputs)

    def loss(self, branches: list[Tensor], outputs: Tensor, batch: Batch) -> Tensor:
        """From labels the mean over layers, layer l with weight l; from answers the sum over branches of KL(model || branch),
        of which each is a mean over tokens."""
        if self.config.labelled:
            return rising(self.head, [*branches, outputs.float()], labels_of(batch))
        real = (branches[0] != NO_ANSWER).any(-1)
        return torch.stack([from_answers(said[real], outputs[real]) for said in branches]).sum()

    def stages(self) -> tuple[Stage, ...]:
        return (TOGETHER if self.config.labelled else OWN,)


class SENTEEExit(TaggingExit[SENTEE]):
    """The least certain token decides for its row."""

    def uncertainty(self, said: Tensor) -> Tensor:
        """[B, N, C] → [B]."""
        empty = (said == NO_ANSWER).all(-1)
        return super().uncertainty(said).masked_fill(empty, 0.0).amax(1)


class TokEEExit(TaggingExit[TokEE]):
    """Tokens freeze one by one. The pass asks `speak` and `freeze` of the tokens that are not frozen."""

    def speak(self, layer: int, hidden: Tensor) -> Tensor:
        """What the branch after `layer` says of some tokens: [A, D] → logits [A, C] float32."""
        branch: Any = self.branches[layer - 1]
        said: Tensor = branch.tag(hidden.to(branch.tag.weight.dtype))
        return said.float()

    def freeze(
        self, said: Tensor, layout: Layout, active: Tensor, before: Memory | None
    ) -> tuple[Tensor, Memory | None]:
        """Which of the tokens at `active` ([A] int64) freeze now, [A] bool; and what the next layer has to know.

        said: [A, C], as `speak` gave it. before: what this gave at the layer before: while training, the threshold drawn.
        """
        worst = self.in_window(self.uncertainty(said), layout, active)
        if self.mode != "sample":
            return worst <= self.bar() * self.config.strength, None
        if before is None:
            before = (2 * self.bar() * torch.rand((), device=said.device),)
        return worst <= before[0], before

    def in_window(self, uncertainty: Tensor, layout: Layout, active: Tensor) -> Tensor:
        """[A] → [A], the largest of each token's window in original positions, of the tokens at `active`."""
        place = (layout.rows * layout.width + layout.positions)[active]
        rows = uncertainty.new_zeros(len(layout.lengths) * layout.width).index_copy(0, place, uncertainty)
        window = self.config.window
        pooled = F.max_pool1d(rows.view(-1, 1, layout.width), window, stride=1, padding=window // 2)
        return pooled.flatten()[place]

    def stages(self) -> tuple[Stage, ...]:
        if not self.config.labelled:
            return super().stages()
        return (*super().stages(), replace(TOGETHER, name="self-sampling", epochs=2, exit_samples=True))
