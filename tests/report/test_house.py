"""The room's place in the house: plain data in, nothing heavy at import."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

import thresher.report

_FILES = sorted(Path(thresher.report.__file__).parent.glob("*.py"))


@pytest.mark.parametrize("file", _FILES, ids=lambda file: file.name)
def test_importing_it_needs_only_the_standard_library(file: Path) -> None:
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.ImportFrom | ast.Import):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            for name in names:
                own = name == "thresher.errors" or name.startswith("thresher.report")
                assert own or name.partition(".")[0] in sys.stdlib_module_names
