"""Block-Skim against loops: blocks, labels, loss, what drops, what may be an answer, and blocks from the log-sum-exp."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import test_attention as base
import thresher
from helpers import SEP, alone, batch, dataset, decided, make, outputs_of, segments_of, tokenizer, traced, worst
from thresher import cuda
from thresher.errors import OptionError
from thresher.measure.flops import dense_flops, flops
from thresher.methods.block_skim import (
    LOGITS,
    PLACES,
    BlockPredictor,
    _crossing_means,
    _tiles,
    block_labels,
    predictor_accuracy,
)
from thresher.model import policy_of
from thresher.outputs import NO_ANSWER
from thresher.packed import PackedTokens
from thresher.parts.blocks import Blocks
from thresher.policy import Geometry, Point, Trace
from thresher.tasks.answering import QuestionTask
from thresher.training.learner import Learner
from thresher.training.stages import run_stage

CLOSE = 1e-4
SIZES = (31, 9, 22, 3)
NINTH = {"text": ["w12"], "answer_start": [4]}


def attached(family: str = "bert", head: str = "question-answering", **settings: Any) -> Any:
    settings = {"block": 4, "threshold": 0.5, **settings}
    return decided(thresher.attach(make(family, head), thresher.BlockSkim(**settings)))


def runs(n: int, size: int) -> list[range]:
    return [range(start, min(start + size, n)) for start in range(0, n, size)]


# Blocks.


@given(
    st.lists(st.integers(1, 12), min_size=1, max_size=4),
    st.integers(1, 6),
    st.booleans(),
    st.lists(st.lists(st.booleans(), min_size=12, max_size=12), min_size=4, max_size=4),
)
def test_what_is_left_of_whole_blocks_is_the_same_blocks(
    lengths: list[int], size: int, simulated: bool, drawn: list[list[bool]]
) -> None:
    """Dropped and cut again, twice: the tokens of every block are those of one block of the input."""
    width = max(lengths)
    mask = torch.tensor([[int(i < n) for i in range(width)] for n in lengths])
    tokens = PackedTokens.pack(torch.zeros(len(lengths), width, 1), mask, simulated=simulated)
    left = [[list(run) for run in runs(n, size)] for n in lengths]
    for turn in range(3):
        blocks = Blocks.of(tokens, size)
        there: list[list[tuple[int, int]]] = [[] for _ in range(blocks.number)]
        for row, column, block, alive in zip(
            tokens.layout.rows.tolist(),
            tokens.positions.tolist(),
            blocks.of_token.tolist(),
            [True] * len(tokens.positions) if tokens.alive is None else tokens.alive.tolist(),
            strict=True,
        ):
            if alive:
                there[block].append((row, column))
        found = [block for block in there if block]
        assert found == [[(row, c) for c in run] for row, cut in enumerate(left) for run in cut]
        assert simulated or len(found) == blocks.number
        for block, row in zip(there, blocks.rows.tolist(), strict=True):
            assert all(at == row for at, _ in block)
        least, greatest = blocks.ends(tokens.positions)
        for block, first, last in zip(there, least.tolist(), greatest.tolist(), strict=True):
            assert not block or (block[0][1], block[-1][1]) == (first, last)
        odd = blocks.any(tokens.positions % 2 == 1).tolist()
        assert all(not b or o == any(c % 2 for _, c in b) for b, o in zip(there, odd, strict=True))
        stays = [bool(there[i]) and (drawn[turn][i % 12] or (there[i][0][1] == 0)) for i in range(blocks.number)]
        kept = {place for block, stay in zip(there, stays, strict=True) if stay for place in block}
        tokens = tokens.keep(blocks.spread(torch.tensor(stays)))
        left = [[run for run in cut if (row, run[0]) in kept] for row, cut in enumerate(left)]


@pytest.mark.parametrize("block", [1, 2, 4, 32])
@pytest.mark.parametrize("window", [None, 1, 2, 6])
@pytest.mark.parametrize("lengths", base.LENGTHS, ids=str)
def test_blocks_from_a_log_sum_exp_are_those_of_the_maps(
    lengths: Sequence[int], window: int | None, block: int
) -> None:
    """What a GPU does with its kernel's log-sum-exp, here one computed row by row."""
    for change in (lambda tokens: tokens, base.halved) if window is None else (lambda tokens: tokens,):
        tokens = change(base.packed(lengths))
        q, k, v = base.qkv(tokens, seed=2)
        q, scale = q * 4, 0.3
        _, maps = base.naive(q, k, v, tokens, scale=scale, window=window)
        sums, at = [], 0
        for n in tokens.layout.sizes:
            logits = q[:, at : at + n] @ k[:, at : at + n].transpose(1, 2) * scale
            if window is not None:
                i = torch.arange(n)
                logits = logits.masked_fill((i[:, None] - i).abs() > window, -math.inf)
            sums.append(logits.logsumexp(-1))
            at += n
        got = cuda.diagonal_blocks(q, k, torch.cat(sums, 1), tokens.layout, block, scale, window)
        base.close(got, base.evidence_by_loops(maps, tokens, block)["blocks"])


