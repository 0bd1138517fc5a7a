"""What evidence costs, what memory a batch takes and what keeping it gains, and that time grows with the tokens kept.

    python benchmarks/cost.py [evidence] [memory] [kept] [scaling] [--rounds 15] [--dry]

MiniLM-L6 on random token ids, nothing else running. Memory is the peak of a process that runs nothing but the batch.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoModel

import thresher
from records import record
from speed import of_this_processor, random_batch
from starts import minilm
from thresher.evidence import NOTHING, Wanted
from thresher.measure.latency import paired, ratio
from thresher.policy import Policy, PolicyConfig

DOCS = Path(__file__).parent.parent / "docs" / "img"
WANTED = {"mass": Wanted(mass=True), "blocks": Wanted(block=32)}
TARGETS = {("mass", 384): "<= 0.08", ("blocks", 384): "<= 0.04"}


class Reads(Policy[PolicyConfig]):
    """Asks every layer for evidence and drops nothing, so that its cost stands alone."""

    evidence = NOTHING

    def wants(self, layer: int) -> Wanted:
        return self.evidence


def evidence(rounds: int, write) -> None:
    model = thresher.attach(AutoModel.from_pretrained(minilm()).eval())
    attachment = model.thresher_attachment
    reads = Reads(PolicyConfig(), attachment.engine.entrance.geometry)
    attachment.policy = attachment.engine.policy = reads
    for rows, tokens in ((8, 384), (1, 384), (32, 128), (1, 128)):
        batch = random_batch(rows, tokens)

        def run(wanted: Wanted, batch=batch) -> None:
            reads.evidence = wanted
            model(**batch)

        ways = {name: (lambda w=wanted: run(w)) for name, wanted in {"nothing": NOTHING, **WANTED}.items()}
        with torch.inference_mode():
            timings = paired(ways, rounds=rounds, warmup=3)
        for name in WANTED:
            cost = ratio(timings[name], timings["nothing"])
            what = f"share of the encoder's time that {name} as evidence adds"
            write(*of_this_processor(f"evidence-{name}-{rows}x{tokens}", what), cost.median - 1, "share",
                  TARGETS.get((name, tokens)), "packed, no evidence",
                  [round(cost.low - 1, 4), round(cost.high - 1, 4)], f"from all six layers; {rounds} rounds")  # fmt: skip


PEAK = """
import resource, sys, torch, thresher
from transformers import AutoModel
sys.path.insert(0, {here!r})
from speed import HALF, random_batch
from starts import minilm
model = thresher.attach(AutoModel.from_pretrained(minilm()).eval(), HALF)
def run(way, rows, tokens):
    how = {{"stock": thresher.stock, "packed": thresher.keep_everything}}.get(way)
    with torch.inference_mode():
        if how is None:
            model(**random_batch(rows, tokens))
        else:
            with how():
                model(**random_batch(rows, tokens))
run({way!r}, 1, 16)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for _ in range(2):
    run({way!r}, 32, 512)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, before)
"""


def memory(rounds: int, write) -> None:
    peaks = {}
    for way in ("stock", "packed", "dropping"):
        code = PEAK.format(here=str(Path(__file__).parent), way=way)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        peak, before = map(int, done.stdout.split())
        peaks[way] = (peak - before) / 1024
        print(f"{way}: {peaks[way]:.0f} MiB above the loaded model ({before / 1024:.0f} MiB)")
    for way in ("packed", "dropping"):
        write(f"memory-{way}-32x512", f"peak memory of a batch of 32 x 512, {way} / stock", peaks[way] / peaks["stock"],
              "ratio", "<= 1.0", f"stock SDPA: {peaks['stock']:.0f} MiB above the loaded model", None, "")  # fmt: skip


PASS = """
import statistics, sys, time, torch, thresher
from transformers import AutoModel
sys.path.insert(0, {here!r})
from speed import HALF, random_batch
from starts import minilm
if {keep}:
    thresher.keep_memory()
model = thresher.attach(AutoModel.from_pretrained(minilm()).eval(), HALF)
batches, seconds = [random_batch({rows}, n) for n in {lengths}], []
with torch.inference_mode(), {how}:
    for _ in range({rounds} + 3):
        began = time.perf_counter()
        for batch in batches:
            model(**batch)
        seconds.append(time.perf_counter() - began)
