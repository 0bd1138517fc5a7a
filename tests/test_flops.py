"""The analytic count against what torch counts while the layers run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import thresher
from helpers import FAMILIES, HIDDEN, LENGTHS, batch, build, config_of, make, outputs_of, settings
from thresher.errors import OptionError
from thresher.measure.flops import dense_flops, flops, kept_by_layer, skimming_speedup, speedup
from thresher.measure.layer import layer_flops
from thresher.methods import CONFIGS
from thresher.model import attachment_of, policy_of
from thresher.policy import Geometry, Point, Trace

ALBERT_EMBEDDING = 24


def counted(model: Any, inputs: dict[str, torch.Tensor], family: str) -> int:
    """FLOPs of the encoder's layers. The math kernel: torch does not count its fused attention on CPU."""
    counter = FlopCounterMode(display=False)
    onednn = torch.backends.mkldnn.flags(enabled=False)  # whose products the counter does not know
    with counter, sdpa_kernel(SDPBackend.MATH), onednn, torch.no_grad():
        model(**inputs)
    total = counter.get_total_flops()
    if family in ("albert", "electra"):  # the embeddings' projection runs over the padded batch
        total -= 2 * inputs["input_ids"].numel() * ALBERT_EMBEDDING * HIDDEN
    return total


def poolerless(family: str) -> Any:
    plain = ("distilbert", "electra", "modernbert")
    return build(config_of(family), "base", **({} if family in plain else {"add_pooling_layer": False}))


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_dropped(family: str) -> None:
    model, inputs = thresher.attach(poolerless(family)), batch(family)
    geometry = attachment_of(model).engine.entrance.geometry
    with thresher.tracing() as traces:
        count = counted(model, inputs, family)
    assert sum(flops(traces[0], geometry)) == count
    assert flops(traces[0], geometry) == [dense_flops(geometry, n) for n in LENGTHS]
    assert speedup(traces, geometry) == 1.0


# Score computed without any matrix product, so that torch counts the layers alone.
@pytest.mark.parametrize("method", ["first", "random"])
@pytest.mark.parametrize("family", FAMILIES)
def test_dropping(family: str, method: str) -> None:
    model, inputs = thresher.attach(poolerless(family), method), batch(family)
    policy = policy_of(model)
    with thresher.tracing() as traces:
        count = counted(model, inputs, family)
    assert sum(flops(traces[0], policy.geometry, policy)) == count
    dense = sum(dense_flops(policy.geometry, n) for n in LENGTHS)
    assert speedup(traces, policy.geometry, policy) == pytest.approx(dense / count)
    assert dense > 1.3 * count


@pytest.mark.parametrize("method", sorted(CONFIGS))
@pytest.mark.parametrize("family", ["bert", "distilbert", "albert", "modernbert", "mpnet"])
def test_the_methods_own_work_is_counted_too(family: str, method: str) -> None:
    """Attention mass is a matrix-vector product, which torch counts as well."""
    model, inputs = thresher.attach(poolerless(family), settings(CONFIGS[method])), batch(family)
    policy = policy_of(model)
    with thresher.tracing() as traces:
        count = counted(model, inputs, family)
    (trace,) = traces
    assert sum(flops(trace, policy.geometry, policy)) == count
    entering = [trace.original, *(fed for _, fed in trace.reads)]
    overhead = [
        sum(
            policy.overhead_flops(layer, reads[row], entering[layer - 1][row])
            for layer, (reads, _) in enumerate(trace.reads, start=1)
        )
        for row in range(len(LENGTHS))
    ]
    both = zip(flops(trace, policy.geometry, policy), flops(trace, policy.geometry), strict=True)
    assert [a - b for a, b in both] == overhead
    before = policy.config.point is Point.BEFORE_LAYER and method != "pooling"  # which averages without looking
    looks = before or any(policy.wants(layer) for layer in range(1, 4))
    assert (sum(overhead) > 0) == looks


