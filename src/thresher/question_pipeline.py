"""Extractive question answering as a pipeline of transformers, which has none of its own since version 5."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForQuestionAnswering
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.pipelines.base import ChunkPipeline

from thresher.backbones.general import takes_types
from thresher.errors import DataError
from thresher.tasks.answering import EncodedQuestions, QuestionTask
from thresher.tasks.spans import Answer

TASK = "extractive-question-answering"
READ = ("input_ids", "attention_mask", "token_type_ids")


class QuestionAnswering(ChunkPipeline):
    """Answers to questions as pieces of their passages, which may be longer than the model reads (windows with a stride).

        ask = thresher.QuestionAnswering(model, tokenizer)  # or pipeline("extractive-question-answering", ...) from now on
        ask(question="Who ...?", context="...")  # {"answer": ..., "score": ..., "start": ..., "end": ...}

    It takes `question` and `context`, or a mapping with both, or a list of such mappings; of attached and of plain models.
    score: the probability of the answer among those considered; start, end: characters of the context. Further arguments:
    top_k, more answers than the best, as a list; max_length, stride and longest (see `QuestionTask`); threshold, by how much
    "no answer" must score above the best answer to be given, as the answer "" from 0 to 0 (None: only where nothing of the
    passage was read). Raises DataError for what is no question with its passage.
    """

    def _sanitize_parameters(
        self, top_k: int | None = None, threshold: float | None = None, **task: Any
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        said = {name: value for name, value in (("top_k", top_k), ("threshold", threshold)) if value is not None}
        return task, {}, said

    def __call__(
        self, inputs: Any = None, *args: Any, question: Any = None, context: Any = None, **options: Any
    ) -> Any:
        if inputs is None:
            inputs = {"question": question, "context": context}
        return super().__call__(inputs, *args, **options)

    def preprocess(self, inputs: Any, **task: Any) -> Iterator[dict[str, Any]]:  # type: ignore[override]
        if not isinstance(inputs, Mapping) or not {"question", "context"} <= set(inputs):
            raise DataError("Give a question and the context that it is asked about: question=..., context=....")
        row = {name: inputs[name] for name in ("question", "context")}
        encoded = QuestionTask(**task).encode([row], self.tokenizer, labelled=False)  # type: ignore[arg-type]
        columns = [name for name in READ if name in encoded.rows.column_names]
        if not takes_types(self.model):
            columns = [name for name in columns if name != "token_type_ids"]
        for number, window in enumerate(encoded.rows, start=1):
            tensors = {name: torch.tensor([window[name]]) for name in columns}
            yield {"is_last": number == len(encoded.rows), "encoded": encoded, **tensors}

    def _forward(self, inputs: dict[str, Any]) -> dict[str, Any]:  # type: ignore[override]
        outputs = self.model(**{name: value for name, value in inputs.items() if name in READ})
        said = {"start": outputs["start_logits"], "end": outputs["end_logits"]}
        return {"is_last": inputs["is_last"], "encoded": inputs["encoded"], **said}

    def postprocess(  # type: ignore[override]
        self, windows: Sequence[Mapping[str, Any]], top_k: int = 1, threshold: float | None = None
    ) -> Any:
        encoded: EncodedQuestions = windows[0]["encoded"]
        width = max(window["start"].shape[-1] for window in windows)
        predictions = np.full((len(windows), width, 2), np.nan)
        for number, window in enumerate(windows):
            for column, name in enumerate(("start", "end")):
                logits = window[name].float().reshape(-1).numpy()
                predictions[number, : len(logits), column] = logits
        (found,), (null,) = encoded.answers(predictions, max(top_k, 20)), encoded.nulls(predictions).tolist()
        if not found or (threshold is not None and null - found[0].score > threshold):
            found = [Answer("", 0, 0, null), *found]
        scores = np.exp(np.array([one.score - found[0].score for one in found]))
        said = [
            {"answer": one.text, "score": float(score), "start": one.start, "end": one.end}
            for one, score in zip(found[:top_k], scores / scores.sum(), strict=False)
        ]
        return said[0] if top_k == 1 else said


PIPELINE_REGISTRY.register_pipeline(TASK, pipeline_class=QuestionAnswering, pt_model=AutoModelForQuestionAnswering)

__all__ = ["TASK", "QuestionAnswering"]
