"""From a target ("2x", "at most one point lost") to the setting that meets it, on validation data."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch

from thresher.errors import OptionError, TargetError
from thresher.measure.run import Run, run, run_packed
from thresher.model import attachment_of, exit_of, find_encoder, policy_of, set_config, set_exit
from thresher.outputs import answers_with_spans
from thresher.settings import is_number
from thresher.tasks.given import as_rows

if TYPE_CHECKING:
    import datasets

Quality = Callable[[np.ndarray], float]
Knob = Literal["policy", "exit"]
Turned = Literal["policy", "exit", "both"]
STRONGEST = 64.0


@dataclass(frozen=True)
class Calibration:
    """What was found: strength (of the knob that was turned last), its FLOPs speedup, and the quality with and without dropping
    (None without a quality)."""

    strength: float
    speedup: float
    quality: float | None = None
    baseline: float | None = None


def check_target(speedup: float | None, max_loss: float | None) -> None:
    """Raises OptionError for a target that is no number, or out of range."""
    if speedup is not None and not (is_number(speedup) and 1.0 <= speedup < math.inf):
        raise OptionError(f"speedup must be a number of at least 1, not {speedup!r}.")
    if max_loss is not None and not (is_number(max_loss) and 0.0 <= max_loss < math.inf):
        raise OptionError(f"max_loss must be a number of at least 0, not {max_loss!r}.")


def calibrate(
    model: Any,
    rows: datasets.Dataset,
    *,
    speedup: float | None = None,
    max_loss: float | None = None,
    quality: Quality | None = None,
    reference: np.ndarray | None = None,
    batch_size: int | None = None,
    tolerance: float = 0.01,
    predict: Callable[[Any, dict[str, torch.Tensor]], torch.Tensor] | None = None,
    knob: Turned | None = None,
) -> Calibration:
    """Set the attached policy's strength so that a target holds on `rows` (encoded validation rows); save keeps it.

    speedup: FLOPs ratio to reach, within `tolerance`; no labels needed. max_loss: the most that `quality` may fall
        (0.01 = one point of accuracy) below the packed model that drops nothing; the fastest setting that holds is taken.
    quality: from predictions [n, ...] in row order to a number, higher is better. Without it, agreement with the undropped
        model: the share of equal classes, tags or span ends; for values and embeddings 1 - normalised squared difference.
    reference: predictions on `rows` that a loss is counted from; by default those of this model with nothing dropped. After
        training give those of the model before it, or a loss that training itself brought goes unseen.
    batch_size: rows run at a time; None: as many as have 4,096 tokens together (`measure.run.batches`).
    knob: "exit" to set the exit's strength instead, the policy staying as it is; "both" the same, but where the policy alone
        already goes beyond the target, it is turned down to its half of it (of a speedup, the root) first, and where the exit
        does not reach a speedup by itself it stays at the most that it does, and the policy's strength does the rest; of a
        model with one knob it is that one. None: the policy's, where there is one.
    Raises TargetError, naming the nearest that can be had, when the target cannot be met; the model is then unchanged.
    """
    if (speedup is None) == (max_loss is None):
        raise OptionError("Give calibrate one target: speedup=2.0, or max_loss=0.01.")
    check_target(speedup, max_loss)
    rows = as_rows(rows)
    if len(rows) == 0:
        raise OptionError("Calibration needs at least one row.")
    attachment = attachment_of(model)
    asked = knob or ("exit" if attachment.policy is None and attachment.exit is not None else "policy")
    if asked not in get_args(Turned):
        raise OptionError(f"knob is one of {', '.join(get_args(Turned))}, not {knob!r}.")
    turned = _both(model) if asked == "both" else (asked,)
    before = {one: _strength(model, one) for one in turned}
    options: dict[str, Any] = {"batch_size": batch_size, "predict": predict}
    search = _Search(model, rows, options, turned[0])
    try:
        if speedup is not None:
            if len(turned) > 1 and search.at(0.0).speedup > speedup * (1.0 + tolerance):
                search = _sharing(search, lambda policy: _to_speedup(policy, math.sqrt(speedup), tolerance))
            search, found = _to_speedup_by(turned, search, speedup, tolerance)
            baseline = None
        else:
            assert max_loss is not None
            if reference is None:
                reference = run_packed(model, rows, **search.options).predictions
            judge = quality or agreement(reference, model)
            baseline = float(judge(reference))
            floor = baseline - max_loss
            if len(turned) > 1 and not _holds(search, judge, floor, 0.0):
                search = _sharing(search, lambda policy: _to_half_a_loss(policy, judge, floor, max_loss))
            found = _to_loss(search, judge, floor)
    except BaseException:
        for one, value in before.items():
            _set_strength(model, one, value)
        raise
    strength, result = found
    _set_strength(model, search.knob, strength)
    reached = float(quality(result.predictions)) if quality else None
    if max_loss is not None:
        reached = float(judge(result.predictions))
    calibration = Calibration(strength, result.speedup, reached, baseline)
    attachment_of(model).notes["calibration"] = {
        "target": {"speedup": speedup} if speedup is not None else {"max_loss": max_loss},
        "rows": len(rows),
        "knob": search.knob,
        **calibration.__dict__,
    }
    return calibration


def _both(model: Any) -> tuple[Knob, ...]:
    """The knobs that the model has, the exit's first."""
    if attachment_of(model).exit is None:
        return ("policy",)
    return ("exit",) if attachment_of(model).policy is None else ("exit", "policy")


