"""Saliency against autograd on the stock model, and what it refuses."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from torch import Tensor

import thresher
from helpers import FAMILIES, alone, batch, build, config_of, dataset, make, settings, tokenizer
from thresher.attribution import integrated
from thresher.errors import DataError, OptionError
from thresher.explanation import explain
from thresher.measure.run import run
from thresher.methods import CONFIGS
from thresher.model import policy_of

METHODS = ("gradient-x-input", "integrated-gradients", "attention")
TEXT = "w5 w6 w7 w8 w9 w10 w11 w12"


def alone_by_hand(model: Any, inputs: dict[str, Tensor], labels: dict[str, int | list[int]]) -> np.ndarray:
    """‖∂logit/∂h ⊙ h‖ of one row without padding, h being what the stock model's first layer is given."""
    states: list[Tensor] = []
    encoder = model.base_model
    hidden = encoder.embeddings(
        input_ids=inputs["input_ids"],
        **({"token_type_ids": inputs["token_type_ids"]} if "token_type_ids" in inputs else {}),
    )
    states.append(hidden.detach().requires_grad_())
    handle = encoder.embeddings.register_forward_hook(lambda *_: states[0])
    outputs = model(**inputs)
    handle.remove()
    if "start_logits" in outputs:
        wanted = outputs.start_logits[0, labels["start_positions"]] + outputs.end_logits[0, labels["end_positions"]]
    elif outputs.logits.dim() == 3:
        pairs = enumerate(labels["labels"])
        wanted = sum(outputs.logits[0, place, tag] for place, tag in pairs if tag != -100)
    else:
        wanted = outputs.logits[0, labels["labels"]]
    (gradient,) = torch.autograd.grad(wanted, states)
    score = (gradient * states[0])[0].pow(2).sum(-1).sqrt().detach().numpy()
    return score / score.sum()


@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in ("albert", "electra")])
def test_gradient_x_input_is_autograds(family: str, attached: bool) -> None:
    inputs = batch(family)
    model, plain = make(family), make(family)
    if attached:
        thresher.attach(model, settings(CONFIGS["ltp"]))
    labels = torch.tensor([2, 0, 1, 2])
    found = thresher.saliency(model, {**inputs, "labels": labels})
    for row, score in enumerate(found):
        expected = alone_by_hand(plain, alone(inputs, row), {"labels": int(labels[row])})
        np.testing.assert_allclose(score, expected, atol=2e-5)
        assert score.dtype == np.float32


@pytest.mark.parametrize("head", ["token", "question-answering"])
def test_of_every_head(head: str) -> None:
    rows, plain = dataset(7, labels="token" if head == "token" else None), make("bert", head)
    if head == "question-answering":
        rows = rows.add_column("start_positions", [1] * 7).add_column("end_positions", [3, 2, 1, 3, 2, 1, 3])
    else:
        marked = [[-100, *row["labels"][1:]] for row in rows]
        rows = rows.remove_columns("labels").add_column("labels", marked)
    found = thresher.saliency(thresher.attach(make("bert", head), "adapler"), rows, batch_size=3)
    for row, score in zip(rows, found, strict=True):
        one = {name: torch.tensor([row[name]]) for name in ("input_ids", "attention_mask", "token_type_ids")}
        np.testing.assert_allclose(score, alone_by_hand(plain, one, row), atol=2e-5)


@pytest.mark.parametrize("head", ["sequence", "token", "question-answering"])
def test_without_labels_it_is_what_the_model_says(head: str) -> None:
    inputs = batch("bert")
    model = make("bert", head)
    with torch.no_grad():
        outputs = model(**inputs)
    hide = ~inputs["attention_mask"].bool()
    if head == "question-answering":
        said = {
            f"{end}_positions": outputs[f"{end}_logits"].masked_fill(hide, -1e9).argmax(1) for end in ("start", "end")
        }
    else:
        said = {"labels": outputs.logits.argmax(-1)}
    for method in METHODS[:2]:
        wanted = thresher.saliency(model, {**inputs, **said}, method)
        for one, other in zip(wanted, thresher.saliency(model, inputs, method), strict=True):
            np.testing.assert_array_equal(one, other)


