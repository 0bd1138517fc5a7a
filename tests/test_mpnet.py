"""MPNet computes attention in code of its own: what is particular to that, and to its bias by distance."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import thresher
from helpers import (
    CLS,
    FIRST_WORD,
    HEADS,
    HEADS_OF_ATTENTION,
    SEP,
    VOCABULARY,
    alone,
    batch,
    build,
    config_of,
    outputs_of,
    worst,
)
from thresher.backbones.mpnet import FARTHEST
from thresher.model import attachment_of

CLOSE = 1e-5
LONG = (300, 1, 170, 129, 40)


def encoder_of(model: Any) -> Any:
    return model.base_model.encoder


def wide(head: str = "token", *, layers: int = 2, spread: float = 1.5) -> Any:
    """A model that reads 318 tokens, its bias larger than its logits.

    Its other weights are smaller than those of `make`: over hundreds of tokens these would carry the stock model itself
    more than CLOSE away from its float64 self.
    """
    labels = 2 if head == "question-answering" else 3
    config = config_of("mpnet", layers, max_position_embeddings=320, num_labels=labels, initializer_range=0.15)
    model = transformers.MPNetForMaskedLM(config).eval() if head == "masked" else build(config, head)
    with torch.no_grad():
        encoder_of(model).relative_attention_bias.weight.normal_(0, spread)
    return model


@pytest.mark.parametrize("head", [*HEADS, "masked"])
@pytest.mark.parametrize("lengths", [LONG, (200, 200), (318,)], ids=str)
def test_keeping_everything_is_stock_over_long_distances(lengths: tuple[int, ...], head: str) -> None:
    model, inputs = wide(head), batch("mpnet", lengths)
    stock = outputs_of(model, inputs)
    thresher.attach(model)
    assert worst(stock, outputs_of(model, inputs)) <= CLOSE
    with thresher.stock():
        assert worst(stock, outputs_of(model, inputs)) == 0.0
    weight = encoder_of(model).relative_attention_bias.weight
    with torch.no_grad():
        weight[15].add_(3.0)  # keys at least FARTHEST before the query
    changed = outputs_of(model, inputs)
    assert worst(stock, changed) > 1e-2
    with thresher.stock():
        assert worst(changed, outputs_of(model, inputs)) <= CLOSE


def test_in_float64_nothing_but_the_last_digits_differs() -> None:
    model, inputs = wide("masked").double(), batch("mpnet", LONG)
    stock = outputs_of(model, inputs)
    assert worst(stock, outputs_of(thresher.attach(model), inputs)) <= 1e-12


@pytest.mark.parametrize("lengths", [(200, 200), (9, 14, 5)], ids=str)
@pytest.mark.parametrize("side", ["left", "right"])
def test_evidence_is_read_with_the_bias(side: str, lengths: tuple[int, ...]) -> None:
    """Stock attention probabilities of the first layer, averaged over heads and queries."""
    model, inputs = wide("base"), batch("mpnet", lengths, side=side)
    with torch.no_grad():
        maps = model(**inputs, output_attentions=True).attentions[0]
    thresher.attach(model, thresher.AttentionMass(retention=(0.5, 0.5)))
    policy = thresher.policy_of(model)
    seen = []
    act = policy.act
    policy.act = lambda point, layer, tokens, evidence, trace: (  # type: ignore[method-assign]
        seen.append(evidence) or act(point, layer, tokens, evidence, trace)  # type: ignore[func-returns-value]
    )
    outputs_of(model, inputs)
    mass = next(evidence.mass for evidence in seen if evidence.mass is not None)
    expected = []
    for row, mask in enumerate(inputs["attention_mask"].bool()):
        expected.append(maps[row][:, mask][:, :, mask].mean((0, 1)))
    torch.testing.assert_close(mass, torch.cat(expected), rtol=0, atol=CLOSE)


def test_a_dropped_token_leaves_the_distances_of_the_others_as_they_were() -> None:
    """The stock layers, given the kept rows and columns of the stock bias."""
    model, inputs = wide("token", layers=3), batch("mpnet", (230,), seed=4)
    thresher.attach(model, thresher.AttentionMass(retention=(0.6, 0.4, 0.2)))
    with thresher.tracing(record=True) as traces:
        said = outputs_of(model, inputs)["logits"]
    dropped_at = traces[0].dropped_at()[0]
    thresher.detach(model)
    encoder = encoder_of(model)
    with torch.no_grad():
        states = model.base_model.embeddings(input_ids=inputs["input_ids"])
        bias = encoder.compute_position_bias(states)
        final, kept = states.clone(), torch.arange(230)
        for number, layer in enumerate(encoder.layer, start=1):
            own = bias[:, :, kept][:, :, :, kept]
            final[:, kept] = attended = layer.attention(final[:, kept], None, own)[0]
            stays = (dropped_at[kept] == 0) | (dropped_at[kept] > number)
            kept, attended = kept[stays], attended[:, stays]
            final[:, kept] = layer.output(layer.intermediate(attended), attended)
        expected = model.classifier(final)[0]
    assert len(kept) == 46
    assert int(kept.diff().max()) > 5  # real gaps
    torch.testing.assert_close(said, expected, rtol=0, atol=2 * CLOSE)


@pytest.mark.parametrize("gaps", [1, 3])
def test_the_bias_is_the_models_own(gaps: int) -> None:
    model = wide("base")
    entrance = attachment_of(thresher.attach(model)).engine.entrance
    assert entrance.position_bias is not None
    bias = entrance.position_bias()
    positions = torch.arange(0, 300, gaps)
    (expected,) = encoder_of(model).compute_position_bias(torch.zeros(1, 300, 1))[:, :, ::gaps, ::gaps]
    assert torch.equal(bias(positions), expected)
    rows = torch.stack([positions, positions.flip(0)])
    assert bias(rows).shape == (2, HEADS_OF_ATTENTION, len(positions), len(positions))
    assert torch.equal(bias(rows)[0], expected)
    assert torch.equal(bias(rows)[1], expected.flip(1, 2))
    assert torch.equal(bias(positions + 7), expected)  # distances alone count
    assert torch.equal(bias(positions.int()), expected)
    far = bias(torch.tensor([0, FARTHEST, 10_000]))
    assert torch.equal(far[:, 0, 1], far[:, 0, 2])


class Largest(TorchDispatchMode):
    """The most elements that a tensor had."""

    found = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, tuple | list) else [out]:
            if isinstance(one, Tensor):
                self.found = max(self.found, one.numel())
        return out


def test_no_bias_of_the_whole_batch_is_made() -> None:
    model, inputs = thresher.attach(wide("base")), batch("mpnet", (60,) * 12)
    whole = 12 * HEADS_OF_ATTENTION * 60 * 60
    with Largest() as packed:
        outputs_of(model, inputs)
    with Largest() as padded, thresher.stock():
        outputs_of(model, inputs)
    assert padded.found >= whole
    assert packed.found <= max(whole // 12, 12 * 60 * 48)  # one row's bias, or the feed-forward's states


@pytest.mark.parametrize("policy", [None, "attention-mass"])
def test_the_bias_learns(policy: str | None) -> None:
    model, inputs = wide("sequence").train(), batch("mpnet", LONG)
    labels = torch.arange(len(LONG)) % 3
    weight = encoder_of(model).relative_attention_bias.weight
    model(**inputs, labels=labels).loss.backward()
    expected, weight.grad = weight.grad, None
    thresher.attach(model, policy)
    model(**inputs, labels=labels).loss.backward()
    assert weight.grad is not None
    assert (weight.grad[[15, 31]].abs() > 0).all()
    if policy is None:
        torch.testing.assert_close(weight.grad, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
    else:
        assert torch.isfinite(weight.grad).all()


def test_dropout_of_attention_is_on_in_training_only() -> None:
    model = build(config_of("mpnet", attention_probs_dropout_prob=0.5), "base")
    inputs = batch("mpnet")
    stock = outputs_of(model, inputs)
    thresher.attach(model)
    assert worst(stock, outputs_of(model, inputs)) <= CLOSE
    model.train()
    first, second = outputs_of(model, inputs), outputs_of(model, inputs)
    assert worst(first, second) > 1e-2


def test_autocast_stays_near() -> None:
    model, inputs = wide("sequence", spread=0.5), batch("mpnet", (40, 9))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        stock = outputs_of(model, inputs)
        got = outputs_of(thresher.attach(model), inputs)
    assert worst(stock, got) <= 0.25 * max(float(stock["logits"].float().std()), 1.0)


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_copies_and_pickles_use_their_own_bias(quantize: Any) -> None:
    inputs = batch("mpnet", (9, 14, 5))
    model = thresher.attach(wide(), "attention-mass", quantize=quantize)
    said = outputs_of(model, inputs)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert worst(said, outputs_of(other, inputs)) == 0.0
        with torch.no_grad():
            encoder_of(other).relative_attention_bias.weight.mul_(-1)
        assert worst(said, outputs_of(other, inputs)) > 1e-2
        with thresher.stock():
            assert worst(said, outputs_of(other, inputs)) > 1e-2
        thresher.detach(other)
        assert not any("forward" in vars(m) or "compute_position_bias" in vars(m) for m in other.modules())
        outputs_of(other, inputs)
    assert worst(said, outputs_of(model, inputs)) == 0.0


def test_an_attached_models_configuration_makes_and_saves_stock_models(tmp_path: Path) -> None:
    model = thresher.attach(wide("base"))
    inputs = batch("mpnet")
    fresh = type(model)(model.config).eval()
    fresh.load_state_dict(model.state_dict())
    with thresher.stock():
        assert worst(outputs_of(model, inputs), outputs_of(fresh, inputs)) == 0.0
    fresh.save_pretrained(tmp_path)
    assert "thresher" not in (tmp_path / "config.json").read_text()


def test_the_first_separator_ends_the_first_segment() -> None:
    words = [CLS, *range(FIRST_WORD, FIRST_WORD + 8), SEP, SEP, *range(20, 30), SEP]
    model = thresher.attach(wide(), thresher.AttentionMass(retention=(0.3, 0.1), protect_segments=(0,)))
    with thresher.tracing(record=True) as traces:
        outputs_of(model, {"input_ids": torch.tensor([words]), "attention_mask": torch.ones(1, len(words))})
    dropped = traces[0].dropped_at()[0]
    assert (dropped[:10] == 0).all()
    assert (dropped[10:] > 0).all()


def test_multiple_choice() -> None:
    model = transformers.MPNetForMultipleChoice(config_of("mpnet")).eval()
    flat = batch("mpnet", (9, 14, 5, 12))
    inputs = {name: value.view(2, 2, -1) for name, value in flat.items()}
    with torch.no_grad():
        stock = model(**inputs).logits
        thresher.attach(model)
        torch.testing.assert_close(model(**inputs).logits, stock, rtol=0, atol=CLOSE)
        thresher.attach(model, "attention-mass")
        assert (model(**inputs).logits - stock).abs().max() > 1e-3


def test_the_graph_gathers_the_bias_by_the_positions_that_are_left(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    pytest.importorskip("onnx", reason="onnx is not installed")
    policy = thresher.AttentionMass(retention=(0.6, 0.4, 0.2), protect_segments=(0,), strength=2.0)
    model, inputs = thresher.attach(wide(layers=3), policy), batch("mpnet", (200, 31, 1))
    assert thresher.export(model, tmp_path, max_length=250).difference <= CLOSE
    rows = [alone(inputs, row) for row in range(3)]
    outputs = thresher.Runner(tmp_path).run([{"input_ids": row["input_ids"][0].tolist()} for row in rows])
    for row, output in zip(rows, outputs, strict=True):
        with thresher.tracing(record=True) as traces:
            expected = outputs_of(model, row)["logits"]
        assert output.dropped_at.tolist() == traces[0].dropped_at()[0].tolist()
        np.testing.assert_allclose(output.answer, expected, atol=CLOSE)
    assert (outputs[0].dropped_at[101:] > 0).any()
    assert (outputs[0].dropped_at[:101] == 0).all()


# Inside sentence-transformers.


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A tiny scorer of pairs with its tokenizer."""
    pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    model = build(config_of("mpnet", num_labels=1))
    model.save_pretrained(tmp_path / "plain")
    names = ["[UNK]", "<pad>", "<s>", "</s>", "<mask>"] + [f"w{i}" for i in range(FIRST_WORD, VOCABULARY)]
    vocabulary = {name: i for i, name in enumerate(names)}
    transformers.MPNetTokenizer(vocab=vocabulary, model_max_length=46).save_pretrained(tmp_path / "plain")
    return tmp_path / "plain"


