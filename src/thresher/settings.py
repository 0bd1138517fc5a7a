"""What the settings of a method, an exit and a scorer have in common: the user's API, and what is saved."""

from __future__ import annotations

import dataclasses
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
        """Raises OptionError for a setting of another kind than its own; those of collections are not looked at."""
        for name, kinds in _plain(type(self)).items():
            value = getattr(self, name)
            if not any(_is(value, kind) for kind in kinds):
                raise OptionError(f"{name} must be {' or '.join(_KINDS[kind] for kind in kinds)}, not {value!r}.")
            if int in kinds and not isinstance(value, bool | int | str | None) and float not in kinds:
                object.__setattr__(self, name, int(value))  # 64.0, and numpy's own

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


def _plain(cls: type[Settings]) -> dict[str, tuple[type, ...]]:
    """The kinds that each setting may have, of those settings that are plain values."""
    hints, found = typing.get_type_hints(cls), {}
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        kinds = get_args(hint) if get_origin(hint) in (types.UnionType, Union) else (hint,)
        if all(kind in _KINDS for kind in kinds):
            found[field.name] = kinds
    return found


def is_whole(value: Any) -> bool:
    """A whole number, numpy's too; no bool."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """A real number, numpy's too, perhaps infinite or NaN; no bool."""
    return isinstance(value, Real) and not isinstance(value, bool)


def _is(value: Any, kind: type) -> bool:
    if kind is int:
        return is_whole(value) or (isinstance(value, float) and value.is_integer())
    if kind is float:
        return is_number(value)
    return isinstance(value, kind)


__all__ = ["Settings", "is_number", "is_whole"]
