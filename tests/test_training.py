"""Losses against plain formulas, and stages that resume, freeze and hand over as they say."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.modeling_outputs import (
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)

import thresher
from helpers import batch, build, config_of, dataset, make, outputs_of, settings, tokenizer, worst
from thresher import checkpoint
from thresher.calibration import agreement
from thresher.errors import DataError, OptionError, TargetError, ThresherError
from thresher.frontier import Point, frontier_of
from thresher.measure.run import run, run_packed
from thresher.methods import CONFIGS
from thresher.model import attachment_of, is_attached, policy_of
from thresher.policy import Stage
from thresher.training import Learner, distillation_loss, fit, run_stage
from thresher.training.frontiers import TRAINED
from thresher.training.learner import neighbourhood_loss, stock_copy
from thresher.training.resuming import last_checkpoint
from thresher.training.stages import bfloat16_is_fast

HARD = Stage(name="hard", mode="hard", batch_size=8, warmup=0.0, learning_rate=1e-3)
SOFT = Stage(name="soft", mode="soft", batch_size=8, warmup=0.0, learning_rate=1e-3, policy_learning_rate=1e-2)
DISTIL = Stage(
    name="distil", mode="hard", batch_size=8, warmup=0.0, learning_rate=1e-3, label_weight=0.0, distil_weight=1.0
)
QUIET: dict[str, Any] = {"progress": False, "precision": "float32"}


def kl(teacher: list[float], student: list[float]) -> float:
    """KL(teacher || student) of two lists of logits."""
    p = [math.exp(x) / sum(map(math.exp, teacher)) for x in teacher]
    q = [math.exp(x) / sum(map(math.exp, student)) for x in student]
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def test_classes_learn_by_kl_from_teacher_to_student() -> None:
    ours, theirs = torch.randn(3, 4) * 2, torch.randn(3, 4) * 2
    loss = distillation_loss(SequenceClassifierOutput(logits=ours), SequenceClassifierOutput(logits=theirs))
    expected = sum(kl(t, s) for t, s in zip(theirs.tolist(), ours.tolist(), strict=True)) / 3
    reverse = sum(kl(s, t) for t, s in zip(theirs.tolist(), ours.tolist(), strict=True)) / 3
    assert float(loss) == pytest.approx(expected, rel=1e-4)
    assert abs(expected - reverse) > 1e-2  # the direction can be told apart


def test_single_values_learn_by_squared_difference() -> None:
    ours, theirs = torch.tensor([[1.0], [3.0]]), torch.tensor([[0.0], [5.0]])
    loss = distillation_loss(SequenceClassifierOutput(logits=ours), SequenceClassifierOutput(logits=theirs))
    assert float(loss) == pytest.approx(2.5)


def test_embeddings_learn_by_cosine() -> None:
    ours, theirs = torch.tensor([[1.0, 0.0], [1.0, 1.0]]), torch.tensor([[0.0, 2.0], [3.0, 3.0]])
    loss = distillation_loss({"sentence_embedding": ours}, {"sentence_embedding": theirs})
    assert float(loss) == pytest.approx(0.5)


def test_tags_learn_over_real_tokens_only() -> None:
    ours, theirs = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    loss = distillation_loss(TokenClassifierOutput(logits=ours), TokenClassifierOutput(logits=theirs), mask)
    real = [(r, c) for r in range(2) for c in range(3) if mask[r, c]]
    expected = sum(kl(theirs[p].tolist(), ours[p].tolist()) for p in real) / len(real)
    assert float(loss) == pytest.approx(expected, rel=1e-4)


def test_spans_learn_over_the_positions_of_each_row() -> None:
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    ours, theirs = torch.randn(2, 2, 3), torch.randn(2, 2, 3)
    loss = distillation_loss(
        QuestionAnsweringModelOutput(start_logits=ours[0], end_logits=ours[1]),
        QuestionAnsweringModelOutput(start_logits=theirs[0], end_logits=theirs[1]),
        mask,
    )
    rows = [(k, r, int(mask[r].sum())) for k in range(2) for r in range(2)]
    expected = sum(kl(theirs[k, r, :n].tolist(), ours[k, r, :n].tolist()) for k, r, n in rows) / 4
    assert float(loss) == pytest.approx(expected, rel=1e-4)


def test_the_learner_adds_labels_teacher_and_method() -> None:
    inputs = batch("bert")
    labels = torch.tensor([0, 1, 2, 0])
    model = thresher.attach(make("bert"), settings(CONFIGS["ltp"], penalty=0.4))
    teacher = stock_copy(make("bert", seed=1))
    assert not is_attached(teacher)
    assert not any(p.requires_grad for p in teacher.parameters())
    stage = Stage(name="x", mode="soft", label_weight=0.25, distil_weight=3.0)
    policy_of(model).mode = "soft"
    learner = Learner(model, stage, teacher)
    out = learner(**inputs, labels=labels)
    with thresher.tracing() as traces:
        said = model(**inputs, labels=labels)
    auxiliary = policy_of(model).auxiliary_loss(traces[0], {})
    assert auxiliary is not None
    expected = 0.25 * said.loss + 3.0 * distillation_loss(said, teacher(**inputs)) + auxiliary
    assert float(out["loss"]) == pytest.approx(float(expected), rel=1e-5)
    assert torch.equal(out["logits"], said.logits)
    out["loss"].backward()
    assert all(p.grad is None for p in teacher.parameters())
    names = [name for name, _ in learner.named_parameters()]
    assert "policy.theta" in names
    assert not any("teacher" in name for name in names)


def test_the_learner_teaches_itself_without_labels() -> None:
    inputs = batch("bert")
    model = make("bert")
    stock = outputs_of(model, inputs)["logits"]
    learner = Learner(thresher.attach(model, "attention-mass"), DISTIL)
    out = learner(**inputs, labels=torch.tensor([0, 1, 2, 0]))
    expected = distillation_loss(SequenceClassifierOutput(logits=out["logits"]), SequenceClassifierOutput(logits=stock))
    assert float(out["loss"]) == pytest.approx(float(expected), rel=1e-4)
    assert float(expected) > 1e-2
    with pytest.raises(OptionError, match="labels"):
        Learner(model, HARD)(**inputs)


def test_outputs_without_an_answer_have_nothing_to_learn_from() -> None:
    with pytest.raises(OptionError, match="neither logits nor an embedding"):
        distillation_loss({"pooler_output": torch.zeros(2, 3)}, {"pooler_output": torch.zeros(2, 3)})


def test_a_stage_learns(tmp_path: Path) -> None:
    rows = dataset(32)
    model = thresher.attach(make("bert"), "attention-mass")
    losses: list[float] = []

    class Watch(fitting_callback()):  # type: ignore[misc]
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **options: Any) -> None:
            losses.extend([logs["loss"]] if "loss" in logs else [])

    metrics = run_stage(
        model, HARD, rows, tokenizer(), tmp_path, num_train_epochs=12, logging_steps=4, callbacks=[Watch()], **QUIET
    )
    assert losses[-1] < 0.5 * losses[0]
    assert not model.training
    assert policy_of(model).mode == "hard"
    assert metrics["epoch"] == 12


def fitting_callback() -> Any:
    from transformers import TrainerCallback

    return TrainerCallback


def test_thresholds_move_only_at_a_rate_of_their_own(tmp_path: Path) -> None:
    rows = dataset(16)
    for rate, moves in ((None, False), (1e-2, True)):
        model = thresher.attach(make("bert"), settings(CONFIGS["ltp"], temperature=0.05))
        before = policy_of(model).theta.detach().clone()
        weights = model.classifier.weight.detach().clone()
        stage = Stage(name="soft", mode="soft", batch_size=8, warmup=0.0, policy_learning_rate=rate)
        run_stage(model, stage, rows, tokenizer(), tmp_path / str(rate), **QUIET)
        assert torch.equal(before, policy_of(model).theta) is not moves
        assert policy_of(model).theta.requires_grad
        assert not torch.equal(weights, model.classifier.weight)
    # A step of Adam is about the learning rate: theirs, not the model's.
    assert float((policy_of(model).theta - before).abs().max()) > 1e-3


def test_a_fast_gpu_says_nothing_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, answer in (("cuda.is_available", True), ("cuda.is_bf16_supported", True),
                         ("cpu._is_avx512_bf16_supported", False), ("cpu._is_amx_tile_supported", False)):  # fmt: skip
        monkeypatch.setattr(f"torch.{name}", lambda answer=answer: answer)
    assert bfloat16_is_fast(on_cpu=False)
    assert not bfloat16_is_fast(on_cpu=True)


def test_a_stage_without_its_labels_is_refused(tmp_path: Path) -> None:
    model = thresher.attach(make("bert"), "first")
    with pytest.raises(OptionError, match="learns from labels"):
        run_stage(model, HARD, dataset(8, labels=None), tokenizer(), tmp_path, **QUIET)
    run_stage(model, DISTIL, dataset(8, labels=None), tokenizer(), tmp_path, max_steps=1, **QUIET)


def test_token_labels_are_padded_like_their_tokens(tmp_path: Path) -> None:
    model, given = thresher.attach(make("bert", "token"), "first"), []
    model.register_forward_pre_hook(lambda _, args, kwargs: given.append(kwargs), with_kwargs=True)
    run_stage(model, HARD, dataset(16, labels="token"), tokenizer(), tmp_path, max_steps=2, **QUIET)
    assert any((seen["attention_mask"] == 0).any() for seen in given)
    for seen in given:
        expected = torch.where(seen["attention_mask"] > 0, seen["input_ids"] % 2, -100)
        assert torch.equal(seen["labels"], expected)


class Stop(Exception):
    pass


def interrupting(step: int) -> Any:
    class Interrupt(fitting_callback()):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **options: Any) -> None:
            if state.global_step == step:
                raise Stop

    return Interrupt()


def test_an_interrupted_stage_goes_on_where_it_stopped(tmp_path: Path) -> None:
    rows = dataset(32)
    whole = thresher.attach(make("bert"), settings(CONFIGS["ltp"]))
    run_stage(whole, SOFT, rows, tokenizer(), tmp_path / "whole", save_steps=2, num_train_epochs=2, **QUIET)

    broken = thresher.attach(make("bert"), settings(CONFIGS["ltp"]))
    where, options = tmp_path / "broken", {**QUIET, "save_steps": 2, "num_train_epochs": 2}
    with pytest.raises(Stop):
        run_stage(broken, SOFT, rows, tokenizer(), where, callbacks=[interrupting(5)], **options)
    assert policy_of(broken).mode == "hard"
    assert policy_of(broken).theta.requires_grad
    assert (where / "checkpoint-4").is_dir()
    again = thresher.attach(make("bert"), settings(CONFIGS["ltp"]))
    steps: list[int] = []

    class Watch(fitting_callback()):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **options: Any) -> None:
            steps.append(state.global_step)

    run_stage(again, SOFT, rows, tokenizer(), where, callbacks=[Watch()], **options)
    assert steps == [5, 6, 7, 8]
    inputs = batch("bert")
    assert worst(outputs_of(whole, inputs), outputs_of(again, inputs)) <= 1e-4
    torch.testing.assert_close(policy_of(whole).theta, policy_of(again).theta)
    steps.clear()
    fresh = thresher.attach(make("bert"), settings(CONFIGS["ltp"]))
    run_stage(fresh, SOFT, rows, tokenizer(), where, callbacks=[Watch()], resume=False, **options)
    assert steps[0] == 1


def test_a_checkpoint_that_was_not_written_to_its_end_is_passed_over(tmp_path: Path) -> None:
    """Trainer writes into the folder itself, its state last: a run that is killed meanwhile leaves one without it."""
    options = {**QUIET, "save_steps": 2, "num_train_epochs": 2}
    trained = thresher.attach(make("bert"), settings(CONFIGS["ltp"]))
    with pytest.raises(Stop):
        run_stage(trained, SOFT, dataset(32), tokenizer(), tmp_path, callbacks=[interrupting(5)], **options)
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
    (tmp_path / "checkpoint-6").mkdir()
    (tmp_path / "checkpoint-10").mkdir()
    (tmp_path / "checkpoint-10" / "trainer_state.json").write_text('{"global_step": 1')
    (tmp_path / "checkpoint-x").mkdir()
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
    again = thresher.attach(make("bert"), settings(CONFIGS["ltp"]))
    assert run_stage(again, SOFT, dataset(32), tokenizer(), tmp_path, **options)["epoch"] == 2.0
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-8")
    assert last_checkpoint(tmp_path / "none") is None


@pytest.mark.parametrize(
    ("of", "says"), [("policy", "the method's weights.*policy_learning_rate"), ("exit", "the exit's branches")]
)
def test_a_method_that_diverged_is_not_saved(
    of: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ruined(trainer: Any, **options: Any) -> Any:
        part = attachment_of(model).policy if of == "policy" else attachment_of(model).exit
        with torch.no_grad():
            next(part.parameters()).fill_(math.nan)
        return transformers.trainer_utils.TrainOutput(1, 0.0, {})

    monkeypatch.setattr(transformers.Trainer, "train", ruined)
    model = thresher.attach(make("bert"), settings(CONFIGS["ltp"]), exit="fastbert")
    with pytest.raises(ThresherError, match=f"Training diverged in the stage 'soft'.*{says}"):
        run_stage(model, SOFT, dataset(8), tokenizer(), tmp_path, **QUIET)


@pytest.mark.parametrize(
    ("name", "value"), [("epochs", "2"), ("epochs", math.inf), ("batch_size", 2.5), ("learning_rate", "x")]
)
def test_settings_of_a_stage_are_numbers(name: str, value: Any) -> None:
    with pytest.raises(OptionError, match=f"cannot have {name}="):
        Stage(**{"name": "a", "mode": "off", name: value})


def fitted(directory: Path, model: Any = None, **options: Any) -> Any:
    model = model if model is not None else make("bert")
    settings_ = {"stages": (SOFT, HARD), "max_steps": 3, **QUIET, **options}
    policy = settings(CONFIGS["ltp"], temperature=0.05)
    return fit(model, policy, dataset(24), tokenizer(), directory, **settings_)


def test_fit_trains_every_stage_calibrates_and_saves(tmp_path: Path) -> None:
    seen: list[str] = []
    model = fitted(
        tmp_path / "out",
        validation=dataset(24, seed=5),
        speedup=1.3,
        on_stage=lambda s: seen.append(s.name),
        notes={"a": 1},
    )
    assert seen == ["soft", "hard"]
    notes = attachment_of(model).notes
    assert notes["a"] == 1
    assert notes["calibration"]["speedup"] >= 1.3
    back = thresher.load(tmp_path / "out")
    inputs = batch("bert")
    assert worst(outputs_of(model, inputs), outputs_of(back, inputs)) == 0.0
    assert attachment_of(back).notes == notes
    assert (tmp_path / "out" / "tokenizer_config.json").is_file()
    assert not list((tmp_path / "out" / "training").glob("*/checkpoint-*"))


def test_a_finished_stage_is_not_run_again(tmp_path: Path) -> None:
    inputs = batch("bert")
    whole = fitted(tmp_path / "whole")
    with pytest.raises(Stop):
        fitted(tmp_path / "broken", on_stage=stop_at("hard"))
    seen: list[str] = []
    resumed = fitted(tmp_path / "broken", on_stage=lambda s: seen.append(s.name))
    assert seen == ["hard"]
    assert worst(outputs_of(whole, inputs), outputs_of(resumed, inputs)) <= 1e-5
    torch.testing.assert_close(policy_of(whole).theta, policy_of(resumed).theta)


def test_an_unfinished_run_is_not_mixed_with_another(tmp_path: Path) -> None:
    with pytest.raises(Stop):
        fitted(tmp_path, on_stage=stop_at("hard"))
    with pytest.raises(OptionError, match="other settings"):
        fitted(tmp_path, overrides={"hard.learning_rate": 0.5})


def test_an_unfinished_run_is_not_mixed_with_other_rows_or_another_start(tmp_path: Path) -> None:
    rows = dataset()
    other = rows.remove_columns("labels").add_column("labels", [1 - label for label in rows["labels"]])
    quiet = {"stages": None, "progress": False}
    with pytest.raises(Stop):
        thresher.fit(make("bert"), "ltp", rows, tokenizer(), tmp_path, on_stage=stop_at("hard"), **quiet)
    with pytest.raises(OptionError, match=r"other settings \(rows\)"):
        thresher.fit(make("bert"), "ltp", other, tokenizer(), tmp_path, **quiet)
    start = make("bert")
    with torch.no_grad():
        start.base_model.embeddings.word_embeddings.weight.add_(0.01)
    with pytest.raises(OptionError, match=r"other settings \(model\)"):
        thresher.fit(start, "ltp", rows, tokenizer(), tmp_path, **quiet)


def test_an_unfinished_run_is_not_mixed_with_another_head(tmp_path: Path) -> None:
    with pytest.raises(Stop):
        fitted(tmp_path, on_stage=stop_at("hard"))
    other = make("bert")
    with torch.no_grad():
        other.classifier.weight.neg_()
    with pytest.raises(OptionError, match=r"other settings \(model\)"):
        fitted(tmp_path, other)


def test_a_damaged_note_of_an_unfinished_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(Stop):
        fitted(tmp_path, on_stage=stop_at("hard"))
    for text in ("", "[1]"):
        (tmp_path / "training" / "fit.json").write_text(text)
        with pytest.raises(DataError, match="fit.json is damaged.*remove that directory"):
            fitted(tmp_path)


@pytest.mark.parametrize(
    ("policy", "exit", "first"), [("adapler", None, "soft"), (None, "fastbert", "exit"), ("ltp", "deebert", "soft")]
)
def test_what_is_new_begins_alike_whatever_ran_before(
    policy: str | None, exit: str | None, first: str, tmp_path: Path
) -> None:
    """And the caller's own draws go on as if nothing had been trained in between."""
    options = {"exit": exit, "seed": 3, "on_stage": stop_at(first), **QUIET}
    found = []
    for number in range(2):
        model = make("bert")
        torch.manual_seed(number)
        expected = torch.rand(3)
        torch.manual_seed(number)
        with pytest.raises(Stop):
            fit(model, policy, dataset(24), tokenizer(), tmp_path / str(number), **options)
        assert torch.equal(torch.rand(3), expected)
        attachment = attachment_of(model)
        parts = [part for part in (attachment.policy, attachment.exit) if part is not None]
        found.append([value.clone() for part in parts for value in part.state_dict().values()])
    assert found[0]
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_labels_that_teach_nothing_are_told_before_anything_is_trained(tmp_path: Path) -> None:
    rows = dataset(24)
    wrong, same = (rows.remove_columns("labels").add_column("labels", [value] * len(rows)) for value in (9, 1))
    for given, says in ((wrong, "Row 1 has the label 9"), (same, "Every row of the training data has the same label")):
        for options in ({"policy": "ltp"}, {"policy": None, "exit": "deebert"}):
            with pytest.raises(DataError, match=says):
                fit(make("bert"), rows=given, tokenizer=tokenizer(), directory=tmp_path / "new", **options, **QUIET)
            assert not (tmp_path / "new").exists()


