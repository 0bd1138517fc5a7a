"""Agreement with human rationales: by hand, by loops, and from what an attached model reads."""

from __future__ import annotations

import re
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import thresher
from helpers import make, tokenizer
from thresher.errors import DataError, OptionError
from thresher.measure.rationales import (
    agreement,
    agreement_by_layer,
    kept_layers,
    overlap,
    rationale_maps,
    rationales_page,
    spans_of,
    top_share,
)
from thresher.tasks.rationales import RationaleRows, encode_rationales


def rows(*documents: tuple[int, list[list[int]]], **columns: Any) -> datasets.Dataset:
    """Documents of so many words with these rationales."""
    found = {
        "tokens": [[f"w{5 + (i * 7 + n) % 50}" for i in range(n)] for n, _ in documents],
        "label": [n % 2 for n, _ in documents],
        "rationales": [spans for _, spans in documents],
    }
    return datasets.Dataset.from_dict({**found, **columns})


def encoded(*documents: tuple[int, list[list[int]]], max_length: int | None = None) -> RationaleRows:
    return encode_rationales(rows(*documents), tokenizer(), max_length)


def with_ends(scores: list[float]) -> list[float]:
    """Scores of words as those of tokens, [CLS] and [SEP] being the most important."""
    return [99.0, *scores, 99.0]


def test_rationales_of_no_word_are_left_out_and_counted() -> None:
    found = encoded((6, [[4, 4], [0, 2], [6, 6]]), (3, [[1, 1]]))
    assert found.rationales == (((0, 2),), ())
    assert found.empty == 3


def test_documents_keep_their_words_spans_and_labels() -> None:
    found = encoded((6, [[4, 6], [0, 2], [0, 2]]), (3, []))
    assert found.rationales == (((0, 2), (4, 6)), ())
    assert [of.tolist() for of in found.word_of] == [[-1, 0, 1, 2, 3, 4, 5, -1], [-1, 0, 1, 2, -1]]
    assert found.rows["labels"][:] == [0, 1]
    assert [len(ids) for ids in found.rows["input_ids"]] == [8, 5]
    assert found.truncated == 0
    assert len(found) == 2


def test_words_of_several_tokens_have_the_largest_score_and_unread_ones_none() -> None:
    data = rows((5, [[0, 1]]))
    words = ["w6", "w7.", "w8", "w9", "w10"]  # the full stop is a token of its own
    found = encode_rationales(data.remove_columns("tokens").add_column("tokens", [words]), tokenizer(), 6)
    assert found.word_of[0].tolist() == [-1, 0, 1, 1, 2, -1]
    assert found.truncated == 1
    (scores,) = found.word_scores([[9, 1, 2, 5, 0, 9]])
    assert scores[:3].tolist() == [1, 5, 0]
    assert np.isnan(scores[3:]).all()


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"rationales": [[[0, 2]], [[1, 4]]]}, r"Row 2 .*\[1, 4\).*3 words"),
        ({"rationales": [[[0, 2]], [[-1, 2]]]}, r"Row 2 .*\[-1, 2\)"),
        ({"rationales": [[[2, 1]], []]}, r"Row 1 .*\[2, 1\)"),
        ({"rationales": [[[0, 1, 2]], []]}, r"Row 1 .*\[0, 1, 2\]"),
        ({"rationales": [[["a", "b"]], []]}, r"Row 1 .*start, end"),
        ({"rationales": [[[0, 2]], [[1.5, 2]]]}, r"Row 2 .*\[1.5, 2.0\]"),  # a column of one kind has floats everywhere
        ({"tokens": [["a"], []]}, r"Row 2 .*words"),
        ({"tokens": ["abc", "def"]}, r"Row 1 .*list"),
        ({"label": [0, None]}, r"Row 2 .*label"),
    ],
)
def test_rows_that_make_no_sense_are_refused_by_number(columns: dict[str, Any], said: str) -> None:
    data = {"tokens": [["a", "b", "c"]] * 2, "label": [0, 1], "rationales": [[[0, 1]], [[0, 1]]], **columns}
    with pytest.raises(DataError, match=said) as error:
        encode_rationales(datasets.Dataset.from_dict(data), tokenizer())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["tokens", "label", "rationales"])
def test_a_missing_column_is_named(name: str) -> None:
    with pytest.raises(DataError, match=name):
        encode_rationales(rows((3, [])).remove_columns(name), tokenizer())