# The predictor.


@pytest.mark.parametrize("side", [1, 2, 3, 4, 7, 32])
def test_the_predictor_is_the_papers_network(side: int) -> None:
    torch.manual_seed(0)
    heads, tiles = 3, torch.rand(5, 3, side, side)
    predictor = BlockPredictor(heads, side).eval()
    for norm in (predictor.norm1, predictor.norm2):
        norm.running_mean.uniform_(-0.1, 0.1)
        norm.running_var.uniform_(0.5, 2.0)
        norm.weight.data.uniform_(0.5, 2.0)
        norm.bias.data.uniform_(-0.5, 0.5)
    with torch.no_grad():
        got = predictor(predictor.features(tiles))
        for tile, said in zip(tiles, got, strict=True):
            x = tile
            for conv, norm in ((predictor.conv1, predictor.norm1), (predictor.conv2, predictor.norm2)):
                n = x.shape[1]
                y = torch.zeros(heads, n, n)
                for out in range(heads):
                    for i in range(n):
                        for j in range(n):
                            total = conv.bias[out].clone()
                            for di in (-1, 0, 1):
                                for dj in (-1, 0, 1):
                                    if 0 <= i + di < n and 0 <= j + dj < n:
                                        total += conv.weight[out, :, di + 1, dj + 1] @ x[:, i + di, j + dj]
                            y[out, i, j] = total
                scale = norm.weight / (norm.running_var + norm.eps).sqrt()
                y = ((y - norm.running_mean[:, None, None]) * scale[:, None, None] + norm.bias[:, None, None]).relu()
                if n > 1:
                    half = n // 2
                    y = y[:, : 2 * half, : 2 * half].reshape(heads, half, 2, half, 2).mean((2, 4))
                x = y
            x = torch.stack(
                [predictor.conv3.weight[:, :, 0, 0] @ x[:, i, j] for i in range(len(x[0])) for j in range(len(x[0]))], 1
            )
            x = (x + predictor.conv3.bias[:, None]).relu()
            expected = predictor.linear.weight @ x.flatten() + predictor.linear.bias
            torch.testing.assert_close(said, expected, rtol=1e-4, atol=1e-4)
    learning = predictor(predictor.features(tiles))  # what learns keeps norms and convolutions apart
    assert learning.requires_grad
    torch.testing.assert_close(learning, got, rtol=1e-5, atol=1e-5)


def test_one_value_a_channel_is_normed_by_what_was_seen() -> None:
    predictor = BlockPredictor(2, 1).train()
    assert not predictor(predictor.features(torch.rand(1, 2, 1, 1))).isnan().any()
    assert predictor.norm1.running_mean.abs().sum() == 0


def test_the_full_map_is_seen_by_its_tiles() -> None:
    torch.manual_seed(0)
    a = torch.rand(2, 5, 5)
    tiles = _tiles(a, 2)
    assert tiles.shape == (3, 3, 2, 2, 2)
    for i in range(3):
        for j in range(3):
            for y in range(2):
                for x in range(2):
                    row, column = 2 * i + y, 2 * j + x
                    expected = a[:, row, column] if row < 5 and column < 5 else torch.zeros(2)
                    assert torch.equal(tiles[i, j, :, y, x], expected)
    features, living = torch.rand(3, 3, 4, 1, 1), torch.tensor([1.0, 0.0, 1.0])
    got = _crossing_means(features, living)
    for i in range(3):
        expected = sum((features[i, j] + features[j, i]) / 2 for j in (0, 2)) / 2
        torch.testing.assert_close(got[i], expected)


