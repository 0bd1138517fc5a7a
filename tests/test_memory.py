"""Memory that stays with the process."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import sys

import pytest

import thresher

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")

# A layer's life: two large tensors, the first freed while the second lives.
FAULTS = """
import resource, sys, torch, thresher
if "keep" in sys.argv:
    assert thresher.keep_memory()
torch.set_num_threads(1)
def layer():
    x = torch.ones(3_000_000)
    x = x + 1
    return x + 1
for _ in range(3):
    layer()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    layer()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(*arguments: str) -> int:
    # By itself glibc adapts, and where blocks happen to lie decides how much it gives back; so it is told to give back all.
    eager = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
    command = [sys.executable, "-c", FAULTS, *arguments]
    done = subprocess.run(command, env=eager, capture_output=True, text=True, check=True)
    return int(done.stdout)


@glibc
def test_memory_that_is_kept_is_not_faulted_in_again() -> None:
    assert faults("keep") < faults() / 3  # not none: the heap may still grow once


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert thresher.keep_memory() is False


def test_no_library_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: None) -> None:
        raise TypeError("bad argument")

    monkeypatch.setattr(ctypes, "CDLL", refuse)
    assert thresher.keep_memory() is False
