"""Attend, Select and Eliminate (Liang et al., 2023): response selection that reads on with what both sides look at.

A token's importance is dual attention (equations 1-4): what its own side, context or response, gives it, and what the other
side does. How many tokens each layer keeps is searched (search.py); then one model learns from its undropped self under every
configuration found (once-for-all self-distillation, Algorithm 1), and a speedup is picked when it runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal, get_args

from torch import Tensor

from thresher.errors import OptionError, nearest
from thresher.evidence import Wanted
from thresher.methods.retention import Retention, RetentionPolicy
from thresher.packed import PackedTokens
from thresher.parts.rules import keep_share_of_segments
from thresher.parts.scores import Score, dual_attention
from thresher.policy import Point, Stage

Budget = Literal["shared", "apart"]
Place = Literal["before feed-forward", "after feed-forward"]


@dataclass(frozen=True, kw_only=True)
class ASE(Retention):
    """Keep the tokens of a dialogue and its response that the two sides attend to (dual attention).

    alpha_context, alpha_response: the weight of what a token's own side gives it, for tokens of the context and of the
        response; the other side's weighs one minus that. The paper's best for the context is .2; it names none for the
        response.
    budget: "shared": context and response compete for the places of their row; "apart": each keeps the same share of itself.
    place: whether tokens drop before the feed-forward of a layer or after it (on pre-norm families always after).
    The paper does not say how it treats special tokens: protect them by `protect_ids`.
    """

    method: ClassVar[str] = "ase"
    searches: ClassVar[Literal["", "before", "after"]] = "before"
    serves: ClassVar[Literal["any", "pairs", "answers"]] = "pairs"
    alpha_context: float = 0.2
    alpha_response: float = 0.5
    budget: Budget = "shared"
    place: Place = "before feed-forward"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("alpha_context", "alpha_response"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise OptionError(f"{name} must lie between 0 and 1, not {getattr(self, name)!r}.")
        for name, known in (("budget", get_args(Budget)), ("place", get_args(Place))):
            if getattr(self, name) not in known:
                raise OptionError(f"There is no {name} {getattr(self, name)!r}{nearest(getattr(self, name), known)}")

    @property
    def point(self) -> Point:  # type: ignore[override]
        return Point.AFTER_ATTENTION if self.place == "before feed-forward" else Point.AFTER_LAYER

    def scoring(self) -> tuple[Score, Wanted]:
        score = partial(dual_attention, alpha_context=self.alpha_context, alpha_response=self.alpha_response)
        return score, Wanted(by_segment=True, diagonal=True, detached=True)


class ASEPolicy(RetentionPolicy[ASE]):
    """Dual attention under one retention configuration of several."""

    def selected(self, score: Tensor, tokens: PackedTokens, layer: int) -> Tensor:
        if self.config.budget == "shared":
            return super().selected(score, tokens, layer)
        share = self.curve()[layer - 1] / self.kept_before(layer)
        return keep_share_of_segments(score, tokens, share, self.config.min_tokens)

    def stages(self) -> tuple[Stage, ...]:
        """Self-distillation with the labels beside it (the paper weighs the two and does not say how: equally)."""
        return (Stage(name="once-for-all", mode="hard", learning_rate=3e-5, distil_weight=1.0, dropout=False),)
