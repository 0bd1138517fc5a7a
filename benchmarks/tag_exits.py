"""Tokens that leave (TokEE), rows that leave (SENTEE) and a shallower model, on wnut17 at equal FLOPs.

    python benchmarks/tag_exits.py --data-dir DIR --out RUNS/wnut17 --seeds 0 1 2

MiniLM-L6 is fine-tuned once for each seed in OUT; from it each way is trained for --passes rows: for the exits branches alone
on what the start says; TokEE as published too, branches and model together on the tags, then with tokens that freeze; a student
of some of the layers by the start's answers and the tags. The exits' thresholds, and TokEE's window, are set to each speedup on
the validation split; the test split is read once for each row of the table. What is complete is not trained again. --limit: a
few rows, nothing recorded.
"""

from __future__ import annotations

import argparse
from functools import cached_property
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from transformers import AutoModelForTokenClassification, AutoTokenizer, set_seed

import thresher
from records import record
from settling import settled
from starts import minilm
from thresher.exits import ExitConfig
from thresher.measure.latency import compare
from thresher.measure.run import prepared, run, run_packed
from thresher.model import attachment_of, exit_of
from thresher.policy import Stage
from thresher.report import frontier_chart, save_chart
from thresher.tasks.data import load_rows
from thresher.tasks.tagging import EncodedTags, TaggingTask
from thresher.training import fit, run_stage
from thresher.training.students import DISTIL

IMAGES = Path(__file__).parent.parent / "docs" / "img"
DATA, MAX_TOKENS = "wnut17", 128
SPEEDUPS = (1.5, 2.0, 3.0)
EARLY = (1, 2, 3)  # where TokEE is asked when it is timed: at 2x hardly a token freezes later, and asking takes time
CUTS = {1.5: 4, 2.0: 3, 3.0: 2}  # layers left of 6
WINDOWS = (1, 3, 5)
EXITS: dict[str, tuple[ExitConfig, dict[str, float]]] = {
    "tokee": (thresher.TokEE(), {"exit": 1.0}),
    "tokee-labels": (thresher.TokEE(learns="labels"), {"exit": 0.6, "self-sampling": 0.4}),
    "sentee": (thresher.SENTEE(), {"exit": 1.0}),
}
NAMES = {
    "tokee": "TokEE",
    "tokee-labels": "TokEE, model and branches from labels",
    "sentee": "SENTEE",
    "cut": "a shallower model",
}


