"""Every method on every family: three ways to run, one meaning; and each paper's formula against a naive replay."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import thresher
from helpers import (
    CLS,
    FAMILIES,
    FIRST_WORD,
    LENGTHS,
    POST_NORM,
    SEP,
    VOCABULARY,
    WITH_SEGMENTS,
    WITH_TYPES,
    alone,
    batch,
    build,
    config_of,
    make,
    outputs_of,
    segments_of,
    settings,
    traced,
    worst,
)
from thresher.errors import OptionError
from thresher.measure.flops import speedup
from thresher.methods import CONFIGS
from thresher.model import policy_of
from thresher.policy import Geometry, Point, PolicyConfig

CLOSE = 1e-4
every_method = pytest.mark.parametrize("method", sorted(CONFIGS))
every_family = pytest.mark.parametrize("family", FAMILIES)


def configured(method: str, **changes: Any) -> PolicyConfig:
    return settings(CONFIGS[method], **changes)


def row_of(outputs: dict[str, Tensor], mask: Tensor, row: int) -> dict[str, Tensor]:
    """What `real_parts` would have given for one row alone."""
    starts = [0, *mask.sum(1).cumsum(0).tolist()]
    found = {}
    for name, value in outputs.items():
        per_token = len(value) == starts[-1] and starts[-1] != len(mask)
        found[name] = value[starts[row] : starts[row + 1]] if per_token else value[row : row + 1]
    return found


@every_method
@every_family
@pytest.mark.parametrize("head", ["sequence", "question-answering", "token"])
def test_simulated_batched_and_alone_are_one(head: str, family: str, method: str) -> None:
    inputs = batch(family)
    model = make(family, head)
    stock = outputs_of(model, inputs)
    thresher.attach(model, configured(method))
    batched, trace = traced(model, inputs)
    dropped = trace.dropped_at()
    assert worst(stock, batched) > 1e-3
    assert (dropped > 0).any()
    with thresher.simulated_drops():
        simulated, simulated_trace = traced(model, inputs)
    assert worst(batched, simulated) <= CLOSE
    assert torch.equal(dropped, simulated_trace.dropped_at())
    assert trace.reads == simulated_trace.reads
    mask = inputs["attention_mask"]
    for row in range(len(LENGTHS)):
        single, single_trace = traced(model, alone(inputs, row))
        assert worst(row_of(batched, mask, row), single) <= CLOSE
        assert torch.equal(dropped[row][mask[row].bool()], single_trace.dropped_at()[0])


@every_method
@every_family
def test_drops_are_final_counted_and_spare_the_first_token(family: str, method: str) -> None:
    inputs = batch(family)
    model = thresher.attach(make(family, "token"), configured(method))
    _, trace = traced(model, inputs)
    gone = [index for _, flat in trace.dropped for index in flat.tolist()]
    assert len(gone) == len(set(gone)) > 0
    dropped = trace.dropped_at()
    mask = inputs["attention_mask"].bool()
    assert torch.equal(dropped == -1, ~mask)
    assert (dropped[:, 0] == 0).all()
    point = CONFIGS[method].point
    after_attention = family != "modernbert"
    for layer, (read, fed) in enumerate(trace.reads, start=1):
        before = ((dropped == 0) | (dropped >= layer)).sum(1).tolist()
        after = ((dropped == 0) | (dropped > layer)).sum(1).tolist()
        assert read == (after if point is Point.BEFORE_LAYER else before)
        assert fed == (after if after_attention or point is Point.BEFORE_LAYER else before)
    assert trace.original == list(LENGTHS)


@every_method
@every_family
def test_a_row_does_not_depend_on_its_batch_mates_or_their_order(family: str, method: str) -> None:
    model = thresher.attach(make(family, "token"), configured(method))
    inputs = batch(family)
    outputs, trace = traced(model, inputs)
    order = [2, 0, 3, 1]
    shuffled = {name: value[order] for name, value in inputs.items()}
    again, trace_again = traced(model, shuffled)
    for at, row in enumerate(order):
        mine = row_of(outputs, inputs["attention_mask"], row)
        assert worst(mine, row_of(again, shuffled["attention_mask"], at)) <= CLOSE
    assert torch.equal(trace.dropped_at()[order], trace_again.dropped_at())
    others = batch(family, (12, 3, 8), seed=7, width=14)
    joined = {name: torch.cat([value[:1], others[name]]) for name, value in inputs.items()}
    mixed, mixed_trace = traced(model, joined)
    assert worst(row_of(outputs, inputs["attention_mask"], 0), row_of(mixed, joined["attention_mask"], 0)) <= CLOSE
    assert torch.equal(trace.dropped_at()[0], mixed_trace.dropped_at()[0])


@every_method
@every_family
def test_padding_changes_nothing(family: str, method: str) -> None:
    model = thresher.attach(make(family, "token"), configured(method))
    outputs, trace = traced(model, batch(family))
    wide, wide_trace = traced(model, batch(family, width=20))
    assert worst(outputs, wide) <= CLOSE
    assert torch.equal(trace.dropped_at(), wide_trace.dropped_at()[:, :14])
    if family in ("modernbert", "mpnet", "roberta", "xlm-roberta", "camembert"):  # positions do not count the padding
        left, left_trace = traced(model, batch(family, side="left"))
        assert worst(outputs, left) <= CLOSE
        mask = batch(family)["attention_mask"].bool()
        assert torch.equal(
            trace.dropped_at()[mask], left_trace.dropped_at()[batch(family, side="left")["attention_mask"].bool()]
        )


@every_method
def test_the_same_twice(method: str) -> None:
    inputs = batch("bert")
    model = thresher.attach(make("bert"), configured(method))
    first, trace = traced(model, inputs)
    torch.manual_seed(99)
    second, trace_again = traced(model, inputs)
    assert worst(first, second) == 0.0
    assert torch.equal(trace.dropped_at(), trace_again.dropped_at())


@every_method
@pytest.mark.parametrize("family", WITH_SEGMENTS)
@pytest.mark.parametrize("segment", [0, 1])
def test_a_protected_segment_is_never_dropped(segment: int, family: str, method: str) -> None:
    inputs = batch(family)
    inside = (segments_of(family, inputs) == segment) & inputs["attention_mask"].bool()
    model = thresher.attach(make(family, "token"), configured(method))
    _, trace = traced(model, inputs)
    assert (trace.dropped_at()[inside] > 0).any()  # it would be
    thresher.attach(model, configured(method, protect_segments=(segment,), strength=2.0))
    batched, trace = traced(model, inputs)
    dropped = trace.dropped_at()
    assert (dropped[inside] == 0).all()
    assert (dropped[~inside & inputs["attention_mask"].bool()] > 0).any()
    with thresher.simulated_drops():
        simulated, simulated_trace = traced(model, inputs)
    assert torch.equal(dropped, simulated_trace.dropped_at())
    assert worst(batched, simulated) <= CLOSE


@pytest.mark.parametrize("head", ["token", "question-answering"])
def test_protecting_a_segment_nobody_can_tell_is_refused(head: str) -> None:
    """DistilBERT has no token types and its configuration names no separator."""
    model = thresher.attach(make("distilbert", head), thresher.AttentionMass(protect_segments=(0,)))
    with pytest.raises(OptionError, match="protect_segments"):
        model(**batch("distilbert"))
    with thresher.keep_everything():
        model(**batch("distilbert"))


@pytest.mark.parametrize("family", WITH_TYPES)
def test_protecting_a_segment_without_token_types_is_refused(family: str) -> None:
    inputs = batch(family)
    del inputs["token_type_ids"]
    model = thresher.attach(make(family, "token"), thresher.AttentionMass(protect_segments=(0,)))
    with pytest.raises(OptionError, match="token_type_ids"):
        model(**inputs)


@every_family
def test_protecting_ids_that_were_embedded_by_the_caller_is_refused(family: str) -> None:
    model, inputs = make(family, "token"), batch(family)
    inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids")).detach()
    thresher.attach(model, thresher.AttentionMass(protect_ids=(SEP,)))
    with pytest.raises(OptionError, match="protect_ids"):
        model(**inputs)


@every_method
@every_family
def test_protected_ids_are_never_dropped(family: str, method: str) -> None:
    inputs = batch(family)
    ids = (SEP, int(inputs["input_ids"][0, 2]), int(inputs["input_ids"][2, 5]))
    inside = torch.isin(inputs["input_ids"], torch.tensor(ids)) & inputs["attention_mask"].bool()
    model = thresher.attach(make(family, "token"), configured(method, protect_ids=ids, strength=2.0))
    _, trace = traced(model, inputs)
    dropped = trace.dropped_at()
    assert (dropped[inside] == 0).all()
    assert (dropped > 0).any()


@every_method
@every_family
def test_strength_zero_is_stock(family: str, method: str) -> None:
    inputs = batch(family)
    model = make(family, "token")
    stock = outputs_of(model, inputs)
    thresher.attach(model, configured(method, strength=0.0))
    outputs, trace = traced(model, inputs)
    assert worst(stock, outputs) <= 1e-5
    assert not (trace.dropped_at() > 0).any()
    assert speedup([trace], policy_of(model).geometry) == pytest.approx(1.0)


@every_method
@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_more_strength_reads_less(family: str, method: str) -> None:
    inputs = batch(family, (20, 31, 12, 8), width=31)
    model = make(family, "token")
    ratios = []
    for strength in (0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 32.0):
        thresher.attach(model, configured(method, strength=strength))
        _, trace = traced(model, inputs)
        ratios.append(speedup([trace], policy_of(model).geometry))
    assert all(a <= b + 1e-9 for a, b in pairwise(ratios)), ratios
    assert ratios[-1] > 1.1 * ratios[1]


@every_method
def test_wrong_settings_are_refused(method: str) -> None:
    with pytest.raises(OptionError, match="strength"):
        CONFIGS[method](strength=-1.0)
    with pytest.raises(OptionError, match="strength"):
        CONFIGS[method](strength=math.nan)
    with pytest.raises(OptionError, match=r"protect_idz.*protect_ids"):
        CONFIGS[method].from_dict({"protect_idz": [1]})


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (thresher.AttentionMass, {"retention": (0.5, 0.6)}),
        (thresher.AttentionMass, {"retention": ()}),
        (thresher.AttentionMass, {"retention": (0.0,)}),
        (thresher.AttentionMass, {"retention": (1.5,)}),
        (thresher.AttentionMass, {"min_tokens": 0}),
        (thresher.CascadeTopK, {"keep_rate": 0.0}),
        (thresher.CascadeTopK, {"keep_rate": 1.1}),
        (thresher.RisingThreshold, {"threshold": -0.1}),
        (thresher.RelativeThreshold, {"threshold": 1.1}),
        (thresher.LTP, {"temperature": 0.0}),
        (thresher.LTP, {"penalty": -1.0}),
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(kind: type[PolicyConfig], values: dict[str, Any]) -> None:
    with pytest.raises(OptionError):
        kind(**values)


@every_method
def test_settings_survive_a_dictionary(method: str) -> None:
    config = configured(method, protect_ids=(1, 2), protect_segments=(0,), strength=0.5)
    assert type(config).from_dict(config.to_dict()) == config
    listed = {k: list(v) if isinstance(v, tuple) else v for k, v in config.to_dict().items()}
    assert type(config).from_dict(listed) == config


# What each method keeps, replayed on one row with explicit arithmetic.


@dataclass
class Replay:
    """A post-norm BERT on one row, token by token: states, who is left, and the states of those who left."""

    model: Any
    ids: Tensor

    def run(self, choose: Any) -> tuple[Tensor, list[int], dict[int, Tensor]]:
        """choose(layer, mass [n], diagonal [n], places) → the places that stay."""
        base = self.model.base_model
        with torch.no_grad():
            state = base.embeddings(input_ids=self.ids)[0]
            places = list(range(len(state)))
            left: dict[int, Tensor] = {}
            dropped = [0] * len(state)
            for number, layer in enumerate(base.encoder.layer, start=1):
                attended, probabilities = self.attention(layer.attention, state)
                n = len(places)
                mass = [float(probabilities[:, :, j].sum()) / (len(probabilities) * n) for j in range(n)]
                diagonal = [float(probabilities[:, j, j].sum()) / len(probabilities) for j in range(n)]
                staying = set(choose(number, mass, diagonal, list(places))) | {0}
                for place, vector in zip(places, attended, strict=True):
                    if place not in staying:
                        left[place], dropped[place] = vector, number
                index = [i for i, place in enumerate(places) if place in staying]
                places = [places[i] for i in index]
                attended = attended[index]
                state = layer.output(layer.intermediate(attended), attended)
            final = torch.zeros(len(dropped), state.shape[1])
            for place, vector in zip(places, state, strict=True):
                final[place] = vector
            for place, vector in left.items():
                final[place] = vector
        return final, dropped, left

    def attention(self, attention: Any, state: Tensor) -> tuple[Tensor, Tensor]:
        own = attention.self
        heads, size = own.num_attention_heads, own.attention_head_size
        split = lambda x: x.view(len(state), heads, size).transpose(0, 1)  # noqa: E731
        q, k, v = (split(part(state)) for part in (own.query, own.key, own.value))
        probabilities = torch.stack(
            [
                torch.stack([torch.softmax(k[h] @ q[h, i] / math.sqrt(size), 0) for i in range(len(state))])
                for h in range(heads)
            ]
        )
        context = torch.cat([probabilities[h] @ v[h] for h in range(heads)], dim=1)
        return attention.output(context, state), probabilities


LAYERS = 4
CURVE = (0.9, 0.55, 0.35, 0.15)


def best(values: list[float], places: list[int], count: int) -> list[int]:
    """The `count` places of the highest value, place 0 before all; ties to the earlier."""
    order = sorted(range(len(places)), key=lambda i: (places[i] != 0, -values[i], i))
    return [places[i] for i in order[:count]]


def chooser(config: PolicyConfig, n: int) -> Any:
    """The method in a few lines of plain Python."""
    if isinstance(config, thresher.CascadeTopK):
        rate, unpruned = config.keep_rate**config.strength, math.ceil(0.15 * LAYERS)
        curve = [1.0] * unpruned
        curve += [1 - (1 - rate) * i / (LAYERS - unpruned) for i in range(1, LAYERS - unpruned + 1)]
        return lambda layer, mass, diagonal, places: best(mass, places, max(1, round(n * curve[layer - 1])))
    if isinstance(config, thresher.RelativeThreshold):
        bar = config.threshold * config.strength
        return lambda layer, mass, diagonal, places: [
            p for p, m in zip(places, mass, strict=True) if m / max(mass) >= bar
        ]
    if isinstance(config, thresher.RisingThreshold | thresher.LTP):
        bar = config.threshold * config.strength
        return lambda layer, mass, diagonal, places: [
            p for p, m in zip(places, mass, strict=True) if m >= bar * layer / LAYERS
        ]
    counts = [max(1, round(n * f**config.strength)) for f in CURVE]
    if isinstance(config, thresher.FirstTokens):
        return lambda layer, mass, diagonal, places: best([-p for p in places], places, counts[layer - 1])
    if isinstance(config, thresher.LastTokens):
        return lambda layer, mass, diagonal, places: best(places, places, counts[layer - 1])
    assert isinstance(config, thresher.AttentionMass)
    if config.off_diagonal:
        return lambda layer, mass, diagonal, places: best(
            [m - d / len(places) for m, d in zip(mass, diagonal, strict=True)], places, counts[layer - 1]
        )
    return lambda layer, mass, diagonal, places: best(mass, places, counts[layer - 1])


@pytest.mark.parametrize("strength", [0.5, 1.0, 2.0])
@pytest.mark.parametrize(
    "config",
    [
        thresher.AttentionMass(retention=CURVE),
        thresher.AttentionMass(retention=CURVE, off_diagonal=True),
        thresher.FirstTokens(retention=CURVE),
        thresher.LastTokens(retention=CURVE),
        thresher.CascadeTopK(keep_rate=0.3),
        thresher.RisingThreshold(threshold=0.1),
        thresher.LTP(threshold=0.1),
        thresher.RelativeThreshold(threshold=0.35),
    ],
    ids=lambda c: c.method + ("-off-diagonal" if getattr(c, "off_diagonal", False) else ""),
)
def test_a_naive_replay_drops_the_same_tokens_and_leaves_them_their_last_state(
    config: PolicyConfig, strength: float
) -> None:
    """Drop-and-restore: for a head that reads every token, a dropped one holds the state it had when it was dropped."""
    config = config.replace(strength=strength)
    model = make("bert", "token", layers=LAYERS)
    (n,) = lengths = (17,)
    inputs = batch("bert", lengths, seed=3)
    inputs["token_type_ids"].zero_()
    final, dropped, left = Replay(model, inputs["input_ids"]).run(chooser(config, n))
    assert 0 < len(left) < n
    with torch.no_grad():
        expected = model.classifier(final)
    thresher.attach(model, config)
    outputs, trace = traced(model, inputs)
    assert trace.dropped_at()[0].tolist() == dropped
    torch.testing.assert_close(outputs["logits"], expected, rtol=0, atol=CLOSE)


@every_family
def test_the_mean_over_restored_tokens_is_the_mean_over_kept_ones(family: str) -> None:
    model = thresher.attach(make(family, "base"), "attention-mass")
    inputs = batch(family)
    with thresher.tracing(record=True) as traces, torch.no_grad():
        hidden = model(**inputs)[0]
    dropped, mask = traces[0].dropped_at(), inputs["attention_mask"]
    assert hidden.shape[:2] == mask.shape
    assert hidden[mask == 0].abs().sum() == 0
    for row in range(len(LENGTHS)):
        over_real = hidden[row][mask[row] == 1].mean(0)
        over_kept = hidden[row][dropped[row] == 0].mean(0)
        torch.testing.assert_close(over_real, over_kept, rtol=0, atol=1e-5)
    assert (hidden[2][dropped[2] > 0] == hidden[2][dropped[2] > 0][0]).all()


def test_modernbert_norms_what_was_dropped_like_what_was_kept() -> None:
    model = make("modernbert", "base")
    inputs = batch("modernbert", (12,))
    seen: list[Tensor] = []
    model.final_norm.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    token = make("modernbert", "token")
    thresher.attach(token, "attention-mass")
    token.model.final_norm.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    outputs_of(token, inputs)
    assert seen[-1].shape[1] == 12  # every token again, the dropped ones with the state they had
    thresher.attach(model, "attention-mass")
    outputs_of(model, inputs)
    assert seen[-1].shape[1] < 12  # nobody reads the dropped ones


def test_min_tokens_spares_short_rows() -> None:
    inputs = batch("bert", (30, 6, 3))
    model = thresher.attach(make("bert"), thresher.AttentionMass(min_tokens=5))
    _, trace = traced(model, inputs)
    assert [fed for _, fed in trace.reads][-1] == [5, 5, 3]


def test_retention_counts_are_absolute_when_written_so() -> None:
    inputs = batch("bert", (20,))
    model = thresher.attach(make("bert"), thresher.AttentionMass(retention=(0.75, 0.5, 0.05)))
    _, trace = traced(model, inputs)
    assert [fed for _, fed in trace.reads] == [[15], [10], [1]]


def test_random_tokens_differ_by_seed() -> None:
    inputs = batch("bert", (24,))
    one, other = (
        traced(thresher.attach(make("bert"), thresher.RandomTokens(seed=seed)), inputs)[1].dropped_at()
        for seed in (0, 1)
    )
    assert not torch.equal(one, other)


def test_cascade_keeps_the_first_layers_whole() -> None:
    geometry = Geometry(layers=12, hidden=8, heads=1, intermediate=8)
    curve = thresher.CascadeTopK(keep_rate=0.1).fractions(geometry)
    assert curve[:2] == (1.0, 1.0)
    assert curve[2] < 1.0
    assert curve[-1] == pytest.approx(0.1)
    steps = [a - b for a, b in pairwise(curve[1:])]
    assert steps == pytest.approx([0.09] * 10)


# LTP's two stages.


def soft(temperature: float, penalty: float = 0.1, threshold: float = 0.15, layers: int = 1) -> Any:
    model = thresher.attach(
        make("bert", "base", layers=layers), thresher.LTP(temperature=temperature, penalty=penalty, threshold=threshold)
    )
    policy_of(model).mode = "soft"
    return model


def test_the_soft_stage_scales_a_layers_output_by_the_sigmoid_of_the_distance() -> None:
    inputs = batch("bert", (9,))
    inputs["token_type_ids"].zero_()
    stock = make("bert", "base", layers=1)
    with torch.no_grad():
        plain = stock(**inputs)[0][0]
        _, probabilities = Replay(stock, inputs["input_ids"]).attention(
            stock.encoder.layer[0].attention, stock.embeddings(input_ids=inputs["input_ids"])[0]
        )
    mass = [sum(float(probabilities[h, i, j]) for h in range(4) for i in range(9)) / (4 * 9) for j in range(9)]
    model = soft(temperature=0.02, penalty=0.3)
    with thresher.tracing() as traces, torch.no_grad():
        got = model(**inputs)[0][0]
    masks = [1.0] + [1 / (1 + math.exp(-(m - 0.15) / 0.02)) for m in mass[1:]]
    assert 0.05 < min(masks) < 0.95 or len({round(m, 2) for m in masks}) > 2
    for j in range(9):
        torch.testing.assert_close(got[j], plain[j] * masks[j], rtol=0, atol=1e-5)
    loss = policy_of(model).auxiliary_loss(traces[0], {})
    assert loss is not None
    assert float(loss) == pytest.approx(0.3 * sum(masks) / 9, abs=1e-6)


def test_the_auxiliary_loss_is_the_mean_over_layers() -> None:
    model = soft(temperature=0.05, penalty=0.5, layers=3)
    with thresher.tracing() as traces, torch.no_grad():
        model(**batch("bert"))
    (masks,) = traces[0].auxiliary.values()
    assert len(masks) == 3
    loss = policy_of(model).auxiliary_loss(traces[0], {})
    assert loss is not None
    assert float(loss) == pytest.approx(0.5 * sum(float(m) for m in masks) / 3)
    policy_of(model).mode = "hard"
    assert policy_of(model).auxiliary_loss(traces[0], {}) is None


def test_the_soft_stage_keeps_every_token_and_teaches_every_threshold() -> None:
    inputs = batch("bert")
    model = soft(temperature=0.05, layers=3)
    with thresher.tracing(record=True) as traces:
        hidden = model(**inputs)[0]
    assert not (traces[0].dropped_at() > 0).any()
    policy = policy_of(model)
    loss = policy.auxiliary_loss(traces[0], {})
    assert loss is not None
    (pull,) = torch.autograd.grad(loss, policy.theta, retain_graph=True)
    assert (pull < 0).all()  # a higher threshold is a smaller mask
    # The sum of a normalised state, and of its squares, is the same whatever the state.
    (pull,) = torch.autograd.grad(hidden[:, 0, 0].sum(), policy.theta)
    assert pull[:2].abs().min() > 0
    assert pull[2] == 0


def test_the_mask_is_per_row() -> None:
    model = soft(temperature=0.05, layers=3)
    inputs = batch("bert")
    together = outputs_of(model, inputs)["last_hidden_state"]
    at = 0
    for row, n in enumerate(LENGTHS):
        single = outputs_of(model, alone(inputs, row))["last_hidden_state"]
        torch.testing.assert_close(together[at : at + n], single, rtol=0, atol=CLOSE)
        at += n


def test_a_cold_soft_mask_is_the_hard_decision() -> None:
    """On one layer, where softness has not yet changed what a later layer reads."""
    inputs = batch("bert", (16, 9, 12))
    mask = inputs["attention_mask"].bool()
    hard = thresher.attach(make("bert", "base", layers=1), thresher.LTP(threshold=0.08))
    _, trace = traced(hard, inputs)
    dropped = trace.dropped_at()[mask] > 0
    assert dropped.any()
    assert not dropped.all()
    cold = outputs_of(soft(temperature=1e-7, threshold=0.08), inputs)["last_hidden_state"]
    assert cold[dropped].abs().max() < 1e-6
    plain = outputs_of(make("bert", "base", layers=1), inputs)["last_hidden_state"]
    torch.testing.assert_close(cold[~dropped], plain[~dropped], rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_hard_stage_applies_what_was_learned(family: str) -> None:
    inputs = batch(family)
    model = thresher.attach(make(family, "token"), thresher.LTP(threshold=0.0))
    _, trace = traced(model, inputs)
    assert not (trace.dropped_at() > 0).any()
    with torch.no_grad():
        policy_of(model).theta.copy_(torch.tensor([0.0, 0.09, 0.3]))
    _, trace = traced(model, inputs)
    layers = {layer for layer, flat in trace.dropped if len(flat)}
    assert layers == {2, 3}
    with torch.no_grad():
        policy_of(model).theta.fill_(1.1)
    _, trace = traced(model, inputs)
    assert (trace.dropped_at() > 0).sum() == sum(LENGTHS) - len(LENGTHS)


def test_thresholds_start_rising_and_the_relative_ones_level() -> None:
    for kind in (thresher.LTP, thresher.RisingThreshold):
        policy = policy_of(thresher.attach(make("bert", layers=4), kind(threshold=0.2)))
        assert policy.theta.tolist() == pytest.approx([0.05, 0.1, 0.15, 0.2])
    policy = policy_of(thresher.attach(make("bert", layers=4), thresher.RelativeThreshold(threshold=0.2)))
    assert policy.theta.tolist() == pytest.approx([0.2] * 4)
    assert [name for name, _ in policy.named_parameters()] == []
    learned = policy_of(thresher.attach(make("bert", layers=4), "ltp"))
    assert [name for name, _ in learned.named_parameters()] == ["theta"]


def test_off_is_the_plain_packed_model() -> None:
    inputs = batch("bert")
    model = make("bert")
    stock = outputs_of(model, inputs)
    thresher.attach(model, "ltp")
    policy_of(model).mode = "off"
    assert worst(stock, outputs_of(model, inputs)) <= 1e-5


@pytest.mark.parametrize("family", POST_NORM)
def test_simulated_and_physical_gradients_agree(family: str) -> None:
    inputs = batch(family)
    gradients = []
    for simulate in (False, True):
        model = thresher.attach(make(family, "sequence"), "attention-mass")
        labels = torch.arange(len(LENGTHS)) % 3
        if simulate:
            with thresher.simulated_drops():
                model(**inputs, labels=labels).loss.backward()
        else:
            model(**inputs, labels=labels).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    physical, simulated = gradients
    assert set(physical) == set(simulated)
    for name, expected in physical.items():
        assert not simulated[name].isnan().any()
        scale = max(float(expected.abs().max()), 0.1)
        assert float((simulated[name] - expected).abs().max()) <= 1e-3 * scale, name


def test_batches_of_these_tests_say_what_they_promise() -> None:
    inputs = batch("roberta")
    assert inputs["attention_mask"].sum(1).tolist() == list(LENGTHS)
    assert (inputs["input_ids"][:, 0] == CLS).all()
    assert int(inputs["input_ids"].max()) < VOCABULARY
    assert set(segments_of("roberta", inputs)[2].tolist()) == {0, 1}
    assert FIRST_WORD > SEP
    assert build(config_of("bert"), seed=1).classifier.weight.ne(make("bert").classifier.weight).any()
