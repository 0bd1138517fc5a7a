"""One file a paper. The table maps each configuration class to its policy; a new method is one line here."""

from __future__ import annotations

from typing import Any

from thresher.errors import OptionError, nearest
from thresher.methods.adapler import AdapLeR, AdapLeRPolicy
from thresher.methods.ase import ASE, ASEPolicy
from thresher.methods.block_skim import BlockSkim, BlockSkimPolicy
from thresher.methods.length_adaptive import LengthAdaptive, LengthAdaptivePolicy
from thresher.methods.ltp import LTP, LTPPolicy, RelativeThreshold, RisingThreshold, ThresholdPolicy
from thresher.methods.pooling import Pooling, PoolingPolicy
from thresher.methods.power_bert import PowerBert, PowerBertPolicy
from thresher.methods.retention import (
    AttentionMass,
    CascadeTopK,
    FirstTokens,
    LastTokens,
    RandomTokens,
    RetentionPolicy,
)
from thresher.methods.tr_bert import TRBert, TRBertPolicy
from thresher.methods.transkimmer import Transkimmer, TranskimmerPolicy
from thresher.policy import Geometry, Policy, PolicyConfig

METHODS: dict[type[PolicyConfig], type[Policy[Any]]] = {
    ASE: ASEPolicy,
    AdapLeR: AdapLeRPolicy,
    AttentionMass: RetentionPolicy,
    BlockSkim: BlockSkimPolicy,
    CascadeTopK: RetentionPolicy,
    FirstTokens: RetentionPolicy,
    LastTokens: RetentionPolicy,
    LTP: LTPPolicy,
    LengthAdaptive: LengthAdaptivePolicy,
    Pooling: PoolingPolicy,
    PowerBert: PowerBertPolicy,
    RandomTokens: RetentionPolicy,
    RelativeThreshold: ThresholdPolicy,
    RisingThreshold: ThresholdPolicy,
    TRBert: TRBertPolicy,
    Transkimmer: TranskimmerPolicy,
}

CONFIGS: dict[str, type[PolicyConfig]] = {config.method: config for config in METHODS}


def config_class(name: str) -> type[PolicyConfig]:
    """The configuration class of a method by name. Raises OptionError, suggesting the nearest names."""
    if name not in CONFIGS:
        raise OptionError(f"There is no method {name!r}{nearest(name, CONFIGS)}")
    return CONFIGS[name]


def build(config: PolicyConfig, geometry: Geometry) -> Policy[Any]:
    """The policy that a configuration describes, for an encoder of this geometry."""
    if type(config) not in METHODS:
        raise OptionError(f"{type(config).__name__} is not the configuration of a method; see thresher methods.")
    return METHODS[type(config)](config, geometry)


__all__ = ["CONFIGS", "METHODS", "build", "config_class"]
