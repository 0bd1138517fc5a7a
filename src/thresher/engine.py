"""A forward pass over packed tokens: pack, act at each point, restore. The model's own code runs every layer."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask
from transformers.modeling_utils import PreTrainedModel

from thresher import outputs
from thresher.attention import attend
from thresher.backbones import Entrance, Instead
from thresher.backbones.opened import OpenedLayer, open_layers
from thresher.errors import DataError, OptionError
from thresher.exits import Exit, TokEEExit
from thresher.frozen import run_layer
from thresher.linears import FastLinear, Precision, Quickened
from thresher.packed import PackedTokens, being_exported
from thresher.passes import Pass
from thresher.policy import Policy
from thresher.protection import protected_tokens
from thresher.timing import mark

INTERFACE = "thresher"
OWN_CODE = "thresher-own-code"  # the same for families off the interface, whose own code adds its mask to the logits

_current: ContextVar[Pass | None] = ContextVar("thresher_pass", default=None)
_bypassed: ContextVar[bool] = ContextVar("thresher_bypassed", default=False)
_keeping: ContextVar[bool] = ContextVar("thresher_keeping", default=False)
_simulated: ContextVar[bool] = ContextVar("thresher_simulated", default=False)


@contextlib.contextmanager
def _set(variable: ContextVar[bool]) -> Iterator[None]:
    token = variable.set(True)
    try:
        yield
    finally:
        variable.reset(token)


def stock() -> contextlib.AbstractContextManager[None]:
    """Inside this block attached models run as Hugging Face wrote them: padded, with SDPA attention where the family has it,
    nothing dropped.

    Like the blocks below it holds for this thread's context; carry it into a pool with contextvars.copy_context().run.
    """
    return _set(_bypassed)


def keep_everything() -> contextlib.AbstractContextManager[None]:
    """Inside this block attached models run packed but drop nothing: the honest baseline."""
    return _set(_keeping)


def simulated_drops() -> contextlib.AbstractContextManager[None]:
    """Inside this block dropped tokens stay in place, hidden by -inf on their attention logits, instead of leaving.

    The answers are those of physical dropping; only the cost differs. Tests and gradient checks compare the two.
    """
    return _set(_simulated)


class Engine:
    """The hooks of one attached model. Holds no state of a pass."""

    def __init__(
        self,
        model: PreTrainedModel,
        entrance: Entrance,
        policy: Policy[Any] | None,
        exit: Exit[Any] | None = None,
        precision: Precision = "float32",
    ) -> None:
        self.entrance = entrance
        self.precision = precision
        self.policy = policy
        self.exit = exit
        self.signature = inspect.signature(type(entrance.base).forward)
        self.stock_implementation = model.config._attn_implementation
        self.handles: list[Any] = []
        self.linears, self.parts_linears = Quickened(), Quickened()
        self.model = model

    def install(self) -> None:
        entrance, base = self.entrance, self.entrance.base
        self._set_implementation(OWN_CODE if entrance.instead else INTERFACE)
        for one in entrance.instead:
            setattr(one.module, one.name, partial(_instead, one))
        # The instance's forward rather than a hook: sentence-transformers calls model.forward itself.
        base.forward = functools.update_wrapper(partial(_run, self), base.forward)  # type: ignore[method-assign]
        for layer, midpoint in zip(entrance.layers, entrance.midpoints, strict=True):
            self.handles.append(layer.register_forward_pre_hook(self.on_layer, with_kwargs=True))
            self.handles.append(layer.register_forward_hook(partial(self.on_layer_end, midpoint is None)))
            if midpoint is not None:
                self.handles.append(midpoint.register_forward_hook(self.on_midpoint))
        if entrance.tail is not None:
            self.handles.append(entrance.tail.register_forward_hook(self.on_tail))
        if self.exit is not None:
            opened = open_layers(self.model) if isinstance(self.exit, TokEEExit) else [None] * len(entrance.layers)
            for layer, parts in zip(entrance.layers, opened, strict=True):
                layer.forward = functools.update_wrapper(partial(_layer, layer, parts), layer.forward)  # type: ignore[method-assign]
        if self._edits:
            outputs.guard(self.model)
        self.set_precision(self.precision)

    @property
    def _edits(self) -> bool:
        """Whether what the head says may have to be changed."""
        return (self.exit is not None and not self._hands_states) or outputs.answers_with_spans(self.model)

    @property
    def _hands_states(self) -> bool:
        """Whether rows that leave write into what the encoder ends with, as there is no head."""
        return self.exit is not None and self.exit.head.kind == "states"

    def _set_implementation(self, name: str) -> None:
        if self.entrance.instead:  # transformers' method warns and does nothing
            self.model.config._attn_implementation = name
        else:
            self.model.set_attn_implementation(name)

    def set_precision(self, precision: Precision) -> None:
        """How the layers' linear layers are computed during a pass; those of the policy and the exit stay float32."""
        self.precision = precision
        self.linears.cover(self.entrance.layers, precision, _linear)
        self._quicken_parts()

    def _quicken_parts(self) -> None:
        self.parts_linears.cover([part for part in (self.policy, self.exit) if part is not None], "float32")

    def set_policy(self, policy: Policy[Any]) -> None:
        """Another one of the same method, for the passes that start from now on."""
        self.policy = policy
        self._quicken_parts()

    def remove(self) -> None:
        self.linears.release()
        self.parts_linears.release()
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        if self._edits:
            outputs.release(self.model)
        if self.exit is not None:
            for layer in self.entrance.layers:
                del layer.forward
        del self.entrance.base.forward
        for one in self.entrance.instead:
            delattr(one.module, one.name)
        self._set_implementation(self.stock_implementation)

    def start(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Pass | None:
        """The pass for one call of the encoder with these arguments; None when it is to run as stock."""
        if _bypassed.get():
            return None
        given = self.signature.bind_partial(self.entrance.base, *args, **kwargs).arguments
        self._refuse_what_cannot_be_had(given)
        ids = given.get("input_ids")
        like = given.get("inputs_embeds") if ids is None else ids
        if like is None:
            return None  # transformers' own error says what is missing
        if len(like) == 0:
            raise DataError("The batch has no rows; give an attached model at least one.")
        if like.shape[1] == 0:
            raise DataError("The batch has no tokens; give every row at least one.")
        mask, segments = _mask_in(given), self._segments(given)
        policy, exit, edits = self._acting(like.device)
        return Pass(
            self.entrance,
            policy,
            exit,
            edits,
            mask=mask,
            segments=segments,
            protected=None if policy is None else protected_tokens(policy.config, ids, segments),
            simulated=_simulated.get(),
        )

    def _refuse_what_cannot_be_had(self, given: Mapping[str, Any]) -> None:
        base, extra = self.entrance.base, given.get("kwargs", {})
        for name in ("output_hidden_states", "output_attentions"):
            value = given.get(name, extra.get(name))
            if value or (value is None and getattr(self.model.config, name, False)):
                raise OptionError(
                    f"{name}=True has no meaning when every layer reads another number of tokens; leave it out, or read what "
                    "was dropped with thresher.tracing(record=True)."
                )
        if base.training and any(getattr(m, "gradient_checkpointing", False) for m in (base, *self.entrance.layers)):
            raise OptionError(
                "Gradient checkpointing would run the layers a second time without their pass; switch it off (packed "
                "training needs less memory already)."
            )

    def _segments(self, given: Mapping[str, Any]) -> Tensor | None:
        """The segment of each token: as given, or by where the first one ends in families that are not told."""
        ids: Tensor | None = given.get("input_ids")
        segments: Tensor | None = given.get("token_type_ids")
        named = None if self.policy is None else self.policy.config.segment_end
        end = named or self.entrance.segment_end
        if segments is not None or ids is None or end is None:
            return segments
        ends = (ids == end).long()
        return (ends.cumsum(1) - ends > 0).long()

    def _acting(self, device: torch.device) -> tuple[Policy[Any] | None, Exit[Any] | None, outputs.Edits | None]:
        """The policy and the exit that act on this call, ready for it, and where rows that leave write their answers."""
        policy, exit = self.policy, self.exit
        edits = outputs.Edits() if self._hands_states else outputs.expected()
        for part in (policy, exit):
            if part is not None:
                part.follow(device, self.entrance.base.training)
        if policy is not None and (policy.mode == "off" or _keeping.get()):
            policy = None
        if exit is not None and (exit.idle or _keeping.get() or edits is None):
            exit = None
        return policy, exit, edits

    def on_layer(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        now = _current.get()
        if now is None:
            return None
        if now.over:
            now.skip_layer()
            return None
        hidden = args[0] if args else kwargs["hidden_states"]
        tokens = now.begin_layer(hidden)
        if (rotary := kwargs.get("position_embeddings")) is not None:
            kwargs = {**kwargs, "position_embeddings": tuple(_gather_rotary(x, tokens) for x in rotary)}
        packed = tokens.hidden.unsqueeze(0)
        if args:
            return (packed, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": packed}

    def on_midpoint(self, module: nn.Module, args: Any, output: Any) -> Any:
        now = _current.get()
        if now is None or now.asking is not None:  # which no policy acts beside
            return None
        hidden, rest = (output[0], output[1:]) if isinstance(output, tuple) else (output, None)
        hidden = now.after_attention(hidden).hidden.unsqueeze(0)
        return hidden if rest is None else (hidden, *rest)

    def on_layer_end(self, also_after_attention: bool, layer: nn.Module, args: Any, output: Any) -> Any:
        now = _current.get()
        if now is None:
            return None
        hidden, rest = (output[0], output[1:]) if isinstance(output, tuple) else (output, None)
        if now.over and now.tokens is not None:
            tokens = now.tokens  # this layer was skipped
        else:
            now.beside, tokens = rest, now.end_layer(hidden, also_after_attention=also_after_attention)
        if now.layer == self.entrance.calls:
            now.end()
        if now.layer < self.entrance.calls:
            hidden = tokens.hidden.unsqueeze(0)
        elif self.entrance.tail is not None:
            now.tokens = tokens = tokens.gather()
            hidden = tokens.hidden.unsqueeze(0)
        else:
            mark("norms")
            hidden = self._restored(now, tokens)
            mark("restore")
        return hidden if rest is None else (hidden, *rest)

    def on_tail(self, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        now = _current.get()
        if now is None or now.tokens is None:
            return None
        return self._restored(now, now.tokens.with_hidden(output[0]))

    def _restored(self, now: Pass, tokens: PackedTokens) -> Tensor:
        """[B, N, D], what the encoder ends with."""
        hidden = tokens.restore(self.entrance.fill, now.mask)
        return hidden if now.edits is None else now.edits.onto(hidden, self.entrance.fill, now.mask)


def _run(engine: Engine, *args: Any, **kwargs: Any) -> Any:
    """The encoder's forward, inside a pass of its own."""
    base = engine.entrance.base
    token = _current.set(engine.start(args, kwargs))
    try:
        return type(base).forward(base, *args, **kwargs)
    finally:
        _current.reset(token)


def _layer(layer: nn.Module, opened: OpenedLayer | None, *args: Any, **kwargs: Any) -> Any:
    """A layer's forward, which has nothing to do once every row has left, and less where tokens are frozen."""
    now = _current.get()
    if now is None or not (now.over or now.asking):
        return type(layer).forward(layer, *args, **kwargs)
    hidden = args[0] if args else kwargs["hidden_states"]
    if not now.over:
        assert opened is not None
        assert now.tokens is not None
        assert now.asking is not None
        hidden = run_layer(opened, hidden, now.tokens.layout, now.asking)
    return hidden if now.beside is None else (hidden, *now.beside)


def _linear(fast: FastLinear, x: Tensor) -> Tensor:
    """A linear layer's forward: fast inside a pass, torch's own outside."""
    if _current.get() is None:
        return nn.functional.linear(x, fast.linear.weight, fast.linear.bias)
    mark("norms")
    out = fast(x)
    mark("linear")
    return out


def _instead(one: Instead, *args: Any, **kwargs: Any) -> Any:
    """A method of a family off the attention interface: its own outside a pass."""
    if _current.get() is None:
        return getattr(type(one.module), one.name)(one.module, *args, **kwargs)
    return one.function(one.module, _attention, *args, **kwargs)


def _mask_in(given: Mapping[str, Any]) -> Tensor | None:
    """[batch, tokens], or None for no padding."""
    # A graph is traced for one sequence without padding, whatever mask the model's head is given.
    mask: Tensor | None = None if being_exported() else given.get("attention_mask")
    if mask is not None and mask.dim() != 2:
        raise OptionError(
            f"An attached model takes an attention mask of shape [batch, tokens], not {list(mask.shape)}."
        )
    return mask


def _gather_rotary(table: Tensor, tokens: PackedTokens) -> Tensor:
    """[1 or B, N, d] → [1, T, d], by original position."""
    if table.shape[0] == 1:
        return table[:, tokens.positions]
    return table.reshape(-1, table.shape[-1])[tokens.layout.flat].unsqueeze(0)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query, key, value [1, H, T, d] → [1, T, H, d]."""
    now = _current.get()
    if now is None or now.tokens is None:
        return sdpa_attention_forward(  # type: ignore[no-any-return]
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    # transformers counts the window exclusively (its own value + 1).
    window = None if sliding_window is None else sliding_window - 1
    mark("norms")
    context, now.evidence = attend(
        query.squeeze(0),
        key.squeeze(0),
        value.squeeze(0),
        now.tokens,
        scale=scaling,
        dropout=dropout,
        window=window,
        wanted=now.wanted,
        position_bias=now.position_bias,
    )
    mark("attention")
    return context.unsqueeze(0), None


def _mask(stock_mask: Callable[..., Tensor | None], *args: Any, **kwargs: Any) -> Tensor | None:
    """During a packed pass nobody needs a padded mask; otherwise the stock one."""
    return None if _current.get() is not None else stock_mask(*args, **kwargs)


for _name, _stock_mask in ((INTERFACE, sdpa_mask), (OWN_CODE, eager_mask)):
    AttentionInterface.register(_name, _attention)
    AttentionMaskInterface.register(_name, partial(_mask, _stock_mask))
