"""What attention does on a GPU, told on the CPU: a fake flash kernel, triton's interpreter and tensors without values."""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import test_attention as base
import thresher
from helpers import FAMILIES, LENGTHS, WITH_POSITION_BIAS, alone, batch, make, outputs_of, settings, worst
from helpers import HEADS as HEADS_OF_MODELS
from test_attention import EQUAL, HEADS, RAGGED, close, evidence_by_loops, halved, naive, packed, qkv, weighted
from thresher import attention, cuda
from thresher import packed as packed_module
from thresher.attention import attend
from thresher.backbones.mpnet import FARTHEST, DistanceBias
from thresher.cuda import mass, padded, varlen
from thresher.errors import DataError, OptionError
from thresher.evidence import Wanted
from thresher.methods import CONFIGS
from thresher.model import attachment_of
from thresher.packed import Layout, PackedTokens
from thresher.policy import tracing
from triton_checks import cases, softmax

CLOSE = 1e-5
MASS = Wanted(mass=True)
ALL = Wanted(mass=True, diagonal=True, by_segment=True)
every_family = pytest.mark.parametrize("family", FAMILIES)


def attend_by_rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    return_aux: Any = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
) -> Any:
    """torch's varlen_attn as its documentation has it: query, key, value [T, H, d] → [T, H, d] and [H, T] float32."""
    assert cu_seq_q.dtype is torch.int32
    assert all(x.stride(-1) == 1 for x in (query, key, value))
    bounds = cu_seq_q.tolist()
    assert bounds[-1] == len(query)
    contexts, sums = [], []
    for start, end in pairwise(bounds):
        assert 0 < end - start <= max_q == max_k
        q, k, v = (x[start:end].transpose(0, 1) for x in (query, key, value))
        logits = (q @ k.transpose(1, 2)).float() * (q.shape[-1] ** -0.5 if scale is None else scale)
        if window_size[0] >= 0:
            i = torch.arange(end - start)
            logits = logits.masked_fill((i[:, None] - i).abs() > window_size[0], float("-inf"))
        contexts.append((logits.softmax(-1).to(v.dtype) @ v).transpose(0, 1))
        sums.append(logits.logsumexp(-1))
    out = torch.cat(contexts)
    return (out, torch.cat(sums, 1).detach()) if return_aux is not None and return_aux.lse else out


def pretend(
    patch: pytest.MonkeyPatch, *, function: Callable[..., Any] | None = attend_by_rows, half: bool = False
) -> list[dict[str, Any]]:
    """From here on CPU tensors count as a GPU's. Returns the calls of the flash kernel.

    function: torch's varlen_attn. half: it takes half precision only, as the real one; otherwise float32 too, to be exact.
    """
    calls: list[dict[str, Any]] = []

    def spied(*args: Any, **kwargs: Any) -> Any:
        assert function is not None
        calls.append(kwargs)
        return function(*args, **kwargs)

    if function is not None:
        spied.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
    for module in (packed_module, attention):
        patch.setattr(module, "on_cuda", lambda tensor: True)
    patch.setattr(varlen, "varlen_function", lambda: None if function is None else spied)
    patch.setattr(varlen, "capable", lambda device: True)
    if not half:
        patch.setattr(varlen, "HALF", (torch.float32, *varlen.HALF))
    return calls


