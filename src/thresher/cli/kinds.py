"""Every kind of work that a model may be for, by the name it is saved under."""

from __future__ import annotations

from thresher.cli.question_work import QuestionWork
from thresher.cli.tagging_work import TaggingWork
from thresher.cli.work import EmbeddingWork, ResponseWork, TextWork, Work

KINDS: dict[str, type[Work]] = {
    "classification": TextWork,
    "embedding": EmbeddingWork,
    "qa": QuestionWork,
    "regression": TextWork,
    "response": ResponseWork,
    "tagging": TaggingWork,
}
