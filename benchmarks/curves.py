"""Accuracy against FLOPs on IMDb: LTP and the rules it is compared with, as a plot.

    python benchmarks/curves.py --data-dir DIR --start STARTS/imdb --ltp RUNS/ltp-imdb/seed-0

Every rule runs on the fine-tuned start without training, at settings calibrated to the same FLOPs; LTP also as trained,
its thresholds scaled up and down without training again.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from transformers import AutoModelForSequenceClassification, AutoTokenizer

import thresher
from ltp import score, splits
from records import record
from settling import settled
from thresher.measure.run import run, run_packed
from thresher.report import frontier_chart, save_chart

PLOT = Path(__file__).parent.parent / "docs" / "img" / "ltp-curves.svg"
SPEEDUPS = (1.5, 2.0, 2.5, 3.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", required=True, type=Path)
    parser.add_argument("--start", required=True, type=Path)
    parser.add_argument("--ltp", required=True, type=Path)
    parser.add_argument("--test", type=int, default=1_000)
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.start)
    task, _, calibration, test = splits("imdb", args.data_dir, tokenizer, train=1, calibration=100, test=args.test)
    start = thresher.attach(AutoModelForSequenceClassification.from_pretrained(args.start))
    baseline = score(task, run_packed(start, test).predictions, test)
    models = {"LTP, trained": thresher.load(args.ltp)}
    for policy in (
        thresher.RisingThreshold(),
        thresher.RelativeThreshold(),
        thresher.CascadeTopK(),
        thresher.AttentionMass(),
        thresher.RandomTokens(),
    ):
        model = AutoModelForSequenceClassification.from_pretrained(args.start)
        models[f"{policy.method}, untrained"] = thresher.attach(model, policy)
    points: dict[str, list[tuple[float, float]]] = {}
    for name, model in models.items():
        for target in settled(model, calibration, SPEEDUPS):
            found = run(model, test)
            value = score(task, found.predictions, test)
            points.setdefault(name, []).append((found.speedup, value))
            print(f"{name}: {found.speedup:.2f}x {value:.4f}", flush=True)
            record(
                "curves",
                f"imdb-curve-{name.replace(', ', '-').replace(' ', '-').lower()}-{target}",
                f"accuracy on IMDb at about {target}x FLOPs: {name}",
                100 * value,
                "%",
                baseline=f"packed, nothing dropped: {100 * baseline:.1f} %",
                spread={"flops_speedup": round(found.speedup, 3)},
                data="imdb",
                split="test",
                examples=len(test),
                seeds=[0],
                note="MiniLM-L6, 256 tokens; calibrated on 100 held-out training rows",
            )
    PLOT.parent.mkdir(parents=True, exist_ok=True)
    save_chart(
        frontier_chart(points, baseline=baseline, quality_label="accuracy on IMDb, 256 tokens", max_loss=0.01), PLOT
    )


if __name__ == "__main__":
    main()
