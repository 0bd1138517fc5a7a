"""How much each token of a row matters for what a model says: four measures, one form."""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from thresher.backbones import enter
from thresher.engine import keep_everything
from thresher.errors import DataError, OptionError, nearest
from thresher.measure.run import batches, collate
from thresher.methods.adapler import CONTRIBUTIONS, PLACES, AdapLeRPolicy
from thresher.model import attachment_of, detach, evaluating, find_encoder, is_attached
from thresher.padding import padded
from thresher.policy import tracing
from thresher.settings import is_whole
from thresher.targets import IGNORED, LABELS, check_labels, check_tokens
from thresher.tasks.given import as_rows

if TYPE_CHECKING:
    import datasets

Method = Literal["gradient-x-input", "integrated-gradients", "attention", "contribution"]
Inputs = dict[str, Tensor]
Measure = Callable[[Any, Inputs, Inputs], Tensor]  # model, inputs and labels of a batch → [B, N], none negative


def saliency(
    model: Any,
    rows: datasets.Dataset | Mapping[str, Tensor],
    method: Method = "gradient-x-input",
    *,
    batch_size: int | None = None,
    steps: int = 20,
    on_batch: Callable[[int], object] | None = None,
) -> list[np.ndarray]:
    """How much each token of each row matters, [n] float32 that sum to 1, in the order of the rows.

    model: a Hugging Face model with its head, a CrossEncoder, or for attention also a SentenceTransformer; attached or not.
        Or a sequence of such, whose raw scores are averaged.
    rows: encoded rows, or one padded batch of tensors [B, N] with its attention mask. batch_size: see `measure.run.batches`.
    method: "gradient-x-input", the norm of gradient * embedding, of what the first layer reads (AdapLeR's target);
        "integrated-gradients" (Sundararajan et al. 2017), the gradient averaged along the straight line to that embedding
        from the one with the average word in each place, times their difference, summed, without its sign; by
        Gauss-Legendre quadrature of so many `steps`.
        Both ask for the gradient of the logit of the row's label, or where it has none of what the model itself says; for
        spans of the start's and the end's logit together, for tags of every token's.
        "attention": the attention that a token receives from the row's tokens, a mean over heads and layers.
        "contribution": what the predictors of a model with AdapLeR say as it reads, a mean over layers; a dropped token
        has nothing from then on.
    on_batch: called with the number of rows just done.
    The gradients and the attention are those of the model that drops nothing. A row in which every token scores 0 gets even
    scores.
    Raises OptionError for a method that this model cannot give; DataError, naming the row (from 1), for a token or a label that
    the model does not have, and for scores that are not finite.
    """
    if method not in get_args(Method):
        raise OptionError(f"There is no saliency {method!r}{nearest(str(method), get_args(Method))}")
    if not is_whole(steps) or steps < 1:
        raise OptionError(f"steps must be a whole number of at least 1, not {steps!r}.")
    models = list(model) if isinstance(model, list | tuple) else [model]
    if not models:
        raise OptionError("Give saliency a model, or several.")
    measures = [_measure(one, method, steps) for one in models]
    encoder = find_encoder(models[0])
    found: dict[int, np.ndarray] = {}
    with torch.inference_mode(False):  # whose tensors no gradient can be taken by
        for index, inputs, labels in _batches(encoder, rows, batch_size):
            scores = torch.stack([_measured(one, measure, inputs, labels) for one, measure in measures]).mean(0)
            mask = inputs["attention_mask"].bool()
            finite = torch.isfinite(scores).logical_or(~mask).all(1)
            if not bool(finite.all()):
                row = index[int((~finite).nonzero()[0, 0])]
                raise DataError(
                    f"Row {row + 1} has a saliency that is not finite: the model's weights are not, or what it computes "
                    "overflows. Check the weights, run the model in float32, or leave the row out."
                )
            for row, score, real in zip(index, scores, mask, strict=True):
                found[row] = _shares(score[real])
            if on_batch:
                on_batch(len(index))
    return [found[row] for row in range(len(found))]


def _shares(scores: Tensor) -> np.ndarray:
    """[n] none negative → [n] that sum to 1; n may be 0."""
    values = scores.double().cpu().numpy()
    total = values.sum()
    if not len(values):
        return np.zeros(0, np.float32)
    return (values / total if total > 0 else np.full_like(values, 1 / len(values))).astype(np.float32)


def _measure(model: Any, method: Method, steps: int) -> tuple[Any, Measure]:
    """The model to ask, which may be a copy, and how. Raises OptionError when it cannot be asked."""
    encoder = find_encoder(model)
    if method == "attention":
        return _showing_attention(encoder), _attention
    if method == "contribution":
        policy = attachment_of(encoder).policy if is_attached(encoder) else None
        if not isinstance(policy, AdapLeRPolicy) or policy.mode != "hard":
            raise OptionError(
                "Contributions are what AdapLeR's predictors say, and this model has none; fit it with the method 'adapler', "
                "or ask for another saliency."
            )
        return encoder, _contribution
    if method == "integrated-gradients":
        nodes, weights = np.polynomial.legendre.leggauss(steps)
        line = [((node + 1) / 2, weight / 2) for node, weight in zip(nodes, weights, strict=True)]
        return encoder, lambda model, inputs, labels: integrated(model, inputs, labels, line).abs()
    return encoder, _gradient_x_input


