"""Thresher: Hugging Face encoders that read less.

Names load when they are first used, so that `import thresher` and the command line's help stay quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from thresher.attribution import saliency
    from thresher.calibration import calibrate
    from thresher.comparing import compare
    from thresher.engine import keep_everything, simulated_drops, stock
    from thresher.errors import ThresherError
    from thresher.exits import PABEE, SENTEE, Confidence, DeeBERT, FastBERT, SettledSpan, SettledStates, TokEE
    from thresher.explanation import explain
    from thresher.exported.runner import Runner
    from thresher.exported.writing import export
    from thresher.memory import keep_memory
    from thresher.methods.adapler import AdapLeR
    from thresher.methods.ase import ASE
    from thresher.methods.block_skim import BlockSkim
    from thresher.methods.length_adaptive import LengthAdaptive
    from thresher.methods.ltp import LTP, RelativeThreshold, RisingThreshold
    from thresher.methods.pooling import Pooling
    from thresher.methods.power_bert import PowerBert
    from thresher.methods.retention import AttentionMass, CascadeTopK, FirstTokens, LastTokens, RandomTokens
    from thresher.methods.tr_bert import TRBert
    from thresher.methods.transkimmer import Transkimmer
    from thresher.model import (
        attach,
        detach,
        exit_of,
        load,
        policy_of,
        quantize,
        save,
        set_config,
        set_exit,
        set_speedup,
        validate,
    )
    from thresher.pairs.prefilter import Prefilter
    from thresher.policy import Stage, retaining, tracing
    from thresher.question_pipeline import QuestionAnswering
    from thresher.searching import search
    from thresher.training import fit, post_train
    from thresher.training.students import distil, prune_heads, student

__version__ = "0.1.0"

_HOME = {
    "attribution": ("saliency",),
    "calibration": ("calibrate",),
    "comparing": ("compare",),
    "engine": ("keep_everything", "simulated_drops", "stock"),
    "errors": ("ThresherError",),
    "exits": ("Confidence", "DeeBERT", "FastBERT", "PABEE", "SENTEE", "SettledSpan", "SettledStates", "TokEE"),
    "explanation": ("explain",),
    "exported.runner": ("Runner",),
    "exported.writing": ("export",),
    "memory": ("keep_memory",),
    "methods.adapler": ("AdapLeR",),
    "methods.ase": ("ASE",),
    "methods.block_skim": ("BlockSkim",),
    "methods.length_adaptive": ("LengthAdaptive",),
    "methods.ltp": ("LTP", "RelativeThreshold", "RisingThreshold"),
    "methods.pooling": ("Pooling",),
    "methods.power_bert": ("PowerBert",),
    "methods.retention": ("AttentionMass", "CascadeTopK", "FirstTokens", "LastTokens", "RandomTokens"),
    "methods.tr_bert": ("TRBert",),
    "methods.transkimmer": ("Transkimmer",),
    "model": (
        "attach",
        "detach",
        "exit_of",
        "load",
        "policy_of",
        "quantize",
        "save",
        "set_config",
        "set_exit",
        "set_speedup",
        "validate",
    ),
    "pairs.prefilter": ("Prefilter",),
    "policy": ("Stage", "retaining", "tracing"),
    "question_pipeline": ("QuestionAnswering",),
    "searching": ("search",),
    "training": ("fit", "post_train"),
    "training.students": ("distil", "prune_heads", "student"),
}
# What a missing package is installed with.
_EXTRA = {"torch": "torch", "transformers": "torch", "safetensors": "torch", "datasets": "train", "accelerate": "train"}
_MODULE = {name: f"thresher.{module}" for module, names in _HOME.items() for name in names}

__all__ = [
    "ASE",
    "LTP",
    "PABEE",
    "SENTEE",
    "AdapLeR",
    "AttentionMass",
    "BlockSkim",
    "CascadeTopK",
    "Confidence",
    "DeeBERT",
    "FastBERT",
    "FirstTokens",
    "LastTokens",
    "LengthAdaptive",
    "Pooling",
    "PowerBert",
    "Prefilter",
    "QuestionAnswering",
    "RandomTokens",
    "RelativeThreshold",
    "RisingThreshold",
    "Runner",
    "SettledSpan",
    "SettledStates",
    "Stage",
    "TRBert",
    "ThresherError",
    "TokEE",
    "Transkimmer",
    "attach",
    "calibrate",
    "compare",
    "detach",
    "distil",
    "exit_of",
    "explain",
    "export",
    "fit",
    "keep_everything",
    "keep_memory",
    "load",
    "policy_of",
    "post_train",
    "prune_heads",
    "quantize",
    "retaining",
    "saliency",
    "save",
    "search",
    "set_config",
    "set_exit",
    "set_speedup",
    "simulated_drops",
    "stock",
    "student",
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
