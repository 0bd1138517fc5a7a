"""The settings that every scorer has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from thresher.errors import OptionError
from thresher.settings import Settings

LIMITS = ("max_query", "max_candidate")
LEAST = 4  # tokens of either side, so that some are left beside the special ones


@dataclass(frozen=True, kw_only=True)
class ScorerConfig(Settings):
    """Settings that every scorer has.

    max_query, max_candidate: the most tokens of either side, special ones included; longer texts are cut, counted and warned
        of.
    classes: 0 for a score that ranks; 1 for one learned from numbers; more for classification. From 1 on a head gives as many
        logits.
    lexical: how many of a candidate's strongest tokens are kept beside its vectors, so that their overlap with the query's
        adds to the score with a learned weight (`thresher.pairs.lexical`); 0 for none. 32 take 128 bytes a candidate.
    """

    kind: ClassVar[str] = ""

    max_query: int = 256
    max_candidate: int = 128
    classes: int = 0
    lexical: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.classes < 0:
            raise OptionError(f"classes must be 0 or more, not {self.classes!r}.")
        if self.lexical < 0 or (self.lexical and self.classes):
            raise OptionError(
                f"lexical={self.lexical!r} cannot be: it is 0 or more, and adds to a score, so that it goes with classes=0."
            )
        for name in LIMITS:
            if getattr(self, name) < LEAST:
                raise OptionError(f"{name} must be at least {LEAST}, not {getattr(self, name)!r}.")

    @classmethod
    def called(cls) -> str:
        return f"scorer {cls.kind!r}"


__all__ = ["LEAST", "LIMITS", "ScorerConfig"]
