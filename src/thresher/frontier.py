"""What a search over retention configurations found: the settings that no other one beats, to pick a speedup from."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Self

from thresher.errors import CheckpointError, OptionError, TargetError
from thresher.methods import METHODS
from thresher.methods.retention import Retention
from thresher.policy import PolicyConfig
from thresher.report.frontier import pareto

NOTE = "frontier"  # its name among the notes of an attachment
MOST = 19  # the points worth keeping: ASE trains under fewer than 20


@dataclass(frozen=True)
class Point:
    """A retention configuration (the fraction of its own tokens that a row keeps after each layer, never rising) and what it
    is worth: its FLOPs speedup, and its quality, higher being better."""

    retention: tuple[float, ...]
    speedup: float
    quality: float

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"retention": list(self.retention), "speedup": self.speedup, "quality": self.quality}

    @classmethod
    def from_dict(cls, values: Any) -> Self:
        """What `to_dict` gave. Raises KeyError, TypeError or ValueError for anything else."""
        retention = tuple(float(fraction) for fraction in values["retention"])
        if not retention:
            raise ValueError("a point has no retention")
        return cls(retention, float(values["speedup"]), float(values["quality"]))


@dataclass(frozen=True)
class Frontier:
    """The Pareto set of `points`, by rising speedup and so by falling quality.

    Points that another one beats are left out as the frontier is made, of equals all but the first, and so is what has a
    speedup or a quality that is no finite number.
    """

    points: tuple[Point, ...]

    def __post_init__(self) -> None:
        first: dict[tuple[float, float], Point] = {}
        for point in self.points:
            if math.isfinite(point.speedup) and math.isfinite(point.quality):
                first.setdefault((point.speedup, point.quality), point)
        object.__setattr__(self, "points", tuple(first[values] for values in pareto(first)))

    @property
    def configurations(self) -> tuple[tuple[float, ...], ...]:
        """What a once-for-all stage trains under (`Stage.configurations`)."""
        return tuple(point.retention for point in self.points)

    def at(self, speedup: float) -> Point:
        """The point of the best quality among those with at least this speedup.

        Raises TargetError, naming the fastest that there is, when none has.
        """
        if not self.points:
            raise TargetError(
                f"The frontier has no points, and so none with a speedup of {speedup:.2f}x; search again."
            )
        for point in self.points:
            if point.speedup >= speedup:
                return point
        most = math.floor(100 * self.points[-1].speedup) / 100  # never more than there is, so that asking for it works
        raise TargetError(f"No point of the frontier has a speedup of {speedup:.2f}x; the nearest has {most:.2f}x.")

    def hypervolume(self, reference: tuple[float, float]) -> float:
        """The area of what the frontier matches or beats, counted from a (speedup, quality) that is worse than all."""
        area, left = 0.0, reference[0]
        for point in self.points:
            if point.speedup > left:
                area += (point.speedup - left) * max(point.quality - reference[1], 0.0)
                left = point.speedup
        return area

    def thinned(self, limit: int = MOST) -> Frontier:
        """At most `limit` points: again and again the inner one goes whose loss costs least hypervolume; both ends stay."""
        if limit < 2:
            raise OptionError(f"A frontier keeps at least its two ends, so its limit must be at least 2, not {limit}.")
        points = list(self.points)
        while len(points) > limit:
            del points[min(range(1, len(points) - 1), key=lambda i: _lost_without(points, i))]
        return Frontier(tuple(points))

    def to_list(self) -> list[dict[str, Any]]:
        """The points as plain JSON values."""
        return [point.to_dict() for point in self.points]

    @classmethod
    def from_list(cls, points: Any) -> Frontier:
        """What `to_list` gave. Raises CheckpointError for anything else."""
        try:
            return cls(tuple(map(Point.from_dict, points)))
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"The frontier noted in thresher.json is not readable ({type(error).__name__}: {error}); search again."
            ) from error


def _lost_without(points: Sequence[Point], i: int) -> float:
    """The hypervolume that only the inner point `i` adds."""
    return (points[i].speedup - points[i - 1].speedup) * (points[i].quality - points[i + 1].quality)


def frontier_of(notes: dict[str, Any]) -> Frontier:
    """The frontier among a model's notes. Raises TargetError when there is none."""
    if NOTE not in notes:
        raise TargetError("This model has no frontier to pick a speedup from; make one with thresher search.")
    return Frontier.from_list(notes[NOTE])


def configured(config: PolicyConfig, retention: Iterable[float]) -> PolicyConfig:
    """The same method under a retention configuration, as written (strength 1).

    Raises OptionError, naming the methods that have them, for one without retention configurations.
    """
    if not _has_configurations(type(config)):
        known = ", ".join(sorted(kind.method for kind in METHODS if _has_configurations(kind)))
        raise OptionError(f"The method {config.method!r} has no retention configurations; those with them are {known}.")
    changes: dict[str, Any] = {"retention": tuple(retention), "strength": 1.0}
    if hasattr(config, "counts"):  # the other way to write one
        changes["counts"] = None
    return config.replace(**changes)


def _has_configurations(kind: type[PolicyConfig]) -> bool:
    """Whether what it keeps is what its field says: SpAtten's cascade draws a line of its own."""
    return issubclass(kind, Retention) and kind.fractions is Retention.fractions


__all__ = ["MOST", "NOTE", "Frontier", "Point", "configured", "frontier_of"]
