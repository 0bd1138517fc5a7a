"""BERT-FP post-training: an encoder learns its dialogues before it is fine-tuned to select responses (Han et al. 2021)."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from accelerate import PartialState
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    set_seed,
)
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import logging

from thresher.backbones.general import takes_types
from thresher.checkpoint import staged
from thresher.errors import CheckpointError, OptionError, UnsupportedModelError, first_line
from thresher.model import attach, detach
from thresher.targets import IGNORED
from thresher.tasks.responses import prepare
from thresher.tasks.windows import Windows, read_dialogues
from thresher.training.resuming import begin, by_one, last_checkpoint, refuse_another_run
from thresher.training.stages import Precision, training_arguments, trains_on_cpu

REPORT = "post_training.json"
MEASURED = 1000  # windows whose losses the report states


def post_train(
    start: str | Path,
    dialogues: datasets.Dataset,
    directory: str | Path,
    *,
    k: int = 3,
    max_length: int = 240,
    epochs: float = 1,
    batch_size: int = 50,
    learning_rate: float = 1.5e-5,
    mask_probability: float = 0.15,
    seed: int = 0,
    precision: Precision = "auto",
    progress: bool = True,
    callbacks: Sequence[TrainerCallback] = (),
    **arguments: Any,
) -> dict[str, float]:
    """Post-train an encoder on dialogues (fine-grained post-training, Han et al. 2021) and save it to `directory`.

    It learns at once which words are masked and how an utterance relates to the ones before it, see `tasks.windows`:
    loss = masked language modelling + relevance, without padding.

    start: a checkpoint that transformers loads, of a supported encoder. dialogues: what `read_dialogues` takes.
    k: utterances before the one that is judged; 3 in the paper, 2 for Douban.
    max_length: of an example, special tokens included. mask_probability: of a token that is not special.
    precision, progress, callbacks: as in `run_stage`. arguments: anything else transformers.TrainingArguments takes.
    What is written: the encoder (of BERT with its pooler, which the relevance was read from) and the tokenizer, now with
    [EOS], which AutoModelForSequenceClassification.from_pretrained takes as a start; and `post_training.json`, the
    settings and what is returned.
    Returns the trainer's metrics and, in eval mode on up to 1,000 windows drawn and masked as never before, `mlm_loss`,
    `relevance_loss` and `relevance_accuracy`; beside them the counts of `windows` and of dialogues `left_out` because they
    have fewer than two utterances.
    A run that was interrupted goes on where it stopped when called again with the same directory.
    Raises DataError for dialogues that give no window, UnsupportedModelError for a start that is no supported encoder,
    CheckpointError for one that does not load, OptionError for settings out of range or other than those of an unfinished
    run in `directory`.
    """
    if not 0 < mask_probability < 1:
        raise OptionError(f"The share of masked tokens lies between 0 and 1, and is not {mask_probability}.")
    set_seed(seed)  # for heads that are new
    model, tokenizer = _load(start, max_length)
    windows = Windows(read_dialogues(dialogues), tokenizer, k=k, max_length=max_length, seed=seed)
    settings = {
        "start": str(start),
        "k": k,
        "max_length": max_length,
        "epochs": epochs,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "mask_probability": mask_probability,
        "seed": seed,
        "dialogues": len(dialogues),
        "windows": len(windows),
    }
    work = Path(directory) / "training"
    processes = PartialState(cpu=trains_on_cpu(arguments))
    refuse_another_run(work, settings)
    by_one(processes, lambda: begin(work, settings))
    given = {
        "num_train_epochs": epochs,
        "learning_rate": learning_rate,
        "per_device_train_batch_size": batch_size,
        "seed": seed,
        "disable_tqdm": not progress,
        **arguments,
    }
    examples, masking = _Examples(windows), _Masking(tokenizer, mask_probability)
    trainer = Trainer(
        model,
        training_arguments(work, given, precision),
        train_dataset=examples,
        data_collator=masking,
        callbacks=[_Epochs(examples), *callbacks],
    )
    trainer.remove_callback(PrinterCallback)
    found = dict(trainer.train(resume_from_checkpoint=last_checkpoint(work)).metrics)
    examples.epoch.fill_(math.ceil(trainer.state.epoch or 0))
    found |= {**_measure(model, examples, masking, batch_size), "windows": len(windows), "left_out": windows.left_out}
    by_one(processes, lambda: _finish(model, tokenizer, directory, work, {**settings, **found}))
    return found


class _GivenStates(nn.Module):
    """Stands in for a head's encoder: the head reads the states it is called with."""

    def forward(self, *args: Any, inputs_embeds: Tensor, **kwargs: Any) -> BaseModelOutput:
        return BaseModelOutput(last_hidden_state=inputs_embeds)