def _strength(model: Any, knob: Knob) -> float:
    """Raises OptionError where the model has no such knob."""
    return float((policy_of(model) if knob == "policy" else exit_of(model)).config.strength)


def _set_strength(model: Any, knob: Knob, strength: float) -> None:
    if knob == "exit":
        set_exit(model, strength=strength)
    else:
        set_config(model, policy_of(model).config.replace(strength=strength))


class _Search:
    """Runs the model at a strength, remembering what was run.

    already: whether the model reads less at strength 0 too, since the other knob is on.
    """

    def __init__(self, model: Any, rows: datasets.Dataset, options: dict[str, Any], knob: Knob) -> None:
        self.model, self.rows, self.options, self.knob = model, rows, options, knob
        self.already = knob == "exit" and attachment_of(model).policy is not None
        self.seen: dict[float, Run] = {}

    def at(self, strength: float) -> Run:
        if strength not in self.seen:
            _set_strength(self.model, self.knob, strength)
            self.seen[strength] = run(self.model, self.rows, **self.options)
        return self.seen[strength]


def _sharing(search: _Search, turn_down: Callable[[_Search], tuple[float, Run]]) -> _Search:
    """A search for the exit's strength beside a policy that does its own part alone. search: beside the policy as it is. Raises
    TargetError where the policy cannot do its part."""
    _set_strength(search.model, search.knob, 0.0)
    strength, _ = turn_down(_Search(search.model, search.rows, search.options, "policy"))
    _set_strength(search.model, "policy", strength)
    return _Search(search.model, search.rows, search.options, search.knob)


def _to_speedup_by(
    knobs: tuple[Knob, ...], search: _Search, target: float, tolerance: float
) -> tuple[_Search, tuple[float, Run]]:
    """By the first knob, or where it does not get there, with the first at its fastest by the next one."""
    try:
        return search, _to_speedup(search, target, tolerance)
    except TargetError:
        if len(knobs) == 1:
            raise
    _set_strength(search.model, search.knob, max(search.seen, key=lambda strength: search.seen[strength].speedup))
    rest = _Search(search.model, search.rows, search.options, knobs[1])
    return _to_speedup_by(knobs[1:], rest, target, tolerance)


