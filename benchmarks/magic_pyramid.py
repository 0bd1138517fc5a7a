"""Magic Pyramid beside its halves: LTP alone, an exit alone, and both, from one fine-tuned start.

    python benchmarks/magic_pyramid.py start imdb --data-dir DIR --out RUNS/mp-imdb
    python benchmarks/magic_pyramid.py table imdb --data-dir DIR --out RUNS/mp-imdb
    python benchmarks/magic_pyramid.py speed imdb --data-dir DIR --out RUNS/mp-imdb

start: fine-tunes MiniLM-L6 in OUT/start, once. table: trains both models (the exit on the start; then LTP soft, LTP hard and
exits on the hard-pruned model), reads held-out training rows at every pair of LTP's strength and the exit's threshold, and of
each way takes the fastest that loses at most so many points there. These are read on the test rows; so are three thresholds
of the union as it was trained, and groups of rows by length. LTP alone is the union with nobody leaving. The union as chosen
for one point is saved in OUT/chosen. speed: wall-clock of that union, at batch 32 and at batch 1. What is complete is not run
again. --limit: a few rows, nothing recorded.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from functools import cached_property
from typing import Any

import datasets
import numpy as np

import thresher
from classifying import Texts, options, start, wall_clock
from records import record
from thresher.measure.latency import compare
from thresher.measure.run import prepared, run, run_packed
from thresher.model import attachment_of, policy_of
from thresher.report import frontier_chart
from thresher.training import fit

STRENGTHS = (0.0, 0.4, 0.7, 1.0, 1.5, 2.2)  # of LTP's thresholds, 1 being those it was trained at
THRESHOLDS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # of the exit
PUBLISHED = (0.1, 0.5, 0.8)
BUDGETS = (0.5, 1.0, 2.0)  # points lost on held-out rows
WAYS = {"ltp": "LTP alone", "exit": "FastBERT's exit alone", "union": "Magic Pyramid"}
# An example that only branches learn from is read forward: a third of a pass.
SHARES = {"soft.epochs": 0.25, "hard.epochs": 0.75, "exit.epochs": 1.0}
# The hard-pruned model also learns from what the start says, as branches learn from what it says.
DISTILLED = {"hard.distil_weight": 1.0, "hard.dropout": False}

Setting = tuple[float, float]  # LTP's strength, the exit's threshold


class Bench(Texts):
    """One data set and the two trained models."""

    most_held_out = 1_000

    @property
    def note(self) -> str:
        return (
            f"MiniLM-L6, {self.max_tokens} tokens; {self.args.passes} passes for LTP, its hard stage distilled, as many "
            f"examples for branches; settings chosen on {len(self.held_out)} held-out training rows"
        )

    def trained(self, name: str) -> Any:
        """The "exit" on the start, or the "union" with LTP; loaded where that was done."""
        directory = self.args.out / name
        about = {key: getattr(self.args, key) for key in ("name", "passes", "trained_at", "seed", "limit")}
        if (directory / "thresher.json").is_file():
            model = thresher.load(directory)
            if attachment_of(model).notes.get("benchmark") != about:
                raise SystemExit(f"{directory} holds a run with other settings; give another --out.")
            return model
        epochs = self.args.passes / len(self.train)
        rows = self.train
        if epochs < 1:
            rows, epochs = rows.select(range(self.args.passes)), 1.0
        union = name == "union"
        shares = {key: part * epochs for key, part in SHARES.items() if union or key.startswith("exit")}
        return fit(
            self.model(),
            thresher.LTP(temperature=5e-4) if union else None,
            rows,
            self.tokenizer,
            directory,
            exit=thresher.FastBERT(),
            validation=self.held_out,
            speedup=self.args.trained_at if union else None,
            overrides={**shares, **(DISTILLED if union else {})},
            seed=self.args.seed,
            notes={"benchmark": about},
            progress=False,
        )

    @cached_property
    def models(self) -> dict[str, Any]:
        return {"exit": self.trained("exit"), "union": self.trained("union")}

    def set_to(self, way: str, setting: Setting) -> Any:
        """The model of a way, set."""
        strength, threshold = setting
        model = self.models["exit" if way == "exit" else "union"]
        if way != "exit":
            thresher.set_config(model, policy_of(model).config.replace(strength=strength * self.trained_strength))
        thresher.set_exit(model, threshold=threshold)
        if threshold == 0.0:
            thresher.set_exit(model, strength=0.0)
        return model

    @cached_property
    def trained_strength(self) -> float:
        """LTP's, as `fit` left it: so that the policy alone gives its share of the speedup."""
        return float(policy_of(self.models["union"]).config.strength)

    def settings(self, way: str) -> list[Setting]:
        strengths = STRENGTHS[1:] if way != "exit" else (0.0,)
        thresholds = THRESHOLDS[1:] if way != "ltp" else (0.0,)
        return [(strength, threshold) for strength in strengths for threshold in thresholds]

    def read(self, way: str, setting: Setting, split: str) -> tuple[float, np.ndarray]:
        """FLOPs speedup and predictions; nothing is read twice."""
        if (way, setting, split) not in self.known:
            result = run(self.set_to(way, setting), self.ready[split])
            self.known[way, setting, split] = result.speedup, result.predictions
        return self.known[way, setting, split]

    @cached_property
    def known(self) -> dict[tuple[str, Setting, str], tuple[float, np.ndarray]]:
        return {}

    @cached_property
    def ready(self) -> dict[str, Any]:
        model = self.models["exit"]
        return {"held-out": list(prepared(model, self.held_out)), "test": list(prepared(model, self.test))}

    def start_says(self, split: str) -> np.ndarray:
        if split not in self.started:
            self.started[split] = run_packed(self.models["exit"], self.ready[split]).predictions
        return self.started[split]

    @cached_property
    def started(self) -> dict[str, np.ndarray]:
        return {}

    def held_out_points(self, way: str) -> dict[Setting, tuple[float, float]]:
        """Speedup and score on the held-out rows by setting; what was read before is not read again."""
        file = self.args.out / f"held-out-{way}.json"
        key = self._key()
        known = json.loads(file.read_text()) if file.is_file() else {"key": key, "points": []}
        points = {(s, t): (x, q) for s, t, x, q in known["points"]} if known["key"] == key else {}
        for setting in self.settings(way):
            if setting not in points:
                speedup, said = self.read(way, setting, "held-out")
                points[setting] = (speedup, self.score(said, self.held_out))
                lines = [[*setting, *point] for setting, point in points.items()]
                file.write_text(json.dumps({"key": key, "points": lines}))
        return points

    def _key(self) -> str:
        said = [self.args.passes, self.args.trained_at, self.args.seed, self.held_out["input_ids"][:]]
        return hashlib.sha256(json.dumps(said).encode()).hexdigest()

    def chosen(self, way: str, budget: float) -> Setting | None:
        """The fastest that loses at most `budget` points on the held-out rows."""
        base = self.score(self.start_says("held-out"), self.held_out)
        points = self.held_out_points(way)
        within = {s: x for s, (x, q) in points.items() if 100 * (base - q) <= budget}
        return max(within, key=lambda setting: within[setting]) if within else None

    def note_down(self, id: str, what: str, value: float, unit: str, **about: Any) -> None:
        print(f"{id}: {value:.4g} {unit} {about.get('spread') or ''}", flush=True)
        if not self.dry:
            given = {
                "data": self.args.name,
                "split": self.judged,
                "seeds": [self.args.seed],
                "note": self.note,
                **about,
            }
            record("magic_pyramid", f"magic-pyramid-{self.args.name}-{id}", what, value, unit, **given)


