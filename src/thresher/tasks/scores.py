"""The metrics of classification and regression, computed by scikit-learn and SciPy."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef, mean_squared_error

METRICS = {
    "classification": ("accuracy", "f1", "matthews"),
    "regression": ("pearson", "spearman", "mse"),
}
DEFAULTS = {"classification": "accuracy", "regression": "spearman"}
LOWER_IS_BETTER = frozenset({"mse"})


def classification(predicted: NDArray[Any], true: NDArray[Any], num_labels: int) -> dict[str, float]:
    """Accuracy, F1 and Matthews correlation of class numbers [B].

    F1 is that of class 1 where there are two classes, else the unweighted mean over the classes that occur. A value
    that is not defined, as where only one class occurs, counts as 0.
    """
    average = "binary" if num_labels == 2 else "macro"
    return {
        "accuracy": float(accuracy_score(true, predicted)),
        "f1": float(f1_score(true, predicted, average=average, zero_division=0)),
        "matthews": float(matthews_corrcoef(true, predicted)) if len(np.union1d(true, predicted)) > 1 else 0.0,
    }


def regression(predicted: NDArray[Any], true: NDArray[Any]) -> dict[str, float]:
    """Pearson and Spearman correlation and mean squared error of values [B].

    A correlation that is not defined (a constant side, a single row, a prediction that is not a number) counts as 0:
    such predictions order nothing. The error of predictions that are not finite is infinite.
    """
    finite = bool(np.isfinite(predicted).all())
    defined = finite and len(true) > 1 and np.ptp(predicted) > 0 and np.ptp(true) > 0
    return {
        "pearson": _or_zero(stats.pearsonr(predicted, true).statistic) if defined else 0.0,
        "spearman": _or_zero(stats.spearmanr(predicted, true).statistic) if defined else 0.0,
        "mse": float(mean_squared_error(true, predicted)) if finite else float("inf"),
    }


def _or_zero(correlation: float) -> float:
    return 0.0 if np.isnan(correlation) else float(correlation)
