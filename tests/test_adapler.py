"""AdapLeR against loops: who is dropped, how a token fades, what is learned from what, and by which parameter."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from accelerate import PartialState
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import TrainerCallback

import thresher
import thresher.training.recipe as recipe
import thresher.training.salient as salient
from helpers import alone, batch, dataset, make, outputs_of, tokenizer, worst
from thresher.errors import CheckpointError, DataError, OptionError
from thresher.measure.flops import speedup
from thresher.measure.run import run
from thresher.methods.adapler import CONTRIBUTIONS, LENGTHS
from thresher.model import attachment_of, policy_of
from thresher.packed import PackedTokens
from thresher.parts.predictors import row_log_softmax, soft_removal
from thresher.policy import Stage, Trace
from thresher.training import fit
from thresher.training.epochs import Epoch, Epochs, fastest, judged, kept
from thresher.training.learner import Learner
from thresher.training.stages import _StageTrainer, run_stage, training_arguments

CLOSE = 1e-4
QUICK: dict[str, Any] = {"use_cpu": True, "precision": "float32", "progress": False}


def attached(family: str = "bert", head: str = "sequence", *, layers: int = 3, **settings: Any) -> Any:
    """With predictors that tell tokens apart, as training would make them."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = thresher.attach(make(family, head, layers), thresher.AdapLeR(**{"threshold": 1.0, **settings}))
        for predictor in policy_of(model).predictors:
            predictor[2].weight *= 4.0
    return model


def traced(model: Any, inputs: dict[str, Tensor]) -> tuple[dict[str, Tensor], Trace]:
    with thresher.tracing(record=True) as traces:
        outputs = outputs_of(model, inputs)
    return outputs, traces[-1]


def contribution(predictor: Any, state: Tensor, log_weight: Tensor | None = None) -> Tensor:
    first, _, second = predictor
    hidden = F.gelu(state @ first.weight.T + first.bias)
    score = (hidden @ second.weight.T + second.bias)[:, 0]
    odds = torch.exp(score if log_weight is None else score + log_weight)
    return odds / odds.sum()


@pytest.mark.parametrize("strength", [0.7, 1.0, 1.3])
def test_a_replay_layer_by_layer(strength: float) -> None:
    """Before each layer a token goes that contributes less than eta / n; its vector stays what it was."""
    inputs = batch("bert", (17,), seed=3)
    model, plain = attached(head="token", strength=strength), make("bert", "token")
    policy = policy_of(model)
    with torch.no_grad():
        policy.eta.copy_(torch.tensor([0.9, 0.8, 1.0]))
    final, dropped = {}, [0] * 17
    with torch.no_grad():
        state = plain.bert.embeddings(input_ids=inputs["input_ids"], token_type_ids=inputs["token_type_ids"])[0]
        places = list(range(17))
        for number, layer in enumerate(plain.bert.encoder.layer, start=1):
            share, stays = contribution(policy.predictors[number - 1], state), []
            for at, place in enumerate(places):
                if place == 0 or float(share[at]) >= strength * float(policy.eta[number - 1]) / len(places):
                    stays.append(at)
                else:
                    final[place], dropped[place] = state[at], number
            places, state = [places[at] for at in stays], state[stays]
            state = layer(state.unsqueeze(0))
            state = (state[0] if isinstance(state, tuple) else state).squeeze(0)
        final |= dict(zip(places, state, strict=True))
        expected = plain.classifier(torch.stack([final[i] for i in range(17)]))
    outputs, trace = traced(model, inputs)
    assert len(set(dropped)) >= 3
    assert trace.dropped_at()[0].tolist() == dropped
    torch.testing.assert_close(outputs["logits"], expected, rtol=0, atol=CLOSE)


def faded(share: float, threshold: float, steepness: float, beta: float) -> float:
    """e(c), written as the paper has it."""
    falling = (steepness / threshold) * (share - threshold) - beta / steepness
    flat = (share - 1) * (beta / steepness) / (1 - threshold)
    return max(-1e4, min(0.0, falling, flat))


@given(
    st.lists(st.floats(0, 1), min_size=1, max_size=6),
    st.floats(0.001, 0.9),
    st.floats(1, 1e6),
    st.floats(0, 1),
)
def test_soft_removal(shares: list[float], threshold: float, steepness: float, beta: float) -> None:
    found = soft_removal(
        torch.tensor(shares, dtype=torch.float64), torch.tensor(threshold, dtype=torch.float64), steepness, beta
    )
    for share, value in zip(shares, found.tolist(), strict=True):
        assert value == pytest.approx(faded(share, threshold, steepness, beta), rel=1e-9, abs=1e-9)
        assert value <= 0
        if share > threshold:
            assert value >= -beta / steepness - 1e-12
        if share < 0.99 * threshold and steepness > 1e5:
            assert math.exp(value) < 1e-9