def test_scores_that_do_not_fit_are_refused() -> None:
    found = encoded((3, [[0, 1]]), (4, [[0, 1]]))
    with pytest.raises(DataError, match="1 documents"):
        found.word_scores([[0.0] * 5])
    with pytest.raises(DataError, match="Row 2 .* 6 tokens"):
        found.word_scores([[0.0] * 5, [0.0] * 5])
    with pytest.raises(DataError, match="Row 1 .*finite"):
        found.word_scores([[0.0, np.nan, 0.0, 0.0, 0.0], [0.0] * 6])


def test_agreement_by_hand() -> None:
    """Ten words of which 1, 2 and 3, and 7, are reasons; the best four are 2, 3, 4 and 9."""
    data = encoded((10, [[1, 4], [7, 8]]))
    scores = [0.1, 0.2, 0.9, 0.8, 0.7, 0.0, 0.0, 0.3, 0.1, 0.6]
    found = agreement(data, [with_ends(scores)])
    assert found.documents == 1
    assert found.chance == pytest.approx(0.4)
    choice = found.choice
    assert choice.share == pytest.approx(0.4)  # as large as the rationale
    assert (choice.precision, choice.recall, choice.f1) == pytest.approx((2 / 4, 2 / 4, 0.5))
    # Stretches 2-4 and 9: the first meets 1-3 by 2 of 4 words, the second nothing: precision 1/2, recall 1/2.
    assert choice.iou_f1 == pytest.approx(0.5)
    # Ranked: 2 and 3 are right, 4 and 9 not, 7 right, 1 right: precision 1, 1, 3/5, 4/6 where recall rises by a quarter.
    assert found.average_precision == pytest.approx((1 + 1 + 3 / 5 + 4 / 6) / 4)


def test_a_perfect_score_and_a_constant_one() -> None:
    data = encoded((8, [[2, 4]]), (5, [[0, 5]]), (4, []))
    perfect = agreement(data, [with_ends([0, 0, 1, 1, 0, 0, 0, 0]), with_ends([1] * 5), with_ends([0] * 4)], share=0.25)
    assert (perfect.auprc, perfect.average_precision, perfect.documents) == (1.0, 1.0, 2)
    assert perfect.choice.recall == 1.0
    constant = agreement(data, [with_ends([3] * 8), with_ends([3] * 5), with_ends([3] * 4)])
    assert constant.average_precision == pytest.approx((2 / 8 + 1) / 2) == constant.chance


def test_what_was_not_read_is_last_or_left_out() -> None:
    data = encoded((8, [[1, 2], [3, 7]]), (9, [[7, 8]]), max_length=6)  # four words are read of each
    scores = [[9, 0, 1, 0, 0, 9], [9, 1, 1, 0, 1, 9]]
    whole = agreement(data, scores)
    assert whole.documents == 2
    assert whole.choice.recall < 0.5
    read = agreement(data, scores, unread="left out", share=0.25)
    assert read.documents == 1  # the other one's only reason is beyond what was read
    assert (read.choice.precision, read.choice.recall) == (1.0, 0.5)
    assert read.choice.iou_f1 == pytest.approx(2 * 1 * 0.5 / 1.5)
    with pytest.raises(OptionError, match="left out"):
        agreement(data, scores, unread="skipped")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="rationale"):
        agreement(encoded((3, [])), [with_ends([0, 1, 2])])


SPANS = st.lists(st.tuples(st.integers(0, 8), st.integers(1, 4)), max_size=3)
DOCUMENTS = st.lists(st.tuples(SPANS, st.lists(st.integers(0, 4), min_size=12, max_size=12)), min_size=1, max_size=3)


@given(DOCUMENTS, st.floats(0.05, 1.0))
def test_choices_by_loops_over_words(documents: list[tuple[list[tuple[int, int]], list[int]]], share: float) -> None:
    """Word F1 and IOU F1 with sets of words, as ERASER computes them."""
    spans = [[[start, start + size] for start, size in one] for one, _ in documents]
    if not any(spans):
        return
    data = encoded(*((12, one) for one in spans))
    found = agreement(data, [with_ends([float(s) for s in scores]) for _, scores in documents], share=share)
    of_words, precisions, recalls = [], [], []
    for given_spans, (_, scores) in zip(spans, documents, strict=True):
        wanted = {(a, b) for a, b in given_spans}
        if not wanted:
            continue
        truth = {i for a, b in wanted for i in range(a, b)}
        bar = sorted(scores, reverse=True)[max(round(share * 12), 1) - 1]
        least = min(scores)
        chosen = {i for i in range(12) if scores[i] >= bar and (scores[i] > least or max(scores) == least)}
        p, r = len(chosen & truth) / len(chosen), len(chosen & truth) / len(truth)
        of_words.append((p, r, 2 * p * r / (p + r) if p and r else 0.0))
        stretches, at = [], 0
        while at < 12:
            end = at
            while end in chosen:
                end += 1
            if end > at:
                stretches.append(set(range(at, end)))
            at = end + 1
        hits = 0
        for said in stretches:
            ious = [len(said & set(range(a, b))) / len(said | set(range(a, b))) for a, b in wanted]
            hits += max(ious) >= 0.5
        precisions.append(hits / len(stretches))
        recalls.append(hits / len(wanted))
    mean = lambda values: sum(values) / len(values)  # noqa: E731
    choice = found.choice
    assert (choice.precision, choice.recall, choice.f1) == pytest.approx([mean(x) for x in zip(*of_words, strict=True)])
    p, r = mean(precisions), mean(recalls)
    assert choice.iou_f1 == pytest.approx(2 * p * r / (p + r) if p and r else 0.0)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5)), min_size=2, max_size=15))