def table(bench: Bench) -> None:
    base = bench.score(bench.start_says("test"), bench.test)
    about = {
        "baseline": f"the same start, packed, nothing dropped: {bench.task.metric} {100 * base:.2f} %",
        "examples": len(bench.test),
    }
    by_budget(bench, base, about)
    by_threshold(bench, base, about)
    by_length(bench, about)
    setting = bench.chosen("union", 1.0)
    if setting is not None:
        thresher.save(bench.set_to("union", setting), bench.args.out / "chosen")
        bench.tokenizer.save_pretrained(bench.args.out / "chosen")


def by_budget(bench: Bench, base: float, about: dict[str, Any]) -> None:
    """Of each way the fastest setting for so many points on held-out rows, on the test rows."""
    metric = bench.task.metric
    points: dict[str, list[tuple[float, float]]] = {}
    for way, name in WAYS.items():
        for budget in BUDGETS:
            setting = bench.chosen(way, budget)
            if setting is None:
                print(f"{name} loses more than {budget} points at every setting")
                continue
            speedup, predictions = bench.read(way, setting, "test")
            quality = bench.score(predictions, bench.test)
            points.setdefault(name, []).append((speedup, quality))
            aimed = (way, budget) == ("union", 1.0)
            bench.note_down(
                f"{way}-{budget}",
                f"{metric} lost by {name}, the fastest that loses at most {budget} points on held-out rows",
                100 * (base - quality),
                "points",
                target="<= 1.0" if aimed else None,
                spread={"flops_speedup": round(speedup, 3), "strength": setting[0], "threshold": setting[1]},
                cell=(f"{metric} lost on {bench.args.name}", name, f"chosen at {budget} points"),
                **about,
            )
            if aimed:
                bench.note_down("flops", f"FLOPs ratio of {name} there", speedup, "x", target=">= 3", **about)
    chart = frontier_chart(points, baseline=base, quality_label=f"{metric} on {bench.args.name}")
    bench.draw(chart, f"magic-pyramid-{bench.args.name}")


