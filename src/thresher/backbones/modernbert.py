"""ModernBERT: pre-norm (no drop point before the feed-forward), and a token-wise norm after the last layer."""

from __future__ import annotations

from transformers import PreTrainedModel

from thresher.backbones.general import Entrance, find_layers, geometry, head_fill


def enter_modernbert(model: PreTrainedModel) -> Entrance:
    base = model.base_model
    layers = find_layers(base)
    return Entrance(
        base=base,
        layers=layers,
        calls=len(layers),
        midpoints=(None,) * len(layers),
        geometry=geometry(model, gated=True),
        fill=head_fill(model),
        tail=base.final_norm,  # type: ignore[arg-type]
        segment_end=model.config.sep_token_id,
    )