def test_a_cross_encoder(saved: Path, tmp_path: Path) -> None:
    from sentence_transformers import CrossEncoder

    pairs = [("w5 w6 w7 w8", " ".join(f"w{i}" for i in range(10, 30))), ("w9", "w11 w12")]
    model = CrossEncoder(str(saved), device="cpu")
    stock = model.predict(pairs)
    thresher.attach(model, thresher.AttentionMass(protect_segments=(0,)))
    assert thresher.validate(model, pairs).worst <= CLOSE
    with thresher.tracing(record=True) as traces:
        said = model.predict(pairs)
    assert not np.array_equal(said, stock)
    dropped = traces[0].dropped_at()
    longest = int((dropped >= 0).sum(1).argmax())
    assert (dropped[longest][:6] == 0).all()  # <s>, the first text and its separator
    assert (dropped[longest] > 0).any()
    model.save_pretrained(str(tmp_path / "model"))
    assert np.abs(thresher.load(tmp_path / "model", device="cpu").predict(pairs) - said).max() <= 1e-6


def test_a_sentence_transformer(saved: Path) -> None:
    from sentence_transformers import SentenceTransformer

    texts = ["w5 w6 w7 w8 w9 w10", "w11", " ".join(f"w{i}" for i in range(10, 40))]
    model = SentenceTransformer(str(saved), device="cpu")
    stock = model.encode(texts)
    thresher.attach(model, "attention-mass")
    assert thresher.validate(model, texts).worst <= CLOSE
    said = model.encode(texts)
    assert np.abs(said - stock).max() > 1e-2
    alone = np.concatenate([model.encode([text]) for text in texts])
    assert np.abs(said - alone).max() <= CLOSE
    thresher.detach(model)
    assert np.array_equal(model.encode(texts), stock)


def test_only_what_a_pass_replaces_is_replaced() -> None:
    model = wide("base")
    attention: nn.Module = encoder_of(model).layer[0].attention.attn
    hidden = torch.randn(2, 5, 32)
    with torch.no_grad():
        expected = attention(hidden)[0]
        bias = encoder_of(model).compute_position_bias(hidden)
        thresher.attach(model)
        assert torch.equal(attention(hidden)[0], expected)  # outside a pass: the model's own
        assert torch.equal(encoder_of(model).compute_position_bias(hidden), bias)
