"""What answers: a model, or an exported directory, whose graph answers one row at a time on each core."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import datasets
import numpy as np
from transformers import PreTrainedTokenizerFast

from thresher.cli.checkpoints import real_names
from thresher.cli.models import Opened, open_model
from thresher.cli.options import assignments, convert, field_types, place_of
from thresher.cli.work import EmbeddingWork, TextWork, Work
from thresher.errors import OptionError
from thresher.exported.directory import MANIFEST, TOKENIZER, Manifest, is_exported
from thresher.exported.runner import Row, Runner
from thresher.measure.run import MODEL_INPUTS, Run
from thresher.model import attachment_of, set_exit


@dataclass(frozen=True)
class OpenedGraph:
    """An exported directory, its tokenizer, and what it is for; used as `Opened` is."""

    runner: Runner
    tokenizer: Any
    work: Work

    def limit(self, asked: int | None = None) -> int:
        """Tokens to read of a row: as asked, else as exported."""
        most = self.runner.manifest.max_length
        if asked is not None and asked > most:
            raise OptionError(
                f"{self.runner.path} was exported for {most} tokens, not {asked}; export the model again with --max-length."
            )
        return most if asked is None else asked

    def answer(
        self,
        rows: datasets.Dataset,
        *,
        batch_size: int | None = None,
        on_done: Callable[[int], object] | None = None,
    ) -> Run:
        """As of a model; a graph knows no batches."""
        outputs = self.runner.run(feeds(rows), on_done=on_done)
        return Run(_stacked([output.answer for output in outputs]), (), self.runner.speedup(outputs))

    def text_work(self) -> Work:
        """The task. Raises OptionError for a model whose answers no command can score."""
        if self.work.kind == "other":
            raise OptionError(
                f"{self.runner.path} neither a classifier, a regressor, a question answerer nor a sentence embedder; "
                "thresher bench takes it, and thresher.Runner does from Python."
            )
        return self.work


T = TypeVar("T", bound=Opened | OpenedGraph)


def in_windows(opened: T, stride: int | None) -> T:
    """The same, reading long texts in windows that share `stride` tokens; None: as it is.

    Raises OptionError for a model that reads other things than single texts.
    """
    return opened if stride is None else replace(opened, work=opened.work.in_windows(stride))


def answering_from(opened: T, threshold: float | None) -> T:
    """The same, giving no answer to a question where that scores so much above the best one; None: as it is.

    Raises OptionError for a model that answers no questions.
    """
    return opened if threshold is None else replace(opened, work=opened.work.with_no_answer(threshold))


def open_to_answer(
    name: str,
    device: str,
    *,
    batch_size: object = None,
    workers: int | None = None,
    speedup: float | None = None,
    tau: float | None = None,
    exit_settings: Sequence[str] | None = None,
) -> Opened | OpenedGraph:
    """A model on `device` (auto, cpu, cuda) or an exported directory. Raises OptionError for options of the other one.

    speedup: the point of the model's frontier to run at. tau: the threshold of its exit. exit_settings: those of its exit, as
    `--set-exit` gives them.
    """
    if not is_exported(Path(name).expanduser()):
        if workers is not None:
            raise OptionError("--workers is for an exported directory; a model uses every core by itself.")
        return leaving_by(open_model(name, place_of(device), speedup=speedup), name, tau, exit_settings)
    if batch_size is not None:
        raise OptionError(f"{name} is an exported graph, which runs one row at a time; leave --batch-size out.")
    if device == "cuda":
        raise OptionError(f"{name} is an exported graph, which runs on the CPU; leave --device out.")
    if speedup is not None:
        raise OptionError(f"{name} is an exported graph, which runs as it was exported; leave --speedup out.")
    if tau is not None or exit_settings:
        raise OptionError(
            f"{name} is an exported graph, which runs as it was exported; leave --tau and --set-exit out."
        )
    return open_graph(name, workers)


def leaving_by(opened: Opened, name: str, tau: float | None, settings: Sequence[str] | None) -> Opened:
    """The same with its exit set: its threshold to `tau`, and what `settings` (NAME=VALUE) says.

    Raises OptionError for a model without an exit, and for an exit that is not set by these.
    """
    if tau is None and not settings:
        return opened
    exit = attachment_of(opened.model).exit
    if exit is None:
        raise OptionError(
            f"{name} has no exit that --tau or --set-exit could set; leave them out, or train one with thresher fit --exit."
        )
    known = exit.config.at_run_time()
    if tau is not None and "threshold" not in known:
        raise OptionError(
            f"--tau is a threshold, and the exit {exit.config.method!r} has none (it has {known[0]}); set that with "
            "--set-exit, or how early rows leave with thresher calibrate."
        )
    given = assignments(settings, "--set-exit")
    if tau is not None and "threshold" in given:
        raise OptionError("Give the threshold once, as --tau or as --set-exit threshold.")
    hints = field_types(type(exit.config))
    found = {key: convert(key, text, hints.get(key, float)) for key, text in given.items()}
    set_exit(opened.model, **found, **({} if tau is None else {"threshold": tau}))
    return opened


def open_graph(name: str, workers: int | None = None) -> OpenedGraph:
    """An exported directory. Raises CheckpointError for one that has changed, OptionError for one without a tokenizer."""
    runner = Runner(Path(name).expanduser(), workers=workers)
    file = runner.path / TOKENIZER
    if not file.is_file():
        raise OptionError(f"{name} was exported without a tokenizer; export the model again with one.")
    # Only what the runner itself reads, so that rows are the same tokens as in Runner.predict.
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(file), model_input_names=list(MODEL_INPUTS))
    noted = runner.manifest.notes.get("task")
    if noted is not None:
        return OpenedGraph(runner, tokenizer, Work.from_notes(noted, file=MANIFEST, again="export"))
    return OpenedGraph(runner, tokenizer, _guessed(runner))


def described(manifest: Manifest) -> str:
    """Runtime, precision, method and exit."""
    exit = f", exit {manifest.exit}" if manifest.exit else ""
    return f"{manifest.runtime}, {'int8' if manifest.int8 else 'float32'}, {manifest.method or 'nothing dropped'}{exit}"


def feeds(rows: datasets.Dataset) -> list[Row]:
    """Encoded rows as a runner takes them."""
    columns = [name for name in ("input_ids", "token_type_ids") if name in rows.column_names]
    return rows.select_columns(columns).to_list()  # type: ignore[no-any-return]


def _stacked(answers: list[np.ndarray]) -> np.ndarray:
    """[n, ...]; of answers to every token [n, N, C], with NaN beyond a row's tokens, as `measure.run.run` has them."""
    if answers[0].ndim < 2:
        return np.stack(answers)
    widest = max(map(len, answers))
    return np.stack([np.pad(a, ((0, widest - len(a)), (0, 0)), constant_values=np.nan) for a in answers])


def _guessed(runner: Runner) -> Work:
    """The task of a graph that was exported without notes, by what it answers to an empty text."""
    from thresher.tasks.text import TextTask

    if "sentence_embedding" in runner.manifest.outputs:
        return EmbeddingWork()
    (output,) = runner.run(runner.encode([""]))
    if runner.manifest.outputs[0] not in ("logits", "scores") or output.answer.ndim != 1:
        return Work()
    classes = len(output.answer)
    if classes == 1:
        return TextWork(text=TextTask("regression", 1), any_pair=True)
    names = real_names(runner.manifest.labels) or None
    return TextWork(text=TextTask("classification", classes, names), any_pair=True)
