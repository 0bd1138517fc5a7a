"""Leaving early: branches after the layers, and rules by which a row's answer is taken there. For every policy."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from thresher.backbones.opened import open_layers
from thresher.errors import OptionError, UnsupportedModelError, nearest
from thresher.exits.base import Exit, ExitConfig, Head, head_of
from thresher.exits.branches import NO_ANSWER
from thresher.exits.certain import (
    Confidence,
    ConfidenceExit,
    DeeBERT,
    DeeBERTExit,
    FastBERT,
    FastBERTExit,
)
from thresher.exits.settled import (
    PABEE,
    PABEEExit,
    SettledSpan,
    SettledSpanExit,
    SettledStates,
    SettledStatesExit,
)
from thresher.exits.tags import SENTEE, SENTEEExit, TokEE, TokEEExit
from thresher.policy import Geometry

EXITS: dict[type[ExitConfig], type[Exit[Any]]] = {
    Confidence: ConfidenceExit,
    DeeBERT: DeeBERTExit,
    FastBERT: FastBERTExit,
    PABEE: PABEEExit,
    SENTEE: SENTEEExit,
    SettledSpan: SettledSpanExit,
    SettledStates: SettledStatesExit,
    TokEE: TokEEExit,
}

EXIT_CONFIGS: dict[str, type[ExitConfig]] = {config.method: config for config in EXITS}


def exit_class(name: str) -> type[ExitConfig]:
    """The configuration class of an exit by name. Raises OptionError, suggesting the nearest names."""
    if name not in EXIT_CONFIGS:
        raise OptionError(f"There is no exit {name!r}{nearest(name, EXIT_CONFIGS)}")
    return EXIT_CONFIGS[name]


def build_exit(config: ExitConfig, geometry: Geometry, model: PreTrainedModel) -> Exit[Any]:
    """The exit that a configuration describes, for an encoder of this geometry with this head.

    Raises OptionError for a head that it does not serve, UnsupportedModelError for TokEE in a family whose layers cannot be
    opened.
    """
    if type(config) not in EXITS:
        raise OptionError(f"{type(config).__name__} is not the configuration of an exit; see thresher methods.")
    built = EXITS[type(config)](config, geometry, head_of(model))
    if isinstance(built, TokEEExit):
        try:
            open_layers(model)
        except UnsupportedModelError as error:
            raise UnsupportedModelError(f"The exit {config.method!r} freezes tokens inside layers. {error}") from error
    return built


__all__ = [
    "EXITS",
    "EXIT_CONFIGS",
    "NO_ANSWER",
    "PABEE",
    "SENTEE",
    "Confidence",
    "DeeBERT",
    "Exit",
    "ExitConfig",
    "FastBERT",
    "Head",
    "SettledSpan",
    "SettledStates",
    "SettledStatesExit",
    "TokEE",
    "TokEEExit",
    "build_exit",
    "exit_class",
    "head_of",
]
