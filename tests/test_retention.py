"""What a retention configuration can say beyond fractions: counts; a floor for short rows."""

from __future__ import annotations

import pytest
import torch

import thresher
from helpers import LENGTHS, alone, batch, make, outputs_of, worst
from thresher.errors import OptionError


def test_every_row_keeps_the_same_count() -> None:
    model = thresher.attach(make("bert"), thresher.AttentionMass(counts=(8, 4, 2)))
    with thresher.tracing() as traces, torch.no_grad():
        model(**batch("bert"))
    for layer, count in enumerate((8, 4, 2)):
        assert traces[0].reads[layer][1] == [min(n, count) for n in LENGTHS]


def test_simulated_batched_and_alone_agree() -> None:
    model = thresher.attach(make("bert"), thresher.AttentionMass(counts=(8, 4, 2)))
    inputs = batch("bert")
    together = outputs_of(model, inputs)
    with thresher.simulated_drops():
        assert worst(together, outputs_of(model, inputs)) <= 1e-4
    for row in range(len(LENGTHS)):
        by_itself = outputs_of(model, alone(inputs, row))["logits"]
        assert torch.allclose(together["logits"][row : row + 1], by_itself, atol=1e-4)


def test_strength_divides_the_counts_and_zero_keeps_everything() -> None:
    model = make("bert")
    for strength, expected in ((0.0, list(LENGTHS)), (2.0, [min(n, 2) for n in LENGTHS])):
        thresher.attach(model, thresher.AttentionMass(counts=(8, 8, 4), strength=strength))
        with thresher.tracing() as traces, torch.no_grad():
            model(**batch("bert"))
        assert traces[0].reads[-1][1] == expected


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"counts": (4, 8, 2)}, "must not rise"),
        ({"counts": (4, 0)}, "at least 1"),
        ({"counts": (4, 2, 1), "retention": (0.5, 0.5, 0.5)}, "not both"),
    ],
)
def test_wrong_counts(settings: dict, said: str) -> None:
    with pytest.raises(OptionError, match=said):
        thresher.AttentionMass(**settings)


def test_counts_for_another_depth() -> None:
    for strength in (0.0, 1.0):
        with pytest.raises(OptionError, match="2 entries but the model has 3 layers"):
            thresher.attach(make("bert"), thresher.AttentionMass(counts=(4, 2), strength=strength))


def test_min_tokens_spares_short_rows() -> None:
    model = thresher.attach(make("bert"), thresher.AttentionMass(retention=(0.5, 0.2, 0.1), min_tokens=6))
    with thresher.tracing() as traces, torch.no_grad():
        model(**batch("bert"))
    assert traces[0].reads[-1][1] == [min(n, 6) for n in LENGTHS]
    with pytest.raises(OptionError, match="min_tokens"):
        thresher.AttentionMass(min_tokens=0)
