"""Models with an early exit from which, of a few rows, some leave and some do not."""

from __future__ import annotations

from typing import Any

import torch

import thresher
from helpers import batch, make, outputs_of
from thresher.exits import Exit, ExitConfig
from thresher.model import exit_of
from thresher.policy import PolicyConfig

LAYERS = 4
ROWS = (9, 1, 14, 5, 12, 7)
CONFIGS: dict[str, ExitConfig] = {
    "fastbert": thresher.FastBERT(width=16),
    "deebert": thresher.DeeBERT(),
    "confidence": thresher.Confidence(),
    "pabee": thresher.PABEE(patience=1),
    "settled-span": thresher.SettledSpan(patience=1),
    "sentee": thresher.SENTEE(),
}
HEADS = {"settled-span": "question-answering", "sentee": "token"}


def head_for(name: str) -> str:
    return HEADS.get(name, "sequence")


def scattered(exit: Exit[Any], seed: int) -> None:
    """Branches that say different things of different rows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in exit.parameters():
            parameter.normal_(0.0, 0.4, generator=generator)


def attached(
    family: str,
    name: str,
    policy: PolicyConfig | None = None,
    *,
    layers: int = LAYERS,
    config: ExitConfig | None = None,
) -> Any:
    """A model from which, of the rows `ROWS`, some leave and some do not."""
    model = thresher.attach(make(family, head_for(name), layers=layers), policy, exit=config or CONFIGS[name])
    for seed in range(40):
        scattered(exit_of(model), seed)
        if hasattr(exit_of(model), "uncertainty"):
            between(model)
        with thresher.tracing() as traces:
            outputs_of(model, batch(family, ROWS))
        if len(set(traces[0].exited_at)) > 1:
            return model
    raise AssertionError("all rows leave together whatever the branches say")


def between(model: Any) -> None:
    """Set the threshold between what is certain enough of half the rows and of the others."""
    exit = exit_of(model)
    exit.mode = "record"
    with thresher.tracing() as traces:
        outputs_of(model, batch(model.config.model_type, ROWS))
    exit.mode = "leave"
    least = torch.stack([exit.uncertainty(said) for said in traces[0].branches]).amin(0).sort().values
    bar = float(least[2] + least[3]) / 2
    thresher.set_exit(model, threshold=1 - bar if exit.config.method == "confidence" else bar)
