"""Block-Skim on smaller models (figure 5 of the paper): a student of half the layers, and a model without half its heads.

Both are trained back by the start's logits and the labels, for --passes windows, and then jointly for as many. FLOPs are
counted from the whole start, nothing dropped, so that a row's speedup is that of both steps together. ALBERT, or a deeper
model, is another --start; heads are removed in the families whose layers can be opened, the others go without that row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import thresher
from block_skim import at, joint, lost, plain
from questions import Bench
from thresher.errors import UnsupportedModelError
from thresher.measure.flops import dense_flops
from thresher.model import attachment_of, detach, policy_of
from thresher.report import frontier_chart
from thresher.training.students import DISTIL

FILE = "block_skim_compression"
SPEEDUPS = (1.3, 1.6)
WINDOWS = 300  # that the importance of heads is measured on


def _start(bench: Bench) -> Any:
    """Without anything attached."""
    return detach(bench.model())


def student(bench: Bench) -> Any:
    start = _start(bench)
    return thresher.student(start, max(start.config.num_hidden_layers // 2, 1))


def pruned(bench: Bench) -> Any:
    count = min(WINDOWS, len(bench.train))
    rows = bench.train.shuffle(seed=0).select(range(count))
    return thresher.prune_heads(_start(bench), rows, share=0.5)


SMALLER: dict[str, Callable[[Bench], Any]] = {"half-the-layers": student, "half-the-heads": pruned}


def distilled(bench: Bench, name: str) -> Path:
    """The smaller model, trained back; made once."""
    directory = bench.args.out / f"{name}{bench.suffix}"
    if not (directory / "thresher.json").is_file():
        model = SMALLER[name](bench)
        epochs = bench.args.passes / len(bench.train)
        stage = replace(DISTIL, epochs=epochs, learning_rate=bench.args.learning_rate)
        print(f"training {name}", flush=True)
        thresher.distil(model, _start(bench), bench.train, bench.tokenizer, directory, stage=stage, progress=False)
    return directory


def cheaper(bench: Bench, whole: Any, small: Any) -> float:
    """FLOPs of the dev set by the whole model / by the small one, nothing dropped."""
    lengths = [len(ids) for ids in bench.dev.rows["input_ids"]]
    sizes = (attachment_of(model).engine.entrance.geometry for model in (whole, small))
    before, after = (sum(dense_flops(geometry, n) for n in lengths) for geometry in sizes)
    return before / after


def main(bench: Bench) -> None:
    reference = plain(bench)
    whole = bench.judge(reference, packed=True)
    points: dict[str, list[tuple[float, float]]] = {}
    for name in ("whole", *SMALLER):
        try:
            begun = None if name == "whole" else distilled(bench, name)
        except UnsupportedModelError as error:
            print(f"{name}: {error}", flush=True)
            continue
        small = bench.model(start=begun) if begun else reference
        before, ratio = bench.judge(small, packed=True), cheaper(bench, reference, small)
        points[name] = [(ratio, before.f1)]
        label = f"block-skim-compression-{bench.args.label}-{name}{bench.suffix}"
        about = {"baseline": f"the whole model, plain training, packed: F1 {whole.f1:.2f}"}
        if begun:
            spread = {**lost(before, whole), "flops_speedup": round(ratio, 3)}
            what = f"F1 lost by {name.replace('-', ' ')} alone"
            bench.record(FILE, label, what, before.lost(whole), "points", spread=spread, **about)
        model = joint(bench, name="joint" if name == "whole" else f"joint-{name}", start=begun)
        assert policy_of(model).geometry == attachment_of(small).engine.entrance.geometry
        for speedup, found in at(bench, model, SPEEDUPS):
            together = ratio * found.speedup
            points[name].append((together, found.f1))
            bench.record(
                FILE,
                f"{label}-{speedup}",
                f"F1 lost by {name.replace('-', ' ')} and skimming at about {speedup}x",
                found.lost(whole),
                "points",
                spread={
                    **lost(found, whole),
                    "flops_speedup": round(together, 3),
                    "of_skimming": round(found.speedup, 3),
                },
                **about,
            )
    chart = frontier_chart(points, baseline=whole.f1, quality_label="F1 on SQuAD")
    bench.draw(chart, f"block-skim-compression-{bench.args.label}")
