"""The two runtimes behind one call: a dictionary of arrays in, a list of arrays out. Needs no torch."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
from numpy.typing import NDArray

from thresher.errors import CheckpointError, ThresherError, first_line
from thresher.exported.directory import Runtime

PROCESSOR = Path("/proc/cpuinfo")

# ONNX Runtime's one operator for a sum and its norm takes several times as long as the two by themselves, at every length.
SLOWER_WHEN_FUSED = ("SkipLayerNormFusion",)

Session = Callable[[dict[str, NDArray[np.int64]]], Sequence[NDArray[Any]]]


def require(runtime: Runtime, extra: str | None = None) -> Any:
    """The runtime's module. Raises ThresherError, saying which extra to install: `extra`, or that of the runtime's name."""
    try:
        if runtime == "onnx":
            import onnxruntime

            return onnxruntime
        import openvino

        return openvino
    except ImportError as error:
        package = "onnxruntime" if runtime == "onnx" else "openvino"
        raise ThresherError(f'{package} is not installed; run pip install "thresher[{extra or runtime}]".') from error


def open_session(
    runtime: Runtime, graph: Path, outputs: Sequence[str], threads: int, *, linked: bool = False
) -> Session:
    """threads: cores that one call may use; with one, several calls may run at a time. linked: whether other graphs run before
    or after this one, on the same row."""
    module = require(runtime)
    try:
        if runtime == "onnx":
            return _onnx(module, graph, list(outputs), threads, linked=linked)
        return _openvino(module, graph, list(outputs), threads)
    except Exception as error:  # each runtime has errors of its own
        raise CheckpointError(f"{graph} does not load in {module.__name__}: {first_line(error)}.") from error


def _onnx(onnxruntime: Any, graph: Path, outputs: list[str], threads: int, *, linked: bool) -> Session:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # A pool that waits by spinning takes up the next operator of a call at once; between calls it leaves the cores to others.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.log_severity_level = 3
    if linked:
        # What one graph has just worked in is still in the processor's caches, and the next one takes the same memory.
        _share_memory(onnxruntime)
        options.add_session_config_entry("session.use_env_allocators", "1")
    session = onnxruntime.InferenceSession(
        str(graph), options, providers=["CPUExecutionProvider"], disabled_optimizers=[*SLOWER_WHEN_FUSED]
    )
    return lambda feed: session.run(outputs, feed)  # type: ignore[no-any-return]


@cache
def _share_memory(onnxruntime: Any) -> None:
    """One pool of memory in this process for all sessions that ask for it."""
    kinds, types = onnxruntime.OrtAllocatorType, onnxruntime.OrtMemType
    about = onnxruntime.OrtMemoryInfo("Cpu", kinds.ORT_ARENA_ALLOCATOR, 0, types.DEFAULT)
    onnxruntime.create_and_register_allocator(about, onnxruntime.OrtArenaCfg({}))


def _openvino(openvino: Any, graph: Path, outputs: list[str], threads: int) -> Session:
    core = openvino.Core()
    model = core.read_model(str(graph))
    # float32 is what was checked: some processors would take bfloat16 unasked.
    settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32"}
    # A fused kernel that first meets one token takes that for a dimension to be broadcast, and errs on every longer row after.
    settings["SNIPPETS_MODE"] = "DISABLE"
    if threads > 1:
        settings |= {"NUM_STREAMS": 1, "INFERENCE_NUM_THREADS": threads}
    else:
        settings |= {"PERFORMANCE_HINT": "THROUGHPUT", "NUM_STREAMS": cores(), "INFERENCE_NUM_THREADS": cores()}
    compiled = core.compile_model(model, "CPU", settings)
    ports = [compiled.output(name) for name in outputs]
    idle: SimpleQueue[Any] = SimpleQueue()
    for _ in range(cores() if threads == 1 else 1):
        idle.put(compiled.create_infer_request())

    def run(feed: dict[str, NDArray[np.int64]]) -> list[NDArray[Any]]:
        request = idle.get()
        try:
            found = request.infer(feed)
            return [np.array(found[port]) for port in ports]
        finally:
            idle.put(request)

    return run


def cores() -> int:
    """Cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on every system
        return os.cpu_count() or 1


def has_int8_instructions() -> bool | None:
    """Whether the processor multiplies int8 exactly and fast (VNNI of x86, dot product of ARM); None where the system does not
    tell. Asked without torch."""
    try:
        words = set(PROCESSOR.read_text(encoding="utf-8", errors="replace").split())
    except OSError:
        return None
    return bool(words & {"avx512_vnni", "avx_vnni", "asimddp"}) if words & {"flags", "Features"} else None


__all__ = ["Session", "cores", "has_int8_instructions", "open_session", "require"]
