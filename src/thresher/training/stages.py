"""One stage on transformers.Trainer: accumulation, mixed precision, several GPUs, checkpoints and resuming come with it."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import datasets
import torch
import torch.nn.functional as F
from accelerate import PartialState
from torch.utils.data import DataLoader
from transformers import (
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from thresher.errors import DataError, OptionError, ThresherError
from thresher.memory import give_back_memory
from thresher.model import attachment_of, find_encoder
from thresher.packed import PackedTokens
from thresher.policy import Batch, Policy, Stage
from thresher.targets import check_labels, check_tokens
from thresher.training.learner import FOR_THE_POLICY, Learner
from thresher.training.resuming import last_checkpoint
from thresher.training.salient import COLUMN, check_saliency

Precision = Literal["auto", "float32", "bfloat16"]
COUNTED = 64  # rows at a time that a policy counts something in before a stage


class _ForThePolicy:
    """A collator that pads what only a policy reads too, which tokenizers know nothing of: with 0, on their side."""

    def __init__(self, collator: Any, side: str) -> None:
        self.collator, self.left = collator, side == "left"

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> Any:
        columns = [name for name in FOR_THE_POLICY if name in rows[0]]
        batch = self.collator([{k: v for k, v in row.items() if k not in columns} for row in rows])
        for name in columns:
            batch[name] = self._padded(name, rows, batch["input_ids"].shape[1])
        return batch

    def _padded(self, name: str, rows: Sequence[Mapping[str, Any]], width: int) -> torch.Tensor:
        values = []
        for row in rows:
            value = torch.tensor(row[name])
            short = width - len(value)
            if len(value) != len(row["input_ids"]):
                raise DataError(
                    f"A row has {len(row['input_ids'])} tokens but {len(value)} of {name!r}; give one a token."
                )
            values.append(F.pad(value, (short, 0) if self.left else (0, short)))
        return torch.stack(values)


class RatesTrainer(Trainer):
    """Trainer whose parameters learn, and decay, each as its name says."""

    def rate_of(self, name: str) -> float:
        raise NotImplementedError

    def decay_of(self, name: str) -> float:
        """Where transformers lets the parameter decay at all."""
        return float(self.args.weight_decay)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            learner: Any = self.model
            decayed = set(self.get_decay_parameter_names(learner))
            groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
            for name, parameter in learner.named_parameters():
                if parameter.requires_grad:
                    decay = self.decay_of(name) if name in decayed else 0.0
                    groups.setdefault((self.rate_of(name), decay), []).append(parameter)
            kind, options = self.get_optimizer_cls_and_kwargs(self.args)
            self.optimizer = kind(
                [{"params": p, "lr": rate, "weight_decay": decay} for (rate, decay), p in groups.items()], **options
            )
        return self.optimizer


class _StageTrainer(RatesTrainer):
    """With a learning rate of its own for the policy's parameters, and for the exit's."""

    @property
    def learner(self) -> Learner:
        return self.model  # type: ignore[return-value]

    def rate_of(self, name: str) -> float:
        stage = self.learner.stage
        rate = stage.policy_learning_rate if self._alone(name) else stage.learning_rate
        if self._along(name) and stage.predictor_learning_rate is not None:
            rate = stage.predictor_learning_rate
        return (stage.exit_learning_rate if name.startswith("exit.") else rate) or 0.0

    def decay_of(self, name: str) -> float:
        return 0.0 if self._alone(name) else self.learner.stage.weight_decay

    def _along(self, name: str) -> bool:
        """Whether it is of the policy and learns with the model."""
        policy = self.learner.policy
        return policy is not None and name.startswith(tuple(f"policy.{own}" for own in policy.with_the_model))

    def _alone(self, name: str) -> bool:
        return name.startswith("policy.") and not self._along(name)


class _ToldToPolicy(TrainerCallback):
    """Lets the policy keep its parameters inside their bounds, and change its ways from epoch to epoch."""

    def __init__(self, policy: Policy[Any]) -> None:
        self.policy = policy

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self.policy.before_epoch(math.floor((state.epoch or 0.0) + 1e-6), state.num_train_epochs)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self.policy.after_step()


def trains_on_cpu(arguments: Mapping[str, Any]) -> bool:
    """Where a stage runs: on the GPU where there is one, unless `use_cpu` says otherwise."""
    return bool(arguments.get("use_cpu", not torch.cuda.is_available()))


def bfloat16_is_fast(on_cpu: bool) -> bool:
    """Whether the place of training multiplies bfloat16 natively (a GPU that can, or AVX-512 BF16 / AMX)."""
    if not on_cpu:
        return bool(torch.cuda.is_bf16_supported())
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def training_arguments(
    directory: str | Path, given: Mapping[str, Any], precision: Precision = "auto"
) -> TrainingArguments:
    """Settings for transformers.Trainer as every training here starts from: checkpoints in `directory`, nothing said to the
    outside, bfloat16 where it is fast; `given` goes before these."""
    on_cpu = trains_on_cpu(given)
    options = {
        "output_dir": str(directory),
        "bf16": precision == "bfloat16" or (precision == "auto" and bfloat16_is_fast(on_cpu)),
        "use_cpu": on_cpu,
        "save_strategy": "steps",
        "save_steps": 500,
        "save_total_limit": 1,
        "logging_steps": 50,
        "report_to": [],
        "remove_unused_columns": False,
        "dataloader_pin_memory": not on_cpu,
        "log_level": "error",
    }
    settings = TrainingArguments(**{**options, **given})
    # DataParallel would copy the hooks with the model; several GPUs are torchrun's.
    settings._n_gpu = min(settings.n_gpu, 1)
    return settings


def run_stage(
    model: Any,
    stage: Stage,
    rows: datasets.Dataset,
    tokenizer: Any,
    directory: str | Path,
    *,
    teacher: Any = None,
    seed: int = 0,
    precision: Precision = "auto",
    progress: bool = True,
    resume: bool = True,
    callbacks: Sequence[TrainerCallback] = (),
    **arguments: Any,
) -> dict[str, float]:
    """Train an attached model through one stage, in place. Returns the trainer's own metrics.

    rows: encoded rows (input_ids, attention_mask, ... and labels where the stage uses them), unpadded.
    directory: checkpoints go here; a run that was interrupted goes on from the last one when `resume`.
    teacher: the stock model for distillation; by default a copy of the model as it is now.
    progress: transformers' own bars; callbacks: those of your own, for another display.
    arguments: anything else transformers.TrainingArguments takes (gradient_accumulation_steps, max_steps, use_cpu, ...).
    Raises OptionError when the stage needs labels that the rows lack, DataError for a label that is none of the model's,
    ThresherError where training diverges.
    """
    policy = attachment_of(model).policy
    settings = {
        "num_train_epochs": stage.epochs,
        "learning_rate": stage.learning_rate,
        "per_device_train_batch_size": stage.batch_size,
        "warmup_steps": stage.warmup,
        "weight_decay": stage.weight_decay,
        "seed": seed,
        "disable_tqdm": not progress,
        **arguments,
    }
    _refuse(model, as_run(stage, settings, len(rows)), rows)
    learner, collator = Learner(model, stage, teacher), _collator(model, rows, tokenizer)
    with _in_its_modes(model, stage):
        if policy is not None and not stage.exits:
            policy.before_stage(_counted(model, rows, collator))
        trainer = _StageTrainer(
            learner,
            training_arguments(directory, settings, precision),
            train_dataset=rows,
            data_collator=collator,
            callbacks=[*callbacks, *([] if policy is None else [_ToldToPolicy(policy)])],
        )
        trainer.remove_callback(PrinterCallback)  # it would print to standard output, which belongs to the caller
        last = last_checkpoint(Path(directory)) if resume else None
        result = trainer.train(resume_from_checkpoint=last)
    _refuse_no_numbers(model, stage, settings["learning_rate"])
    give_back_memory()
    return dict(result.metrics)


def _counted(model: Any, rows: datasets.Dataset, collator: Any) -> Iterator[tuple[PackedTokens, Batch]]:
    """All rows in their order, without the encoder: each token's state is a zero."""
    engine, device = attachment_of(model).engine, find_encoder(model).device
    for given in DataLoader(rows, batch_size=COUNTED, collate_fn=collator):
        batch = {name: value.to(device) for name, value in given.items()}
        taken = {name: value for name, value in batch.items() if name in engine.signature.parameters}
        now = engine.start((), taken)
        assert now is not None
        yield now.pack(torch.zeros(*batch["input_ids"].shape, 1, device=device)), batch


