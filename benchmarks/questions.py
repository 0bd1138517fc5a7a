"""What the benchmarks of question answering share: SQuAD in windows, a start, training that goes on, judging by F1.

Methods are calibrated and searched on questions about articles of the training split that nothing is trained on; figures are
of the dev set (the split "validation"), or of questions drawn from it. What a model scored is kept in OUT/judged.jsonl, by a
digest of weights, settings and questions: a script that was interrupted, or another one with the same --out, runs nothing
twice.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from transformers import AutoModelForQuestionAnswering, AutoTokenizer, set_seed

import thresher
from records import record
from responses import DEVICE, IMAGES, keep, kept, weights
from starts import minilm
from thresher.cli.question_work import QuestionWork
from thresher.measure.flops import dense_flops
from thresher.measure.run import prepared, run, run_packed
from thresher.model import attachment_of
from thresher.policy import PolicyConfig, Stage
from thresher.report import Chart, save_chart
from thresher.tasks.answering import EncodedQuestions, QuestionTask
from thresher.tasks.data import load_rows
from thresher.tasks.long_contexts import long_contexts

HELD_OUT = 3  # articles
CARRIED = ("input_ids", "attention_mask", "token_type_ids", "start_positions", "end_positions")
METRIC = "f1"


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that all of these benchmarks have."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--data-dir", required=True, type=Path)
    made.add_argument("--out", required=True, type=Path, help="models are kept here and not trained again")
    made.add_argument("--start", type=Path, help="a checkpoint that answers questions; default: MiniLM, trained in OUT")
    made.add_argument("--label", default="minilm", help="the start's name in records and charts")
    made.add_argument("--start-passes", type=int, default=24_000, help="windows that the default start reads")
    made.add_argument("--passes", type=int, default=12_000, help="windows read forward and backward, for each method")
    made.add_argument(
        "--learning-rate", type=float, default=1e-4, help="of the model; MiniLM wants more than the paper's 3e-5"
    )
    made.add_argument(
        "--alpha",
        type=float,
        default=1.0,
        help="weight of the predictors' loss; in so few steps the paper's .1 teaches little",
    )
    made.add_argument("--seeds", type=int, nargs="+", default=[0])
    made.add_argument("--long", action="store_true", help="paragraphs among their neighbours, up to 512 tokens")
    made.add_argument("--questions", type=int, help="of the dev set, drawn; default: all")
    made.add_argument("--held-out", type=int, default=400, help="questions to calibrate and search on")
    made.add_argument("--limit", type=int, help="at most so many questions of any split, to try things; implies --dry")
    made.add_argument("--dry", action="store_true", help="record nothing, draw into OUT")
    return made


@dataclass(frozen=True)
class Judged:
    """speedup: FLOPs of the packed model that drops nothing / FLOPs spent. exact, f1: percent. each: F1 of every question."""

    speedup: float
    exact: float
    f1: float
    each: list[float]

    def lost(self, start: Judged) -> float:
        """Points of F1 below the start."""
        return start.f1 - self.f1

    def uncertainty(self, start: Judged) -> float:
        """The standard error of `lost` over the questions, which both answered."""
        difference = np.array(start.each) - np.array(self.each)
        return float(100 * difference.std() / len(difference) ** 0.5)


class Bench:
    """SQuAD and a start, as the options name them."""

    def __init__(self, args: argparse.Namespace) -> None:
        thresher.keep_memory()
        self.args = args
        self.dry = args.dry or args.limit is not None
        self.suffix = "-long" if args.long else ""
        self.task = QuestionTask(max_length=512 if args.long else 384, stride=128)
        args.out.mkdir(parents=True, exist_ok=True)
        self.judged = _Kept(args.out / "judged.jsonl")

    # Questions.

    @cached_property
    def tokenizer(self) -> Any:
        return AutoTokenizer.from_pretrained(self.args.start or minilm())

    def _drawn(self, rows: datasets.Dataset, most: int | None) -> datasets.Dataset:
        """At most so many rows, the same ones in every run, long where that is asked for."""
        count = min(n for n in (most, self.args.limit, len(rows)) if n is not None)
        drawn = rows if count == len(rows) else rows.shuffle(seed=0, keep_in_memory=True).select(range(count))
        if not self.args.long:
            return drawn
        return long_contexts(drawn, self.tokenizer, max_length=self.task.max_length, among=rows)

    @cached_property
    def _articles(self) -> tuple[datasets.Dataset, datasets.Dataset]:
        """Training rows, and those of the articles that are held out."""
        rows = load_rows(self.args.data_dir / "squad", split="train")
        held_out = set(sorted(set(rows["title"]))[:HELD_OUT])
        apart = np.array([title in held_out for title in rows["title"]])
        most = (None, self.args.held_out)
        return tuple(  # type: ignore[return-value]
            self._drawn(rows.select(np.flatnonzero(of)), n) for of, n in zip((~apart, apart), most, strict=True)
        )

    @cached_property
    def train(self) -> datasets.Dataset:
        encoded = self.task.encode(self._articles[0], self.tokenizer, training=True).rows
        return encoded.select_columns([name for name in CARRIED if name in encoded.column_names])

    @cached_property
    def held_out(self) -> EncodedQuestions:
        return self.task.encode(self._articles[1], self.tokenizer)

    @cached_property
    def dev(self) -> EncodedQuestions:
        rows = load_rows(self.args.data_dir / "squad", split="validation")
        return self.task.encode(self._drawn(rows, self.args.questions), self.tokenizer)

    def held_out_f1(self, predictions: np.ndarray) -> float:
        return 100 * self.held_out.judge.metrics(self.held_out.texts(predictions))[METRIC]

    # Models.

    @cached_property
    def start(self) -> Path:
        """The fine-tuned model that everything begins from: as named, or MiniLM trained in OUT."""
        directory: Path = self.args.start or self.args.out / f"start{self.suffix}"
        if self.args.start is None and not (directory / "thresher.json").is_file():
            print("training the start", flush=True)
            set_seed(0)
            # Attention dropout would send CPU attention down its slow path.
            new = AutoModelForQuestionAnswering.from_pretrained(minilm(), attention_probs_dropout_prob=0.0)
            epochs = self.args.start_passes / len(self.train)
            stage = Stage(name="start", mode="off", epochs=epochs, learning_rate=self.args.learning_rate)
            thresher.fit(
                new, "block-skim", self.train, self.tokenizer, directory, stages=(stage,), seed=0, progress=False
            )
        return directory

    def model(self, policy: PolicyConfig | None = None, start: Path | None = None) -> Any:
        """A start, packed, with a method."""
        model = AutoModelForQuestionAnswering.from_pretrained(start or self.start).eval().to(DEVICE)
        return thresher.attach(model, None if policy is None else self.fitted(policy, model))

    def fitted(self, policy: PolicyConfig, model: Any) -> PolicyConfig:
        """With the question kept."""
        return QuestionWork(question=self.task).fitting(policy, self.tokenizer, model)

    def trained(
        self,
        name: str,
        policy: PolicyConfig,
        share: dict[str, float],
        *,
        seed: int = 0,
        start: Path | None = None,
        overrides: dict[str, float] | None = None,
        **options: Any,
    ) -> Any:
        """A start trained with a method in OUT/name-seed, or what was trained there before.

        share: of the passes, for each stage. overrides: other settings of stages.
        """
        args, begun = self.args, self.model(start=start)
        directory = args.out / f"{name}{self.suffix}-{seed}"
        passes = {f"{stage}.epochs": part * args.passes for stage, part in share.items()}
        settings = {
            "start": weights(begun),
            "policy": policy.to_dict(),
            "stages": {**passes, **(overrides or {})},
            "windows": len(self.train),
            "speedup": options.get("speedup"),
        }
        if (found := kept(directory, settings)) is not None:
            return found
        print(f"training {name}, seed {seed}", flush=True)
        epochs = {stage: count / len(self.train) for stage, count in passes.items()}
        return thresher.fit(
            begun,
            self.fitted(policy, begun),
            self.train,
            self.tokenizer,
            directory,
            overrides={**epochs, **(overrides or {})},
            seed=seed,
            notes=keep(settings),
            progress=False,
            **options,
        )

    # Judging.

    @cached_property
    def _dev_batches(self) -> Any:
        return list(prepared(self.model(), self.dev.rows))

    @cached_property
    def _questions(self) -> str:
        """A digest of what is judged on."""
        return hashlib.sha256(repr((self.dev.rows["input_ids"][:], self.dev.ids)).encode()).hexdigest()

    def judge(self, model: Any, *, packed: bool = False) -> Judged:
        """packed: drop nothing."""
        policy = attachment_of(model).policy
        said: list[Any] = [weights(model), self._questions, packed]
        if policy is not None and not packed:
            learned = {name: value.tolist() for name, value in policy.state_dict().items()}
            said += [policy.config.method, policy.config.to_dict(), learned]
        key = hashlib.sha256(json.dumps(said, default=str).encode()).hexdigest()
        if key not in self.judged:
            found = (run_packed if packed else run)(model, self._dev_batches)
            exact, f1 = self.dev.judge.each(self.dev.texts(found.predictions))
            each = [round(one, 5) for one in f1.tolist()]
            self.judged[key] = Judged(found.speedup, 100 * float(exact.mean()), 100 * float(f1.mean()), each)
        return self.judged[key]

    def padding(self, model: Any, width: int) -> float:
        """FLOPs of the dev set's windows padded to `width` tokens / FLOPs without padding, nothing dropped."""
        geometry = attachment_of(model).engine.entrance.geometry
        real = sum(dense_flops(geometry, len(ids)) for ids in self.dev.rows["input_ids"])
        return dense_flops(geometry, width) * len(self.dev.rows) / real

    def record(self, file: str, id: str, what: str, value: float, unit: str, **about: Any) -> None:
        print(f"{id}: {value:.4g} {unit} {json.dumps(about.get('spread')) if about.get('spread') else ''}", flush=True)
        if self.dry:
            return
        whole = self.args.questions is None
        split = "validation (the whole dev set)" if whole else "validation (questions drawn)"
        about = {"seeds": [0], "examples": len(self.dev.ids), **about}
        about["note"] = f"{self.about}; {about['note']}" if about.get("note") else self.about
        record(file, id, what, value, unit, data="squad", split=split, **about)

    @property
    def about(self) -> str:
        where = "paragraphs among their neighbours, at most 512 tokens" if self.args.long else "at most 384 tokens"
        return (
            f"{self.args.label}; {where}; {self.args.passes} windows read in training; Block-Skim's alpha "
            f"{self.args.alpha}; calibrated on {len(self.held_out.ids)} questions of held-out articles"
        )

    def draw(self, chart: Chart, name: str) -> None:
        print("drawn:", save_chart(chart, (self.args.out if self.dry else IMAGES) / f"{name}{self.suffix}.svg"))


class _Kept(dict[str, Judged]):
    """What was judged before, by its key; what is added goes to the file."""

    def __init__(self, file: Path) -> None:
        self.file = file
        whole, newline, torn = (file.read_bytes() if file.is_file() else b"").rpartition(b"\n")
        if torn:  # by an interruption
            os.truncate(file, len(whole) + len(newline))
        lines = map(json.loads, whole.splitlines())
        super().__init__({found.pop("key"): Judged(**found) for found in lines})

    def __setitem__(self, key: str, found: Judged) -> None:
        super().__setitem__(key, found)
        with self.file.open("a") as stream:
            stream.write(json.dumps({"key": key, **asdict(found)}) + "\n")
