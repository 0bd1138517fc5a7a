"""What test_cuda.py asks of the Triton kernel, in a process of its own: `python triton_checks.py interpret|compile`.

Prints a JSON number for each case. Loads what the kernel needs and no more of thresher, so that it starts quickly.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def cases() -> Iterator[dict[str, Any]]:
    """dim: of a head. lengths: of the rows. drop: every third token is gone. fused: query and key are strided views."""
    for dim in (8, 16, 32, 64, 80, 96, 128):
        yield {"dim": dim, "dtype": "float32" if dim % 32 else "float16", "lengths": [3, 70, 1]}
    for window in (0, 1, 5, 64):
        yield {"dim": 32, "dtype": "float32", "lengths": [140], "window": window}
        yield {"dim": 32, "dtype": "float32", "lengths": [3, 140], "window": window, "drop": True}
    yield {"dim": 16, "dtype": "float32", "lengths": [1]}
    yield {"dim": 16, "dtype": "float32", "lengths": [64, 131, 63, 65]}
    yield {"dim": 64, "dtype": "float16", "lengths": [3, 70, 1], "heads": 3, "fused": True}


def interpret() -> Iterator[float]:
    """How far the kernel is from torch and from a float64 softmax, and that it says the same twice."""
    from thresher.cuda import mass
    from thresher.cuda.kernel import column_sums
    from thresher.packed import PackedTokens

    for case in cases():
        lengths, window = case["lengths"], case.get("window")
        mask = torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)
        segments = (torch.arange(max(lengths)) * 2 > max(lengths)).long().expand(len(lengths), -1)
        tokens = PackedTokens.pack(torch.zeros(*mask.shape, 1), mask, segments=segments)
        if case.get("drop"):
            tokens = tokens.keep(torch.arange(len(tokens.positions)) % 3 != 1)
        layout, scale = tokens.layout, case["dim"] ** -0.5
        shape = (len(tokens.positions), 3, case.get("heads", 1), case["dim"])
        mixed = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 2).to(getattr(torch, case["dtype"]))
        q, k, _ = (x.transpose(0, 1) for x in mixed.unbind(1))
        if not case.get("fused"):
            q, k = q.contiguous(), k.contiguous()
        maps, lse = softmax(q, k, layout.positions, layout.sizes, scale, window)
        place = (layout.cu_seqlens, layout.positions, max(layout.sizes))
        apart = []
        for weights in (None, mass.query_weights(tokens, by_segment=True)):
            sums, own = column_sums(q, k, lse, *place, weights, scale, window, weights is not None)
            again, _ = column_sums(q, k, lse, *place, weights, scale, window, False)
            assert torch.equal(sums, again)
            other, other_own = mass.torch_column_sums(q, k, lse, layout, weights, scale, window, True)
            assert sums.shape == other.shape == (1 if weights is None else 2, len(tokens.positions))
            apart += [sums - other, sums.sum(0) - torch.cat([a.sum((0, 1)) for a in maps])]
            assert (own is None) == (weights is None)
            if own is not None:
                apart += [own - other_own, own - torch.cat([a.diagonal(0, 1, 2).sum(0) for a in maps])]
        yield max(float(x.abs().max()) for x in apart)


def softmax(
    query: Tensor, key: Tensor, positions: Tensor, sizes: list[int], scale: float, window: int | None
) -> tuple[list[Tensor], Tensor]:
    """Each row's probabilities [H, n, n] in float64, and the log-sum-exp of all rows, [H, T] float32."""
    maps, sums = [], []
    rows = (query.double().split(sizes, 1), key.double().split(sizes, 1), positions.split(sizes))
    for q, k, at in zip(*rows, strict=True):
        logits = q @ k.transpose(1, 2) * scale
        if window is not None:
            logits = logits.masked_fill((at[:, None] - at).abs() > window, float("-inf"))
        maps.append(logits.softmax(-1))
        sums.append(logits.logsumexp(-1))
    return maps, torch.cat(sums, 1).float()


def compile() -> Iterator[int]:
    """The shared memory in bytes of kernels compiled for GPUs that are not there, down to their machine code."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from thresher.cuda import kernel

    function = kernel._sum_columns
    for capability, kind, dim, everything in ((80, "bf16", 80, True), (90, "fp16", 64, False)):
        kinds = dict.fromkeys(function.arg_names, "i32")
        kinds |= {"query": f"*{kind}", "key": f"*{kind}", "positions": "*i64", "starts": "*i32", "scale": "fp32"}
        kinds |= dict.fromkeys(("lse", "weights", "sums", "own"), "*fp32")
        fixed: dict[str, Any] = dict.fromkeys(("WINDOW", "WEIGHTED", "OWN"), everything)
        fixed |= {"DIM": dim, "WIDE": triton.next_power_of_2(dim), "BLOCK": kernel.BLOCK}
        fixed |= {} if everything else {"weights": None, "own": None}
        source = ASTSource(function, kinds | dict.fromkeys(fixed, "constexpr"), fixed)
        made = triton.compile(source, target=GPUTarget("cuda", capability, 32))
        assert "mma" in made.asm["ptx"]  # products run on tensor cores
        assert made.asm["cubin"]
        yield made.metadata.shared


def main() -> None:
    found = importlib.util.find_spec("thresher")
    assert found is not None
    assert found.submodule_search_locations
    package = types.ModuleType("thresher")  # without its __init__, which imports transformers
    package.__path__ = [str(Path(place)) for place in found.submodule_search_locations]
    sys.modules["thresher"] = package
    for number in {"interpret": interpret, "compile": compile}[sys.argv[1]]():
        print(json.dumps(number), flush=True)


if __name__ == "__main__":
    main()