def by_threshold(bench: Bench, base: float, about: dict[str, Any]) -> None:
    """The published thresholds of the exit, LTP as it was trained."""
    metric = bench.task.metric
    for way in ("exit", "union"):
        for threshold in PUBLISHED:
            speedup, predictions = bench.read(way, (1.0, threshold), "test")
            quality = bench.score(predictions, bench.test)
            bench.note_down(
                f"{way}-tau-{threshold}",
                f"{metric} at tau {threshold}: {WAYS[way]}{', LTP as it was trained' if way == 'union' else ''}",
                100 * quality,
                "%",
                spread={"flops_speedup": round(speedup, 3), "points_lost": round(100 * (base - quality), 2)},
                cell=(f"{metric} on {bench.args.name}, in percent", WAYS[way], f"tau {threshold}"),
                **about,
            )


def by_length(bench: Bench, about: dict[str, Any]) -> None:
    """Score of the rows of each quarter by length, at the settings for one point."""
    lengths = np.array([len(ids) for ids in bench.test["input_ids"]])
    # Where the longest rows are all cut at one length there are fewer groups than quarters.
    edges = np.unique(np.quantile(lengths, (0.25, 0.5, 0.75)))
    edges = edges[edges < lengths.max()]
    groups = np.searchsorted(edges, lengths, side="left")
    found = {"the start": bench.start_says("test")}
    for way, name in WAYS.items():
        setting = bench.chosen(way, 1.0)
        if setting is not None:
            found[name] = bench.read(way, setting, "test")[1]
    for name, predictions in found.items():
        scores = [
            bench.score(predictions[groups == group], rows_of(bench.test, groups == group))
            for group in np.unique(groups)
        ]
        id = f"lengths-{'start' if name == 'the start' else next(way for way, n in WAYS.items() if n == name)}"
        spread = {f"quarter_{n}": round(100 * score, 2) for n, score in enumerate(scores, 1)}
        bench.note_down(
            id,
            f"{bench.task.metric} of the shortest quarter of the rows less that of the longest: {name}",
            100 * (scores[0] - scores[-1]),
            "points",
            spread={**spread, "quartiles_of_tokens": [round(float(edge)) for edge in edges]},
            **about,
        )


def rows_of(rows: datasets.Dataset, chosen: np.ndarray) -> datasets.Dataset:
    return rows.select(np.flatnonzero(chosen))


def speed(bench: Bench) -> None:
    setting = bench.chosen("union", 1.0)
    if setting is None:
        raise SystemExit("No setting loses at most one point on the held-out rows.")
    model = bench.set_to("union", setting)
    rows = bench.test.select(range(min(bench.args.timed, len(bench.test))))
    for batch in (32, 1):
        timed = rows if batch > 1 else rows.select(range(min(32, len(rows))))
        found = compare(model, timed, batch_size=batch, rounds=bench.args.rounds)
        targets = {"realised": ">= 0.8"} if batch > 1 else {"measured": ">= 1"}
        for id, what, value, about in wall_clock(found):
            about["note"] += f"; strength {setting[0]}, threshold {setting[1]}"
            bench.note_down(
                f"{id}-b{batch}",
                f"Magic Pyramid: {what}, batch {batch}",
                value,
                "x",
                target=targets.get(id),
                examples=len(timed),
                **about,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = {"start": start, "table": table, "speed": speed}
    parser.add_argument("command", choices=list(commands))
    options(parser)
    parser.add_argument("--passes", type=int, default=12_000, help="examples read forward and backward, for each model")
    parser.add_argument("--trained-at", type=float, default=4.0, help="the union's FLOPs speedup; LTP's is its root")
    parser.add_argument("--timed", type=int, default=128, help="rows that are timed at batch 32")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    commands[args.command](Bench(args))


if __name__ == "__main__":
    main()
