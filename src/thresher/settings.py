"""What the settings of a method, an exit and a scorer have in common: the user's API, and what is saved."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Self, Union, get_args, get_origin

from thresher.errors import OptionError, nearest


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A frozen dataclass that goes to JSON values and comes back."""

    def __post_init__(self) -> None:
        """Raises OptionError for a setting of another kind than its own, or too large for a float32."""
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            value, hint = getattr(self, field.name), hints[field.name]
            if not _fits(value, hint):
                raise OptionError(f"{field.name} must be {_called(hint)}, not {value!r}.")
            object.__setattr__(self, field.name, _as(value, hint))  # 64.0 and numpy's own as what JSON knows

    @classmethod
    def called(cls) -> str:
        """What an error calls their owner, e.g. "method 'ltp'"."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """What `to_dict` gave, lists as tuples. Raises OptionError for a setting that there is not."""
        known = {f.name for f in dataclasses.fields(cls)}
        for name in values:
            if name not in known:
                raise OptionError(f"The {cls.called()} has no setting {name!r}{nearest(name, known)}")
        settings: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**settings)

    def replace(self, **changes: Any) -> Self:
        return dataclasses.replace(self, **changes)


_KINDS: dict[type, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    type(None): "none",
}
_SEVERAL: dict[type, str] = {bool: "truths", int: "whole numbers", float: "numbers", str: "texts"}
MOST = 3.4e38  # a float32


def _kinds(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (types.UnionType, Union) else (hint,)


def _of(kind: Any) -> Any:
    """What a `tuple[T, ...]` is of; None for any other kind."""
    return get_args(kind)[0] if get_origin(kind) is tuple and get_args(kind)[-1] is Ellipsis else None


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a kind that its hint names; kinds that are not known here are their owner's to check."""
    for kind in _kinds(hint):
        if (of := _of(kind)) is not None:
            if isinstance(value, tuple | list) and all(_fits(one, of) for one in value):
                return True
        elif kind not in _KINDS or _is(value, kind):
            return True
    return False


def _as(value: Any, hint: Any) -> Any:
    kinds = _kinds(hint)
    if isinstance(value, tuple | list):
        of = next((of for kind in kinds if (of := _of(kind)) is not None), None)
        return value if of is None else tuple(_as(one, of) for one in value)
    if isinstance(value, bool | str | None):
        return value
    if int in kinds and (float not in kinds or is_whole(value)) and is_number(value):
        return int(value)
    return float(value) if float in kinds and not isinstance(value, int) else value


def _called(hint: Any) -> str:
    def one(kind: Any, several: bool = False) -> str:
        of = _of(kind)
        if of is not None:
            return "a list of " + " or ".join(one(each, True) for each in _kinds(of))
        return (_SEVERAL if several else _KINDS).get(kind, str(kind))

    return " or ".join(one(kind) for kind in _kinds(hint))


def is_whole(value: Any) -> bool:
    """A whole number, numpy's too; no bool."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """A real number, numpy's too, perhaps infinite or NaN; no bool."""
    return isinstance(value, Real) and not isinstance(value, bool)


def _is(value: Any, kind: type) -> bool:
    if kind is int:
        return (is_whole(value) or (is_number(value) and float(value).is_integer())) and abs(value) < 2**63
    if kind is float:
        return is_number(value) and (not -math.inf < value < math.inf or abs(value) <= MOST)
    return isinstance(value, kind)


__all__ = ["Settings", "is_number", "is_whole"]
