"""Every scorer on every family: alone, in a batch and in chunks the same; cached, saved, copied and under a policy as well."""

from __future__ import annotations

import copy
import math
import pickle
import threading
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import thresher
from helpers import FAMILIES as EVERY_FAMILY
from helpers import build, config_of, make, tokenizer
from pairs.scoring import FAMILIES, KINDS, QUERY, TEXTS, scorer
from thresher.errors import DataError, OptionError, UnsupportedModelError
from thresher.pairs import SCORERS, CrossConfig, CrossEncoder, DualEncoder, MixEncoderConfig, Reranker

each = pytest.mark.parametrize(("kind", "family"), [(k, f) for k in KINDS for f in FAMILIES])
every_kind = pytest.mark.parametrize("kind", KINDS)
NEEDS_OPENED = ("mixencoder", "deformer", "virt")


def close(a: Any, b: Any, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=tolerance, atol=tolerance)


@each
def test_alone_in_a_batch_and_in_chunks(kind: str, family: str) -> None:
    made = scorer(kind, family)
    cache = made.encode_candidates(TEXTS)
    scores = made.score(QUERY, cache)
    assert scores.shape == (len(TEXTS),) and scores.dtype is torch.float32
    assert scores.std() > 1e-3  # something to compare
    for chunk in (1, 2, 4, 100):
        close(made.score(QUERY, cache, chunk=chunk), scores, 1e-6 * max(1.0, float(scores.abs().max())))
    one_by_one = torch.cat([made.score(QUERY, made.encode_candidates([text])) for text in TEXTS])
    close(one_by_one, scores)
    close(made.score(QUERY, made.encode_candidates(TEXTS, batch_tokens=1)), scores)
    shuffled = [3, 0, 5, 1, 4, 2]
    close(made.score(QUERY, made.encode_candidates([TEXTS[i] for i in shuffled])), scores[shuffled])


@each
def test_what_training_computes_is_what_is_cached(kind: str, family: str) -> None:
    made = scorer(kind, family)
    expected = torch.stack([made.score(query, made.encode_candidates(TEXTS)) for query in (QUERY, "w30 w9")])
    rows, _ = made.query_rows([QUERY, "w30 w9"])
    block = made.candidate_states(made.candidate_rows(TEXTS)[0])
    got = torch.stack([made.match(query, block) for query in made.query_states(rows)])
    close(got.detach(), expected)
    with thresher.stock():  # padded, as Hugging Face runs it
        close(made.score(QUERY, made.encode_candidates(TEXTS)), expected[0])


@every_kind
def test_shapes_of_what_is_kept(kind: str) -> None:
    made = scorer(kind)
    cache = made.encode_candidates(["w10 w11", "w12 w13 w14"])
    tokens = {"colbert": [4, 5], "virt": [4, 5], "deformer": [3, 4], "cross": [2, 3], "mixencoder": [2, 2]}
    assert cache.lengths.tolist() == tokens.get(kind, [1, 1])
    assert cache.data.shape[1] == {"colbert": 128, "cross": 1}.get(kind, 32)
    assert cache.data.dtype is (torch.int32 if kind == "cross" else torch.float32)
    assert not cache.data.is_inference()


@every_kind
def test_token_ids_are_texts_already_read(kind: str) -> None:
    made = scorer(kind)
    cache = made.encode_candidates(["w10 w11", "w12"])
    again = made.encode_candidates([[10, 11], [12]])
    close(made.score([20, 21], again), made.score("w20 w21", cache), 0.0)


