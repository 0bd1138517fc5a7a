"""The analyses of the ASE paper on a fine-tuned start, without training.

    python benchmarks/ase_analysis.py ubuntu_irc selection --data-dir DIR --start STARTS/ubuntu_irc --out RUNS/ase-ubuntu_irc

selection: dual attention, attention mass, and only the last, first or random k utterances (figure 4). kth: only the k-th
utterance from the last (5a). survival: which third of the context the kept tokens lie in (5b, 5c). alpha: the weight of a
context token's own side (6), and ASE's other options. samplers: see ase_samplers.py.

Where methods are compared, they read under one retention configuration: the default curve, to such a power that dual
attention reaches the speedup on validation dialogues.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import numpy as np
import torch

import thresher
from ase_samplers import samplers
from responses import Bench, Encoded, Judge, parser
from thresher.errors import TargetError
from thresher.measure.flops import dense_flops
from thresher.measure.run import answers, prepared
from thresher.model import evaluating, policy_of
from thresher.policy import PolicyConfig, tracing
from thresher.report import Chart, Series
from thresher.tasks.responses import ResponseTask, Utterances, thirds

KS = (3, 4, 5)
LONGER_THAN = (6, 8, 10, 12)
FEW = 30  # dialogues, below which nothing is drawn
RATIOS = (0.0, 0.1, 0.25, 0.5, 1.0, 2.0)  # alpha / beta of context tokens
SPEEDUPS = (1.5, 2.0, 2.5)


def configuration(bench: Bench, policy: PolicyConfig, rows: Encoded, speedup: float) -> tuple[float, ...]:
    """The default curve to the power that gives a method this speedup."""
    model = bench.model(policy)
    thresher.calibrate(model, rows.sample(), speedup=speedup, tolerance=0.02)
    return tuple(policy_of(model).fractions)


# --- figure 4 ---------------------------------------------------------------------------------------------------------


def selection(bench: Bench) -> None:
    """Utterances chosen at the input against tokens chosen on the way, at the speedups of the last k utterances."""
    whole, validation = bench.encoded("test"), bench.encoded("validation")
    start = bench.model(thresher.ASE())
    baseline, geometry = Judge(bench, start, whole)(packed=True), policy_of(start).geometry

    def work(rows: Encoded) -> int:
        return sum(dense_flops(geometry, len(ids)) for ids in rows.rows["input_ids"])

    points: dict[str, list[tuple[float, float]]] = {}
    speedups: dict[int, float] = {}

    def note_down(name: str, k: int, quality: float, speedup: float, how: str) -> None:
        points.setdefault(name, []).append((speedup, quality))
        bench.record(
            "ase_selection",
            f"ase-selection-{bench.label}-{name.lower().replace(' ', '-')}-{k}",
            f"R@1 of {name} {how}",
            100 * quality,
            "%",
            whole,
            baseline=f"the same start, packed, whole contexts: R@1 {100 * baseline.quality:.2f} %",
            spread={"flops_speedup": round(speedup, 3)},
            note="the fine-tuned start, not trained for any of it",
        )

    for kind, k in product(("last", "first", "random"), KS):
        chosen = ResponseTask(bench.task.max_length, utterances=Utterances(kind, k, bench.args.seed))
        rows = Encoded(chosen.encode(bench.dialogues("test")[0], bench.tokenizer).rows, whole.split)
        speedup = work(whole) / work(rows)
        if kind == "last":
            speedups[k] = speedup
        note_down(kind, k, Judge(bench, start, rows)(packed=True).quality, speedup, f"{k} utterances, packed")
    for k, speedup in speedups.items():
        try:
            retention = configuration(bench, thresher.ASE(), validation, speedup)
        except TargetError as error:
            print(error)
            continue
        for name, policy in (("dual attention", thresher.ASE()), ("attention mass", thresher.AttentionMass())):
            found = Judge(bench, bench.model(policy), whole)(retention)
            note_down(name, k, found.quality, found.speedup, f"at about the FLOPs of the last {k} utterances")
    bench.draw(
        Chart(
            title=f"What to select: R@1 on {bench.label} against speedup",
            x_label="FLOPs speedup over the same model without padding",
            y_label=f"R@1 on {bench.label}",
            series=(
                *(Series(name, *zip(*sorted(found), strict=True)) for name, found in points.items()),
                Series("whole context", (math.nan,), (baseline.quality,), "level"),
            ),
        ),
        f"ase-selection-{bench.label}",
    )


# --- figure 5 ---------------------------------------------------------------------------------------------------------


def kth(bench: Bench) -> None:
    """Only one utterance of long contexts, from the last one backwards."""
    dialogues, called = bench.dialogues("test")
    lengths = np.array([len(context) for context in dialogues["context"]])
    counts = {more: int((lengths > more).sum()) for more in LONGER_THAN}
    print("dialogues with more utterances than", counts)
    drawn: dict[int, dict[int, float]] = {more: {} for more in LONGER_THAN if counts[more] >= (1 if bench.dry else FEW)}
    if not drawn:
        raise SystemExit(f"Too few dialogues are long: more utterances than {counts}.")
    start = bench.model()
    for k in range(1, max(drawn) + 1):
        enough = np.flatnonzero(lengths > min(more for more in drawn if more >= k))
        task = ResponseTask(bench.task.max_length, utterances=Utterances("kth-from-last", k))
        rows = Encoded(task.encode(dialogues.select(enough), bench.tokenizer).rows, called)
        hits = np.array(Judge(bench, start, rows)(packed=True).hits)
        for more, found in drawn.items():
            if more >= k:
                found[k] = float(hits[lengths[enough] > more].mean())
    for more, found in drawn.items():
        bench.record(
            "ase_kth",
            f"ase-kth-{bench.label}-{more}",
            f"R@1 by the last utterance alone, contexts of more than {more}",
            100 * found[1],
            "%",
            rows,
            examples=counts[more],
            spread={f"utterance {k}": round(100 * value, 1) for k, value in found.items() if k > 1},
            note="counted from the last, each utterance alone before the response; the fine-tuned start, nothing dropped",
        )
    bench.draw(
        Chart(
            title=f"One utterance as the context: R@1 on {bench.label}",
            x_label="Which utterance, counted from the last",
            y_label=f"R@1 on {bench.label}",
            series=tuple(
                Series(f"> {more} utterances ({counts[more]})", tuple(found), tuple(found.values()))
                for more, found in drawn.items()
            ),
        ),
        f"ase-kth-{bench.label}",
    )


def shares(model: Any, rows: Encoded, layers: int) -> np.ndarray:
    """[layers + 1, 3], the share of the context tokens kept after each layer (0: at the input) in each third."""
    counts = np.zeros((layers + 1, 3))
    numbers = rows.rows["utterance"][:]
    with evaluating(model), torch.inference_mode():
        for index, batch in prepared(model, rows.rows):
            with tracing(record=True) as traces:
                answers(model, batch)
            gone = traces[0].dropped_at().cpu().numpy()
            for row, dropped in zip(index, gone, strict=True):
                third = np.array(thirds(numbers[row]))
                dropped = dropped[: len(third)]
                for layer in range(layers + 1):
                    left = (dropped == 0) | (dropped > layer)
                    counts[layer] += np.bincount(third[left & (third >= 0)], minlength=3)
    return counts / counts.sum(1, keepdims=True)


def survival(bench: Bench) -> None:
    """The thirds of the context in which attention mass and dual attention find what they keep, under one configuration."""
    dialogues, called = bench.dialogues("test")
    dialogues = dialogues.select(range(min(bench.args.read, len(dialogues))))
    rows = Encoded(bench.task.encode(dialogues, bench.tokenizer, parts=True).rows, called)
    retention = configuration(bench, thresher.ASE(), bench.encoded("validation"), bench.args.speedup)
    series = []
    for name, method in (("AM", thresher.AttentionMass), ("DualA", thresher.ASE)):
        found = shares(bench.model(method(retention=retention)), rows, len(retention))
        for third, part in enumerate(("first", "middle", "last")):
            by_layer = found[:, third].tolist()
            series.append(Series(f"{name}, {part} third", tuple(range(len(by_layer))), tuple(by_layer)))
            bench.record(
                "ase_survival",
                f"ase-survival-{bench.label}-{name.lower()}-{part}",
                f"share of the context tokens kept to the end that lie in the {part} third of the context: {name}",
                100 * by_layer[-1],
                "%",
                rows,
                baseline=f"at the input {100 * by_layer[0]:.1f} %",
                spread={f"layer {layer}": round(100 * share, 1) for layer, share in enumerate(by_layer) if layer},
                note=f"one configuration for both, {', '.join(f'{f:.2f}' for f in retention)}: about {bench.args.speedup}x "
                "FLOPs; every candidate with its context; special tokens not counted",
            )
    bench.draw(
        Chart(
            title=f"Where the kept tokens of the context lie, {bench.label}",
            x_label="Layer",
            y_label="Share of the context tokens kept",
            series=tuple(series),
        ),
        f"ase-survival-{bench.label}",
    )


# --- figure 6 ---------------------------------------------------------------------------------------------------------


def alpha(bench: Bench) -> None:
    """Settings of dual attention; on the validation dialogues, as settings are chosen there."""
    rows = bench.encoded("validation")
    baseline = Judge(bench, bench.model(), rows)(packed=True)
    said = f"the same start, packed, nothing dropped: R@1 {100 * baseline.quality:.2f} %"

    def note_down(id: str, what: str, policy: PolicyConfig, retention: Sequence[float]) -> float:
        found = Judge(bench, bench.model(policy), rows)(retention)
        spread = {"flops_speedup": round(found.speedup, 3), "standard_error": round(found.uncertainty(baseline), 2)}
        name, value = f"ase-alpha-{bench.label}-{id}", 100 * found.quality
        note = (
            "the fine-tuned start, untrained; the default curve to a power: one for all alphas and attention mass at "
        )
        note += "a speedup, one for each of the other options"
        bench.record("ase_alpha", name, f"R@1: {what}", value, "%", rows, baseline=said, spread=spread, note=note)
        return found.quality

    series = []
    for speedup in SPEEDUPS:
        retention = configuration(bench, thresher.ASE(), rows, speedup)
        values = []
        for ratio in RATIOS:
            what = f"dual attention, alpha / beta {ratio}, at about {speedup}x FLOPs"
            policy = thresher.ASE(alpha_context=ratio / (1 + ratio))
            values.append(note_down(f"{ratio}-{speedup}", what, policy, retention))
        mass = note_down(
            f"mass-{speedup}", f"attention mass at about {speedup}x FLOPs", thresher.AttentionMass(), retention
        )
        series += [
            Series(f"DualA {speedup}x", RATIOS, tuple(values)),
            Series(f"AM {speedup}x", (math.nan,), (mass,), "level"),
        ]
    for budget, place in product(("shared", "apart"), ("before feed-forward", "after feed-forward")):
        policy = thresher.ASE(budget=budget, place=place)
        retention = configuration(bench, policy, rows, 2.0)
        id = f"{budget}-{place.split()[0]}"
        note_down(id, f"dual attention, budget {budget}, drops {place}, at about 2x FLOPs", policy, retention)
    bench.draw(
        Chart(
            title=f"The weight of a context token's own side, {bench.label}",
            x_label="alpha / beta of context tokens",
            y_label=f"R@1 on {bench.label}, validation",
            series=tuple(series),
        ),
        f"ase-alpha-{bench.label}",
    )


ANALYSES: dict[str, Callable[[Bench], None]] = {
    "selection": selection,
    "kth": kth,
    "survival": survival,
    "alpha": alpha,
    "samplers": samplers,
}


def main() -> None:
    options: argparse.ArgumentParser = parser(__doc__)
    options.add_argument("analysis", choices=sorted(ANALYSES))
    options.add_argument("--read", type=int, default=200, help="dialogues to follow the tokens of (survival)")
    options.add_argument("--speedup", type=float, default=2.0, help="of survival's configuration")
    options.add_argument("--evaluations", type=int, default=100, help="of one search (samplers)")
    options.add_argument("--searched", type=int, default=30, help="dialogues to search on (samplers)")
    options.add_argument("--searches", type=int, default=3, help="of every sampler, with seeds from 0")
    args = options.parse_args()
    ANALYSES[args.analysis](Bench(args))


if __name__ == "__main__":
    main()
