"""What attention does on a GPU: flash attention over packed tokens, evidence without n x n, and a padded way for the rest.

    varlen.py    torch's variable-length flash attention (half precision, Ampere or newer), which gives the log-sum-exp
    mass.py      attention mass from that log-sum-exp, by the Triton kernel in kernel.py or by torch
    blocks.py    diagonal blocks of the attention maps from it, or from padded maps
    padded.py    every other case in a few large operations: other dtypes, older GPUs, soft weights, windows after a drop

Nothing here reads a value back from the device; all sizes come from `Layout.sizes`, which the drop has fetched already.
"""

from __future__ import annotations

import torch

from thresher.cuda.blocks import diagonal_blocks
from thresher.cuda.mass import Received, means, query_weights, received
from thresher.cuda.padded import attend_padded
from thresher.cuda.varlen import fits, flash
from thresher.errors import OptionError


def require_cuda() -> None:
    """Raises OptionError when CUDA is asked for and absent."""
    if not torch.cuda.is_available():
        raise OptionError(
            f"CUDA was asked for, but torch {torch.__version__} finds no CUDA device; run this where a GPU is, with a torch "
            "that is built for it."
        )


__all__ = [
    "Received",
    "attend_padded",
    "diagonal_blocks",
    "fits",
    "flash",
    "means",
    "query_weights",
    "received",
    "require_cuda",
]
