"""Block-Skim's ablations (table 3 of the paper): what each choice costs, and how often the predictors of a layer are right."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

import thresher
from block_skim import at, joint, lost, plain
from questions import Bench
from thresher.measure.run import collate
from thresher.methods.block_skim import Accuracy, predictor_accuracy
from thresher.model import evaluating, find_encoder, policy_of

FILE = "block_skim_ablations"
SPEEDUP = 1.6
WINDOWS = 1_000  # that predictors are judged on
LABELS = ("start_positions", "end_positions")

VARIANTS = {
    "blocks-of-32": thresher.BlockSkim(),
    "paper-alpha": thresher.BlockSkim(),
    "blocks-of-8": thresher.BlockSkim(block=8),
    "blocks-of-16": thresher.BlockSkim(block=16),
    "blocks-of-64": thresher.BlockSkim(block=64),
    "frozen": thresher.BlockSkim(learning="frozen"),
    "skimming": thresher.BlockSkim(learning="skimming", threshold=0.05),
    "full-map": thresher.BlockSkim(full_map=True),
}
WHAT = {
    "blocks-of-32": "joint training, blocks of 32",
    "paper-alpha": "the paper's weight of the predictors' loss, alpha .1",
    "frozen": "the model frozen, only predictors trained (ID 3)",
    "skimming": "blocks skimmed while training (ID 4)",
    "full-map": "predictors see the whole attention map (figure 3)",
}


def accuracy(bench: Bench, model: Any) -> list[Accuracy]:
    """Of every layer, over windows of the dev set, every predictor seeing every block."""
    policy, encoder = policy_of(model), find_encoder(model)
    rows = bench.dev.rows.select(range(min(WINDOWS, len(bench.dev.rows))))
    totals = np.zeros((policy.geometry.layers, len(Accuracy._fields)), dtype=int)
    policy.mode = "soft"
    try:
        with evaluating(model), torch.inference_mode():
            for start in range(0, len(rows), 16):
                index = list(range(start, min(start + 16, len(rows))))
                batch = collate(rows, index, encoder.config.pad_token_id or 0, encoder.device)
                labels = {name: torch.tensor(rows[index][name], device=encoder.device) for name in LABELS}
                with thresher.tracing() as traces:
                    model(**batch)
                totals += np.array(predictor_accuracy(traces[0], labels))
    finally:
        policy.mode = "hard"
    return [Accuracy(*map(int, of_layer)) for of_layer in totals]


def main(bench: Bench) -> None:
    names = bench.args.variants or list(VARIANTS)
    if unknown := sorted(set(names) - set(VARIANTS)):
        raise SystemExit(f"There is no variant {', '.join(unknown)}; there are {', '.join(VARIANTS)}.")
    start = bench.judge(plain(bench), packed=True)
    baseline = f"plain training, packed: F1 {start.f1:.2f}"
    for name in names:
        policy = VARIANTS[name] if name == "paper-alpha" else replace(VARIANTS[name], alpha=bench.args.alpha)
        model = joint(bench, policy, "joint" if name == "blocks-of-32" else name)
        whole = bench.judge(model, packed=True)
        right = accuracy(bench, model)
        skimmed = next((found for _, found in at(bench, model, (SPEEDUP,))), None)
        by_layer = {
            "predictor_accuracy": [round(one.right / max(one.blocks, 1), 4) for one in right],
            "relevant_found": [round(one.found / max(one.relevant, 1), 4) for one in right],
        }
        bench.record(
            FILE,
            f"block-skim-ablation-{bench.args.label}-{name}{bench.suffix}",
            f"F1, nothing dropped: {WHAT.get(name, name.replace('-', ' '))}",
            whole.f1,
            "%",
            baseline=baseline,
            spread={"exact": round(whole.exact, 2), **by_layer},
        )
        if skimmed is not None:
            bench.record(
                FILE,
                f"block-skim-ablation-{bench.args.label}-{name}{bench.suffix}-{SPEEDUP}",
                f"F1 lost at about {SPEEDUP}x FLOPs: {WHAT.get(name, name.replace('-', ' '))}",
                skimmed.lost(start),
                "points",
                baseline=baseline,
                spread=lost(skimmed, start),
            )
