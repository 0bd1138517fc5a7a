"""attach, detach, validate: what a user does to a model. In place, the class and the outputs stay."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from thresher import checkpoint
from thresher.backbones import enter
from thresher.backbones.heads import remove_noted_heads
from thresher.engine import Engine, keep_everything, stock
from thresher.errors import OptionError, ThresherError, UnsupportedModelError, nearest
from thresher.exits import EXIT_CONFIGS, Exit, ExitConfig, TokEEExit, build_exit, exit_class
from thresher.frontier import configured, frontier_of
from thresher.linears import check_int8
from thresher.methods import build, config_class
from thresher.policy import Policy, PolicyConfig

ModelT = TypeVar("ModelT")


@dataclass
class Attachment:
    """What attach leaves on a model (as the plain attribute `thresher_attachment`, so state-dict keys do not change)."""

    engine: Engine
    policy: Policy[Any] | None
    outer: str
    notes: dict[str, Any] = field(default_factory=dict)
    exit: Exit[Any] | None = None


def find_encoder(model: Any) -> PreTrainedModel:
    """The Hugging Face model itself, or the one inside a SentenceTransformer or CrossEncoder."""
    if isinstance(model, PreTrainedModel):
        return model
    if isinstance(model, nn.Module):
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                return module
    raise UnsupportedModelError(
        f"{type(model).__name__} holds no Hugging Face model; give a PreTrainedModel, a SentenceTransformer or a CrossEncoder."
    )


def attach(
    model: ModelT,
    policy: PolicyConfig | str | None = None,
    *,
    exit: ExitConfig | str | None = None,
    quantize: Literal["int8"] | None = None,
) -> ModelT:
    """Make `model` run packed and, with a policy, read less; with an exit, let rows leave early. In place; the same object
    comes back.

    model: a Hugging Face encoder with or without a head, a SentenceTransformer or a CrossEncoder.
    policy: a method's configuration, e.g. AttentionMass(retention=(.8, .6, .45, .3, .2, .1)), or a method's name for its
        defaults. None: packed, nothing dropped. Attaching again replaces the policy and the exit.
    exit: an exit's configuration, e.g. FastBERT(threshold=.3), or its name. Its branches know nothing before they are trained
        (`fit` with the same exit). Works with every policy (TokEE with none), for classes, values, spans and tags.
    quantize: "int8" to compute the layers' linear layers in int8 (see `thresher.quantize`).
    Raises UnsupportedModelError for a family that cannot be entered, OptionError for a policy or an exit that does not fit the
    model.
    """
    encoder = find_encoder(model)
    remove_noted_heads(encoder)
    entrance = enter(encoder)
    if isinstance(policy, str):
        if policy in EXIT_CONFIGS:
            raise OptionError(f"{policy!r} is an early exit: attach(model, exit={policy!r}).")
        policy = config_class(policy)()
    built = None if policy is None else build(policy, entrance.geometry)
    if isinstance(exit, str):
        exit = exit_class(exit)()
    leaving = None if exit is None else build_exit(exit, entrance.geometry, encoder)
    if isinstance(leaving, TokEEExit) and built is not None:
        raise OptionError(
            f"The exit {leaving.config.method!r} freezes tokens and goes without a method that drops them; leave the method "
            'out, or take the exit "sentee".'
        )
    if quantize not in (None, "int8"):
        raise OptionError(f'quantize is "int8" or None, not {quantize!r}.')
    if quantize:
        check_int8()
    if is_attached(encoder):
        detach(encoder)
    if built is not None:
        built.to(encoder.device)
    if leaving is not None:
        leaving.to(encoder.device)
    engine = Engine(encoder, entrance, built, leaving, quantize or "float32")
    engine.install()
    encoder.thresher_attachment = Attachment(engine, built, type(model).__name__, exit=leaving)  # type: ignore[assignment]
    encoder.save_pretrained = partial(_save_pretrained, encoder)  # type: ignore[method-assign]
    return model


def quantize(model: ModelT) -> ModelT:
    """Compute the linear layers of an attached model's layers in int8 on the CPU; works with every policy. In place.

    Weights are quantized symmetrically with one scale for each output channel, activations for each call. The model keeps
    its float32 weights: it can be saved, detached, and trained on (gradients flow through float32). Embeddings, attention
    and the head stay in float32; on other devices and in other dtypes nothing changes. `save` remembers it. Measure what
    it costs in quality with `thresher evaluate`.
    Raises OptionError when nothing is attached or torch has no int8 kernels; warns where the processor lacks the
    instructions.
    """
    engine = attachment_of(model).engine
    check_int8()
    engine.set_precision("int8")
    return model


def detach(model: ModelT) -> ModelT:
    """Take everything off again: the stock model, exactly. Raises OptionError when nothing is attached."""
    encoder = find_encoder(model)
    attachment_of(encoder).engine.remove()
    del encoder.thresher_attachment
    del encoder.save_pretrained
    return model


def is_attached(model: Any) -> bool:
    return "thresher_attachment" in find_encoder(model).__dict__


def attachment_of(model: Any) -> Attachment:
    found = find_encoder(model).__dict__.get("thresher_attachment")
    if found is None:
        raise OptionError("This model has nothing attached; call thresher.attach(model) first.")
    return found  # type: ignore[no-any-return]


def policy_of(model: Any) -> Policy[Any]:
    """The policy on a model: its parameters, `auxiliary_loss(trace, batch)` and `mode`.

    Raises OptionError when there is none.
    """
    policy = attachment_of(model).policy
    if policy is None:
        raise OptionError("The model runs packed but has no policy; call thresher.attach(model, policy).")
    return policy


def exit_of(model: Any) -> Exit[Any]:
    """The exit on a model: its branches, configuration and `mode`. Raises OptionError when there is none."""
    found = attachment_of(model).exit
    if found is None:
        raise OptionError("The model has no exit; call thresher.attach with exit=, or thresher.fit, which trains it.")
    return found


def set_exit(model: Any, **settings: Any) -> None:
    """Choose when rows leave without training again: `threshold`, `patience`, `tolerance` or `window`, as the exit has it,
    `strength`, and the layers `after` which they may.

    set_exit(model, threshold=.3). A value given is the value used: where strength scales it and is not given too, that is 1
    again. For the passes that start from now on; `save` keeps it.
    Raises OptionError for a setting that this exit does not take at run time, or a value out of range.
    """
    attachment, old = attachment_of(model), exit_of(model)
    known = type(old.config).at_run_time()
    if not settings:
        raise OptionError(f"Give set_exit something to set: {', '.join(known)}.")
    for name in settings:
        if name not in known:
            raise OptionError(f"The exit {old.config.method!r} cannot be set to another {name!r}{nearest(name, known)}")
    fresh = {"strength": 1.0} if set(settings) & set(old.config.scaled) else {}
    attachment.exit = attachment.engine.exit = old.configured(old.config.replace(**{**fresh, **settings}))


def set_config(model: Any, config: PolicyConfig) -> None:
    """Change the settings of the attached policy; what it has learned stays.

    Raises OptionError when `config` is of another method: attach that one instead.
    """
    attachment = attachment_of(model)
    old = policy_of(model)
    if type(config) is not type(old.config):
        raise OptionError(f"The attached method is {old.config.method!r}; to change to {config.method!r}, attach it.")
    policy = build(config, old.geometry)
    policy.load_state_dict(old.state_dict())
    policy.mode = old.mode
    policy.to(find_encoder(model).device)
    attachment.policy = policy
    attachment.engine.set_policy(policy)


def set_speedup(model: Any, speedup: float) -> None:
    """Set the attached policy to the point of the model's frontier (see `thresher.search`) that keeps the most quality among
    those with at least this FLOPs speedup.

    Raises TargetError when the model has no frontier, or its frontier no such point.
    """
    found = frontier_of(attachment_of(model).notes)
    set_config(model, configured(policy_of(model).config, found.at(speedup).retention))


def _save_pretrained(encoder: PreTrainedModel, save_directory: Any, **options: Any) -> None:
    attachment = attachment_of(encoder)
    write_plain = partial(type(encoder).save_pretrained, encoder, **options)
    checkpoint.write(
        save_directory,
        write_plain,
        attachment.policy,
        type(encoder),
        attachment.outer,
        attachment.notes,
        attachment.engine.precision,
        attachment.exit,
    )


def save(model: Any, directory: Any) -> None:
    """Write the model with its policy, all or nothing; otherwise the same as model.save_pretrained(directory)."""
    attachment_of(model)
    with checkpoint.staged(directory) as staging:
        model.save_pretrained(str(staging))


def load(directory: Any, *, device: str | torch.device | None = None, speedup: float | None = None) -> Any:
    """The model that save_pretrained wrote, policy attached, in eval mode: of the class that was saved (also a
    SentenceTransformer or CrossEncoder).

    speedup: the point of its frontier to run at, see `set_speedup`; None: as it was saved.
    Raises CheckpointError, saying which file is missing, corrupted or belongs to another model; TargetError for a speedup that
    its frontier does not reach.
    """
    saved = checkpoint.read(directory)
    model = saved.load_plain(device)
    try:
        attach(model, saved.config, exit=saved.exit, quantize="int8" if saved.precision == "int8" else None)
    except OptionError as error:
        raise checkpoint.mismatch(directory, error) from error
    attachment = attachment_of(model)
    attachment.notes.update(saved.notes)
    if attachment.exit is not None:  # which tells layers apart, so first
        saved.load_exit(attachment.exit)
    if attachment.policy is not None:
        saved.load_policy(attachment.policy)
    if speedup is not None:
        set_speedup(model, speedup)
    return model


@dataclass(frozen=True)
class Validation:
    """The largest difference between the stock and the packed outputs, by output; and the tolerance it stayed within."""

    differences: Mapping[str, float]
    tolerance: float

    @property
    def worst(self) -> float:
        return max(self.differences.values(), default=0.0)


def validate(model: Any, inputs: Mapping[str, Tensor] | Sequence[Any], tolerance: float = 1e-4) -> Validation:
    """Prove on your own inputs that the attached model, dropping nothing, is the stock model.

    inputs: what the model takes: a dict of tensors; or texts (pairs of texts) for a SentenceTransformer (CrossEncoder).
    Raises ThresherError when an output differs by more than `tolerance`.
    """
    attachment_of(model)
    with evaluating(model), torch.no_grad():
        with stock():
            expected = _outputs(model, inputs)
        with keep_everything():
            got = _outputs(model, inputs)
    differences = {name: float((expected[name] - got[name]).abs().max()) for name in expected}
    result = Validation(differences, tolerance)
    if not differences or not all(d <= tolerance for d in differences.values()):
        raise ThresherError(
            f"Packed and stock outputs differ by {result.worst:.2g} (allowed {tolerance:.2g}), so this model must not be run "
            "packed; please report its family and your transformers version."
        )
    return result


def _outputs(model: Any, inputs: Any) -> dict[str, Tensor]:
    if not isinstance(inputs, Mapping):
        run = model.encode if hasattr(model, "encode") else model.predict
        return {"output": torch.as_tensor(run(list(inputs), show_progress_bar=False))}
    outputs = model(**inputs)
    mask = inputs.get("attention_mask")
    found = {}
    for name, value in outputs.items():
        if isinstance(value, Tensor):
            per_token = mask is not None and value.shape[:2] == mask.shape
            found[name] = value[mask.bool()] if mask is not None and per_token else value
    return found


@contextlib.contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """eval mode inside the block, the former mode after it."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
