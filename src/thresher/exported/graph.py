"""The model and its policy as one ONNX graph for one sequence of any length. Every drop is a gather inside it."""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from thresher.errors import OptionError, ThresherError
from thresher.methods import CONFIGS
from thresher.model import attachment_of, evaluating, find_encoder
from thresher.policy import tracing

OPSET = 17
ANSWERS = ("logits", "scores", "sentence_embedding", "start_logits", "end_logits", "last_hidden_state")
DROPPED_AT = "dropped_at"


class _OneSequence(nn.Module):
    """Positional tensors in, positional tensors out: what a tracer wants."""

    def __init__(self, model: Any, inputs: tuple[str, ...]) -> None:
        super().__init__()
        self.model = model
        self.inputs = inputs
        self.outputs: tuple[str, ...] = ()

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        """[1, N] each → the model's answers, and [N] the layer at which each token was dropped (0 = never)."""
        features = dict(zip(self.inputs, values, strict=True))
        with tracing() as traces:
            outputs = call(self.model, features)
        answers = {name: outputs[name] for name in ANSWERS if name in outputs and outputs[name] is not None}
        if len(answers) > 1:
            answers.pop("last_hidden_state", None)
        answers[DROPPED_AT] = dropped_at(traces[-1].kept, values[0][0])
        self.outputs = tuple(answers)
        return tuple(answers.values())


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


def dropped_at(kept: list[Tensor], ids: Tensor) -> Tensor:
    """[N] int64 from the positions that were left after each layer; ids: [N]."""
    present = torch.zeros_like(ids)
    survived = torch.zeros_like(ids)
    last = None
    for positions in kept:
        if positions is not last:
            survived = torch.zeros_like(ids).scatter(0, positions, torch.ones_like(positions))
            last = positions
        present = present + survived
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
    if attachment.exit is not None:
        raise OptionError(
            f"A graph runs every layer, so a model with an exit ({attachment.exit.config.method}) is not exported; attach its "
            "method again without the exit."
        )
    if policy is not None and policy.mode == "soft":
        raise OptionError("The policy is in its soft training mode, in which nothing drops; finish training first.")
    if encoder.device.type != "cpu" or encoder.dtype != torch.float32:
        raise OptionError(
            f"Export takes a float32 model on the CPU, not {encoder.dtype} on {encoder.device}; call "
            "model.to('cpu', torch.float32) first."
        )


def write_graph(model: Any, path: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Trace the attached model into an ONNX file; returns the names of its inputs and outputs.

    Raises OptionError for a policy that a graph cannot hold, ThresherError when tracing fails.
    """
    check_exportable(model)
    names = input_names(model)
    wrapped = _OneSequence(model, names)
    # The first example token stands for any; a second length shows nothing that the names of the axes do not say.
    example = torch.full((1, 7), int(find_encoder(model).config.pad_token_id or 0) + 1)
    values = (example, *(torch.zeros_like(example) for _ in names[1:]))
    policy = attachment_of(model).policy
    learned = [p for p in policy.parameters() if p.requires_grad] if policy is not None else []
    quiet = logging.getLogger("torch.onnx")
    level = quiet.level
    try:
        quiet.setLevel(logging.ERROR)
        for parameter in learned:
            parameter.requires_grad_(False)
        # The model last to be put back: it is a part of what wraps it.
        with evaluating(model), evaluating(wrapped), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the tracer warns of every Python number, and of its own age
            wrapped(*values)  # names the outputs
            torch.onnx.export(
                wrapped,
                values,
                str(path),
                dynamo=False,  # the tracer follows a drop's new length; torch.export needs a bound for it
                opset_version=OPSET,
                input_names=list(names),
                output_names=list(wrapped.outputs),
                dynamic_axes={name: {1: "tokens"} for name in names},
            )
    except (RuntimeError, torch.onnx.errors.OnnxExporterError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ThresherError(
            f"{type(find_encoder(model)).__name__} could not be written as a graph: {reason}"
        ) from error
    finally:
        quiet.setLevel(level)
        for parameter in learned:
            parameter.requires_grad_(True)
    return names, wrapped.outputs


__all__ = ["DROPPED_AT", "call", "check_exportable", "exportable_methods", "input_names", "write_graph"]
