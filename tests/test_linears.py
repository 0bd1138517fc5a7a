"""Fast linear layers: the same function as torch's, never with stale weights, and int8 close by."""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import thresher
from helpers import FAMILIES, batch, make, outputs_of, settings, worst
from thresher import linears
from thresher.engine import keep_everything
from thresher.errors import CheckpointError, OptionError
from thresher.exits.branches import AttentiveBranch
from thresher.linears import FastLinear, TanhLinear
from thresher.methods import CONFIGS
from thresher.model import attachment_of, policy_of
from thresher.packed import PackedTokens


@given(
    rows=st.integers(0, 70),
    inside=st.integers(1, 40),
    outside=st.integers(1, 40),
    bias=st.booleans(),
    deep=st.booleans(),
    tanh=st.booleans(),
)
def test_float32_is_torchs_own(rows: int, inside: int, outside: int, bias: bool, deep: bool, tanh: bool) -> None:
    torch.manual_seed(rows)
    linear = (TanhLinear if tanh else nn.Linear)(inside, outside, bias=bias)
    x = torch.randn((2, rows, inside) if deep else (rows, inside))
    with torch.no_grad():
        torch.testing.assert_close(FastLinear(linear, "float32")(x), linear(x), atol=1e-5, rtol=1e-5)


def by_hand(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """Symmetric int8 weights by output channel, asymmetric uint8 activations by call."""
    scale = np.abs(weight).max(1, keepdims=True) / 127
    whole = np.clip(np.round(weight / scale), -127, 127)
    low, high = min(x.min(), 0.0), max(x.max(), 0.0)
    step = (high - low) / 255
    zero = round(-low / step)
    seen = (np.clip(np.round(x / step) + zero, 0, 255) - zero) * step
    return seen @ (whole * scale).T + bias


def test_int8_is_what_a_naive_quantization_says() -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(64, 48), torch.randn(37, 64)
    expected = by_hand(*(t.detach().double().numpy() for t in (x, linear.weight, linear.bias)))
    with torch.no_grad():
        got = FastLinear(linear, "int8")(x).numpy()
        exact = linear(x).numpy()
    # A value halfway between two steps may be rounded either way.
    assert np.abs(got - expected).max() < 0.01 * np.abs(exact).max()
    assert 0 < np.abs(got - exact).max() < 0.05 * np.abs(exact).max()


def test_a_channel_of_zeros_quantizes() -> None:
    linear = nn.Linear(16, 8)
    with torch.no_grad():
        linear.weight[3] = 0.0
        got = FastLinear(linear, "int8")(torch.randn(9, 16))
    torch.testing.assert_close(got[:, 3], linear.bias[3].detach().expand(9))


@pytest.mark.parametrize("precision", ["float32", "int8"])
@pytest.mark.parametrize("change", ["in place", "data", "optimizer", "fused optimizer", "state dict"])
def test_a_changed_weight_is_seen(change: str, precision: Any) -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(32, 32), torch.randn(20, 32)
    fast = FastLinear(linear, precision)
    with torch.no_grad():
        before = fast(x)
    if change == "in place":
        with torch.no_grad():
            linear.weight.mul_(2).add_(1)
    elif change == "data":
        linear.weight.data = linear.weight.data * 2 + 1
    elif change == "state dict":
        linear.load_state_dict({k: v * 2 + 1 for k, v in linear.state_dict().items()})
    else:
        optimizer = torch.optim.AdamW(linear.parameters(), lr=1.0, fused=change.startswith("fused"))
        linear(x).sum().backward()
        with torch.no_grad():
            fast(x)  # between backward and the step, which no forward through `fast` announces
        optimizer.step()
    with torch.no_grad():
        after, exact = fast(x), linear(x)
    assert (after - before).abs().max() > 0.5
    assert (after - exact).abs().max() < (1e-4 if precision == "float32" else 0.1 * float(exact.abs().max()))


@pytest.mark.parametrize("part", ["query", "key", "value", "out", "pool"])
@pytest.mark.parametrize("change", ["in place", "data", "copied"])
def test_joined_maps_of_a_branch_are_those_of_its_layers_also_when_one_changes(change: str, part: str) -> None:
    torch.manual_seed(0)
    branch = AttentiveBranch(24, 16, 4, 3)
    mask = torch.arange(9) < torch.tensor([[9], [4], [1]])
    tokens = PackedTokens.pack(torch.randn(3, 9, 24), mask)
    with torch.no_grad():
        before = branch(tokens)
        weight = branch.get_submodule(part).get_parameter("weight")
        if change == "in place":
            weight.mul_(-3)
        elif change == "data":
            weight.data = weight.data * -3
        else:
            branch = copy.deepcopy(branch)
            branch.get_submodule(part).get_parameter("weight").mul_(-3)
        after = branch(tokens)
        with linears.plain_kernels():
            torch.testing.assert_close(branch(tokens), after, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(branch(tokens), after, atol=1e-5, rtol=1e-5)  # layer by layer, as gradients want it
    assert (after - before).abs().max() > 1e-3


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_gradients_and_other_dtypes_take_torchs_way(precision: Any) -> None:
    linear, x = nn.Linear(8, 8), torch.randn(10, 8, requires_grad=True)
    fast = FastLinear(linear, precision)
    assert torch.equal(fast(x), linear(x))
    fast(x).sum().backward()
    assert x.grad is not None
    half = nn.Linear(8, 8).to(torch.bfloat16)
    with torch.no_grad():
        y = torch.randn(10, 8, dtype=torch.bfloat16)
        assert torch.equal(FastLinear(half, precision)(y), half(y))


def test_a_bias_that_learns_alone_gets_its_gradient() -> None:
    linear, branch = nn.Linear(8, 8), AttentiveBranch(8, 8, 2, 2)
    for one in (linear, branch):
        one.requires_grad_(False)
    linear.bias.requires_grad_()
    FastLinear(linear, "float32")(torch.randn(9, 8)).sum().backward()
    branch.value.bias.requires_grad_()
    branch(PackedTokens.pack(torch.randn(2, 5, 8))).sum().backward()
    assert linear.bias.grad is not None
    assert branch.value.bias.grad is not None


def test_only_passes_are_fast_and_detaching_restores() -> None:
    model = make("bert")
    plain = copy.deepcopy(model)
    thresher.attach(model)
    inputs = batch("bert")
    with thresher.stock():
        assert worst(outputs_of(plain, inputs), outputs_of(model, inputs)) == 0.0
    layer = model.bert.encoder.layer[0].intermediate.dense
    x = torch.randn(40, layer.in_features)
    with torch.no_grad():
        assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    thresher.detach(model)
    assert not any("forward" in vars(m) for m in model.modules())


@pytest.mark.skipif(not linears.has_onednn(), reason="this build of torch has no oneDNN")
@pytest.mark.parametrize("quantize", [None, "int8"])
def test_policies_and_exits_are_fast_in_float32_also_after_other_settings(quantize: Any) -> None:
    model = make("bert")
    thresher.attach(model, settings(CONFIGS["adapler"]), exit=thresher.FastBERT(threshold=0.2), quantize=quantize)
    attachment = attachment_of(model)

    def precisions() -> set[Any]:
        parts = [m for part in (attachment.policy, attachment.exit) for m in part.modules() if type(m) is nn.Linear]
        assert parts
        return {m.__dict__["forward"].args[0].precision if "forward" in m.__dict__ else None for m in parts}

    assert precisions() == {"float32"}
    before = attachment.policy
    inputs = batch("bert")
    with torch.no_grad():
        fast = outputs_of(model, inputs)
        with linears.plain_kernels():
            plain = outputs_of(model, inputs)
    if quantize is None:
        assert worst(fast, plain) < 1e-5
    thresher.set_config(model, policy_of(model).config.replace(strength=0.5))
    thresher.set_exit(model, threshold=0.3)
    assert attachment.policy is not before
    assert precisions() == {"float32"}
    assert not any("forward" in m.__dict__ for m in before.modules())  # type: ignore[union-attr]
    expected = outputs_of(model, inputs)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert worst(expected, outputs_of(other, inputs)) == 0.0
        theirs = attachment_of(other)
        for part in (theirs.policy, theirs.exit):
            for m in part.modules():
                assert type(m) is not nn.Linear or m.__dict__["forward"].args[0].linear is m
    exit = attachment.exit
    thresher.detach(model)
    assert not any("forward" in m.__dict__ for part in (attachment.policy, exit) for m in part.modules())  # type: ignore[union-attr]


@pytest.mark.parametrize("family", FAMILIES)
def test_int8_composes_with_dropping_on_every_family(family: str) -> None:
    exact = thresher.attach(make(family), settings(CONFIGS["ltp"]))
    quantized = thresher.attach(make(family), settings(CONFIGS["ltp"]), quantize="int8")
    inputs = batch(family)
    with keep_everything():
        difference = worst(outputs_of(exact, inputs), outputs_of(quantized, inputs))
        assert 0 < difference < 2.0  # random weights are wide; trained ones differ far less
    with thresher.tracing() as traces:
        outputs_of(quantized, inputs)
    assert traces[0].reads[-1][0] != traces[0].original


def test_int8_is_saved_with_the_model_whose_weights_stay_float32(tmp_path: Path) -> None:
    model = thresher.quantize(thresher.attach(make("bert"), settings(CONFIGS["ltp"])))
    state = {k: v.clone() for k, v in model.state_dict().items()}
    thresher.save(model, tmp_path)
    back = thresher.load(tmp_path)
    assert attachment_of(back).engine.precision == "int8"
    assert all(torch.equal(v, back.state_dict()[k]) for k, v in state.items())
    assert worst(outputs_of(model, batch("bert")), outputs_of(back, batch("bert"))) == 0.0


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_copies_and_pickles_work_after_use(precision: str) -> None:
    model = thresher.attach(make("bert"), settings(CONFIGS["ltp"]), quantize="int8" if precision == "int8" else None)
    inputs = batch("bert")
    expected = outputs_of(model, inputs)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert worst(expected, outputs_of(other, inputs)) == 0.0
        with torch.no_grad():
            for parameter in other.bert.encoder.layer.parameters():
                parameter.mul_(1.5)
        assert worst(expected, outputs_of(other, inputs)) > 1e-3
    assert worst(expected, outputs_of(model, inputs)) == 0.0


def test_bad_requests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OptionError, match="quantize is \"int8\" or None, not 'int4'"):
        thresher.attach(make("bert"), quantize="int4")  # type: ignore[arg-type]
    attached = thresher.attach(make("bert"), "ltp")
    with pytest.raises(OptionError, match="int4"):
        thresher.attach(attached, quantize="int4")  # type: ignore[arg-type]
    assert policy_of(attached).config.method == "ltp"  # what was attached before still is
    with pytest.raises(OptionError, match="nothing attached"):
        thresher.quantize(make("bert"))
    thresher.save(thresher.attach(make("bert")), tmp_path)
    settings_file = tmp_path / "thresher.json"
    settings_file.write_text(settings_file.read_text().replace('"float32"', '"int3"'))
    with pytest.raises(CheckpointError, match="precision is 'int3'"):
        thresher.load(tmp_path)
    monkeypatch.setattr(linears, "has_int8_instructions", lambda: False)
    with pytest.warns(UserWarning, match="no int8 dot-product instructions"):
        model = thresher.attach(make("bert"), quantize="int8")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        outputs_of(model, batch("bert"))


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_plain_kernels_are_torchs_own_and_say_nothing(precision: Any) -> None:
    linear, x = nn.Linear(32, 32), torch.randn(40, 32)
    fast = FastLinear(linear, precision)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        with linears.plain_kernels():
            assert torch.equal(fast(x), linear(x))
        assert linears.fast_kernels()


@pytest.mark.parametrize("precision", ["float32", "int8"])
@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "columns"])
def test_a_change_through_data_is_seen(precision: Any, transposed: bool) -> None:
    """As merging a LoRA adapter, or an average of weights, makes it: no version tells of it."""
    linear, x = nn.Linear(48, 20), torch.randn(16, 48)
    if transposed:
        linear.weight = nn.Parameter(torch.randn(48, 20).T)
    fast = FastLinear(linear, precision)
    with torch.no_grad():
        fast(x)
        for change in (
            lambda w: w.mul_(0.5),
            lambda w: w.add_(torch.randn(20, 2) @ torch.randn(2, 48)),
            lambda w: w.copy_(torch.randn(20, 48)),
        ):
            change(linear.weight.data)
            assert torch.equal(fast(x), FastLinear(linear, precision)(x))