class Bench:
    """The rows of wnut17, and models by seed."""

    def __init__(self, args: argparse.Namespace) -> None:
        thresher.keep_memory()
        self.args = args
        self.tokenizer = AutoTokenizer.from_pretrained(minilm())
        args.out.mkdir(parents=True, exist_ok=True)

    def load(self, split: str) -> Any:
        rows = load_rows(self.args.data_dir / DATA, split=split)
        return rows if self.args.limit is None else rows.select(range(min(self.args.limit, len(rows))))

    @cached_property
    def task(self) -> TaggingTask:
        return TaggingTask.infer(load_rows(self.args.data_dir / DATA, split="train"))

    def encode(self, split: str) -> EncodedTags:
        return self.task.encode(self.load(split), self.tokenizer, MAX_TOKENS, training=split == "train")

    @cached_property
    def train(self) -> Any:
        return self.encode("train").rows

    @cached_property
    def validation(self) -> EncodedTags:
        return self.encode("validation")

    @cached_property
    def test(self) -> EncodedTags:
        return self.encode("test")

    @cached_property
    def ready(self) -> Any:
        return list(prepared(self.start(self.args.seeds[0]), self.test.rows))

    def epochs(self, passes: float) -> float:
        return passes / len(self.train)

    def start(self, seed: int) -> Any:
        """Fine-tuned, packed."""
        directory = self.args.out / f"start-{seed}"
        if (directory / "config.json").is_file():
            return thresher.attach(AutoModelForTokenClassification.from_pretrained(directory).eval())
        set_seed(seed)
        # Attention dropout would send CPU attention down its slow path.
        model = AutoModelForTokenClassification.from_pretrained(
            minilm(), num_labels=len(self.task.names), attention_probs_dropout_prob=0.0
        )
        stage = Stage(name="fine-tune", mode="off", epochs=self.epochs(self.args.start_passes), learning_rate=1e-4)
        thresher.attach(model)
        run_stage(model, stage, self.train, self.tokenizer, directory / "training", seed=seed, progress=False)
        thresher.detach(model).save_pretrained(directory)
        return thresher.attach(model)

    def exiting(self, name: str, seed: int) -> Any:
        config, share = EXITS[name]
        directory = self.args.out / f"{name}-{seed}"
        about = {key: getattr(self.args, key) for key in ("passes", "start_passes", "limit")}
        if (directory / "thresher.json").is_file():
            model = thresher.load(directory)
            if attachment_of(model).notes.get("benchmark") != about:
                raise SystemExit(f"{directory} holds a run with other settings; give another --out.")
            return model
        overrides: dict[str, Any] = {
            f"{stage}.epochs": part * self.epochs(self.args.passes) for stage, part in share.items()
        }
        if config.labelled:
            overrides |= {f"{stage}.learning_rate": 5e-5 for stage in share}
        begun = thresher.detach(self.start(seed))
        options = {"exit": config, "overrides": overrides, "seed": seed, "notes": {"benchmark": about}}
        return fit(begun, None, self.train, self.tokenizer, directory, progress=False, **options)

    def cut(self, layers: int, seed: int) -> Any:
        directory = self.args.out / f"cut-{layers}-{seed}"
        if (directory / "thresher.json").is_file():
            return thresher.load(directory)
        stage = Stage(**{**vars(DISTIL), "epochs": self.epochs(self.args.passes), "learning_rate": 1e-4})
        teacher = thresher.detach(self.start(seed))
        small = thresher.student(teacher, layers)
        return thresher.distil(
            small, teacher, self.train, self.tokenizer, directory, stage=stage, seed=seed, progress=False
        )

    def set_to(self, model: Any, speedup: float) -> bool:
        """Whether the exit reaches the speedup on the validation rows; set to it, with the window that loses least there."""
        found: list[tuple[float, dict[str, Any]]] = []
        for window in WINDOWS if "window" in exit_of(model).config.at_run_time() else (None,):
            if window is not None:
                thresher.set_exit(model, window=window)
            for _ in settled(model, self.validation.rows, [speedup], tolerance=0.02):
                f1 = self.validation.metrics(run(model, self.validation.rows).predictions)["f1"]
                here = {} if window is None else {"window": window}
                found.append((f1, {**here, "strength": exit_of(model).config.strength}))
        if found:
            thresher.set_exit(model, **max(found, key=lambda one: one[0])[1])
        return bool(found)

    def f1(self, predictions: np.ndarray) -> float:
        return 100 * self.test.metrics(predictions)["f1"]


def measured(bench: Bench, seed: int) -> dict[tuple[str, float], tuple[float, float]]:
    """By way and speedup asked for: the speedup and F1 on the test rows."""
    found: dict[tuple[str, float], tuple[float, float]] = {}
    for name in [one for one in EXITS if one in bench.args.ways]:
        model = bench.exiting(name, seed)
        whole = bench.f1(run_packed(model, bench.ready).predictions)
        print(f"{name}, seed {seed}, nobody leaves: F1 {whole:.2f}", flush=True)
        found[name, 1.0] = (1.0, whole)
        for speedup in bench.args.speedups:
            if bench.set_to(model, speedup):
                result = run(model, bench.ready)
                found[name, speedup] = (result.speedup, bench.f1(result.predictions))
                print(f"{name}, {speedup}x: {exit_of(model).config}", flush=True)
    for speedup in bench.args.speedups if "cut" in bench.args.ways else ():
        layers = CUTS[speedup]
        result = run(bench.cut(layers, seed), bench.ready)
        found["cut", speedup] = (6 / layers, bench.f1(result.predictions))
    return found