print(statistics.median(seconds[3:]))
"""
MIXED = (384, 64, 256, 32, 512, 128)
HOW = {"stock": "thresher.stock()", "packed": "thresher.keep_everything()", "dropping": "torch.no_grad()"}


def kept(rounds: int, write) -> None:
    """Time without `keep_memory` over time with it, in processes of their own, one after the other."""

    def seconds(keep: bool, how: str, rows: int, lengths: tuple[int, ...]) -> float:
        about = {"here": str(Path(__file__).parent), "keep": keep, "how": HOW[how], "rows": rows, "lengths": lengths}
        code = PASS.format(rounds=rounds, **about)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        return float(done.stdout)

    for name, rows, lengths in (("1x384", 1, (384,)), ("1xmixed", 1, MIXED), ("8xmixed", 8, MIXED)):
        for how in HOW:
            gains = sorted(seconds(False, how, rows, lengths) / seconds(True, how, rows, lengths) for _ in range(3))
            write(f"kept-{how}-{name}", f"time without keep_memory / with it: {how}, {name}", gains[1], "ratio", None,
                  "the same in a process that does not keep its memory", [round(g, 3) for g in gains],
                  f"three pairs of processes, median of {rounds} rounds over batches of {lengths} tokens")  # fmt: skip


def scaling(rounds: int, write) -> None:
    """Time against kept tokens: lengths 32 to 512 and retention 1.0 to 0.1, every layer keeping the same fraction."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt
    import numpy as np

    points = []
    for fraction in (1.0, 0.8, 0.6, 0.4, 0.2, 0.1):
        curve = (fraction,) * 6
        model = thresher.attach(AutoModel.from_pretrained(minilm()).eval(), thresher.AttentionMass(retention=curve))
        for tokens in (32, 64, 128, 256, 512):
            batch = random_batch(8, tokens)
            with torch.inference_mode():
                timing = paired({"it": lambda m=model, b=batch: m(**b)}, rounds=max(rounds // 2, 3), warmup=2)["it"]
            points.append((tokens, fraction, 8 * tokens * fraction, 1000 * timing.median))
            print(f"{tokens} tokens, {fraction:.0%} kept: {points[-1][3]:.1f} ms", flush=True)
    kept, seconds = (np.array([p[i] for p in points]) for i in (2, 3))
    slope, offset = np.polyfit(kept, seconds, 1)
    explained = 1 - ((seconds - slope * kept - offset) ** 2).sum() / ((seconds - seconds.mean()) ** 2).sum()
    write("scaling-linear", "share of the variance of time that a straight line over kept tokens explains", explained,
          "R2", None, "", None, "8 rows of 32-512 tokens, 100-10 % kept from the first layer on")  # fmt: skip
    figure, axes = plt.subplots(figsize=(6, 3.6))
    for fraction in sorted({p[1] for p in points}, reverse=True):
        mine = [p for p in points if p[1] == fraction]
        axes.plot([p[2] for p in mine], [p[3] for p in mine], "o-", ms=4, lw=1, label=f"{fraction:.0%} kept")
    axes.plot(np.sort(kept), slope * np.sort(kept) + offset, "k:", lw=1, label="straight line")
    axes.set(xlabel="tokens kept in a batch of 8", ylabel="milliseconds", title="Time follows the tokens that are kept")
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(DOCS / "scaling.svg")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", choices=["evidence", "memory", "kept", "scaling", []])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--dry", action="store_true", help="print, record nothing")
    args = parser.parse_args()
    thresher.keep_memory()

    def write(id: str, what: str, value: float, unit: str, target, baseline: str, spread, note: str) -> None:
        print(f"{id:28} {value:.3f} {unit} (target {target}; spread {spread})", flush=True)
        if not args.dry:
            note = f"MiniLM-L6 fp32, {torch.get_num_threads()} threads. {note}"
            record("cost", id, what, value, unit, target=target, baseline=baseline, spread=spread,
                   data="random token ids", seeds=[0], note=note)  # fmt: skip

    for name, job in (("evidence", evidence), ("memory", memory), ("kept", kept), ("scaling", scaling)):
        if name in args.what or not args.what:
            job(args.rounds, write)


if __name__ == "__main__":
    main()
