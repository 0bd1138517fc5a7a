"""Fine-tune MiniLM on SQuAD or WikiQA, then let it learn to read less from what it says itself.

    python benchmarks/pair_starts.py squad --data-dir DIR --out STARTS/squad
    python benchmarks/pair_starts.py squad --data-dir DIR --out RUNS/squad-fast --start STARTS/squad --speedup 2.2

The second command trains attention mass by distillation (no labels) and calibrates it on held-out training rows; with
--untrained it only calibrates.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

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
    parser.add_argument("--speedup", type=float, default=2.0)
    parser.add_argument("--epochs", type=float, default=2.0)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--curve", type=float, nargs="+", help="retention fractions; default: the method's own")
    parser.add_argument("--untrained", action="store_true", help="only calibrate")
    parser.add_argument("--test", type=int, default=2_000)
    args = parser.parse_args()

    source = args.start or minilm()
    tokenizer = AutoTokenizer.from_pretrained(source)
    rows = encode(args.name, "train", args.data_dir, tokenizer)
    held_out, train = rows.select(range(HELD_OUT)), rows.select(range(HELD_OUT, len(rows)))
    test = encode(args.name, EVALUATED[args.name], args.data_dir, tokenizer, args.test)
    model = MODELS[args.name].from_pretrained(source, attention_probs_dropout_prob=0.0)
    train = train.select_columns([c for c in CARRIED if c in train.column_names])
    about = {"data": args.name, "split": EVALUATED[args.name], "examples": len(test), "seeds": [0]}
    said = lambda predictions: [p[~_nan(p)].reshape(-1, 2) if p.ndim > 1 else p for p in predictions]  # noqa: E731

    if args.start is None:
        thresher.attach(model)
        stage = Stage(name="fine-tune", mode="off", epochs=args.epochs, learning_rate=args.learning_rate)
        run_stage(model, stage, train, tokenizer, args.out / "training")
        found = quality(args.name, said(run_packed(model, test).predictions), test)
        thresher.detach(model)
        model.save_pretrained(args.out)
        tokenizer.save_pretrained(args.out)
        (args.out / "start.json").write_text(json.dumps({**about, "quality": found, "train": len(train)}, indent=1))
        print(f"{args.name}: quality {found:.4f} on {len(test)} rows")
        return

    policy = thresher.AttentionMass(retention=tuple(args.curve) if args.curve else None, protect_segments=(0,))
    thresher.attach(model, policy)
    before = quality(args.name, said(run_packed(model, test).predictions), test)
    if args.untrained:
        thresher.calibrate(model, held_out, speedup=args.speedup)
        thresher.save(model, args.out)
        tokenizer.save_pretrained(args.out)
    else:
        overrides = {"epochs": args.epochs, "learning_rate": args.learning_rate}
        options = {"validation": held_out, "speedup": args.speedup, "overrides": overrides}
        model = thresher.fit(model, policy, train, tokenizer, args.out, **options)
    result = run(model, test)
    after = quality(args.name, said(result.predictions), test)
    print(f"{args.name}: {before:.4f} -> {after:.4f} at {result.speedup:.3f}x")
    what = "span accuracy" if args.name == "squad" else "MRR"
    learned = "without training" if args.untrained else f"distilled {args.epochs:g} epochs"
    note = f"MiniLM-L6, attention mass {policy.retention or 'default curve'}, query kept, {learned}"
    base = f"the same start, packed, nothing dropped: {what} {before:.4f}"
    record("pairs", f"{args.name}-flops", "FLOPs speedup", result.speedup, "x", baseline=base, note=note, **about)
    record("pairs", f"{args.name}-loss", f"{what} lost", 100 * (before - after), "points", target="<= 1.0",
           baseline=base, note=note, **about)  # fmt: skip


def _nan(values):
    return values != values


if __name__ == "__main__":
    main()
