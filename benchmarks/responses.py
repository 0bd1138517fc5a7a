"""What the benchmarks of response selection share: a start, its data, judging that is remembered, records and charts.

A start is what response_starts.py wrote. Configurations are searched and methods calibrated on part of the validation split;
figures are of the test split (of mutual, whose test split has no labels: of the other part of the validation split).
What a model scored under a configuration is kept in OUT/judged.jsonl, by a digest of weights, settings and rows: a script that
was interrupted, or another one with the same --out, runs nothing twice.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import thresher
from records import record
from response_starts import MAX_TOKENS
from thresher.cli.work import ResponseWork
from thresher.measure.run import prepared, run, run_packed
from thresher.model import attachment_of, find_encoder
from thresher.policy import PolicyConfig, retaining
from thresher.report import Chart, save_chart
from thresher.tasks.dialogues import load_dialogues
from thresher.tasks.ranking import ranking_metrics
from thresher.tasks.responses import ResponseTask

IMAGES = Path(__file__).parent.parent / "docs" / "img"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CALIBRATION = 300  # pairs
WORTH = "MRR"
SETTINGS = "thresher.json"  # written last: what holds it is a whole checkpoint


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that all of these benchmarks have."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("name", choices=sorted(MAX_TOKENS))
    made.add_argument("--data-dir", required=True, type=Path)
    made.add_argument("--start", required=True, type=Path, help="what response_starts.py wrote")
    made.add_argument("--out", required=True, type=Path)
    made.add_argument("--label", help="the start's name in records and charts; default: the data's")
    made.add_argument("--validation", type=int, default=500, help="dialogues to search and calibrate on")
    made.add_argument("--test", type=int, default=1_000, help="dialogues")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--dry", action="store_true", help="record nothing, draw into OUT")
    made.add_argument("--limit", type=int, help="at most so many dialogues of any split, to try things; implies --dry")
    return made


def training_options(made: argparse.ArgumentParser) -> None:
    made.add_argument("--train", type=int, help="dialogues; default: all")
    made.add_argument("--passes", type=int, default=20_000, help="examples read forward and backward, for each method")
    made.add_argument("--evaluations", type=int, default=100, help="of a search")


@dataclass(frozen=True)
class Encoded:
    """Pairs, as `ResponseTask.encode` makes them, and the split they are of."""

    rows: datasets.Dataset
    split: str

    @cached_property
    def digest(self) -> str:
        columns = {name: self.rows[name][:] for name in ("input_ids", "labels", "group")}
        return hashlib.sha256(repr(columns).encode()).hexdigest()

    @cached_property
    def dialogues(self) -> int:
        return len(set(self.rows["group"]))

    def metrics(self, predictions: np.ndarray) -> dict[str, float]:
        return ranking_metrics(predictions, self.rows["labels"][:], self.rows["group"][:])

    def worth(self, predictions: np.ndarray) -> float:
        """MRR, which says more of a few dialogues than R10@1 does: what a search maximises."""
        return self.metrics(predictions)[WORTH]

    def hits(self, predictions: np.ndarray) -> list[int]:
        """For each dialogue, whether its right response comes first; among equals it does not."""
        found, labels, groups = predictions.reshape(-1), np.array(self.rows["labels"]), np.array(self.rows["group"])
        of_dialogue = (groups == group for group in np.unique(groups))
        return [int(found[of & (labels > 0)].max() > found[of & (labels == 0)].max()) for of in of_dialogue]

    def sample(self) -> datasets.Dataset:
        """A few pairs of as many dialogues, enough to set a speedup, which needs no labels."""
        return self.rows.select(np.linspace(0, len(self.rows) - 1, min(CALIBRATION, len(self.rows))).astype(int))


def first_place(metrics: dict[str, float]) -> float:
    return next(value for name, value in metrics.items() if name.startswith("R") and name.endswith("@1"))


@dataclass(frozen=True)
class Judged:
    """What a model is worth on some rows. hits: see `Encoded.hits`."""

    speedup: float
    metrics: dict[str, float]
    hits: list[int]

    @property
    def quality(self) -> float:
        return first_place(self.metrics)

    def lost(self, start: Judged) -> float:
        """Points of R10@1 below the start."""
        return 100 * (start.quality - self.quality)

    def uncertainty(self, start: Judged) -> float:
        """The standard error of `lost` over the dialogues, which both judged."""
        difference = np.array(start.hits) - np.array(self.hits)
        return float(100 * difference.std() / max(len(difference), 1) ** 0.5)

    def spread(self, start: Judged) -> dict[str, Any]:
        """What a record says beside the points lost."""
        others = {name: round(value, 4) for name, value in self.metrics.items() if name != "P@1"}
        error = round(self.uncertainty(start), 2)
        return {"flops_speedup": round(self.speedup, 3), "standard_error": error, **others}


class Bench:
    """A start and its data, as the options name them."""

    def __init__(self, args: argparse.Namespace) -> None:
        thresher.keep_memory()
        self.args = args
        self.dry = args.dry or args.limit is not None
        self.label = args.label or args.name
        self.tokenizer = AutoTokenizer.from_pretrained(args.start)
        self.task = ResponseTask(MAX_TOKENS[args.name])
        args.out.mkdir(parents=True, exist_ok=True)

    def dialogues(self, split: str) -> tuple[datasets.Dataset, str]:
        """The dialogues of "train", "validation" or "test", shuffled alike in every run; and what to call them."""
        args, folder = self.args, self.args.data_dir / self.args.name
        name, skipped, most = split, 0, {"train": None, "validation": args.validation, "test": args.test}[split]
        if split == "train":
            most = args.train
        elif split == "test" and not any(folder.glob("test.*")):
            name, skipped = "validation", args.validation
        rows = load_dialogues(folder, split=name, seed=0)
        most = min(n for n in (most, args.limit, len(rows)) if n is not None)
        called = f"{name}, apart from what was searched on" if skipped else name
        return rows.select(range(skipped, min(skipped + most, len(rows)))), called

    def encoded(self, split: str) -> Encoded:
        rows, called = self.dialogues(split)
        return Encoded(self.task.encode(rows, self.tokenizer).rows, called)

    def training(self) -> datasets.Dataset:
        """Pairs to train on: those that the start was trained on, one wrong response for each right one."""
        rows = self.dialogues("train")[0]
        encoded = self.task.encode(rows, self.tokenizer, negatives=1, seed=self.args.seed).rows
        return encoded.remove_columns("group")

    def model(self, policy: PolicyConfig | None = None) -> Any:
        """The start, packed, with a method."""
        model = AutoModelForSequenceClassification.from_pretrained(self.args.start).eval().to(DEVICE)
        return thresher.attach(model, None if policy is None else self.fitted(policy, model))

    def fitted(self, policy: PolicyConfig, model: Any) -> PolicyConfig:
        """With the tokens that stay: [CLS], [SEP] and [EOS]."""
        return ResponseWork(response=self.task).fitting(policy, self.tokenizer, model)

    def settings(self, start: Any, validation: Encoded) -> dict[str, Any]:
        """What two trainings must have in common for one to stand for the other."""
        given = {name: getattr(self.args, name) for name in ("train", "limit", "passes", "evaluations", "seed")}
        return {"start": weights(start), "validation": validation.digest, "searched by": WORTH, **given}

    def record(self, file: str, id: str, what: str, value: float, unit: str, rows: Encoded, **about: Any) -> None:
        print(f"{id}: {value:.4g} {unit} {about.get('spread') or ''}", flush=True)
        if not self.dry:
            about = {"examples": rows.dialogues, "seeds": [self.args.seed], **about}
            if DEVICE == "cuda":
                about["note"] = f"{about['note']}; run on an {torch.cuda.get_device_name()}"
            record(file, id, what, value, unit, data=self.args.name, split=rows.split, **about)

    def draw(self, chart: Chart, name: str) -> None:
        print("drawn:", save_chart(chart, (self.args.out if self.dry else IMAGES) / f"{name}.svg"), flush=True)


def keep(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings as a note for `fit`."""
    return {"benchmark": json.loads(json.dumps(settings))}


