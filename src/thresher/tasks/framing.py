"""How a tokenizer puts two texts together, and what it makes of one by itself."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from thresher.errors import OptionError


@dataclass(frozen=True)
class PairParts:
    """A pair of two short texts in its five parts: before, first, between, second, after.

    Attributes:
        ids: the token ids of each part.
        types: the token types of each part; None where the tokenizer gives no types.
    """

    ids: tuple[list[int], ...]
    types: tuple[list[int], ...] | None

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> PairParts:
        """Raises OptionError where the tokenizer makes no pairs."""
        sample = tokenizer("a", "a")
        try:
            sides = sample.sequence_ids(0)
            first, middle = sides.index(0), sides.index(1)
        except ValueError as error:
            raise OptionError(f"A {type(tokenizer).__name__} does not tell the texts of a pair apart.") from error
        cuts = (0, first, first + sides.count(0), middle, middle + sides.count(1), len(sides))
        parts = [slice(a, b) for a, b in itertools.pairwise(cuts)]
        types = tuple(sample["token_type_ids"][part] for part in parts) if "token_type_ids" in sample else None
        return cls(tuple(sample["input_ids"][part] for part in parts), types)

    @property
    def special(self) -> tuple[list[int], list[int], list[int]]:
        """The ids of the special tokens before, between and after the two."""
        before, _, between, _, after = self.ids
        return before, between, after


def by_itself(tokenizer: PreTrainedTokenizerBase, texts: list[str], **options: Any) -> Any:
    """What the tokenizer makes of each text without special tokens; one that is written out in a text is read as text."""
    return tokenizer(
        texts,
        add_special_tokens=False,
        split_special_tokens=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
        **options,
    )


__all__ = ["PairParts", "by_itself"]
