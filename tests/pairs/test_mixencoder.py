"""MixEncoder against a naive reading of the paper that shares no code with it, and its settings one by one."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from helpers import CLS, SEP
from pairs.scoring import FAMILIES, TEXTS, scorer
from thresher.errors import OptionError
from thresher.pairs import MixEncoder

QUERY = [20, 21, 22, 23, 24]
VARIANTS: dict[str, dict[str, Any]] = {
    "a": {"k": 1, "layers": (-1,)},
    "b": {"k": 1, "layers": (-3, -2, -1)},
    "c": {"k": 2, "layers": (-3, -2, -1)},
    "C-strategy": {"k": 3, "layers": (1, 3), "strategy": "C"},
    "without-h": {"k": 2, "layers": (-2, -1), "use_h": False},
    "without-e": {"k": 2, "layers": (-2, -1), "use_e": False},
    "cosine": {"k": 2, "layers": (-2, -1), "similarity": "cosine"},
    "previous": {"k": 2, "layers": (-3, -1), "residual": "previous"},
    "classes": {"k": 2, "layers": (-1,), "classes": 3},
    "M-strategy": {"k": 2, "layers": (-2, -1), "strategy": "M"},
    "started-as-dual": {"k": 2, "layers": (-3, -1), "strategy": "M", "start": "dual", "similarity": "cosine"},
    "dual-without-h": {"k": 1, "layers": (-1,), "start": "dual", "use_h": False},
    "dual-without-e": {"k": 1, "layers": (-1,), "start": "dual", "use_e": False},
}


def parts(layer: Any) -> tuple[Any, ...]:
    """query, key, value, out, its norm, up, down, its norm, of a BERT or a DistilBERT layer."""
    if hasattr(layer, "ffn"):
        a, f = layer.attention, layer.ffn
        return a.q_lin, a.k_lin, a.v_lin, a.out_lin, layer.sa_layer_norm, f.lin1, f.lin2, layer.output_layer_norm
    a, o = layer.attention.self, layer.attention.output
    up, down = layer.intermediate.dense, layer.output
    return a.query, a.key, a.value, o.dense, o.LayerNorm, up, down.dense, down.LayerNorm


def layers_of(encoder: Any) -> list[Any]:
    return list(encoder.transformer.layer if hasattr(encoder, "transformer") else encoder.encoder.layer)


def heads(x: Tensor) -> list[Tensor]:
    return list(x.split(8, -1))  # 4 heads of 8


def rest(layer: Any, context: Tensor, residual: Tensor) -> Tensor:
    *_, out, norm, up, down, last = parts(layer)
    x = norm(out(context) + residual)
    return last(down(F.gelu(up(x))) + x)


def run_layer(layer: Any, x: Tensor) -> Tensor:
    """One sequence [n, D], written out."""
    q, k, v, *_ = parts(layer)
    found = []
    for a, b, c in zip(heads(q(x)), heads(k(x)), heads(v(x)), strict=True):
        found.append(torch.softmax(a @ b.T / math.sqrt(8), -1) @ c)
    return rest(layer, torch.cat(found, -1), x)


def embedded(encoder: Any, ids: list[int], vectors: Tensor | None = None) -> Tensor:
    words = encoder.get_input_embeddings()(torch.tensor([ids]))
    if vectors is not None:
        words = torch.cat([vectors.unsqueeze(0), words], 1)
    if hasattr(encoder, "transformer"):  # DistilBERT's
        return encoder.embeddings(None, words)[0]
    return encoder.embeddings(inputs_embeds=words)[0]


def naive(made: MixEncoder, query: list[int], candidate: list[int]) -> Tensor:
    """The score of one pair by equations 1 and 2, vector by vector."""
    encoder, config, layers = made.encoder, made.config, layers_of(made.encoder)
    # The candidate, alone.
    if config.strategy == "S":
        x = embedded(encoder, [*candidate, SEP], made.context)
        for layer in layers:
            x = run_layer(layer, x)
        e = x[: config.k]
    else:
        x = embedded(encoder, [CLS, *candidate, SEP])
        for layer in layers:
            x = run_layer(layer, x)
        if config.strategy == "C":
            e = torch.stack([torch.softmax(x @ code, 0) @ x for code in made.context])
        else:
            bounds = [math.floor(i * len(x) / config.k) for i in range(config.k + 1)]
            e = torch.stack([x[a:b].mean(0) for a, b in pairwise(bounds)])
    kept = e.mean(0)
    # The query, alone; at the interaction layers the candidate looks at what enters them.
    x = embedded(encoder, [CLS, *query, SEP])
    h = torch.zeros(32)
    wanted = sorted(n + 4 if n < 0 else n for n in config.layers)
    for number, layer in enumerate(layers, start=1):
        if number in wanted:
            interaction = made.interactions[wanted.index(number)]
            e, h = interact(interaction, layer, config, x, e, h)
        x = run_layer(layer, x)
    c = e.mean(0)
    if config.start == "dual":
        a, b = made.share
        h = x.mean(0) + a * h if config.use_h else x.mean(0)
        c = kept + b * c if config.use_e else kept
    elif not config.use_h:
        h = x[0]
    if config.classes:
        return made.head.mlp(torch.cat([h, c, (h - c).abs()]))
    return F.cosine_similarity(h, c, dim=0) if config.similarity == "cosine" else h @ c


def interact(interaction: Any, layer: Any, config: Any, x: Tensor, e: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    _, key, value, *_ = parts(layer)
    keys, values = heads(key(x)), heads(value(x))
    weight, bias = interaction.project.weight.split(32), interaction.project.bias.split(32)
    own = [e @ w.T + b for w, b in zip(weight, bias, strict=True)]
    new_e = e
    if config.use_e:
        rows = []
        for i in range(len(e)):
            found = []
            for q, k, v, mine, mine_v in zip(heads(own[0][i]), keys, values, heads(own[1]), heads(own[2]), strict=True):
                attention = torch.softmax(torch.cat([mine, k]) @ q / math.sqrt(8), 0)  # [K'; K]
                found.append(attention @ torch.cat([mine_v, v]))
            rows.append(rest(layer, torch.cat(found), e[i]))
        new_e = torch.stack(rows)
    if not config.use_h:
        return new_e, h
    pooled = e.mean(0)
    star = pooled @ weight[0].T + bias[0]
    maps = [torch.softmax(k @ q / math.sqrt(8), 0) for q, k in zip(heads(star), keys, strict=True)]
    context = torch.cat([m @ v for m, v in zip(maps, values, strict=True)])
    residual = torch.stack(maps).mean(0) @ x if config.residual == "attended" else h
    new = rest(layer, context, residual)
    gate = torch.sigmoid(interaction.gate(torch.cat([pooled, new, h])))
    return new_e, gate * new + (1 - gate) * h


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_against_the_equations(variant: str, family: str) -> None:
    made = scorer("mixencoder", family, **VARIANTS[variant])
    others = [x for x in (made.context, made.share) if x is not None]
    for parameter in (*made.interactions.parameters(), *others):  # not only where they begin
        parameter.add_(0.2 * torch.randn_like(parameter))
    candidates = [[30, 31], [40], [20, 41, 42, 43, 44, 45], [50, 51, 52]]
    cache = made.encode_candidates(candidates)
    expected = torch.stack([naive(made, QUERY, candidate) for candidate in candidates])
    torch.testing.assert_close(made.score(QUERY, cache, chunk=3), expected, rtol=1e-5, atol=1e-5)
    assert expected.std(0).min() > 1e-3


def test_published_shapes() -> None:
    """One [k, D] for a candidate; for a query the keys, values and states of each interaction layer, whatever N is."""
    made = scorer("mixencoder", **VARIANTS["c"])
    cache = made.encode_candidates(TEXTS)
    assert cache.block(0, 6).dense.shape == (6, 2, 32)
    (query,) = made.query_states(made.query_rows(["w20 w21 w22"])[0])
    assert [tuple(x.shape) for x in query] == [(4, 5, 8), (4, 5, 8), (5, 32)] * 3
    assert [tuple(i.project.weight.shape) for i in made.interactions] == [(96, 32)] * 3


def test_interaction_weights_begin_as_the_layers_own() -> None:
    made = scorer("mixencoder", **VARIANTS["a"])
    q, k, v, *_ = parts(layers_of(made.encoder)[-1])
    assert torch.equal(made.interactions[0].project.weight, torch.cat([q.weight, k.weight, v.weight]))
    assert torch.equal(made.context[0], made.encoder.get_input_embeddings().weight[CLS])
    dual = scorer("dual")  # with k = 1 in [CLS]'s place a candidate begins as the dual-encoder's
    torch.testing.assert_close(made.encode_candidates(TEXTS).data, dual.encode_candidates(TEXTS).data)


def test_without_its_share_it_is_a_dual_encoder() -> None:
    made = scorer("mixencoder", k=1, strategy="M", start="dual", similarity="cosine")
    assert made.context is None and made.share.tolist() == pytest.approx([0.2, 0.2])
    with torch.no_grad():
        made.share.zero_()
    dual = scorer("dual", pooling="mean", similarity="cosine")
    expected = dual.score(QUERY, dual.encode_candidates(TEXTS))
    torch.testing.assert_close(made.score(QUERY, made.encode_candidates(TEXTS)), expected)


def test_a_text_of_fewer_states_than_pieces() -> None:
    made = scorer("mixencoder", k=5, strategy="M")
    assert made.encode_candidates(["", "w9"]).lengths.tolist() == [5, 5]


def test_a_candidate_s_score_does_not_depend_on_the_others() -> None:
    made = scorer("mixencoder")
    cache = made.encode_candidates(TEXTS)
    alone = made.score(QUERY, cache.select([2]))
    torch.testing.assert_close(made.score(QUERY, cache)[2:3], alone, rtol=1e-6, atol=1e-5)


def test_layers_are_counted_from_either_end() -> None:
    first, last = scorer("mixencoder", layers=(1, 3)), scorer("mixencoder", layers=(-3, -1))
    assert first.numbers == last.numbers == (1, 3)
    with pytest.raises(OptionError, match="not different ones"):
        scorer("mixencoder", layers=(0,))


@pytest.mark.parametrize("use_h", [True, False])
def test_the_query_is_read_no_further_than_needed(use_h: bool) -> None:
    made = scorer("mixencoder", layers=(1,), use_h=use_h)
    seen: list[int] = []
    for number, layer in enumerate(layers_of(made.encoder), start=1):
        layer.register_forward_hook(lambda *_, number=number: seen.append(number))
    made.query_states(made.query_rows(["w20 w21"])[0])
    assert seen == ([] if use_h else [1, 2, 3])