@pytest.fixture(params=["flash", "padded"])
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The two ways of a GPU, on CPU tensors."""
    pretend(monkeypatch, function=attend_by_rows if request.param == "flash" else None)
    return str(request.param)


# What every way of attention has to hold holds here too: the tests of test_attention.py, the GPU pretended.

lengths = pytest.mark.parametrize("lengths", base.LENGTHS, ids=str)
window = pytest.mark.parametrize("window", [None, 2], ids=["global", "window"])
wanted = pytest.mark.parametrize("wanted", [Wanted(), MASS, Wanted(block=4)], ids=["nothing", "mass", "blocks"])
weights = pytest.mark.parametrize("weights", [False, True], ids=["plain", "log_weight"])


@lengths
@weights
@window
@wanted
def test_context(gpu: str, lengths: Any, weights: bool, window: int | None, wanted: Wanted) -> None:
    base.test_context_is_dense_attention_row_by_row(lengths, weights, window, wanted)


@lengths
@weights
@window
def test_evidence(gpu: str, lengths: Any, weights: bool, window: int | None) -> None:
    tokens = packed(lengths)
    tokens = weighted(tokens) if weights else tokens
    q, k, v = qkv(tokens, seed=1)
    context, evidence = attend(q, k, v, tokens, window=window, wanted=ALL)
    expected, maps = naive(q, k, v, tokens, window=window)
    close(context, expected)
    loops = evidence_by_loops(maps, tokens, 4)
    for name in ("mass", "diagonal", "by_segment"):
        close(getattr(evidence, name), loops[name])
        assert getattr(evidence, name).dtype == torch.float32
    close(evidence.mass_off_diagonal(tokens), loops["off"])
    assert evidence.mass is not None
    for row in evidence.mass.split(tokens.layout.sizes):
        assert float(row.sum()) == pytest.approx(1, abs=1e-5)
    base.test_evidence_is_what_loops_count(lengths, weights, window)  # with blocks and whole maps


@lengths
@window
def test_simulated_drops(gpu: str, lengths: Any, window: int | None) -> None:
    base.test_a_simulated_drop_computes_what_a_physical_one_does(lengths, window)
    base.test_a_simulated_drop_of_a_whole_window_gives_no_nan_to_anyone()


def test_padding_and_a_dropped_window_give_no_nan_to_evidence(gpu: str) -> None:
    tokens = packed((9, 2), simulated=True)
    tokens = tokens.keep(torch.arange(11) % 8 == 0)
    q, k, v = (x.requires_grad_() for x in qkv(tokens))
    context, evidence = attend(q, k, v, tokens, window=1, wanted=ALL)
    assert evidence.mass is not None
    assert not evidence.mass.isnan().any()
    (context.sum() + evidence.mass.sum()).backward()
    assert q.grad is not None and torch.isfinite(q.grad).all()


@window
@wanted
@pytest.mark.parametrize("lengths", [RAGGED, EQUAL], ids=str)
def test_gradients(gpu: str, lengths: Any, window: int | None, wanted: Wanted) -> None:
    base.test_gradients_are_those_of_dense_attention(lengths, window, wanted)


@pytest.mark.parametrize("wanted", [Wanted(), Wanted(mass=True, diagonal=True)], ids=str)
@pytest.mark.parametrize("lengths", [RAGGED, EQUAL], ids=str)
def test_batch_mates(gpu: str, lengths: Any, wanted: Wanted) -> None:
    base.test_a_row_does_not_know_its_batch_mates(lengths, wanted)


def test_windows_scales_dropout_and_half_precision(gpu: str) -> None:
    base.test_the_window_counts_original_positions()
    base.test_the_scale_is_the_callers(0.1)
    base.test_dropout_is_applied_and_spares_the_evidence()
    base.test_bfloat16_stays_near(RAGGED, MASS)


def test_autocast_leaves_evidence_in_float32(gpu: str) -> None:
    tokens = packed((40, 300))
    q, k, v = (x.to(torch.bfloat16) for x in qkv(tokens))
    expected = attend(q, k, v, tokens, wanted=ALL)[1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, evidence = attend(q, k, v, tokens, wanted=ALL)
    for name in ("mass", "diagonal", "by_segment"):
        assert getattr(evidence, name).dtype == torch.float32
        close(getattr(evidence, name), getattr(expected, name), 1e-6)


@pytest.mark.parametrize("wanted", [Wanted(), ALL], ids=["nothing", "evidence"])
@window
def test_few_rows_at_a_time_are_the_same(
    gpu: str, window: int | None, wanted: Wanted, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = packed(RAGGED)
    q, k, v = qkv(tokens)
    whole, expected = attend(q, k, v, tokens, window=window, wanted=wanted)
    monkeypatch.setattr(padded, "LARGEST", 200)  # a row has 9 * 9 logits a head
    parts, evidence = attend(q, k, v, tokens, window=window, wanted=wanted)
    close(parts, whole, 1e-6)
    for name in ("mass", "diagonal", "by_segment"):
        if getattr(expected, name) is not None:
            close(getattr(evidence, name), getattr(expected, name), 1e-6)
    assert len(padded.Padding(tokens.layout).parts(81)) == 2
    assert len(padded.Padding(tokens.layout).parts(81 * HEADS)) == 4


@lengths
@weights
@pytest.mark.parametrize("window", [None, 4], ids=["global", "window"])
@pytest.mark.parametrize("wanted", [Wanted(), ALL, base.EVERYTHING], ids=["nothing", "evidence", "everything"])
def test_position_bias(gpu: str, lengths: Any, weights: bool, window: int | None, wanted: Wanted) -> None:
    base.test_a_position_bias_is_added_to_the_logits_by_original_positions(lengths, weights, window, wanted)


@pytest.mark.parametrize("wanted", [Wanted(), MASS], ids=["nothing", "mass"])
@pytest.mark.parametrize("lengths", [RAGGED, EQUAL], ids=str)
def test_position_bias_learns_and_sees_no_dropped_token(gpu: str, lengths: Any, wanted: Wanted) -> None:
    base.test_a_position_bias_learns(lengths, wanted)
    base.test_a_simulated_drop_under_a_position_bias()


@lengths
@weights
@window
@pytest.mark.parametrize("block", [1, 4, 32])
def test_blocks(gpu: str, lengths: Any, weights: bool, window: int | None, block: int) -> None:
    for change in (lambda tokens: tokens, halved):
        tokens = change(weighted(packed(lengths)) if weights else packed(lengths))
        q, k, v = qkv(tokens, seed=1)
        _, maps = naive(q, k, v, tokens, window=window)
        expected = evidence_by_loops(maps, tokens, block)["blocks"]
        for learns in (False, True):
            _, evidence = attend(q.requires_grad_(learns), k, v, tokens, window=window, wanted=Wanted(block=block))
            close(evidence.blocks, expected)
            assert evidence.mass is None
            assert evidence.blocks.requires_grad == learns
    base.test_blocks_from_the_log_sum_exp_are_the_blocks_of_the_map(lengths, block)


def test_the_padded_way_with_a_position_bias_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Called directly; each head has logits of its own even where nobody asks for sums."""
    tokens = halved(packed(RAGGED))
    q, k, v = qkv(tokens)
    table, bias = base.learned_bias()
    asked: list[tuple[int, ...]] = []

    def watched(positions: Tensor) -> Tensor:
        asked.append(tuple(positions.shape))
        return bias(positions)

    expected, _ = naive(q, k, v, tokens, scale=0.3, learned=table)
    rows, longest = len(tokens.layout.sizes), max(tokens.layout.sizes)
    for largest, calls in ((2**26, [(rows, longest)]), (HEADS * longest**2, [(1, longest)] * rows)):
        asked.clear()
        monkeypatch.setattr(padded, "LARGEST", largest)
        context, sums, own, blocks = cuda.attend_padded(q, k, v, tokens, 0.3, 0.0, None, None, False, watched)
        close(context, expected)
        assert asked == calls
        assert sums is own is blocks is None


