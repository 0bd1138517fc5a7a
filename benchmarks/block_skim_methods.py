"""Block-Skim beside other methods on questions: one start, one budget of training, and F1 at equal FLOPs.

--passes: windows that each method reads forward and backward, however its stages share them; what a teacher reads is not
counted. Attention mass and Length-Adaptive search configurations on held-out questions, with as many --evaluations each.
PoWER-BERT and LTP learn one setting each, for --trained-at, and are set to other speedups by their strength. All keep the
question. Leaving out padding gains the same for all of them: it has a row of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import thresher
from block_skim import joint, lost, plain
from questions import METRIC, Bench, Judged
from settling import settled
from thresher.errors import TargetError
from thresher.frontier import NOTE
from thresher.model import attachment_of, policy_of
from thresher.policy import PolicyConfig
from thresher.report import frontier_chart
from thresher.training import frontiers

FILE = "block_skim_methods"
SPEEDUPS = (1.3, 1.6, 2.0)


def _fit(bench: Bench, name: str, policy: PolicyConfig, share: dict[str, float], **options: Any) -> Any:
    faster = {f"{stage}.learning_rate": bench.args.learning_rate for stage in share}
    faster |= options.pop("overrides", {})
    return bench.trained(name, policy, share, overrides=faster, **options)


def block_skim(bench: Bench) -> Any:
    return joint(bench)


def transkimmer(bench: Bench) -> Any:
    return _fit(bench, "transkimmer", thresher.Transkimmer(), {"skim": 1.0})


def ltp(bench: Bench) -> Any:
    """The hard stage is where the quality comes back."""
    return _for_one_speedup(bench, "ltp", thresher.LTP(temperature=5e-4), {"soft": 0.25, "hard": 0.75})


def power_bert(bench: Bench) -> Any:
    policy = thresher.PowerBert(penalty=bench.args.power_penalty)
    faster = {"soft.policy_learning_rate": bench.args.power_rate}
    return _for_one_speedup(bench, "power-bert", policy, {"soft": 0.5, "hard": 0.5}, overrides=faster)


def _for_one_speedup(bench: Bench, name: str, policy: PolicyConfig, share: dict[str, float], **options: Any) -> Any:
    rows, speedup = bench.held_out.rows, bench.args.trained_at
    return _fit(bench, name, policy, share, validation=rows, speedup=speedup, **options)


def length_adaptive(bench: Bench) -> Any:
    """A step reads its windows whole, under the shortest configuration and under random ones."""
    policy = thresher.LengthAdaptive()
    return _fit(
        bench,
        "length-adaptive",
        policy,
        {"length-drop": 1 / (policy.sandwich + 2)},
        validation=bench.held_out.rows,
        quality=bench.held_out_f1,
        search={"evaluations": bench.args.evaluations, "label": METRIC},
    )


def attention_mass(bench: Bench) -> Any:
    """Configurations are searched for the start; training draws one of them for each step."""
    policy = thresher.AttentionMass()
    found = thresher.search(
        bench.model(policy),
        bench.held_out.rows,
        quality=bench.held_out_f1,
        label=METRIC,
        evaluations=bench.args.evaluations,
        directory=bench.args.out / f"attention-mass-search{bench.suffix}",
    )
    once_for_all = policy_of(bench.model(thresher.ASE())).stages()[0]
    stage = replace(once_for_all, configurations=found.configurations)
    model = _fit(bench, "attention-mass", policy, {stage.name: 1.0}, stages=(stage,))
    if NOTE not in attachment_of(model).notes:
        frontiers.measured(model, bench.held_out.rows, bench.held_out_f1, found)
    return model


METHODS: dict[str, Callable[[Bench], Any]] = {
    "Block-Skim": block_skim,
    "Transkimmer": transkimmer,
    "LTP": ltp,
    "Length-Adaptive": length_adaptive,
    "PoWER-BERT": power_bert,
    "attention mass": attention_mass,
}


def main(bench: Bench) -> None:
    names = bench.args.methods or list(METHODS)
    if unknown := sorted(set(names) - set(METHODS)):
        raise SystemExit(f"There is no method {', '.join(unknown)}; there are {', '.join(METHODS)}.")
    label = f"block-skim-methods-{bench.args.label}{bench.suffix}"
    reference = plain(bench)
    start = bench.judge(reference, packed=True)
    width = bench.task.max_length
    bench.record(
        FILE,
        f"{label}-padding",
        f"FLOPs of padding every window to {width} tokens, over none: what leaving out padding alone gains",
        bench.padding(reference, width),
        "ratio",
        baseline="no padding, nothing dropped: what every speedup here is counted from",
    )
    points: dict[str, list[tuple[float, float]]] = {}
    for name in names:
        print(f"== {name}", flush=True)
        try:
            model = METHODS[name](bench)
        except TargetError as error:  # the others need not wait for better settings of this one
            print(error, flush=True)
            continue
        for speedup in settled(model, bench.held_out.rows, SPEEDUPS):
            found: Judged = bench.judge(model)
            points.setdefault(name, []).append((found.speedup, found.f1))
            bench.record(
                FILE,
                f"{label}-{name.lower().replace(' ', '-')}-{speedup}",
                f"F1 lost at about {speedup}x FLOPs: {name}",
                found.lost(start),
                "points",
                baseline=f"plain training, packed: F1 {start.f1:.2f}",
                spread=lost(found, start),
                cell=("F1 lost", name, f"about {speedup}x"),
                note=f"{bench.args.evaluations} evaluations for each method that searches; PoWER-BERT and LTP trained at "
                f"{bench.args.trained_at}x",
            )
    chart = frontier_chart(points, baseline=start.f1, quality_label="F1 on SQuAD")
    bench.draw(chart, f"question-methods-{bench.args.label}")
