"""Memory that stays with the process."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import sys

import pytest

import thresher
from thresher.memory import give_back_memory

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


# What is kept lies between what lives, so that nothing but asking for it gives it back.
GAPS = """
import sys, torch, thresher
from thresher.memory import give_back_memory
thresher.keep_memory()
def resident():
    return int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmRSS"))) // 1024
large, small = [], []
for _ in range(40):
    large.append(torch.ones(2_000_000))
    small.append(torch.ones(20_000))
before = resident()
large.clear()
kept = resident()
give_back_memory()
print(before - kept, kept - resident())
"""


@glibc
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="the system does not say")
def test_gaps_are_given_back_when_asked() -> None:
    done = subprocess.run([sys.executable, "-c", GAPS], capture_output=True, text=True, check=True)
    at_once, asked = map(int, done.stdout.split())
    assert at_once < 50  # megabytes, of about 300
    assert asked > 200


def test_another_c_library_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    give_back_memory()
