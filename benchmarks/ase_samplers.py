"""Three ways to search retention configurations, with as many evaluations each: whose frontier covers more?

    python benchmarks/ase_analysis.py ubuntu_irc samplers --data-dir DIR --start STARTS/ubuntu_irc --out RUNS/ase-ubuntu_irc

Judged by MRR, which has more values than R@1 on so few dialogues, and on the dialogues that were searched on: what is compared
is how well each maximises what it is given. Configurations that several searches ask for are run once.
"""

from __future__ import annotations

from typing import get_args

import numpy as np

import thresher
from responses import Bench, Encoded, Judge
from thresher.frontier import Frontier, Point
from thresher.model import policy_of
from thresher.proposals import Configuration, Sampler, Values
from thresher.report import Chart, Series
from thresher.searching import search_frontier

MARKS = 10  # how often a search's frontier is looked at


def samplers(bench: Bench) -> None:
    """The hypervolume of the frontier that each sampler has found after so many evaluations, over several seeds."""
    args = bench.args
    dialogues, called = bench.dialogues("validation")
    dialogues = dialogues.select(range(min(args.searched, len(dialogues))))
    rows = Encoded(bench.task.encode(dialogues, bench.tokenizer).rows, called)
    model = bench.model(thresher.ASE())
    judge, layers = Judge(bench, model, rows), policy_of(model).geometry.layers
    candidates = len(rows.rows) // rows.dialogues
    chance = sum(1 / rank for rank in range(1, candidates + 1)) / candidates

    def evaluate(configuration: Configuration) -> Values:
        found = judge(configuration)
        return found.metrics["MRR"], found.speedup

    def search(sampler: Sampler, seed: int) -> list[float]:
        """Hypervolumes at the marks."""
        points: list[Point] = []
        search_frontier(
            evaluate, layers, evaluations=args.evaluations, sampler=sampler, seed=seed, on_evaluation=points.append
        )
        volumes = [Frontier(tuple(points[:mark])).hypervolume((1.0, chance)) for mark in marks]
        print(f"{sampler}, seed {seed}: {len(points)} evaluations, hypervolume {volumes[-1]:.4f}", flush=True)
        return volumes

    marks = sorted({max(round(args.evaluations * part / MARKS), 1) for part in range(1, MARKS + 1)})
    seeds = list(range(args.searches))
    series = []
    for sampler in get_args(Sampler):
        found = np.array([search(sampler, seed) for seed in seeds])  # [seeds, marks]
        mean = found.mean(0).tolist()
        series.append(Series(sampler, tuple(marks), tuple(mean)))
        bench.record(
            "ase_samplers",
            f"ase-samplers-{bench.label}-{sampler}",
            f"hypervolume of the frontier after {args.evaluations} evaluations: {sampler}",
            mean[-1],
            "MRR x speedup",
            rows,
            baseline=f"counted from a speedup of 1 and the MRR of chance, {chance:.3f}",
            spread=[round(value, 5) for value in found[:, -1].tolist()],
            seeds=seeds,
            note="dual attention on the fine-tuned start, not trained for it; on the dialogues searched on; all searches begin "
            "with the same configurations of one ratio for all layers",
        )
    bench.draw(
        Chart(
            title=f"What a search has found, {bench.label}: mean of {len(seeds)} seeds",
            x_label="Configurations evaluated",
            y_label="Hypervolume of the frontier",
            series=tuple(series),
        ),
        f"ase-samplers-{bench.label}",
    )
