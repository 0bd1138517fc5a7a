"""LTP on IMDb and SST-2 against the same fine-tuned model run packed.

    python benchmarks/starts.py imdb --data-dir DIR --out STARTS/imdb
    python benchmarks/ltp.py imdb --data-dir DIR --start STARTS/imdb --out RUNS/ltp-imdb --speedup 2.5

Soft and hard stage train on (a part of) the examples that the start was trained on; thresholds are scaled to the
target on held-out training rows, and the test split is read once at the end.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import datasets
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import thresher
from records import record
from starts import HELD_OUT, SETTINGS, SPLIT_SEED
from thresher.measure.run import run, run_packed
from thresher.tasks.data import load_rows
from thresher.tasks.text import TextTask
from thresher.training import fit


def splits(name: str, data_dir: Path, tokenizer, *, train: int, calibration: int, test: int):
    """Encoded rows: train (inside the start's training part), held-out rows to calibrate on, and the test rows."""
    max_tokens = SETTINGS[name][3]
    rows = load_rows(data_dir / name, split="train").shuffle(seed=SPLIT_SEED)
    last = "test" if name == "imdb" else "validation"
    held_out = load_rows(data_dir / name, split=last).shuffle(seed=SPLIT_SEED)
    task = TextTask.infer(rows)
    held_out_train = rows.select(range(HELD_OUT))
    if name == "sst2":
        # The training rows are mostly phrases, the validation split is whole sentences: calibrate on what is as long.
        text = SETTINGS[name][0]
        held_out_train = held_out_train.filter(lambda row: len(row[text].split()) >= 12)
    parts = (
        rows.select(range(HELD_OUT, min(HELD_OUT + train, len(rows)))),
        held_out_train.select(range(min(calibration, len(held_out_train)))),
        held_out.select(range(min(test, len(held_out)))),
    )
    return task, *(task.encode(part, tokenizer, max_tokens).rows for part in parts)


def score(task: TextTask, predictions, rows: datasets.Dataset) -> float:
    return task.metrics(predictions, rows["labels"])["accuracy"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=("imdb", "sst2"))
    parser.add_argument("--data-dir", required=True, type=Path)
    parser.add_argument("--start", required=True, type=Path)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--speedup", type=float, required=True)
    parser.add_argument("--train", type=int, default=10_000)
    parser.add_argument("--calibration", type=int, default=500)
    parser.add_argument("--test", type=int, default=5_000)
    parser.add_argument("--penalty", type=float, default=0.1)
    parser.add_argument("--threshold", type=float, default=0.01)
    parser.add_argument("--temperature", type=float, default=5e-4)
    parser.add_argument("--stage", action="append", default=[], help="e.g. soft.epochs=0.5")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    args = parser.parse_args()
    thresher.keep_memory()

    tokenizer = AutoTokenizer.from_pretrained(args.start)
    task, train, calibration, test = splits(
        args.name, args.data_dir, tokenizer, train=args.train, calibration=args.calibration, test=args.test
    )
    overrides = {k: float(v) for k, v in (item.split("=") for item in args.stage)}
    if "batch_size" in overrides:
        overrides["batch_size"] = int(overrides["batch_size"])
    gains, losses, baseline = [], [], None
    for seed in args.seeds:
        model = AutoModelForSequenceClassification.from_pretrained(args.start)
        thresher.attach(model)
        if baseline is None:
            baseline = score(task, run_packed(model, test).predictions, test)
        model = fit(
            model,
            thresher.LTP(threshold=args.threshold, penalty=args.penalty, temperature=args.temperature),
            train,
            tokenizer,
            args.out / f"seed-{seed}",
            validation=calibration,
            speedup=args.speedup,
            overrides=overrides,
            seed=seed,
        )
        result = run(model, test)
        accuracy = score(task, result.predictions, test)
        gains.append(result.speedup)
        losses.append(100 * (baseline - accuracy))
        thetas = [round(float(t), 5) for t in thresher.policy_of(model).theta]
        print(f"seed {seed}: {result.speedup:.3f}x, accuracy {accuracy:.4f} (packed {baseline:.4f}), theta {thetas}")

    about = {
        "baseline": f"the same start, packed, nothing dropped: accuracy {baseline:.4f}",
        "data": args.name,
        "split": "test" if args.name == "imdb" else "validation (GLUE dev)",
        "examples": len(test),
        "seeds": args.seeds,
        "note": f"MiniLM-L6, {SETTINGS[args.name][3]} tokens; stages on {len(train)} of the start's rows; settings "
        f"{' '.join(args.stage) or 'default'}, threshold {args.threshold}, penalty {args.penalty}, temperature "
        f"{args.temperature}; calibrated on {len(calibration)} held-out rows",
    }
    target = {"imdb": ">= 2.5", "sst2": ">= 1.5"}[args.name]
    mean = lambda xs: sum(xs) / len(xs)  # noqa: E731
    record(
        "ltp",
        f"ltp-{args.name}-flops",
        "LTP FLOPs speedup on test",
        mean(gains),
        "x",
        target=target,
        spread=gains,
        **about,
    )
    record(
        "ltp",
        f"ltp-{args.name}-loss",
        "LTP accuracy lost",
        mean(losses),
        "points",
        target="<= 1.0",
        spread=losses,
        **about,
    )


if __name__ == "__main__":
    main()
