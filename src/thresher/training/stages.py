"""One stage on transformers.Trainer: accumulation, mixed precision, several GPUs, checkpoints and resuming come with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import datasets
import torch
from transformers import (
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_utils import get_last_checkpoint

from thresher.errors import OptionError
from thresher.model import attachment_of
from thresher.policy import Policy, Stage
from thresher.training.learner import Learner

Precision = Literal["auto", "float32", "bfloat16"]


class _WithEvidence:
    """A collator that pads `evidence` too, which tokenizers know nothing of: nothing is evidence where nothing is."""

    def __init__(self, collator: Any, side: str) -> None:
        self.collator, self.left = collator, side == "left"

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> Any:
        batch = self.collator([{name: value for name, value in row.items() if name != "evidence"} for row in rows])
        evidence = torch.zeros_like(batch["input_ids"])
        for marks, row in zip(evidence, rows, strict=True):
            place = slice(len(marks) - len(row["evidence"]), None) if self.left else slice(len(row["evidence"]))
            marks[place] = torch.tensor(row["evidence"])
        batch["evidence"] = evidence
        return batch


class _StageTrainer(Trainer):
    """Trainer with a learning rate of its own for the policy's parameters."""

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            learner: Learner = self.model  # type: ignore[assignment]
            stage = learner.stage
            decayed = set(self.get_decay_parameter_names(learner))
            groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
            for name, parameter in learner.named_parameters():
                if not parameter.requires_grad:
                    continue
                own = name.startswith("policy.")
                rate = stage.policy_learning_rate if own else stage.learning_rate
                decay = stage.weight_decay if name in decayed and not own else 0.0
                groups.setdefault((rate or 0.0, decay), []).append(parameter)
            kind, options = self.get_optimizer_cls_and_kwargs(self.args)
            self.optimizer = kind(
                [{"params": p, "lr": rate, "weight_decay": decay} for (rate, decay), p in groups.items()], **options
            )
        return self.optimizer


class _AfterStep(TrainerCallback):
    """Lets the policy keep its parameters inside their bounds."""

    def __init__(self, policy: Policy[Any]) -> None:
        self.policy = policy

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
    Raises OptionError when the stage needs labels that the rows lack.
    """
    if stage.label_weight and "labels" not in rows.column_names and "start_positions" not in rows.column_names:
        raise OptionError(
            f"The stage {stage.name!r} learns from labels and these rows have none; give labels, or distil (no labels needed)."
        )
    policy = attachment_of(model).policy
    learner = Learner(model, stage, teacher)
    frozen = []
    if policy is not None:
        policy.mode = stage.mode
        if stage.policy_learning_rate is None:
            frozen = [p for p in policy.parameters() if p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)
    per_token = "labels" in rows.column_names and isinstance(rows[0]["labels"], list)
    collator: Any = (DataCollatorForTokenClassification if per_token else DataCollatorWithPadding)(tokenizer)
    if "evidence" in rows.column_names:
        collator = _WithEvidence(collator, tokenizer.padding_side)
    settings = training_arguments(
        directory,
        {
            "num_train_epochs": stage.epochs,
            "learning_rate": stage.learning_rate,
            "per_device_train_batch_size": stage.batch_size,
            "warmup_steps": stage.warmup,
            "weight_decay": stage.weight_decay,
            "seed": seed,
            "disable_tqdm": not progress,
            **arguments,
        },
        precision,
    )
    trainer = _StageTrainer(
        learner,
        settings,
        train_dataset=rows,
        data_collator=collator,
        callbacks=[*callbacks, *([] if policy is None else [_AfterStep(policy)])],
    )
    trainer.remove_callback(PrinterCallback)  # it would print to standard output, which belongs to the caller
    last = get_last_checkpoint(str(directory)) if resume and Path(directory).is_dir() else None
    try:
        result = trainer.train(resume_from_checkpoint=last)
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
        if policy is not None:
            policy.mode = "hard"
        model.eval()
    return dict(result.metrics)