# What drops.


@pytest.mark.parametrize("full_map", [False, True])
@pytest.mark.parametrize("family", ["bert", "roberta", "modernbert", "distilbert"])
@pytest.mark.parametrize("block", [1, 3, 4])
def test_whole_blocks_drop_three_ways_to_one_answer(block: int, family: str, full_map: bool) -> None:
    inputs = batch(family, SIZES)
    model = attached(family, block=block, full_map=full_map, strength=1.05)
    batched, trace = traced(model, inputs)
    dropped = trace.dropped_at()
    assert (dropped > 0).any()
    segments = segments_of(family, inputs) if family != "distilbert" else torch.zeros_like(dropped)
    for row, n in enumerate(SIZES):
        question = {i for i in range(n) if segments[row, i] == 0} if segments[row].any() else set()
        for run in runs(n, block):
            assert len({int(dropped[row, i]) for i in run}) == 1
            if run[0] == 0 or question & set(run):
                assert dropped[row, run[0]] == 0
    with thresher.simulated_drops():
        simulated, simulated_trace = traced(model, inputs)
    assert worst(batched, simulated) <= CLOSE
    assert torch.equal(dropped, simulated_trace.dropped_at())
    at = 0
    for row, n in enumerate(SIZES):
        single, single_trace = traced(model, alone(inputs, row))
        assert torch.equal(single_trace.dropped_at()[0], dropped[row, :n])
        assert worst({name: value[at : at + n] for name, value in batched.items()}, single) <= CLOSE
        at += n


def test_a_replay_layer_by_layer_decides_the_same() -> None:
    """The attention of the stock model over what is left, its squares on the diagonal, and the predictor's word."""
    from test_methods import Replay

    size, inputs = 4, batch("bert", (23,), seed=4)
    model = attached(head="token", block=size, threshold=0.49)
    policy = policy_of(model)
    question = {i for i in range(23) if segments_of("bert", inputs)[0, i] == 0}
    plain = Replay(make("bert", "token"), inputs["input_ids"])
    expected, places = [0] * 23, list(range(23))
    base_model = plain.model.base_model
    with torch.no_grad():
        state = base_model.embeddings(input_ids=inputs["input_ids"], token_type_ids=inputs["token_type_ids"])[0]
        for number, layer in enumerate(base_model.encoder.layer, start=1):
            attended, maps = plain.attention(layer.attention, state)
            gone: set[int] = set()
            for run in runs(23, size):
                here = [places.index(i) for i in run if i in places]
                if number == 3 or not here or run[0] == 0 or question & set(run):
                    continue
                tile = torch.zeros(1, 4, size, size)
                tile[0, :, : len(here), : len(here)] = maps[:, here][:, :, here]
                predictor = policy.predictors[number - 1]
                if float(predictor(predictor.features(tile)).softmax(1)[0, 1]) < 0.49:
                    gone |= set(run)
            for i in gone:
                expected[i] = number
            index = [at for at, i in enumerate(places) if i not in gone]
            places, attended = [places[at] for at in index], attended[index]
            state = layer.output(layer.intermediate(attended), attended)
    _, trace = traced(model, inputs)
    assert 0 < sum(e > 0 for e in expected) < 23
    assert trace.dropped_at()[0].tolist() == expected


@pytest.mark.parametrize(("threshold", "strength", "share"), [(0.0, 9.0, 0.0), (1.0, 0.1, 1.0), (1.0, 0.0, 0.0)])
def test_thresholds_at_their_ends(threshold: float, strength: float, share: float) -> None:
    inputs = batch("bert", SIZES)
    model = attached(threshold=threshold, strength=strength)
    _, trace = traced(model, inputs)
    dropped, passage = trace.dropped_at(), inputs["token_type_ids"] == 1
    open_to = torch.zeros_like(passage)
    for row, n in enumerate(SIZES):
        for run in runs(n, 4):
            open_to[row, list(run)] = bool(passage[row, list(run)].all()) and run[0] > 0
    assert torch.equal(dropped > 0, open_to if share else torch.zeros_like(open_to))
    if not share:
        policy = policy_of(model)
        assert flops(trace, policy.geometry, policy) == [dense_flops(policy.geometry, n) for n in SIZES]


