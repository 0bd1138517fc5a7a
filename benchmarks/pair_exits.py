"""Rows that leave early on SQuAD and WikiQA: branches on a fine-tuned start of pair_starts.py, which itself stays as it is.

    python benchmarks/pair_exits.py wikiqa --data-dir DIR --start STARTS/wikiqa --out RUNS/wikiqa-exit

FastBERT's branches learn from what the start says of the training rows. Of its thresholds the fastest is taken that, like the
next one, loses at most --lost points on rows held out from training; it is judged on the evaluation rows and saved in OUT for
peers.py --method.
A run that was trained is not trained again.
"""

from __future__ import annotations

import argparse
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from transformers import AutoTokenizer

import thresher
from pair_data import encode, quality
from pair_starts import CARRIED, EVALUATED, HELD_OUT, MODELS
from records import record
from thresher.measure.run import prepared, run, run_packed

THRESHOLDS = (0.05, 0.1, 0.125, 0.15, 0.175, 0.2, 0.225, 0.25, 0.275, 0.3, 0.35, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=sorted(MODELS))
    parser.add_argument("--data-dir", required=True, type=Path)
    parser.add_argument("--start", required=True, type=Path)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--epochs", type=float, default=3.0)
    parser.add_argument("--lost", type=float, default=1.0, help="points, on held-out rows")
    parser.add_argument("--test", type=int, default=2_000)
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.start)
    train, held_out = learned_and_held_out(args, tokenizer)
    test = encode(args.name, EVALUATED[args.name], args.data_dir, tokenizer, args.test)
    model = trained(args, tokenizer, train, held_out)
    threshold, reached = chosen(model, args.name, held_out, args.lost)
    print(f"{args.name}: threshold {threshold}, {reached:.3f}x on held-out rows", flush=True)
    thresher.set_exit(model, threshold=threshold)
    result = run(model, test)
    before = scored(args.name, run_packed(model, test).predictions, test)
    after = scored(args.name, result.predictions, test)
    print(f"{args.name}: {before:.4f} -> {after:.4f} at {result.speedup:.3f}x", flush=True)
    thresher.save(model, args.out)
    tokenizer.save_pretrained(args.out)
    what = "span accuracy" if args.name == "squad" else "MRR"
    about: dict[str, Any] = {
        "data": args.name,
        "split": EVALUATED[args.name],
        "examples": len(test),
        "seeds": [0],
        "baseline": f"the same start, packed, nothing leaves: {what} {before:.4f}",
        "note": f"MiniLM-L6, untouched; FastBERT's branches, {args.epochs:g} epochs, threshold {threshold}",
    }
    record("pairs", f"{args.name}-exit-flops", "FLOPs speedup of an early exit", result.speedup, "x", **about)
    lost = 100 * (before - after)
    record("pairs", f"{args.name}-exit-loss", f"{what} lost by it", lost, "points", target="<= 1.0", **about)


def learned_and_held_out(args: argparse.Namespace, tokenizer: Any) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Held out are training rows that the start never read, and WikiQA's validation split; SQuAD's is what is judged."""
    train = encode(args.name, "train", args.data_dir, tokenizer)
    held_out, train = train.select(range(HELD_OUT)), train.select(range(HELD_OUT, len(train)))
    if args.name == "wikiqa":
        more = encode(args.name, "validation", args.data_dir, tokenizer)
        apart = [-1 - number for number in more["question"]]  # from the numbers of training questions
        held_out = datasets.concatenate_datasets(
            [held_out, more.remove_columns("question").add_column("question", apart)]
        )
    return train.select_columns([c for c in CARRIED if c in train.column_names]), held_out


def trained(args: argparse.Namespace, tokenizer: Any, train: datasets.Dataset, held_out: datasets.Dataset) -> Any:
    work = args.out / "trained"
    if (work / "thresher.json").is_file():
        return thresher.load(work)
    model = MODELS[args.name].from_pretrained(args.start)
    epochs = {"exit.epochs": args.epochs}
    return thresher.fit(
        model, None, train, tokenizer, work, exit=thresher.FastBERT(), validation=held_out, overrides=epochs
    )


def chosen(model: Any, name: str, held_out: datasets.Dataset, lost: float) -> tuple[float, float]:
    """The fastest threshold that loses so many points at most on the held-out rows, and its FLOPs speedup.

    The next threshold must not lose more either: at the edge of a steep fall a few questions decide.
    """
    rows = list(prepared(model, held_out))
    base = scored(name, run_packed(model, rows).predictions, held_out)
    found: list[tuple[float, float, float]] = []  # threshold, speedup, points
    for threshold in THRESHOLDS:
        thresher.set_exit(model, threshold=threshold)
        result = run(model, rows)
        points = 100 * (base - scored(name, result.predictions, held_out))
        print(f"threshold {threshold}: {result.speedup:.3f}x, {points:.2f} points lost", flush=True)
        found.append((threshold, result.speedup, points))
    safe = [one for one, following in pairwise(found) if max(one[2], following[2]) <= lost]
    threshold, speedup, _ = max(safe, key=lambda one: one[1], default=(0.0, 1.0, 0.0))
    return threshold, speedup


def scored(name: str, predictions: Any, rows: datasets.Dataset) -> float:
    """predictions: [rows, 2] of classes, or [rows, N, 2] of spans, NaN where a row has no token."""
    said = [p[~np.isnan(p)].reshape(-1, 2) if p.ndim > 1 else p for p in predictions]
    return quality(name, said, rows)


if __name__ == "__main__":
    main()
