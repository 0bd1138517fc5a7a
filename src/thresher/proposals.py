"""Which retention configuration to evaluate next: the space of them, and three ways through it.

Every way begins with the configurations it is given and yields only such as are not in `found`, into which whoever asks
puts the values of each before asking for the next. The same values bring the same proposals for the same seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Literal

import numpy as np

from thresher.errors import OptionError
from thresher.report.frontier import pareto

Sampler = Literal["nsga2", "evolutionary", "random"]
Configuration = tuple[float, ...]
Values = tuple[float, float]  # quality, speedup
Found = dict[Configuration, Values]

POPULATION = 20  # of NSGA-II
CONSTANT = 20  # configurations of one ratio for all layers, beside the two ends
OFFSPRING = 30  # mutations in an iteration of the evolutionary procedure, and crossovers
MUTATED = 0.5  # the share of a configuration's layers that a mutation changes
PATIENCE = 200  # proposals in a row that were known before nothing new is expected


@dataclass(frozen=True)
class Space:
    """The configurations there are: non-rising numbers from `lowest` to `steps`, one a layer, in units of 1 / steps."""

    layers: int
    lowest: int
    steps: int

    @classmethod
    def of(cls, layers: int, lowest: float, grid: float) -> Space:
        """Raises OptionError for values out of range."""
        if layers < 1:
            raise OptionError(f"A model to search has at least 1 layer, not {layers}.")
        if not 0.0 < grid <= 0.5:
            raise OptionError(f"grid must be above 0 and at most .5, not {grid}.")
        if not 0.0 < lowest < 1.0:
            raise OptionError(f"lowest must be above 0 and below 1, not {lowest}.")
        steps = round(1 / grid)
        return cls(layers, max(math.ceil(round(lowest * steps, 6)), 1), steps)

    @property
    def smallest(self) -> float:
        return self.lowest / self.steps

    def clip(self, units: Sequence[int]) -> Configuration:
        """Units as fractions, none below the lowest."""
        return tuple(max(unit, self.lowest) / self.steps for unit in units)

    def units(self, configuration: Configuration) -> list[int]:
        return [round(fraction * self.steps) for fraction in configuration]

    def onto(self, fractions: Sequence[float]) -> Configuration:
        """Fractions on the grid. Raises OptionError when they are no retention configuration."""
        if len(fractions) != self.layers:
            raise OptionError(
                f"A configuration to start from has {len(fractions)} fractions but there are {self.layers} layers; give one "
                "for each."
            )
        if not all(0.0 < f <= 1.0 for f in fractions) or any(b > a for a, b in pairwise(fractions)):
            raise OptionError(
                "A configuration to start from must be fractions above 0 and at most 1 that never rise, not "
                f"{tuple(fractions)}."
            )
        return self.clip([round(fraction * self.steps) for fraction in fractions])

    def product(self, ratios: Sequence[float]) -> Configuration:
        """What is kept after each layer when each keeps its share of what reaches it."""
        return self.onto(np.cumprod(ratios).clip(min=self.smallest).tolist())

    def ratios(self, configuration: Configuration) -> list[float]:
        """The shares of which `product` makes the configuration."""
        return [after / before for before, after in pairwise((1.0, *configuration))]

    def constant(self) -> list[Configuration]:
        """One ratio for all layers: the smallest that the space has, 1, and others between, evenly by the tokens kept."""
        ratios = np.linspace(self.smallest, 1.0, 1000)
        kept = np.mean([(ratios**layer).clip(min=self.smallest) for layer in range(1, self.layers + 1)], axis=0)
        smallest, *between, whole = np.interp(np.linspace(kept[0], 1.0, CONSTANT + 2), kept, ratios).tolist()
        return [self.product([ratio] * self.layers) for ratio in (smallest, whole, *between)]


# --- three ways through it -------------------------------------------------------------------------------------------


def _random(space: Space, seed: int, first: Sequence[Configuration], found: Found) -> Iterator[Configuration]:
    """Independent draws: as many uniform fractions as there are layers, sorted."""
    yield from first
    draw = np.random.default_rng(seed)

    def one() -> Configuration:
        return space.clip(sorted(draw.integers(space.lowest, space.steps + 1, space.layers).tolist(), reverse=True))

    while (new := _unknown(one, found)) is not None:
        yield new


def _evolutionary(space: Space, seed: int, first: Sequence[Configuration], found: Found) -> Iterator[Configuration]:
    """Rounds of mutations and crossovers of the parents: of the Pareto set, what lies on its upper convex hull."""
    yield from first
    draw = np.random.default_rng(seed)
    known = 0
    while known < len(found):
        known = len(found)
        parents = [space.units(configuration) for configuration in _upper_hull(found)]
        for make in (_mutated, _crossed):
            for _ in range(OFFSPRING):
                if (new := _unknown(partial(make, parents, space, draw), found)) is not None:
                    yield new


def _mutated(parents: Sequence[list[int]], space: Space, draw: np.random.Generator) -> Configuration:
    """A parent, each layer with probability `MUTATED` anew: anywhere between the layers beside it."""
    new = list(parents[int(draw.integers(len(parents)))])
    for layer in range(space.layers):
        if draw.random() < MUTATED:
            high = new[layer - 1] if layer > 0 else space.steps
            low = new[layer + 1] if layer + 1 < space.layers else space.lowest
            new[layer] = int(draw.integers(low, high + 1))
    return space.clip(new)


def _crossed(parents: Sequence[list[int]], space: Space, draw: np.random.Generator) -> Configuration:
    """The mean of two parents in each layer, rounded up."""
    one, other = (parents[i] for i in draw.integers(len(parents), size=2).tolist())
    return space.clip([math.ceil((a + b) / 2) for a, b in zip(one, other, strict=True)])


def _upper_hull(found: Found) -> list[Configuration]:
    """The configurations on the upper convex hull of work and quality; work, not speedup, is what is drawn against quality."""
    first: dict[Values, Configuration] = {}
    for configuration, (quality, speedup) in found.items():
        if math.isfinite(quality):
            first.setdefault((-1.0 / speedup, quality), configuration)
    hull: list[Values] = []
    for point in pareto(first):
        while len(hull) > 1 and not _turns_right(hull[-2], hull[-1], point):
            hull.pop()
        hull.append(point)
    return [first[point] for point in hull] or list(found)


def _turns_right(a: Values, b: Values, c: Values) -> bool:
    """Whether b lies above the line from a to c."""
    return (b[1] - a[1]) * (c[0] - a[0]) > (c[1] - a[1]) * (b[0] - a[0])


def _unknown(make: Callable[[], Configuration], found: Found) -> Configuration | None:
    """The first of several that was not evaluated before."""
    return next((new for _ in range(PATIENCE) if (new := make()) not in found), None)


def _nsga2(space: Space, seed: int, first: Sequence[Configuration], found: Found) -> Iterator[Configuration]:
    """Optuna's NSGA-II over the ratios of the layers. What was evaluated before fails, and so enters no population."""
    try:
        import optuna
    except ImportError as error:
        raise OptionError(
            'The sampler "nsga2" needs optuna: pip install "thresher[search]", or take the sampler "evolutionary".'
        ) from error
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        directions=["maximize", "maximize"],
        sampler=optuna.samplers.NSGAIISampler(population_size=POPULATION, seed=seed),
    )
    optuna.logging.set_verbosity(verbosity)
    names = [f"layer {layer}" for layer in range(1, space.layers + 1)]
    for configuration in first:
        study.enqueue_trial(dict(zip(names, space.ratios(configuration), strict=True)))
    misses = 0
    while misses < PATIENCE:
        trial = study.ask()
        new = space.product([trial.suggest_float(name, space.smallest, 1.0) for name in names])
        if new in found:
            misses += 1
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
            continue
        misses = 0
        yield new
        study.tell(trial, found[new])


PROPOSALS: dict[Sampler, Callable[[Space, int, Sequence[Configuration], Found], Iterator[Configuration]]] = {
    "nsga2": _nsga2,
    "evolutionary": _evolutionary,
    "random": _random,
}

__all__ = ["PROPOSALS", "Configuration", "Found", "Sampler", "Space", "Values"]
