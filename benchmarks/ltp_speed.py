"""Wall-clock of trained LTP models beside their FLOPs, paired and interleaved.

python benchmarks/ltp_speed.py imdb --data-dir DIR --model RUNS/ltp-imdb/seed-0
"""

from __future__ import annotations

import argparse
from pathlib import Path

from transformers import AutoTokenizer

import thresher
from ltp import splits
from records import record
from thresher.measure.latency import compare


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=("imdb", "sst2"))
    parser.add_argument("--data-dir", required=True, type=Path)
    parser.add_argument("--model", required=True, type=Path)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    thresher.keep_memory()
    model, tokenizer = thresher.load(args.model), AutoTokenizer.from_pretrained(args.model)
    *_, test = splits(args.name, args.data_dir, tokenizer, train=1, calibration=1, test=args.rows)
    found = compare(model, test, batch_size=32, rounds=args.rounds)
    about = {
        "data": args.name,
        "split": "test" if args.name == "imdb" else "validation (GLUE dev)",
        "examples": len(test),
        "seeds": [0],
        "note": f"batch 32, {found.threads} threads, fp32, {found.tokens_per_row:.0f} tokens a row; FLOPs speedup on these "
        f"rows {found.flops:.3f}",
    }
    for id, what, spread, baseline in (
        ("measured", "LTP measured speedup", found.measured, "packed, nothing dropped"),
        ("kernels", "oneDNN's float32 kernels over torch's own", found.kernels, "packed, torch's own kernels"),
        ("padding", "padding-only ratio of the same model", found.padding_only, "stock, padded, arrival order"),
    ):
        quartiles = [round(spread.low, 4), round(spread.high, 4)]
        print(id, spread)
        record(
            "ltp_speed", f"ltp-{args.name}-{id}", what, spread.median, "x", baseline=baseline, spread=quartiles, **about
        )


if __name__ == "__main__":
    main()