def test_several_classes_at_once_and_one_value() -> None:
    inputs = batch("bert")
    config = config_of("bert", problem_type="multi_label_classification")
    model = build(config)
    both = thresher.saliency(model, {**inputs, "labels": torch.tensor([[1.0, 0.0, 0.0]] * 4)})
    for one, other in zip(
        both, thresher.saliency(make("bert"), {**inputs, "labels": torch.tensor([0] * 4)}), strict=True
    ):
        np.testing.assert_allclose(one, other, atol=1e-6)
    assert len(thresher.saliency(model, inputs)) == 4
    value = build(config_of("bert", num_labels=1))
    for one, other in zip(
        thresher.saliency(value, inputs), thresher.saliency(value, {**inputs, "labels": torch.rand(4)}), strict=True
    ):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_shares_of_every_family(method: Any, family: str) -> None:
    inputs = batch(family, width=17)
    model = make(family)
    found = thresher.saliency(model, inputs, method)
    again = thresher.saliency(thresher.attach(model, settings(CONFIGS["ltp"])), inputs, method)
    for row, score in enumerate(found):
        assert score.shape == (int(inputs["attention_mask"][row].sum()),)
        assert (score >= 0).all()
        assert float(score.sum()) == pytest.approx(1.0, abs=1e-5)
        np.testing.assert_allclose(score, again[row], atol=1e-4)
        (single,) = thresher.saliency(model, alone(inputs, row), method)
        np.testing.assert_allclose(score, single, atol=1e-4)
    assert not model.training


def test_integrated_gradients_are_complete() -> None:
    """They sum to what the logit is more than with the average word in every place."""
    inputs, model = batch("bert", (9, 4)), make("bert")
    nodes, weights = np.polynomial.legendre.leggauss(64)
    line = [((x + 1) / 2, w / 2) for x, w in zip(nodes, weights, strict=True)]
    labels = torch.tensor([1, 2])
    found = integrated(model, inputs, {"labels": labels}, line)
    with torch.no_grad():
        whole = model(**inputs).logits
        table = model.bert.embeddings.word_embeddings.weight
        words = table.mean(0).expand(*inputs["input_ids"].shape, -1)
        nothing = model(**{**inputs, "input_ids": None}, inputs_embeds=words).logits
    gained = (whole - nothing).gather(1, labels[:, None])[:, 0]
    torch.testing.assert_close(found.sum(1), gained, rtol=0, atol=2e-2 * float(gained.abs().max()))


def test_attention_is_what_tokens_receive() -> None:
    inputs, model = batch("bert"), make("bert")
    found = thresher.saliency(model, inputs, "attention")
    plain = build(config_of("bert"), attn_implementation="eager")
    for row, score in enumerate(found):
        with torch.no_grad():
            maps = plain(**alone(inputs, row), output_attentions=True).attentions
        expected = sum(one[0].mean(0).mean(0) for one in maps) / len(maps)
        np.testing.assert_allclose(score, expected.numpy(), atol=1e-5)


def test_contribution_is_the_predictors_over_layers() -> None:
    inputs = batch("bert")
    model = thresher.attach(make("bert"), settings(CONFIGS["adapler"]))
    found = thresher.saliency(model, inputs, "contribution")
    with torch.no_grad(), thresher.tracing(record=True) as traces:
        model(**inputs)
    dropped = traces[0].dropped_at()
    assert (dropped == 1).any()
    for row, score in enumerate(found):
        mine = dropped[row][inputs["attention_mask"][row].bool()]
        assert float(score.sum()) == pytest.approx(1.0, abs=1e-5)
        if len(mine) > 5:  # who went first has only the first layer's share
            assert score[(mine == 1).numpy()].max(initial=0.0) < score[(mine == 0).numpy()].max()
    whole = thresher.attach(make("bert"), thresher.AdapLeR(strength=0.0))
    policy = policy_of(whole)
    state = whole.bert.embeddings(
        input_ids=inputs["input_ids"][:1, :9], token_type_ids=inputs["token_type_ids"][:1, :9]
    )[0]
    shares = []
    with torch.no_grad():
        for number, layer in enumerate(make("bert").bert.encoder.layer):
            shares.append(policy.predictors[number](state)[:, 0].softmax(0))
            out = layer(state[None])
            state = (out[0] if isinstance(out, tuple) else out)[0]
    (nine,) = thresher.saliency(whole, alone(inputs, 0), "contribution")
    np.testing.assert_allclose(nine, (sum(shares) / 3).numpy(), atol=1e-5)


def test_several_models_are_averaged_before_they_are_shared_out() -> None:
    inputs = batch("bert", (6,))
    models = [make("bert", seed=seed) for seed in (0, 1)]
    asked = {**inputs, "labels": torch.tensor([1])}
    raw = []
    for model in models:
        hidden = (
            model.bert.embeddings(**{k: v for k, v in inputs.items() if k != "attention_mask"})
            .detach()
            .requires_grad_()
        )
        handle = model.bert.embeddings.register_forward_hook(lambda *_, hidden=hidden: hidden)
        (gradient,) = torch.autograd.grad(model(**inputs).logits[0, 1], hidden)
        handle.remove()
        raw.append((gradient * hidden)[0].norm(dim=-1).detach().numpy())
    (found,) = thresher.saliency(models, asked)
    np.testing.assert_allclose(found, (raw[0] + raw[1]) / (raw[0] + raw[1]).sum(), atol=1e-5)


