"""What tells one data set, and one model, from another: digests that a run keeps, to refuse to go on with others."""

from __future__ import annotations

import hashlib
from typing import Any

import datasets
import torch

from thresher.model import find_encoder


def digest(rows: datasets.Dataset, truth: Any = None) -> str:
    """Of all columns of encoded rows. truth: what answers to them are judged by, where they do not hold it."""
    found = hashlib.sha256(b"" if truth is None else repr(truth).encode())
    for name in sorted(rows.column_names):
        found.update(name.encode())
        found.update(repr(rows[name][:]).encode())
    return found.hexdigest()


def weights(model: Any, *, head: bool) -> str:
    """A digest of an encoder's weights. head: whether its head and pooler count; not where they are new and drawn at random."""
    found = hashlib.sha256()
    encoder = find_encoder(model)
    for name, value in (encoder if head else encoder.base_model).state_dict().items():
        if head or "pooler" not in name:
            found.update(name.encode())
            found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


__all__ = ["digest", "weights"]
