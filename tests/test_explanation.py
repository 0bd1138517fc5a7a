"""Token maps of single texts, for every kind of answer."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import BertForQuestionAnswering, DistilBertConfig

import thresher
from helpers import build, config_of, make, tokenizer
from thresher.errors import DataError, OptionError
from thresher.exits import Confidence, TokEE
from thresher.explanation import Span, answer, explain
from thresher.model import exit_of
from thresher.tasks.features import DEFAULT_MAX_LENGTH
from thresher.tasks.reading import Reading
from thresher.tasks.tagging import TaggingTask

TEXT = "w5 w6 w7 w8 w9 w10 w11 w12"
READS_LESS = thresher.AttentionMass(retention=(0.7, 0.4, 0.2))


def test_a_map_shows_the_text_and_what_was_dropped() -> None:
    model = thresher.attach(make("bert"), READS_LESS)
    (found,) = explain(model, tokenizer(), [TEXT])
    assert "".join(found.tokens) == f"[CLS] {TEXT} [SEP]"
    assert (found.title, found.layers, len(found.tokens)) == (TEXT, 3, 10)
    assert found.dropped_at[0] is None
    assert found.kept == 2
    assert [found.dropped_at.count(layer) for layer in (1, 2, 3)] == [3, 3, 2]


def test_the_map_is_that_of_the_trace() -> None:
    model = thresher.attach(make("bert"), READS_LESS)
    with torch.no_grad(), thresher.tracing(record=True) as traces:
        model(**tokenizer()([TEXT], return_tensors="pt"))
    (found,) = explain(model, tokenizer(), [TEXT])
    assert [layer or 0 for layer in found.dropped_at] == traces[0].dropped_at()[0].tolist()


def test_nothing_dropped_without_a_policy() -> None:
    (found,) = explain(thresher.attach(make("bert")), tokenizer(), [TEXT])
    assert found.kept == 10


def test_a_pair_and_a_long_title() -> None:
    (found,) = explain(thresher.attach(make("bert")), tokenizer(), [(TEXT, TEXT + " w13 w14")])
    assert "".join(found.tokens) == f"[CLS] {TEXT} [SEP] {TEXT} w13 w14 [SEP]"
    assert len(found.title) <= 60
    assert found.title.endswith("…")


@pytest.mark.parametrize("text", ["", "   ", "unknown ✂ words\x07"])
def test_odd_texts(text: str) -> None:
    (found,) = explain(thresher.attach(make("bert"), READS_LESS), tokenizer(), [text])
    assert found.dropped_at[0] is None


def test_max_length_and_the_models_own_limit() -> None:
    model = thresher.attach(make("bert"))
    long = " ".join(["w5"] * 100)
    assert len(explain(model, tokenizer(), [long])[0].tokens) == 48 < DEFAULT_MAX_LENGTH
    assert len(explain(model, tokenizer(), [long], max_length=6)[0].tokens) == 6


def test_the_mode_of_the_model_stays() -> None:
    model = thresher.attach(make("bert"), READS_LESS).train()
    explain(model, tokenizer(), [TEXT])
    assert model.training


def test_the_answers_in_words() -> None:
    config = DistilBertConfig(id2label={0: "bad", 1: "good"}, label2id={"bad": 0, "good": 1})
    assert answer({"logits": torch.tensor([[0.0, 4.0]])}, config, [], []) == "good, 0.98"
    assert answer({"logits": torch.tensor([[3.14159]])}, config, [], []) == "3.14"
    assert answer({"last_hidden_state": torch.zeros(1)}, config, [], []) == ""


def test_the_answer_of_a_span_model_lies_in_the_context() -> None:
    start = torch.tensor([9.0, 8.0, 0.0, 0.0, 5.0, 0.0, 0.0])
    end = torch.tensor([9.0, 8.0, 0.0, 4.0, 0.0, 3.0, 9.0])
    offsets = [(0, 0), (0, 3), (0, 0), (0, 2), (3, 6), (7, 9), (0, 0)]
    logits = torch.stack([start, end], -1)
    found = Span.best(logits, [3, 4, 5], offsets, "it was me")
    assert found.answer is not None
    assert (found.answer.text, found.place, found.score, found.null) == ("was me", (4, 6), 8.0, 18.0)
    nothing = Span.best(logits, [], offsets, "\u0301")  # no token of the context was read
    assert (nothing.answer, nothing.place, nothing.score) == (None, None, -math.inf)


class SureForQuestionAnswering(BertForQuestionAnswering):
    """Answers with the word `sure`, and more surely the more often it stands there."""

    sure = "w9"

    def forward(self, input_ids: torch.Tensor, **others: Any) -> Any:
        said = super().forward(input_ids, **others)
        there = (input_ids == tokenizer().convert_tokens_to_ids(self.sure)).float()
        logits = 10 * there + there.sum() - (there.cumsum(1) > 1).float()
        return said.__class__(start_logits=logits, end_logits=logits)


def test_of_several_windows_the_one_with_the_best_answer_shows_it() -> None:
    model = thresher.attach(SureForQuestionAnswering(config_of("bert", num_labels=2)).eval())
    texts = [("w5", "w6 w9 w7"), ("w5", "w9 w8 w9"), ("w6", "w7 w9")]
    maps = explain(model, tokenizer(), texts, questions=[0, 0, 1])
    assert [one.note for one in maps] == ["", "w9", "w9"]
    assert [one.answer for one in maps] == [None, (3, 4), (4, 5)]
    assert [one.note for one in explain(model, tokenizer(), texts, questions=[0, 0, 1], threshold=-99.0)] == [
        "",
        "no answer",
        "no answer",
    ]


def test_a_question_is_never_the_answer_and_a_special_token_written_out_is_text() -> None:
    model = thresher.attach(SureForQuestionAnswering(config_of("bert", num_labels=2)).eval())
    nothing, split = explain(model, tokenizer(), [("w9", "\u0301"), ("w5 [SEP]", "w9 [SEP] w6")])
    assert (nothing.note, nothing.answer) == ("", None)
    assert split.tokens.count(" [SEP] ") == 1 and split.note == "w9"


def test_the_answer_of_a_tagger() -> None:
    config = DistilBertConfig(id2label={0: "O", 1: "PER"}, label2id={"O": 0, "PER": 1})
    logits = torch.tensor([[[0.0, 1.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]]])
    pieces, ids = ["[CLS] ", "Ada", " met", " Bob"], [None, 0, 0, 0]
    row = Reading(("Ada met Bob",), {}, ((0, 0), (0, 3), (4, 7), (8, 11)), tuple(ids))
    assert answer({"logits": logits}, config, pieces, row) == "Ada PER, Bob PER"
    words = replace(row, words=(None, 0, 1, 1))  # the second word's tag is that of its first token
    assert answer({"logits": logits}, config, pieces, words) == "Ada PER"


@pytest.mark.parametrize("words", [["w5", "[SEP]", "w6"], ["w5w6", "w7"], ["w5", "  ", "w6"]])
def test_a_tagger_is_shown_the_tokens_that_it_is_asked_about(words: list[str]) -> None:
    """As the task encodes words: each by itself, a special token among them being a word like any other."""
    model = thresher.attach(make("bert", "token"))
    task = TaggingTask(("O", "B-x", "I-x"))
    encoded = task.encode([{"tokens": words}], tokenizer(), require_tags=False)
    row = Reading.of_words(words, tokenizer())
    assert row.inputs["input_ids"] == encoded.rows["input_ids"][0]
    (found,) = explain(model, tokenizer(), [row])
    assert len(found.tokens) == len(row.inputs["input_ids"])
    assert " ".join("".join(found.tokens).split()) == "[CLS] " + " ".join(" ".join(words).split()) + " [SEP]"


def test_classes_that_go_together_are_each_shown() -> None:
    model = build(config_of("bert", num_labels=3, problem_type="multi_label_classification"))
    with torch.no_grad():
        model.classifier.weight.zero_()
        model.classifier.bias.copy_(torch.tensor([2.0, -2.0, 0.5]))
    (found,) = explain(thresher.attach(model), tokenizer(), [TEXT])
    assert found.note == "LABEL_0 0.88, LABEL_2 0.62"
    with torch.no_grad():
        model.classifier.bias.fill_(-1.0)
    (found,) = explain(model, tokenizer(), [TEXT])
    assert found.note == "no class"


def test_what_is_no_list_of_texts_is_refused() -> None:
    model = thresher.attach(make("bert"))
    for texts, says in (
        (TEXT, "one text"),
        (5, "not 5"),
        ([("a", "b", "c")], "a text or a pair"),
        ([5], "a text or a pair"),
    ):
        with pytest.raises(DataError, match=says):
            explain(model, tokenizer(), texts)
    for length in (0, 2, "16"):
        with pytest.raises(OptionError, match="maximum length"):
            explain(model, tokenizer(), [TEXT], length)
    with pytest.raises(DataError, match="2 texts are windows of as many questions, and 1 are named"):
        explain(thresher.attach(make("bert", "question-answering")), tokenizer(), [TEXT, TEXT], questions=[0])


@pytest.mark.parametrize("head", ["token", "question-answering", "base"])
def test_every_head(head: str) -> None:
    model = thresher.attach(make("bert", head), READS_LESS)
    (found,) = explain(model, tokenizer(), [("w5 w6", TEXT)])
    assert found.kept < len(found.tokens)


def test_one_value() -> None:
    model = thresher.attach(build(config_of("bert", num_labels=1)), READS_LESS)
    with torch.no_grad():
        value = float(model(**tokenizer()([TEXT], return_tensors="pt")).logits)
    (found,) = explain(model, tokenizer(), [TEXT])
    assert float(found.note) == pytest.approx(value, rel=0.01)


def test_a_sentence_transformer(minilm: str) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    model = thresher.attach(sentence_transformers.SentenceTransformer(minilm), thresher.AttentionMass())
    (found,) = explain(model, model.tokenizer, ["A film that nobody will remember."])
    assert "".join(found.tokens) == "[CLS] A film that nobody will remember. [SEP]"
    assert found.note == ""
    assert found.kept < len(found.tokens)


def scattered(model: Any, seed: int) -> Any:
    """Branches that say different things of different texts."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in exit_of(model).parameters():
            parameter.normal_(0.0, 0.5, generator=generator)
    return model


