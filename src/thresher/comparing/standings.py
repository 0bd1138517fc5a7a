"""Where contestants stand: their points, the one frontier of all of them, and the pick for a target."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Self

from thresher.errors import OptionError
from thresher.frontier import configured
from thresher.model import policy_of, set_config, set_exit
from thresher.report import points, ratio
from thresher.report.frontier import pareto
from thresher.settings import is_number


@dataclass(frozen=True)
class Target:
    """A FLOPs speedup of at least `value`, or a quality at most `value` below the start's."""

    kind: Literal["speedup", "max_loss"]
    value: float

    @classmethod
    def of(cls, speedup: float | None, max_loss: float | None, default: float) -> Self:
        """Of one of the two; without either, a loss of `default`. Raises OptionError for both, and out of range."""
        if speedup is not None and max_loss is not None:
            raise OptionError("Give one target, speedup or max_loss, not both.")
        if speedup is not None:
            if not (is_number(speedup) and 1.0 < speedup < math.inf):
                raise OptionError(f"speedup must be a number above 1, not {speedup!r}.")
            return cls("speedup", float(speedup))
        loss = default if max_loss is None else max_loss
        if not (is_number(loss) and 0.0 <= loss < math.inf):
            raise OptionError(f"max_loss must be a number of at least 0, not {loss!r}.")
        return cls("max_loss", float(loss))

    @property
    def key(self) -> str:
        return f"{self.kind}={self.value:g}"

    def part(self, share: float) -> Target:
        """So much of it: of a speedup, of its logarithm."""
        return Target(self.kind, self.value**share if self.kind == "speedup" else self.value * share)

    def __str__(self) -> str:
        if self.kind == "speedup":
            return f"a FLOPs speedup of at least {ratio(self.value)}"
        return f"a loss of at most {lost(self.value)}"


def lost(value: float) -> str:
    """`1.0 points`, of a metric from 0 to 1."""
    return f"{points(value).lstrip('+')} points"


@dataclass(frozen=True)
class Worth:
    """On some rows: FLOPs of the start run packed / FLOPs spent; and the quality, higher being better."""

    speedup: float
    quality: float


@dataclass(frozen=True)
class Standing:
    """One setting of one contestant.

    target: what the setting was chosen for. setting: of the policy {"strength": s} or {"retention": [...]}, of the exit
        {"exit_strength": s}.
    chosen, judged: its worth on the rows that settings are chosen on, and on those that they are judged by.
    loss: quality of the start run packed - quality, on the latter; error: its standard error, None where it is not known.
    measured: wall-clock, for points of the frontier: see `thresher.comparing.contest.wall_clock`.
    """

    contestant: str
    target: str
    setting: Mapping[str, Any]
    chosen: Worth
    judged: Worth
    loss: float
    error: float | None = None
    measured: Mapping[str, Any] | None = field(default=None, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """What `to_dict` gave. Raises KeyError or TypeError for anything else."""
        return cls(**{**values, "chosen": Worth(**values["chosen"]), "judged": Worth(**values["judged"])})


def apply(model: Any, setting: Mapping[str, Any]) -> None:
    """Set the attached policy, and the exit, to a standing's setting."""
    if "retention" in setting:
        set_config(model, configured(policy_of(model).config, setting["retention"]))
    elif "strength" in setting:
        set_config(model, policy_of(model).config.replace(strength=setting["strength"]))
    if "exit_strength" in setting:
        set_exit(model, strength=setting["exit_strength"])


def frontier(standings: Sequence[Standing]) -> tuple[Standing, ...]:
    """Those that read less and that no other one beats, by rising speedup: on the rows that settings are chosen on."""
    first: dict[tuple[float, float], Standing] = {}
    for one in standings:
        if one.chosen.speedup > 1.0:
            first.setdefault((one.chosen.speedup, one.chosen.quality), one)
    return tuple(first[values] for values in pareto(first))


def pick(standings: Sequence[Standing], target: Target, baseline: float) -> tuple[Standing | None, Standing | None]:
    """What meets the target, and where nothing does, what comes nearest; on the rows that settings are chosen on.

    For a speedup the best quality of those as fast, for a loss the fastest of those as good; of equals the faster (better).
    baseline: the quality of the start on these rows.
    """
    best = frontier(standings)
    if not best:
        return None, None
    if target.kind == "speedup":
        met = [one for one in best if one.chosen.speedup >= target.value]
        return (met[0], None) if met else (None, best[-1])
    met = [one for one in best if one.chosen.quality >= baseline - target.value - 1e-12]
    return (met[-1], None) if met else (None, best[0])


__all__ = ["Standing", "Target", "Worth", "apply", "frontier", "lost", "pick"]