def _measured(model: Any, measure: Measure, inputs: Inputs, labels: Inputs) -> Tensor:
    with evaluating(model), torch.enable_grad():
        return measure(model, inputs, labels).detach().float()


def _batches(
    encoder: Any, rows: datasets.Dataset | Mapping[str, Tensor], batch_size: int | None
) -> Iterator[tuple[list[int], Inputs, Inputs]]:
    """Row numbers, the model's inputs [B, N] and the rows' labels, batch by batch."""
    if isinstance(rows, Mapping) and all(isinstance(value, Tensor) for value in rows.values()):
        _check_batch(encoder, rows)
        usable = {name: value.clone() if value.is_inference() else value for name, value in rows.items()}
        given = {name: value.to(encoder.device) for name, value in usable.items()}
        labels = {name: given.pop(name) for name in LABELS if name in given}
        given.setdefault("attention_mask", torch.ones_like(given["input_ids"]))
        yield list(range(len(given["input_ids"]))), given, labels
        return
    rows = as_rows(rows)
    check_tokens(encoder, rows)
    check_labels(encoder, rows)
    pad_id = encoder.config.pad_token_id or 0
    known = [name for name in LABELS if name in rows.column_names]
    tags = type(encoder).__name__.endswith("ForTokenClassification")
    for index in batches(rows, batch_size):
        inputs = collate(rows, index, pad_id, encoder.device)
        picked = rows[index]
        width = inputs["input_ids"].shape[1]
        if "attention_mask" not in inputs:
            sizes = torch.tensor([len(ids) for ids in picked["input_ids"]], device=encoder.device)
            inputs["attention_mask"] = (torch.arange(width, device=encoder.device) < sizes.unsqueeze(1)).long()
        labels = {
            name: (padded(picked[name], IGNORED, width) if tags else torch.tensor(picked[name])).to(encoder.device)
            for name in known
        }
        yield index, inputs, labels


def _check_batch(encoder: Any, batch: Mapping[str, Tensor]) -> None:
    """Raises DataError for tensors that are no batch, or labels that are not the model's."""
    if "input_ids" not in batch:
        raise DataError(f"A batch needs input_ids; it has {', '.join(batch) or 'nothing'}.")
    if len({len(value) for value in batch.values()}) > 1:
        sizes = ", ".join(f"{name} of {len(value)}" for name, value in batch.items())
        raise DataError(f"The tensors of a batch are of the same rows, and these are not: {sizes}.")
    columns = {name: value.tolist() for name, value in batch.items() if name in (*LABELS, "input_ids")}
    check_tokens(encoder, columns)
    check_labels(encoder, columns)


# --- gradients ----------------------------------------------------------------------------------------------------


def _gradient_x_input(model: Any, inputs: Inputs, labels: Inputs) -> Tensor:
    embedding, gradient = _gradient(model, inputs, _asked_for(model, inputs, labels), lambda hidden: hidden)
    norm: Tensor = torch.linalg.vector_norm((gradient * embedding).float(), dim=-1)
    return norm


def integrated(model: Any, inputs: Inputs, labels: Inputs, line: Sequence[tuple[float, float]]) -> Tensor:
    """[B, N] with signs: over a row they sum to how much more the logit is than that of a row of average words.

    line: where on the way from there to the embedding, and with which weight. Not from zero: layer normalisation makes a model
    all but jump there.
    """
    asked = _asked_for(model, inputs, labels)
    start = _average_words(model, inputs)
    total = torch.zeros_like(inputs["input_ids"], dtype=torch.float32)
    for place, weight in line:
        embedding, gradient = _gradient(model, inputs, asked, partial(torch.lerp, start, weight=place))
        total = total + weight * (gradient * (embedding - start)).float().sum(-1)
    return total


def _average_words(model: Any, inputs: Inputs) -> Tensor:
    """[B, N, D], what the first layer reads where every word's embedding is the mean of all words'."""
    table = model.get_input_embeddings()

    def average(module: Any, args: Any, output: Tensor) -> Tensor | None:
        return mean.expand_as(output) if threading.get_ident() == mine else None

    mine, mean = threading.get_ident(), table.weight.detach().mean(0)
    handle = table.register_forward_hook(average)
    try:
        with torch.no_grad(), keep_everything(), _embedded(model, lambda hidden: hidden) as found:
            model(**inputs)
    finally:
        handle.remove()
    return found[0]