def test_soft_removal_has_a_gradient_on_both_sides() -> None:
    share = torch.tensor([0.1, 0.5], requires_grad=True)
    soft_removal(share, torch.tensor(0.25), 10.0, 0.1).sum().backward()
    assert share.grad is not None
    assert share.grad.tolist() == pytest.approx([40.0, 0.01 / 0.75])


@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.integers(0, 9), st.booleans())
def test_shares_are_a_rows_own(lengths: list[int], seed: int, simulated: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.tensor([[int(i < n) for i in range(max(lengths))] for n in lengths])
    tokens = PackedTokens.pack(torch.zeros(len(lengths), max(lengths), 1), mask, simulated=simulated)
    if simulated:
        tokens = tokens.keep(torch.rand(sum(lengths), generator=generator) > 0.5)
    logits = 30 * torch.randn(sum(lengths), generator=generator)
    found = row_log_softmax(logits, tokens)
    living = torch.ones(sum(lengths), dtype=torch.bool) if tokens.alive is None else tokens.alive
    for row, (mine, alive, score) in enumerate(
        zip(found.split(lengths), living.split(lengths), logits.split(lengths), strict=True)
    ):
        torch.testing.assert_close(mine[alive], score[alive].log_softmax(0), rtol=0, atol=1e-4, msg=str(row))
        assert (mine[~alive] == -math.inf).all()


# --- the soft stage -----------------------------------------------------------------------------------------------


def naive(plain: Any, policy: Any, inputs: dict[str, Tensor], eta: Tensor, theta: Tensor) -> dict[str, Any]:
    """One row of a BERT classifier, in one padded-free pass of its own layers: logits, shares, what was there, lengths."""
    state = plain.bert.embeddings(input_ids=inputs["input_ids"], token_type_ids=inputs["token_type_ids"])[0]
    weight = torch.zeros(len(state))
    shares, present, lengths = [], [], []
    for number, layer in enumerate(plain.bert.encoder.layer):
        share = contribution(policy.predictors[number], state, weight)
        shares.append(share)
        present.append(weight.detach().exp())
        if number:
            scale = theta[number] / theta[number].item()
            share = torch.cat([share[:1] * scale, share[1:]])
            share = share / share.sum()
        threshold = eta[number] / weight.exp().sum()
        steep, beta = policy.steepness, policy.config.beta
        one = (steep / threshold) * (share - threshold) - beta / steep
        two = (share - 1) * (beta / steep) / (1 - threshold)
        removal = torch.minimum(one, two).clamp(-1e4, 0.0)
        weight = weight + torch.cat([torch.zeros(1), removal[1:]])
        lengths.append(weight.exp().sum())
        state = layer(state.unsqueeze(0), attention_mask=weight[None, None, None])
        state = (state[0] if isinstance(state, tuple) else state).squeeze(0)
    logits = plain.classifier(plain.bert.pooler(state.unsqueeze(0)))[0]
    return {"logits": logits, "shares": shares, "present": present, "lengths": lengths}


def lesson(seed: int = 0) -> tuple[Any, dict[str, Tensor], Tensor, Tensor]:
    """A model in its soft stage, inputs, labels, and a saliency of every token."""
    model = attached(gamma=0.7, phi=0.9, steepness=20.0)
    policy = policy_of(model)
    policy.mode = "soft"
    policy.steepness = 20.0
    with torch.no_grad():
        policy.eta.copy_(torch.tensor([0.8, 0.9, 0.7]))
        policy.theta.copy_(torch.tensor([1.0, 0.6, 1.7]))
    inputs = batch("bert", (9, 14, 5), seed=seed)
    saliency = torch.rand(inputs["input_ids"].shape, generator=torch.Generator().manual_seed(seed))
    return model, inputs, torch.tensor([0, 2, 1]), saliency


def test_fading_is_that_of_a_loop() -> None:
    model, inputs, _, _ = lesson()
    policy, plain = policy_of(model), make("bert")
    outputs, trace = traced(model, inputs)
    at = 0
    for row in range(3):
        mine = naive(plain, policy, alone(inputs, row), policy.eta, policy.theta)
        torch.testing.assert_close(outputs["logits"][row], mine["logits"], rtol=0, atol=CLOSE)
        n = len(mine["shares"][0])
        for layer in range(3):
            share = trace.auxiliary[CONTRIBUTIONS][layer][at : at + n].exp()
            torch.testing.assert_close(share, mine["shares"][layer], rtol=0, atol=1e-5)
            assert float(trace.auxiliary[LENGTHS][layer][row]) == pytest.approx(mine["lengths"][layer].item(), rel=1e-4)
        at += n
        assert mine["lengths"][2].item() < 0.9 * n
    assert not (trace.dropped_at() > 0).any()


def naive_losses(plain: Any, policy: Any, inputs: Any, labels: Tensor, saliency: Tensor) -> dict[str, Any]:
    eta, theta = (p.detach().clone().requires_grad_() for p in (policy.eta, policy.theta))
    task, divergence, length = torch.zeros(()), torch.zeros(()), torch.zeros(())
    for row, label in enumerate(labels):
        one = alone(inputs, row)
        said = naive(plain, policy, one, eta, theta)
        task = task + F.cross_entropy(said["logits"][None], label[None]) / len(labels)
        length = length + sum(said["lengths"]) / len(labels)
        wanted = saliency[row][inputs["attention_mask"][row].bool()]
        for number, weight in enumerate((3, 2, 1)):
            target = wanted * said["present"][number]
            target = target / target.sum()
            if number:
                target = torch.cat([target[:1] * policy.theta[number].item(), target[1:]])
                target = target / target.sum()
            kl = sum(
                t * (math.log(t) - torch.log(c)) for t, c in zip(target.tolist(), said["shares"][number], strict=True)
            )
            divergence = divergence + weight * kl / len(labels)
    return {"task": task, "divergence": divergence, "length": length, "leaves": (eta, theta)}


def test_every_parameter_gets_the_gradient_of_its_own_loss() -> None:
    """Model and predictors that of task + gamma * divergence, eta and theta that of task + phi * length, clipped to norm 1."""
    model, inputs, labels, saliency = lesson()
    policy, plain = policy_of(model), make("bert")
    found = naive_losses(plain, policy, inputs, labels, saliency)
    first = found["task"] + 0.7 * found["divergence"]
    second = found["task"] + 0.9 * found["length"]
    weights = dict(plain.named_parameters()) | {
        f"policy.{name}": p for name, p in policy.named_parameters() if name.startswith("predictors")
    }
    wanted = dict(
        zip(weights, torch.autograd.grad(first, weights.values(), retain_graph=True, allow_unused=True), strict=True)
    )
    pulls = torch.autograd.grad(second, found["leaves"])
    norm = float(torch.cat(pulls).norm())
    assert norm > 1  # or the clipping would go unseen

    learner = Learner(model, policy.stages()[0]).eval()
    loss = learner(**inputs, labels=labels, saliency=saliency)["loss"]
    assert float(loss) == pytest.approx(float(first + 0.9 * found["length"]), rel=1e-4)
    loss.backward()
    for name, expected in wanted.items():
        own = name.startswith("policy.")
        parameter = (policy if own else model).get_parameter(name.removeprefix("policy."))
        if expected is None:
            assert parameter.grad is None
        else:
            torch.testing.assert_close(parameter.grad, expected, rtol=1e-2, atol=2e-5, msg=name)
    for parameter, pull in zip((policy.eta, policy.theta), pulls, strict=True):
        torch.testing.assert_close(parameter.grad, pull / norm, rtol=1e-2, atol=1e-5)
    assert (policy.theta.grad != 0).tolist() == [False, True, True]


@pytest.mark.parametrize(("name", "moves"), [("gamma", "predictors"), ("phi", "eta")])
def test_a_weight_moves_only_its_own_side(name: str, moves: str) -> None:
    grads = []
    for value in (0.0, 0.4):
        model, inputs, labels, saliency = lesson()
        policy = policy_of(model)
        policy.config = policy.config.replace(**{"gamma": 0.1, "phi": 0.01, name: value})
        Learner(model, policy.stages()[0]).eval()(**inputs, labels=labels, saliency=saliency)["loss"].backward()
        side = {n: p.grad for n, p in itertools.chain(model.named_parameters(), policy.named_parameters())}
        grads.append({n: g for n, g in side.items() if g is not None})
    of_thresholds = {n for n in grads[0] if n in ("eta", "theta")}
    for n in grads[0]:
        same = torch.equal(grads[0][n], grads[1][n])
        if (n in of_thresholds) != (moves == "eta"):
            assert same, n
    assert any(not torch.equal(grads[0][n], grads[1][n]) for n in grads[0])


@pytest.mark.parametrize("head", ["sequence", "token", "question-answering"])
@pytest.mark.parametrize("family", ["bert", "modernbert", "distilbert", "albert", "mpnet"])
def test_the_steepest_fading_is_dropping(family: str, head: str) -> None:
    inputs = batch(family)
    model = attached(family, head)
    hard, trace = traced(model, inputs)
    policy = policy_of(model)
    policy.mode, policy.steepness = "soft", 1e9
    soft, soft_trace = traced(model, inputs)
    assert (trace.dropped_at() > 0).any()
    pooled_by_mean = family == "modernbert" and head == "sequence" and model.config.classifier_pooling == "mean"
    assert pooled_by_mean or worst(hard, soft) <= CLOSE
    for (read, _), length in zip(trace.reads, soft_trace.auxiliary[LENGTHS], strict=True):
        assert length.tolist() == pytest.approx(read, abs=1e-3)


def test_protected_tokens_do_not_fade_and_padding_is_not_there() -> None:
    inputs = batch("bert", (9, 14, 5), width=20)
    model = attached(protect_ids=(3,))
    policy = policy_of(model)
    policy.mode, policy.steepness = "soft", 1e5
    with thresher.tracing() as traces, torch.no_grad():
        model(**inputs)
    lengths = torch.stack(traces[0].auxiliary[LENGTHS])
    assert (lengths[:, 2] >= 3 - 1e-3).all()
    assert (lengths <= torch.tensor([9, 14, 5]) + 1e-3).all()
    assert [len(c) for c in traces[0].auxiliary[CONTRIBUTIONS]] == [28] * 3


# --- the schedule -------------------------------------------------------------------------------------------------


def test_the_papers_schedules() -> None:
    config = thresher.AdapLeR()
    assert config.schedule(5) == (10, 100, 1e3, 1e4, 1e5)
    assert config.schedule(10)[-1] == 10 * 3**9
    assert config.schedule(3) == (50, 2500, 125000)
    assert config.schedule(7)[0] == 10
    assert config.schedule(7)[-1] == pytest.approx(1e5)
    assert thresher.AdapLeR(steepness=20.0, growth=2.0).schedule(4) == (20, 40, 80, 160)
    assert thresher.AdapLeR(steepness=100.0).schedule(4) == pytest.approx((100, 1e3, 1e4, 1e5))


@pytest.mark.parametrize(
    ("settings", "epochs", "match"),
    [({}, 1.0, "at least 2"), ({"growth": 10.0}, 12.0, "leave both out"), ({"growth": 2.0}, 5.0, "leave both out")],
)
def test_a_schedule_that_does_not_fit_is_refused(
    settings: dict[str, Any], epochs: float, match: str, tmp_path: Path
) -> None:
    policy = thresher.AdapLeR(**settings)
    with pytest.raises(OptionError, match=match):
        thresher.fit(make("bert"), policy, dataset(4), tokenizer(), tmp_path, overrides={"epochs": epochs}, **QUICK)
    model = thresher.attach(make("bert"), policy)
    with pytest.raises(OptionError, match=match):
        run_stage(model, Stage(name="soft", mode="soft", epochs=epochs), dataset(4), tokenizer(), tmp_path, **QUICK)
    policy_of(model).check(Stage(name="hard", mode="hard", epochs=1))
    if not settings:  # whatever says how long it trains
        for given in ({"num_train_epochs": 1}, {"max_steps": 1, "per_device_train_batch_size": 4}):
            with pytest.raises(OptionError, match="at least 2, not 1"):
                run_stage(
                    model,
                    Stage(name="soft", mode="soft", epochs=5),
                    dataset(4),
                    tokenizer(),
                    tmp_path,
                    **QUICK,
                    **given,
                )
    policy_of(model).check(policy_of(thresher.attach(make("bert"), "adapler")).stages()[0]) if not settings else None


class Steepness(TrainerCallback):
    """Notes lambda at every step."""

    def __init__(self, policy: Any, stop: int | None = None) -> None:
        self.policy, self.stop, self.seen = policy, stop, []

    def on_step_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self.seen.append(self.policy.steepness)

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        if state.global_step == self.stop:
            control.should_save = control.should_training_stop = True


def rows_with_saliency(count: int = 16) -> Any:
    rows = dataset(count)
    return rows.add_column("saliency", [s.tolist() for s in thresher.saliency(make("bert"), rows)])


def test_steepness_follows_the_epochs_also_when_a_run_goes_on(tmp_path: Path) -> None:
    rows = rows_with_saliency()
    model = attached()
    stage = Stage(name="soft", mode="soft", epochs=3.0, policy_learning_rate=1e-3, batch_size=8)
    broken = Steepness(policy_of(model), stop=3)
    run_stage(model, stage, rows, tokenizer(), tmp_path, callbacks=[broken], **QUICK)
    again = attached()
    rest = Steepness(policy_of(again))
    run_stage(again, stage, rows, tokenizer(), tmp_path, callbacks=[rest], **QUICK)
    assert broken.seen == [50, 50, 2500]
    assert rest.seen == [2500, 125000, 125000]


# --- training -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [1e-3, None])
def test_predictors_decay_with_the_model_and_have_a_rate_of_their_own(tmp_path: Path, rate: float | None) -> None:
    model = attached()
    own = policy_of(model).stages()[0]
    assert own.predictor_learning_rate == 1e-3
    stage = replace(own, predictor_learning_rate=rate)
    learner = Learner(model, stage)
    trainer = _StageTrainer(learner, training_arguments(tmp_path, {"use_cpu": True}))
    groups = trainer.create_optimizer().param_groups
    of = {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    policy = policy_of(model)
    assert of[id(policy.eta)] == of[id(policy.theta)] == (5e-4, 0.0)
    assert of[id(model.classifier.weight)] == (3e-5, 0.01)
    assert of[id(policy.predictors[0][0].weight)] == (rate or 3e-5, 0.01)
    assert of[id(policy.predictors[0][0].bias)] == (rate or 3e-5, 0.0)
    assert (stage.epochs, stage.batch_size, stage.warmup) == (5, 32, 0.06)


def test_the_hard_stage_drops_at_the_speedup_that_is_asked_for(tmp_path: Path) -> None:
    rows = dataset(24, low=12)

    class Strengths(TrainerCallback):
        seen: ClassVar[list[tuple[str, float, list[Tensor]]]] = []
        teachers: ClassVar[list[Any]] = []

        def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **others: Any) -> None:
            policy = model.policy
            learned = [p.detach().clone() for p in policy.parameters()]
            self.seen.append((policy.mode, policy.config.strength, learned))
            self.teachers.append(model._teacher[0])

    model = thresher.fit(
        make("bert"), thresher.AdapLeR(threshold=0.9), rows, tokenizer(), tmp_path, validation=rows, speedup=1.6,
        overrides={"epochs": 2.0, "batch_size": 12}, callbacks=[Strengths()], **QUICK,
    )  # fmt: skip
    modes = [mode for mode, _, _ in Strengths.seen]
    assert modes == ["soft"] * 4 + ["hard"] * 4
    soft, hard = Strengths.seen[:4], Strengths.seen[4:]
    assert {strength for _, strength, _ in soft} == {1.0}
    (strength,) = {strength for _, strength, _ in hard}
    assert strength != 1.0  # set where it starts to drop, on the validation rows
    # What the model said before anything faded is the lesson, not what the soft stage has made of it.
    assert torch.equal(Strengths.teachers[-1].classifier.weight, make("bert").classifier.weight)
    assert not torch.equal(model.classifier.weight, make("bert").classifier.weight)
    # What decides is learned before; now the model learns to read what it leaves.
    for ours, theirs in zip(hard[0][2], policy_of(model).parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert run(model, rows).speedup == pytest.approx(1.6, rel=0.02)


def test_as_published_there_is_no_hard_stage() -> None:
    assert [stage.name for stage in policy_of(attached(hard_stage=False)).stages()] == ["soft"]
    assert [(stage.name, stage.mode) for stage in policy_of(attached()).stages()] == [
        ("soft", "soft"),
        ("hard", "hard"),
    ]


def test_thresholds_stay_in_their_bounds() -> None:
    policy = policy_of(attached())
    with torch.no_grad():
        policy.eta.copy_(torch.tensor([-3.0, 0.5, 2.0]))
        policy.theta.copy_(torch.tensor([1.0, -1.0, 5.0]))
    policy.after_step()
    assert policy.eta.tolist() == pytest.approx([0.01, 0.5, 1.0])
    assert policy.theta.tolist() == pytest.approx([1.0, 0.001, 5.0])


def test_learning_shortens_the_reading(tmp_path: Path) -> None:
    rows = dataset(48, low=12)
    losses: list[float] = []

    class Losses(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **others: Any) -> None:
            losses.append(logs.get("loss", math.nan))

    quick = {"learning_rate": 2e-3, "policy_learning_rate": 0.1, "batch_size": 8, "warmup": 0.0}
    fitted = thresher.fit(
        make("bert"),
        thresher.AdapLeR(phi=0.05),
        rows,
        tokenizer(),
        tmp_path / "out",
        overrides=quick,
        logging_steps=6,
        callbacks=[Losses()],
        **QUICK,
    )
    losses = [loss for loss in losses if not math.isnan(loss)]
    assert losses[-1] < losses[0]
    result = run(fitted, rows)
    reads = [sum(read) for trace in result.traces for read, _ in trace.reads]
    assert sum(reads) < 0.8 * 3 * sum(map(len, rows["input_ids"]))
    loaded = thresher.load(tmp_path / "out")
    inputs = batch("bert")
    assert worst(outputs_of(fitted, inputs), outputs_of(loaded, inputs)) <= 1e-6


def test_a_fit_asks_for_the_saliency_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, given = [], []
    original = salient.saliency
    monkeypatch.setattr(salient, "saliency", lambda *a, **k: asked.append(1) or original(*a, **k))
    rows = dataset(16)

    def fit(rows: Any, out: str, *callbacks: Any) -> Any:
        return thresher.fit(
            make("bert"), "adapler", rows, tokenizer(), tmp_path / out, fine_tune=True, callbacks=callbacks,
            overrides={"batch_size": 8, "soft.epochs": 2.0}, save_steps=1, **QUICK,
        )  # fmt: skip

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            given.append(state.global_step)
            if asked and state.global_step == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(rows, "out", Stop())
    kept = tmp_path / "out" / "training" / salient.FILE
    assert kept.is_file()
    assert asked == [1]
    fit(rows, "out")
    assert asked == [1]
    fit(rows_with_saliency(), "other")
    assert asked == [1]


@pytest.mark.parametrize("content", [b"", b"no array", b"\x93NUMPY\x01\x00\x10"])
def test_a_damaged_saliency_that_was_kept_is_said(tmp_path: Path, content: bytes) -> None:
    (tmp_path / salient.FILE).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"saliency\.npy is (damaged|not of these rows)"):
        salient.with_saliency([make("bert")], dataset(4), tmp_path, PartialState(), progress=False)


def test_the_fastest_epoch_within_a_point_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # What the epochs are worth is told, so that the rule is seen: the second is the fastest that is good enough.
    worth = iter([(1.5, 0.80), (2.5, 0.795), (9.0, 0.78)])
    monkeypatch.setattr(recipe._Run, "_worth", lambda self, mode: next(worth))
    rows, seen = dataset(16), []

    class Note(TrainerCallback):
        def on_epoch_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            seen.append(fresh.classifier.weight.detach().clone())

    fresh = make("bert")
    fitted = thresher.fit(
        fresh, thresher.AdapLeR(hard_stage=False), rows, tokenizer(), tmp_path / "out", validation=rows,
        quality=lambda said: 0.80, overrides={"soft.epochs": 3.0, "soft.learning_rate": 1e-2}, callbacks=[Note()], **QUICK,
    )  # fmt: skip
    assert len(seen) == 3
    assert torch.equal(fitted.classifier.weight, seen[1])
    assert not torch.equal(fitted.classifier.weight, seen[2])
    noted = {"stage": "soft", "number": 2, "speedup": 2.5, "quality": 0.795}
    assert attachment_of(fitted).notes["epoch"] == noted
    assert not (tmp_path / "out" / "training").exists()


def test_the_epoch_that_is_noted_is_that_of_the_model_also_when_a_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the hard stage, which trains what the soft one has kept."""
    worth = iter([(1.5, 0.80), (2.5, 0.795), (1.4, 0.80), (1.2, 0.81), (1.3, 0.80)])
    monkeypatch.setattr(recipe._Run, "_worth", lambda self, mode: next(worth))
    options: dict[str, Any] = {"quality": lambda said: 0.80, "overrides": {"epochs": 2.0}, **QUICK}
    real, rows = recipe.by_one, dataset(16)

    class Stop(Exception):
        pass

    def stopped(processes: Any, what: Any) -> None:
        real(processes, what)
        if (tmp_path / "out" / "training" / "2-hard" / "done").is_dir():
            raise Stop

    monkeypatch.setattr(recipe, "by_one", stopped)
    with pytest.raises(Stop):
        thresher.fit(make("bert"), "adapler", rows, tokenizer(), tmp_path / "out", validation=rows, **options)
    monkeypatch.setattr(recipe, "by_one", real)
    fitted = thresher.fit(make("bert"), "adapler", rows, tokenizer(), tmp_path / "out", validation=rows, **options)
    noted = {"stage": "hard", "number": 1, "speedup": 1.4, "quality": 0.80}
    assert attachment_of(fitted).notes["epoch"] == noted
    assert len(list(worth)) == 1  # nothing was trained twice


def test_of_epochs_that_all_lose_more_the_best_is_kept() -> None:
    order = fastest(0.79)
    found = sorted([Epoch(1, 1.0, 0.7), Epoch(2, 3.0, 0.78), Epoch(3, 9.0, 0.5)], key=order, reverse=True)
    assert [one.number for one in found] == [2, 1, 3]


def test_with_a_speedup_the_last_epoch_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe._Run, "_worth", lambda self, mode: pytest.fail("nobody asked"))
    fitted = thresher.fit(
        make("bert"), "adapler", dataset(16), tokenizer(), tmp_path / "out", validation=dataset(8), speedup=1.05,
        overrides={"soft.epochs": 3.0}, **QUICK,
    )  # fmt: skip
    assert "epoch" not in attachment_of(fitted).notes


def test_saliency_is_averaged_over_the_best_epochs_of_fine_tuning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[Any]] = []
    original = salient.saliency
    monkeypatch.setattr(salient, "saliency", lambda models, *a, **k: asked.append(models) or original(models, *a, **k))
    worth = iter([0.5, 0.9, 0.7, 0.8])
    monkeypatch.setattr(recipe._Run, "_worth", lambda self, mode: (1.0, next(worth) if mode == "off" else 0.9))
    rows, weights = dataset(16), []

    class Note(TrainerCallback):
        def on_epoch_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            weights.append(fresh.classifier.weight.detach().clone())

    fresh = make("bert")
    thresher.fit(
        fresh, "adapler", rows, tokenizer(), tmp_path / "out", validation=rows, quality=lambda said: 0.9, fine_tune=True,
        overrides={"fine-tune.epochs": 4.0, "fine-tune.learning_rate": 1e-2, "soft.epochs": 3.0}, callbacks=[Note()], **QUICK,
    )  # fmt: skip
    ((first, second, third),) = asked
    for model, epoch in ((first, 1), (second, 3), (third, 2)):
        assert torch.equal(model.classifier.weight, weights[epoch])


def test_what_is_kept_of_other_rows_is_refused(tmp_path: Path) -> None:
    from accelerate import PartialState

    model, rows = attached(), dataset(6)
    found = salient.with_saliency([model], rows, tmp_path, PartialState(cpu=True), progress=False)
    assert [len(s) for s in found["saliency"]] == [len(ids) for ids in rows["input_ids"]]
    assert [sum(s) for s in found["saliency"]] == pytest.approx([1.0] * 6)
    with pytest.raises(CheckpointError, match="not of these rows"):
        salient.with_saliency([model], dataset(5), tmp_path, PartialState(cpu=True), progress=False)


@pytest.mark.parametrize("kind", ["token", "question-answering"])
def test_heads_that_read_every_token_learn_too(kind: str, tmp_path: Path) -> None:
    rows = dataset(12, labels="token" if kind == "token" else None)
    if kind == "question-answering":
        rows = rows.add_column("start_positions", [1] * 12).add_column("end_positions", [2] * 12)
    fitted = thresher.fit(
        make("bert", kind),
        thresher.AdapLeR(threshold=0.9),
        rows,
        tokenizer(),
        tmp_path,
        overrides={"epochs": 2.0},
        **QUICK,
    )
    assert (run(fitted, rows).speedup > 1.0) or not fitted.training
    assert all(torch.isfinite(p).all() for p in policy_of(fitted).parameters())


def test_without_labels_it_learns_what_the_model_says(tmp_path: Path) -> None:
    lessons = {"label_weight": 0.0, "distil_weight": 1.0, "epochs": 2.0}
    fitted = thresher.fit(
        make("bert"), "adapler", dataset(8, labels=None), tokenizer(), tmp_path, overrides=lessons, **QUICK
    )
    assert float((policy_of(fitted).eta - 0.25).abs().max()) > 0


def test_a_target_is_met_by_strength(tmp_path: Path) -> None:
    rows = dataset(24, low=12)
    model = attached(threshold=0.25)
    found = thresher.calibrate(model, rows, speedup=1.3)
    assert found.strength > 1
    assert run(model, rows).speedup == pytest.approx(found.speedup)
    assert found.speedup >= 1.3


def test_nothing_drops_at_strength_0_and_the_work_is_counted() -> None:
    inputs = batch("bert")
    model = attached(strength=0.0)
    stock = outputs_of(make("bert"), inputs)
    outputs, trace = traced(model, inputs)
    assert worst(stock, outputs) <= 1e-5
    assert not trace.dropped
    policy = policy_of(model)
    assert policy.overhead_flops(1, 3, 10) == 0
    policy = policy_of(attached(width=8))
    assert policy.overhead_flops(1, 3, 10) == 10 * (2 * 32 * 8 + 2 * 8)
    assert policy.overhead_flops(1, 3) == 3 * (2 * 32 * 8 + 2 * 8)


@pytest.mark.parametrize(("runtime", "package"), [("onnx", "onnxruntime"), ("openvino", "openvino")])
def test_an_export_drops_and_counts_as_the_engine_does(runtime: Any, package: str, tmp_path: Path) -> None:
    pytest.importorskip(package)
    pytest.importorskip("onnx")
    model = attached()
    inputs = batch("bert", (1, 9, 33, 20))  # a row of one token first, which OpenVINO's fused kernels would remember
    rows = [
        {name: alone(inputs, row)[name][0].tolist() for name in ("input_ids", "token_type_ids")} for row in range(4)
    ]
    thresher.export(model, tmp_path, runtime=runtime, rows=rows)
    outputs, trace = traced(model, inputs)
    runner = thresher.Runner(tmp_path, workers=1)
    found = runner.run(rows)
    for row, one in enumerate(found):
        torch.testing.assert_close(torch.as_tensor(one.answer), outputs["logits"][row], rtol=0, atol=CLOSE)
        real = trace.dropped_at()[row]
        assert one.dropped_at.tolist() == real[real >= 0].tolist()
    assert runner.speedup(found) == pytest.approx(speedup([trace], policy_of(model).geometry, policy_of(model)))


# --- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"threshold": 0.0}, {"threshold": 1.5}, {"threshold": math.nan}, {"width": 0}, {"beta": -1.0}, {"gamma": math.nan},
        {"phi": math.inf}, {"steepness": 0.0}, {"growth": 1.0}, {"growth": math.inf}, {"hard_stage": 1},
    ],
    ids=str,
)  # fmt: skip
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=next(iter(settings))):
        thresher.AdapLeR(**settings)


def test_a_batch_without_saliency_is_refused() -> None:
    model, inputs, labels, _ = lesson()
    with pytest.raises(OptionError, match="column 'saliency'"):
        Learner(model, policy_of(model).stages()[0])(**inputs, labels=labels)


def test_a_column_of_the_wrong_length_is_refused(tmp_path: Path) -> None:
    rows = dataset(4).add_column("saliency", [[1.0, 2.0]] * 4)
    model, stage = attached(), Stage(name="soft", mode="soft", epochs=3.0)
    with pytest.raises(DataError, match="tokens but 2 of 'saliency'"):
        run_stage(model, stage, rows, tokenizer(), tmp_path, **QUICK)


def test_even_shares_stay_alone_and_in_a_batch() -> None:
    """A share of 1 / n is not below 1 / n, however the row's sum was rounded, which depends on the rows beside it."""
    model = thresher.attach(make("bert"), thresher.AdapLeR(threshold=1.0))
    for predictor in policy_of(model).predictors:
        torch.nn.init.zeros_(predictor[-1].weight)
    for inputs in (batch("bert"), alone(batch("bert"), 1)):
        with torch.no_grad(), thresher.tracing(record=True) as traces:
            model(**inputs)
        assert not bool((traces[0].dropped_at() > 0).any())


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"growth": 1e30}, "ends at"),
        ({"steepness": 1e-6, "growth": 1e5}, "would remove everything"),
        ({"steepness": 1e300}, "steepness must be a number"),
    ],
)
def test_schedules_out_of_bounds(settings: dict[str, float], says: str) -> None:
    with pytest.raises(OptionError, match=says):
        policy_of(thresher.attach(make("bert"), thresher.AdapLeR(**settings))).check(
            Stage(name="soft", mode="soft", epochs=5)
        )


