"""The command line: it parses, calls the library and prints. What it needs beyond the library is the extra `cli`."""

from __future__ import annotations

import os
import sys

from thresher.memory import keep_memory

# The packages of the extra, by the names they are imported by.
EXTRA = (
    *("typer", "rich", "jinja2", "matplotlib", "datasets", "accelerate", "sklearn", "scipy"),
    *("torch", "transformers", "safetensors"),
)


def main() -> None:
    """The console script. Without the packages it needs it says so in one sentence and exits with 1."""
    keep_memory()
    # torch's C++ warnings are not for whoever types a command, who can do nothing about them; read once, when torch is loaded.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        from thresher.cli.commands import app

        app()
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in EXTRA:
            raise
        print(f'Error: The command line needs {missing}; run pip install "thresher[cli]".', file=sys.stderr)
        raise SystemExit(1) from None


__all__ = ["main"]
