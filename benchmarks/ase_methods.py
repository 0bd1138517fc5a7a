"""ASE and the methods it is compared with: one start, one budget of training, one baseline.

    python benchmarks/ase_methods.py ubuntu_irc --data-dir DIR --start STARTS/ubuntu_irc --out RUNS/ase-ubuntu_irc

--passes: examples that each method reads forward and backward, however its stages share them; what a teacher reads is not
counted. Methods are trained one after the other, each in a directory of its own: one that is complete is not trained again
(ASE's is that of ase.py with the same --out and settings). ASE, attention mass and Length-Adaptive search configurations,
with as many --evaluations each. PoWER-BERT and LTP learn one each, for --trained-at, and are set to other speedups by their
strength, without training again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import Any

import datasets

import thresher
from ase import trained
from responses import WORTH, Bench, Encoded, Judge, keep, kept, parser, training_options
from settling import settled
from thresher.errors import TargetError
from thresher.frontier import NOTE, Frontier, Point
from thresher.model import attachment_of, policy_of
from thresher.policy import PolicyConfig
from thresher.report import frontier_chart

SPEEDUPS = (1.25, 1.5, 2.0, 2.5, 3.0)
TABLE = (1.5, 2.0)  # those of the records; the others are only drawn


class Contest:
    """What all methods share, and how each of them is trained."""

    def __init__(self, bench: Bench, validation: Encoded) -> None:
        self.bench, self.validation = bench, validation
        self.searching = {"evaluations": bench.args.evaluations, "label": WORTH}

    @cached_property
    def rows(self) -> datasets.Dataset:
        return self.bench.training()

    def fit(
        self,
        policy: PolicyConfig,
        name: str,
        share: dict[str, float],
        overrides: dict[str, float] | None = None,
        **options: Any,
    ) -> Any:
        """A method trained in OUT/name with its share of the passes for each stage; loaded where that was done."""
        args, start = self.bench.args, self.bench.model()
        directory = args.out / name
        passes = {f"{stage}.epochs": part * args.passes for stage, part in share.items()}
        about = self.bench.settings(start, self.validation)
        about |= {
            "policy": policy.to_dict(),
            "stages": {**passes, **(overrides or {})},
            "speedup": options.get("speedup"),
        }
        if (found := kept(directory, about)) is not None:
            return found
        return thresher.fit(
            start,
            self.bench.fitted(policy, start),
            self.rows,
            self.bench.tokenizer,
            directory,
            overrides={**{stage: count / len(self.rows) for stage, count in passes.items()}, **(overrides or {})},
            seed=args.seed,
            notes=keep(about),
            progress=False,
            **options,
        )

    def ase(self) -> Any:
        return trained(self.bench, self.validation)

    def attention_mass(self) -> Any:
        """All that ASE does, a search of its own too, with attention mass instead of dual attention."""
        policy, args = thresher.AttentionMass(), self.bench.args
        frontier = thresher.search(
            self.bench.model(policy),
            self.validation.rows,
            quality=self.validation.worth,
            directory=args.out / "attention-mass-search",
            seed=args.seed,
            **self.searching,
        )
        once_for_all = policy_of(self.bench.model(thresher.ASE())).stages()[0]
        stage = replace(once_for_all, configurations=frontier.configurations)
        model = self.fit(policy, "attention-mass", {stage.name: 1.0}, stages=(stage,))
        judge = Judge(self.bench, model, self.validation)
        again = [(point.retention, judge(point.retention)) for point in frontier.points]
        points = tuple(Point(retention, found.speedup, found.metrics[WORTH]) for retention, found in again)
        attachment_of(model).notes[NOTE] = Frontier(points).to_list()
        return model

    def length_adaptive(self) -> Any:
        """A step reads its examples whole, under the shortest configuration and under random ones."""
        policy = thresher.LengthAdaptive()
        return self.fit(
            policy,
            "length-adaptive",
            {"length-drop": 1 / (policy.sandwich + 2)},
            validation=self.validation.rows,
            quality=self.validation.worth,
            search=self.searching,
        )

    def power_bert(self) -> Any:
        policy = thresher.PowerBert(penalty=self.bench.args.power_penalty)
        faster = {"soft.policy_learning_rate": self.bench.args.power_rate}
        return self._for_one_speedup(policy, "power-bert", {"soft": 0.5, "hard": 0.5}, faster)

    def ltp(self) -> Any:
        """The hard stage is where the quality comes back."""
        return self._for_one_speedup(thresher.LTP(temperature=5e-4), "ltp", {"soft": 0.25, "hard": 0.75})

    def _for_one_speedup(
        self, policy: PolicyConfig, name: str, share: dict[str, float], overrides: dict[str, float] | None = None
    ) -> Any:
        speedup = self.bench.args.trained_at
        return self.fit(policy, name, share, overrides, validation=self.validation.sample(), speedup=speedup)


METHODS: dict[str, Callable[[Contest], Any]] = {
    "ASE": Contest.ase,
    "attention mass": Contest.attention_mass,
    "Length-Adaptive": Contest.length_adaptive,
    "PoWER-BERT": Contest.power_bert,
    "LTP": Contest.ltp,
}


def main() -> None:
    options = parser(__doc__)
    training_options(options)
    options.add_argument("--trained-at", type=float, default=2.0, help="speedup of PoWER-BERT and LTP in training")
    options.add_argument("--power-penalty", type=float, default=1e-3, help="of PoWER-BERT's soft stage")
    options.add_argument("--power-rate", type=float, default=3e-3, help="learning rate of its retention vectors")
    options.add_argument("--methods", nargs="+", choices=sorted(METHODS), default=list(METHODS))
    bench = Bench(options.parse_args())
    args = bench.args
    validation, test = bench.encoded("validation"), bench.encoded("test")
    contest = Contest(bench, validation)
    baseline = Judge(bench, bench.model(), test)(packed=True)
    note = (
        f"at most {bench.task.max_length} tokens; {args.passes} training passes for each method; {args.evaluations} "
        f"evaluations for each that searches, on {validation.dialogues} validation dialogues; PoWER-BERT and LTP trained at "
        f"{args.trained_at}x and set by strength"
    )
    points: dict[str, list[tuple[float, float]]] = {}
    for name in args.methods:
        print(f"== {name}", flush=True)
        try:
            model = METHODS[name](contest)
        except TargetError as error:  # the others need not wait for better settings of this one
            print(error, flush=True)
            continue
        if NOTE not in attachment_of(model).notes:
            print({key: value.tolist() for key, value in policy_of(model).state_dict().items()})
        judge = Judge(bench, model, test)
        for speedup in settled(model, validation.sample(), SPEEDUPS):
            found = judge()
            points.setdefault(name, []).append((found.speedup, found.quality))
            if speedup not in TABLE:
                print(f"{name} at about {speedup}x: R@1 {found.quality:.4f} at {found.speedup:.3f}x", flush=True)
                continue
            bench.record(
                "ase_methods",
                f"ase-methods-{bench.label}-{name.lower().replace(' ', '-')}-{speedup}",
                f"R@1 at about {speedup}x FLOPs: {name}",
                100 * found.quality,
                "%",
                test,
                baseline=f"the same start, packed, nothing dropped: R@1 {100 * baseline.quality:.2f} %",
                spread={"points_lost": round(found.lost(baseline), 3), **found.spread(baseline)},
                note=note,
            )
    label = f"R@1 on {bench.label}"
    bench.draw(frontier_chart(points, baseline=baseline.quality, quality_label=label), f"ase-frontier-{bench.label}")


if __name__ == "__main__":
    main()
