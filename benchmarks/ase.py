"""Attend, Select and Eliminate on dialogues: Algorithm 1, against the same fine-tuned model run packed.

    python benchmarks/ase.py ubuntu_irc --data-dir DIR --start STARTS/ubuntu_irc --out RUNS/ase-ubuntu_irc
    python benchmarks/ase.py ubuntu_irc --data-dir DIR --start STARTS/ubuntu_irc --out RUNS/ase-ubuntu_irc --measure

Configurations are searched with dual attention on validation dialogues, the model learns from itself under all of them, and
they are measured again; then the test split is read at the points nearest to the paper's speedups, also with the start
itself under the same configurations (without self-distillation). --measure: the wall-clock of those points.
"""

from __future__ import annotations

from typing import Any

import thresher
from responses import SETTINGS, WORTH, Bench, Encoded, Judge, keep, kept, parser, training_options
from settling import nearest
from thresher.frontier import Point, configured
from thresher.measure.latency import compare
from thresher.model import attachment_of, policy_of, set_config
from thresher.report import frontier_chart
from thresher.training.frontiers import TRAINED

NAME = "ase"
TARGETS = {1.1: "<= 0", 1.4: "<= 0", 1.5: "<= 1.5", 2.0: "<= 1.5", 2.3: None}


def trained(bench: Bench, validation: Encoded) -> Any:
    """ASE's model in OUT/ase: loaded, or trained; a training that was interrupted goes on."""
    directory, args = bench.args.out / NAME, bench.args
    start = bench.model()
    about = bench.settings(start, validation)
    if (found := kept(directory, about)) is not None:
        return found
    rows = bench.training()
    print(f"{len(rows)} pairs to train on, {args.passes} passes", flush=True)
    return thresher.fit(
        start,
        bench.fitted(thresher.ASE(), start),
        rows,
        bench.tokenizer,
        directory,
        validation=validation.rows,
        quality=validation.worth,
        search={"evaluations": args.evaluations, "label": WORTH},
        overrides={"epochs": args.passes / len(rows)},
        seed=args.seed,
        notes=keep(about),
        progress=False,
    )


def main() -> None:
    options = parser(__doc__)
    training_options(options)
    options.add_argument("--measure", action="store_true", help="only wall-clock, of what is trained already")
    options.add_argument("--rows", type=int, default=128, help="pairs to take the time of")
    options.add_argument("--rounds", type=int, default=7)
    bench = Bench(options.parse_args())
    if bench.args.measure and not (bench.args.out / NAME / SETTINGS).is_file():
        raise SystemExit(f"There is nothing trained in {bench.args.out / NAME}: run without --measure first.")
    validation, test = bench.encoded("validation"), bench.encoded("test")
    model = trained(bench, validation)
    points_of = [Point.from_dict(point) for point in attachment_of(model).notes[TRAINED]]
    picked = {target: point for target in TARGETS if (point := nearest(points_of, target)) is not None}
    if bench.args.measure:
        model.to("cpu")
        for target, point in picked.items():
            wall_clock(bench, model, test, target, point, last=target == max(picked))
        return
    note = (
        f"at most {bench.task.max_length} tokens; {bench.args.evaluations} configurations searched on "
        f"{validation.dialogues} validation dialogues by MRR, {len(points_of)} left; {bench.args.passes} training passes"
    )
    start = bench.model(thresher.ASE())
    judges = {"self-distilled": Judge(bench, model, test), "the start itself": Judge(bench, start, test)}
    baseline = judges["the start itself"](packed=True)
    points: dict[str, list[tuple[float, float]]] = {}
    for target, point in picked.items():
        for name, judge in judges.items():
            found = judge(point.retention)
            points.setdefault(name, []).append((found.speedup, found.quality))
            distilled = name == "self-distilled"
            bench.record(
                "ase",
                f"ase-{bench.label}-{target}" + ("" if distilled else "-undistilled"),
                f"R@1 lost at about {target}x FLOPs: ASE{'' if distilled else ', without self-distillation'}",
                found.lost(baseline),
                "points",
                test,
                target=TARGETS[target] if distilled else None,
                baseline=f"the same start, packed, nothing dropped: R@1 {baseline.quality:.4f}",
                spread=found.spread(baseline),
                note=note,
            )
    label = f"R@1 on {bench.label}"
    bench.draw(frontier_chart(points, baseline=baseline.quality, quality_label=label), f"ase-{bench.label}")


def wall_clock(bench: Bench, model: Any, test: Encoded, target: float, point: Point, *, last: bool) -> None:
    """Time of the model as trained, at one point, on the first test pairs; with the last what holds for every point."""
    set_config(model, configured(policy_of(model).config, point.retention))
    rows = Encoded(test.rows.select(range(min(bench.args.rows, len(test.rows)))), test.split)
    found = compare(model, rows.rows, batch_size=32, rounds=bench.args.rounds)
    note = (
        f"{len(rows.rows)} pairs, batch 32, {found.threads} threads, fp32, {found.tokens_per_row:.0f} tokens a pair; FLOPs "
        f"speedup on these pairs {found.flops:.3f}"
    )
    lines = [
        (
            f"measured-{target}",
            f"ASE measured speedup at about {target}x FLOPs",
            found.measured,
            "packed, nothing dropped",
        )
    ]
    if last:
        lines += [
            ("kernels", "oneDNN's float32 kernels over torch's own", found.kernels, "packed, torch's own kernels"),
            ("padding", "padding-only ratio of the same model", found.padding_only, "stock, padded, arrival order"),
        ]
    for id, what, spread, baseline in lines:
        quartiles = [round(spread.low, 4), round(spread.high, 4)]
        about = {"baseline": baseline, "spread": quartiles, "note": note}
        bench.record("ase_speed", f"ase-{bench.label}-{id}", what, spread.median, "x", rows, **about)


if __name__ == "__main__":
    main()