def test_no_rows_are_an_error_that_leaves_nothing(tmp_path: Path) -> None:
    for method in ("ltp", "adapler"):
        with pytest.raises(DataError, match="no rows to train on"):
            thresher.fit(make("bert"), method, dataset().select([]), tokenizer(), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_labels_are_missed_before_anything_is_trained(tmp_path: Path) -> None:
    rows = dataset(labels=None)
    for method, says in (("tr-bert", "'tr-bert' learns from labels"), ("ltp", "The stage 'soft' learns from labels")):
        with pytest.raises(OptionError, match=says):
            thresher.fit(make("bert"), method, rows, tokenizer(), tmp_path / "new")
    with pytest.raises(OptionError, match="'pabee' learns from labels"):
        thresher.fit(make("bert"), "random", rows, tokenizer(), tmp_path / "new", exit="pabee")
    assert not (tmp_path / "new").exists()


def test_a_half_saved_stage_runs_again(tmp_path: Path) -> None:
    with pytest.raises(Stop):
        fitted(tmp_path, on_stage=stop_at("hard"))
    (tmp_path / "training" / "1-soft" / "done" / checkpoint.SETTINGS).unlink()
    seen: list[str] = []
    fitted(tmp_path, on_stage=lambda s: seen.append(s.name))
    assert seen == ["soft", "hard"]


def test_a_run_that_stops_while_it_writes_trains_nothing_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = type(tokenizer())
    whole = kind.save_pretrained

    def full(self: Any, directory: Any, **options: Any) -> Any:
        if Path(directory) == tmp_path:  # not a checkpoint's
            raise OSError("No space left on device")
        return whole(self, directory, **options)

    with monkeypatch.context() as patch:
        patch.setattr(kind, "save_pretrained", full)
        with pytest.raises(OSError, match="No space"):
            fitted(tmp_path)
    seen: list[str] = []
    fitted(tmp_path, on_stage=lambda s: seen.append(s.name))
    assert seen == []
    assert (tmp_path / "tokenizer_config.json").is_file()
    assert not (tmp_path / "training").exists()


def test_accumulating_is_the_same_as_a_larger_batch(tmp_path: Path) -> None:
    inputs, said = batch("bert"), []
    for size, steps in ((8, 1), (2, 4)):
        model = thresher.attach(make("bert"), thresher.AttentionMass())
        stage = Stage(**{**HARD.__dict__, "batch_size": size})
        run_stage(
            model,
            stage,
            dataset(16),
            tokenizer(),
            tmp_path / str(size),
            gradient_accumulation_steps=steps,
            optim="sgd",
            **QUIET,
        )
        said.append(outputs_of(model, inputs))
    assert worst(*said) <= 1e-4


@pytest.mark.parametrize(("name", "value"), [("batch_size", 0), ("epochs", 0), ("learning_rate", float("nan"))])
def test_a_stage_that_cannot_run_is_refused(name: str, value: float) -> None:
    with pytest.raises(OptionError, match=name):
        Stage(**{**HARD.__dict__, name: value})


def test_the_start_is_the_model_after_fine_tuning(tmp_path: Path) -> None:
    """What gains are counted from: neither the untrained model nor the one that has learned to drop."""
    validation = dataset(16, seed=5)
    tuned = Stage(**{**HARD.__dict__, "name": "fine-tune", "mode": "off", "learning_rate": 1e-2})
    start: list[Any] = []
    fitted(tmp_path / "a", stages=(tuned, HARD), validation=validation, on_start=start.append)
    alone = fitted(tmp_path / "b", stages=(tuned,))
    expected = run_packed(alone, validation).predictions
    assert len(start) == 1
    assert abs(start[0] - expected).max() <= 1e-4
    untrained = run_packed(thresher.attach(make("bert")), validation).predictions
    assert abs(start[0] - untrained).max() > 1e-2


def stop_at(name: str) -> Any:
    def stop(stage: Stage) -> None:
        if stage.name == name:
            raise Stop

    return stop


def test_resuming_keeps_the_teacher_of_the_first_distilling_stage(tmp_path: Path) -> None:
    first, second = (Stage(**{**DISTIL.__dict__, "name": name, "learning_rate": 1e-2}) for name in ("one", "two"))
    inputs = batch("bert")
    whole = fitted(tmp_path / "whole", stages=(first, second))
    with pytest.raises(Stop):
        fitted(tmp_path / "broken", stages=(first, second), on_stage=stop_at("two"))
    resumed = fitted(tmp_path / "broken", stages=(first, second))
    assert worst(outputs_of(whole, inputs), outputs_of(resumed, inputs)) <= 1e-5


def test_fine_tuning_comes_first_and_drops_nothing(tmp_path: Path) -> None:
    seen: list[tuple[str, str]] = []
    fitted(tmp_path, fine_tune=True, max_steps=1, on_stage=lambda s: seen.append((s.name, s.mode)))
    assert seen == [("fine-tune", "off"), ("soft", "soft"), ("hard", "hard")]
    assert not (tmp_path / "training").exists()


class OtherProcess:
    """What accelerate says of itself in a process that is not the main one."""

    is_main_process = False

    def __init__(self, **options: Any) -> None:
        self.waited = 0

    def wait_for_everyone(self) -> None:
        self.waited += 1


def test_only_the_main_process_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, process = import_module("thresher.training.recipe"), OtherProcess()
    monkeypatch.setattr(recipe, "PartialState", lambda **options: process)
    monkeypatch.setattr(recipe, "run_stage", lambda *args, **options: None)  # the trainer sees to its own files
    model = fitted(tmp_path / "out", validation=dataset(8), speedup=1.2)
    assert not (tmp_path / "out").exists()
    assert process.waited >= 2
    assert policy_of(model).config.strength != 1.0


TWO_PROCESSES = """
import json, os, sys
from helpers import dataset, make, settings, tokenizer
from thresher.methods import CONFIGS
from thresher.model import policy_of
from thresher.policy import Stage
from thresher.training import fit
import torch

out, seen = sys.argv[1], []
rates = {"soft": 1e-2, "hard": None}
stages = tuple(
    Stage(name=name, mode=name, batch_size=4, warmup=0.0, learning_rate=1e-3, policy_learning_rate=rate)
    for name, rate in rates.items()
)
model = fit(make("bert"), settings(CONFIGS["ltp"], temperature=0.05), dataset(24), tokenizer(), out, stages=stages,
            validation=dataset(24, seed=5), speedup=1.3, max_steps=3, progress=False, precision="float32",
            on_stage=lambda stage: seen.append(stage.name))
weight = float(model.classifier.weight.sum()) + float(policy_of(model).theta.sum())
said = [seen, weight, policy_of(model).config.strength, sorted(os.listdir(out))]
with open(f"{out}-{torch.distributed.get_rank()}.json", "w") as file:
    json.dump(said, file)
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_train_one_model(tmp_path: Path) -> None:
    script, out = tmp_path / "script.py", tmp_path / "out"
    script.write_text(TWO_PROCESSES)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*torchrun, script, out], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((tmp_path / f"out-{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert first[0] == ["soft", "hard"]
    assert "thresher.json" in first[3]
    assert "training" not in first[3]
    assert policy_of(thresher.load(out)).config.strength == first[2]


def test_overrides_reach_every_stage_or_the_one_named(tmp_path: Path) -> None:
    seen: dict[str, Stage] = {}
    fitted(
        tmp_path,
        max_steps=1,
        overrides={"batch_size": 4, "soft.learning_rate": 0.5},
        on_stage=lambda s: seen.setdefault(s.name, s),
    )
    assert (seen["soft"].batch_size, seen["soft"].learning_rate) == (4, 0.5)
    assert (seen["hard"].batch_size, seen["hard"].learning_rate) == (4, 1e-3)


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("learning_rat", "did you mean 'learning_rate'"),
        ("sooft.epochs", "did you mean 'soft'"),
        ("name", "no setting 'name'"),
    ],
)
def test_unknown_overrides_are_refused_with_a_suggestion(tmp_path: Path, key: str, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        fitted(tmp_path / "out", overrides={key: 1})
    assert not (tmp_path / "out").exists()


def test_a_loss_of_nothing_is_a_target_too(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="validation"):
        fitted(tmp_path / "a", max_loss=0.0)
    model = fitted(tmp_path / "b", max_loss=0.0, quality=lambda p: 1.0, validation=dataset(8), max_steps=1)
    assert attachment_of(model).notes["calibration"]["target"] == {"max_loss": 0.0}


def test_a_target_needs_validation_rows(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="validation"):
        fitted(tmp_path, speedup=2.0)


def test_a_stage_may_switch_dropout_off() -> None:
    model = thresher.attach(make("bert"), "first")
    learner = Learner(model, Stage(name="x", mode="hard", dropout=False))
    assert not learner.train().model.training
    assert Learner(model, HARD).train().model.training


@pytest.mark.parametrize(
    ("method", "stage"),
    [("adapler", "hard"), ("ltp", "hard"), ("attention-mass", "distil"), ("length-adaptive", "length-drop")],
)
def test_a_stage_that_has_nothing_to_learn_is_refused_before_any_other(method: str, stage: str, tmp_path: Path) -> None:
    nothing = {f"{stage}.label_weight": 0.0, f"{stage}.distil_weight": 0.0}
    with pytest.raises(OptionError, match=f"The stage '{stage}' has nothing to learn from"):
        thresher.fit(make("bert"), method, dataset(8), tokenizer(), tmp_path / "o", overrides=nothing)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("method", sorted(CONFIGS))
def test_every_method_says_how_it_is_trained(method: str) -> None:
    stages = policy_of(thresher.attach(make("bert"), method)).stages()
    assert stages
    assert len({s.name for s in stages}) == len(stages)
    for stage in stages:
        assert stage.mode in ("off", "soft", "hard")
        assert stage.label_weight or stage.distil_weight
    learned = any(p.requires_grad for p in policy_of(thresher.attach(make("bert"), method)).parameters())
    assert stages[-1].mode == "hard" or (learned and stages[-1].policy_learning_rate)


def test_a_model_without_a_head_learns_by_its_mean_embedding() -> None:
    """AutoModel and mean pooling: an embedder like any other."""
    student, teacher = make("bert", "base"), make("bert", "base", seed=1)
    inputs = batch("bert")
    mask = inputs["attention_mask"].bool()
    with torch.no_grad():
        ours, theirs = student(**inputs), teacher(**inputs)
    pooled = [
        torch.stack([row[m].mean(0) for row, m in zip(out.last_hidden_state, mask, strict=True)])
        for out in (ours, theirs)
    ]
    expected = (1 - torch.nn.functional.cosine_similarity(*pooled)).mean() + neighbourhood_loss(*pooled)
    assert torch.allclose(distillation_loss(ours, theirs, mask), expected, atol=1e-5)
    thresher.attach(student, thresher.AttentionMass())
    learner = Learner(student, Stage(name="distil", mode="hard", label_weight=0.0, distil_weight=1.0), teacher)
    learner(**inputs)["loss"].backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in student.parameters())


def test_neighbourhood_loss_against_loops() -> None:
    torch.manual_seed(0)
    ours, theirs = torch.randn(4, 6), torch.randn(4, 6)
    total = 0.0
    for i in range(4):
        unit = lambda x: x / x.norm()  # noqa: E731
        others = [j for j in range(4) if j != i]
        wanted = torch.tensor([float(unit(theirs[i]) @ unit(theirs[j])) / 0.05 for j in others]).softmax(0)
        got = torch.tensor([float(unit(ours[i]) @ unit(theirs[j])) / 0.05 for j in others]).softmax(0)
        total += float((wanted * (wanted.log() - got.log())).sum())
    assert float(neighbourhood_loss(ours, theirs)) == pytest.approx(0.05 * total / 4, rel=1e-4)
    assert neighbourhood_loss(ours, ours) == pytest.approx(0.0, abs=1e-6)
    assert neighbourhood_loss(ours[:1], theirs[:1]) == 0


SEARCH = {"evaluations": 24, "sampler": "evolutionary"}
ONCE = Stage(name="once-for-all", mode="hard", batch_size=8, learning_rate=1e-3, distil_weight=1.0, warmup=0.0)


def searching(directory: Path, method: str = "ase", **options: Any) -> Any:
    settings_ = {
        "search": SEARCH,
        "max_steps": 3,
        "validation": dataset(24, seed=5),
        "stages": (ONCE,),
        **QUIET,
        **options,
    }
    return fit(make("bert"), settings(CONFIGS[method]), dataset(24), tokenizer(), directory, **settings_)


def test_ase_searches_trains_under_what_it_found_and_serves_every_speedup(tmp_path: Path) -> None:
    drawn: list[Any] = []
    recipe, before = import_module("thresher.training.recipe"), run_stage
    model = make("bert")

    def watched(model: Any, stage: Stage, *args: Any, **options: Any) -> Any:
        drawn.append(stage.configurations)
        return before(model, stage, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe, "run_stage", watched)
        model = searching(tmp_path / "out", speedup=1.4)
    frontier = frontier_of(attachment_of(model).notes)
    assert len(drawn[0]) >= 2
    assert set(frontier.configurations) <= set(drawn[0])
    trained = [Point.from_dict(point) for point in attachment_of(model).notes[TRAINED]]
    assert [point.retention for point in trained] == list(drawn[0])  # also what another one beats
    assert set(frontier.points) <= set(trained)
    chosen = frontier.at(1.4)
    assert policy_of(model).config.retention == chosen.retention
    rows = dataset(24, seed=5)
    reached = run(model, rows)
    assert reached.speedup == pytest.approx(chosen.speedup)
    packed = run_packed(thresher.attach(make("bert")), rows).predictions
    assert agreement(packed, model)(reached.predictions) == pytest.approx(chosen.quality)  # of the trained model
    fastest = frontier.points[-1]
    loaded = thresher.load(tmp_path / "out", speedup=fastest.speedup)
    assert policy_of(loaded).config.retention == fastest.retention
    assert run(loaded, rows).speedup == pytest.approx(fastest.speedup)


def test_length_adaptive_searches_the_trained_model(tmp_path: Path) -> None:
    model = searching(tmp_path / "out", "length-adaptive", max_loss=0.3)
    found = attachment_of(model).notes["search"]
    assert found["evaluations"] == SEARCH["evaluations"]
    frontier = frontier_of(attachment_of(model).notes)
    chosen = policy_of(model).config.retention
    point = next(p for p in frontier.points if p.retention == chosen)
    assert point.quality >= 0.7
    assert all(p.quality < 0.7 for p in frontier.points if p.speedup > point.speedup)


def test_an_interrupted_search_goes_on_and_is_not_repeated(tmp_path: Path) -> None:
    whole = searching(tmp_path / "whole", speedup=1.3)
    with pytest.raises(Stop):
        searching(tmp_path / "broken", speedup=1.3, on_stage=stop_at("once-for-all"))
    assert (tmp_path / "broken" / "training" / "frontier.json").is_file()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(import_module("thresher.training.frontiers"), "search", lambda *a, **k: pytest.fail("again"))
        resumed = searching(tmp_path / "broken", speedup=1.3)
    assert attachment_of(resumed).notes["frontier"] == attachment_of(whole).notes["frontier"]


def test_a_speedup_that_no_configuration_has_is_told_before_training(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="nearest"):
        searching(tmp_path, speedup=50.0, on_stage=lambda stage: pytest.fail("trained"))
    with pytest.raises(TargetError, match="Train longer"):
        searching(tmp_path / "loss", max_loss=0.0, quality=lambda p: float(-abs(p - reference_of()).max()))


def reference_of() -> Any:
    return run_packed(thresher.attach(make("bert")), dataset(24, seed=5)).predictions


def test_a_search_needs_rows_and_a_method_that_searches(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="search needs validation rows"):
        searching(tmp_path, validation=None)
    with pytest.raises(OptionError, match="'ltp' searches no"):
        searching(tmp_path, "ltp")


@pytest.mark.parametrize("way", ["ltp", "pabee", "tr-bert"])
def test_labels_that_go_together_are_learned(way: str, tmp_path: Path) -> None:
    """Several probabilities a row: each is taught and distilled by itself, through the collator of whole rows."""
    labels = [[float(i % 2), float(i % 3 == 0), 1.0] for i in range(24)]
    rows = dataset(24, labels=None).add_column("labels", labels)
    config = config_of("bert", num_labels=3, problem_type="multi_label_classification")
    model = build(config)
    policy, exit = (None, "pabee") if way == "pabee" else (way, None)
    fit(
        model,
        policy,
        rows,
        tokenizer(),
        tmp_path / "out",
        exit=exit,
        overrides={"epochs": 1.0},
        use_cpu=True,
        progress=False,
    )
    outputs = outputs_of(thresher.load(tmp_path / "out"), batch("bert"))
    assert outputs["logits"].shape[1] == 3
    assert bool(outputs["logits"].isfinite().all())


def test_probabilities_are_distilled_one_by_one() -> None:
    ours, theirs = torch.randn(4, 3), torch.randn(4, 3)
    found = distillation_loss({"logits": ours}, {"logits": theirs}, sigmoid=True)
    p, q = theirs.sigmoid(), ours.sigmoid()
    wanted = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    torch.testing.assert_close(found, wanted.mean())


def test_a_learning_rate_for_all_stages_leaves_a_model_that_is_not_to_learn_alone(tmp_path: Path) -> None:
    model = make("bert")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rows = dataset(16)
    fit(
        model,
        None,
        rows,
        tokenizer(),
        tmp_path,
        exit="fastbert",
        overrides={"epochs": 1.0, "learning_rate": 1e-2},
        use_cpu=True,
    )
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