def test_rows_come_back_in_order_with_progress() -> None:
    rows, done = dataset(9), []
    model = make("bert")
    found = thresher.saliency(model, rows, batch_size=4, on_batch=done.append)
    assert sum(done) == 9
    assert [len(score) for score in found] == [len(ids) for ids in rows["input_ids"]]
    bare = datasets.Dataset.from_dict({"input_ids": rows["input_ids"][:], "labels": rows["labels"][:]})
    for one, other in zip(found, thresher.saliency(model, bare), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_the_model_stays_as_it_was_and_serves_others() -> None:
    inputs = batch("bert")
    model = thresher.attach(make("bert"), settings(CONFIGS["ltp"])).train()
    hooks = len(model.bert.encoder.layer[0]._forward_pre_hooks)
    thresher.saliency(model, inputs, "attention")
    thresher.saliency(model, inputs)
    assert model.training
    assert len(model.bert.encoder.layer[0]._forward_pre_hooks) == hooks
    assert all(p.grad is None for p in model.parameters())
    said: list[Tensor] = []
    begun: list[bool] = []

    def other(*_: Any) -> None:  # another thread's pass, begun while this one's first layer is to be replaced
        if begun:
            return
        begun.append(True)
        thread = threading.Thread(target=lambda: said.append(model.eval()(**inputs).logits.detach()))
        thread.start()
        thread.join()

    expected = model.eval()(**inputs).logits.detach()
    handle = model.bert.embeddings.register_forward_pre_hook(other)
    thresher.saliency(model, {**inputs, "labels": torch.tensor([0] * 4)})
    handle.remove()
    torch.testing.assert_close(said[0], expected, rtol=0, atol=1e-5)


def test_a_row_that_nothing_tells_apart_gets_even_shares() -> None:
    model = make("bert")
    with torch.no_grad():
        model.classifier.weight.zero_()
    (found,) = thresher.saliency(model, batch("bert", (5,)))
    np.testing.assert_allclose(found, 0.2)


# --- bad input ----------------------------------------------------------------------------------------------------


def test_a_row_without_finite_gradients_is_named() -> None:
    model, rows = make("bert"), dataset(6)
    sizes = [len(ids) for ids in rows["input_ids"]]
    place = sizes.index(max(sizes))
    assert sizes.count(max(sizes)) == 1
    with torch.no_grad():  # a position that only the longest row has
        model.bert.embeddings.position_embeddings.weight[max(sizes) - 1] = torch.nan
    for method in METHODS:
        with pytest.raises(DataError, match=f"Row {place + 1} has a saliency that is not finite"):
            thresher.saliency(model, rows, method)


@pytest.mark.parametrize("label", [-100, -1, 3])
def test_a_label_that_is_no_class_is_refused(label: int) -> None:
    model = make("bert")
    with pytest.raises(DataError, match=f"Row 2 has the label {label}, and the model has the classes 0 to 2"):
        thresher.saliency(model, {**batch("bert"), "labels": torch.tensor([0, label, 1, 0])})


@pytest.mark.parametrize("number", [64, 999, -1])
def test_a_token_that_the_model_does_not_know_is_named(number: int, tmp_path: Path) -> None:
    rows = dataset(3).to_dict()
    rows["input_ids"][1][2] = number
    wrong, model = datasets.Dataset.from_dict(rows), make("bert")
    padded = {"input_ids": torch.tensor([[2, 5, 3], [2, 5, number]])}
    for ask in (
        lambda: thresher.saliency(model, wrong),
        lambda: thresher.saliency(model, padded),
        lambda: run(model, wrong),
        lambda: thresher.fit(model, "adapler", wrong, tokenizer(), tmp_path / "out", progress=False),
    ):
        with pytest.raises(DataError, match=f"Row 2 has the token id {number}, and the model knows 0 to 63"):
            ask()
    assert not (tmp_path / "out").exists()


def test_a_tag_that_is_none_of_the_models_is_refused() -> None:
    inputs = batch("bert", (3, 2))
    tags = torch.tensor([[-100, 0, 1], [0, 9, -100]])
    with pytest.raises(DataError, match="Row 2 has the label 9"):
        thresher.saliency(make("bert", "token"), {**inputs, "labels": tags})


def test_what_a_model_cannot_give_is_refused() -> None:
    inputs = batch("bert")
    with pytest.raises(OptionError, match="has none; give one with a classification"):
        thresher.saliency(make("bert", "base"), inputs)
    with pytest.raises(OptionError, match="has none; give one with a classification"):
        thresher.saliency(make("bert", "base"), {**inputs, "labels": torch.tensor([0] * 4)})
    assert len(thresher.saliency(make("bert", "base"), inputs, "attention")) == 4
    for model in (make("bert"), thresher.attach(make("bert")), thresher.attach(make("bert"), "ltp")):
        with pytest.raises(OptionError, match="adapler"):
            thresher.saliency(model, inputs, "contribution")
    with pytest.raises(OptionError, match="did you mean 'attention'"):
        thresher.saliency(make("bert"), inputs, "atention")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="steps"):
        thresher.saliency(make("bert"), inputs, "integrated-gradients", steps=0)
    with pytest.raises(OptionError, match="Give saliency a model"):
        thresher.saliency([], inputs)
    with pytest.raises(OptionError, match="end_positions"):
        thresher.saliency(make("bert", "question-answering"), {**inputs, "start_positions": torch.tensor([1] * 4)})
    with pytest.raises(OptionError, match="have labels, not start_positions"):
        thresher.saliency(make("bert"), {**inputs, "start_positions": torch.tensor([1] * 4)})


