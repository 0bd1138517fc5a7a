"""What tells one data set, and one model, from another: digests that a run keeps, to refuse to go on with others."""

from __future__ import annotations

import hashlib
from typing import Any

import datasets
import torch

from thresher.model import find_encoder


def digest(rows: datasets.Dataset) -> str:
    """Of all columns of encoded rows."""
    found = hashlib.sha256()
    for name in sorted(rows.column_names):
        found.update(name.encode())
        found.update(repr(rows[name][:]).encode())
    return found.hexdigest()


def weights(model: Any) -> str:
    """A digest of an encoder's weights, those of heads and poolers, which may be new, not included."""
    found = hashlib.sha256()
    for name, value in find_encoder(model).base_model.state_dict().items():
        if "pooler" not in name:
            found.update(name.encode())
            found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


__all__ = ["digest", "weights"]
