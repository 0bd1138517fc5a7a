"""Search for retention configurations: how many tokens each layer should keep, for every speedup at once.

Two optimisers and a baseline look for the Pareto set of speedup and quality. "nsga2" is NSGA-II (Deb et al., 2002) as Optuna
runs it; "evolutionary" the procedure of Length-Adaptive Transformer (Kim and Cho, 2021), which ASE takes over; "random" what
both have to beat. All of them begin with the constant-ratio configurations of that procedure.

Every evaluation is remembered, in memory and in a file. A search that is called again proposes the same configurations as
before, as its optimiser is seeded, and takes what the file has of them: so it goes on where it was interrupted, exactly.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import torch

from thresher.errors import DataError, OptionError, nearest
from thresher.frontier import MOST, NOTE, Frontier, Point, configured
from thresher.measure.run import MODEL_INPUTS, prepared, run
from thresher.model import attachment_of, find_encoder, policy_of
from thresher.policy import retaining
from thresher.proposals import PROPOSALS, Configuration, Found, Sampler, Space, Values
from thresher.tasks.given import as_rows

if TYPE_CHECKING:
    import datasets

FILE = "search.jsonl"


def search(
    model: Any,
    rows: datasets.Dataset,
    *,
    quality: Callable[[np.ndarray], float],
    label: str = "quality",
    evaluations: int = 100,
    sampler: Sampler = "nsga2",
    seed: int = 0,
    lowest: float = 0.05,
    start: Sequence[Sequence[float]] = (),
    limit: int = MOST,
    batch_size: int | None = None,
    directory: str | Path | None = None,
    on_evaluation: Callable[[Point], object] | None = None,
) -> Frontier:
    """Search the retention configurations of an attached model on `rows` (encoded validation rows), without training.

    The frontier, thinned to `limit` points, is noted with the model, so that `save` keeps it and `set_speedup` and
    `load(speedup=)` pick from it. The policy stays as it is set. The qualities are those on `rows`, to which the search fits
    itself: measure the points that are used on other rows.
    quality: from predictions [n, ...] in row order to a number, higher is better; label: its name. batch_size: see
        `measure.run.batches`. The other arguments are those of `search_frontier`.
    Raises OptionError for a method without retention configurations, DataError when no quality is a number.
    """
    policy = policy_of(model)
    layers = policy.geometry.layers
    configured(policy.config, (1.0,) * layers)
    rows = as_rows(rows)
    if len(rows) == 0:
        raise OptionError("A search needs at least one row.")
    ready = list(prepared(model, rows, batch_size))
    tried: list[Point] = []

    def evaluate(retention: Configuration) -> Values:
        with retaining(retention):
            result = run(model, ready)
        return float(quality(result.predictions)), result.speedup

    def note(point: Point) -> None:
        tried.append(point)
        if on_evaluation:
            on_evaluation(point)

    found = search_frontier(
        evaluate,
        layers,
        evaluations=evaluations,
        sampler=sampler,
        seed=seed,
        lowest=lowest,
        start=start,
        directory=directory,
        on_evaluation=note,
        about=_about(model, rows, label) if directory is not None else {},
    ).thinned(limit)
    if not found.points:
        raise DataError(
            f"On these rows {label} is not a number for any configuration, so there is nothing to search by."
        )
    notes = attachment_of(model).notes
    notes[NOTE] = found.to_list()
    notes["search"] = {
        "quality": label,
        "rows": len(rows),
        "evaluations": len(tried),
        "sampler": sampler,
        "seed": seed,
    }
    return found


def search_frontier(
    evaluate: Callable[[Configuration], Values],
    layers: int,
    *,
    evaluations: int = 100,
    sampler: Sampler = "nsga2",
    seed: int = 0,
    lowest: float = 0.05,
    grid: float = 0.01,
    start: Sequence[Sequence[float]] = (),
    directory: str | Path | None = None,
    on_evaluation: Callable[[Point], object] | None = None,
    about: Mapping[str, Any] | None = None,
) -> Frontier:
    """The Pareto set of the retention configurations that `evaluate` was asked about. The same for the same seed.

    evaluate: from a configuration, one fraction for each of the `layers`, to its (quality, speedup), higher being better in
        both; a quality that is not a number counts as the worst.
    evaluations: how many configurations to evaluate at most, none of them twice.
    lowest: the smallest fraction. grid: the step that fractions are rounded to, 1 / a whole number.
    start: configurations to evaluate before anything else, rounded likewise.
    directory: where evaluations are kept as they are made. A search called again with the same directory and settings (more
        `evaluations` are no other setting) goes on and repeats none.
    on_evaluation: called with every new point, those remembered from the directory included.
    about: what else the values depend on (plain JSON values), so that a directory serves no other purpose.
    Raises OptionError for settings out of range, and for a directory that holds a search with other settings; DataError when
    what it holds is damaged.
    """
    if evaluations < 1:
        raise OptionError(f"evaluations must be at least 1, not {evaluations}.")
    if sampler not in get_args(Sampler):
        raise OptionError(f"There is no sampler {sampler!r}{nearest(sampler, get_args(Sampler))}")
    space = Space.of(layers, lowest, grid)
    first = list(dict.fromkeys([*map(space.onto, start), *space.constant()]))
    settings = {
        "layers": layers,
        "sampler": sampler,
        "seed": seed,
        "lowest": lowest,
        "grid": grid,
        "start": [[float(fraction) for fraction in one] for one in start],
        **(about or {}),
    }
    memory = _Memory(Path(directory) / FILE, settings) if directory is not None else None
    found: Found = {}
    for configuration in islice(PROPOSALS[sampler](space, seed, first, found), evaluations):
        values = memory.found.get(configuration) if memory else None
        if values is None:
            quality, speedup = evaluate(configuration)
            values = (-math.inf if math.isnan(quality) else float(quality), float(speedup))
            if memory:
                memory.add(configuration, values)
        found[configuration] = values
        if on_evaluation:
            on_evaluation(Point(configuration, values[1], values[0]))
    return Frontier(tuple(Point(c, speedup, quality) for c, (quality, speedup) in found.items()))


# --- what is kept on disk -------------------------------------------------------------------------------------------------


class _Memory:
    """Evaluations in a file: a line of settings, then a line for each, written when it is made.

    A last line that was only half written is taken away. Raises OptionError for other settings, DataError for other lines.
    """

    def __init__(self, file: Path, settings: Mapping[str, Any]) -> None:
        self.file = file
        self.found: Found = {}
        self.header = json.dumps(settings)
        text = file.read_bytes() if file.is_file() else b""
        whole, newline, torn = text.rpartition(b"\n")
        if torn:
            os.truncate(file, len(whole) + len(newline))
        self.begun = bool(newline)
        if not self.begun:
            return
        header, *lines = whole.split(b"\n")
        before, now = self._read(header, 1, dict), json.loads(self.header)
        changed = [name for name in {**before, **now} if before.get(name) != now.get(name)]
        if changed:
            raise OptionError(
                f"{file} is of a search with other settings ({', '.join(changed)}); remove it, or give another directory."
            )
        for number, line in enumerate(lines, start=2):
            retention, values = self._read(line, number, _evaluation)
            self.found[retention] = values

    def _read(self, line: bytes, number: int, make: Callable[[Any], Any]) -> Any:
        try:
            return make(json.loads(line))
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{self.file}, line {number} is damaged; remove that file to search anew.") from error

    def add(self, configuration: Configuration, values: Values) -> None:
        quality, speedup = values
        record = {
            "retention": configuration,
            "quality": quality if math.isfinite(quality) else None,
            "speedup": speedup,
        }
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a", encoding="utf-8") as stream:
            stream.write(("" if self.begun else self.header + "\n") + json.dumps(record) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        self.begun = True


def _evaluation(record: Mapping[str, Any]) -> tuple[Configuration, Values]:
    quality = record["quality"]
    return tuple(record["retention"]), (-math.inf if quality is None else float(quality), float(record["speedup"]))


def _about(model: Any, rows: datasets.Dataset, label: str) -> dict[str, Any]:
    """What the values of a model's configurations depend on: its weights and settings, the rows, what is measured."""
    attachment, policy = attachment_of(model), policy_of(model)
    settings = configured(policy.config, (1.0,) * policy.geometry.layers).to_dict()
    weights, tokens = hashlib.sha256(), hashlib.sha256()
    for module in (find_encoder(model), policy):
        for name, value in module.state_dict().items():
            weights.update(name.encode())
            weights.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    for name in (*MODEL_INPUTS, "labels"):
        if name in rows.column_names:
            tokens.update(repr(rows[name][:]).encode())
    return {
        "method": policy.config.method,
        "settings": settings,
        "precision": attachment.engine.precision,
        "model": weights.hexdigest(),
        "rows": tokens.hexdigest(),
        "quality": label,
    }


__all__ = ["FILE", "search", "search_frontier"]