def table(bench: Bench) -> None:
    seeds = bench.args.seeds
    starts = [bench.f1(run_packed(bench.start(seed), bench.ready).predictions) for seed in seeds]
    every = [measured(bench, seed) for seed in seeds]
    said = f"the start, packed, nothing leaves: F1 {mean(starts):.2f}"
    points: dict[str, list[tuple[float, float]]] = {}
    for way, speedup in dict.fromkeys(key for found in every for key in found):
        rows = [
            (*found[way, speedup], start) for found, start in zip(every, starts, strict=True) if (way, speedup) in found
        ]
        value = mean(start - f1 for _, f1, start in rows)
        points.setdefault(NAMES[way], []).append((mean(x for x, _, _ in rows), mean(f1 for _, f1, _ in rows)))
        note_down(
            bench,
            f"{way}-{speedup}",
            f"F1 lost at about {speedup}x FLOPs: {NAMES[way]}",
            value,
            "points",
            target="<= 1.0" if (way, speedup) == ("tokee", 2.0) else None,
            baseline=said,
            spread={
                "flops_speedup": round(mean(x for x, _, _ in rows), 3),
                "f1": [round(f1, 2) for _, f1, _ in rows],
                "each": [round(start - f1, 2) for _, f1, start in rows],
            },
            seeds=seeds[: len(rows)],
        )
    if set(bench.args.ways) != set(NAMES) or set(bench.args.speedups) != set(SPEEDUPS):
        return
    chart = frontier_chart(points, baseline=mean(starts), quality_label="Entity F1 on wnut17")
    print("drawn:", save_chart(chart, (bench.args.out if dry(bench) else IMAGES) / "tag-exits.svg"))


def speed(bench: Bench) -> None:
    """TokEE at 2x: wall-clock at batch 32 and at batch 1."""
    model = bench.exiting("tokee", bench.args.seeds[0])
    thresher.set_exit(model, after=EARLY)
    bench.set_to(model, 2.0)
    lost = bench.f1(run_packed(model, bench.test.rows).predictions) - bench.f1(run(model, bench.test.rows).predictions)
    for batch, count in ((32, 256), (1, 32)):
        rows = bench.test.rows.select(range(min(count, len(bench.test.rows))))
        found = compare(model, rows, batch_size=batch, rounds=bench.args.rounds)
        spread = [round(found.measured.low, 4), round(found.measured.high, 4)]
        note = (
            f"batch {batch}, {found.threads} threads, fp32, {found.tokens_per_row:.0f} tokens a row; FLOPs {found.flops:.3f}; "
            f"asked after layers {', '.join(map(str, EARLY))}; {lost:.2f} points of F1 lost"
        )
        about = {"baseline": "packed, nothing leaves", "spread": spread, "note": note, "examples": len(rows)}
        note_down(
            bench,
            f"measured-b{batch}",
            f"TokEE at 2x: measured speedup, batch {batch}",
            found.measured.median,
            "x",
            **about,
        )


def note_down(bench: Bench, id: str, what: str, value: float, unit: str, **about: Any) -> None:
    print(f"{id}: {value:.4g} {unit} {about.get('spread') or ''}", flush=True)
    if dry(bench):
        return
    note = f"MiniLM-L6, {bench.args.start_passes} rows for the start and {bench.args.passes} for each way"
    given = {"data": DATA, "split": "test", "examples": len(bench.test.rows), "note": note, **about}
    record("tag_exits", f"tag-exits-{id}", what, value, unit, **given)


def dry(bench: Bench) -> bool:
    return bench.args.dry or bench.args.limit is not None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", required=True, type=Path)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--speed", action="store_true", help="time TokEE instead, on a quiet machine")
    parser.add_argument("--start-passes", type=int, default=30_000, help="rows read forward and backward")
    parser.add_argument("--passes", type=int, default=20_000, help="the same, for each way")
    parser.add_argument("--ways", nargs="+", choices=list(NAMES), default=list(NAMES), help="drawn where it is all")
    parser.add_argument("--speedups", nargs="+", type=float, choices=SPEEDUPS, default=SPEEDUPS, help="the same")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dry", action="store_true", help="record nothing, draw into OUT")
    parser.add_argument("--limit", type=int, help="at most so many rows of any split, to try things; implies --dry")
    args = parser.parse_args()
    (speed if args.speed else table)(Bench(args))


if __name__ == "__main__":
    main()