def _refuse_no_numbers(model: Any, stage: Stage, rate: float) -> None:
    """Raises ThresherError where training diverged."""
    attachment = attachment_of(model)
    parts = {
        "the model's weights": (model, f"learning_rate ({rate:g})"),
        "the method's weights": (attachment.policy, f"policy_learning_rate ({stage.policy_learning_rate})"),
        "the exit's branches": (attachment.exit, f"exit_learning_rate ({stage.exit_learning_rate})"),
    }
    broken = [
        (what, of)
        for what, (part, of) in parts.items()
        if part is not None and not all(parameter.isfinite().all() for parameter in part.parameters())
    ]
    if broken:
        what = " and ".join(what for what, _ in broken)
        raise ThresherError(
            f"Training diverged in the stage {stage.name!r}: {what} are no numbers any more; lower its "
            f"{' and '.join(of for _, of in broken)}, or settings of the method that are out of the ordinary."
        )


def as_run(stage: Stage, arguments: Mapping[str, Any], rows: int) -> Stage:
    """The stage with the epochs that it comes to, whatever of Trainer's arguments says how many."""
    steps = arguments.get("max_steps", -1)
    if steps <= 0:
        return dataclasses.replace(stage, epochs=float(arguments.get("num_train_epochs", stage.epochs)))
    size = arguments.get("per_device_train_batch_size", stage.batch_size)
    processes = PartialState(cpu=trains_on_cpu(arguments)).num_processes
    a_step = size * arguments.get("gradient_accumulation_steps", 1) * processes
    return dataclasses.replace(stage, epochs=float(steps / max(math.ceil(rows / a_step), 1)))


