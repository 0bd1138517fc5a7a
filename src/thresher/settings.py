"""What the settings of a method, an exit and a scorer have in common: the user's API, and what is saved."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Self

from thresher.errors import OptionError, nearest


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A frozen dataclass that goes to JSON values and comes back."""

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


__all__ = ["Settings"]
