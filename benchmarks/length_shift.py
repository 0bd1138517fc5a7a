"""The length shift of the LTP paper on IMDb: train on short reviews, test on long ones.

    python benchmarks/length_shift.py --data-dir DIR --start STARTS/imdb

Short: at most the median length of the training reviews. Long: above the third quartile (cut at 512 tokens). Each method
trains on the same short rows, is set to the same FLOPs speedup on held-out short rows, and then reads long rows as it is.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import thresher
from records import record
from starts import HELD_OUT, SPLIT_SEED
from thresher.measure.run import run, run_packed
from thresher.policy import Stage
from thresher.tasks.data import load_rows
from thresher.tasks.text import TextTask

HARD = (Stage(name="hard", mode="hard", learning_rate=2e-5),)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", required=True, type=Path)
    parser.add_argument("--start", required=True, type=Path)
    parser.add_argument("--train", type=int, default=2_000)
    parser.add_argument("--test", type=int, default=600)
    parser.add_argument("--speedup", type=float, default=2.0)
    args = parser.parse_args()
    thresher.keep_memory()

    tokenizer = AutoTokenizer.from_pretrained(args.start)
    shuffled = load_rows(args.data_dir / "imdb", split="train").shuffle(seed=SPLIT_SEED)
    unseen, rows = shuffled.select(range(HELD_OUT)), shuffled.select(range(HELD_OUT, HELD_OUT + 8_000))
    test = load_rows(args.data_dir / "imdb", split="test").shuffle(seed=SPLIT_SEED).select(range(6_000))
    task = TextTask.infer(rows)
    unseen, rows, test = (task.encode(part, tokenizer, 512).rows for part in (unseen, rows, test))
    lengths = np.array([len(ids) for ids in rows["input_ids"]])
    median, third = np.quantile(lengths, 0.5), np.quantile(lengths, 0.75)
    train = rows.select(np.flatnonzero(lengths <= median)[: args.train])
    unseen_lengths = np.array([len(ids) for ids in unseen["input_ids"]])
    calibration = unseen.select(np.flatnonzero(unseen_lengths <= median)[:200])
    test_lengths = np.array([len(ids) for ids in test["input_ids"]])
    parts = {
        "short": test.select(np.flatnonzero(test_lengths <= median)[: args.test]),
        "long": test.select(np.flatnonzero(test_lengths > third)[: args.test]),
    }

    def accuracy(predictions: np.ndarray, part: str) -> float:
        return float((predictions.argmax(-1) == np.array(parts[part]["labels"])).mean())

    mean = float(lengths[lengths <= median].mean())
    fractions = (0.8, 0.6, 0.45, 0.3, 0.2, 0.1)
    methods = {
        "LTP (learned thresholds)": (thresher.LTP(temperature=5e-4), None),
        "fractions of each row": (thresher.AttentionMass(retention=fractions), HARD),
        "the same count for every row": (
            thresher.AttentionMass(counts=tuple(round(f * mean) for f in fractions)),
            HARD,
        ),
    }
    packed = {}
    for name, (policy, stages) in methods.items():
        model = AutoModelForSequenceClassification.from_pretrained(args.start)
        if not packed:
            thresher.attach(model)
            packed = {part: accuracy(run_packed(model, data).predictions, part) for part, data in parts.items()}
            print("packed", packed, flush=True)
        with tempfile.TemporaryDirectory() as scratch:
            thresher.fit(
                model, policy, train, tokenizer, scratch, validation=calibration, speedup=args.speedup, stages=stages
            )
        for part, data in parts.items():
            found = run(model, data)
            value = accuracy(found.predictions, part)
            print(f"{name}, {part}: {value:.4f} at {found.speedup:.2f}x", flush=True)
            record(
                "length_shift",
                f"length-shift-{policy.method}{'-counts' if 'count' in name else ''}-{part}",
                f"accuracy on {part} reviews: {name}, trained on short ones",
                100 * value,
                "%",
                baseline=f"the start, packed, nothing dropped: {100 * packed[part]:.1f} %",
                data="imdb",
                split="test",
                examples=len(data),
                seeds=[0],
                spread={"flops_speedup": round(found.speedup, 3)},
                note=f"MiniLM-L6, at most 512 tokens; short <= {median:.0f} tokens, long > {third:.0f}; {len(train)} training "
                f"rows a stage, set to {args.speedup}x on 200 held-out short rows; the start itself was "
                "fine-tuned on reviews of every length, cut at 256 tokens",
            )


if __name__ == "__main__":
    main()