def _refuse(model: Any, stage: Stage, rows: datasets.Dataset) -> None:
    """Raises OptionError for a stage without the exit or the labels that it learns with, or that the policy does not take."""
    attachment = attachment_of(model)
    exit, policy = attachment.exit, attachment.policy
    if stage.exits and exit is None:
        raise OptionError(f"The stage {stage.name!r} trains an exit and the model has none; attach it with exit=.")
    refuse_unfit(model, stage, rows)
    if policy is not None and policy.learns_saliency and COLUMN in rows.column_names:
        check_saliency(rows)
    if policy is not None and not stage.exits:
        policy.check(stage)


def refuse_unfit(model: Any, stage: Stage, rows: datasets.Dataset) -> None:
    """For a stage that learns from labels raises OptionError where the rows have none, DataError for one that is none of the
    model's; for any stage DataError for a token that is none."""
    check_tokens(find_encoder(model), rows)
    if "labels" in rows.column_names or "start_positions" in rows.column_names:
        if learns_from_labels(model, stage):  # else nobody looks at them
            check_labels(find_encoder(model), rows)
        return
    method = _labelled_method(model, stage)
    if method is not None:
        raise OptionError(
            f"{method.method!r} learns from labels and these rows have none; give labels, or another method."
        )
    if stage.label_weight:
        raise OptionError(
            f"The stage {stage.name!r} learns from labels and these rows have none; give labels, or distil (no labels needed)."
        )


def learns_from_labels(model: Any, stage: Stage) -> bool:
    return bool(stage.label_weight) or _labelled_method(model, stage) is not None


def _labelled_method(model: Any, stage: Stage) -> Any:
    """The settings of what the stage teaches, where that learns from labels whatever weight they have; else None."""
    exit, policy = attachment_of(model).exit, attachment_of(model).policy
    if stage.exits:
        return exit.config if exit is not None and exit.config.labelled else None
    return policy.config if policy is not None and policy.config.labelled and stage.mode != "off" else None


@contextlib.contextmanager
def _in_its_modes(model: Any, stage: Stage) -> Iterator[None]:
    """Inside this block policy and exit act as the stage has them, and only what it trains learns."""
    attachment = attachment_of(model)
    exit, policy = attachment.exit, attachment.policy
    still: list[torch.nn.Parameter] = []
    if policy is not None:
        policy.mode = stage.mode
        if stage.policy_learning_rate is None:
            still += policy.parameters()
    before = None if exit is None else exit.mode
    if exit is not None:
        exit.mode = ("sample" if stage.exit_samples else "record") if stage.exits else "off"
        if not stage.exits:
            still += exit.parameters()
    if stage.exits and stage.learning_rate == 0:  # nothing goes back through what does not learn
        still += model.parameters()
    still = [parameter for parameter in still if parameter.requires_grad]
    for parameter in still:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in still:
            parameter.requires_grad_(True)
        if policy is not None:
            policy.mode = "hard"
        if exit is not None:
            assert before is not None
            exit.mode = "leave" if stage.exits else before
        model.eval()


def _collator(model: Any, rows: datasets.Dataset, tokenizer: Any) -> Any:
    """What pads rows to batches: labels too, where each token has one."""
    several = find_encoder(model).config.problem_type == "multi_label_classification"
    per_token = not several and "labels" in rows.column_names and isinstance(rows[0]["labels"], list)
    collator: Any = (DataCollatorForTokenClassification if per_token else DataCollatorWithPadding)(tokenizer)
    if not set(FOR_THE_POLICY).isdisjoint(rows.column_names):
        return _ForThePolicy(collator, tokenizer.padding_side)
    return collator
