"""Fine-tune MiniLM on SQuAD or WikiQA, then let it learn to read less from what it says itself.

    python benchmarks/pair_starts.py squad --data-dir DIR --out STARTS/squad
    python benchmarks/pair_starts.py squad --data-dir DIR --out RUNS/squad-fast --start STARTS/squad --speedup 1.2 1.5 2

The second command trains attention mass by distillation (no labels) at the last of the speedups; with --untrained it trains
nothing. Of the speedups the fastest is kept that loses at most --lost points on rows held out from training; it is judged on
the test rows and saved in OUT for peers.py --method.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import datasets
from transformers import AutoModelForQuestionAnswering, AutoModelForSequenceClassification, AutoTokenizer

import thresher
from pair_data import encode, quality
from records import record
from starts import minilm
from thresher.measure.run import run, run_packed
from thresher.policy import Stage
from thresher.training.stages import run_stage

MODELS = {"squad": AutoModelForQuestionAnswering, "wikiqa": AutoModelForSequenceClassification}
EVALUATED = {"squad": "validation", "wikiqa": "test"}
HELD_OUT = 500
CARRIED = ("input_ids", "attention_mask", "token_type_ids", "labels", "start_positions", "end_positions")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=sorted(MODELS))
    parser.add_argument("--data-dir", required=True, type=Path)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--start", type=Path)
    parser.add_argument("--speedup", type=float, nargs="+", default=[1.2, 1.3, 1.4, 1.5, 1.6, 1.8, 2.0])
    parser.add_argument("--lost", type=float, default=1.0, help="points, on held-out rows")
    parser.add_argument("--epochs", type=float, default=2.0)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--curve", type=float, nargs="+", help="retention fractions; default: the method's own")
    parser.add_argument("--untrained", action="store_true", help="only calibrate")
    parser.add_argument("--test", type=int, default=2_000)
    args = parser.parse_args()

    source = args.start or minilm()
    tokenizer = AutoTokenizer.from_pretrained(source)
    train, held_out = learned_and_held_out(args.name, args.data_dir, tokenizer)
    test = encode(args.name, EVALUATED[args.name], args.data_dir, tokenizer, args.test)
    model = MODELS[args.name].from_pretrained(source, attention_probs_dropout_prob=0.0)
    make = fine_tuned if args.start is None else reading_less
    make(args, model, tokenizer, train, held_out, test)


def learned_and_held_out(name: str, data_dir: Path, tokenizer: Any) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Held out are training rows that the start never reads; of WikiQA the validation split too, which judges nothing else."""
    rows = encode(name, "train", data_dir, tokenizer)
    held_out, train = rows.select(range(HELD_OUT)), rows.select(range(HELD_OUT, len(rows)))
    train = train.select_columns([column for column in CARRIED if column in train.column_names])
    if name == "squad":
        return train, held_out
    more = encode(name, "validation", data_dir, tokenizer)
    apart = [-1 - number for number in more["question"]]  # from the numbers of training questions
    more = more.remove_columns("question").add_column("question", apart)
    return train, datasets.concatenate_datasets([held_out, more])


def judged(name: str, model: Any, rows: datasets.Dataset, *, nothing_dropped: bool = False) -> tuple[float, float]:
    """FLOPs speedup and quality."""
    result = (run_packed if nothing_dropped else run)(model, rows)
    said = [p[~_nan(p)].reshape(-1, 2) if p.ndim > 1 else p for p in result.predictions]
    return 1.0 if nothing_dropped else result.speedup, quality(name, said, rows)


def fine_tuned(args: argparse.Namespace, model: Any, tokenizer: Any, train: Any, held_out: Any, test: Any) -> None:
    thresher.attach(model)
    stage = Stage(name="fine-tune", mode="off", epochs=args.epochs, learning_rate=args.learning_rate)
    run_stage(model, stage, train, tokenizer, args.out / "training")
    _, found = judged(args.name, model, test, nothing_dropped=True)
    thresher.detach(model)
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    about = {"data": args.name, "split": EVALUATED[args.name], "examples": len(test), "seeds": [0]}
    (args.out / "start.json").write_text(json.dumps({**about, "quality": found, "train": len(train)}, indent=1))
    print(f"{args.name}: quality {found:.4f} on {len(test)} rows")


def reading_less(args: argparse.Namespace, model: Any, tokenizer: Any, train: Any, held_out: Any, test: Any) -> None:
    policy = thresher.AttentionMass(retention=tuple(args.curve) if args.curve else None, protect_segments=(0,))
    thresher.attach(model, policy)
    _, base = judged(args.name, model, held_out, nothing_dropped=True)
    _, before = judged(args.name, model, test, nothing_dropped=True)
    if not args.untrained:
        overrides = {"epochs": args.epochs, "learning_rate": args.learning_rate}
        options: dict[str, Any] = {"validation": held_out, "speedup": max(args.speedup), "overrides": overrides}
        model = thresher.fit(model, policy, train, tokenizer, args.out / "trained", **options)
    for asked in sorted(args.speedup, reverse=True):
        thresher.calibrate(model, held_out, speedup=asked)
        reached, score = judged(args.name, model, held_out)
        print(f"{args.name}: {reached:.3f}x, {100 * (base - score):.2f} points lost on held-out rows", flush=True)
        if 100 * (base - score) <= args.lost:
            break
    else:
        raise SystemExit(f"No speedup of these loses at most {args.lost} points; give a lower --speedup.")
    thresher.save(model, args.out)
    tokenizer.save_pretrained(args.out)
    speedup, after = judged(args.name, model, test)
    print(f"{args.name}: {before:.4f} -> {after:.4f} at {speedup:.3f}x")
    what = "span accuracy" if args.name == "squad" else "MRR"
    learned = "without training" if args.untrained else f"distilled {args.epochs:g} epochs"
    about: dict[str, Any] = {
        "data": args.name,
        "split": EVALUATED[args.name],
        "examples": len(test),
        "seeds": [0],
        "baseline": f"the same start, packed, nothing dropped: {what} {before:.4f}",
        "note": f"MiniLM-L6, attention mass {policy.retention or 'default curve'}, query kept, {learned}, the fastest that "
        f"loses at most {args.lost:g} points on held-out rows",
    }
    record("pairs", f"{args.name}-flops", "FLOPs speedup", speedup, "x", **about)
    lost = 100 * (before - after)
    record("pairs", f"{args.name}-loss", f"{what} lost", lost, "points", target="<= 1.0", **about)


def _nan(values):
    return values != values


if __name__ == "__main__":
    main()