def test_strength_is_a_power_of_the_odds() -> None:
    for strength in (0.5, 1.0, 2.0, 7.0):
        bar = thresher.BlockSkim(threshold=0.2, strength=strength).bar()
        assert math.exp(bar) == pytest.approx(0.25 * strength**4)
    assert thresher.BlockSkim(strength=0.0).bar() == -math.inf


def test_a_row_without_a_passage_and_a_block_larger_than_it() -> None:
    inputs = batch("bert", SIZES)
    model = attached(block=128, threshold=1.0)
    assert not (traced(model, inputs)[1].dropped_at() > 0).any()
    model = attached(threshold=1.0)
    inputs["token_type_ids"].zero_()
    dropped = traced(model, inputs)[1].dropped_at()  # one segment: all but the first token's block is the passage
    for row, n in enumerate(SIZES):
        assert dropped[row, :n].tolist() == [int(i >= 4) for i in range(n)]
    _, trace = traced(attached(threshold=1.0, head="sequence"), inputs)
    assert trace.reads[-1][0] == [min(n, 4) for n in SIZES]


def test_when_the_whole_passage_is_gone_the_question_stays() -> None:
    """The row then looks like one of a single segment, of which all could drop."""
    inputs = {name: value[:1] for name, value in batch("bert", (16,)).items()}
    inputs["token_type_ids"][0] = torch.tensor([0] * 8 + [1] * 8)
    inputs["input_ids"][0, 7] = SEP
    dropped = traced(attached(threshold=1.0), inputs)[1].dropped_at()
    assert dropped[0].tolist() == [0] * 8 + [1] * 8
    loose = traced(attached(threshold=1.0, keep_question=False), inputs)[1].dropped_at()
    assert loose[0].tolist() == [0] * 4 + [1] * 12


def test_only_the_layers_named_drop() -> None:
    inputs = batch("bert", SIZES)
    for layers, expected in (((2,), {2}), ((3,), {3}), ((), set()), (None, {1})):
        _, trace = traced(attached(threshold=1.0, layers=layers), inputs)
        assert set(trace.dropped_at().flatten().tolist()) - {0, -1} == expected
    with pytest.raises(OptionError, match=r"layer 4 .* 3"):
        attached(layers=(4,))


# What may be an answer.


@pytest.mark.parametrize("family", ["bert", "roberta", "modernbert", "distilbert", "mpnet"])
@pytest.mark.parametrize("simulated", [False, True])
def test_a_dropped_token_is_no_answer_and_the_loss_stays_sane(simulated: bool, family: str) -> None:
    inputs = batch(family, SIZES)
    model = attached(family, strength=1.05)
    spans = {"start_positions": torch.tensor([20, 5, 12, 0]), "end_positions": torch.tensor([22, 6, 12, 0])}
    kinds = thresher.simulated_drops() if simulated else torch.no_grad()
    with kinds, thresher.tracing(record=True) as traces:
        out = model(**inputs, **spans)
        as_tuple = model(**inputs, **spans, return_dict=False)
        bare = model(**inputs, return_dict=False)
    gone = traces[0].dropped_at() > 0
    assert gone.any()
    for name in ("start_logits", "end_logits"):
        assert (out[name][gone] == NO_ANSWER).all()
        assert (out[name][~gone] > NO_ANSWER / 2).all()
        assert out[name].exp().sum().isfinite()
    assert 0 < float(out.loss.detach()) < 50
    assert torch.equal(as_tuple[0], out.loss)
    assert torch.equal(as_tuple[1], out.start_logits)
    assert torch.equal(bare[1], out.end_logits)


def test_who_allows_answers_from_dropped_tokens_keeps_them_and_taking_off_restores() -> None:
    inputs = batch("bert", SIZES)
    model = make("bert", "question-answering")
    stock = outputs_of(model, inputs)
    thresher.attach(model, "attention-mass")
    assert all((value > NO_ANSWER / 2).all() for value in outputs_of(model, inputs).values())
    thresher.attach(model, thresher.BlockSkim(block=4, threshold=1.0))
    assert any((value == NO_ANSWER).any() for value in outputs_of(model, inputs).values())
    for apart in (thresher.keep_everything(), thresher.stock()):
        with apart:
            assert worst(stock, outputs_of(model, inputs)) <= CLOSE
    thresher.detach(model)
    assert "forward" not in model.__dict__
    assert worst(stock, outputs_of(model, inputs)) == 0.0


