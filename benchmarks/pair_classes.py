"""Pairs with a label: what each scorer with a head for classes learns in the same number of passes, on rte and stsb.

    python benchmarks/pair_classes.py rte stsb --data-dir DIR --out RUNS/pairs --passes 8000 [--seeds 0 1 2]

rte is judged by accuracy, stsb by Spearman's correlation, both on the validation split, which nothing is chosen on. A scorer
that lies in OUT already is only judged. --limit tries things on so few rows, and records nothing.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import datasets
import numpy as np
import torch
from scipy.stats import spearmanr

from pair_scoring import STARTED, THREE
from records import record
from starts import minilm
from thresher.pairs import SCORERS, PairLoss, load, train
from thresher.tasks.data import load_rows

DATA = {"rte": (2, "accuracy", (160, 64)), "stsb": (1, "Spearman's correlation", (64, 64))}
FULL = 5.0  # the highest label of stsb
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "dual": ("dual", {"pooling": "mean"}),
    "poly": ("poly", {}),
    "virt": ("virt", {}),
    "mix-a": ("mixencoder", {"k": 1, **STARTED}),
    "mix-b": ("mixencoder", {"k": 1, **THREE, **STARTED}),
    "mix-c": ("mixencoder", {"k": 2, **THREE, **STARTED}),
    "mix-a-paper": ("mixencoder", {"k": 1}),
    "deformer": ("deformer", {}),
    "cross": ("cross", {}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", choices=sorted(DATA))
    parser.add_argument("--data-dir", required=True, type=Path)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--scorers", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--passes", type=int, default=8_000, help="pairs each scorer learns from")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--limit", type=int, help="at most so many rows of any split; records nothing")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.names:
        for scorer in args.scorers:
            judged(args, name, scorer)


def judged(args: argparse.Namespace, name: str, scorer: str) -> None:
    rows = _rows(args, name, "validation")
    found = [100 * _score(name, trained(args, name, scorer, seed), rows) for seed in args.seeds]
    print(f"{name} {scorer}: {mean(found):.2f} {[round(one, 2) for one in found]}", flush=True)
    if args.limit:
        return
    metric = DATA[name][1]
    record(
        "pair_classes",
        f"pairs-{name}-{scorer}-{args.passes}",
        f"{metric}, {scorer}",
        mean(found),
        "%" if name == "rte" else "points",
        spread={"standard_error": round(stdev(found) / len(found) ** 0.5, 2)} if len(found) > 1 else None,
        cell=("stsb: Spearman's correlation; rte: accuracy, %", scorer, name),
        data=name,
        split="validation",
        examples=len(rows),
        seeds=args.seeds,
        note=f"MiniLM-L6, {WAYS[scorer][1]}, {args.passes} pairs learned from, in batches of {args.batch_size}",
    )


def trained(args: argparse.Namespace, name: str, scorer: str, seed: int) -> Any:
    place = args.out / f"{name}-{scorer}-{args.passes}-{seed}{f'-of-{args.limit}' if args.limit else ''}"
    if (place / "scorer.json").is_file():
        return load(place)
    classes, _, (query, candidate) = DATA[name]
    kind, settings = WAYS[scorer]
    torch.manual_seed(seed)
    made = SCORERS[kind].from_encoder(minilm(), max_query=query, max_candidate=candidate, classes=classes, **settings)
    work = args.out / f"{place.name}.training"
    train(
        made,
        _rows(args, name, "train"),
        work,
        loss=PairLoss(),
        batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        seed=seed,
        max_steps=max(1, args.passes // args.batch_size),
        use_cpu=not torch.cuda.is_available(),
        progress=False,
    )
    shutil.rmtree(work, ignore_errors=True)
    made.save(place)
    return made


def _rows(args: argparse.Namespace, name: str, split: str) -> datasets.Dataset:
    rows = load_rows(args.data_dir / name, split=split, limit=args.limit, seed=0 if args.limit else None)
    if name == "stsb":
        return rows.map(lambda row: {"label": row["label"] / FULL}, keep_in_memory=True)
    return rows


def _score(name: str, scorer: Any, rows: datasets.Dataset) -> float:
    said = scorer.predict(list(zip(rows["sentence1"], rows["sentence2"], strict=True)))
    labels = np.array(rows["label"][:])
    if name == "rte":
        return float((said.argmax(1) == labels).mean())
    return float(spearmanr(said, labels).statistic)


if __name__ == "__main__":
    main()