def test_a_layer_by_hand() -> None:
    bert = Geometry(layers=12, hidden=768, heads=12, intermediate=3072)
    n, d = 512, 768
    assert layer_flops(bert, n, n) == 8 * n * d * d + 4 * n * n * d + 16 * n * d * d
    assert dense_flops(bert, 512) / 1e9 == pytest.approx(96.6, abs=0.05)  # the figure everybody quotes for BERT-base
    assert layer_flops(bert, 100, 40) == 8 * 100 * d * d + 4 * 100 * 100 * d + 16 * 40 * d * d
    gated = Geometry(layers=1, hidden=8, heads=2, intermediate=12, gated=True)
    assert layer_flops(gated, 3, 3) == 8 * 3 * 64 + 4 * 9 * 8 + 3 * 6 * 8 * 12


def test_the_packed_model_reads_no_padding_and_the_stock_one_does() -> None:
    model, inputs = thresher.attach(poolerless("bert")), batch("bert")
    packed = counted(model, inputs, "bert")
    with thresher.stock():
        stock = counted(model, inputs, "bert")
    geometry = attachment_of(model).engine.entrance.geometry
    assert stock == len(LENGTHS) * dense_flops(geometry, max(LENGTHS))
    assert packed < 0.6 * stock


def test_simulated_drops_count_as_if_they_were_real() -> None:
    model, inputs = thresher.attach(make("bert"), "attention-mass"), batch("bert")
    policy = policy_of(model)
    with thresher.tracing() as physical:
        outputs_of(model, inputs)
    with thresher.tracing() as simulated, thresher.simulated_drops():
        outputs_of(model, inputs)
    assert flops(physical[0], policy.geometry, policy) == flops(simulated[0], policy.geometry, policy)


def test_a_mode_that_is_off_costs_nothing_more() -> None:
    model, inputs = thresher.attach(make("bert"), "attention-mass"), batch("bert")
    policy = policy_of(model)
    policy.mode = "off"
    with thresher.tracing() as traces:
        outputs_of(model, inputs)
    assert speedup(traces, policy.geometry, policy) == 1.0


def test_the_speedup_of_skimming_on_paper() -> None:
    assert skimming_speedup([0.9] * 12) == pytest.approx(1.86, abs=0.005)  # the paper's example
    assert skimming_speedup([1.0] * 6) == 1.0
    assert skimming_speedup([0.5, 1.0, 0.5]) == pytest.approx(3 / (0.5 + 0.5 + 0.25))
    for wrong in ([], [0.0], [0.5, 1.1]):
        with pytest.raises(OptionError, match="kept fractions"):
            skimming_speedup(wrong)


def test_what_layers_kept_goes_into_the_formula() -> None:
    """Layer by layer the fractions telescope to the tokens that were fed forward."""
    model, inputs = thresher.attach(make("bert"), "first"), batch("bert")
    with thresher.tracing() as traces:
        outputs_of(model, inputs)
        outputs_of(model, inputs)
    fed = [sum(feeds) for _, feeds in traces[0].reads]
    kept = kept_by_layer(traces)
    assert kept == [now / before for before, now in zip([sum(LENGTHS), *fed], fed, strict=False)]
    assert skimming_speedup(kept) == pytest.approx(len(fed) * sum(LENGTHS) / sum(fed))


def test_several_passes_add_up_and_none_is_one() -> None:
    model = thresher.attach(make("bert"), "first")
    policy = policy_of(model)
    with thresher.tracing() as traces:
        outputs_of(model, batch("bert"))
        outputs_of(model, batch("bert", (20,)))
    spent = sum(sum(flops(t, policy.geometry, policy)) for t in traces)
    dense = sum(dense_flops(policy.geometry, n) for n in (*LENGTHS, 20))
    assert speedup(traces, policy.geometry, policy) == pytest.approx(dense / spent)
    assert speedup([], policy.geometry) == 1.0
    assert flops(Trace(), policy.geometry) == []