# Learning.


def labels_by_loops(places: list[list[int]], batch_: dict[str, Tensor], rows: list[list[int]]) -> list[bool]:
    """rows: for each block its columns."""
    out = []
    for (row, *_), columns in zip(places, rows, strict=True):
        relevant = False
        for column in columns:
            if "evidence" in batch_ and batch_["evidence"][row, column]:
                relevant = True
            if "start_positions" in batch_:
                start, end = int(batch_["start_positions"][row]), int(batch_["end_positions"][row])
                relevant = relevant or (start <= column <= end and not start == end == 0)
        out.append(relevant)
    return out


@given(st.data())
def test_labels_are_what_loops_find(data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(1, 11), min_size=1, max_size=3))
    size, width = data.draw(st.integers(1, 5)), max(lengths)
    given_: dict[str, Tensor] = {}
    if data.draw(st.booleans()):
        given_["evidence"] = torch.tensor([[data.draw(st.integers(0, 1)) for _ in range(width)] for _ in lengths])
    if not given_ or data.draw(st.booleans()):
        spans = [sorted((data.draw(st.integers(0, n)), data.draw(st.integers(0, n)))) for n in lengths]
        given_["start_positions"] = torch.tensor([s for s, _ in spans])
        given_["end_positions"] = torch.tensor([e for _, e in spans])
    cut = [(row, list(run)) for row, n in enumerate(lengths) for run in runs(n, size)]
    places = [[row, columns[0], columns[-1], 1] for row, columns in cut]
    got = block_labels(torch.tensor(places), given_)
    assert got.tolist() == labels_by_loops(places, given_, [columns for _, columns in cut])


SPANS = {"start_positions": torch.tensor([20, 0, 13, 0]), "end_positions": torch.tensor([24, 0, 13, 0])}


@pytest.mark.parametrize("beta", [None, 7.0])
@pytest.mark.parametrize("evidence", [False, True])
def test_the_loss_is_equation_three(evidence: bool, beta: float | None) -> None:
    inputs, given_ = batch("bert", SIZES), dict(SPANS)
    if evidence:
        given_["evidence"] = torch.zeros_like(inputs["input_ids"])
        given_["evidence"][0, 28] = given_["evidence"][1, 8] = 1
    model = attached(alpha=0.3, beta=beta).train()
    policy = policy_of(model)
    policy.mode = "soft"
    with thresher.tracing(record=True) as traces:
        out = model(**inputs, **SPANS)
    (trace,) = traces
    assert not (trace.dropped_at() > 0).any()
    cut = [(row, list(run)) for row, n in enumerate(SIZES) for run in runs(n, 4)]
    passage = [all(inputs["token_type_ids"][row, c] == 1 for c in columns) for row, columns in cut]
    labels = labels_by_loops([[row] for row, _ in cut], given_, [columns for _, columns in cut])
    counted = [label for label, inside in zip(labels, passage, strict=True) if inside]
    assert 0 < sum(counted) < len(counted)
    weight = beta or (len(counted) - sum(counted)) / sum(counted)
    expected = 0.0
    assert len(trace.auxiliary[LOGITS]) == 3
    for logits in trace.auxiliary[LOGITS]:
        parts = {True: 0.0, False: 0.0}
        for said, label, inside in zip(logits.detach(), labels, passage, strict=True):
            if inside:
                parts[label] -= float(said.log_softmax(0)[int(label)])
        norm = weight * sum(counted) + len(counted) - sum(counted)
        expected += (weight * parts[True] + parts[False]) / norm
    loss = policy.auxiliary_loss(trace, {**inputs, **given_})
    assert float(loss.detach()) == pytest.approx(0.3 * expected, rel=1e-5)
    assert policy.seen.tolist() == ([0, 0] if beta else [len(counted) - sum(counted), sum(counted)])
    policy.auxiliary_loss(trace, {**inputs, **given_})
    if beta is None:  # running over what was seen
        assert policy.seen.sum() == 2 * len(counted)
    learner = Learner(model, policy.stages()[0])
    learner.train()
    policy.seen.zero_()
    together = learner(**inputs, **given_)["loss"]
    assert float(together.detach()) == pytest.approx(float(out.loss.detach()) + 0.3 * expected, rel=1e-3)
    model.eval()
    outputs_of(model, inputs)
    policy.auxiliary_loss(trace, {**inputs, **given_})
    assert policy.seen.sum() == (0 if beta else len(counted))  # only training counts