def test_a_schedule_is_checked_before_anything_is_trained(tmp_path: Path) -> None:
    seen: list[str] = []
    with pytest.raises(OptionError, match="needs at least 2, not 0.66"):
        fit(make("bert"), "adapler", dataset(24), tokenizer(), tmp_path / "new", fine_tune=True, max_steps=2, progress=False,
            overrides={"batch_size": 8}, on_stage=lambda stage: seen.append(stage.name))  # fmt: skip
    assert seen == []
    assert not (tmp_path / "new").exists()


def test_an_epoch_whose_model_is_gone_is_not_taken_for_one_that_is_kept(tmp_path: Path) -> None:
    """Another target orders epochs otherwise: one that was let go before cannot come back."""
    judgements = iter([(1.1, 0.90), (2.0, 0.80), (1.5, 0.85)])

    def go(floor: float, number: int) -> None:
        model = thresher.attach(make("bert"))
        epochs = Epochs(model, tmp_path, lambda: next(judgements), fastest(floor), 1, PartialState(cpu=True))
        epochs._judged(number)

    go(0.89, 1)
    go(0.89, 2)
    assert [place.name for place in kept(tmp_path)] == ["1"]
    go(0.70, 3)
    assert [place.name for place in kept(tmp_path)] == ["3"]
    assert [one.number for one in judged(tmp_path)] == [3, 1, 2]
