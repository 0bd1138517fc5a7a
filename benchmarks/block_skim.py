"""Block-Skim on SQuAD, one part a command. Every part can be interrupted and given again; parts with one --out share models.

    python benchmarks/block_skim.py PART --data-dir DIR --out RUNS/squad [--start DIR] [--long] [--questions N]

joint         joint training against plain training, nothing dropped (--seeds 0 1 2)
frontier      F1 lost against FLOPs, as the threshold falls
ablations     block sizes, frozen model, skimming while training, the full map; how often predictors are right, by layer
methods       Block-Skim beside other methods, all from one start with one budget, at equal FLOPs
measure       wall-clock in batches of 8, paired, beside FLOPs
compression   on a student of half the layers, and on the model without half its heads

All begin from one start, which answers questions already: --start, or MiniLM trained in OUT. Another backbone is another
--start. Thresholds are set on held-out articles, never on the dev set; F1 lost is against the plain model, run packed, that was
trained from the same start for as long.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from statistics import mean
from typing import Any

import thresher
from questions import Bench, Judged, parser
from settling import settled
from thresher.measure.latency import compare
from thresher.model import policy_of, set_config
from thresher.policy import Stage
from thresher.report import frontier_chart

FILE = "block_skim"
SPEEDUPS = (1.15, 1.3, 1.6, 2.0)
TARGETS = {1.3: "<= 0.5", 1.6: "<= 1.0"}
LONG_TARGETS = {2.0: "<= 1.0"}


def plain(bench: Bench, seed: int = 0) -> Any:
    """Trained as the joint model is, without the predictors' loss."""
    rate = bench.args.learning_rate
    stage = Stage(name="plain", mode="off", epochs=bench.args.passes / len(bench.train), learning_rate=rate)
    return bench.trained("plain", thresher.BlockSkim(), {"plain": 1.0}, seed=seed, stages=(stage,))


def joint(
    bench: Bench,
    policy: thresher.BlockSkim | None = None,
    name: str = "joint",
    seed: int = 0,
    start: Path | None = None,
) -> Any:
    """Trained by Block-Skim's one stage."""
    policy = policy or thresher.BlockSkim(alpha=bench.args.alpha)
    stage = "joint" if policy.learning == "joint" else policy.learning
    faster = {} if policy.learning == "frozen" else {f"{stage}.learning_rate": bench.args.learning_rate}
    return bench.trained(name, policy, {stage: 1.0}, seed=seed, start=start, overrides=faster)


def skimming_at(model: Any, layers: list[int] | None) -> Any:
    """The model, set to drop after the attention of these layers alone; what other layers' predictors say is not asked."""
    if layers:
        set_config(model, replace(policy_of(model).config, layers=tuple(layers)))
    return model


def at(bench: Bench, model: Any, speedups: tuple[float, ...] = SPEEDUPS) -> Iterator[tuple[float, Judged]]:
    """What the model is worth when its threshold is set to each speedup on held-out questions, the model set to it."""
    for speedup in settled(model, bench.held_out.rows, speedups, tolerance=0.02):
        yield speedup, bench.judge(model)


def lost(found: Judged, start: Judged) -> dict[str, Any]:
    """What a record of F1 lost says beside it."""
    return {
        "flops_speedup": round(found.speedup, 3),
        "f1": round(found.f1, 2),
        "exact": round(found.exact, 2),
        "standard_error": round(found.uncertainty(start), 3),
    }


def run_joint(bench: Bench) -> None:
    seeds = bench.args.seeds
    plains = [bench.judge(plain(bench, seed), packed=True) for seed in seeds]
    joints = [bench.judge(joint(bench, seed=seed), packed=True) for seed in seeds]
    baseline = f"plain training: F1 {mean(p.f1 for p in plains):.2f}, EM {mean(p.exact for p in plains):.2f}"
    for name in ("f1", "exact"):
        gains = [getattr(j, name) - getattr(p, name) for j, p in zip(joints, plains, strict=True)]
        bench.record(
            FILE,
            f"block-skim-joint-{bench.args.label}-{name}{bench.suffix}",
            f"{name} gained by joint training, nothing dropped",
            mean(gains),
            "points",
            target=">= 0",
            baseline=baseline,
            spread=[round(gain, 3) for gain in gains],
            seeds=seeds,
        )


