"""Rows of WikiQA that leave early: branches on a fine-tuned start of pair_starts.py, which itself stays as it is.

    python benchmarks/wikiqa_exit.py --data-dir DIR --start STARTS/wikiqa --out RUNS/wikiqa-exit

FastBERT's branches learn from what the start says of the training rows. Of its thresholds the fastest is taken that, like the
next one, loses at most --lost points on rows held out from training, and of the layers those after which at least --share of
these rows leave, as a branch where nearly nobody leaves only costs; it is judged on the test rows and saved in OUT for
peers.py --method. What was trained with the same settings is not trained again.
"""

from __future__ import annotations

import argparse
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import thresher
from pair_data import encode, quality
from pair_starts import learned_and_held_out
from records import record
from thresher.measure.run import prepared, run, run_packed
from thresher.model import attachment_of, exit_of

NAME = "wikiqa"
THRESHOLDS = (0.05, 0.1, 0.125, 0.15, 0.175, 0.2, 0.225, 0.25, 0.275, 0.3, 0.35, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", required=True, type=Path)
    parser.add_argument("--start", required=True, type=Path)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--epochs", type=float, default=3.0)
    parser.add_argument("--lost", type=float, default=1.0, help="points, on held-out rows")
    parser.add_argument(
        "--share", type=float, default=0.05, help="of the held-out rows, that leave after a layer that is kept"
    )
    parser.add_argument("--test", type=int, default=2_000)
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.start)
    train, held_out = learned_and_held_out(NAME, args.data_dir, tokenizer)
    test = encode(NAME, "test", args.data_dir, tokenizer, args.test)
    model = trained(args, tokenizer, train, held_out)
    threshold, reached = chosen(model, held_out, args.lost)
    print(f"{NAME}: threshold {threshold}, {reached:.3f}x on held-out rows", flush=True)
    thresher.set_exit(model, threshold=threshold)
    layers = worth_asking(model, held_out, args.share)
    print(f"{NAME}: rows may leave after layers {layers}", flush=True)
    thresher.set_exit(model, after=layers)
    result = run(model, test)
    before = quality(NAME, list(run_packed(model, test).predictions), test)
    after = quality(NAME, list(result.predictions), test)
    print(f"{NAME}: {before:.4f} -> {after:.4f} at {result.speedup:.3f}x", flush=True)
    thresher.save(model, args.out)
    tokenizer.save_pretrained(args.out)
    about: dict[str, Any] = {
        "data": NAME,
        "split": "test",
        "examples": len(test),
        "seeds": [0],
        "baseline": f"the same start, packed, nothing leaves: MRR {before:.4f}",
        "note": f"MiniLM-L6, untouched; FastBERT's branches, {args.epochs:g} epochs, threshold {threshold}, "
        f"rows may leave after layers {', '.join(map(str, layers))}",
    }
    record("pairs", f"{NAME}-exit-flops", "FLOPs speedup of an early exit", result.speedup, "x", **about)
    lost = 100 * (before - after)
    record("pairs", f"{NAME}-exit-loss", "MRR lost by it", lost, "points", target="<= 1.0", **about)


def trained(args: argparse.Namespace, tokenizer: Any, train: datasets.Dataset, held_out: datasets.Dataset) -> Any:
    directory, about = args.out / "trained", {"start": args.start.name, "epochs": args.epochs}
    if (directory / "thresher.json").is_file():
        model = thresher.load(directory)
        if attachment_of(model).notes.get("benchmark") != about:
            raise SystemExit(f"{directory} holds a run with other settings; give another --out.")
        return model
    return thresher.fit(
        AutoModelForSequenceClassification.from_pretrained(args.start),
        None,
        train,
        tokenizer,
        directory,
        exit=thresher.FastBERT(),
        validation=held_out,
        overrides={"exit.epochs": args.epochs},
        notes={"benchmark": about},
    )


def chosen(model: Any, held_out: datasets.Dataset, lost: float) -> tuple[float, float]:
    """The fastest threshold that loses so many points at most on the held-out rows, and its FLOPs speedup.

    The next threshold must not lose more either: at the edge of a steep fall a few questions decide. 0 where none is safe.
    """
    rows = list(prepared(model, held_out))
    base = quality(NAME, list(run_packed(model, rows).predictions), held_out)
    found: list[tuple[float, float, float]] = []  # threshold, speedup, points
    for threshold in THRESHOLDS:
        thresher.set_exit(model, threshold=threshold)
        result = run(model, rows)
        points = 100 * (base - quality(NAME, list(result.predictions), held_out))
        print(f"threshold {threshold}: {result.speedup:.3f}x, {points:.2f} points lost", flush=True)
        found.append((threshold, result.speedup, points))
    safe = [one for one, following in pairwise(found) if one[1] > 1 and max(one[2], following[2]) <= lost]
    threshold, speedup, _ = max(safe, key=lambda one: one[1], default=(0.0, 1.0, 0.0))
    return threshold, speedup


def worth_asking(model: Any, held_out: datasets.Dataset, share: float) -> tuple[int, ...]:
    """The layers after which so many of the held-out rows leave; all where none does."""
    left = Counter(layer for trace in run(model, held_out).traces for layer in trace.exited_at)
    layers = range(1, exit_of(model).geometry.layers)
    return tuple(layer for layer in layers if left[layer] >= share * len(held_out)) or tuple(layers)


if __name__ == "__main__":
    main()
