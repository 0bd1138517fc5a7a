"""Response selection: how context and response are put together, cut, drawn and told apart again."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

import thresher
from helpers import FIRST_WORD, make
from helpers import tokenizer as words_only
from thresher.errors import DataError, OptionError
from thresher.measure.run import run
from thresher.tasks import responses
from thresher.tasks.ranking import ranking_metrics
from thresher.tasks.responses import EOS, PairFrame, ResponseTask, Utterances, prepare, thirds

CLS, SEP, END = 2, 3, 64  # of the tokenizer below; END is [EOS], the first id after its words


def with_eos(tokenizer: Any) -> Any:
    tokenizer.add_special_tokens({"extra_special_tokens": [EOS]}, replace_extra_special_tokens=False)
    return tokenizer


TOKENIZER = with_eos(words_only())


def vocabulary(*names: str) -> dict[str, int]:
    return {name: number for number, name in enumerate(names)}


FAMILIES: dict[str, Callable[[], Any]] = {
    "bert": words_only,
    "distilbert": lambda: transformers.DistilBertTokenizer(vocab=words_only().get_vocab()),
    "mpnet": lambda: transformers.MPNetTokenizer(vocab=vocabulary("<s>", "<pad>", "</s>", "[UNK]", "<mask>", *"abcd")),
    "roberta": lambda: transformers.RobertaTokenizer(
        vocab=vocabulary("<s>", "<pad>", "</s>", "<unk>", "<mask>", *"abcd", "Ġ"), merges=[]
    ),
    "xlnet": lambda: transformers.XLNetTokenizer(
        vocab=[(name, -1.0) for name in ("<unk>", "<s>", "</s>", "<cls>", "<sep>", "<pad>", "<mask>", "▁", *"abcd")]
    ),
}


def row(context: list[str], candidates: list[str], labels: list[int] | None = None) -> dict[str, Any]:
    return {"context": context, "candidates": candidates, "labels": labels or [1] + [0] * (len(candidates) - 1)}


def rows_of(*rows: dict[str, Any]) -> datasets.Dataset:
    return datasets.Dataset.from_list(list(rows))


def text(*numbers: int) -> str:
    """The words with these ids."""
    return " ".join(f"w{number}" for number in numbers)


@pytest.mark.parametrize("max_length", [12, 16, 40])
def test_texts_are_what_is_read(max_length: int) -> None:
    rows = rows_of(row([text(10, 11), text(12, 13, 14)], [text(20), text(*range(21, 29))]), row([text(15)], [text(16)]))
    task = ResponseTask(max_length)
    ids = task.encode(rows, TOKENIZER).rows["input_ids"]
    assert [TOKENIZER(*pair)["input_ids"] for pair in task.texts(rows, TOKENIZER)] == list(ids)


# --- layout ----------------------------------------------------------------------------------------------------------


def test_the_layout() -> None:
    rows = rows_of(row([text(10, 11), text(12)], [text(20), text(21, 22)], [0, 1]), row([text(13)], [text(23)], [1]))
    encoded = ResponseTask().encode(rows, TOKENIZER, parts=True)
    assert encoded.rows.to_list() == [
        {
            "input_ids": [CLS, 10, 11, END, 12, END, SEP, 20, SEP],
            "attention_mask": [1] * 9,
            "token_type_ids": [0] * 7 + [1] * 2,
            "utterance": [-1, 1, 1, -1, 0, -1, -1, -1, -1],
            "labels": 0.0,
            "group": 0,
        },
        {
            "input_ids": [CLS, 10, 11, END, 12, END, SEP, 21, 22, SEP],
            "attention_mask": [1] * 10,
            "token_type_ids": [0] * 7 + [1] * 3,
            "utterance": [-1, 1, 1, -1, 0, -1, -1, -1, -1, -1],
            "labels": 1.0,
            "group": 0,
        },
        {
            "input_ids": [CLS, 13, END, SEP, 23, SEP],
            "attention_mask": [1] * 6,
            "token_type_ids": [0] * 4 + [1] * 2,
            "utterance": [-1, 0, -1, -1, -1, -1],
            "labels": 1.0,
            "group": 1,
        },
    ]
    assert encoded.rows.features["labels"].dtype == "float64"
    assert (encoded.max_length, encoded.notice()) == (256, None)
    assert "utterance" not in ResponseTask().encode(rows, TOKENIZER).rows.column_names


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tokenizer_frames_the_pair_as_it_does_itself(family: str) -> None:
    tokenizer = with_eos(FAMILIES[family]())
    context, response = (["w10w11", "w12"], "w13") if "w10" in tokenizer.get_vocab() else (["ab", "c"], "da")
    encoded = ResponseTask().encode(rows_of(row(context, [response])), tokenizer)
    whole = tokenizer("".join(utterance + EOS for utterance in context), response)
    (found,) = encoded.rows.to_list()
    assert {name: found[name] for name in whole} == dict(whole)
    assert set(found) == {*whole, "attention_mask", "labels", "group"}


def test_special_tokens_written_in_a_text_are_text() -> None:
    encoded = ResponseTask().encode(rows_of(row([f"w10 {EOS} [SEP]", "[MASK]"], ["[CLS] w20"])), TOKENIZER)
    ids = encoded.rows[0]["input_ids"]
    assert [ids.count(special) for special in (CLS, END, SEP, TOKENIZER.mask_token_id)] == [1, 2, 2, 0]
    assert TOKENIZER(EOS)["input_ids"] == [CLS, END, SEP]  # and the tokenizer is left as it was


def test_more_dialogues_than_a_batch_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_of(*(row([text(5 + i)], [text(30 + i), text(40)], [0, i % 2]) for i in range(7)), row([""], [""]))
    task = ResponseTask(utterances=Utterances("random", 1, seed=3))
    whole = task.encode(rows, TOKENIZER, negatives=1, parts=True)
    monkeypatch.setattr(responses, "_BATCH", 3)
    pieces = task.encode(rows, TOKENIZER, negatives=1, parts=True)
    assert pieces.rows.to_list() == whole.rows.to_list()
    assert (pieces.truncated, pieces.empty, pieces.unanswered) == (whole.truncated, whole.empty, whole.unanswered)


# --- cutting ---------------------------------------------------------------------------------------------------------

SIZES = st.lists(st.integers(0, 9), min_size=1, max_size=6)


@given(sizes=SIZES, response=st.integers(0, 30), limit=st.integers(6, 40))
def test_the_oldest_tokens_of_the_context_go_and_the_last_of_the_response(
    sizes: list[int], response: int, limit: int
) -> None:
    numbers = iter(range(10_000))
    context = [[FIRST_WORD + next(numbers) % 50 for _ in range(size)] for size in sizes]
    answer = [FIRST_WORD + i for i in range(response)]
    rows = rows_of(row([text(*utterance) for utterance in context], [text(*answer)]))
    encoded = ResponseTask(max_length=limit).encode(rows, TOKENIZER, parts=True)
    (found,) = encoded.rows.to_list()

    left = answer[: limit // 2]
    while len(left) + 3 + 2 > limit:  # a token of the context and its [EOS] come before the response's share
        left.pop()
    tokens = [(token, age) for age, u in enumerate(reversed(context)) for token in [END, *reversed(u)]][::-1]
    uncut = len(tokens) + len(answer)
    while len(tokens) + len(left) + 3 > limit:
        tokens.pop(0)
    assert found["input_ids"] == [CLS, *(token for token, _ in tokens), SEP, *left, SEP]
    assert found["token_type_ids"] == [0] * (len(tokens) + 2) + [1] * (len(left) + 1)
    inside = [-1 if token == END else age for token, age in tokens]
    assert found["utterance"] == [-1, *inside, -1, *[-1] * len(left), -1]
    assert encoded.truncated == (len(tokens) + len(left) < uncut)
    assert len(found["input_ids"]) <= limit


@pytest.mark.parametrize("limit", [0, 5])
def test_no_room(limit: int) -> None:
    rows = rows_of(row([text(10)], [text(20)]))
    with pytest.raises(OptionError, match=f"length of {limit} leaves no room for .* beside 3 special tokens"):
        ResponseTask(max_length=limit).encode(rows, TOKENIZER)
    assert ResponseTask(max_length=6).encode(rows, TOKENIZER).truncated == 0


def test_texts_that_are_empty_are_counted_and_encoded() -> None:
    rows = rows_of(
        row([text(10)], [" ", text(20)]), row(["", " "], [text(20), text(21)]), row(["", text(10)], [text(20)])
    )
    encoded = ResponseTask().encode(rows, TOKENIZER)
    assert encoded.rows["input_ids"][0] == [CLS, 10, END, SEP, SEP]
    assert encoded.rows["input_ids"][2] == [CLS, END, END, SEP, 20, SEP]
    assert encoded.empty == 3
    assert encoded.notice() == "3 of 5 pairs have an empty context or response"


def test_the_notice_counts() -> None:
    long = row([text(*range(10, 20))], [text(20), text(21)], [0, 0])
    encoded = ResponseTask(max_length=10).encode(rows_of(long, row([""], [text(22)])), TOKENIZER)
    assert encoded.notice() == (
        "2 of 3 pairs were cut to 10 tokens; 1 of 3 pairs has an empty context or response; "
        "1 dialogue has no right response (left out of ranking metrics)"
    )


# --- which utterances ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "k", "count", "expected"),
    [
        ("last", 2, 5, [3, 4]),
        ("last", 9, 2, [0, 1]),
        ("first", 2, 5, [0, 1]),
        ("first", 9, 2, [0, 1]),
        ("random", 5, 5, [0, 1, 2, 3, 4]),
        ("random", 9, 2, [0, 1]),
        ("kth-from-last", 1, 5, [4]),
        ("kth-from-last", 3, 5, [2]),
        ("kth-from-last", 3, 2, [0]),
    ],
)
def test_the_choice_of_utterances(kind: Any, k: int, count: int, expected: list[int]) -> None:
    assert Utterances(kind, k).of(count, row=0) == expected


def test_a_random_choice_keeps_the_order_and_depends_on_seed_and_row() -> None:
    chosen = [Utterances("random", 3, seed=1).of(8, row) for row in range(200)]
    assert chosen == [Utterances("random", 3, seed=1).of(8, row) for row in range(200)]
    assert chosen != [Utterances("random", 3, seed=2).of(8, row) for row in range(200)]
    assert all(indices == sorted(set(indices)) and len(indices) == 3 for indices in chosen)
    counts = np.bincount(np.ravel(chosen), minlength=8)
    assert counts.min() > 45  # 75 each are expected


def test_a_choice_of_utterances_is_read_and_keeps_its_numbers() -> None:
    rows = rows_of(row([text(10), text(11), text(12)], [text(20)]))
    found = ResponseTask(utterances=Utterances("kth-from-last", 2)).encode(rows, TOKENIZER, parts=True).rows[0]
    assert found["input_ids"] == [CLS, 11, END, SEP, 20, SEP]
    assert found["utterance"] == [-1, 1, -1, -1, -1, -1]


@pytest.mark.parametrize(("kind", "k", "message"), [("lst", 1, "'lst'; did you mean 'last'"), ("last", 0, "not 0")])
def test_choices_that_are_none(kind: Any, k: int, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Utterances(kind, k)


@given(sizes=SIZES)
def test_thirds_divide_the_tokens_of_the_context(sizes: list[int]) -> None:
    rows = rows_of(row([text(*[10] * size) for size in sizes], [text(20)]))
    encoded = ResponseTask().encode(rows, TOKENIZER, parts=True).rows[0]
    found = thirds(encoded["utterance"])
    inside = [third for third, token in zip(found, encoded["input_ids"], strict=True) if token == 10]
    assert len(found) - found.count(-1) == len(inside) == sum(sizes)
    assert inside == sorted(inside)
    assert max(counts := [inside.count(third) for third in range(3)]) - min(counts) <= 1


# --- negatives -------------------------------------------------------------------------------------------------------


def drawn(labels: list[int], negatives: int | None, seed: int = 0, copies: int = 1) -> list[list[int]]:
    """The numbers of the candidates that are encoded, for each of `copies` dialogues alike."""
    alike = row([text(10)], [text(20 + i) for i in range(len(labels))], labels)
    encoded = ResponseTask().encode(rows_of(*[alike] * copies), TOKENIZER, negatives=negatives, seed=seed)
    kept: list[list[int]] = [[] for _ in range(copies)]
    for found in encoded.rows.to_list():
        candidate = found["input_ids"][-2] - 20
        assert found["labels"] == labels[candidate]
        kept[found["group"]].append(candidate)
    return kept


@given(labels=st.lists(st.integers(0, 1), min_size=1, max_size=9), negatives=st.integers(1, 4), seed=st.integers(0, 9))
def test_so_many_negatives_for_each_positive(labels: list[int], negatives: int, seed: int) -> None:
    (kept,) = drawn(labels, negatives, seed)
    right = [i for i, label in enumerate(labels) if label]
    wrong = [i for i in kept if i not in right]
    assert kept == sorted(right + wrong)
    assert len(wrong) == min(len(labels) - len(right), negatives * max(1, len(right)))


def test_the_draw_depends_on_seed_and_dialogue_and_is_even() -> None:
    labels = [0, 0, 1, 0]
    first = drawn(labels, 1, copies=200)
    assert first == drawn(labels, 1, copies=200)
    assert first != drawn(labels, 1, seed=1, copies=200)
    counts = np.bincount(np.ravel(first), minlength=4)
    assert counts[2] == 200 and min(counts[[0, 1, 3]]) > 40
    assert drawn(labels, None) == [[0, 1, 2, 3]]


def test_no_negatives() -> None:
    with pytest.raises(OptionError, match="at least 1 wrong candidate .* not 0"):
        ResponseTask().encode(rows_of(row([text(10)], [text(20)])), TOKENIZER, negatives=0)


def test_rows_that_are_no_dialogues() -> None:
    with pytest.raises(DataError, match="Row 2 has an empty context"):
        ResponseTask().encode(rows_of(row([text(10)], [text(20)]), row([], [text(20)])), TOKENIZER)


# --- tokenizer and model ---------------------------------------------------------------------------------------------


def test_a_tokenizer_without_the_token() -> None:
    with pytest.raises(OptionError, match=r"no token \[EOS\]; call thresher.tasks.responses.prepare first"):
        PairFrame.of(words_only(), EOS, 256)
    assert PairFrame.of(words_only(), "w63", 256).eos == 63


@pytest.mark.parametrize("family", ["bert", "albert", "roberta", "modernbert"])
def test_prepare_adds_one_row_like_the_separators(family: str) -> None:
    model, tokenizer = make(family), words_only()
    before = copy.deepcopy(model.get_input_embeddings().weight.data)
    assert prepare(model, tokenizer) == END == len(tokenizer) - 1
    after = model.get_input_embeddings().weight.data
    assert torch.equal(after[:END], before)
    assert torch.equal(after[END], before[SEP])
    assert model.config.vocab_size == len(after) == END + 1
    assert tokenizer(f"w10{EOS}w11")["input_ids"] == [CLS, 10, END, 11, SEP]
    assert tokenizer.decode([10, END], skip_special_tokens=True) == "w10"


def test_prepare_keeps_what_is_there() -> None:
    model, tokenizer = make("bert"), words_only()
    tokenizer.add_special_tokens({"extra_special_tokens": ["[URL]"]})
    prepare(model, tokenizer)
    assert tokenizer.extra_special_tokens == ["[URL]", EOS]
    trained = model.get_input_embeddings().weight.data
    trained[tokenizer.get_vocab()[EOS]] = 7.0
    kept = trained.clone()
    prepare(model, tokenizer)
    assert torch.equal(model.get_input_embeddings().weight.data, kept)
    assert tokenizer.extra_special_tokens == ["[URL]", EOS]


def test_prepare_gives_another_model_the_token_of_a_tokenizer_that_has_it() -> None:
    model = make("bert")
    assert prepare(model, with_eos(words_only())) == END
    assert torch.equal(model.get_input_embeddings().weight[END], model.get_input_embeddings().weight[SEP])


def test_prepare_does_not_cut_off_rows_to_spare() -> None:
    model, tokenizer = make("bert"), words_only()
    model.resize_token_embeddings(80, mean_resizing=False)
    assert prepare(model, tokenizer) == END
    weight = model.get_input_embeddings().weight
    assert len(weight) == 80
    assert torch.equal(weight[END], weight[SEP])


@pytest.mark.parametrize("tied", [True, False])
def test_prepare_a_model_that_says_words(tied: bool) -> None:
    config = copy.deepcopy(make("bert").config)
    config.tie_word_embeddings = tied
    model = transformers.BertForMaskedLM(config)
    prepare(model, words_only())
    head = model.get_output_embeddings().weight
    assert (head is model.get_input_embeddings().weight) == tied
    assert len(head) == END + 1 and torch.equal(head[END], head[SEP])
    assert model(torch.tensor([[CLS, END, SEP]])).logits.shape == (1, 3, END + 1)


def test_prepared_model_and_tokenizer_are_saved_whole(tmp_path: Path) -> None:
    model, tokenizer = make("bert"), words_only()
    prepare(model, tokenizer)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path)
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert prepare(loaded, again) == END
    assert torch.equal(loaded.get_input_embeddings().weight, model.get_input_embeddings().weight)
    rows = rows_of(row([text(10), text(11)], [text(20)]))
    expected = ResponseTask().encode(rows, tokenizer).rows.to_list()
    assert ResponseTask().encode(rows, again).rows.to_list() == expected


# --- from rows to metrics --------------------------------------------------------------------------------------------


def test_all_candidates_are_scored_in_packed_batches_whatever_their_group() -> None:
    tokenizer = words_only()
    config = copy.deepcopy(make("bert").config)
    config.num_labels = 1
    model = transformers.BertForSequenceClassification(config).eval()
    prepare(model, tokenizer)
    rng = np.random.default_rng(0)

    def words(most: int) -> str:
        return text(*rng.integers(FIRST_WORD, 64, rng.integers(1, most)))

    rows = rows_of(*(row([words(9) for _ in range(3)], [words(9) for _ in range(size)]) for size in (4, 2, 10, 3)))
    encoded = ResponseTask(max_length=40).encode(rows, tokenizer).rows
    alone = []
    with torch.no_grad():
        for pair in encoded:
            inputs = {name: torch.tensor([pair[name]]) for name in ("input_ids", "attention_mask", "token_type_ids")}
            alone.append(float(model(**inputs).logits))
    thresher.attach(model)
    for batch_size in (None, 3):
        scores = run(model, encoded, batch_size=batch_size).predictions
        assert scores.shape == (19, 1)
        np.testing.assert_allclose(scores[:, 0], alone, atol=1e-5)
        metrics = ranking_metrics(scores, encoded["labels"], encoded["group"])
        assert metrics == pytest.approx(ranking_metrics(alone, encoded["labels"], encoded["group"]))
