"""One data set of texts to classify: its rows, the plain start that every method on it shares, and how an answer is judged."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import thresher
from starts import SPLIT_SEED, minilm
from thresher.measure.latency import Comparison
from thresher.measure.run import run_packed
from thresher.policy import Stage
from thresher.report import Chart, save_chart
from thresher.tasks.data import load_rows
from thresher.tasks.text import TextTask
from thresher.training import run_stage

IMAGES = Path(__file__).parent.parent / "docs" / "img"
DATA = {
    # name: most tokens, epochs of the start, the split that is judged
    "imdb": (256, 0.5, "test"),
    "eraser_movies": (512, 4.0, "test"),
    "ag_news": (128, 3.0, "test"),
    "sst2": (64, 1.0, "validation"),
    "mrpc": (128, 4.0, "validation"),
}
STARTED = "start.json"


def options(made: argparse.ArgumentParser) -> None:
    made.add_argument("name", choices=sorted(DATA))
    made.add_argument("--data-dir", required=True, type=Path)
    made.add_argument("--out", required=True, type=Path)
    made.add_argument("--test", type=int, default=2_000, help="test rows")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--dry", action="store_true", help="record nothing, draw into OUT")
    made.add_argument("--limit", type=int, help="at most so many rows of any split, to try things; implies --dry")


class Texts:
    """A data set as the options name it, shuffled alike in every run, and its start in OUT/start."""

    most_held_out = 500

    def __init__(self, args: argparse.Namespace) -> None:
        thresher.keep_memory()
        self.args = args
        self.dry = args.dry or args.limit is not None
        self.max_tokens, self.start_epochs, self.judged = DATA[args.name]
        self.start = args.out / "start"
        args.out.mkdir(parents=True, exist_ok=True)

    @cached_property
    def tokenizer(self) -> Any:
        return AutoTokenizer.from_pretrained(minilm())

    def load(self, split: str) -> datasets.Dataset:
        rows = load_rows(self.args.data_dir / self.args.name, split=split).shuffle(seed=SPLIT_SEED)
        return rows if self.args.limit is None else rows.select(range(min(self.args.limit, len(rows))))

    @cached_property
    def trainable(self) -> datasets.Dataset:
        return texts(self.load("train"))

    @cached_property
    def task(self) -> TextTask:
        return TextTask.infer(self.trainable)

    def encode(self, rows: datasets.Dataset) -> datasets.Dataset:
        return self.task.encode(rows, self.tokenizer, self.max_tokens).rows

    @cached_property
    def held_out(self) -> datasets.Dataset:
        """Rows that nothing was trained on, to calibrate and search on."""
        return self.encode(self.trainable.select(range(self.number_held_out)))

    @property
    def number_held_out(self) -> int:
        return min(self.most_held_out, len(self.trainable) // 10 + 1)

    @cached_property
    def train(self) -> datasets.Dataset:
        rows = self.trainable.select(range(self.number_held_out, len(self.trainable)))
        return self.encode(rows)

    @cached_property
    def test(self) -> datasets.Dataset:
        rows = texts(self.load(self.judged))
        return self.encode(rows.select(range(min(self.args.test, len(rows)))))

    def model(self) -> Any:
        if not (self.start / STARTED).is_file():
            raise SystemExit(f"{self.start} holds no start; run the subcommand start first.")
        return AutoModelForSequenceClassification.from_pretrained(self.start).eval()

    def score(self, predictions: np.ndarray, rows: datasets.Dataset) -> float:
        return self.task.score(predictions, rows["labels"][:])

    def draw(self, chart: Chart, name: str) -> None:
        folder = self.args.out if self.dry else IMAGES
        print("drawn:", save_chart(chart, folder / f"{name}.svg"), flush=True)


def texts(rows: datasets.Dataset) -> datasets.Dataset:
    """Rows whose text is given as words, as rows of texts."""
    if "tokens" not in rows.column_names:
        return rows
    return datasets.Dataset.from_dict(
        {"text": [" ".join(words) for words in rows["tokens"]], "label": rows["label"][:]}
    )


def wall_clock(found: Comparison) -> Iterator[tuple[str, str, float, dict[str, Any]]]:
    """What is recorded of a comparison: an id, what it is, its value, and what a record says beside it."""
    note = (
        f"batch {found.batch_size}, {found.threads} threads, fp32, {found.tokens_per_row:.0f} tokens a row; FLOPs ratio on "
        f"these rows {found.flops:.3f}"
    )
    for id, what, ratio, baseline in (
        ("measured", "measured speedup", found.measured, "packed, nothing dropped"),
        ("padding", "padding-only ratio of the same model", found.padding_only, "stock, padded, arrival order"),
    ):
        quartiles = [round(ratio.low, 4), round(ratio.high, 4)]
        yield id, what, ratio.median, {"baseline": baseline, "spread": quartiles, "note": note}
    yield "realised", "measured / FLOPs ratio", found.measured.median / found.flops, {"note": note}


def start(bench: Texts) -> None:
    """Fine-tune the plain start, once."""
    if (bench.start / STARTED).is_file():
        print(f"{bench.start} is complete")
        return
    # Attention dropout would send CPU attention down its slow path.
    model = AutoModelForSequenceClassification.from_pretrained(
        minilm(), num_labels=bench.task.num_labels, attention_probs_dropout_prob=0.0
    )
    stage = Stage(name="fine-tune", mode="off", epochs=bench.start_epochs, learning_rate=5e-5)
    arguments = {"seed": bench.args.seed, "progress": False}
    run_stage(thresher.attach(model), stage, bench.train, bench.tokenizer, bench.args.out / "fine-tuning", **arguments)
    found = bench.score(run_packed(model, bench.held_out).predictions, bench.held_out)
    thresher.detach(model).save_pretrained(bench.start)
    bench.tokenizer.save_pretrained(bench.start)
    (bench.start / STARTED).write_text(
        json.dumps({"passes": round(bench.start_epochs * len(bench.train)), "held_out": found})
    )
    print(f"{bench.task.metric} on held-out rows: {found:.4f}")
