"""The two sides of every comparison: the model that drops nothing, and the one that does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from thresher.report.console import points, ratio, table

if TYPE_CHECKING:
    import numpy as np

    from thresher.cli.data import Work

STOCK_IS = "Stock is the model before, nothing dropped; FLOPs are without padding on both sides."


def gains(work: Work, truth: list[Any] | None, stock: np.ndarray, after: np.ndarray) -> dict[str, Any]:
    """The metrics of both, and the name of the one a target is about."""
    return {
        "metric": work.metric if truth is not None or work.text is None else "agreement",
        "stock": work.metrics(stock, truth, stock),
        "thresher": work.metrics(after, truth, stock),
    }


def gains_table(title: str, found: dict[str, Any], speedup: float) -> Any:
    before, after = found["stock"], found["thresher"]
    rows = [
        (name, f"{before[name]:.4f}", f"{value:.4f}", points(value - before[name])) for name, value in after.items()
    ]
    return table(title, ("", "stock", "thresher", "points"), [*rows, ("FLOPs speedup", ratio(1.0), ratio(speedup), "")])