def run_frontier(bench: Bench) -> None:
    seeds, found = bench.args.seeds, {}
    plains = {seed: bench.judge(plain(bench, seed), packed=True) for seed in seeds}
    for seed in seeds:
        for speedup, judged in at(bench, joint(bench, seed=seed)):
            found[seed, speedup] = judged
    points = []
    for speedup in SPEEDUPS:
        rows = [(found[seed, speedup], plains[seed]) for seed in seeds if (seed, speedup) in found]
        if not rows:
            continue
        points.append((mean(one.speedup for one, _ in rows), mean(one.f1 for one, _ in rows)))
        bench.record(
            FILE,
            f"block-skim-squad-{bench.args.label}{bench.suffix}-{speedup}",
            f"F1 lost by skimming at about {speedup}x FLOPs",
            mean(one.lost(start) for one, start in rows),
            "points",
            target=(LONG_TARGETS if bench.args.long else TARGETS).get(speedup),
            baseline=f"plain training, packed: F1 {mean(start.f1 for _, start in rows):.2f}",
            spread={**lost(*rows[0]), "each": [round(one.lost(start), 3) for one, start in rows]},
            seeds=seeds,
        )
    level = mean(one.f1 for one in plains.values())
    chart = frontier_chart({"Block-Skim": points}, baseline=level, quality_label="F1 on SQuAD")
    bench.draw(chart, f"block-skim-{bench.args.label}")


def run_measure(bench: Bench) -> None:
    """--rows windows of the dev set in arrival order, --rounds rounds, every way in every round."""
    args = bench.args
    model = skimming_at(joint(bench), args.skim_at)
    places = f"-at-{'-'.join(map(str, args.skim_at))}" if args.skim_at else ""
    how = f", skimming at layers {args.skim_at} alone" if args.skim_at else ""
    count = min(args.rows, len(bench.dev.rows))
    rows = bench.dev.rows.select(range(count))
    padding = None
    for speedup, judged in at(bench, model):
        found = compare(model, rows, batch_size=args.batch_size, rounds=args.rounds)
        spread, padding = found.measured, found.padding_only
        note = f"{count} windows of {found.tokens_per_row:.0f} tokens, {args.rounds} rounds, {found.threads} threads"
        bench.record(
            FILE,
            f"block-skim-measured-{args.label}{bench.suffix}{places}-{speedup}",
            f"wall-clock at about {speedup}x FLOPs, batches of {args.batch_size}{how}",
            spread.median,
            "ratio",
            baseline="the same model, packed, nothing dropped",
            spread={
                "low": round(spread.low, 3),
                "high": round(spread.high, 3),
                "flops_of_these_rows": round(found.flops, 3),
                "by_equation_4": round(found.on_paper or 0.0, 3),
                "flops_of_the_dev_set": round(judged.speedup, 3),
                "f1_of_the_dev_set": round(judged.f1, 2),
            },
            note=note,
        )
        bench.record(
            FILE,
            f"block-skim-realised-{args.label}{bench.suffix}{places}-{speedup}",
            f"share of the FLOPs ratio that the clock shows at about {speedup}x{how}",
            spread.median / found.flops,
            "ratio",
            target=">= 0.85",
            note=note,
        )
    if padding is not None:
        bench.record(
            FILE,
            f"block-skim-measured-{args.label}{bench.suffix}-padding",
            f"wall-clock of leaving out padding alone, batches of {args.batch_size}",
            padding.median,
            "ratio",
            baseline="stock, padded to the longest of its batch",
            spread={"low": round(padding.low, 3), "high": round(padding.high, 3)},
        )


def elsewhere(name: str) -> Callable[[Bench], None]:
    """A part with a file of its own, loaded when it runs."""
    return lambda bench: import_module(f"block_skim_{name}").main(bench)


PARTS: dict[str, Callable[[Bench], None]] = {
    "joint": run_joint,
    "frontier": run_frontier,
    "measure": run_measure,
    **{name: elsewhere(name) for name in ("ablations", "methods", "compression")},
}


def options() -> argparse.ArgumentParser:
    made = parser(__doc__)
    made.add_argument("part", choices=sorted(PARTS))
    some = made.add_argument_group("of one part")
    some.add_argument("--variants", nargs="+", help="ablations: which; default: all")
    some.add_argument("--methods", nargs="+", help="methods: which; default: all")
    some.add_argument("--evaluations", type=int, default=60, help="methods: of a search")
    some.add_argument(
        "--trained-at", type=float, default=1.6, help="methods: speedup of PoWER-BERT and LTP in training"
    )
    some.add_argument("--power-penalty", type=float, default=1e-3, help="methods: of PoWER-BERT's soft stage")
    some.add_argument("--power-rate", type=float, default=3e-3, help="methods: learning rate of its retention vectors")
    some.add_argument("--skim-at", type=int, nargs="+", help="measure: drop at these layers alone")
    some.add_argument("--rows", type=int, default=128, help="measure: windows")
    some.add_argument("--rounds", type=int, default=15, help="measure: rounds")
    some.add_argument("--batch-size", type=int, default=8, help="measure: windows run at a time")
    return made


def main() -> None:
    args = options().parse_args()
    PARTS[args.part](Bench(args))


if __name__ == "__main__":
    main()
