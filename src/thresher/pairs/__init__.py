"""One query, many candidates: each candidate is encoded once, kept, and scored against every query.

Names load when they are first used, so that the store needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from thresher.pairs.cache import Block, Cache
    from thresher.pairs.colbert import ColBERT, ColBERTConfig
    from thresher.pairs.config import ScorerConfig
    from thresher.pairs.cross import CrossConfig, CrossEncoder
    from thresher.pairs.deformer import DeFormer, DeFormerConfig
    from thresher.pairs.dual import DualConfig, DualEncoder
    from thresher.pairs.evaluation import Ranked, evaluate, evaluate_corpus
    from thresher.pairs.flops import PairFlops, pair_flops
    from thresher.pairs.keeping import Added, Index
    from thresher.pairs.learning import train
    from thresher.pairs.losses import PairLearner, PairLoss
    from thresher.pairs.mixencoder import MixEncoder, MixEncoderConfig
    from thresher.pairs.poly import PolyConfig, PolyEncoder
    from thresher.pairs.prefilter import Prefilter, PrefilterCalibration, PrefilterFlops
    from thresher.pairs.reranker import Reranker
    from thresher.pairs.saving import SCORERS, load, save
    from thresher.pairs.scorer import Scorer
    from thresher.pairs.virt import VIRT, VIRTConfig

_HOME = {
    "cache": ("Block", "Cache"),
    "colbert": ("ColBERT", "ColBERTConfig"),
    "config": ("ScorerConfig",),
    "cross": ("CrossConfig", "CrossEncoder"),
    "deformer": ("DeFormer", "DeFormerConfig"),
    "dual": ("DualConfig", "DualEncoder"),
    "evaluation": ("Ranked", "evaluate", "evaluate_corpus"),
    "flops": ("PairFlops", "pair_flops"),
    "keeping": ("Added", "Index"),
    "learning": ("train",),
    "losses": ("PairLearner", "PairLoss"),
    "mixencoder": ("MixEncoder", "MixEncoderConfig"),
    "poly": ("PolyConfig", "PolyEncoder"),
    "prefilter": ("Prefilter", "PrefilterCalibration", "PrefilterFlops"),
    "reranker": ("Reranker",),
    "saving": ("SCORERS", "load", "save"),
    "scorer": ("Scorer",),
    "virt": ("VIRT", "VIRTConfig"),
}
_MODULE = {name: f"thresher.pairs.{module}" for module, names in _HOME.items() for name in names}

__all__ = [
    "SCORERS",
    "VIRT",
    "Added",
    "Block",
    "Cache",
    "ColBERT",
    "ColBERTConfig",
    "CrossConfig",
    "CrossEncoder",
    "DeFormer",
    "DeFormerConfig",
    "DualConfig",
    "DualEncoder",
    "Index",
    "MixEncoder",
    "MixEncoderConfig",
    "PairFlops",
    "PairLearner",
    "PairLoss",
    "PolyConfig",
    "PolyEncoder",
    "Prefilter",
    "PrefilterCalibration",
    "PrefilterFlops",
    "Ranked",
    "Reranker",
    "Scorer",
    "ScorerConfig",
    "VIRTConfig",
    "evaluate",
    "evaluate_corpus",
    "load",
    "pair_flops",
    "save",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE:
        raise AttributeError(f"module 'thresher.pairs' has no attribute {name!r}")
    return getattr(import_module(_MODULE[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
