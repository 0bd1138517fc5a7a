"""The two sides of every comparison: the model that drops nothing, and the one that does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from thresher.report.console import MISSING, percent, points, ratio, table

if TYPE_CHECKING:
    import numpy as np

    from thresher.cli.truth import Truth
    from thresher.cli.work import Work

STOCK_IS = "Stock is the model before, nothing dropped; FLOPs are without padding on both sides."
STOCK_IS_THIS = "Stock is this model, nothing dropped; FLOPs are without padding on both sides."


def gains(work: Work, truth: Truth | None, stock: np.ndarray, after: np.ndarray) -> dict[str, Any]:
    """The metrics of both, and the name of the one a target is about."""
    return {
        "metric": work.metric if truth is not None or not work.scored else "agreement",
        "stock": work.metrics(stock, truth, stock),
        "thresher": work.metrics(after, truth, stock),
    }


def gains_table(title: str, found: dict[str, Any], speedup: float) -> Any:
    rows = points_rows(found["stock"], found["thresher"])
    return table(title, ("", "stock", "thresher", "points"), [*rows, ("FLOPs speedup", ratio(1.0), ratio(speedup), "")])


def points_rows(before: dict[str, float], after: dict[str, float]) -> list[tuple[str, ...]]:
    """The metrics of both sides, and the difference in points, which an error that has no largest value has none of."""
    return [
        (name, f"{before[name]:.4f}", f"{value:.4f}", MISSING if name == "mse" else points(value - before[name]))
        for name, value in after.items()
    ]


def slower(
    directory: object,
    tokens: float,
    flops: float,
    measured: Mapping[int, float] | None = None,
    *,
    graph: bool = False,
) -> str | None:
    """What to do where nothing is gained; None where something is.

    tokens: of a row, on average. flops: the FLOPs speedup. measured: the speedup in seconds by batch size; none of a model that
    nothing drops tokens or leaves early in, which has nothing to be faster by. graph: whether it is exported.
    """
    further = f"raise the target (thresher calibrate {directory} DATA with a higher --speedup)"
    if graph:
        further = "raise the target of the saved model (thresher calibrate with a higher --speedup) and export it again"
    if _below_one(flops):
        return (
            f"This spends more FLOPs than the model before ({ratio(flops)}): on rows of {tokens:.0f} tokens the method's own "
            f"work outweighs what it saves, so {further}, or give it longer rows."
        )
    lost = {size: value for size, value in (measured or {}).items() if _below_one(value)}
    if not lost:
        return None
    sizes = ", ".join(f"{ratio(value)} at batch {size}" for size, value in lost.items())
    return (
        f"This is slower here than the model before ({sizes}): on rows of {tokens:.0f} tokens a FLOPs speedup of "
        f"{ratio(flops)} does not pay for what dropping itself takes, so {further}, or give it longer rows or larger batches."
    )


def _below_one(speedup: float) -> bool:
    """As it is shown: 0.996 is 1.00x."""
    return round(speedup, 2) < 1.0


def checked_rows(checked: Mapping[str, float], *, classes: bool) -> list[tuple[str, str]]:
    """How far an exported graph was found from the torch engine. classes: whether answers have a largest place to agree on."""
    rows = [("difference in float32", f"{checked['difference']:.1e}"), ("rows with ties", percent(checked["ties"]))]
    if "int8_difference" in checked:
        rows.append(("difference of int8", f"{checked['int8_difference']:.1e}"))
        if classes:
            rows.append(("same answers in int8", percent(checked["int8_agreement"])))
    return rows
