"""What packing and dropping gain on a GPU in bfloat16, paired and interleaved.

    python benchmarks/gpu.py [--models bert modernbert] [--shapes 8x128 64x512] [--rounds 15] [--dry]

BERT-base and ModernBERT-base with random weights on random ids: times do not depend on them. Each shape is run twice: `full`,
every row of that many tokens (nothing is padded, so stock SDPA is the honest baseline), and `mixed`, rows of an eighth of it up
to all of it (stock pads). The ways:

    stock      Hugging Face's model with SDPA
    compiled   the same under torch.compile, compiled for the shape it is timed on
    flash      the same, held to the FlashAttention kernel, padded: no kernel of it takes a mask, so padding is attended to
    packed     FlashAttention over packed tokens, unpadded, nothing dropped
    dropping   the same, attention mass dropping for 2x fewer FLOPs

Before anything is timed the packed model is compared with stock, and the Triton kernel with torch. A ratio is the median over
rounds of the ratio within a round, with quartiles; a round of one way runs it often enough to last some milliseconds, and waits
for the GPU. Records go to results/gpu.json.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable

import torch
import transformers
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import thresher
from records import record
from thresher import cuda
from thresher.cuda import mass
from thresher.errors import OptionError
from thresher.measure.flops import speedup
from thresher.measure.latency import Spread, paired, ratio
from thresher.packed import PackedTokens

MODELS = {"bert": transformers.BertConfig, "modernbert": transformers.ModernBertConfig}
SHAPES = ("8x128", "32x128", "64x128", "8x512", "32x512", "64x512")
LONG_ENOUGH = 0.02  # seconds that one way takes in a round
FLOPS = 2.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=tuple(MODELS), default=list(MODELS))
    parser.add_argument("--shapes", nargs="+", metavar="ROWSxTOKENS", default=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--dry", action="store_true", help="print, record nothing")
    args = parser.parse_args()
    try:
        cuda.require_cuda()
    except OptionError as error:
        sys.exit(str(error))
    kernel = check_kernel()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {kernel}", flush=True)
    for name in args.models:
        stock, compiled, attached = build(name), torch.compile(build(name), dynamic=False), build(name)
        for shape in args.shapes:
            rows, tokens = (int(part) for part in shape.split("x"))
            for load, lengths in (("full", [tokens] * rows), ("mixed", mixed(rows, tokens))):
                with torch.inference_mode():
                    measure(f"{name}-{load}-{shape}", stock, compiled, attached, batch(lengths), kernel, args)


def build(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_config(MODELS[name](), attn_implementation="sdpa")
    return model.eval().to("cuda", torch.bfloat16)


def mixed(rows: int, tokens: int) -> list[int]:
    """Lengths evenly spread from an eighth of `tokens` to all of it, in an order that is the same each time."""
    spread = torch.linspace(tokens // 8, tokens, rows).round().long()
    return spread[torch.randperm(rows, generator=torch.Generator().manual_seed(0))].tolist()


def batch(lengths: list[int]) -> dict[str, Tensor]:
    width = max(lengths)
    ids = torch.randint(1000, 20_000, (len(lengths), width), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(width) < torch.tensor(lengths).unsqueeze(1)).long()
    return {"input_ids": (ids * mask).cuda(), "attention_mask": mask.cuda()}


def check_kernel() -> str:
    """Which of the two makes the evidence, after the kernel was compared with torch on this GPU."""
    if mass.triton_kernel() is None:
        return "evidence by torch: triton is not installed"
    generator = torch.Generator("cuda").manual_seed(0)
    mask = (torch.arange(300) < torch.tensor([[300], [1], [77]])).cuda()
    tokens = PackedTokens.pack(torch.zeros(3, 300, 1, device="cuda"), mask)
    shape = (12, len(tokens.positions), 64)
    q, k, v = (
        torch.randn(shape, device="cuda", generator=generator).to(torch.bfloat16).transpose(0, 1).contiguous().transpose(0, 1)
        for _ in range(3)
    )  # fmt: skip
    if not cuda.fits(q, 0.125, None):
        return "no flash attention on this GPU"
    _, lse = cuda.flash(q, k, v, tokens.layout, 0.125)
    arguments = (q, k, lse, tokens.layout, None, 0.125, None, True)
    for mine, other in zip(mass.column_sums(*arguments), mass.torch_column_sums(*arguments), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-2, atol=1e-2)
    return "evidence by torch: the Triton kernel does not run" if mass._failed else "evidence by the Triton kernel"


def halving(model: torch.nn.Module, inputs: dict[str, Tensor]) -> float:
    """Attach what saves FLOPS on these rows, its own overhead counted, and say how much that is."""
    low, high, found = 0.0, 4.0, 1.0
    for _ in range(12):
        strength = (low + high) / 2
        thresher.attach(model, thresher.AttentionMass(strength=strength))
        with thresher.tracing() as traces:
            model(**inputs)
        policy = thresher.policy_of(model)
        found = speedup(traces, policy.geometry, policy)
        low, high = (strength, high) if found < FLOPS else (low, strength)
    return found


def measure(
    id: str,
    stock: torch.nn.Module,
    compiled: Callable[..., object],
    attached: torch.nn.Module,
    inputs: dict[str, Tensor],
    kernel: str,
    args: argparse.Namespace,
) -> None:
    full = bool(inputs["attention_mask"].all())
    given = {"input_ids": inputs["input_ids"]} if full else inputs
    flops = halving(attached, given)

    def packed() -> Tensor:
        with thresher.keep_everything():
            return attached(**given).logits

    expected = stock(**given).logits.float()
    apart = float((packed().float() - expected).abs().max() / expected.std())
    ways: dict[str, Callable[[], object]] = {
        "stock": lambda: stock(**given),
        "packed": packed,
        "dropping": lambda: attached(**given),
    }

    def flash() -> object:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return stock(input_ids=given["input_ids"])

    for name, way in (("compiled", lambda: compiled(**given)), ("flash", flash)):
        try:
            way()
            ways[name] = way
        except (
            Exception
        ) as error:  # whatever the compiler or the kernel meets is its own; the rest is still worth measuring
            print(f"{id}: {name} failed: {str(error).splitlines()[0]}", flush=True)
    timings = paired({name: often(way) for name, way in ways.items()}, rounds=args.rounds, warmup=3)
    baseline = "stock SDPA, no padding in the batch" if full else "stock SDPA, padded"
    note = (
        f"{torch.cuda.get_device_name()}, bfloat16, random weights, {args.rounds} rounds; {kernel}. "
        f"Packed logits are {apart:.2g} standard deviations from stock's."
    )

    def write(what: str, text: str, spread: Spread, against: str, scale: float = 1.0) -> None:
        value, around = spread.median * scale, [round(spread.low * scale, 4), round(spread.high * scale, 4)]
        print(f"{id + '-' + what:40} {value:.3f}  (quartiles {around[0]:.3f}-{around[1]:.3f})", flush=True)
        if not args.dry:
            record(
                "gpu", f"gpu-{id}-{what}", text, value, "ratio", baseline=against, spread=around,
                data="random token ids", seeds=[0], note=note,
            )  # fmt: skip

    if "compiled" in timings:
        write("compiled", "stock / torch.compile of it", ratio(timings["stock"], timings["compiled"]), baseline)
    if "flash" in timings:
        write("flash", "stock / FlashAttention, padded", ratio(timings["stock"], timings["flash"]), baseline)
        unpadded = ratio(timings["flash"], timings["packed"])
        write("unpadded", "FlashAttention padded / packed, nothing dropped", unpadded, "FlashAttention, padded")
    write("packed", "stock / packed, nothing dropped", ratio(timings["stock"], timings["packed"]), baseline)
    write("dropping", "stock / packed and dropping", ratio(timings["stock"], timings["dropping"]), baseline)
    gain = ratio(timings["packed"], timings["dropping"])
    write("realised", f"measured speedup / FLOPs speedup of {flops:.2f}", gain, "packed, nothing dropped", 1 / flops)


def often(way: Callable[[], object]) -> Callable[[], None]:
    """`way` as often as LONG_ENOUGH asks, and then a wait for the GPU."""

    def times(count: int) -> None:
        for _ in range(count):
            way()
        torch.cuda.synchronize()

    times(3)
    begun = time.perf_counter()
    times(3)
    count = max(1, round(3 * LONG_ENOUGH / (time.perf_counter() - begun)))
    return lambda: times(count)


if __name__ == "__main__":
    main()