def _to_speedup(search: _Search, target: float, tolerance: float) -> tuple[float, Run]:
    if search.already and search.at(0.0).speedup >= target:
        return 0.0, search.at(0.0)
    low, high = 0.0, 1.0
    while search.at(high).speedup < target:
        low, high = high, high * 2
        if high > STRONGEST:
            best = max(run.speedup for run in search.seen.values())
            places = next((n for n in (2, 3, 4) if round(best, n) < round(target, n)), 5)
            raise TargetError(
                f"No setting reaches a FLOPs speedup of {target:.{places}f}x on these rows; this method reaches "
                f"{best:.{places}f}x at most."
            )
    for _ in range(20):
        ratio = search.at(high).speedup / target
        if 1.0 <= ratio <= 1.0 + tolerance or high - low < 1e-3 * high:
            break
        # Strength acts like an exponent or a scale: halve the interval in the logarithm once it is away from zero.
        middle = math.sqrt(low * high) if low > 0 else high / 2
        if search.at(middle).speedup < target:
            low = middle
        else:
            high = middle
    return high, search.at(high)


def _holds(search: _Search, quality: Quality, floor: float, strength: float) -> bool:
    return quality(search.at(strength).predictions) >= floor - 1e-12


def _to_loss(search: _Search, quality: Quality, floor: float) -> tuple[float, Run]:
    holds = functools.partial(_holds, search, quality, floor)
    low, high = 0.0, 1.0
    while holds(high) and high < STRONGEST:
        low, high = high, high * 2
    if not holds(high):
        for _ in range(7):
            middle = math.sqrt(low * high) if low > 0 else high / 4
            low, high = (middle, high) if holds(middle) else (low, middle)
    else:
        low = high
    if search.already and (low == 0.0 or search.at(low).speedup < search.at(0.0).speedup) and holds(0.0):
        return 0.0, search.at(0.0)
    if low == 0.0 or search.at(low).speedup <= 1.0:  # a strength so small that nothing drops is no setting
        tried = [(quality(r.predictions), r.speedup) for r in search.seen.values() if r.speedup > 1.0]
        if not tried:
            raise TargetError(
                "No setting saves more on these rows than it costs; they, or the model, may be too short for the method."
            )
        best, ratio = max(tried)
        raise TargetError(
            f"No setting that drops anything stays at {floor:.4f} or above on these rows; the nearest has {best:.4f} at "
            f"{ratio:.2f}x. Train the method first (thresher fit), or allow a larger loss."
        )
    return low, search.at(low)


def _to_half_a_loss(search: _Search, quality: Quality, floor: float, max_loss: float) -> tuple[float, Run]:
    """The fastest that loses half of what may be lost, or where there is none, all of it."""
    try:
        return _to_loss(search, quality, floor + max_loss / 2)
    except TargetError:
        return _to_loss(search, quality, floor)


def _says_classes(model: Any) -> bool:
    config = find_encoder(model).config
    one_of_several = (config.num_labels or 0) > 1 and config.problem_type != "multi_label_classification"
    return type(find_encoder(model)).__name__.endswith("Classification") and one_of_several


def agreement(packed: np.ndarray, model: Any) -> Quality:
    """How often a model's answers are those of the undropped model, whose predictions are `packed` (values and embeddings: how
    close)."""
    if answers_with_spans(find_encoder(model)):
        return _same(packed, lambda p: np.nan_to_num(p, nan=-np.inf).argmax(1))
    if _says_classes(model):
        real = ~np.isnan(packed).any(-1)
        return _same(packed, lambda p: np.nan_to_num(p, nan=-np.inf).argmax(-1)[real])
    spread = float(packed.var()) or 1.0
    return lambda predictions: 1.0 - float(((predictions - packed) ** 2).mean()) / spread


def _same(packed: np.ndarray, answer: Callable[[np.ndarray], np.ndarray]) -> Quality:
    wanted = answer(packed)
    return lambda predictions: float((answer(predictions) == wanted).mean())
