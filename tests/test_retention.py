"""What a retention configuration can say beyond fractions: counts, a floor for short rows, comparison with neighbours."""

from __future__ import annotations

import pytest
import torch

import thresher
from helpers import LENGTHS, alone, batch, make, outputs_of, worst
from thresher.errors import OptionError
from thresher.packed import PackedTokens
from thresher.parts.scores import among_neighbours


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
    with pytest.raises(OptionError, match="2 entries but the model has 3 layers"):
        thresher.attach(make("bert"), thresher.AttentionMass(counts=(4, 2)))


def test_among_neighbours_against_loops() -> None:
    lengths, reach = (9, 1, 14, 5), 2
    hidden = torch.zeros(4, 14, 1)
    mask = torch.tensor([[int(i < n) for i in range(14)] for n in lengths])
    for simulated in (False, True):
        tokens = PackedTokens.pack(hidden, mask, simulated=simulated)
        score = torch.rand(sum(lengths), generator=torch.Generator().manual_seed(0))
        keep = torch.rand(sum(lengths), generator=torch.Generator().manual_seed(1)) > 0.3
        keep |= tokens.layout.protected
        rows = [(r, i) for r, n in enumerate(lengths) for i in range(n)]
        living = {r: [t for t, (row, _) in enumerate(rows) if row == r and keep[t]] for r in range(4)}
        expected = {}
        for own in living.values():
            for place, t in enumerate(own):
                near = own[max(place - reach, 0) : place + reach + 1]
                expected[t] = float(score[t]) / (sum(float(score[u]) for u in near) / len(near))
        kept = tokens.keep(keep)
        given = score if simulated else score[keep]
        found = among_neighbours(given, kept, reach)
        found = found[keep] if simulated else found
        assert torch.allclose(found, torch.tensor([expected[t] for t in sorted(expected)]), rtol=1e-5)


def test_neighbours_simulated_batched_and_alone_agree() -> None:
    model = thresher.attach(make("bert"), thresher.AttentionMass(neighbours=2))
    inputs = batch("bert")
    together = outputs_of(model, inputs)
    with thresher.simulated_drops():
        assert worst(together, outputs_of(model, inputs)) <= 1e-4
    for row in range(len(LENGTHS)):
        assert torch.allclose(
            together["logits"][row : row + 1], outputs_of(model, alone(inputs, row))["logits"], atol=1e-4
        )


def test_min_tokens_spares_short_rows() -> None:
    model = thresher.attach(make("bert"), thresher.AttentionMass(retention=(0.5, 0.2, 0.1), min_tokens=6))
    with thresher.tracing() as traces, torch.no_grad():
        model(**batch("bert"))
    assert traces[0].reads[-1][1] == [min(n, 6) for n in LENGTHS]
    with pytest.raises(OptionError, match="min_tokens"):
        thresher.AttentionMass(min_tokens=0)
