"""Linear layers of a packed pass on the CPU: oneDNN with the weight laid out once, or int8.

torch multiplies float32 matrices with MKL, which runs at half speed on some processors that are not Intel's; oneDNN, which
torch carries too, does not. Neither way changes a parameter: what is laid out or quantized is a second copy, made when
it is first needed and again when the weight has changed (through `.data`, when it has changed all over). Gradients,
other dtypes and other devices take torch's own way.
"""

from __future__ import annotations

import contextlib
import functools
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from thresher.errors import OptionError
from thresher.packed import being_exported

Precision = Literal["float32", "int8"]

_plain: ContextVar[bool] = ContextVar("thresher_plain_kernels", default=False)

# Optimizer steps taken in this process: fused optimizers change parameters without raising their version.
_steps = 0


def _count_step(*_: object) -> None:
    global _steps
    _steps += 1


register_optimizer_step_post_hook(_count_step)

SAMPLED = 8  # rows and columns of a weight whose values tell of a change that nothing else tells of
# The product that tells how fast MKL is here, and how much slower it has to be.
PROBED, MUCH = 256, 1.4


MadeT = TypeVar("MadeT")


class Derived(Generic[MadeT]):
    """What is computed from parameters on the CPU, kept until one of them changes."""

    def __init__(self) -> None:
        self._kept: _Kept[MadeT] | None = None

    def of(self, parameters: tuple[Tensor, ...], make: Callable[[], MadeT]) -> MadeT:
        """What `make` says, which reads these parameters and nothing else that changes."""
        state = (_steps, *(_state(p) for p in parameters))
        kept = self._kept
        if kept is None or kept.state != state or any(sample.tobytes() != were for sample, were in kept.samples):
            samples = [_sample(p) for p in parameters if p.dim() == 2]
            with torch.inference_mode():
                kept = self._kept = _Kept(state, [(sample, sample.tobytes()) for sample in samples], make())
        return kept.made

    def forget(self) -> None:
        self._kept = None

    def __getstate__(self) -> dict[str, object]:
        return {"_kept": None}  # made again where a copy is used


@dataclass(frozen=True)
class _Kept(Generic[MadeT]):
    """state, samples: what told which values it was made of, and of samples where they were read; made: by `Derived.of`."""

    state: tuple[object, ...]
    samples: list[tuple[np.ndarray, bytes]]
    made: MadeT


class TanhLinear(nn.Linear):
    """A linear layer with tanh after it, which FastLinear computes in one go."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).tanh()


class FastLinear:
    """What a layer's `nn.Linear` does during a packed pass."""

    def __init__(self, linear: nn.Linear, precision: Precision) -> None:
        self.linear = linear
        self.precision = precision
        self.tanh = isinstance(linear, TanhLinear)
        self._copy: Derived[Tensor | torch.ScriptObject] = Derived()

    def __call__(self, x: Tensor) -> Tensor:
        """x: [..., in] → [..., out]."""
        linear = self.linear
        if not applies(x, linear.weight, linear.bias):
            if torch.is_grad_enabled():
                self._copy.forget()  # what learns is about to change, by whatever optimizer
        elif self.precision == "int8":
            return self._after(torch.ops.quantized.linear_dynamic(x, self._packed(), not has_int8_instructions()))
        else:
            then = "tanh" if self.tanh else "none"
            return torch.ops.mkldnn._linear_pointwise(x, self._packed(), linear.bias, then, [], "")  # type: ignore[no-any-return]
        return self._after(F.linear(x, linear.weight, linear.bias))

    def _after(self, out: Tensor) -> Tensor:
        return out.tanh() if self.tanh else out

    def _packed(self) -> Tensor | torch.ScriptObject:
        weight, bias = self.linear.weight, self.linear.bias
        make = _quantized if self.precision == "int8" else _laid_out
        parameters = (weight,) if bias is None else (weight, bias)
        return self._copy.of(parameters, lambda: make(weight.detach(), bias))


def applies(x: Tensor, *parameters: Tensor | None) -> bool:
    """Whether what is derived from these may stand for them in a product with x: float32 on the CPU, and nothing learns."""
    given = [x, *(p for p in parameters if p is not None)]
    return (
        all(one.dtype is torch.float32 and one.is_cpu for one in given)
        and x.numel() > 0
        and not (torch.is_grad_enabled() and any(one.requires_grad for one in given))
        and not torch.is_autocast_enabled("cpu")
        and not being_exported()
        and fast_kernels()
    )