def _gradient(model: Any, inputs: Inputs, asked: Inputs, place: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """The embeddings [B, N, D], and the gradient of each row's logit by what `place` makes of them."""
    with keep_everything(), _embedded(model, place) as found:
        outputs = model(**inputs)
        wanted = logit(outputs, asked, inputs["attention_mask"]).sum()
    embedding, leaf = found
    return embedding, torch.autograd.grad(wanted, leaf)[0]


@contextlib.contextmanager
def _embedded(model: Any, place: Callable[[Tensor], Tensor]) -> Iterator[list[Tensor]]:
    """Inside this block the first layer reads what `place` makes of its input, as a leaf; yields the input and the leaf.

    Of this thread's next pass only: a model may be serving others.
    """
    found: list[Tensor] = []
    mine = threading.get_ident()

    def replace(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if found or threading.get_ident() != mine:
            return None
        hidden = (args[0] if args else kwargs["hidden_states"]).detach()
        found.extend((hidden, place(hidden).detach().requires_grad_()))
        if args:
            return (found[1], *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": found[1]}

    handle = enter(model).layers[0].register_forward_pre_hook(replace, with_kwargs=True, prepend=True)
    try:
        yield found
    finally:
        handle.remove()


def _asked_for(model: Any, inputs: Inputs, labels: Inputs) -> Inputs:
    """The labels whose logits are asked for: the rows' own, or what the model says."""
    if labels:
        return labels
    mask = inputs["attention_mask"].bool()
    with torch.no_grad(), keep_everything():
        outputs = model(**inputs)
    if "start_logits" in outputs:
        ends = {"start_positions": outputs["start_logits"], "end_positions": outputs["end_logits"]}
        return {name: value.masked_fill(~mask, -torch.inf).argmax(1) for name, value in ends.items()}
    logits = _logits(outputs)
    if logits.dim() == 2 and getattr(model.config, "problem_type", None) == "multi_label_classification":
        return {"labels": (logits > 0).to(logits.dtype)}
    return {"labels": logits.argmax(-1)}


def _logits(outputs: Any) -> Tensor:
    if outputs.get("logits") is None:
        raise OptionError(
            "A gradient is taken of a logit, and this model has none; give one with a classification, tagging or "
            "question-answering head, or ask for the saliency 'attention'."
        )
    return outputs["logits"]  # type: ignore[no-any-return]


def logit(outputs: Any, labels: Inputs, mask: Tensor) -> Tensor:
    """[B], what a model says for the labels: of a class its logit, of a value itself, of several classes (as ones and zeros)
    their sum, of a span start and end together, of tags the sum over the tokens that have one.

    Raises OptionError when the outputs have no such logits.
    """
    if "start_logits" in outputs:
        try:
            ends = ((outputs[f"{end}_logits"], labels[f"{end}_positions"]) for end in ("start", "end"))
            return sum(_picked(scores, place.reshape(-1)) for scores, place in ends)  # type: ignore[return-value]
        except KeyError as missing:
            raise OptionError(
                f"A question's rows have start_positions and end_positions; {missing} is missing."
            ) from None
    logits = _logits(outputs)
    wanted = labels.get("labels")
    if wanted is None:
        raise OptionError(f"This model's rows have labels, not {', '.join(labels)}.")
    if logits.dim() == 3:
        scored = mask.bool() & (wanted != IGNORED)
        return (_picked(logits, wanted.clamp(min=0)) * scored).sum(1)
    if logits.shape[-1] == 1:
        return logits[:, 0]
    if wanted.dim() == 2:
        return (logits * wanted).sum(1)
    return _picked(logits, wanted)


def _picked(values: Tensor, index: Tensor) -> Tensor:
    """values[..., C] at index[...]; one beyond the end is the last."""
    return values.gather(-1, index.clamp(0, values.shape[-1] - 1).unsqueeze(-1)).squeeze(-1)


# --- what the model itself says -----------------------------------------------------------------------------------


def _showing_attention(encoder: Any) -> Any:
    """A copy of the model as Hugging Face wrote it, whose attention maps can be seen."""
    plain = copy.deepcopy(encoder)
    if is_attached(plain):
        detach(plain)
    plain.set_attn_implementation("eager")
    return plain


def _attention(model: Any, inputs: Inputs, labels: Inputs) -> Tensor:
    with torch.no_grad():
        maps = model(**inputs, output_attentions=True)["attentions"]
    asking = inputs["attention_mask"].to(maps[0].dtype)
    received = torch.stack([torch.einsum("bhqk,bq->bk", one, asking) / one.shape[1] for one in maps]).mean(0)
    return received * asking / asking.sum(1, keepdim=True)


def _contribution(model: Any, inputs: Inputs, labels: Inputs) -> Tensor:
    total = torch.zeros(inputs["input_ids"].numel(), device=inputs["input_ids"].device)
    with torch.no_grad(), tracing(record=True) as traces:
        model(**inputs)
    told = traces[-1].auxiliary
    for share, flat in zip(told[CONTRIBUTIONS], told[PLACES], strict=True):
        total = total.index_add(0, flat, share.float())
    return (total / len(told[PLACES])).view_as(inputs["input_ids"])


__all__ = ["Method", "saliency"]