@each
def test_rank_and_predict(kind: str, family: str) -> None:
    made = scorer(kind, family)
    ids = ["a", "b", "c", "d", "e", "f"]
    cache = made.encode_candidates(TEXTS, ids)
    scores = made.score(QUERY, cache)
    best = made.rank(QUERY, cache)
    assert [name for name, _ in best] == [ids[i] for i in scores.argsort(descending=True)]
    assert [value for _, value in best] == sorted(scores.tolist(), reverse=True)
    assert made.rank(QUERY, cache, 2) == best[:2]
    assert made.rank(QUERY, cache, 99) == best  # k larger than N: all of them
    places = made.rank(QUERY, TEXTS, 3)
    assert [ids[place] for place, _ in places] == [name for name, _ in best[:3]]
    pairs = [(QUERY, TEXTS[2]), ("w9", TEXTS[0]), (QUERY, TEXTS[0]), (QUERY, TEXTS[2])]
    found = made.predict(pairs)
    assert isinstance(found, np.ndarray) and found.dtype == np.float32 and found.shape == (4,)
    close(found[[0, 2, 3]], scores[[2, 0, 2]])
    close(found[1:2], made.score("w9", made.encode_candidates([TEXTS[0]])))


def test_equal_scores_keep_their_order() -> None:
    made = scorer("dual")
    assert [name for name, _ in made.rank(QUERY, ["w9 w10"] * 20)] == list(range(20))


@every_kind
def test_where_a_reranker_is_expected(kind: str) -> None:
    made = scorer(kind)
    reranker = Reranker(made)
    pairs = [(QUERY, text) for text in TEXTS]
    scores = reranker.predict(pairs, batch_size=2, show_progress_bar=False)
    close(scores, made.predict(pairs), 0.0)
    close(reranker.predict([QUERY, TEXTS[0]]), scores[0])
    ranked = reranker.rank(QUERY, TEXTS, top_k=2, return_documents=True)
    assert [one["corpus_id"] for one in ranked] == np.argsort(-scores)[:2].tolist()
    assert [one["text"] for one in ranked] == [TEXTS[one["corpus_id"]] for one in ranked]
    assert set(reranker.rank(QUERY, TEXTS)[0]) == {"corpus_id", "score"}
    close(reranker.predict(inputs=pairs), scores, 0.0)
    close(reranker.predict(sentences=np.array(pairs)), scores, 0.0)
    close(reranker.predict(iter(pairs)), scores, 0.0)
    tensors = torch.from_numpy(scores)
    close(reranker.predict(pairs, activation_fn=torch.sigmoid), tensors.sigmoid().numpy(), 0.0)
    assert torch.equal(reranker.predict(pairs, convert_to_tensor=True), tensors)
    assert [float(one) for one in reranker.predict(pairs, convert_to_numpy=False)] == tensors.tolist()
    turned = reranker.rank(QUERY, TEXTS, top_k=1, activation_fn=torch.neg)
    assert turned == [{"corpus_id": int(scores.argmin()), "score": pytest.approx(-float(scores.min()), rel=1e-6)}]
    for wrong in ([("a", "b", "c")], ["a", "b", "c"], [None], None, "ab", 5):
        with pytest.raises(DataError, match="a query and a candidate"):
            reranker.predict(wrong)
    for top_k in (0, -1, 1.5):
        with pytest.raises(OptionError, match="at least 1"):
            reranker.rank(QUERY, TEXTS, top_k=top_k)
    nothing = reranker.predict([])
    assert (nothing.shape, nothing.dtype, reranker.rank(QUERY, [])) == ((0,), np.float32, [])


def test_a_reranker_of_several_classes_has_logits_of_none() -> None:
    reranker = Reranker(scorer("dual", classes=3))
    assert reranker.predict([]).shape == (0, 3) and reranker.predict([(QUERY, "w9")]).shape == (1, 3)
    shares = reranker.predict([(QUERY, "w9"), (QUERY, "w8")], apply_softmax=True)
    np.testing.assert_allclose(shares.sum(1), 1.0, rtol=1e-6)