class PostTraining(nn.Module):
    """An encoder under two heads, those that transformers gives its family: of classes and of masked words.

    forward(input_ids, attention_mask, ..., labels [B, N], relevance [B]) → {"loss", "mlm_loss", "relevance_loss",
    "relevance_logits" [B, 3]}; labels: the ids behind the masks, -100 elsewhere. The encoder runs once; the head of masked
    words reads their positions alone.
    """

    accepts_loss_kwargs = False  # as in Learner

    def __init__(self, classifier: Any, masked: Any) -> None:
        """classifier, masked: the two models of one start, which then share the classifier's encoder."""
        super().__init__()
        encoder = classifier.base_model
        setattr(masked, masked.base_model_prefix, encoder)
        masked.tie_weights()  # the decoder to the embeddings, where the start has them tied
        setattr(masked, masked.base_model_prefix, _GivenStates())
        self.classifier = classifier
        self.masked = masked
        known = {name for name, _ in self.named_parameters()}
        for name, parameter in list(self.named_parameters(remove_duplicate=False)):
            if name not in known:  # a tied weight is kept under one name, since safetensors refuses two
                owner, _, leaf = name.rpartition(".")
                delattr(self.get_submodule(owner), leaf)
                vars(self.get_submodule(owner))[leaf] = parameter
        self.takes_types = takes_types(encoder)

    def forward(self, labels: Tensor, relevance: Tensor, **batch: Tensor) -> dict[str, Tensor]:
        if not self.takes_types:
            batch.pop("token_type_ids", None)
        states: list[Tensor] = []
        encoder = self.classifier.base_model
        hook = encoder.register_forward_hook(lambda module, args, output: states.append(output[0]))
        try:
            logits = self.classifier(**batch).logits.float()
        finally:
            hook.remove()
        hidden = labels != IGNORED
        words = self.masked(inputs_embeds=states[0][hidden].unsqueeze(0)).logits[0].float()
        # Not the mean, which a batch without a mask does not have.
        mlm = F.cross_entropy(words, labels[hidden], reduction="sum") / hidden.sum().clamp_min(1)
        related = F.cross_entropy(logits, relevance)
        return {"loss": mlm + related, "mlm_loss": mlm, "relevance_loss": related, "relevance_logits": logits}


class _Examples(Dataset[dict[str, Any]]):
    """The examples of an epoch, which is set between epochs."""

    def __init__(self, windows: Windows) -> None:
        self.windows = windows
        self.epoch = torch.zeros((), dtype=torch.long).share_memory_()  # seen by workers that live on

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.windows.example(index, int(self.epoch))


class _Epochs(TrainerCallback):
    """Tells the examples which epoch begins, or goes on."""

    def __init__(self, examples: _Examples) -> None:
        self.examples = examples

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self.examples.epoch.fill_(int(state.epoch or 0))


class _Masking:
    """Examples to a padded batch, of which the same words are masked each time it is made."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, probability: float) -> None:
        self.collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=probability)

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        seeds = [example.pop("seed") for example in examples]
        # A generator that lived on would be elsewhere after an interruption.
        self.collator.generator = torch.Generator().manual_seed(seeds[0])
        return dict(self.collator(examples))


def _load(start: str | Path, max_length: int) -> tuple[PostTraining, PreTrainedTokenizerBase]:
    """The start under its two heads, packed, and its tokenizer, both with [EOS]."""
    if isinstance(start, Path) and not start.is_dir():  # a string may be a name on the hub
        raise CheckpointError(f"There is no directory {start} to start from.")
    try:
        with _quiet():  # that heads are new is no news
            tokenizer = AutoTokenizer.from_pretrained(start)
            # A fine-tuned start may have a classifier of another size.
            classifier = attach(
                AutoModelForSequenceClassification.from_pretrained(start, num_labels=3, ignore_mismatched_sizes=True)
            )
            masked = AutoModelForMaskedLM.from_pretrained(start)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{start} does not load: {first_line(error)}") from error
    except (ValueError, KeyError) as error:  # what transformers says of a family without such a head
        raise UnsupportedModelError(f"{start} is no encoder that can be post-trained: {first_line(error)}") from error
    if tokenizer.mask_token is None:
        raise OptionError(f"The tokenizer of {start} has no mask token, without which no word can be masked.")
    longest = _longest(classifier.base_model)
    if longest is not None and max_length > longest:
        raise OptionError(f"{start} reads {longest} tokens at most, fewer than the maximum length of {max_length}.")
    for model in (classifier, masked):
        prepare(model, tokenizer)
    return PostTraining(classifier, masked), tokenizer


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' reports and bars of loading."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _longest(encoder: nn.Module) -> int | None:
    """How many positions have an embedding; None where they need none."""
    for name, module in encoder.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            return module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
    return None


@torch.no_grad()
def _measure(model: PostTraining, examples: _Examples, masking: _Masking, batch_size: int) -> dict[str, float]:
    """Losses and accuracy on windows from all over the dialogues, as the examples' epoch draws them."""
    model.eval()
    device = next(model.parameters()).device
    chosen = np.linspace(0, len(examples) - 1, min(MEASURED, len(examples))).astype(int).tolist()
    mlm = related = right = words = 0.0
    for batch in DataLoader(Subset(examples, chosen), batch_size, collate_fn=masking):
        batch = {name: values.to(device) for name, values in batch.items()}
        out = model(**batch)
        count = int((batch["labels"] != IGNORED).sum())
        words += count
        mlm += count * float(out["mlm_loss"])
        related += len(batch["relevance"]) * float(out["relevance_loss"])
        right += int((out["relevance_logits"].argmax(-1) == batch["relevance"]).sum())
    return {
        "mlm_loss": mlm / max(1.0, words),
        "relevance_loss": related / len(chosen),
        "relevance_accuracy": right / len(chosen),
    }


def _finish(
    model: PostTraining, tokenizer: PreTrainedTokenizerBase, directory: str | Path, work: Path, report: dict[str, Any]
) -> None:
    encoder = detach(model.classifier).base_model
    encoder.config.num_labels = 2  # transformers' default: the three of the relevance are nobody's after it
    with staged(directory, last=REPORT) as staging, _quiet():
        encoder.save_pretrained(str(staging))
        tokenizer.save_pretrained(str(staging))
        (staging / REPORT).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(work, ignore_errors=True)


__all__ = ["PostTraining", "post_train"]
