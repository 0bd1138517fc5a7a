"""Setting a trained model to a speedup: by a point of its frontier where it has one, else by its strength on held-out rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import datasets

import thresher
from thresher.errors import TargetError
from thresher.frontier import NOTE, Point, configured, frontier_of
from thresher.model import attachment_of, policy_of, set_config

NEAR = 0.15  # how far from the speedup asked for, as a share of it, a point may lie to stand for it
TOLERANCE = 0.03  # the same of what a strength is set to


def nearest(points: Sequence[Point], speedup: float) -> Point | None:
    """The point nearest to a speedup. Where none is near it, the best of those that are faster; None where none is."""
    point = min(points, key=lambda p: abs(p.speedup - speedup))
    if abs(point.speedup / speedup - 1) <= NEAR:
        return point
    return max((p for p in points if p.speedup > speedup), key=lambda p: p.quality, default=None)


def set_to(model: Any, held_out: datasets.Dataset, speedup: float, tolerance: float = TOLERANCE) -> None:
    """Raises TargetError where the model reaches no such speedup."""
    notes = attachment_of(model).notes
    if NOTE in notes:
        point = nearest(frontier_of(notes).points, speedup)
        if point is None:
            raise TargetError(f"No point of the frontier is near {speedup}x or above it.")
        set_config(model, configured(policy_of(model).config, point.retention))
    else:
        thresher.calibrate(model, held_out, speedup=speedup, tolerance=tolerance)


def settled(
    model: Any, held_out: datasets.Dataset, speedups: Iterable[float], tolerance: float = TOLERANCE
) -> Iterator[float]:
    """Those of the speedups that the model reaches, the model set to each."""
    for speedup in speedups:
        try:
            set_to(model, held_out, speedup, tolerance)
        except TargetError as error:
            print(error, flush=True)
            continue
        yield speedup
