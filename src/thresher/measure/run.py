"""Run a model over encoded rows: predictions in the caller's order, and what every pass read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from thresher.engine import keep_everything
from thresher.errors import DataError, OptionError
from thresher.measure.flops import speedup
from thresher.model import attachment_of, evaluating, find_encoder, is_attached
from thresher.padding import padded
from thresher.policy import Trace, tracing
from thresher.settings import is_whole
from thresher.targets import check_tokens

if TYPE_CHECKING:
    import datasets

TOKENS = 4096  # enough to keep every core busy, few enough for the caches and for memory
MODEL_INPUTS = ("input_ids", "attention_mask", "token_type_ids")

Batch = tuple[list[int], dict[str, torch.Tensor]]  # the numbers of some rows, and their inputs [B, N]


@dataclass(frozen=True)
class Run:
    """predictions: [n, ...] in the order of the rows, [n, N, C] with NaN beyond a row's batch for heads that say something of
    every token. speedup: FLOPs of the packed model that drops nothing / FLOPs spent."""

    predictions: np.ndarray
    traces: tuple[Trace, ...]
    speedup: float


def batches(rows: datasets.Dataset, size: int | None = None, tokens: int = TOKENS) -> list[list[int]]:
    """Row numbers in batches of similar length, longest first (embeddings and heads still see padding).

    size: rows of a batch; None: as many as have `tokens` tokens together, so that every batch is about the same work.
    Raises OptionError for a size that is no whole number of at least 1.
    """
    if size is not None and (not is_whole(size) or size < 1):
        raise OptionError(f"A batch has a whole number of rows, at least 1, not {size!r}.")
    lengths = [len(ids) for ids in rows["input_ids"]]
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    if size is not None:
        return [order[i : i + size] for i in range(0, len(order), size)]
    made: list[list[int]] = []
    room = 0
    for row in order:
        if lengths[row] > room:
            made.append([])
            room = tokens
        made[-1].append(row)
        room -= lengths[row]
    return made


def collate(
    rows: datasets.Dataset, index: list[int], pad_id: int, device: torch.device | None = None
) -> dict[str, torch.Tensor]:
    """The rows at `index` as padded tensors [B, N] of the model's inputs."""
    picked = rows[index]
    width = max(map(len, picked["input_ids"]))
    return {
        name: padded(picked[name], pad_id if name == "input_ids" else 0, width).to(device)
        for name in MODEL_INPUTS
        if name in picked
    }


def prepared(model: Any, rows: datasets.Dataset, batch_size: int | None = None) -> Iterator[Batch]:
    """The rows in `batches`, collated on the model's device: a list of them serves many runs over the same rows."""
    encoder = find_encoder(model)
    check_tokens(encoder, rows)
    pad_id = encoder.config.pad_token_id or 0
    for index in batches(rows, batch_size):
        yield index, collate(rows, index, pad_id, encoder.device)


def run(
    model: Any,
    rows: datasets.Dataset | list[Batch],
    *,
    batch_size: int | None = None,
    predict: Callable[[Any, dict[str, torch.Tensor]], torch.Tensor] | None = None,
    on_batch: Callable[[int], object] | None = None,
) -> Run:
    """Predictions of `model` for every row, in eval mode.

    rows: encoded rows with input_ids and attention_mask; or what `prepared` made of them. batch_size: see `batches`. predict:
    from (model, batch) to [B, ...]; by default `answers`.
    on_batch: called with the number of rows just done (progress bars).
    Raises DataError for no rows, and for a token id that the model has no embedding of.
    """
    predict = predict or answers
    parts: list[np.ndarray] = []
    order: list[int] = []
    traces: list[Trace] = []
    with evaluating(model), torch.inference_mode():
        for index, batch in rows if isinstance(rows, list) else prepared(model, rows, batch_size):
            with tracing() as made:
                parts.append(predict(model, batch).float().cpu().numpy())
            traces.extend(made)
            order.extend(index)
            if on_batch:
                on_batch(len(index))
    if not parts:
        raise DataError("There are no rows to run the model on; give at least one.")
    predictions = np.concatenate(_same_width(parts))
    restored = np.empty_like(predictions)
    restored[order] = predictions
    ratio = 1.0
    if is_attached(model):
        attachment = attachment_of(model)
        ratio = speedup(traces, attachment.engine.entrance.geometry, attachment.policy, attachment.exit)
    return Run(restored, tuple(traces), ratio)


def run_packed(model: Any, rows: datasets.Dataset | list[Batch], **options: Any) -> Run:
    """The honest baseline: the same model, packed, nothing dropped."""
    with keep_everything():
        result = run(model, rows, **options)
    return Run(result.predictions, result.traces, 1.0)


def answers(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """What a model says about a batch, see `said`; of a CrossEncoder what its `predict` returns."""
    if find_encoder(model) is model:
        return said(model(**batch), batch.get("attention_mask"))
    outputs = model(dict(batch))
    activation: Callable[[torch.Tensor], torch.Tensor] | None = getattr(model, "activation_fn", None)
    found = said(outputs, batch.get("attention_mask"))
    return activation(found) if activation is not None and "scores" in outputs else found


def said(outputs: Any, mask: torch.Tensor | None = None) -> torch.Tensor:
    """The logits [B, ...] of a Hugging Face model (start and end logits side by side, [B, N, 2]), the embeddings [B, D] of a
    SentenceTransformer, the scores of a CrossEncoder; of a model without a head the mean over the real tokens, [B, D].

    Raises OptionError when the outputs hold none of these.
    """
    for name in ("logits", "sentence_embedding", "scores"):
        if name in outputs and outputs[name] is not None:
            return outputs[name]  # type: ignore[no-any-return]
    if "start_logits" in outputs:
        return torch.stack([outputs["start_logits"], outputs["end_logits"]], -1)
    if "last_hidden_state" in outputs and mask is not None:
        hidden: torch.Tensor = outputs["last_hidden_state"]
        weights = mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)
    raise OptionError("The model has neither logits nor an embedding to compare; give one with a known head.")


def _same_width(parts: list[np.ndarray]) -> list[np.ndarray]:
    if parts[0].ndim < 3:
        return parts
    widest = max(part.shape[1] for part in parts)
    return [np.pad(p, ((0, 0), (0, widest - p.shape[1]), (0, 0)), constant_values=np.nan) for p in parts]
