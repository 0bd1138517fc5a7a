"""Windows over passages and the answers found in them, against what is written out the slow way."""

from __future__ import annotations

import itertools
import math
import re
import string
import unicodedata
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

import thresher
from helpers import make
from helpers import tokenizer as words_tokenizer
from thresher.errors import DataError, OptionError
from thresher.measure.run import run
from thresher.tasks.answer_scores import AnswerJudge, best_threshold, normalised
from thresher.tasks.answering import EncodedQuestions, QuestionTask
from thresher.tasks.passages import Frame, spread, tokens_of
from thresher.tasks.question_files import NOWHERE
from thresher.tasks.spans import Windows, best_answers, null_scores


def byte_tokenizer() -> Any:
    """One token a byte, so that most characters outside English are several; framed as RoBERTa frames pairs."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {name: i for i, name in enumerate(["<s>", "<pad>", "</s>", "<unk>", *alphabet])}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.RobertaProcessing(
        ("</s>", 2), ("<s>", 0), trim_offsets=True, add_prefix_space=False
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token="<s>",
        eos_token="</s>",
        cls_token="<s>",
        sep_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        model_input_names=["input_ids", "attention_mask"],
    )


WORDS, BYTES = words_tokenizer(), byte_tokenizer()
TOKENIZERS = {"words": WORDS, "bytes": BYTES}
UNICODE = "Der Müller 🧑‍🌾 e\u0301tait là; 渡し船は九時に出る。 नमस्ते, said Ada."


def rows_of(*rows: dict[str, Any]) -> datasets.Dataset:
    return datasets.Dataset.from_list(list(rows))


def row(question: str, context: str, *answers: str, **more: Any) -> dict[str, Any]:
    starts = [context.find(answer) for answer in answers]
    answered = {"answers": {"text": list(answers), "answer_start": starts}}
    return {"id": str(more.pop("id", 1)), "question": question, "context": context, **answered, **more}


def words(low: int, high: int) -> str:
    return " ".join(f"w{5 + i % 59}" for i in range(low, high))


def theirs(tokenizer: Any, question: str, context: str, length: int, stride: int) -> Any:
    """What the tokenizer itself makes of a long pair."""
    return tokenizer(
        question,
        context,
        truncation="only_second",
        max_length=length,
        stride=stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )


# --- windows ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize(("length", "stride"), [(40, 8), (33, 0), (48, 12), (400, 100)])
def test_windows_are_those_the_tokenizer_would_make(name: str, length: int, stride: int) -> None:
    tokenizer = TOKENIZERS[name]
    question, context = "w5 w6?", words(0, 100) if name == "words" else UNICODE * 3
    wanted = theirs(tokenizer, question, context, length, stride)
    found = QuestionTask(length, stride).encode(rows_of(row(question, context, context[:3])), tokenizer)
    for column in ("input_ids", "attention_mask", "token_type_ids"):
        assert (column in wanted) == (column in found.rows.column_names)
        if column in wanted:
            assert list(found.rows[column]) == wanted[column]
    shown = found.windows
    for i, offsets in enumerate(wanted["offset_mapping"]):
        sides = wanted.sequence_ids(i)
        begin, first, count = int(shown.begin[i]), int(shown.first[i]), int(shown.count[i])
        assert (begin, count) == (sides.index(1), sides.count(1))
        assert shown.offsets[first : first + count].tolist() == [list(pair) for pair in offsets[begin : begin + count]]


@given(st.integers(0, 400), st.integers(1, 60), st.integers(0, 60))
def test_every_token_is_in_a_window_and_none_is_in_vain(count: int, capacity: int, stride: int) -> None:
    found = list(spread(count, capacity, stride))
    assert set().union(*(range(*window) for window in found)) == set(range(count))
    assert all(end - start <= capacity for start, end in found)
    for (one, end), (other, _) in itertools.pairwise(found):
        assert one < other <= end and end < count
        assert end - other == min(stride, capacity // 2)


@pytest.mark.parametrize("name", TOKENIZERS)
@given(data=st.data())
def test_windows_show_the_whole_passage_and_answers_lie_where_they_say(name: str, data: st.DataObject) -> None:
    letters = st.sampled_from(["w5", "w63", "🌾", "e\u0301", "渡", "न", " ", "  ", ".", "Ada", "\n", "ﬁ"])
    context = data.draw(st.lists(letters, min_size=1, max_size=60).map("".join).filter(str.strip))
    start = data.draw(st.integers(0, len(context) - 1))
    end = data.draw(st.integers(start + 1, len(context)))
    answer = context[start:end]
    if not answer.strip():
        return
    length, stride = data.draw(st.integers(20, 60)), data.draw(st.integers(0, 30))
    given_row = {"id": "1", "question": "w7?", "context": context}
    given_row["answers"] = {"text": [answer], "answer_start": [start]}
    tokenizer = TOKENIZERS[name]
    encoded = QuestionTask(length, stride).encode(rows_of(given_row), tokenizer)
    offsets = encoded.windows.offsets.tolist()
    whole = tokenizer(context, add_special_tokens=False, return_offsets_mapping=True)
    assert offsets == [list(pair) for pair in whole["offset_mapping"]]
    inside = [i for i, (a, b) in enumerate(offsets) if a < end and b > start]
    seen = set()
    for i, window in enumerate(encoded.rows):
        assert len(window["input_ids"]) <= length
        begin, first, count = (int(v[i]) for v in (encoded.windows.begin, encoded.windows.first, encoded.windows.count))
        assert window["input_ids"][begin : begin + count] == whole["input_ids"][first : first + count]
        seen |= set(range(first, first + count))
        held = bool(inside) and set(inside) <= set(range(first, first + count))
        wanted = (inside[0] - first + begin, inside[-1] - first + begin) if held else (0, 0)
        assert (window["start_positions"], window["end_positions"]) == wanted
    assert seen == set(range(len(offsets)))


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 4)), max_size=20), st.data())
def test_tokens_of_characters(gaps: list[tuple[int, int]], data: st.DataObject) -> None:
    offsets, at = [], 0
    for gap, size in gaps:
        offsets.append((at + gap, at + gap + size))
        at += gap + size
    start = data.draw(st.integers(0, at + 1))
    end = data.draw(st.integers(start + 1, at + 3))
    first, last = tokens_of(np.array(offsets, dtype=np.int64).reshape(-1, 2), start, end)
    assert list(range(first, last + 1)) == [i for i, (a, b) in enumerate(offsets) if a < end and b > start]


def test_evidence_is_marked_token_by_token() -> None:
    context = "w5 w6. w7 w8. w9 w10."
    spans = [[0, 6], [context.index("w9"), context.index("w9") + 2]]
    rows = rows_of(row("w11", context, "w8", evidence=spans), row("w11", context, "w8", id=2, evidence=[]))
    encoded = QuestionTask(30, 4).encode(rows, WORDS)
    marked = [
        [
            name
            for name, mark in zip(WORDS.convert_ids_to_tokens(one["input_ids"]), one["evidence"], strict=True)
            if mark
        ]
        for one in encoded.rows
    ]
    assert marked[0] == ["w5", "w6", "[UNK]", "w9"]
    assert marked[1] == []
    assert [len(one["evidence"]) for one in encoded.rows] == [len(one["input_ids"]) for one in encoded.rows]
    narrow = QuestionTask(9, 2).encode(rows.select([0]), WORDS)
    assert len(narrow.rows) > 1
    assert all(len(one["evidence"]) == len(one["input_ids"]) for one in narrow.rows)


def test_what_an_answer_is_learned_from() -> None:
    context = words(0, 60)
    here, nowhere = row("w5", context, "w40", id="a"), row("w5", context, "w999", id="b")
    impossible = row("w5", context, id="c")
    several = {**row("w5", context, "w7", id="d"), "answers": {"text": ["none", "w7"], "answer_start": [NOWHERE, 6]}}
    task = QuestionTask(30, 8)
    encoded = task.encode(rows_of(here, nowhere, impossible, several), WORDS)
    assert encoded.ids == ["a", "b", "c", "d"]
    assert encoded.accepted == [["w40"], ["w999"], [], ["none", "w7"]]
    kept = task.encode(rows_of(here, nowhere, impossible, several), WORDS, training=True)
    assert kept.ids == ["a", "c", "d"]
    assert "1 question is left out, whose answer stands nowhere" in str(kept.notice())
    first = next(one for one, number in zip(kept.rows, kept.windows.question, strict=True) if number == 2)
    assert WORDS.convert_ids_to_tokens(first["input_ids"][first["start_positions"]]) == "w7"
    with pytest.raises(DataError, match="no question whose answer"):
        task.encode(rows_of(nowhere), WORDS, training=True)


def test_unlabelled_questions() -> None:
    bare = {name: value for name, value in row("w5", words(0, 9), "w6").items() if name != "answers"}
    encoded = QuestionTask().encode(rows_of(bare), WORDS)
    assert set(encoded.rows.column_names) == {"input_ids", "attention_mask", "token_type_ids"}
    assert encoded.accepted is None
    with pytest.raises(DataError, match="without answers"):
        _ = encoded.judge
    with pytest.raises(DataError, match="answers"):
        QuestionTask().encode(rows_of(bare), WORDS, labelled=True)


def test_a_question_too_long_is_cut_and_that_is_said() -> None:
    rows = rows_of(row(words(0, 200), words(0, 90), "w20"), row("", words(0, 9), "w6", id=2))
    encoded = QuestionTask(40, 128).encode(rows, WORDS)
    assert encoded.notice() == (
        "1 of 2 questions was cut, to leave room for the passage in 40 tokens; 1 of 2 questions is empty"
    )
    ids = [one for one, number in zip(encoded.rows["input_ids"], encoded.windows.question, strict=True) if number == 0]
    assert all(one[1:21] == WORDS(words(0, 20))["input_ids"][1:-1] and one[21] == WORDS.sep_token_id for one in ids)
    assert max(map(len, ids)) == 40
    assert QuestionTask().encode(rows_of(row("w5", "w6", "w6")), WORDS).notice() is None


def test_a_special_token_written_out_is_text() -> None:
    encoded = QuestionTask().encode(rows_of(row("w5 [SEP] w6", "w7 [CLS] w8", "w8")), WORDS)
    (ids,) = encoded.rows["input_ids"]
    assert ids.count(WORDS.sep_token_id) == 2
    assert ids.count(WORDS.cls_token_id) == 1


def test_a_passage_of_nothing_that_is_read() -> None:
    context = "\u200b\u200b"
    encoded = QuestionTask().encode(rows_of(row("w5", context, context)), WORDS)
    assert encoded.rows[0]["start_positions"] == 0
    said = np.zeros((1, len(encoded.rows[0]["input_ids"]), 2))
    assert encoded.texts(said) == [""]


def test_options_that_do_not_fit() -> None:
    rows = rows_of(row("w5", "w6", "w6"))
    with pytest.raises(OptionError, match="no room"):
        QuestionTask(4).encode(rows, WORDS)
    assert QuestionTask(5).encode(rows, WORDS).rows[0]["start_positions"] == 3
    for wrong in ({"stride": -1}, {"longest": 0}):
        with pytest.raises(OptionError, match="at least"):
            QuestionTask(**wrong)

    class Slow:
        is_fast = False

    slow: Any = Slow()
    with pytest.raises(OptionError, match="fast tokenizer"):
        Frame.of(slow, 30)


def test_a_long_passage_is_tokenised_once() -> None:
    context = words(0, 30_000)
    assert len(context) > 100_000
    rows = rows_of(*(row(f"w{5 + i}", context, "w50", id=i) for i in range(20)))
    calls: list[int] = []

    class Counting(type(WORDS)):  # type: ignore[misc]
        def __call__(self, texts: Any, *rest: Any, **options: Any) -> Any:
            calls.extend(len(text) for text in texts if isinstance(texts, list))
            return super().__call__(texts, *rest, **options)

    counting = Counting(vocab=WORDS.get_vocab(), model_max_length=48)
    encoded = QuestionTask().encode(rows, counting)
    assert sum(size > 100_000 for size in calls) == 1
    assert len(encoded.rows) == 20 * math.ceil((30_000 - 128) / (384 - 4 - 128))
    said = np.random.default_rng(0).normal(size=(len(encoded.rows), 384, 2))
    assert all(encoded.texts(said))


# --- answers ---------------------------------------------------------------------------------------------------------


def slow_answers(
    said: np.ndarray, windows: Windows, contexts: list[str], n_best: int, longest: int
) -> list[list[tuple[str, int, int, float]]]:
    """Every span of every window, one after the other."""
    found: list[dict[tuple[int, int], float]] = [{} for _ in contexts]
    for w in range(len(windows)):
        question, begin, count = int(windows.question[w]), int(windows.begin[w]), int(windows.count[w])
        for i in range(count):
            for j in range(i, min(count, i + longest)):
                score = float(said[w, begin + i, 0]) + float(said[w, begin + j, 1])
                if not math.isfinite(score) or min(said[w, begin + i, 0], said[w, begin + j, 1]) <= -9000:
                    continue
                a = int(windows.offsets[windows.first[w] + i, 0])
                b = int(windows.offsets[windows.first[w] + j, 1])
                while b < len(contexts[question]) and unicodedata.category(contexts[question][b]) == "Mn":
                    b += 1
                while a < b and contexts[question][a].isspace():
                    a += 1
                while a < b and contexts[question][b - 1].isspace():
                    b -= 1
                if a < b:
                    found[question][a, b] = max(score, found[question].get((a, b), -math.inf))
    return [
        [(context[a:b], a, b, score) for (a, b), score in sorted(one.items(), key=lambda item: -item[1])[:n_best]]
        for one, context in zip(found, contexts, strict=True)
    ]


def noise(encoded: EncodedQuestions, seed: int, dropped: float = 0.0) -> np.ndarray:
    """Predictions as a run gives them: NaN beyond each row, and some tokens dropped, one way or the other."""
    draw = np.random.default_rng(seed)
    lengths = [len(ids) for ids in encoded.rows["input_ids"]]
    said = draw.normal(size=(len(lengths), max(lengths), 2)).astype(np.float32)
    gone = draw.random(said.shape[:2])
    said[gone < dropped] = -np.inf
    said[gone < dropped / 2] = -1e4
    for one, length in zip(said, lengths, strict=True):
        one[length:] = np.nan
    return said


MIXED = rows_of(
    row("w5 w6", words(0, 70), "w40", id="a"),
    row("w5", "w7 w8  w9", "w8", id="b"),
    row(words(0, 30), words(10, 60), "w30", id="c"),
    row("w9", UNICODE, "Ada", id="d"),
)


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("dropped", [0.0, 0.5, 0.95])
@pytest.mark.parametrize(("n_best", "longest"), [(1, 30), (5, 3), (20, 1), (500, 30)])
def test_answers_are_the_best_of_all_spans(name: str, dropped: float, n_best: int, longest: int) -> None:
    encoded = QuestionTask(44, 10, longest).encode(MIXED, TOKENIZERS[name])
    said = noise(encoded, 1, dropped)
    found = [[(a.text, a.start, a.end, a.score) for a in one] for one in encoded.answers(said, n_best)]
    wanted = slow_answers(said, encoded.windows, encoded.contexts, n_best, longest)
    for ours, slow in zip(found, wanted, strict=True):
        assert [one[3] for one in ours] == pytest.approx([one[3] for one in slow], abs=1e-6)
        assert [one[:3] for one in ours] == [one[:3] for one in slow]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_sure_model_gives_the_answer_back_letter_by_letter(name: str) -> None:
    answers = ("Müller", "🧑‍🌾", "e\u0301tait", "渡し船", "नमस्ते", "Ada")
    if name == "words":
        answers = ("Müller", "Ada")  # its pieces are words, and not all of these stand alone
    rows = rows_of(*(row("w5?", UNICODE, answer, id=i) for i, answer in enumerate(answers)))
    encoded = QuestionTask(60, 20).encode(rows, TOKENIZERS[name])
    said = np.zeros((len(encoded.rows), 60, 2))
    for place, column in (("start_positions", 0), ("end_positions", 1)):
        said[np.arange(len(said)), encoded.rows[place], column] = 5.0
    assert encoded.texts(said) == list(answers)
    for found, answer in zip(encoded.answers(said, 1), answers, strict=True):
        assert UNICODE[found[0].start : found[0].end] == answer


def test_an_answer_ends_with_the_marks_of_its_last_character() -> None:
    context = "cafe\u0301 x"  # whose accent a tokenizer that strips them leaves to no token
    windows = Windows.of([(0, 0, 1, 0, 2)], [np.array([[0, 4], [6, 7]])])
    said = np.array([[[0.0, 0.0], [5.0, 5.0], [0.0, 0.0], [0.0, 0.0]]])
    (best,) = best_answers(said, windows, [context], n_best=1)
    assert (best[0].text, best[0].start, best[0].end) == ("cafe\u0301", 0, 5)


@pytest.mark.parametrize("text", ["\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35", "\u0917\u0941\u0930\u0941", "\u2764\ufe0f"])
def test_vowel_signs_and_variation_selectors_are_marks_too(text: str) -> None:
    """Of combining class 0, and stripped all the same."""
    windows = Windows.of([(0, 0, 1, 0, 2)], [np.array([[0, len(text) - 1], [len(text) + 1, len(text) + 2]])])
    said = np.array([[[0.0, 0.0], [5.0, 5.0], [0.0, 0.0], [0.0, 0.0]]])
    (best,) = best_answers(said, windows, [f"{text} x"], n_best=1)
    assert best[0].text == text


def test_equal_scores_give_the_earlier_and_shorter_answer() -> None:
    encoded = QuestionTask().encode(rows_of(row("w5", "w6 w7 w8", "w7")), WORDS)
    said = np.zeros((1, 7, 2))
    assert [one.text for one in encoded.answers(said, 1)[0]] == ["w6"]
    assert [one.text for one in encoded.answers(said, 6)[0]] == ["w6", "w6 w7", "w6 w7 w8", "w7", "w7 w8", "w8"]


def test_white_space_is_no_answer() -> None:
    windows = Windows.of([(0, 0, 1, 0, 3)], [np.array([[0, 1], [1, 2], [2, 3]])])
    said = np.array([[[0.0, 0.0], [1.0, -9.0], [8.0, 8.0], [-9.0, 2.0], [0.0, 0.0]]])
    for n_best in (1, 20):
        assert best_answers(said, windows, ["a b"], n_best=n_best)[0][0].text == "b"
        assert best_answers(said, windows, ["a  "], n_best=n_best)[0][0].text == "a"


def test_predictions_that_do_not_fit() -> None:
    encoded = QuestionTask().encode(rows_of(row("w5", "w6 w7 w8", "w7")), WORDS)
    for wrong in (np.zeros((2, 7, 2)), np.zeros((1, 7)), np.zeros((1, 7, 3)), np.zeros((1, 3, 2))):
        with pytest.raises(OptionError, match=r"windows"):
            encoded.answers(wrong)
    with pytest.raises(OptionError, match="at least 1"):
        best_answers(np.zeros((1, 7, 2)), encoded.windows, encoded.contexts, n_best=0)


def test_no_answer_is_what_the_least_sure_window_says() -> None:
    encoded = QuestionTask(24, 4).encode(MIXED, WORDS)
    said = noise(encoded, 3)
    for number, null in enumerate(encoded.nulls(said)):
        of = [w for w in range(len(said)) if encoded.windows.question[w] == number]
        assert null == pytest.approx(min(float(said[w, 0, 0]) + float(said[w, 0, 1]) for w in of))
    best = encoded.answers(said, 1)
    for threshold in (-3.0, 0.0, 3.0):
        wanted = [
            "" if null - one[0].score > threshold else one[0].text
            for one, null in zip(best, encoded.nulls(said), strict=True)
        ]
        assert encoded.texts(said, threshold) == wanted
    assert "" not in encoded.texts(said)
    threshold, value = encoded.best_threshold(said)
    assert encoded.judge.metrics(encoded.texts(said, threshold))["f1"] == pytest.approx(value)
    assert value >= encoded.judge.metrics(encoded.texts(said))["f1"]
    assert null_scores(np.full_like(said, np.nan), encoded.windows, 4).tolist() == [math.inf] * 4


# --- scores ----------------------------------------------------------------------------------------------------------


def reference_normal(text: str) -> str:
    """Lower text and remove punctuation, articles and extra white space: the four steps as they were published."""
    lowered = text.lower()
    bare = "".join(character for character in lowered if character not in set(string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def reference_f1(answer: str, right: str, two: bool) -> float:
    ours, theirs = reference_normal(answer).split(), reference_normal(right).split()
    if two and (not ours or not theirs):
        return float(ours == theirs)
    left, same = list(theirs), 0
    for token in ours:
        if token in left:
            left.remove(token)
            same += 1
    if not same:
        return 0.0
    precision, recall = same / len(ours), same / len(theirs)
    return 2 * precision * recall / (precision + recall)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("The  Mill.", "mill"),
        ("a an the", ""),
        ("another theatre", "another theatre"),
        ("mid-1990s", "mid1990s"),
        ("$1,802.50", "180250"),
        ("the U.S.A.", "usa"),
        ("Café «là»", "café «là»"),
        ("«the» a_the", "«" + " » " + "athe"),
        ("an\nowl\u00a0flew", "owl flew"),
    ],
)
def test_normalisation(text: str, wanted: str) -> None:
    assert normalised(text) == reference_normal(text) == wanted


PIECES = st.lists(
    st.sampled_from(["the", "A", "an", "mill", "Mill", "stone.", "-", "of", "1802", "🌾", "  "]), max_size=6
)


@given(st.lists(st.tuples(PIECES, st.lists(PIECES, max_size=3)), min_size=1))
def test_scores_are_those_of_the_definition(cases: list[tuple[list[str], list[list[str]]]]) -> None:
    answers = [" ".join(answer) for answer, _ in cases]
    accepted = [[" ".join(one) for one in right] for _, right in cases]
    exact, f1 = AnswerJudge(accepted).each(answers)
    two = not all(accepted)
    for i, (answer, texts) in enumerate(zip(answers, accepted, strict=True)):
        right = ([text for text in texts if reference_normal(text)] or [""]) if two else texts
        assert exact[i] == max(reference_normal(answer) == reference_normal(text) for text in right)
        assert f1[i] == pytest.approx(max(reference_f1(answer, text, two) for text in right))


def test_right_answers_that_are_nothing_but_articles() -> None:
    assert AnswerJudge([["the"]]).metrics(["a"]) == {"f1": 0.0, "exact_match": 1.0}  # SQuAD 1.1 has a few
    assert AnswerJudge([["the"], []]).each(["a", ""])[1].tolist() == [1.0, 1.0]
    assert AnswerJudge([["the", "mill"], []]).each(["a", ""])[0].tolist() == [0.0, 1.0]


def test_metrics_divide_what_can_be_answered_from_what_cannot() -> None:
    judge = AnswerJudge([["the stone mill"], ["1802", "in 1802"], [], []])
    found = judge.metrics(["stone", "In 1802!", "", "1802"])
    assert found == pytest.approx(
        {
            "f1": (2 / 3 + 1 + 1 + 0) / 4,
            "exact_match": 2 / 4,
            "has_answer_f1": (2 / 3 + 1) / 2,
            "has_answer_exact_match": 1 / 2,
            "no_answer": 1 / 2,
        }
    )
    assert set(AnswerJudge([["a b"]]).metrics([""])) == {"f1", "exact_match"}
    with pytest.raises(OptionError, match="2 answers do not fit 4"):
        judge.metrics(["", ""])


@given(st.lists(st.tuples(st.booleans(), st.booleans(), st.integers(-3, 3)), min_size=1, max_size=12))
def test_the_best_threshold_is_the_best_of_all(cases: list[tuple[bool, bool, int]]) -> None:
    judge = AnswerJudge([["yes"] if has else [] for has, _, _ in cases])
    answers = ["yes" if right else "mill" for _, right, _ in cases]
    nulls = np.array([float(null) for _, _, null in cases])

    def score(threshold: float) -> float:
        given_ = [answer if null <= threshold else "" for answer, null in zip(answers, nulls, strict=True)]
        return judge.metrics(given_)["f1"]

    threshold, value = best_threshold(judge, answers, nulls)
    assert score(threshold) == pytest.approx(value)
    assert value == pytest.approx(max(score(t) for t in [-10.0, *nulls.tolist()]))


# --- models ----------------------------------------------------------------------------------------------------------


def plain_answer(model: Any, tokenizer: Any, question: str, context: str, length: int, stride: int) -> str:
    """The best answer by the stock model, window by window, as textbooks do it."""
    encoded = theirs(tokenizer, question, context, length, stride)
    best = (-math.inf, "")
    for i in range(len(encoded["input_ids"])):
        names = [name for name in ("input_ids", "attention_mask", "token_type_ids") if name in encoded]
        with torch.no_grad():
            out = model(**{name: torch.tensor([encoded[name][i]]) for name in names})
        start, end = out.start_logits[0].tolist(), out.end_logits[0].tolist()
        inside = [place for place, side in enumerate(encoded.sequence_ids(i)) if side == 1]
        for a in inside:
            for b in inside:
                if a <= b < a + 30 and start[a] + end[b] > best[0]:
                    offsets = encoded["offset_mapping"][i]
                    best = start[a] + end[b], context[offsets[a][0] : offsets[b][1]].strip()
    return best[1]


def test_a_packed_model_gives_the_answers_of_the_stock_model() -> None:
    stock = make("bert", "question-answering")
    rows = rows_of(*(row(words(i, i + 3), words(i, i + 90), "w30", id=i) for i in range(4)))
    encoded = QuestionTask(40, 10).encode(rows, WORDS)
    model = thresher.attach(make("bert", "question-answering"))
    found = encoded.texts(run(model, encoded.rows, batch_size=3).predictions)
    assert found == [plain_answer(stock, WORDS, one["question"], one["context"], 40, 10) for one in rows]


def test_a_real_model_gives_the_answers_of_the_stock_model(minilm: str) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm)
    torch.manual_seed(0)
    stock = transformers.AutoModelForQuestionAnswering.from_pretrained(minilm).eval()
    contexts = [
        "The mill at Orrin burned in 1802. Its owner, Ada Quill, rebuilt it of stone — and of café-au-lait bricks. "
        * 4,
        "渡し船 leaves at nine 🌾 unless the e\u0301tang is frozen.",
    ]
    rows = rows_of(*(row("Who rebuilt the mill?", text, id=i) for i, text in enumerate(contexts)))
    encoded = QuestionTask(64, 16).encode(rows, tokenizer)
    wanted = [plain_answer(stock, tokenizer, "Who rebuilt the mill?", text, 64, 16) for text in contexts]
    model = thresher.attach(stock)
    assert encoded.texts(run(model, encoded.rows).predictions) == wanted
    assert all(answer in text for answer, text in zip(wanted, contexts, strict=True))


def test_answers_of_a_model_that_drops() -> None:
    config = thresher.AttentionMass(retention=(0.7, 0.4, 0.2), protect_segments=(0,))
    model = thresher.attach(make("bert", "question-answering"), config)
    encoded = QuestionTask(40, 10).encode(MIXED, WORDS)
    batched = encoded.texts(run(model, encoded.rows, batch_size=8).predictions)
    assert batched == encoded.texts(run(model, encoded.rows, batch_size=1).predictions)
    assert all(answer in context for answer, context in zip(batched, encoded.contexts, strict=True))


def test_texts_are_what_the_windows_show() -> None:
    rows = rows_of(row("w5 w6", words(0, 70), "w40"), row(words(0, 30), words(10, 60), "w30", id=2))
    task = QuestionTask(40, 10)
    wanted = list(task.encode(rows, WORDS).rows["input_ids"])
    assert [WORDS(*pair)["input_ids"] for pair in task.texts(rows, WORDS)] == wanted
