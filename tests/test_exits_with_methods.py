"""Every exit beside every method: rows that leave change nothing for the others, and dropping is what it is without them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import thresher
from helpers import alone, batch, decided, make, outputs_of, settings, traced, worst
from thresher.exits import EXIT_CONFIGS
from thresher.methods import CONFIGS
from thresher.model import exit_of, policy_of

CLOSE = 1e-4
LAYERS = 5
ROWS = (17, 5, 23, 12, 9, 20)
HEADS = {"settled-span": "question-answering", "sentee": "token"}
EXITS = sorted({*EXIT_CONFIGS} - {"tokee", "settled-states"})  # TokEE takes no policy; states have tests of their own


def attached(exit: str, method: str) -> Any:
    """Of which rows leave after different layers."""
    model = make("bert", HEADS.get(exit, "sequence"), LAYERS)
    policy = (
        CONFIGS[method](retention=(0.9, 0.7, 0.5, 0.4, 0.3)) if method == "power-bert" else settings(CONFIGS[method])
    )
    decided(thresher.attach(model, policy, exit=exit))
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in exit_of(model).parameters():
                parameter.normal_(0.0, 0.3, generator=generator)
        for turned in ({"threshold": value} for value in (0.1, 0.3, 0.5, 0.7, 0.9)):
            if "threshold" not in exit_of(model).config.at_run_time():
                turned = {"patience": 1}
            thresher.set_exit(model, **turned)
            _, trace = traced(model, batch("bert", ROWS))
            if len(set(trace.exited_at)) > 2:
                return model
    raise AssertionError("all rows leave together whatever the branches say")


def row_of(outputs: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    """What `outputs_of` would give for this row alone."""
    start = sum(ROWS[:row])
    return {
        name: value[start : start + ROWS[row]] if len(value) == sum(ROWS) else value[row : row + 1]
        for name, value in outputs.items()
    }


@pytest.mark.parametrize("method", sorted(CONFIGS))
@pytest.mark.parametrize("exit", EXITS)
def test_simulated_is_batched_is_alone(exit: str, method: str) -> None:
    inputs, model = batch("bert", ROWS), attached(exit, method)
    batched, trace = traced(model, inputs)
    with thresher.simulated_drops():
        simulated, same = traced(model, inputs)
    assert worst(batched, simulated) <= CLOSE
    assert (trace.exited_at, trace.reads) == (same.exited_at, same.reads)
    for row in range(len(ROWS)):
        single, one = traced(model, alone(inputs, row))
        assert worst(row_of(batched, row), single) <= CLOSE
        assert one.exited_at == trace.exited_at[row : row + 1]


@pytest.mark.parametrize("method", sorted(CONFIGS))
@pytest.mark.parametrize("exit", EXITS)
def test_an_exit_by_which_nobody_leaves_changes_nothing(exit: str, method: str) -> None:
    inputs, model = batch("bert", ROWS), attached(exit, method)
    thresher.set_exit(model, strength=0.0)
    policy = policy_of(model)
    without = thresher.attach(make("bert", HEADS.get(exit, "sequence"), LAYERS), policy.config)
    policy_of(without).load_state_dict(policy.state_dict())
    assert worst(outputs_of(model, inputs), outputs_of(without.eval(), inputs)) == 0.0