def places(tokens: PackedTokens) -> tuple[Tensor, list[int]]:
    return tokens.positions, tokens.layout.sizes


# Which way is taken.


def without_options(*names: str) -> Callable[..., Any]:
    """varlen_attn of an older torch."""

    def function(*args: Any, **kwargs: Any) -> Any:
        assert not set(names) & set(kwargs)
        return attend_by_rows(*args, **kwargs)

    whole = inspect.signature(attend_by_rows)
    kept = [p for p in whole.parameters.values() if p.name not in names]
    function.__signature__ = whole.replace(parameters=kept)  # type: ignore[attr-defined]
    return function


CASES: dict[str, tuple[bool, dict[str, Any]]] = {
    "half": (True, {}),
    "evidence": (True, {"wanted": ALL}),
    "float16": (True, {"dtype": torch.float16}),
    "float32": (False, {"dtype": torch.float32}),
    "soft weights": (False, {"change": weighted, "wanted": ALL}),
    "dropout": (False, {"dropout": 0.1}),
    "window": (True, {"window": 2}),
    "window of a layout with gaps": (False, {"window": 2, "gaps": 2}),
    "wide window of a layout with gaps": (True, {"window": 17, "gaps": 2}),
    "after a drop": (True, {"change": halved}),
    "window after a drop": (False, {"window": 2, "change": halved}),
    "wide window after a drop": (True, {"window": 8, "change": halved}),
    "learning": (True, {"learning": True}),
    "learning from evidence": (False, {"learning": True, "wanted": MASS}),
    "learning, evidence selects": (True, {"learning": True, "wanted": Wanted(mass=True, detached=True)}),
    "blocks": (True, {"wanted": Wanted(block=4)}),
    "learning from blocks": (False, {"learning": True, "wanted": Wanted(block=4)}),
    "maps": (False, {"wanted": Wanted(full=True)}),
    "position bias": (False, {"position_bias": base.learned_bias()[1]}),
    "no kernel": (False, {"function": None}),
    "old torch": (True, {"function": without_options("scale", "window_size")}),
    "old torch, window": (False, {"function": without_options("window_size"), "window": 2}),
    "old torch, scale": (False, {"function": without_options("scale"), "scale": 0.2}),
    "odd heads": (False, {"heads": 6}),
    "wide heads": (False, {"heads": 136}),
}