@each
def test_a_policy_reduces_queries_and_never_what_is_cached(kind: str, family: str) -> None:
    made = scorer(kind, family)
    before, plain = made.encode_candidates(TEXTS), made.score(QUERY, made.encode_candidates(TEXTS))
    thresher.attach(made.encoder, thresher.AttentionMass(retention=(0.7, 0.5, 0.3)))
    cache = made.encode_candidates(TEXTS)
    close(cache.data, before.data)
    reduced = made.score(QUERY, cache)
    assert (reduced - plain).abs().max() > 1e-3
    rows, _ = made.query_rows(["w9", QUERY, "w30 w31"])
    with torch.no_grad():
        batched = made.match(made.query_states(rows)[1], made.candidate_states(made.candidate_rows(TEXTS)[0]))
    close(batched, reduced)
    with thresher.simulated_drops():
        close(made.score(QUERY, cache), reduced)
    with thresher.keep_everything():
        close(made.score(QUERY, cache), plain)


@pytest.mark.parametrize("policy", ["ase", "ltp", "attention-mass", "transkimmer"])
@every_kind
def test_every_policy_composes(kind: str, policy: str) -> None:
    made = scorer(kind)
    assert thresher.attach(made, policy) is made
    scores = made.score(QUERY, made.encode_candidates(TEXTS))
    assert scores.isfinite().all()
    with thresher.simulated_drops():
        close(made.score(QUERY, made.encode_candidates(TEXTS)), scores)


def test_less_is_kept_of_a_reduced_query() -> None:
    made = scorer("colbert")
    rows, _ = made.query_rows([QUERY])
    assert len(made.query_states(rows)[0][0]) == 7
    thresher.attach(made.encoder, thresher.AttentionMass(retention=(0.5, 0.5, 0.5)))
    assert len(made.query_states(rows)[0][0]) == 4


@every_kind
def test_a_copy_scores_the_same_and_is_another_one(kind: str) -> None:
    made = scorer(kind)
    scores = made.score(QUERY, made.encode_candidates(TEXTS))
    again = copy.deepcopy(made)
    close(again.score(QUERY, again.encode_candidates(TEXTS)), scores, 0.0)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(1.1).add_(0.01)
    assert (made.score(QUERY, made.encode_candidates(TEXTS)) - scores).abs().max() > 1e-4
    close(again.score(QUERY, again.encode_candidates(TEXTS)), scores, 0.0)
    last = pickle.loads(pickle.dumps(again))
    close(last.score(QUERY, last.encode_candidates(TEXTS)), scores, 0.0)


def test_threads_do_not_disturb_each_other() -> None:
    made = scorer("mixencoder")
    cache = made.encode_candidates(TEXTS)
    queries = [QUERY, "w9", "w30 w31 w32", "w50 w7"]
    expected = {query: made.score(query, cache) for query in queries}
    wrong: list[str] = []

    def ask(query: str) -> None:
        for _ in range(5):
            if not torch.allclose(made.score(query, cache), expected[query], atol=1e-5):
                wrong.append(query)

    threads = [threading.Thread(target=ask, args=(query,)) for query in queries]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("kind", ["mixencoder", "deformer"])
def test_a_quantized_encoder_quantizes_what_interacts(kind: str) -> None:
    made = scorer(kind)
    cache = made.encode_candidates(TEXTS)
    exact = made.score(QUERY, cache)
    thresher.quantize(made.encoder)
    rounded = made.score(QUERY, cache)
    assert 0 < (rounded - exact).abs().max() < 0.3 * max(1.0, float(exact.abs().max()))


def test_blocks_that_lie_elsewhere() -> None:
    made = scorer("mixencoder")
    cache = made.encode_candidates(TEXTS)
    close(made.score_blocks(QUERY, iter([cache.block(0, 4), cache.block(4, 6)])), made.score(QUERY, cache))
    with pytest.raises(DataError, match="no candidates"):
        made.score_blocks(QUERY, [])