def test_gradients_reach_every_predictor_and_the_attention_and_no_deeper_than_it_is_frozen() -> None:
    inputs = batch("bert", SIZES)
    for learning, moves in (("joint", True), ("frozen", False), ("skimming", True)):
        model = attached(learning=learning, threshold=0.3).train()
        policy = policy_of(model)
        (stage,) = policy.stages()
        policy.mode = stage.mode
        assert stage.learning_rate == 0 or moves
        learner = Learner(model, stage).train()
        with thresher.tracing(record=True) as traces:
            model(**inputs)
            policy.auxiliary_loss(traces[0], {**inputs, **SPANS}).backward()
        assert (traces[0].dropped_at() > 0).any() == (learning == "skimming")
        assert all(p.grad is not None and p.grad.isfinite().all() for p in policy.parameters())
        queries = [layer.attention.self.query.weight.grad for layer in model.bert.encoder.layer]
        queries = queries[:1] if learning == "skimming" else queries  # later layers may have no passage left
        assert all((g is not None and bool(g.abs().sum() > 0)) == moves for g in queries)
        assert learner(**inputs, **SPANS)["loss"].requires_grad


def test_a_batch_without_labels_or_passages() -> None:
    inputs = batch("bert", SIZES)
    model = attached(block=128).train()
    policy = policy_of(model)
    policy.mode = "soft"
    with thresher.tracing() as traces:
        model(**inputs)
    loss = policy.auxiliary_loss(traces[0], {**inputs, **SPANS})
    assert float(loss.detach()) == 0.0
    loss.backward()
    with pytest.raises(OptionError, match="start_positions"):
        policy.auxiliary_loss(traces[0], inputs)
    policy.mode = "hard"
    assert policy.auxiliary_loss(traces[0], inputs) is None


def test_it_learns_to_tell_where_the_answer_is_and_is_plain_without_its_policy() -> None:
    """The answer is a marked word; after some steps predictors find its block, and a trace says so."""
    torch.manual_seed(0)
    inputs = batch("bert", (31, 31, 31, 31, 31, 31), seed=1)
    starts = torch.tensor([17, 20, 23, 26, 28, 18])
    inputs["input_ids"][:, 16:30][inputs["input_ids"][:, 16:30] == 63] = 62
    inputs["input_ids"][torch.arange(6), starts] = 63
    given_ = {"start_positions": starts, "end_positions": starts}
    model = attached()
    policy = policy_of(model)
    policy.mode = "soft"
    learner = Learner(model, policy.stages()[0]).train()
    optimizer = torch.optim.Adam(learner.parameters(), lr=3e-3)
    for _ in range(40):
        optimizer.zero_grad()
        learner(**inputs, **given_)["loss"].backward()
        optimizer.step()
    learner.eval()
    assert not policy.training
    with thresher.tracing() as traces, torch.no_grad():
        model(**inputs)
    found = predictor_accuracy(traces[0], given_)
    assert len(found) == 3
    logits, places = traces[0].auxiliary[LOGITS][-1], traces[0].auxiliary[PLACES][-1]
    inside = [i for i, where in enumerate(places.tolist()) if where[3]]
    right = sum(
        (logits[i, 1] > logits[i, 0]).item() == (places[i, 1] <= starts[places[i, 0]] <= places[i, 2]).item()
        for i in inside
    )
    assert found[-1].right == right > 0.9 * len(inside)
    assert found[-1].blocks == len(inside)
    assert (found[-1].found, found[-1].relevant) == (6, 6)
    policy.mode = "hard"
    outputs, trace = traced(model, inputs)
    assert (trace.dropped_at() > 0).any()
    with thresher.stock():
        stock = outputs_of(model, inputs)
    thresher.detach(model)
    assert worst(stock, outputs_of(model, inputs)) == 0.0
    width = inputs["input_ids"].shape[1]
    assert torch.equal(outputs["start_logits"].view(6, width).argmax(1), stock["start_logits"].view(6, width).argmax(1))


