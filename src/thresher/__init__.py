"""Thresher: Hugging Face encoders that read less."""

from thresher.engine import keep_everything, simulated_drops, stock
from thresher.errors import ThresherError
from thresher.methods.ltp import LTP, RelativeThreshold, RisingThreshold
from thresher.methods.retention import AttentionMass, CascadeTopK, FirstTokens, LastTokens, RandomTokens
from thresher.model import attach, detach, load, policy_of, save, validate
from thresher.policy import tracing

__version__ = "0.1.0"

__all__ = [
    "LTP",
    "AttentionMass",
    "CascadeTopK",
    "FirstTokens",
    "LastTokens",
    "RandomTokens",
    "RelativeThreshold",
    "RisingThreshold",
    "ThresherError",
    "attach",
    "detach",
    "keep_everything",
    "load",
    "policy_of",
    "save",
    "simulated_drops",
    "stock",
    "tracing",
    "validate",
]
