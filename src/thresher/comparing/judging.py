"""Rows that a comparison chooses settings on and rows that it judges them by: never the same, and how sure a judgement is."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from thresher.calibration import Quality, agreement
from thresher.errors import DataError, OptionError
from thresher.tasks.given import as_rows
from thresher.training.identity import digest

if TYPE_CHECKING:
    import datasets

RowsQuality = Callable[[np.ndarray, "datasets.Dataset"], float]

DRAWS = 100  # of a bootstrap: a standard error to about a fourteenth of itself


@dataclass(frozen=True)
class Part:
    """Encoded rows, and what answers to them are worth.

    quality: from predictions [n, ...] in row order to a number, higher is better; None: how often (how closely) they are those
        of the start.
    each: from predictions to [units], one value for each row, question or dialogue, where the quality is their mean.
    drawn: from predictions and the row numbers of every unit drawn, some more than once, to the quality on those: what a
        bootstrap needs where the quality is no mean.
    name: what reports call these rows.
    truth: what the quality judges by and the rows do not hold, as plain values; a run does not go on with another.
    owners: of every row the unit that it is a part of (a long text, of which rows are windows); None: of its column `group`,
        else every row is one.
    """

    rows: datasets.Dataset
    quality: Quality | None = None
    each: Callable[[np.ndarray], np.ndarray] | None = None
    drawn: Callable[[np.ndarray, Sequence[np.ndarray]], float] | None = None
    name: str = "rows"
    truth: Any = None
    owners: Sequence[int] | None = None

    @classmethod
    def of(cls, rows: datasets.Dataset, quality: RowsQuality | None, name: str) -> Part:
        """quality: from predictions and the rows they are of to a number."""
        rows = as_rows(rows)
        if quality is None:
            return cls(rows, name=name)

        def drawn(predictions: np.ndarray, units: Sequence[np.ndarray]) -> float:
            index = np.concatenate(units)
            picked = rows.select(index)
            if "group" in rows.column_names:  # one that was drawn twice is two
                numbers = np.repeat(np.arange(len(units)), [len(unit) for unit in units])
                picked = picked.remove_columns("group").add_column("group", numbers)
            return float(quality(predictions[index], picked))

        return cls(rows, lambda predictions: float(quality(predictions, rows)), drawn=drawn, name=name)

    def against(self, reference: np.ndarray, model: Any) -> Part:
        """The same, without a quality of its own judged by likeness to the start, whose predictions are `reference`."""
        if self.quality is not None:
            return self
        return replace(
            self,
            quality=agreement(reference, model),
            drawn=lambda predictions, units: _agreement(predictions, reference, np.concatenate(units), model),
        )

    def worth(self, predictions: np.ndarray) -> float:
        assert self.quality is not None
        return float(self.quality(predictions))

    def error(self, before: np.ndarray, now: np.ndarray, seed: int = 0) -> float | None:
        """The standard error of what `now` loses against `before`, both predictions on these rows.

        Over rows (questions, dialogues) where the quality is a mean over them, else by a bootstrap over rows; candidates of a
        dialogue (column `group`) are drawn together. None where it is not known.
        """
        if self.each is not None:
            lost = self.each(before) - self.each(now)
            return float(lost.std(ddof=1) / len(lost) ** 0.5) if len(lost) > 1 else None
        if self.drawn is None or len(self._units) < 2:
            return None
        generator = np.random.default_rng(seed)
        losses = []
        for _ in range(DRAWS):
            units = [self._units[unit] for unit in generator.integers(len(self._units), size=len(self._units))]
            losses.append(self.drawn(before, units) - self.drawn(now, units))
        return float(np.std(losses, ddof=1))

    @cached_property
    def _units(self) -> list[np.ndarray]:
        """The row numbers of each row, or of each group of rows."""
        if self.owners is None and "group" not in self.rows.column_names:
            return [np.array([number]) for number in range(len(self.rows))]
        groups = np.array(self.rows["group"] if self.owners is None else self.owners)
        return [np.flatnonzero(groups == group) for group in np.unique(groups)]

    @cached_property
    def digest(self) -> str:
        return digest(self.rows, self.truth)

    def sample(self, most: int) -> datasets.Dataset:
        """At most so many of the rows, spread over all of them."""
        if len(self.rows) <= most:
            return self.rows
        return self.rows.select(np.linspace(0, len(self.rows) - 1, most).astype(int))


def _agreement(predictions: np.ndarray, reference: np.ndarray, index: np.ndarray, model: Any) -> float:
    return agreement(reference[index], model)(predictions[index])


def halves(units: Sequence[Hashable], seed: int) -> tuple[list[int], list[int]]:
    """Row numbers in two parts, drawn with `seed`; rows of one unit (a dialogue, a passage) stay together.

    Raises DataError when there are fewer than two units.
    """
    distinct = list(dict.fromkeys(units))
    if len(distinct) < 2:
        what = "There are no validation rows" if not distinct else "One validation row cannot be divided"
        raise DataError(
            f"{what}: settings are chosen on some rows and judged on others; give at least two, or test rows."
        )
    order = np.random.default_rng(seed).permutation(len(distinct))
    first = {distinct[number] for number in order[: len(order) // 2]}
    numbers = range(len(units))
    return [n for n in numbers if units[n] in first], [n for n in numbers if units[n] not in first]


def parts(
    validation: datasets.Dataset | Part, test: datasets.Dataset | Part | None, quality: RowsQuality | None, seed: int
) -> tuple[Part, Part]:
    """The rows to choose on and those to judge by. Without `test`, two halves of `validation`.

    Raises DataError for no rows; OptionError for a part that is to be divided, or parts beside a `quality`.
    """
    if isinstance(validation, Part) or isinstance(test, Part):
        if not (isinstance(validation, Part) and isinstance(test, Part)) or quality is not None:
            raise OptionError("Give validation= and test= both as parts, which bring their quality, or neither.")
        chosen, judged = validation, test
    elif test is not None:
        chosen, judged = Part.of(validation, quality, "the validation rows"), Part.of(test, quality, "the test rows")
    else:
        validation = as_rows(validation)
        units = validation["group"][:] if "group" in validation.column_names else range(len(validation))
        first, second = halves(list(units), seed)
        chosen = Part.of(validation.select(first), quality, "one half of the validation rows")
        judged = Part.of(validation.select(second), quality, "the other half of the validation rows")
    for part, what in ((chosen, "choose settings on"), (judged, "judge them by")):
        if not len(part.rows):
            raise DataError(f"There are no rows to {what}; give at least one.")
    return chosen, judged


__all__ = ["Part", "halves", "parts"]