@pytest.mark.parametrize("learning", ["joint", "frozen", "skimming"])
def test_a_stage_trains_on_rows_with_answers_and_evidence(learning: str, tmp_path: Any) -> None:
    rows = dataset(12, labels=None, low=16)
    lengths = [len(ids) for ids in rows["input_ids"]]
    types = [[0] * 6 + [1] * (n - 6) for n in lengths]
    rows = rows.remove_columns("token_type_ids").add_column("token_type_ids", types)
    rows = rows.add_column("start_positions", [9] * 12).add_column("end_positions", [10] * 12)
    rows = rows.add_column("evidence", [[0] * 12 + [1] * (n - 12) for n in lengths])
    model = thresher.attach(make("bert", "question-answering"), thresher.BlockSkim(block=2, learning=learning))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    policy = policy_of(model)
    learned = [p.detach().clone() for p in policy.parameters()]
    (stage,) = policy.stages()
    fast = replace(stage, batch_size=6, epochs=1.0, warmup=0.0)
    run_stage(model, fast, rows, tokenizer(), tmp_path, progress=False, use_cpu=True, precision="float32")
    assert policy.mode == "hard"
    passage = [range(n)[at : at + 2] for n in lengths for at in range(6, n, 2)]  # the question is three blocks
    relevant = sum(any(token in (9, 10) or token >= 12 for token in block) for block in passage)
    assert policy.seen.tolist() == [len(passage) - relevant, relevant]
    assert all(not torch.equal(p, q) for p, q in zip(policy.parameters(), learned, strict=True) if p.dim() > 1)
    same = [torch.equal(before[name], value) for name, value in model.state_dict().items()]
    assert all(same) == (learning == "frozen")
    thresher.save(model, tmp_path / "saved")
    back = thresher.load(tmp_path / "saved")
    inputs = batch("bert", SIZES)
    assert worst(outputs_of(model, inputs), outputs_of(back, inputs)) == 0.0
    assert torch.equal(policy_of(back).seen, policy.seen)


def test_the_policy_is_in_the_models_mode() -> None:
    model = attached()
    policy = policy_of(model)
    policy.train()
    outputs_of(model, batch("bert", SIZES))
    assert not policy.training
    model.train()(**batch("bert", SIZES))
    assert policy.training


def test_act_does_nothing_at_other_points() -> None:
    policy = policy_of(attached(head="base"))
    tokens = PackedTokens.pack(torch.zeros(1, 3, 2))
    for point in (Point.BEFORE_LAYER, Point.AFTER_LAYER):
        assert policy.act(point, 2, tokens, None, Trace()) is tokens


@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_after_a_fit_the_question_stays_also_where_tokens_have_no_types(family: str, tmp_path: Path) -> None:
    names = tokenizer()
    asked = [{"question": "w5 w6 w7 w8 w9 w10", "context": "w11 w12 w13 w14", "answers": NINTH} for _ in range(8)]
    rows = QuestionTask(48).encode(asked, names, labelled=True, training=True).rows
    options: dict[str, Any] = {"overrides": {"epochs": 1.0}, "progress": False, "precision": "float32"}
    model = make(family, "question-answering")
    thresher.fit(model, thresher.BlockSkim(block=2, threshold=1.0), rows, names, tmp_path, **options)
    given = names("w5 w6 w7 w8 w9 w10", "w11 w12 w13 w14", return_tensors="pt")
    if family == "distilbert":
        given.pop("token_type_ids")
    _, trace = traced(model, dict(given))
    assert [int(layer) > 0 for layer in trace.dropped_at()[0]] == [False] * 8 + [True] * 5


@pytest.mark.parametrize(
    "settings",
    [
        {"block": 0},
        {"block": 129},
        {"threshold": 1.1},
        {"threshold": math.nan},
        {"alpha": -0.1},
        {"beta": 0.0},
        {"learning": "both"},
        {"layers": (0,)},
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=next(iter(settings))):
        thresher.BlockSkim(**settings)


def test_its_work_is_a_hundredth_of_a_layers() -> None:
    """As the paper says, at BERT-base's sizes and 512 tokens."""
    geometry = Geometry(layers=12, hidden=768, heads=12, intermediate=3072)
    from thresher.methods import build

    policy = build(thresher.BlockSkim(), geometry)
    assert policy.overhead_flops(1, 512) * 100 < dense_flops(geometry, 512) / 12
    assert policy.overhead_flops(12, 512) == 0
