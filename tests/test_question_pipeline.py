"""transformers' pipeline for questions against the task's own windows and answers."""

from __future__ import annotations

from typing import Any

import pytest
import transformers

import thresher
from helpers import make, settings, tokenizer
from thresher.errors import DataError
from thresher.measure.run import run
from thresher.methods import CONFIGS
from thresher.tasks.answering import QuestionTask

ASKED = [
    {"question": "w5 w6", "context": " ".join(f"w{5 + i % 40}" for i in range(n)), "id": str(n)} for n in (7, 90, 31)
]
TASK = {"max_length": 40, "stride": 8}


def pipeline_of(model: Any) -> Any:
    return thresher.QuestionAnswering(model, tokenizer(), device="cpu")


@pytest.mark.parametrize("family", ["bert", "distilbert", "modernbert"])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_it_answers_as_the_task_does(family: str, batch_size: int) -> None:
    model = thresher.attach(make(family, "question-answering"), settings(CONFIGS["attention-mass"]))
    found = pipeline_of(model)([dict(row) for row in ASKED], batch_size=batch_size, top_k=3, **TASK)
    encoded = QuestionTask(**TASK).encode(ASKED, tokenizer())  # type: ignore[arg-type]
    assert len(encoded.rows) > len(ASKED)  # one of them takes several windows
    wanted = encoded.answers(run(model, encoded.rows).predictions, 20)
    for ours, theirs in zip(found, wanted, strict=True):
        assert [(one["answer"], one["start"], one["end"]) for one in ours] == [
            (one.text, one.start, one.end) for one in theirs[:3]
        ]
        assert 1 > ours[0]["score"] >= ours[1]["score"] >= ours[2]["score"] > 0


def test_by_the_name_of_a_task_that_transformers_has_not() -> None:
    assert thresher.QuestionAnswering
    model = make("bert", "question-answering")
    ask: Any = transformers.pipeline("extractive-question-answering", model=model, tokenizer=tokenizer(), device="cpu")
    assert ask(dict(ASKED[0])) == pipeline_of(model)(dict(ASKED[0]))


def test_one_question_and_no_answer() -> None:
    ask = pipeline_of(make("bert", "question-answering"))
    one = ask(question=ASKED[0]["question"], context=ASKED[0]["context"])
    assert ASKED[0]["context"][one["start"] : one["end"]] == one["answer"] != ""
    assert ask(dict(ASKED[0])) == one
    never = ask(dict(ASKED[0]), threshold=-1e6)
    assert (never["answer"], never["start"], never["end"]) == ("", 0, 0)
    nothing_read = ask(question="w5", context="\u0301")
    assert nothing_read == {"answer": "", "score": 1.0, "start": 0, "end": 0}


@pytest.mark.parametrize(
    "asked", ["w5", {"question": "w5"}, {"question": "w5", "context": " "}, {"question": 5, "context": "w5"}], ids=str
)
def test_what_is_no_question_is_refused(asked: Any) -> None:
    with pytest.raises(DataError):
        pipeline_of(make("bert", "question-answering"))(asked)
