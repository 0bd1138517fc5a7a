"""What the tests of the candidate store share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from thresher.errors import StoreError
from thresher.pairs.store import CandidateStore

SETTINGS: dict[str, Any] = {"fingerprint": "model-a", "strategy": "S", "k": 2, "dim": 4}


def vectors(n: int, *shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, *(shape or (2, 4)))).astype(np.float32)


def constants(n: int, value: float = 1.0) -> np.ndarray:
    return np.full((n, 2, 4), value, np.float32)


def names(n: int, start: int = 0) -> list[str]:
    return [f"c{i}" for i in range(start, start + n)]


def one_sentence(error: pytest.ExceptionInfo[StoreError]) -> str:
    text = str(error.value)
    assert "\n" not in text, text
    assert text.endswith("."), text
    return text


def contents(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(directory.iterdir()) if p.name != "lock"}


def filled(directory: Path) -> CandidateStore:
    """28 candidates in two segments, one of them with dead rows."""
    store = CandidateStore.create(directory, **SETTINGS)
    store.add(names(20), constants(20))
    store.add(names(10, 20), constants(10, 2.0))
    store.delete(["c3", "c4"])
    return store


CHANGES: dict[str, Callable[[CandidateStore], None]] = {
    "add": lambda s: s.add(names(5, 50), constants(5)),
    "update": lambda s: s.update(["c1", "c21"], constants(2, 9.0)),
    "delete": lambda s: s.delete(["c1", "c21"]),
    "compact": lambda s: s.compact(),
}