def test_two_scorers_may_share_an_encoder() -> None:
    first = scorer("mixencoder")
    cache = first.encode_candidates(TEXTS)
    scores = first.score(QUERY, cache)
    second = SCORERS["virt"](
        first.encoder, first.tokenizer, SCORERS["virt"].config_class(max_query=22, max_candidate=18)
    )
    assert second.score(QUERY, second.encode_candidates(TEXTS)).isfinite().all()
    close(first.score(QUERY, cache), scores, 0.0)


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "colbert"])
def test_classes(kind: str) -> None:
    made = scorer(kind, classes=3)
    cache = made.encode_candidates(TEXTS)
    logits = made.score(QUERY, cache)
    assert logits.shape == (len(TEXTS), 3)
    close(made.score(QUERY, cache, chunk=1), logits)
    assert made.predict([(QUERY, TEXTS[0])]).shape == (1, 3)
    with pytest.raises(OptionError, match="does not rank"):
        made.rank(QUERY, cache)
    one = scorer(kind, classes=1)
    assert one.score(QUERY, one.encode_candidates(TEXTS)).shape == (len(TEXTS),)


@pytest.mark.parametrize("kind", ["mixencoder", "dual", "poly", "virt"])
def test_cosine(kind: str) -> None:
    made = scorer(kind, similarity="cosine")
    scores = made.score(QUERY, made.encode_candidates(TEXTS))
    assert scores.abs().max() <= 1 + 1e-6 and scores.std() > 1e-4


def test_a_trained_cross_encoder_scores_as_its_own_forward() -> None:
    model = build(config_of("bert", num_labels=1))
    made = CrossEncoder(model, tokenizer(), CrossConfig(max_query=24, max_candidate=20))
    scores = made.score(QUERY, made.encode_candidates(TEXTS))
    inputs = tokenizer()([QUERY] * len(TEXTS), TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = build(config_of("bert", num_labels=1))(**inputs).logits.squeeze(1)
    close(scores, expected)
    with pytest.raises(OptionError, match="3 logits"):
        CrossEncoder(make("bert"), tokenizer(), CrossConfig(max_query=24, max_candidate=20))


@pytest.mark.parametrize("family", FAMILIES)
def test_an_opened_layer_computes_what_the_layer_does(family: str) -> None:
    """DeFormer with a candidate of nothing but its separator, and a query that holds all else, reads what the encoder reads."""
    made = scorer("deformer", family, lower=1)
    rows = [[2, 20, 21, 22, 3]]
    (query,) = made.query_states(rows)
    states = query[0]
    with torch.no_grad():
        block = type(made.candidate_states([[3]]))(states[3:], [2])
        *_, (joint, _) = made.upper([(states[:3],)], [block])
        expected = made.encoder(input_ids=torch.tensor(rows)).last_hidden_state[0]
    close(joint, expected)


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in NEEDS_OPENED])
@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_what_opens_no_layer_runs_on_every_family(kind: str, family: str) -> None:
    made = scorer(kind, family)
    scores = made.score(QUERY, made.encode_candidates(TEXTS))
    close(torch.cat([made.score(QUERY, made.encode_candidates([text])) for text in TEXTS]), scores)


@pytest.mark.parametrize("kind", NEEDS_OPENED)
@pytest.mark.parametrize("family", ["albert", "modernbert", "mpnet"])
def test_a_family_that_cannot_be_opened_is_named(kind: str, family: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"'{family}'.*roberta"):
        scorer(kind, family)


def test_presets() -> None:
    a, b, c = MixEncoderConfig.a(), MixEncoderConfig.b(), MixEncoderConfig.c(strategy="C")
    assert (a.k, a.numbers(12)) == (1, (12,))
    assert (b.k, b.numbers(12)) == (1, (10, 11, 12))
    assert (c.k, c.numbers(12), c.strategy) == (2, (10, 11, 12), "C")
    assert MixEncoderConfig() == a


def test_from_encoder(tmp_path: Any) -> None:
    make("bert", "base").save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    made = DualEncoder.from_encoder(tmp_path, max_query=20, max_candidate=18, policy="attention-mass")
    expected = scorer("dual")
    close(made.encode_candidates(TEXTS).data, expected.encode_candidates(TEXTS).data)
    with pytest.raises(thresher.ThresherError, match="There is no directory"):
        DualEncoder.from_encoder(tmp_path / "missing")
    assert math.isfinite(made.rank(QUERY, TEXTS)[0][1])
    assert isinstance(made.encoder, transformers.BertModel)
