"""Thresher: Hugging Face encoders that read less.

Names load when they are first used, so that `import thresher` and the command line's help stay quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from thresher.calibration import calibrate
    from thresher.engine import keep_everything, simulated_drops, stock
    from thresher.errors import ThresherError
    from thresher.explanation import explain
    from thresher.exported.runner import Runner
    from thresher.exported.writing import export
    from thresher.memory import keep_memory
    from thresher.methods.ase import ASE
    from thresher.methods.block_skim import BlockSkim
    from thresher.methods.length_adaptive import LengthAdaptive
    from thresher.methods.ltp import LTP, RelativeThreshold, RisingThreshold
    from thresher.methods.power_bert import PowerBert
    from thresher.methods.retention import AttentionMass, CascadeTopK, FirstTokens, LastTokens, RandomTokens
    from thresher.methods.transkimmer import Transkimmer
    from thresher.model import attach, detach, load, policy_of, quantize, save, set_config, set_speedup, validate
    from thresher.policy import Stage, retaining, tracing
    from thresher.searching import search
    from thresher.training import fit, post_train

__version__ = "0.1.0"

_HOME = {
    "calibration": ("calibrate",),
    "engine": ("keep_everything", "simulated_drops", "stock"),
    "errors": ("ThresherError",),
    "explanation": ("explain",),
    "exported.runner": ("Runner",),
    "exported.writing": ("export",),
    "memory": ("keep_memory",),
    "methods.ase": ("ASE",),
    "methods.block_skim": ("BlockSkim",),
    "methods.length_adaptive": ("LengthAdaptive",),
    "methods.ltp": ("LTP", "RelativeThreshold", "RisingThreshold"),
    "methods.power_bert": ("PowerBert",),
    "methods.retention": ("AttentionMass", "CascadeTopK", "FirstTokens", "LastTokens", "RandomTokens"),
    "methods.transkimmer": ("Transkimmer",),
    "model": ("attach", "detach", "load", "policy_of", "quantize", "save", "set_config", "set_speedup", "validate"),
    "policy": ("Stage", "retaining", "tracing"),
    "searching": ("search",),
    "training": ("fit", "post_train"),
}
# What a missing package is installed with.
_EXTRA = {"torch": "torch", "transformers": "torch", "safetensors": "torch", "datasets": "train", "accelerate": "train"}
_MODULE = {name: f"thresher.{module}" for module, names in _HOME.items() for name in names}

__all__ = [
    "ASE",
    "LTP",
    "AttentionMass",
    "BlockSkim",
    "CascadeTopK",
    "FirstTokens",
    "LastTokens",
    "LengthAdaptive",
    "PowerBert",
    "RandomTokens",
    "RelativeThreshold",
    "RisingThreshold",
    "Runner",
    "Stage",
    "ThresherError",
    "Transkimmer",
    "attach",
    "calibrate",
    "detach",
    "explain",
    "export",
    "fit",
    "keep_everything",
    "keep_memory",
    "load",
    "policy_of",
    "post_train",
    "quantize",
    "retaining",
    "save",
    "search",
    "set_config",
    "set_speedup",
    "simulated_drops",
    "stock",
    "tracing",
    "validate",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE:
        raise AttributeError(f"module 'thresher' has no attribute {name!r}")
    try:
        return getattr(import_module(_MODULE[name]), name)
    except ModuleNotFoundError as error:
        extra = _EXTRA.get(error.name or "")
        if extra is None:
            raise
        from thresher.errors import ThresherError

        raise ThresherError(f'thresher.{name} needs {error.name}; run pip install "thresher[{extra}]".') from error


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
