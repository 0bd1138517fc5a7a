"""A writer that is killed: run by test_store_crashes.py in a process of its own.

crashing.py sweep DIR     fork a writer for every system call that matters, and kill it just before or after that call
crashing.py write DIR     write until killed from outside, printing how many operations are committed
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from thresher.pairs.store import CandidateStore

CALLS = ("fsync", "replace", "unlink")
FIRST, OPERATIONS = 10, 7  # the swept operations: after so many, so many more


def operation(store: CandidateStore, number: int) -> None:
    """The changes come round: two batches in, one replaced, one out, everything in one segment."""
    turn = number // 5
    if number % 5 < 2:
        store.add(batch(turn, number % 5), vectors(number))
    elif number % 5 == 2:
        store.update(batch(turn, 0), vectors(number))
    elif number % 5 == 3:
        store.delete(batch(turn, 1))
    else:
        store.compact()


def batch(turn: int, which: int) -> list[str]:
    return [f"{turn}-{which}-{i}" for i in range(20)]


def vectors(number: int) -> np.ndarray:
    return np.full((20, 1, 4), number, np.float32)


def expected(operations: int) -> dict[str, float]:
    """What a store holds after so many operations."""
    held: dict[str, float] = {}
    for number in range(operations):
        turn = number // 5
        if number % 5 < 3:
            held |= dict.fromkeys(batch(turn, 1 if number % 5 == 1 else 0), float(number))
        elif number % 5 == 3:
            for name in batch(turn, 1):
                del held[name]
    return held


def held(store: CandidateStore) -> dict[str, float]:
    return {
        name: float(vector[0, 0])
        for part in store.chunks(64)
        for name, vector in zip(part.ids, part.vectors, strict=True)
    }


def check(directory: Path, operations: tuple[int, ...]) -> int:
    """Open the store, as a reader and as the next writer; how many operations it has."""
    reader = CandidateStore.open(directory)
    reader.verify()
    found = held(reader)
    had = [n for n in operations if found == expected(n)]
    assert had, f"not the state after any of {operations} operations"
    with CandidateStore.open(directory) as writer:
        writer.add(["new"], vectors(-1)[:1])
        names = {p.name for p in directory.iterdir()}
        named = {entry.name for entry in writer._state.manifest.files}
        assert names == named | {"lock", "manifest.jsonl"}, "left lying: " + ", ".join(sorted(names - named))
        writer.verify()
        writer.delete(["new"])
    assert held(reader) == found, "the reader's files were pulled away"
    return had[-1]


def killing(number: int, *, after: bool) -> None:
    """Have this process killed at its number-th call of CALLS."""
    left = number

    def wrapped(call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **options: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0 and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = call(*args, **options)
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return counted

    os.fsync = lambda handle: None  # a killed process loses nothing that was written, so this only saves time
    for name in CALLS:
        setattr(os, name, wrapped(getattr(os, name)))


def sweep(directory: Path) -> None:
    base = directory / "base"
    with CandidateStore.create(base, fingerprint="f", strategy="S", k=1, dim=4, dtype="float32") as store:
        for number in range(FIRST):
            operation(store, number)
    killed = 0
    for after in (False, True):
        for number in range(1, 1000):
            copy = directory / f"{after}-{number}"
            shutil.copytree(base, copy)
            reading, writing = os.pipe()
            child = os.fork()
            if child == 0:
                store = CandidateStore.open(copy)
                killing(number, after=after)
                for n in range(FIRST, FIRST + OPERATIONS):
                    operation(store, n)
                    os.write(writing, b".")
                os._exit(0)
            os.close(writing)
            _, status = os.waitpid(child, 0)
            done = FIRST + len(os.read(reading, 1000))
            os.close(reading)
            if os.WIFEXITED(status):
                assert os.WEXITSTATUS(status) == 0
                assert check(copy, (FIRST + OPERATIONS,))
                break
            killed += 1
            # What was reported is there; the one under way is there as a whole, or not at all.
            check(copy, (done, done + 1))
            shutil.rmtree(copy)
    print(killed)


def write(directory: Path) -> None:
    store = CandidateStore.open(directory)
    number = len(sys.argv) > 3 and int(sys.argv[3])
    while True:
        operation(store, number)
        number += 1
        print(number, flush=True)


if __name__ == "__main__":
    {"sweep": sweep, "write": write}[sys.argv[1]](Path(sys.argv[2]))
