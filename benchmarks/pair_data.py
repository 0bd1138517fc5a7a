"""SQuAD and WikiQA as encoded rows: a question with its paragraph, a question with a candidate sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import numpy as np

from thresher.tasks.data import load_rows

MAX_TOKENS = {"squad": 384, "wikiqa": 128}
SPLIT_SEED = 0


def encode(name: str, split: str, data_dir: Path, tokenizer: Any, limit: int | None = None) -> datasets.Dataset:
    """input_ids, attention_mask, token_type_ids, and what a loss and a metric need.

    squad: start_positions, end_positions (0 and 0 where the answer was cut) of the first answer, and `spans`, all of them.
    wikiqa: labels, and `question`, the number of the question a row belongs to; only questions with a right sentence.
    """
    rows = load_rows(data_dir / name, split=split)
    if name == "squad":
        rows = rows.shuffle(seed=SPLIT_SEED)
        rows = rows.select(range(min(limit or len(rows), len(rows))))
        return rows.map(lambda row: _span(row, tokenizer), remove_columns=rows.column_names)
    pairs: dict[str, list[Any]] = {"query": [], "sentence": [], "labels": [], "question": []}
    for number, row in enumerate(rows):
        if max(row["labels"], default=0) < 1 or (limit and len(pairs["labels"]) >= limit):
            continue
        for sentence, label in zip(row["candidates"], row["labels"], strict=True):
            for key, value in zip(pairs, (row["query"], sentence, int(label > 0), number), strict=True):
                pairs[key].append(value)
    flat = datasets.Dataset.from_dict(pairs)

    def tokens(batch: dict[str, list[str]]) -> Any:
        return tokenizer(batch["query"], batch["sentence"], truncation=True, max_length=MAX_TOKENS[name])

    return flat.map(tokens, batched=True, remove_columns=["query", "sentence"])


def _span(row: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    made = tokenizer(
        row["question"].strip(),
        row["context"],
        truncation="only_second",
        max_length=MAX_TOKENS["squad"],
        return_offsets_mapping=True,
    )
    offsets = made.pop("offset_mapping")
    inside = [i for i, side in enumerate(made.sequence_ids()) if side == 1]
    spans = []
    for text, start in zip(row["answers"]["text"], row["answers"]["answer_start"], strict=True):
        end = start + len(text)
        covered = [i for i in inside if offsets[i][0] < end and offsets[i][1] > start]
        whole = bool(covered) and offsets[covered[-1]][1] >= end
        spans.append([covered[0], covered[-1]] if whole else [0, 0])
    return {**made, "start_positions": spans[0][0], "end_positions": spans[0][1], "spans": spans}


def quality(name: str, answers: list[np.ndarray], rows: datasets.Dataset) -> float:
    """squad: share of questions whose best start and end are those of an answer (token by token, so a little stricter than
    exact match). wikiqa: mean reciprocal rank of the first right sentence.

    answers: one array a row: [N, 2] start and end logits, or [2] logits.
    """
    if name == "squad":
        best = [tuple(np.asarray(a)[: len(ids)].argmax(0)) for a, ids in zip(answers, rows["input_ids"], strict=True)]
        return float(np.mean([list(map(int, b)) in spans for b, spans in zip(best, rows["spans"], strict=True)]))
    scores = np.array([a[1] - a[0] for a in answers])
    questions, labels = np.array(rows["question"]), np.array(rows["labels"])
    ranks = []
    for question in np.unique(questions):
        mine = questions == question
        order = np.argsort(-scores[mine], kind="stable")
        ranks.append(1 + int(np.argmax(labels[mine][order] == 1)))
    return float(np.mean(1 / np.array(ranks)))