def kept(directory: Path, settings: dict[str, Any]) -> Any:
    """The model that was trained in a directory; None where none was, or not to the end.

    Raises SystemExit for one of other settings.
    """
    if not (directory / SETTINGS).is_file():
        return None
    model = thresher.load(directory, device=DEVICE)
    before, now = attachment_of(model).notes.get("benchmark", {}), keep(settings)["benchmark"]
    if changed := [name for name in {**before, **now} if before.get(name) != now.get(name)]:
        raise SystemExit(f"{directory} holds a run with other settings ({', '.join(changed)}); give another --out.")
    return model


def weights(model: Any) -> str:
    """A digest of the weights of a model, its policy's not included."""
    found = hashlib.sha256()
    for name, value in find_encoder(model).state_dict().items():
        found.update(name.encode())
        found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


class Judge:
    """One model, which no longer trains, on some rows; what it was asked before is read from the file."""

    def __init__(self, bench: Bench, model: Any, rows: Encoded) -> None:
        self.model, self.rows = model, rows
        self.file = bench.args.out / "judged.jsonl"
        self.weights = weights(model)
        whole, newline, torn = (self.file.read_bytes() if self.file.is_file() else b"").rpartition(b"\n")
        if torn:  # by an interruption
            os.truncate(self.file, len(whole) + len(newline))
        lines = map(json.loads, whole.splitlines())
        self.known: dict[str, Judged] = {found.pop("key"): Judged(**found) for found in lines}

    @cached_property
    def ready(self) -> list[Any]:
        return list(prepared(self.model, self.rows.rows))

    def __call__(self, retention: Sequence[float] | None = None, *, packed: bool = False) -> Judged:
        """retention: instead of the policy's own configuration. packed: drop nothing."""
        key = self._key(retention, packed)
        if key not in self.known:
            with contextlib.nullcontext() if retention is None else retaining(retention):
                found = (run_packed if packed else run)(self.model, self.ready)
            rows, said = self.rows, found.predictions
            self.known[key] = Judged(found.speedup, rows.metrics(said), rows.hits(said))
            with self.file.open("a") as stream:
                stream.write(json.dumps({"key": key, **asdict(self.known[key])}) + "\n")
        return self.known[key]

    def _key(self, retention: Sequence[float] | None, packed: bool) -> str:
        policy = attachment_of(self.model).policy
        said: list[Any] = [self.weights, self.rows.digest, retention if retention is None else list(retention), packed]
        if policy is not None and not packed:
            learned = {name: value.tolist() for name, value in policy.state_dict().items()}
            said += [policy.config.method, policy.config.to_dict(), learned]
        return hashlib.sha256(json.dumps(said, default=str).encode()).hexdigest()