def test_average_precision_by_thresholds(words: list[tuple[bool, int]]) -> None:
    """Ties are one threshold: sum over falling thresholds of (rise of recall) * precision; and the trapezoids of AUPRC."""
    truth, scores = [t for t, _ in words], [float(s) for _, s in words]
    if not any(truth):
        return
    data = encoded((len(words), [[i, i + 1] for i, t in enumerate(truth) if t]))
    found = agreement(data, [with_ends(scores)])
    curve = []
    for bar in sorted(set(scores), reverse=True):
        chosen = [t for t, s in words if s >= bar]
        curve.append((sum(chosen) / sum(truth), sum(chosen) / len(chosen)))
    recall, area, trapezoids, precision = 0.0, 0.0, 0.0, 1.0
    for r, p in curve:
        area += (r - recall) * p
        trapezoids += (r - recall) * (p + precision) / 2
        recall, precision = r, p
    assert found.average_precision == pytest.approx(area)
    assert found.auprc == pytest.approx(trapezoids)


def test_stretches_and_overlaps() -> None:
    assert spans_of([]) == []
    assert spans_of([True, True, False, True]) == [(0, 2), (3, 4)]
    assert overlap((0, 4), (2, 6)) == pytest.approx(2 / 6)
    assert overlap((0, 2), (2, 4)) == 0.0
    assert overlap((3, 5), (3, 5)) == 1.0


def test_ties_are_not_broken_and_nothing_is_not_chosen() -> None:
    assert top_share(np.array([3.0, 2.0, 2.0, 1.0]), 0.5).tolist() == [True, True, True, False]
    assert top_share(np.array([3.0, 1.0, 1.0, 1.0]), 0.5).tolist() == [True, False, False, False]
    assert top_share(np.array([1.0, 1.0]), 0.5).tolist() == [True, True]
    with pytest.raises(OptionError, match="share"):
        top_share(np.array([1.0]), 0.0)


@pytest.mark.parametrize("policy", ["attention-mass", "random", "tr-bert", "pooling"])
def test_what_a_policy_keeps_layer_by_layer(policy: str) -> None:
    data = encoded((12, [[2, 5]]), (7, [[0, 2]]), (20, [[9, 14]]))
    config = thresher.TRBert(bias=0.0) if policy == "tr-bert" else policy
    model = thresher.attach(make("bert"), config)
    done: list[int] = []
    layers = kept_layers(model, data, batch_size=2, on_batch=done.append)
    assert sum(done) == 3
    for row in range(3):
        inputs = {k: [data.rows[row][k]] for k in ("input_ids", "attention_mask", "token_type_ids")}
        with thresher.tracing(record=True) as traces:
            model(**{k: torch.tensor(v) for k, v in inputs.items()})
        dropped = traces[0].dropped_at()[0].tolist()
        assert layers[row].tolist() == [d or 4 for d in dropped]
    by_layer = agreement_by_layer(data, layers, 3)
    for layer, choice in enumerate(by_layer, start=1):
        shares, recalls = [], []
        for row, at in enumerate(layers):
            left = [i for i, value in enumerate(at[1:-1]) if value > layer]
            truth = {i for a, b in data.rationales[row] for i in range(a, b)}
            shares.append(len(left) / len(at[1:-1]))
            recalls.append(len(truth & set(left)) / len(truth))
        assert choice.share == pytest.approx(np.mean(shares))
        assert choice.recall == pytest.approx(np.mean(recalls))
    assert by_layer[0].share >= by_layer[-1].share
    found = agreement(data, layers)
    assert 0.0 <= found.auprc <= 1.0
    assert found.documents == 3