@pytest.mark.parametrize("name", CASES)
def test_the_way_that_is_taken(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    flash, case = CASES[name]
    calls = pretend(monkeypatch, function=case.get("function", attend_by_rows), half=True)
    tokens = case.get("change", lambda tokens: tokens)(packed(RAGGED, gaps=case.get("gaps", 1)))
    generator = torch.Generator().manual_seed(3)
    shape = (HEADS, len(tokens.positions), case.get("heads", 8))
    dtype, learning = case.get("dtype", torch.bfloat16), case.get("learning", False)
    q, k, v = (torch.randn(shape, generator=generator).to(dtype).requires_grad_(learning) for _ in range(3))
    options = {key: case[key] for key in ("window", "dropout", "scale", "wanted", "position_bias") if key in case}
    context, evidence = attend(q, k, v, tokens, **options)
    assert len(calls) == int(flash)
    assert context.shape == (len(tokens.positions), HEADS, shape[-1])
    assert context.dtype == dtype
    if flash:
        reach = case.get("window")
        narrow = reach is not None and reach < tokens.layout.width - 1
        assert calls[0].get("window_size") == ((reach, reach) if narrow else None)
    if learning:
        assert context.requires_grad
        assert evidence.mass is None or evidence.mass.requires_grad == (not case["wanted"].detached)
    if not {"dropout", "position_bias"} & set(case) and tokens.log_weight is None:
        scale = case.get("scale", shape[-1] ** -0.5)
        maps, _ = softmax(q.detach(), k.detach(), *places(tokens), scale, case.get("window"))
        values = v.detach().double().split(tokens.layout.sizes, 1)
        close(context, torch.cat([(a @ one).transpose(0, 1) for a, one in zip(maps, values, strict=True)]), 0.03)
        if evidence.mass is not None:
            close(evidence.mass, torch.cat([a.mean((0, 1)) for a in maps]), 0.01)


def test_equal_rows_need_no_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, function=None)
    monkeypatch.setattr(cuda, "attend_padded", None)
    tokens = packed(EQUAL)
    q, k, v = qkv(tokens)
    close(attend(q, k, v, tokens)[0], naive(q, k, v, tokens)[0])


def test_a_log_sum_exp_of_either_shape_is_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's documentation has [T, H], its kernel [H, T]."""

    def documented(*args: Any, **kwargs: Any) -> Any:
        out, lse = attend_by_rows(*args, **kwargs)
        return out, lse.T.contiguous()

    documented.__signature__ = inspect.signature(attend_by_rows)  # type: ignore[attr-defined]
    tokens = packed(RAGGED)
    q, k, v = qkv(tokens)
    expected = attend(q, k, v, tokens, wanted=ALL)[1]
    pretend(monkeypatch, function=documented)
    evidence = attend(q, k, v, tokens, wanted=ALL)[1]
    for name in ("mass", "diagonal", "by_segment"):
        close(getattr(evidence, name), getattr(expected, name))


