"""What the benchmarks of question answering share: SQuAD in windows, starts, and judging by F1 over the whole dev set.

Methods are calibrated on questions about articles of the training split that nothing is trained on; figures are of the dev
set (the split "validation").
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from transformers import AutoModelForQuestionAnswering, AutoTokenizer, set_seed

import thresher
from records import record
from starts import minilm
from thresher.measure.run import prepared, run, run_packed
from thresher.policy import PolicyConfig
from thresher.tasks.answering import EncodedQuestions, QuestionTask
from thresher.tasks.data import load_rows

HELD_OUT = 3  # articles
CARRIED = ("input_ids", "attention_mask", "token_type_ids", "start_positions", "end_positions")


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that all of these benchmarks have."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--data-dir", required=True, type=Path)
    made.add_argument("--out", required=True, type=Path, help="models are kept here and not trained again")
    made.add_argument("--seeds", type=int, nargs="+", default=[0])
    made.add_argument("--epochs", type=float, default=2.0)
    made.add_argument(
        "--learning-rate", type=float, default=1e-4, help="of the model; MiniLM wants more than the paper's 3e-5"
    )
    made.add_argument("--limit", type=int, help="at most so many questions of any split, to try things; implies --dry")
    made.add_argument("--dry", action="store_true", help="record nothing")
    return made


@dataclass(frozen=True)
class Judged:
    """speedup: FLOPs of the packed model that drops nothing / FLOPs spent. exact, f1: percent. each: F1 of every question."""

    speedup: float
    exact: float
    f1: float
    each: np.ndarray

    def lost(self, start: Judged) -> float:
        """Points of F1 below the start."""
        return start.f1 - self.f1

    def uncertainty(self, start: Judged) -> float:
        """The standard error of `lost` over the questions, which both answered."""
        return float(100 * (start.each - self.each).std() / len(self.each) ** 0.5)


class Bench:
    """SQuAD and MiniLM, as the options name them."""

    task = QuestionTask(max_length=384, stride=128)

    def __init__(self, args: argparse.Namespace) -> None:
        thresher.keep_memory()
        self.args = args
        self.dry = args.dry or args.limit is not None
        self.tokenizer = AutoTokenizer.from_pretrained(minilm())
        args.out.mkdir(parents=True, exist_ok=True)

    def _rows(self, split: str) -> datasets.Dataset:
        return load_rows(self.args.data_dir / "squad", split=split)

    def _first(self, rows: datasets.Dataset) -> datasets.Dataset:
        return rows.select(range(min(self.args.limit or len(rows), len(rows))))

    @cached_property
    def _articles(self) -> tuple[datasets.Dataset, datasets.Dataset]:
        """Training rows, and those of the articles that are held out."""
        rows = self._rows("train")
        held_out = set(sorted(set(rows["title"]))[:HELD_OUT])
        apart = np.array([title in held_out for title in rows["title"]])
        return tuple(self._first(rows.select(np.flatnonzero(of))) for of in (~apart, apart))  # type: ignore[return-value]

    @cached_property
    def train(self) -> datasets.Dataset:
        encoded = self.task.encode(self._articles[0], self.tokenizer, training=True).rows
        return encoded.select_columns([name for name in CARRIED if name in encoded.column_names])

    @cached_property
    def held_out(self) -> EncodedQuestions:
        return self.task.encode(self._articles[1], self.tokenizer)

    @cached_property
    def dev(self) -> EncodedQuestions:
        return self.task.encode(self._first(self._rows("validation")), self.tokenizer)

    @cached_property
    def _dev_batches(self) -> Any:
        return list(prepared(self.fresh(0), self.dev.rows))

    def fresh(self, seed: int) -> Any:
        """MiniLM under a new head. Attention dropout would send CPU attention down its slow path."""
        set_seed(seed)
        return AutoModelForQuestionAnswering.from_pretrained(minilm(), attention_probs_dropout_prob=0.0)

    def trained(self, name: str, policy: PolicyConfig, seed: int, **options: Any) -> Any:
        """MiniLM trained with a method in OUT/name-seed, or what was trained there before."""
        directory = self.args.out / f"{name}-{seed}"
        if (directory / "thresher.json").is_file():
            return thresher.load(directory)
        print(f"training {name}, seed {seed}", flush=True)
        return thresher.fit(
            self.fresh(seed), policy, self.train, self.tokenizer, directory, seed=seed, progress=False, **options
        )

    def judge(self, model: Any, *, packed: bool = False) -> Judged:
        """packed: drop nothing."""
        found = (run_packed if packed else run)(model, self._dev_batches)
        exact, f1 = self.dev.judge.each(self.dev.texts(found.predictions))
        return Judged(found.speedup, 100 * float(exact.mean()), 100 * float(f1.mean()), f1)

    def record(self, file: str, id: str, what: str, value: float, unit: str, **about: Any) -> None:
        print(f"{id}: {value:.4g} {unit} {json.dumps(about.get('spread')) if about.get('spread') else ''}", flush=True)
        if not self.dry:
            about = {"seeds": self.args.seeds, "examples": len(self.dev.ids), **about}
            record(file, id, what, value, unit, data="squad", split="validation (the whole dev set)", **about)
