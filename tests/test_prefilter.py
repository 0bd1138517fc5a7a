"""Pairs that are dropped before the first layer: what is dropped, what stays as it was, and where the threshold comes from."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import thresher
from helpers import VOCABULARY, build, config_of, make, tokenizer
from thresher.errors import DataError, OptionError, TargetError
from thresher.measure.flops import dense_flops
from thresher.pairs import CrossConfig, CrossEncoder, DualConfig, DualEncoder, Prefilter, Reranker
from thresher.pairs.prefilter import FILTERED, MOST

LAYERS = 2
QUERY = "w20 w21 w22"
DOCUMENTS = ["w30 w31", "w20 w40 w41", "w42", "w22 w21 w20", "w43 w44 w45 w46", "w21", "w47 w48"]


def model(family: str = "bert", **extra: Any) -> Any:
    return build(config_of(family, LAYERS, **{"num_labels": 1, **extra}))


def prefilter(threshold: float = -1.0, keep: int = 1, family: str = "bert") -> Prefilter:
    return Prefilter(model(family), tokenizer(), threshold=threshold, keep=keep)


def ids_of(text: str) -> list[int]:
    return [int(word[1:]) for word in text.split()]


def similarity(encoder: Any, query: str, document: str) -> float:
    """One cosine after the other."""
    table = encoder.get_input_embeddings().weight.tolist()

    def cosine(a: list[float], b: list[float]) -> float:
        dot = sum(x * y for x, y in zip(a, b, strict=True))
        return dot / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))

    asked, offered = ids_of(query), ids_of(document)
    if not asked:
        return 1.0
    best = [max((cosine(table[q], table[d]) for d in offered), default=-1.0) for q in asked]
    return sum(best) / len(best)


words = st.lists(st.integers(5, VOCABULARY - 1), max_size=5).map(lambda ids: " ".join(f"w{i}" for i in ids))


@settings(max_examples=30)
@given(words, st.lists(words, max_size=5))
def test_a_similarity_is_the_mean_of_the_largest_cosines(query: str, documents: list[str]) -> None:
    made = SHARED
    got = made.similarities(query, documents)
    assert got.shape == (len(documents),)
    for one, document in zip(got.tolist(), documents, strict=True):
        assert one == pytest.approx(similarity(made.encoder, query, document), abs=1e-5)


SHARED = prefilter()


def test_embeddings_may_be_narrower_than_the_model() -> None:
    made = prefilter(family="albert")
    for one, document in zip(made.similarities(QUERY, DOCUMENTS).tolist(), DOCUMENTS, strict=True):
        assert one == pytest.approx(similarity(made.encoder, QUERY, document), abs=1e-5)


def plain_scores(encoder: Any, given: list[tuple[str, str]]) -> list[float]:
    """Pair after pair, by the model alone."""
    found = []
    for query, document in given:
        inputs = tokenizer()(query, document, return_tensors="pt")
        with torch.no_grad(), thresher.stock():
            found.append(float(encoder(**inputs).logits))
    return found


def test_what_passes_scores_as_before_and_the_rest_scores_lowest() -> None:
    given = [(QUERY, document) for document in DOCUMENTS]
    others = [("w43 w30", document) for document in DOCUMENTS[:4]]
    mixed = [pair for both in zip(given, others, strict=False) for pair in both] + given[4:]
    made = prefilter(keep=2)
    expected = plain_scores(made.model, mixed)
    assert np.allclose(made.predict(mixed), expected, atol=1e-4)
    cut = float(np.median(made.similarities(QUERY, DOCUMENTS)))
    made.threshold = cut
    got = made.predict(mixed).tolist()
    for query in (QUERY, "w43 w30"):
        own = [place for place, pair in enumerate(mixed) if pair[0] == query]
        near = {place: similarity(made.model, *mixed[place]) for place in own}
        always = sorted(own, key=lambda place: -near[place])[:2]
        for place in own:
            passes = place in always or near[place] >= cut - 1e-7
            assert got[place] == pytest.approx(expected[place] if passes else FILTERED, abs=1e-4)
    assert FILTERED in got
    assert min(expected) > FILTERED
    asked = [score for score, pair in zip(got, mixed, strict=True) if pair[0] == QUERY]
    assert made.passing(QUERY, DOCUMENTS).tolist() == [score != FILTERED for score in asked]


def test_ranking_keeps_the_models_order_and_puts_the_rest_behind_by_similarity() -> None:
    made = prefilter()
    before = [one["corpus_id"] for one in made.rank(QUERY, DOCUMENTS)]
    scores = made.predict([(QUERY, document) for document in DOCUMENTS])
    assert before == np.argsort(-scores, kind="stable").tolist()
    near = made.similarities(QUERY, DOCUMENTS)
    made.threshold = float(np.median(near))
    passing = set(np.flatnonzero(made.passing(QUERY, DOCUMENTS)).tolist())
    assert 1 < len(passing) < len(DOCUMENTS)
    after = made.rank(QUERY, DOCUMENTS, return_documents=True)
    assert [one["corpus_id"] for one in after][: len(passing)] == [place for place in before if place in passing]
    rest = [one["corpus_id"] for one in after][len(passing) :]
    assert rest == sorted(rest, key=lambda place: -near[place])
    assert all(one["text"] == DOCUMENTS[one["corpus_id"]] for one in after)
    assert made.rank(QUERY, DOCUMENTS, top_k=2) == [
        {name: one[name] for name in ("corpus_id", "score")} for one in after[:2]
    ]


def test_the_most_similar_always_pass_and_nothing_else_costs_a_layer() -> None:
    made = prefilter(threshold=MOST, keep=2)
    read: list[int] = []
    layer = next(m for name, m in made.encoder.named_modules() if name.endswith("layer.0"))
    layer.register_forward_hook(lambda module, args, output: read.append(len(args[0])))
    got = made.predict([(QUERY, document) for document in DOCUMENTS])
    best = np.argsort(-made.similarities(QUERY, DOCUMENTS), kind="stable")[:2].tolist()
    assert sorted(np.flatnonzero(got != FILTERED).tolist()) == sorted(best)
    assert sum(read) == 2
    alike = made.predict([(QUERY, "w30")] * 4)
    assert (alike != FILTERED).tolist() == [True, True, False, False]


def test_one_row_no_rows_and_texts_without_words() -> None:
    made = prefilter(threshold=MOST)
    expected = plain_scores(made.model, [(QUERY, "w30")])[0]
    assert float(made.predict((QUERY, "w30"))) == pytest.approx(expected, abs=1e-4)
    assert made.predict([(QUERY, "w30")]).shape == (1,)
    assert made.predict([]).shape == (0,)
    assert made.rank(QUERY, []) == []
    assert made.similarities(QUERY, ["", "w20"])[0] == -1.0
    assert made.similarities("", ["w20", ""]).tolist() == [1.0, 1.0]
    assert made.predict([(QUERY, ""), (QUERY, "w20")]).tolist()[0] == FILTERED
    with pytest.raises(DataError, match="text"):
        made.predict([(QUERY, 3)])


@pytest.mark.parametrize("kind", ["attached", "scorer", "reranker", "sentence-transformers"])
def test_every_cross_encoder_can_be_filtered(kind: str, tmp_path: Path) -> None:
    given = [(QUERY, document) for document in DOCUMENTS]
    inner: Any = model()
    if kind == "sentence-transformers":
        sentence_transformers = pytest.importorskip("sentence_transformers")
        inner.save_pretrained(tmp_path)
        tokenizer().save_pretrained(tmp_path)
        inner = sentence_transformers.CrossEncoder(str(tmp_path), device="cpu")
    if kind == "attached":
        inner = thresher.attach(inner, "ltp")
    if kind in ("scorer", "reranker"):
        inner = CrossEncoder(inner, tokenizer(), CrossConfig(max_query=20, max_candidate=20)).eval()
    if kind == "reranker":
        inner = Reranker(inner)
    made = Prefilter(inner, tokenizer() if kind == "attached" else None, keep=1)
    before = made.predict(given)
    made.threshold = float(np.median(made.similarities(QUERY, DOCUMENTS)))
    after, passing = made.predict(given), made.passing(QUERY, DOCUMENTS)
    assert 0 < passing.sum() < len(DOCUMENTS)
    assert np.allclose(after[passing], before[passing], atol=1e-5)
    assert (after[~passing] == FILTERED).all()


def test_flops_count_the_filter_and_what_it_saves() -> None:
    made = prefilter(keep=2)
    made.threshold = float(np.median(made.similarities(QUERY, DOCUMENTS)))
    found, passing = made.flops(QUERY, DOCUMENTS), made.passing(QUERY, DOCUMENTS)
    whole = [dense_flops(made.geometry, len(ids_of(QUERY)) + len(ids_of(text)) + 3) for text in DOCUMENTS]
    assert found.unfiltered == sum(whole)
    assert found.reading == sum(cost for cost, passes in zip(whole, passing, strict=True) if passes)
    different = len({number for text in DOCUMENTS for number in ids_of(text)})
    assert found.filtering == 2 * 32 * (3 * different + 3 + different)
    assert found.speedup == found.unfiltered / (found.filtering + found.reading)


# Calibration.


def rows(count: int = 12, candidates: int = 8, seed: int = 0) -> datasets.Dataset:
    """Queries whose right candidate mostly repeats some of their words."""
    draw, made = random.Random(seed), []
    for number in range(count):
        offered = [draw.sample(range(5, VOCABULARY), 3) for _ in range(candidates)]
        right = draw.randrange(candidates)
        query = draw.sample(range(5, VOCABULARY), 3)
        if number % 4:
            query[:2] = offered[right][:2]
        texts = [" ".join(f"w{i}" for i in ids) for ids in (query, *offered)]
        made.append({"query": texts[0], "candidates": texts[1:], "label": right})
    return datasets.Dataset.from_list(made)


def test_a_share_is_filtered() -> None:
    given, made = rows(), prefilter(keep=2)
    near = [made.similarities(row["query"], row["candidates"]).tolist() for row in given]
    able = sorted(value for one in near for value in sorted(one)[:-2])
    for share in (0.25, 0.5, 0.7):
        found = made.calibrate(given, share=share)
        wanted = math.ceil(share * 12 * 8)
        assert able[wanted - 1] < made.threshold == found.threshold <= able[wanted]
        passing = [made.passing(row["query"], row["candidates"]) for row in given]
        assert found.share == pytest.approx(1 - np.concatenate(passing).mean())
        assert found.share >= share
        assert all(one.sum() >= 2 for one in passing)
        costs = [made.flops(row["query"], row["candidates"]) for row in given]
        spent = sum(cost.filtering + cost.reading for cost in costs)
        assert found.speedup == sum(cost.unfiltered for cost in costs) / spent
        assert found.quality is None
    assert made.calibrate(given, share=0.0).share == 0.0
    assert made.calibrate(given, share=0.75).share == 0.75
    before = made.threshold
    with pytest.raises(TargetError, match=r"at most 0\.750"):
        made.calibrate(given, share=0.8)
    assert made.threshold == before


def reciprocal_rank(made: Prefilter, given: datasets.Dataset) -> float:
    total = 0.0
    for row in given:
        scores = made.predict([(row["query"], text) for text in row["candidates"]]).tolist()
        own = scores[row["label"]]
        total += 1 / sum(score >= own for score in scores)
    return total / len(given)


def test_a_loss_is_allowed() -> None:
    given, made = rows(12), prefilter(keep=1)
    with torch.no_grad():  # a model that ranks by the words that both have
        made.encoder.classifier.weight.mul_(5.0)
    before = reciprocal_rank(made, given)
    shares = []
    for loss in (0.02, 0.1, 0.5):
        found = made.calibrate(given, max_loss=loss)
        shares.append(found.share)
        assert found.baseline == pytest.approx(before)
        assert found.quality == pytest.approx(reciprocal_rank(made, given))
        assert found.quality >= before - loss - 1e-9
        assert made.threshold == found.threshold
    assert 0 < shares[0] <= shares[1] <= shares[2]
    by_recall = made.calibrate(given, max_loss=1.0, metric="R@3")
    assert by_recall.share == pytest.approx(7 / 8)  # whatever it costs: all but the one that is kept
    assert by_recall.baseline is not None


def test_no_threshold_that_filters_may_hold() -> None:
    texts = [{"query": "w20", "candidates": ["w20", "w21"], "label": 1}]
    made = prefilter(keep=1)
    with torch.no_grad():
        made.encoder.bert.embeddings.word_embeddings.weight[21] *= -1
    if made.predict([("w20", "w20"), ("w20", "w21")]).argmax() == 0:
        with torch.no_grad():
            made.encoder.classifier.weight.neg_()
            made.encoder.classifier.bias.neg_()
    with pytest.raises(TargetError, match="MRR at 1.0000"):
        made.calibrate(datasets.Dataset.from_list(texts), max_loss=0.0)
    assert made.threshold == -1.0


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ({}, "one target"),
        ({"share": 0.1, "max_loss": 0.1}, "one target"),
        ({"share": 1.1}, "share"),
        ({"max_loss": -0.1}, "max_loss"),
        ({"max_loss": 0.1, "metric": "MRX"}, "MRX"),
        ({"max_loss": 0.1, "metric": "R@0"}, "R@0"),
    ],
)
def test_targets_that_make_no_sense_are_refused(target: dict[str, Any], reason: str) -> None:
    with pytest.raises(OptionError, match=reason):
        prefilter().calibrate(rows(2), **target)


def test_rows_that_are_not_ranked_are_refused() -> None:
    pairs = datasets.Dataset.from_list([{"sentence1": "w20", "sentence2": "w21", "label": 1}])
    with pytest.raises(DataError, match="ranked"):
        prefilter().calibrate(pairs, share=0.5)


def test_what_it_does_not_serve_is_refused() -> None:
    with pytest.raises(OptionError, match="tokenizer"):
        Prefilter(model())
    with pytest.raises(OptionError, match="threshold"):
        Prefilter(model(), tokenizer(), threshold=1.5)
    with pytest.raises(OptionError, match="threshold"):
        Prefilter(model(), tokenizer(), threshold=math.nan)
    with pytest.raises(OptionError, match="keep"):
        Prefilter(model(), tokenizer(), keep=0)
    with pytest.raises(OptionError, match="has 3"):
        Prefilter(model(num_labels=3), tokenizer())
    with pytest.raises(OptionError, match="BertModel has no head"):
        Prefilter(make("bert", "base"), tokenizer())


@pytest.mark.parametrize(("query", "documents"), [(None, ["w5"]), ("w5", "w6 w7"), ("w5", None), (5, ["w6"])])
def test_ranking_takes_a_query_and_a_list(query: Any, documents: Any) -> None:
    with pytest.raises(DataError, match="rank takes a query and a list of documents"):
        Prefilter(model(), tokenizer()).rank(query, documents)


def test_a_dual_encoder_reads_no_pairs() -> None:
    dual = DualEncoder(make("bert", "base", LAYERS), tokenizer(), DualConfig(max_query=20, max_candidate=20))
    with pytest.raises(OptionError, match="reads queries and documents apart"):
        Prefilter(dual)