def test_a_text_says_after_which_layer_it_left() -> None:
    model = scattered(thresher.attach(make("bert"), READS_LESS, exit=Confidence()), 1)
    texts = [" ".join(f"w{5 + (7 * i + 3 * k) % 50}" for k in range(4 + i)) for i in range(12)]
    exit_of(model).mode = "record"
    sure, alone = [], []
    for text in texts:
        with torch.no_grad(), thresher.tracing() as traces:
            model(**tokenizer()([text], return_tensors="pt"))
        sure.append(float(traces[0].branches[0].softmax(-1).max()))
    exit_of(model).mode = "leave"
    thresher.set_exit(model, threshold=sum(sorted(sure)[5:7]) / 2)  # half of them leave after the first layer
    for text in texts:
        with torch.no_grad(), thresher.tracing() as traces:
            model(**tokenizer()([text], return_tensors="pt"))
        alone += traces[0].exited_at
    assert alone.count(1) == 6
    found = explain(model, tokenizer(), texts)
    assert [one.exited_at for one in found] == alone
    assert [one.left_early for one in found] == [layer < 3 for layer in alone]
    assert all(one.frozen_at is None for one in found)
    for one in found:  # nothing drops after the row is gone
        assert all(layer is None or layer <= one.exited_at for layer in one.dropped_at)  # type: ignore[operator]


