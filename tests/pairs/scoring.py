"""Tiny scorers of every kind, texts for them, and a task that they can learn."""

from __future__ import annotations

import random
from typing import Any

import datasets
import torch

from helpers import VOCABULARY, make, tokenizer
from thresher.pairs import SCORERS

FAMILIES = ("bert", "distilbert", "roberta")
KINDS = tuple(SCORERS)
SETTINGS: dict[str, dict[str, Any]] = {"mixencoder": {"k": 2, "layers": (-2, -1)}, "poly": {"m": 6}}
QUERY = "w20 w21 w22 w23 w24"
TEXTS = ["w30 w31", "w40", "w20 w41 w42 w43 w44 w45", "", "w50 w51 w52", "w20 w21 w22"]


def scorer(kind: str, family: str = "bert", *, depth: int = 3, seed: int = 0, **settings: Any) -> Any:
    """A new scorer in eval mode; the same weights for the same arguments."""
    limits = {"max_query": 22, "max_candidate": 18}
    made = SCORERS[kind]
    config = made.config_class(**{**limits, **SETTINGS.get(kind, {}), **settings})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return made(make(family, "base", depth), tokenizer(), config).eval()


def toy(count: int, *, candidates: int = 4, seed: int = 0, low: int = 5) -> datasets.Dataset:
    """Queries of three words; the right candidate of three repeats one of them, the others repeat none."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        words = [f"w{i}" for i in draw.sample(range(low, VOCABULARY), 3 + 3 * candidates)]
        query = words[:3]
        offered = [words[3 + 3 * i : 6 + 3 * i] for i in range(candidates)]
        right = draw.randrange(candidates)
        offered[right][draw.randrange(3)] = draw.choice(query)
        rows.append({"query": " ".join(query), "candidates": [" ".join(one) for one in offered], "label": right})
    return datasets.Dataset.from_list(rows)


def mean_rank(made: Any, rows: datasets.Dataset) -> float:
    """The mean of 1 / rank of the right candidate."""
    found = 0.0
    for row in rows:
        order = [name for name, _ in made.rank(row["query"], row["candidates"])]
        found += 1 / (1 + order.index(row["label"]))
    return found / len(rows)
