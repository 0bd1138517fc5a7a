"""Every method on one task, trained alike, judged on rows that nothing was chosen on: one frontier, and a pick."""

from __future__ import annotations

from thresher.comparing.clock import Clock
from thresher.comparing.contestants import Contestant
from thresher.comparing.judging import Part
from thresher.comparing.recipe import Comparison, compare

__all__ = ["Clock", "Comparison", "Contestant", "Part", "compare"]