def test_without_an_exit_nothing_is_said_of_one() -> None:
    (found,) = explain(thresher.attach(make("bert"), READS_LESS), tokenizer(), [TEXT])
    assert (found.exited_at, found.frozen_at, found.left_early) == (None, None, False)


@pytest.mark.parametrize(("threshold", "left"), [(0.0, 1), (1.0, 3)])
def test_all_leave_at_once_and_none_leaves(threshold: float, left: int) -> None:
    model = thresher.attach(make("bert"), exit=Confidence(threshold=threshold))
    (found,) = explain(model, tokenizer(), [TEXT], salient="gradient-x-input")
    assert (found.exited_at, found.kept) == (left, 10)
    assert found.saliency_by == "gradient-x-input"


def test_each_token_says_after_which_layer_it_froze() -> None:
    model = thresher.attach(make("bert", "token", layers=4), exit=TokEE(threshold=0.7, window=1))
    seen: set[int] = set()
    for seed in range(12):
        scattered(model, seed)
        with torch.no_grad(), thresher.tracing(record=True) as traces:
            model(**tokenizer()([TEXT], return_tensors="pt"))
        (found,) = explain(model, tokenizer(), [TEXT])
        assert found.frozen_at is not None
        assert [layer or 0 for layer in found.frozen_at] == traces[0].frozen_at()[0].tolist()
        assert found.exited_at == traces[0].exited_at[0]
        if found.left_early:
            assert found.exited_at == max(layer or 0 for layer in found.frozen_at)
        seen |= {layer or 0 for layer in found.frozen_at}
    assert len(seen) > 2, "tokens must freeze at different layers for this test to say anything"


def test_a_slow_tokenizer_is_refused() -> None:
    class Slow:
        is_fast = False

    slow: Any = Slow()
    with pytest.raises(OptionError, match="fast tokenizer"):
        explain(thresher.attach(make("bert")), slow, [TEXT])