def test_a_page_shows_the_person_beside_the_model() -> None:
    data = encoded((6, [[1, 3]]), (9, [[0, 1]]), max_length=8)
    layers = [[4, 4, 1, 4, 2, 2, 2, 4], [4, 3, 3, 4, 4, 4, 1, 4]]
    human, machine = rationale_maps(data, 0, layers[0], 3, title="Review")
    assert human.dropped_at == (1, None, None, 1, 1, 1)
    assert machine.dropped_at == (None, 1, None, 2, 2, 2)
    assert (human.title, machine.title) == ("Review: the person", "Review: the model")
    _, cut = rationale_maps(data, 1, layers[1], 3)
    assert cut.dropped_at[6:] == (1, 1, 1)  # beyond what was read
    page = rationales_page(data, layers, 3, [1, 0], "Reasons")
    titles = re.findall(r"<h3>(.*?)</h3>", page)
    assert titles == [f"Document {n}: the {who}" for n in (2, 1) for who in ("person", "model")]


@pytest.mark.parametrize("limit", [-1, 0, 1, 2])
def test_a_limit_without_room_is_refused(limit: int) -> None:
    with pytest.raises(OptionError, match=f"A maximum length of {limit} leaves no room"):
        encode_rationales(rows((3, [])), tokenizer(), limit)


def test_a_special_token_among_the_words_is_a_text() -> None:
    data = rows((3, []))
    data = data.remove_columns("tokens").add_column("tokens", [["w5", "[SEP]", "w6"]])
    (ids,) = encode_rationales(data, tokenizer()).rows["input_ids"]
    assert ids.count(tokenizer().sep_token_id) == 1


def test_a_map_of_another_document_is_refused() -> None:
    found = encoded((3, [(0, 1)]), (5, [(1, 2)]))
    for number, layers, says in (
        (2, [3] * 5, "There are 2 documents, from 0, and 2 is none"),
        (-1, [3] * 5, "-1 is none"),
        (1, [3] * 5, r"Document 1 has 7 tokens, and layers of shape \(5,\) are not theirs"),
    ):
        with pytest.raises(DataError, match=says):
            rationale_maps(found, number, layers, 3)


def test_a_document_whose_words_have_no_token_is_judged() -> None:
    """All of its words are equally unread."""
    given = datasets.Dataset.from_dict(
        {"tokens": [["w5", "w6"], ["\u200b", "\u200b"]], "label": [0, 1], "rationales": [[[0, 1]], [[1, 2]]]}
    )
    made = encode_rationales(given, tokenizer())
    found = agreement(made, [[0.0, 2.0, 1.0, 0.0], [0.0] * len(made.word_of[1])])
    assert found.documents == 2
    assert found.average_precision == pytest.approx((1.0 + 0.5) / 2)
    assert made.truncated == 0


@pytest.mark.parametrize("scores", [None, 5, "ab", [[1.0, "x"]], [[[1.0], [1.0, 2.0]]], [["a", "b", "c", "d"]]])
def test_what_is_no_scores_is_refused(scores: Any) -> None:
    made = encoded((2, [[0, 1]]))
    with pytest.raises(DataError, match="scores|score for each"):
        agreement(made, scores)


def test_numbers_that_make_no_sense_are_refused() -> None:
    made = encoded((2, [[0, 1]]), (2, [[0, 1]]))
    scores = [[0.0, 2.0, 1.0, 0.0]] * 2
    for share in ("x", 0.0, 1.5, float("nan")):
        with pytest.raises(OptionError, match="share must be above 0"):
            agreement(made, scores, share=share)  # type: ignore[arg-type]
    for count in (0, -2, 2.5, "3"):
        with pytest.raises(OptionError, match="a whole number of layers"):
            agreement_by_layer(made, scores, count)  # type: ignore[arg-type]
    for values in (np.array([]), np.array([1.0, np.nan])):
        with pytest.raises(DataError, match="finite scores"):
            top_share(values, 0.5)
    with pytest.raises(DataError, match="99 is none of them"):
        rationales_page(made, scores, 3, [99], "title")
    with pytest.raises(DataError, match="layers of 1 documents"):
        rationales_page(made, scores[:1], 3, [1], "title")
    for layers, says in (([1.0, np.nan, 1.0, 1.0], "no number"), ("abcd", "no numbers")):
        with pytest.raises(DataError, match=says):
            rationale_maps(made, 0, layers, 3)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="whole number of tokens"):
        encode_rationales(rows((2, [[0, 1]])), tokenizer(), "16")  # type: ignore[arg-type]
