"""An attached model that drops nothing is the stock model: every family, every head, every way to call it."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import thresher
from helpers import (
    FAMILIES,
    HEADS,
    LENGTHS,
    WITH_TYPES,
    alone,
    batch,
    build,
    config_of,
    make,
    outputs_of,
    real_parts,
    worst,
)
from thresher.errors import DataError, OptionError, ThresherError, UnsupportedModelError
from thresher.model import attachment_of, is_attached

CLOSE = 1e-5
family_and_head = pytest.mark.parametrize(("family", "head"), [(f, h) for f in FAMILIES for h in HEADS])
every_family = pytest.mark.parametrize("family", FAMILIES)


@family_and_head
@pytest.mark.parametrize("policy", [None, "attention-mass"])
def test_keeping_everything_is_stock(family: str, head: str, policy: str | None) -> None:
    model, inputs = make(family, head), batch(family)
    stock = outputs_of(model, inputs)
    assert max(float(v.std()) for v in stock.values()) > 0.05  # something to compare
    attached = thresher.attach(model, policy)
    assert attached is model
    with thresher.keep_everything():
        assert worst(stock, outputs_of(model, inputs)) <= CLOSE
    if policy is None:
        assert worst(stock, outputs_of(model, inputs)) <= CLOSE
    else:
        assert worst(stock, outputs_of(model, inputs)) > 1e-2  # the policy does something
    with thresher.stock():
        assert worst(stock, outputs_of(model, inputs)) <= CLOSE


@family_and_head
def test_detach_gives_back_the_stock_model_bit_for_bit(family: str, head: str) -> None:
    model, inputs = make(family, head), batch(family)
    stock = outputs_of(model, inputs)
    implementation, keys = model.config._attn_implementation, list(model.state_dict())
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    names = [set(m.__dict__) for m in model.modules()]
    thresher.attach(model, "attention-mass")
    assert list(model.state_dict()) == keys  # attached models save as ordinary ones
    outputs_of(model, inputs)
    assert thresher.detach(model) is model
    assert worst(stock, outputs_of(model, inputs)) == 0.0
    assert model.config._attn_implementation == implementation
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert [set(m.__dict__) for m in model.modules()] == names
    assert not is_attached(model)


@family_and_head
def test_forward_called_directly_and_through_the_base_model(family: str, head: str) -> None:
    model, inputs = make(family, head), batch(family)
    thresher.attach(model, "attention-mass")
    with torch.no_grad():
        through_call = real_parts(model(**inputs), inputs["attention_mask"])
        assert worst(through_call, real_parts(model.forward(**inputs), inputs["attention_mask"])) == 0.0
        base = model.base_model
        assert worst(outputs_of(base, inputs), real_parts(base.forward(**inputs), inputs["attention_mask"])) == 0.0
    with thresher.stock():
        assert worst(through_call, outputs_of(model, inputs)) > 1e-2


@pytest.mark.parametrize(("family", "head"), [(f, h) for f in FAMILIES for h in HEADS if h != "sequence"])
def test_left_padding(family: str, head: str) -> None:
    # Not the sequence heads: a stock one reads column 0, which is padding here.
    model, inputs = make(family, head), batch(family, side="left")
    stock = outputs_of(model, inputs)
    stock.pop("pooler_output", None)  # read from column 0, padding here
    thresher.attach(model)
    got = outputs_of(model, inputs)
    got.pop("pooler_output", None)
    assert worst(stock, got) <= CLOSE


@every_family
def test_without_an_attention_mask(family: str) -> None:
    model, inputs = make(family, "token"), batch(family, (8, 8))
    del inputs["attention_mask"]
    with torch.no_grad():
        stock = model(**inputs).logits
        got = thresher.attach(model)(**inputs).logits
    torch.testing.assert_close(got, stock, rtol=0, atol=CLOSE)


@every_family
def test_inputs_embeds(family: str) -> None:
    model, inputs = make(family, "token"), batch(family)
    embeds = model.get_input_embeddings()(inputs.pop("input_ids")).detach()
    inputs["inputs_embeds"] = embeds
    stock = outputs_of(model, inputs)
    thresher.attach(model)
    assert worst(stock, outputs_of(model, inputs)) <= CLOSE
    thresher.attach(model, "attention-mass")
    assert worst(stock, outputs_of(model, inputs)) > 1e-2


@pytest.mark.parametrize("family", WITH_TYPES)
def test_token_types_reach_the_embeddings(family: str) -> None:
    model, inputs = make(family, "sequence"), batch(family)
    stock = outputs_of(model, inputs)
    without = {k: v for k, v in inputs.items() if k != "token_type_ids"}
    assert worst(stock, outputs_of(model, without)) > 1e-3
    thresher.attach(model)
    assert worst(stock, outputs_of(model, inputs)) <= CLOSE


@every_family
def test_position_ids(family: str) -> None:
    model, inputs = make(family, "token"), batch(family, (6, 6))
    inputs["position_ids"] = torch.arange(6).flip(0).unsqueeze(0) + 2
    stock = outputs_of(model, inputs)
    thresher.attach(model)
    assert worst(stock, outputs_of(model, inputs)) <= CLOSE


@every_family
def test_tuples_and_positional_arguments(family: str) -> None:
    model, inputs = make(family, "token"), batch(family)
    expected = outputs_of(model, inputs)["logits"]
    thresher.attach(model)
    named = {k: v for k, v in inputs.items() if k not in ("input_ids", "attention_mask")}
    with torch.no_grad():
        (logits,) = model(inputs["input_ids"], inputs["attention_mask"], return_dict=False, **named)
    torch.testing.assert_close(logits[inputs["attention_mask"].bool()], expected, rtol=0, atol=CLOSE)


def _labels(head: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    rows, width = inputs["input_ids"].shape
    if head == "sequence":
        return {"labels": torch.arange(rows) % 3}
    if head == "token":
        return {"labels": (inputs["input_ids"] % 3).masked_fill(inputs["attention_mask"] == 0, -100)}
    return {"start_positions": torch.arange(rows) % width, "end_positions": torch.full((rows,), width - 1)}


@pytest.mark.parametrize(("family", "head"), [(f, h) for f in FAMILIES for h in HEADS if h != "base"])
def test_loss_and_gradients_are_stocks(family: str, head: str) -> None:
    # Of a span head the loss runs over padding too, where a stock model says something arbitrary: no padding there.
    inputs = batch(family, (7, 7, 7) if head == "question-answering" else LENGTHS)
    model = make(family, head).train()
    labels = _labels(head, inputs)

    def learn() -> tuple[float, dict[str, Tensor]]:
        model.zero_grad()
        loss = model(**inputs, **labels).loss
        loss.backward()
        return float(loss), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    stock_loss, stock_gradients = learn()
    thresher.attach(model)
    loss, gradients = learn()
    assert loss == pytest.approx(stock_loss, abs=1e-5)
    assert set(gradients) == set(stock_gradients)
    for name, expected in stock_gradients.items():
        scale = max(float(expected.abs().max()), 0.1)
        assert float((gradients[name] - expected).abs().max()) <= 1e-4 * scale, name


@every_family
def test_dropping_still_teaches_every_layer(family: str) -> None:
    inputs = batch(family)
    model = thresher.attach(make(family, "sequence").train(), "attention-mass")
    model(**inputs, labels=torch.arange(len(LENGTHS)) % 3).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert torch.isfinite(parameter.grad).all(), name
    layers = attachment_of(model).engine.entrance.layers
    assert all(any(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters()) for layer in layers)


@family_and_head
@pytest.mark.parametrize("name", ["output_hidden_states", "output_attentions"])
def test_per_layer_outputs_are_refused(family: str, head: str, name: str) -> None:
    model, inputs = thresher.attach(make(family, head)), batch(family)
    with pytest.raises(OptionError, match=name):
        model(**inputs, **{name: True})
    assert worst(outputs_of(model, inputs), outputs_of(model, {**inputs, name: False})) == 0  # type: ignore[dict-item]
    with thresher.stock():
        model(**inputs, output_hidden_states=True)


@every_family
def test_per_layer_outputs_are_refused_from_the_configuration_too(family: str) -> None:
    model, inputs = thresher.attach(make(family)), batch(family)
    model.config.output_hidden_states = True
    with pytest.raises(OptionError, match="output_hidden_states"):
        model(**inputs)


@every_family
def test_a_mask_of_four_dimensions_is_refused(family: str) -> None:
    model, inputs = thresher.attach(make(family)), batch(family, (6, 6))
    inputs["attention_mask"] = torch.zeros(2, 1, 6, 6)
    with pytest.raises(OptionError, match=r"\[batch, tokens\]"):
        model(**inputs)


@every_family
def test_gradient_checkpointing_is_refused_in_training_only(family: str) -> None:
    model, inputs = thresher.attach(make(family)), batch(family)
    if not model.supports_gradient_checkpointing:
        pytest.skip("transformers has no checkpointing for this family")
    model.gradient_checkpointing_enable()
    outputs_of(model, inputs)
    model.train()
    with pytest.raises(OptionError, match="checkpointing"):
        model(**inputs)
    model.gradient_checkpointing_disable()
    model(**inputs)


@every_family
def test_a_row_of_padding_is_refused(family: str) -> None:
    model, inputs = thresher.attach(make(family)), batch(family)
    inputs["attention_mask"][1] = 0
    with pytest.raises(DataError, match="Row 1"):
        model(**inputs)


@every_family
def test_an_error_inside_a_pass_leaves_nothing_behind(family: str) -> None:
    model, inputs = thresher.attach(make(family), "attention-mass"), batch(family)
    before = outputs_of(model, inputs)
    handle = attachment_of(model).engine.entrance.layers[-1].register_forward_pre_hook(_fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        model(**inputs)
    handle.remove()
    assert worst(before, outputs_of(model, inputs)) == 0.0
    other = make("bert", seed=4)
    plain = batch("bert")
    assert not outputs_of(other, plain)["logits"].isnan().any()  # a stock model after the failed pass


def _fail(*_: Any) -> None:
    raise RuntimeError("on purpose")


@every_family
def test_missing_inputs_give_transformers_own_error(family: str) -> None:
    model = make(family)
    with pytest.raises(ValueError) as stock:
        model()
    with pytest.raises(ValueError) as attached:
        thresher.attach(model)()
    assert str(stock.value) == str(attached.value)


TINY: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}


@pytest.mark.parametrize(
    "config",
    [
        transformers.DebertaV2Config(**TINY),
        transformers.FunnelConfig(vocab_size=64, d_model=32, n_head=4, d_head=8, d_inner=48, block_sizes=[1, 1]),
    ],
    ids=lambda c: c.model_type,
)
def test_unsupported_families_are_named_with_the_supported_ones(config: Any) -> None:
    model = build(config)
    with pytest.raises(UnsupportedModelError) as error:
        thresher.attach(model)
    assert repr(config.model_type) in str(error.value)
    for family in FAMILIES:
        assert family in str(error.value)
    assert not is_attached(model)


@pytest.mark.parametrize(
    "make_decoder",
    [
        lambda: transformers.BertLMHeadModel(transformers.BertConfig(**TINY, is_decoder=True)),
        lambda: transformers.GPT2Model(transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4)),
        lambda: transformers.T5Model(
            transformers.T5Config(vocab_size=64, d_model=32, d_ff=48, num_layers=1, num_heads=4)
        ),
    ],
    ids=["bert-decoder", "gpt2", "t5"],
)
def test_decoders_are_refused(make_decoder: Any) -> None:
    model = make_decoder()
    with pytest.raises(UnsupportedModelError) as error:
        thresher.attach(model)
    assert type(model).__name__ in str(error.value)
    assert "bert" in str(error.value)
    assert model.config._attn_implementation != "thresher"


@pytest.mark.parametrize("thing", [torch.nn.Linear(2, 2), object(), "bert"], ids=["module", "object", "string"])
def test_things_that_are_no_model_are_refused(thing: Any) -> None:
    with pytest.raises(UnsupportedModelError, match=type(thing).__name__):
        thresher.attach(thing)


def test_a_policy_that_does_not_fit_leaves_the_model_as_it_was() -> None:
    model, inputs = make("bert"), batch("bert")
    stock = outputs_of(model, inputs)
    with pytest.raises(OptionError, match="3 layers"):
        thresher.attach(model, thresher.AttentionMass(retention=(0.5, 0.5)))
    with pytest.raises(OptionError, match="attention-mass"):
        thresher.attach(model, "attention-mas")
    assert not is_attached(model)
    assert worst(stock, outputs_of(model, inputs)) == 0.0
    thresher.attach(model, "attention-mass")
    before = outputs_of(model, inputs)
    with pytest.raises(OptionError):
        thresher.attach(model, thresher.AttentionMass(retention=(0.5, 0.5)))
    assert worst(before, outputs_of(model, inputs)) == 0.0


def test_attaching_again_replaces_the_policy() -> None:
    model, inputs = make("bert"), batch("bert")
    fresh = outputs_of(thresher.attach(make("bert"), "last"), inputs)
    thresher.attach(thresher.attach(model, "attention-mass"), "last")
    assert worst(fresh, outputs_of(model, inputs)) == 0.0
    thresher.detach(model)
    with pytest.raises(OptionError, match="attach"):
        thresher.detach(model)
    with pytest.raises(OptionError, match="no policy"):
        thresher.policy_of(thresher.attach(model))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_whatever_attention_the_model_had_comes_back(implementation: str) -> None:
    model, inputs = make("bert"), batch("bert")
    model.set_attn_implementation(implementation)
    stock = outputs_of(model, inputs)
    thresher.attach(model)
    assert worst(stock, outputs_of(model, inputs)) <= CLOSE
    thresher.detach(model)
    assert model.config._attn_implementation == implementation
    assert worst(stock, outputs_of(model, inputs)) == 0.0


@every_family
def test_contexts_nest(family: str) -> None:
    model, inputs = make(family), batch(family)
    stock = outputs_of(model, inputs)
    thresher.attach(model, "attention-mass")
    dropping = outputs_of(model, inputs)
    with thresher.keep_everything():
        with thresher.stock():
            assert worst(stock, outputs_of(model, inputs)) <= CLOSE
            with thresher.keep_everything(), thresher.tracing() as traces:
                outputs_of(model, inputs)
            assert traces == []  # still stock: no pass was made
        with thresher.tracing() as traces:
            assert worst(stock, outputs_of(model, inputs)) <= CLOSE
        assert traces[0].reads == [(list(LENGTHS), list(LENGTHS))] * 3
    with pytest.raises(RuntimeError), thresher.stock():
        raise RuntimeError
    assert worst(dropping, outputs_of(model, inputs)) == 0.0


def test_traces_nest_and_only_recorded_ones_say_what_was_dropped() -> None:
    model, inputs = thresher.attach(make("bert"), "attention-mass"), batch("bert")
    with thresher.tracing(record=True) as outer:
        outputs_of(model, inputs)
        with thresher.tracing() as inner:
            outputs_of(model, inputs)
        outputs_of(model, inputs)
    assert len(outer) == 2
    assert len(inner) == 1
    assert (outer[0].dropped_at() >= 0).sum() == sum(LENGTHS)
    assert (outer[0].dropped_at() > 0).any()
    with pytest.raises(OptionError, match="record=True"):
        inner[0].dropped_at()
    assert outer[0].original == list(LENGTHS)


@every_family
def test_one_model_serves_many_threads(family: str) -> None:
    first = thresher.attach(make(family, "token"), "attention-mass")
    second = thresher.attach(make(family, "token", seed=1), "relative-threshold")
    inputs = [batch(family, [1 + (7 * i + 3 * j) % 15 for j in range(1 + i % 3)], seed=i) for i in range(12)]
    jobs = [(model, given) for given in inputs for model in (first, second)]

    def work(job: tuple[Any, dict[str, Tensor]]) -> tuple[dict[str, Tensor], Tensor, dict[str, Tensor]]:
        model, given = job
        gate.wait(timeout=30)
        with thresher.tracing(record=True) as traces:
            said = outputs_of(model, given)
        with thresher.stock():
            plain = outputs_of(model, given)
        (trace,) = traces
        return said, trace.dropped_at(), plain

    gate = threading.Barrier(1)
    serial = [work(job) for job in jobs]
    gate = threading.Barrier(4)
    with ThreadPoolExecutor(4) as pool:
        parallel = list(pool.map(work, jobs))
    for (said, dropped, plain), (said_again, dropped_again, plain_again) in zip(serial, parallel, strict=True):
        assert torch.equal(dropped, dropped_again)
        assert worst(said, said_again) <= 1e-6
        assert worst(plain, plain_again) <= 1e-6


@family_and_head
def test_validate_proves_it(family: str, head: str) -> None:
    model, inputs = thresher.attach(make(family, head), "attention-mass"), batch(family)
    model.train()
    result = thresher.validate(model, inputs, tolerance=CLOSE)
    assert 0 <= result.worst <= CLOSE
    assert result.differences
    assert model.training
    with pytest.raises(ThresherError, match="differ by"):
        thresher.validate(model, inputs, tolerance=-1.0)


def test_validate_sees_a_packed_pass_that_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = thresher.attach(make("bert")), batch("bert")
    import thresher.engine as engine

    original = engine.attend

    def tilted(*args: Any, **options: Any) -> Any:
        context, evidence = original(*args, **options)
        return context * 1.01, evidence

    monkeypatch.setattr(engine, "attend", tilted)
    with pytest.raises(ThresherError, match="must not be run"):
        thresher.validate(model, inputs)


@every_family
def test_other_depths(family: str) -> None:
    inputs = batch(family)
    for layers in (1, 4):
        model = make(family, "token", layers=layers)
        stock = outputs_of(model, inputs)
        thresher.attach(model)
        assert worst(stock, outputs_of(model, inputs)) <= CLOSE
        with thresher.tracing() as traces:
            outputs_of(model, inputs)
        assert len(traces[0].reads) == layers


@pytest.mark.parametrize("extra", [{"num_hidden_groups": 2}, {"inner_group_num": 2}], ids=str)
def test_albert_with_groups_of_layers(extra: dict[str, int]) -> None:
    model, inputs = build(config_of("albert", 4, **extra), "token"), batch("albert")
    stock = outputs_of(model, inputs)
    thresher.attach(model)
    assert worst(stock, outputs_of(model, inputs)) <= CLOSE
    with thresher.tracing() as traces:
        outputs_of(model, inputs)
    assert len(traces[0].reads) == 4 * extra.get("inner_group_num", 1)
    thresher.attach(model, "attention-mass")
    assert worst(stock, outputs_of(model, inputs)) > 1e-2


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_modernbert_poolings(pooling: str) -> None:
    model, inputs = build(config_of("modernbert", classifier_pooling=pooling)), batch("modernbert")
    stock = outputs_of(model, inputs)
    thresher.attach(model)
    assert worst(stock, outputs_of(model, inputs)) <= CLOSE


@every_family
def test_masked_language_models(family: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForMaskedLM.from_config(config_of(family)).eval()
    inputs = batch(family)
    stock = outputs_of(model, inputs)
    thresher.attach(model)
    assert worst(stock, outputs_of(model, inputs)) <= 3 * CLOSE
    thresher.attach(model, "attention-mass")
    assert worst(stock, outputs_of(model, inputs)) > 1e-2


@every_family
def test_one_row_one_token(family: str) -> None:
    model, inputs = make(family, "token"), batch(family, (1,))
    stock = outputs_of(model, inputs)
    thresher.attach(model, "attention-mass")
    assert worst(stock, outputs_of(model, inputs)) <= CLOSE
    wide = batch(family, (6, 1), seed=2)
    got = outputs_of(model, wide)["logits"][-1:]
    torch.testing.assert_close(got, outputs_of(model, alone(wide, 1))["logits"], rtol=0, atol=CLOSE)


@every_family
def test_bfloat16_runs_and_stays_near(family: str) -> None:
    model, inputs = make(family, "sequence").to(torch.bfloat16), batch(family)
    stock = outputs_of(model, inputs)
    thresher.attach(model)
    got = outputs_of(model, inputs)
    assert got["logits"].dtype == torch.bfloat16
    spread = float(stock["logits"].float().std())
    assert worst(stock, got) <= 0.25 * max(spread, 1.0)
    thresher.attach(model, "attention-mass")
    assert outputs_of(model, inputs)["logits"].dtype == torch.bfloat16