def _sample(weight: Tensor) -> np.ndarray:
    """Some values all over the weight, in its own memory. A change through `.data`, as merging an adapter makes it, raises no
    version; these show any that spares none of them."""
    rows, columns = (max(size // SAMPLED, 1) for size in weight.shape)
    return weight.detach()[::rows, ::columns].numpy()


class Quickened:
    """Modules whose linear layers are computed by FastLinear, until they are released."""

    def __init__(self) -> None:
        self._linears: list[nn.Linear] = []

    def cover(
        self,
        modules: Iterable[nn.Module],
        precision: Precision,
        call: Callable[[FastLinear, Tensor], Tensor] = FastLinear.__call__,
    ) -> None:
        """Instead of what was covered before. call: what a layer's forward does with its FastLinear."""
        self.release()
        if precision == "float32" and not has_onednn():
            return
        # A shared layer (ALBERT) stands in the model once, so each module is met once.
        for one in dict.fromkeys(inner for module in modules for inner in module.modules()):
            if isinstance(one, nn.Linear) and type(one) in (nn.Linear, TanhLinear):
                one.forward = functools.partial(call, FastLinear(one, precision))  # type: ignore[method-assign]
                self._linears.append(one)

    def release(self) -> None:
        for linear in self._linears:
            linear.__dict__.pop("forward", None)
        self._linears.clear()


def _state(parameter: Tensor) -> tuple[int, int]:
    """Another one when the values were changed in place (the version) or have another storage."""
    return parameter.data_ptr(), 0 if parameter.is_inference() else parameter._version


def _laid_out(weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())  # type: ignore[no-any-return]


def _quantized(weight: Tensor, bias: Tensor | None) -> torch.ScriptObject:
    """Symmetric, one scale for each output channel."""
    # A channel of zeros has no scale of its own; any does.
    scales = (weight.abs().amax(1) / 127).clamp(min=torch.finfo(torch.float32).tiny)
    zeros = torch.zeros(len(scales), dtype=torch.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces a move of its quantized tensors to another package
        whole = torch.quantize_per_channel(weight.contiguous(), scales, zeros, 0, torch.qint8)
    return torch.ops.quantized.linear_prepack(whole, None if bias is None else bias.detach())  # type: ignore[no-any-return]


def has_int8_instructions() -> bool:
    """Whether the processor multiplies int8 exactly and fast (AVX-512 VNNI). Without, one bit of range is given up."""
    return bool(torch.cpu._is_vnni_supported())


@contextlib.contextmanager
def plain_kernels() -> Iterator[None]:
    """Inside this block linear layers and attention take torch's own float32 kernels: what a gain still is here does not come
    from faster kernels."""
    token = _plain.set(True)
    try:
        yield
    finally:
        _plain.reset(token)


def fast_kernels() -> bool:
    """Whether kernels other than torch's first choice may be taken now."""
    return not _plain.get() and bool(torch.backends.mkldnn.enabled)  # type: ignore[attr-defined]


def has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@functools.cache
def mkl_is_slow() -> bool:
    """Whether MKL multiplies large float32 matrices much slower than oneDNN here: twice where it does not know the processor,
    else by a tenth. Tried once, in a few milliseconds."""
    if not has_onednn():
        return False
    with torch.inference_mode():
        x, weight = torch.ones(PROBED, PROBED), torch.ones(PROBED, PROBED)
        laid = _laid_out(weight, None)
        ways: tuple[Callable[[], object], ...] = (
            lambda: torch.mm(x, weight),
            lambda: torch.ops.mkldnn._linear_pointwise(x, laid, None, "none", [], ""),
        )
        tries = [[_seconds(way) for way in ways] for _ in range(9)]
    mkl, onednn = (min(seconds[number] for seconds in tries) for number in range(len(ways)))
    return mkl > MUCH * onednn


def _seconds(call: Callable[[], object]) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def check_int8() -> None:
    """Raises OptionError where torch has no int8 kernels at all; warns where the processor is not made for them."""
    if torch.backends.quantized.engine == "none":
        raise OptionError("This build of torch has no int8 kernels for the CPU; leave int8 out.")
    warn_without_int8_instructions()


def warn_without_int8_instructions() -> None:
    if not has_int8_instructions():
        warnings.warn(
            "This processor has no int8 dot-product instructions (AVX-512 VNNI): int8 works but may not be faster.",
            stacklevel=4,
        )


__all__ = [
    "Derived",
    "FastLinear",
    "Precision",
    "TanhLinear",
    "applies",
    "check_int8",
    "fast_kernels",
    "has_int8_instructions",
    "has_onednn",
    "mkl_is_slow",
    "plain_kernels",
    "warn_without_int8_instructions",
]
