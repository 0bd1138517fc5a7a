"""The model, its policy and its exit as one ONNX graph for one sequence of any length. Every drop is a gather inside it; the
places where a row may leave are outputs, at which `chain` cuts it."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import logging
import math
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.onnx import symbolic_helper
from torch.onnx import symbolic_opset9 as opset9
from torch.onnx import symbolic_opset11 as opset11
from torch.onnx import symbolic_opset14 as opset14
from torch.onnx.utils import register_custom_op_symbolic, unregister_custom_op_symbolic

from thresher.errors import OptionError, ThresherError
from thresher.exits import EXIT_CONFIGS, Exit
from thresher.exported.directory import DROPPED_AT, LEAVES, after
from thresher.methods import CONFIGS
from thresher.model import attachment_of, evaluating, find_encoder
from thresher.outputs import CLASSES, SPANS
from thresher.policy import Trace, tracing

OPSET = 17
FUSED_DOMAIN = "com.microsoft"
ANSWERS = ("logits", "scores", "sentence_embedding", "start_logits", "end_logits", "last_hidden_state")

Ends = list[
    tuple[int, tuple[str, ...]]
]  # layers after which a row may leave (the last: 0), and the outputs that say so


class _OneSequence(nn.Module):
    """Positional tensors in, positional tensors out: what a tracer wants."""

    def __init__(self, model: Any, inputs: tuple[str, ...], exit: Exit[Any] | None, *, drops: bool) -> None:
        super().__init__()
        self.model = model
        self.inputs = inputs
        self.drops = drops
        self.exit = [exit]  # in a list, as a model's exit is none of its modules
        self.ends: Ends = []

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        """[1, N] each → the model's answers, and [N] the layer at which each token was dropped (0 = never); before them the
        same for each layer after which a row may leave, and [1] whether it does."""
        features = dict(zip(self.inputs, values, strict=True))
        with tracing() as traces:
            outputs = call(self.model, features)
        answers = {name: outputs[name] for name in ANSWERS if name in outputs and outputs[name] is not None}
        if len(answers) > 1:
            answers.pop("last_hidden_state", None)
        answers[DROPPED_AT] = dropped_at(traces[-1].kept, values[0][0], drops=self.drops)
        (exit,) = self.exit
        every = {} if exit is None else early(exit, traces[-1], values[0][0], drops=self.drops)
        every[0] = answers
        self.ends = [(layer, tuple(after(layer, name) for name in found)) for layer, found in every.items()]
        return tuple(value for found in every.values() for value in found.values())


def early(exit: Exit[Any], trace: Trace, ids: Tensor, *, drops: bool) -> dict[int, dict[str, Tensor]]:
    """By the layers after which one row may leave: its answer there, what was dropped by then, and whether it leaves.

    trace: of a pass in which every branch spoke. ids: [N].
    """
    found: dict[int, dict[str, Tensor]] = {}
    memory = None
    for layer, said in enumerate(trace.branches, start=1):
        if not exit.config.may_leave(layer):
            continue
        leaving, memory = exit.decide(layer, said, memory)
        if leaving is None:
            continue
        columns = (said[..., 0], said[..., 1]) if exit.head.kind == "span" else (said,)
        answers = dict(zip(SPANS if len(columns) > 1 else CLASSES, columns, strict=True))
        found[layer] = {**answers, DROPPED_AT: dropped_at(trace.kept[:layer], ids, drops=drops), LEAVES: leaving}
    return found


def call(model: Any, features: dict[str, Tensor]) -> Any:
    """The model on one sequence; a SentenceTransformer or CrossEncoder takes its features as one dictionary."""
    if find_encoder(model) is model:
        return model(**features)
    features = {**features, "attention_mask": torch.ones_like(features["input_ids"])}
    outputs = dict(model(features))
    activation: Callable[[Tensor], Tensor] | None = getattr(model, "activation_fn", None)
    if "scores" in outputs and activation is not None:  # what CrossEncoder.predict returns
        outputs = {"scores": activation(outputs["scores"])}
    return outputs


def dropped_at(kept: list[Tensor], ids: Tensor, *, drops: bool) -> Tensor:
    """[N] int64 from the positions that were left after each layer; ids: [N]. drops: whether any policy is there to drop."""
    if not drops:
        return torch.zeros_like(ids)
    present = survived = torch.zeros_like(ids)
    # Layers after which nothing new was dropped share their positions, and are counted together.
    for _, layers in itertools.groupby(kept, key=id):
        alike = list(layers)
        survived = torch.zeros_like(ids).scatter(0, alike[0], torch.ones_like(alike[0]))
        present = present + survived * len(alike)
    return (present + 1) * (1 - survived)


def input_names(model: Any) -> tuple[str, ...]:
    """What one sequence consists of: token ids, and token types where the family tells segments apart."""
    encoder = find_encoder(model)
    takes = inspect.signature(type(encoder.base_model).forward).parameters
    typed = "token_type_ids" in takes and getattr(encoder.config, "type_vocab_size", 0) > 1
    return ("input_ids", "token_type_ids") if typed else ("input_ids",)


def exportable_methods() -> list[str]:
    return sorted(name for name, config in CONFIGS.items() if config.exports)


def check_exportable(model: Any) -> None:
    """Raises OptionError for what a graph cannot hold."""
    attachment = attachment_of(model)
    encoder = find_encoder(model)
    policy = attachment.policy
    if policy is not None and not type(policy.config).exports:
        raise OptionError(
            f"The method {policy.config.method!r} cannot be written as a graph; these can: "
            f"{', '.join(exportable_methods())}."
        )
    if attachment.exit is not None and not attachment.exit.config.exports:
        raise OptionError(
            f"The exit {attachment.exit.config.method!r} cannot be written as graphs; these can: "
            f"{', '.join(sorted(name for name, config in EXIT_CONFIGS.items() if config.exports))}."
        )
    if policy is not None and policy.mode == "soft":
        raise OptionError("The policy is in its soft training mode, in which nothing drops; finish training first.")
    if encoder.device.type != "cpu" or encoder.dtype != torch.float32:
        raise OptionError(
            f"Export takes a float32 model on the CPU, not {encoder.dtype} on {encoder.device}; call "
            "model.to('cpu', torch.float32) first."
        )


def write_graph(model: Any, path: Path, *, fused: bool) -> tuple[tuple[str, ...], Ends]:
    """Trace the attached model into an ONNX file; returns the names of its inputs, and of its outputs by where a row ends.

    fused: attention that nobody reads becomes one operator of ONNX Runtime's own, which others do not know.

    Raises OptionError for a policy or an exit that a graph cannot hold, ThresherError when tracing fails.
    """
    check_exportable(model)
    names = input_names(model)
    attachment = attachment_of(model)
    exit = attachment.exit if attachment.exit is not None and not attachment.exit.idle else None
    wrapped = _OneSequence(model, names, exit, drops=attachment.policy is not None)
    geometry = attachment.engine.entrance.geometry
    heads = geometry.heads, geometry.attention // geometry.heads
    # The first example token stands for any; a second length shows nothing that the names of the axes do not say.
    example = torch.full((1, 7), int(find_encoder(model).config.pad_token_id or 0) + 1)
    values = (example, *(torch.zeros_like(example) for _ in names[1:]))
    try:
        # The model last to be put back: it is a part of what wraps it.
        with (
            evaluating(model),
            evaluating(wrapped),
            torch.no_grad(),
            _constant(attachment),
            _quiet(),
            _written(heads if fused else None),
        ):
            wrapped(*values)  # names the outputs
            torch.onnx.export(
                wrapped,
                values,
                str(path),
                dynamo=False,  # the tracer follows a drop's new length; torch.export needs a bound for it
                opset_version=OPSET,
                input_names=list(names),
                output_names=[name for _, ended in wrapped.ends for name in ended],
                dynamic_axes={name: {1: "tokens"} for name in names},
                custom_opsets={FUSED_DOMAIN: 1} if fused else None,
            )
    except (RuntimeError, torch.onnx.errors.OnnxExporterError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ThresherError(
            f"{type(find_encoder(model)).__name__} could not be written as a graph: {reason}"
        ) from error
    return names, wrapped.ends


@contextlib.contextmanager
def _constant(attachment: Any) -> Iterator[None]:
    """Inside this block policy and exit do not learn, and every branch of the exit speaks while nobody leaves."""
    exit = attachment.exit
    learned = [
        p for part in (attachment.policy, exit) if part is not None for p in part.parameters() if p.requires_grad
    ]
    mode = None if exit is None else exit.mode
    try:
        for parameter in learned:
            parameter.requires_grad_(False)
        if exit is not None and not exit.idle:
            exit.mode = "record"
        yield
    finally:
        for parameter in learned:
            parameter.requires_grad_(True)
        if exit is not None:
            exit.mode = mode


@contextlib.contextmanager
def _written(heads: tuple[int, int] | None) -> Iterator[None]:
    """Inside this block the tracer writes what it knows too little of as plain operators. heads: their number and size, to
    write attention as one operator, which makes no map of all pairs; None: it stays what it is made of."""
    found: dict[str, Callable[..., Any]] = {"aten::squeeze": _squeeze, "aten::index_copy": _index_copy}
    if heads is not None:
        found["aten::scaled_dot_product_attention"] = partial(_attention, heads)
    for name, symbolic in found.items():
        register_custom_op_symbolic(name, symbolic, OPSET)
    try:
        yield
    finally:
        for name in found:
            unregister_custom_op_symbolic(name, OPSET)


def _squeeze(g: Any, x: Any, dim: Any = None) -> Any:
    """Of a dimension that is 1: not, as torch would write it, "where it is 1"."""
    if dim is None:
        return opset11.squeeze(g, x)
    return g.op("Squeeze", x, g.op("Constant", value_t=torch.tensor([symbolic_helper._get_const(dim, "i", "dim")])))


def _index_copy(g: Any, x: Any, dim: Any, index: Any, rows: Any) -> Any:
    """Whole rows at a time: not, as torch would write it, an index for each of their numbers."""
    if symbolic_helper._get_const(dim, "i", "dim") != 0:
        return opset9.index_copy(g, x, dim, index, rows)
    places = g.op("Unsqueeze", index, g.op("Constant", value_t=torch.tensor([1])))
    return g.op("ScatterND", x, places, rows)


def _attention(
    heads: tuple[int, int],
    g: Any,
    query: Any,
    key: Any,
    value: Any,
    mask: Any,
    dropout: Any,
    causal: Any,
    scale: Any,
    *_: Any,
) -> Any:
    """[1, H, N, d] each; without a mask that is com.microsoft::MultiHeadAttention, else what torch makes of it."""
    if not symbolic_helper._is_none(mask):
        return opset14.scaled_dot_product_attention(g, query, key, value, mask, dropout, causal, scale)
    count, size = heads

    def reshaped(x: Any, *shape: int) -> Any:
        return g.op("Reshape", x, g.op("Constant", value_t=torch.tensor(shape)))

    sides = [reshaped(g.op("Transpose", x, perm_i=[0, 2, 1, 3]), 1, -1, count * size) for x in (query, key, value)]
    factor = 1 / math.sqrt(size) if symbolic_helper._is_none(scale) else symbolic_helper._maybe_get_const(scale, "f")
    context = g.op(f"{FUSED_DOMAIN}::MultiHeadAttention", *sides, num_heads_i=count, scale_f=factor)
    context.setType(
        query.type().with_sizes([1, None, count * size])
    )  # of what it does not know the tracer knows no type
    return g.op("Transpose", reshaped(context, 1, -1, count, size), perm_i=[0, 2, 1, 3])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the tracer's warnings: of every Python number, and of its own age."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    try:
        logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


__all__ = ["Ends", "call", "check_exportable", "exportable_methods", "input_names", "write_graph"]
