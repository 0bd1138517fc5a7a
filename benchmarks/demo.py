"""The demo for three seeds, as records.

python benchmarks/demo.py [--seeds 0 1 2]
"""

from __future__ import annotations

import argparse
import tempfile
from statistics import mean

import thresher
from records import record
from thresher.demo import run_demo


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    thresher.keep_memory()
    found = []
    for seed in args.seeds:
        with tempfile.TemporaryDirectory() as out:
            found.append(run_demo(out, seed=seed))
        print(found[-1].numbers(), flush=True)
    about = {
        "data": "python-docs",
        "split": "test topics",
        "examples": found[0].documents,
        "seeds": args.seeds,
        "note": f"all-MiniLM-L6-v2, {found[0].queries} held-out sentences a seed, mean {found[0].tokens:.0f} tokens a section",
    }

    def write(id: str, what: str, values: list[float], unit: str, target: str | None, baseline: str) -> None:
        spread = [round(v, 4) for v in values]
        record("demo", id, what, mean(values), unit, target=target, baseline=baseline, spread=spread, **about)

    packed = "the same model packed, nothing dropped"
    write("demo-flops", "demo: FLOPs speedup", [f.flops_ratio for f in found], "x", ">= 2.0", packed)
    write("demo-mrr", "demo: held-out MRR minus stock's", [f.thresher["mrr"] - f.stock["mrr"] for f in found], "MRR",
          ">= -0.01", f"stock MRR {mean(f.stock['mrr'] for f in found):.4f}")  # fmt: skip
    write("demo-mrr-untrained", "demo: MRR minus stock's, before training",
          [f.training_free["mrr"] - f.stock["mrr"] for f in found], "MRR", None, "stock")  # fmt: skip
    write("demo-measured", "demo: measured speedup", [f.measured_ratio for f in found], "x", None, packed)
    write("demo-realised", "demo: measured / FLOPs speedup", [f.measured_ratio / f.flops_ratio for f in found], "ratio",
          ">= 0.85", packed)  # fmt: skip
    write(
        "demo-padding", "demo: padding-only ratio", [f.padding_ratio for f in found], "x", None, "stock, padded, sorted"
    )
    write(
        "demo-kernels", "demo: oneDNN's float32 kernels over torch's own", [f.kernels_ratio for f in found], "x", None,
        "packed, torch's own kernels",
    )  # fmt: skip
    write(
        "demo-total", "demo: total gain", [f.total_ratio for f in found], "x", None, "stock, padded, sorted by length"
    )


if __name__ == "__main__":
    main()
