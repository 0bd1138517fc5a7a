"""Retention configurations within a fit: searched before the stages that train under them or after, one picked at the end."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thresher.calibration import Quality
from thresher.errors import TargetError
from thresher.frontier import NOTE, Frontier, Point, configured
from thresher.measure.run import prepared, run
from thresher.model import attachment_of, policy_of, set_config
from thresher.policy import retaining
from thresher.searching import search

if TYPE_CHECKING:
    import datasets

FILE = "frontier.json"
TRAINED = (
    "trained under"  # its name among the notes: every configuration of the stages, by rising speedup when searched
)


def searched(
    model: Any, rows: datasets.Dataset, quality: Quality, directory: Path, options: Mapping[str, Any], seed: int
) -> None:
    """Search on `rows` and keep what was found in `directory`; nothing to do when it is there already."""
    if (directory / FILE).is_file():
        return
    found = search(model, rows, quality=quality, directory=directory / "search", **{"seed": seed, **options})
    directory.mkdir(parents=True, exist_ok=True)
    new = directory / f".{FILE}"
    new.write_text(json.dumps({NOTE: found.to_list(), "search": attachment_of(model).notes["search"]}) + "\n")
    os.replace(new, directory / FILE)


def read(model: Any, directory: Path) -> Frontier:
    """What `searched` kept, noted with the model."""
    notes = json.loads((directory / FILE).read_text())
    attachment_of(model).notes.update(notes)
    return Frontier.from_list(notes[NOTE])


def measured(model: Any, rows: datasets.Dataset, quality: Quality, frontier: Frontier) -> Frontier:
    """The same configurations with what they are worth now that the model has trained under them; noted with the model, and
    as TRAINED also those that another one beats: on few rows chance has a part in that."""
    ready = list(prepared(model, rows))
    points = []
    for point in frontier.points:
        with retaining(point.retention):
            result = run(model, ready)
        points.append(Point(point.retention, result.speedup, float(quality(result.predictions))))
    found = Frontier(tuple(points))
    attachment_of(model).notes.update({NOTE: found.to_list(), TRAINED: [point.to_dict() for point in points]})
    return found


def settle(model: Any, frontier: Frontier, speedup: float | None, floor: float | None) -> None:
    """Set the policy to the point of the best quality with this speedup, or the fastest at least as good as `floor`; without
    a target to the best. Raises TargetError, naming the nearest, when there is none."""
    if speedup is not None:
        point = frontier.at(speedup)
    elif floor is not None:
        good = [p for p in frontier.points if p.quality >= floor - 1e-12 and p.speedup > 1.0]
        if not good:
            best = frontier.points[0]
            raise TargetError(
                f"No point of the frontier that drops anything stays at {floor:.4f} or above on these rows; the best has "
                f"{best.quality:.4f} at {best.speedup:.2f}x. Train longer, or allow a larger loss."
            )
        point = good[-1]
    else:
        point = frontier.points[0]
    set_config(model, configured(policy_of(model).config, point.retention))