def test_the_real_kernel_has_the_arguments_that_the_fake_one_has() -> None:
    function = varlen.varlen_function()
    if function is None:
        pytest.skip("this torch has no torch.nn.attention.varlen")
    real, fake = inspect.signature(function).parameters, inspect.signature(attend_by_rows).parameters
    positional = [name for name, p in fake.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert list(real)[: len(positional)] == positional
    assert set(fake) <= set(real) | {"scale", "window_size"}  # which older ones lack, see `fits`


def test_amd_and_old_gpus_are_left_to_sdpa(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    for number, capability in enumerate([(7, 5), (8, 0), (9, 0), (12, 0)]):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert varlen.capable.__wrapped__(number) == (capability >= (8, 0))
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert not varlen.capable.__wrapped__(0)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
    assert not varlen.capable.__wrapped__(0)


def test_torch_without_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", None)
    assert varlen.varlen_function.__wrapped__() is None


# The Triton kernel.


def with_triton(check: str, **environment: str) -> list[float]:
    """What triton_checks.py prints."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed (pip install triton): its kernel is not run, only what replaces it")
    path = os.pathsep.join([str(Path(thresher.__file__).parents[1]), *sys.path])
    command = [sys.executable, str(Path(__file__).parent / "triton_checks.py"), check]
    environment = {**os.environ, "PYTHONPATH": path, **environment}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def kernel_errors() -> list[float]:
    return with_triton("interpret", TRITON_INTERPRET="1")


@pytest.mark.parametrize("number", range(len(list(cases()))), ids=[str(case) for case in cases()])
def test_the_kernel_in_tritons_interpreter(number: int, kernel_errors: list[float]) -> None:
    """Against torch and against a softmax; sums over up to 140 queries. The interpreter's own bfloat16 is wrong."""
    assert kernel_errors[number] < 2e-5


def test_the_kernel_compiles_for_gpus(tmp_path: Path) -> None:
    shared = with_triton("compile", TRITON_CACHE_DIR=str(tmp_path))
    assert max(shared) <= 99 * 1024  # what a program may have on the smallest of them


@pytest.mark.parametrize("by_segment", [False, True])
@window
def test_what_replaces_the_kernel_is_right(by_segment: bool, window: int | None) -> None:
    tokens = packed(RAGGED)
    q, k, _ = qkv(tokens)
    q = q * 4  # far from uniform
    maps, lse = softmax(q, k, *places(tokens), 0.3, window)
    found = mass.received(q, k, lse, tokens, 0.3, window=window, diagonal=True, by_segment=by_segment)
    expected = evidence_by_loops(maps, tokens, 4)
    close(found.mass, expected["mass"])
    close(found.diagonal, expected["diagonal"])
    assert (found.by_segment is not None) == by_segment
    if by_segment:
        close(found.by_segment, expected["by_segment"])


def test_a_key_out_of_reach_may_be_any_number_above_the_log_sum_exp() -> None:
    tokens = packed((4,))
    q = torch.full((1, 4, 8), 20.0)
    k = torch.zeros(1, 4, 8)
    k[0, 3] = 20.0  # exp(3200) for whoever would look at it
    _, lse = softmax(q, k, *places(tokens), 1.0, 1)
    found = mass.received(q, k, lse, tokens, 1.0, window=1)
    assert torch.isfinite(found.mass).all()
    assert float(found.mass.sum()) == pytest.approx(1)


class TestWithoutTriton:
    @pytest.fixture(autouse=True)
    def _new(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(mass, "_failed", False)
        monkeypatch.setattr(mass, "on_cuda", lambda tensor: True)
        self.tokens = packed(RAGGED)
        self.query, self.key, _ = qkv(self.tokens)
        maps, self.lse = softmax(self.query, self.key, *places(self.tokens), 1.0, None)
        self.expected = torch.cat([a.mean((0, 1)) for a in maps])

    def received(self) -> Tensor:
        return mass.received(self.query, self.key, self.lse, self.tokens, 1.0).mass

    def test_absent(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "triton", None)
        monkeypatch.delitem(sys.modules, "thresher.cuda.kernel", raising=False)
        assert mass.triton_kernel.__wrapped__() is None
        monkeypatch.setattr(mass, "triton_kernel", lambda: None)
        close(self.received(), self.expected)

    def test_it_is_used_where_it_is(self, monkeypatch: pytest.MonkeyPatch) -> None:
        seen = []

        def kernel(query: Tensor, key: Tensor, lse: Tensor, starts: Tensor, *rest: Any) -> Any:
            seen.append(rest)
            assert starts.dtype is torch.int32
            return torch.ones(1, len(self.tokens.positions)), None

        monkeypatch.setattr(mass, "triton_kernel", lambda: kernel)
        assert self.received().sum() > 0
        ((positions, longest, weights, scale, window, own),) = seen
        assert positions is self.tokens.positions
        assert (longest, weights, scale, window, own) == (max(RAGGED), None, 1.0, None, False)
        monkeypatch.setattr(mass, "on_cuda", lambda tensor: False)
        close(self.received(), self.expected)
        assert len(seen) == 1

    def test_a_kernel_that_does_not_compile_is_tried_once_and_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        tries = []

        def kernel(*args: Any) -> Any:
            tries.append(args)
            raise RuntimeError("Failed to find C compiler.\nMore lines.")

        monkeypatch.setattr(mass, "triton_kernel", lambda: kernel)
        with pytest.warns(UserWarning, match=r"Failed to find C compiler\.\); torch"):
            close(self.received(), self.expected)
        close(self.received(), self.expected)
        assert len(tries) == 1

    def test_running_out_of_memory_is_not_hidden(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def kernel(*args: Any) -> Any:
            raise torch.OutOfMemoryError("no memory")

        monkeypatch.setattr(mass, "triton_kernel", lambda: kernel)
        with pytest.raises(torch.OutOfMemoryError):
            self.received()


def test_importing_thresher_does_not_import_triton() -> None:
    code = (
        "import sys, thresher, thresher.cuda; print('triton' in sys.modules or 'thresher.cuda.kernel' in sys.modules)"
    )
    path = {**os.environ, "PYTHONPATH": str(Path(thresher.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=path)
    assert done.stdout.strip() == "False"


# What makes the host wait.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("wanted", [Wanted(), ALL], ids=["nothing", "evidence"])
@pytest.mark.parametrize("window", [None, 3, 50])
@pytest.mark.parametrize("sizes", [[9, 1, 14, 5], [8, 8], [7]], ids=str)
def test_attention_reads_no_value_of_a_tensor(
    sizes: list[int], window: int | None, wanted: Wanted, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On tensors that hold nothing whatever would read a value raises. With torch's own kernel, as far as its shapes go."""
    function = varlen.varlen_function()
    if function is None:
        pytest.skip("this torch has no torch.nn.attention.varlen")
    calls = pretend(monkeypatch, function=function, half=True)
    monkeypatch.setattr(mass, "triton_kernel", lambda: None)
    with FakeTensorMode(), torch.no_grad():
        total, rows = sum(sizes), len(sizes)
        one = torch.ones(total, dtype=torch.int64)
        lengths = torch.ones(rows, dtype=torch.int64)
        # Not `original` itself: something was dropped, so that even a window asks nothing.
        layout = Layout(lengths, one, one, one.bool(), lengths.clone(), 20).knowing(sizes)
        tokens = PackedTokens(torch.ones(total, 4), layout)
        q, k, v = (torch.ones(4, total, 16, dtype=dtype) for _ in range(3))
        context, evidence = attend(q, k, v, tokens, window=window, wanted=wanted)
        assert context.shape == (total, 4, 16)
        assert context.dtype == dtype
        if wanted:
            assert evidence.mass is not None and evidence.by_segment is not None
            assert evidence.mass.shape == (total,)
            assert evidence.by_segment.shape == (total, 2)
    assert len(calls) == (dtype is torch.bfloat16 and window != 3)


@pytest.mark.parametrize("wanted", [Wanted(), ALL], ids=["nothing", "evidence"])
@pytest.mark.parametrize("sizes", [[9, 1, 14, 5], [8, 8], [7]], ids=str)
def test_a_bias_by_distance_reads_no_value_of_a_tensor(
    sizes: list[int], wanted: Wanted, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, function=None)
    with FakeTensorMode(), torch.no_grad():
        total, rows = sum(sizes), len(sizes)
        one = torch.ones(total, dtype=torch.int64)
        lengths = torch.ones(rows, dtype=torch.int64)
        layout = Layout(lengths, one, one, one.bool(), lengths.clone(), 20).knowing(sizes)
        q, k, v = (torch.ones(4, total, 16) for _ in range(3))
        bias = DistanceBias(torch.ones(4, 2 * FARTHEST + 1))
        context, evidence = attend(
            q, k, v, PackedTokens(torch.ones(total, 4), layout), wanted=wanted, position_bias=bias
        )
        assert context.shape == (total, 4, 16)
        assert (evidence.mass is not None) == bool(wanted)


WAITS = ("nonzero.", "bincount", "_local_scalar_dense", "equal.default", "masked_select", "is_nonzero", "_unique")


class Waits(TorchDispatchMode):
    """Counts what would make the host wait for a GPU, `tolist` included."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.found: list[str] = []
        tolist = Tensor.tolist

        def spied(tensor: Tensor) -> Any:
            self.found.append("tolist")
            return tolist(tensor)

        patch.setattr(Tensor, "tolist", spied)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).removeprefix("aten.")
        boolean = name == "index.Tensor" and any(i is not None and i.dtype is torch.bool for i in args[1])
        unsized = name == "repeat_interleave.Tensor" and (kwargs or {}).get("output_size") is None
        if boolean or unsized or name.startswith(WAITS):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def quiet(*args: Any, **kwargs: Any) -> Any:
    """The fake kernel without a look at where rows begin, which would be counted for the library's own."""
    query, key, value, starts = args[:4]
    rows = torch.searchsorted(starts, torch.arange(len(query), dtype=torch.int32), right=True)
    apart = rows[:, None] != rows
    if "window_size" in kwargs:
        at = torch.arange(len(query))
        apart = apart | ((at[:, None] - at).abs() > kwargs["window_size"][0])
    logits = (query.transpose(0, 1) @ key.permute(1, 2, 0) * kwargs["scale"]).masked_fill(apart, float("-inf"))
    return (logits.softmax(-1) @ value.transpose(0, 1)).transpose(0, 1), logits.logsumexp(-1)


quiet.__signature__ = inspect.signature(attend_by_rows)  # type: ignore[attr-defined]


def _layers(model: Any) -> tuple[Any, Any]:
    layers = attachment_of(model).engine.entrance.layers
    return layers[0], layers[-1]


@every_family
@pytest.mark.parametrize("head", ["token", "sequence"])
@pytest.mark.parametrize("flash", [True, False], ids=["flash", "padded"])
def test_the_host_waits_once_to_pack_and_once_a_drop(
    family: str, head: str, flash: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted from the first layer's beginning to the last one's end; embeddings and heads are transformers' own."""
    model, inputs = thresher.attach(make(family, head), "attention-mass"), batch(family)
    with torch.no_grad(), tracing(record=True) as traces:
        model(**inputs)
    assert len(traces[0].dropped) == 3
    pretend(monkeypatch, function=quiet if flash else None)
    waits, counts = Waits(monkeypatch), []
    first, last = _layers(model)
    first.register_forward_pre_hook(lambda *_: counts.append(len(waits.found)), prepend=True)
    last.register_forward_hook(lambda *_: counts.append(len(waits.found)))
    with torch.no_grad(), waits:
        model(**inputs)
    assert counts[-1] - counts[0] == 1 + 3, waits.found[counts[0] : counts[-1]]
    counts.clear()
    with torch.no_grad(), waits, thresher.keep_everything():
        model(**inputs)
    windows = int(family == "modernbert" and flash)  # whether rows have gaps is asked once a pass
    assert counts[-1] - counts[0] == 1 + windows, waits.found[counts[0] : counts[-1]]


def test_packing_and_dropping_as_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def steps(lengths: Sequence[int], carry: bool) -> list[Tensor]:
        width = max(lengths) + 2
        mask = torch.zeros(len(lengths), width)
        for row, n in enumerate(lengths):
            mask[row, -n:] = 1
        hidden = torch.randn(len(lengths), width, 3, generator=torch.Generator().manual_seed(0))
        tokens = PackedTokens.pack(hidden, mask, carry=carry)
        assert tokens.layout.sizes == list(lengths)
        found = [tokens.lengths, tokens.positions]
        for divisor in (3, 4, 10**9):
            tokens = tokens.keep(torch.arange(len(tokens.positions)) % divisor != divisor - 1)
            assert tokens.layout.sizes == tokens.lengths.tolist()
            found += [tokens.lengths, tokens.positions, tokens.hidden, tokens.layout.cu_seqlens]
        return [*found, tokens.gather().lengths, *(tokens.restore(fill, mask) for fill in ("carry", "mean", "zero"))]

    cases = [(lengths, carry) for lengths in (RAGGED, EQUAL, (7,)) for carry in (True, False)]
    expected = [steps(*case) for case in cases]
    pretend(monkeypatch)
    for case, there in zip(cases, expected, strict=True):
        for mine, other in zip(steps(*case), there, strict=True):
            assert torch.equal(mine, other)
    whole = PackedTokens.pack(torch.randn(2, 4, 3))
    assert whole.layout.sizes == [4, 4]
    assert whole.keep(torch.ones(8, dtype=torch.bool)) is whole
    assert whole.layout.unbroken
    assert not packed((3, 2), gaps=2).layout.unbroken
    assert not halved(packed(RAGGED)).layout.unbroken
    with pytest.raises(DataError, match="Row 1"):
        PackedTokens.pack(torch.zeros(2, 3, 1), torch.tensor([[1, 1, 1], [0, 0, 0]]))


# Whole models.


@every_family
@pytest.mark.parametrize("head", HEADS_OF_MODELS)
def test_keeping_everything_is_stock(gpu: str, family: str, head: str) -> None:
    model, inputs = make(family, head), batch(family)
    stock = outputs_of(model, inputs)
    thresher.attach(model, "attention-mass")
    with thresher.keep_everything():
        assert worst(stock, outputs_of(model, inputs)) <= CLOSE


METHODS = [settings(config) for config in CONFIGS.values()]


@every_family
@pytest.mark.parametrize("policy", METHODS, ids=lambda config: config.method)
def test_dropping_is_what_it_is_on_the_cpu(family: str, policy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone, in a batch and simulated, by flash attention and padded."""
    model, inputs = thresher.attach(make(family, "token"), policy), batch(family)
    with tracing() as there:
        expected = outputs_of(model, inputs)
    for function in (attend_by_rows, None):
        calls = pretend(monkeypatch, function=function)
        with tracing() as here:
            assert worst(expected, outputs_of(model, inputs)) <= CLOSE
        assert here[0].reads == there[0].reads
        assert bool(calls) == (function is not None and family not in WITH_POSITION_BIAS)
        with thresher.simulated_drops():
            assert worst(expected, outputs_of(model, inputs)) <= CLOSE
        start = 0
        for row, n in enumerate(LENGTHS):
            one = outputs_of(model, alone(inputs, row))
            assert worst({"logits": expected["logits"][start : start + n]}, one) <= CLOSE
            start += n


@every_family
def test_training_learns_the_same(gpu: str, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """LTP's soft stage, where gradients flow through the evidence into the thresholds."""

    def learn() -> dict[str, Tensor]:
        model = thresher.attach(make(family, "sequence").train(), thresher.LTP(threshold=0.2, temperature=0.05))
        policy = thresher.policy_of(model)
        policy.mode = "soft"
        with tracing() as traces:
            loss = model(**batch(family), labels=torch.arange(len(LENGTHS)) % 3).loss
        extra = policy.auxiliary_loss(traces[0], {})
        assert extra is not None
        (loss + extra).backward()
        named = [*model.named_parameters(), *policy.named_parameters()]
        return {name: p.grad for name, p in named if p.grad is not None}

    mine = learn()
    monkeypatch.undo()
    expected = learn()
    assert set(mine) == set(expected)
    assert expected["theta"].abs().sum() > 0
    for name, gradient in expected.items():
        scale = max(float(gradient.abs().max()), 0.1)
        assert float((mine[name] - gradient).abs().max()) <= 1e-4 * scale, name


@every_family
def test_half_precision_stays_near(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = make(family, "sequence").to(torch.bfloat16), batch(family)
    stock = outputs_of(model, inputs)
    thresher.attach(model, "attention-mass")
    calls = pretend(monkeypatch, half=True)
    with thresher.keep_everything():
        near = worst(stock, outputs_of(model, inputs))
    assert len(calls) == (0 if family in WITH_POSITION_BIAS else 3)
    assert near <= 0.25 * max(float(stock["logits"].float().std()), 1.0)
    assert outputs_of(model, inputs)["logits"].dtype == torch.bfloat16


# Where a GPU is: nothing pretended.


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
class TestOnAGPU:
    LENGTHS = (200, 1, 77, 130)

    def tokens(self, device: str) -> PackedTokens:
        mask = torch.arange(200) < torch.tensor(self.LENGTHS).unsqueeze(1)
        segments = (torch.arange(200) > 20).long().expand(4, -1)
        return PackedTokens.pack(torch.zeros(4, 200, 1).to(device), mask.to(device), segments=segments.to(device))

    @pytest.mark.parametrize("dropped", [False, True])
    @pytest.mark.parametrize("window", [None, 16])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
    def test_attention_and_evidence(self, dtype: torch.dtype, window: int | None, dropped: bool) -> None:
        here, there = self.tokens("cpu"), self.tokens("cuda")
        if dropped:
            here, there = halved(here), there.keep(torch.arange(len(there.positions), device="cuda") % 3 != 1)
        q, k, v = (torch.randn(12, len(here.positions), 64).to(dtype) for _ in range(3))
        context, evidence = attend(q.cuda(), k.cuda(), v.cuda(), there, window=window, wanted=ALL)
        expected, said = attend(q.float(), k.float(), v.float(), here, window=window, wanted=ALL)
        tolerance = 1e-4 if dtype is torch.float32 else 2e-2
        close(context.cpu(), expected, tolerance)
        for name in ("mass", "diagonal", "by_segment"):
            close(getattr(evidence, name).cpu(), getattr(said, name), min(tolerance, 2e-3))
        assert not mass._failed

    @every_family
    def test_models(self, family: str) -> None:
        model, inputs = thresher.attach(make(family, "token"), "attention-mass"), batch(family)
        with tracing() as there:
            expected = outputs_of(model, inputs)
        model.cuda()
        with tracing() as here:
            found = outputs_of(model, {name: value.cuda() for name, value in inputs.items()})
        assert here[0].reads == there[0].reads
        assert worst(expected, {name: value.cpu() for name, value in found.items()}) <= 1e-3

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_attention_makes_nobody_wait(self, dtype: torch.dtype) -> None:
        tokens = self.tokens("cuda")
        q, k, v = (torch.randn(12, len(tokens.positions), 64, device="cuda").to(dtype) for _ in range(3))
        tokens = tokens.keep(torch.arange(len(tokens.positions), device="cuda") % 3 != 1)
        attend(q[:, : len(tokens.positions)], *(x[:, : len(tokens.positions)] for x in (k, v)), tokens, wanted=ALL)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for window in (None, 16):
                parts = (x[:, : len(tokens.positions)] for x in (q, k, v))
                attend(*parts, tokens, window=window, wanted=ALL)
        finally:
            torch.cuda.set_sync_debug_mode("default")


# Asked for and absent.


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_asked_for_and_absent_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    sentence = r"^CUDA was asked for, but torch .* finds no CUDA device; run this .*\.$"
    with pytest.raises(OptionError, match=sentence):
        cuda.require_cuda()
    benchmarks = Path(__file__).parent.parent / "benchmarks"
    monkeypatch.syspath_prepend(str(benchmarks))
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    script = runpy.run_path(str(benchmarks / "gpu.py"))
    with pytest.raises(SystemExit) as left:
        script["main"]()
    assert re.match(sentence, str(left.value.code))  # what is no number is printed, and the status is 1
