"""Block-Skim on SQuAD: joint training against plain fine-tuning, and the frontier of speedup and F1.

    python benchmarks/block_skim.py --data-dir DIR --out RUNS/squad --seeds 0 1 2

The same MiniLM, data, epochs and learning rate with and without the block predictors' loss. Thresholds are set to speedups on
held-out questions; F1 lost is against the plain model of the same seed, run packed.
"""

from __future__ import annotations

from statistics import mean
from typing import Any

import thresher
from questions import Bench, Judged, parser
from records import RESULTS
from thresher.errors import TargetError
from thresher.policy import Stage
from thresher.report import frontier_chart, save_chart

SPEEDUPS = (1.15, 1.3, 1.6, 2.0)
TARGETS = {1.3: "<= 0.5", 1.6: "<= 1.0"}
CHART = RESULTS.parent.parent / "docs" / "img" / "block-skim-squad.svg"


def plain(bench: Bench, seed: int) -> Any:
    stage = Stage(name="plain", mode="off", epochs=bench.args.epochs, learning_rate=bench.args.learning_rate)
    return bench.trained("plain", thresher.BlockSkim(), seed, stages=(stage,))


def joint(bench: Bench, seed: int) -> Any:
    overrides = {"epochs": bench.args.epochs, "learning_rate": bench.args.learning_rate}
    return bench.trained("joint", thresher.BlockSkim(), seed, overrides=overrides)


def frontier(bench: Bench, model: Any) -> dict[float, Judged]:
    """What the model is worth when its threshold is set to each speedup on held-out questions."""
    found = {}
    for speedup in SPEEDUPS:
        try:
            thresher.calibrate(model, bench.held_out.rows, speedup=speedup, tolerance=0.02)
        except TargetError as error:
            print(error)
            continue
        found[speedup] = bench.judge(model)
        print(f"{speedup}x asked: {found[speedup].speedup:.3f}x, F1 {found[speedup].f1:.2f}", flush=True)
    return found


def main() -> None:
    bench = Bench(parser(__doc__).parse_args())
    plains, joints, frontiers = [], [], []
    for seed in bench.args.seeds:
        plains.append(bench.judge(plain(bench, seed), packed=True))
        model = joint(bench, seed)
        joints.append(bench.judge(model, packed=True))
        print(f"seed {seed}: plain {plains[-1].f1:.2f}, joint {joints[-1].f1:.2f}", flush=True)
        frontiers.append(frontier(bench, model))
    args = bench.args
    about = {
        "baseline": f"plain fine-tuning, packed: F1 {mean(p.f1 for p in plains):.2f}, EM {mean(p.exact for p in plains):.2f}",
        "note": f"MiniLM-L6, {len(bench.train)} training windows of at most 384 tokens, {args.epochs:g} epochs, learning rate "
        f"{args.learning_rate:g}; blocks of 32; thresholds set on {len(bench.held_out.ids)} held-out questions",
    }
    for name, target in (("f1", ">= 0"), ("exact", ">= 0")):
        gains = [getattr(j, name) - getattr(p, name) for j, p in zip(joints, plains, strict=True)]
        bench.record("block_skim", f"block-skim-joint-{name}", f"{name} gained by joint training, nothing dropped", mean(gains),
                     "points", target=target, spread=[round(g, 3) for g in gains], **about)  # fmt: skip
    points = []
    for speedup in SPEEDUPS:
        rows = [(f[speedup], p) for f, p in zip(frontiers, plains, strict=True) if speedup in f]
        if not rows:
            continue
        lost = [found.lost(start) for found, start in rows]
        points.append((mean(found.speedup for found, _ in rows), mean(found.f1 for found, _ in rows)))
        spread = {"flops_speedup": round(points[-1][0], 3), "each": [round(x, 3) for x in lost],
                  "standard_error": round(rows[0][0].uncertainty(rows[0][1]), 3)}  # fmt: skip
        bench.record("block_skim", f"block-skim-squad-{speedup}", f"F1 lost by skimming at about {speedup}x FLOPs", mean(lost),
                     "points", target=TARGETS.get(speedup), spread=spread, **about)  # fmt: skip
    chart = frontier_chart({"Block-Skim": points}, baseline=mean(p.f1 for p in plains), quality_label="F1 on SQuAD")
    print("drawn:", save_chart(chart, bench.args.out / CHART.name if bench.dry else CHART))


if __name__ == "__main__":
    main()