# --- explained ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [*METHODS, "contribution"])
def test_a_token_map_shows_it(method: Any) -> None:
    model = thresher.attach(make("bert"), settings(CONFIGS["adapler"]))
    texts = [TEXT, "w5 w6"]
    found = explain(model, tokenizer(), texts, salient=method)
    scores = thresher.saliency(model, dict(tokenizer()(texts, return_tensors="pt", padding=True)), method)
    for one, score in zip(found, scores, strict=True):
        assert one.saliency is not None
        np.testing.assert_allclose(one.saliency, score, atol=1e-6)
        assert len(one.saliency) == len(one.tokens)
    assert explain(model, tokenizer(), [TEXT])[0].saliency is None
    assert explain(model, tokenizer(), [], salient=method) == []


def test_the_command_shows_the_most_salient_tokens_beside_their_layer(tmp_path: Any) -> None:
    from commands import call, ok

    model = thresher.attach(make("bert"), settings(CONFIGS["adapler"]))
    thresher.model.save(model, tmp_path / "m")
    tokenizer().save_pretrained(str(tmp_path / "m"))
    (found,) = ok("explain", tmp_path / "m", "--text", TEXT, "--saliency", "contribution")["maps"]
    assert sum(found["saliency"]) == pytest.approx(1.0, abs=1e-5)
    assert len(found["saliency"]) == len(found["tokens"])
    shown = call("explain", tmp_path / "m", "--text", TEXT, "--saliency", "attention").stdout
    assert "What matters most, by attention" in shown
    assert "dropped at layer" in shown
    refused = call("explain", tmp_path / "m", "--text", TEXT, "--saliency", "x")
    assert refused.exit_code == 2
    assert "There is no saliency 'x'" in refused.stderr
    (bare,) = ok("explain", tmp_path / "m", "--text", TEXT)["maps"]
    assert bare["saliency"] is None


@pytest.mark.parametrize("number", [int, float])
def test_labels_that_go_together_may_be_whole_numbers(number: type) -> None:
    """Of rows and of a batch alike: the logits of the classes that a row has."""
    model = build(config_of("bert", num_labels=3, problem_type="multi_label_classification"))
    rows = dataset(5, labels=None)
    labels = [[number(one) for one in (1, 0, row % 2)] for row in range(5)]
    found = thresher.saliency(model, rows.add_column("labels", labels), batch_size=2)
    for row, score in enumerate(found):
        inputs = {name: torch.tensor([rows[row][name]]) for name in ("input_ids", "attention_mask", "token_type_ids")}
        (expected,) = thresher.saliency(model, {**inputs, "labels": torch.tensor([labels[row]], dtype=torch.float32)})
        np.testing.assert_allclose(score, expected, atol=1e-6)


def test_gradients_are_had_where_the_caller_wants_none() -> None:
    model, rows = make("bert"), dataset(3)
    expected = thresher.saliency(model, rows)
    for off in (torch.no_grad(), torch.inference_mode()):
        with off:
            found = thresher.saliency(model, rows)
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("size", [0, -1, 2.5, "2"])
def test_a_batch_of_no_rows_is_no_batch(size: Any) -> None:
    with pytest.raises(OptionError, match="A batch has a whole number of rows, at least 1"):
        thresher.saliency(make("bert"), dataset(3), batch_size=size)
