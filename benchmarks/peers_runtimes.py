"""ONNX Runtime and OpenVINO in `peers.py`, each as its own documentation says to use it.

The graph is traced once from the stock model and compared with it before anything is measured. Where a runtime offers two
ways of preparing a model (ONNX Runtime with and without its transformer optimizer), the quicker one on calibration rows is
the one that is measured.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from peers_data import Answers, Row, pad
from peers_ways import Built, Job, Predict, Unavailable, Way, batched, first_line, in_batches, trimmed
from thresher.measure.run import said

TOLERANCE = 1e-3  # of a float32 graph from the stock model


class Plain(nn.Module):
    """A model that takes tensors and gives one."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        return said(self.model(input_ids=input_ids, attention_mask=attention_mask, **types))


def names(job: Job) -> list[str]:
    return ["input_ids", "attention_mask", *(["token_type_ids"] if "token_type_ids" in job.calibration[0] else [])]


def probes(job: Job) -> list[dict[str, np.ndarray]]:
    """Batches of other shapes than the traced one, with padding and without."""
    rows = sorted(job.calibration, key=lambda row: len(row["input_ids"]))
    return [pad(some, job.pad_id) for some in (rows[:1], rows[-3:], [rows[0], rows[len(rows) // 2], rows[-1]])]


def example(job: Job) -> dict[str, Tensor]:
    batch = pad(job.calibration[:2], job.pad_id)
    return {name: torch.from_numpy(batch[name]) for name in names(job)}


def difference(job: Job, forward: Callable[[dict[str, np.ndarray]], np.ndarray]) -> float:
    """How far answers are from the stock model's, on real tokens."""
    worst = 0.0
    plain = Plain(job.stock())
    for batch in probes(job):
        with torch.inference_mode():
            stock = plain(**{name: torch.from_numpy(batch[name]) for name in names(job)}).numpy()
        apart = np.abs(forward(batch) - stock)
        worst = max(worst, float((apart[batch["attention_mask"] == 1] if apart.ndim == 3 else apart).max()))
    return worst


# ONNX Runtime


def onnx_graph(job: Job) -> Path:
    """The stock model as ONNX; by the TorchScript exporter, whose graph the optimizer knows, or by the newer one."""
    reasons = []
    for dynamo in (False, True):
        path = job.work / f"stock-{int(dynamo)}.onnx"
        model = Plain(job.model(attn_implementation="eager")).eval()
        axes = {0: torch.export.Dim("batch", min=1), 1: torch.export.Dim("length", min=2, max=job.max_tokens)}
        shapes: dict[str, Any] = (
            {"dynamic_shapes": dict.fromkeys(names(job), axes), "external_data": False}
            if dynamo
            else {"dynamic_axes": {name: {0: "batch", 1: "length"} for name in [*names(job), "logits"]}}
        )
        if not dynamo and job.head == "sequence":
            shapes["dynamic_axes"]["logits"] = {0: "batch"}
        try:
            torch.onnx.export(
                model, tuple(example(job).values()), str(path), input_names=names(job), output_names=["logits"],
                dynamo=dynamo, opset_version=18 if dynamo else 17, **shapes,
            )  # fmt: skip
            without_shapes(path)
            apart = difference(job, onnx_forward(session(path, job.threads), names(job)))
            if apart < TOLERANCE:
                return path
            reasons.append(f"dynamo={dynamo}: {apart:.1g} from torch")
        except Exception as error:
            reasons.append(f"dynamo={dynamo}: {first_line(error)}")
    raise Unavailable("no ONNX graph: " + "; ".join(reasons))


def without_shapes(path: Path) -> None:
    """Drop the shapes that an exporter noted: they may be of the traced batch, and quantize_dynamic then refuses them."""
    import onnx

    graph = onnx.load(path)
    del graph.graph.value_info[:]
    onnx.save(graph, path)


def optimized_graph(job: Job) -> Path:
    """The graph with ONNX Runtime's fused attention, embeddings and norms."""
    from onnxruntime.transformers.optimizer import optimize_model

    config = job.stock().config
    model = optimize_model(
        str(job.once("onnx", lambda: onnx_graph(job))), model_type="bert", num_heads=config.num_attention_heads,
        hidden_size=config.hidden_size, opt_level=0, use_gpu=False,
    )  # fmt: skip
    path = job.work / "optimized.onnx"
    model.save_model_to_file(str(path))
    if not model.get_fused_operator_statistics().get("Attention"):
        raise Unavailable("the optimizer fused no attention")
    apart = difference(job, onnx_forward(session(path, job.threads), names(job)))
    if apart > TOLERANCE:
        raise Unavailable(f"the optimized graph is {apart:.1g} from torch")
    return path


def onnx_file(job: Job, *, int8: bool) -> tuple[Path, str]:
    """The quicker of the plain and the optimized graph, and what it is."""
    found = {"": job.once("onnx", lambda: onnx_graph(job))}
    with contextlib.suppress(Exception):
        found["after its transformer optimizer"] = job.once("optimized", lambda: optimized_graph(job))
    if int8:
        for how, path in list(found.items()):
            try:
                found[how] = quantized(path, fused=bool(how))
            except Exception:
                if not how:
                    raise
                del found[how]
    note = "quantize_dynamic, per channel" if int8 else ""
    if len(found) == 1:
        return found[""], note
    seconds = {how: timed(job, onnx_forward(session(path, job.threads), names(job))) for how, path in found.items()}
    best = min(seconds, key=lambda how: seconds[how])
    other = "quicker than plain" if best else "quicker than after its transformer optimizer"
    return found[best], ", ".join(filter(None, (note, best, other)))


def quantized(path: Path, *, fused: bool) -> Path:
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    out = path.with_stem(path.stem + "-int8")
    quantize_dynamic(
        str(path), str(out), per_channel=True, weight_type=QuantType.QInt8,
        op_types_to_quantize=["MatMul", "Attention"] if fused else ["MatMul"],
        extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},
    )  # fmt: skip
    return out


def timed(job: Job, forward: Callable[[dict[str, np.ndarray]], np.ndarray]) -> float:
    """Seconds for some calibration rows, the best of three."""
    rows = job.calibration[: max(2 * job.batch, 8)]
    batches = [pad([rows[i] for i in index], job.pad_id) for index in batched(rows, job.batch)]
    best = float("inf")
    for _ in range(4):
        begun = time.perf_counter()
        for batch in batches:
            forward(batch)
        best = min(best, time.perf_counter() - begun)
    return best


def session(path: Path, threads: int) -> Any:
    """threads > 1: its pool spins during a call, as it comes, and stops at the call's end."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    if threads == 1:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    else:
        options.add_session_config_entry("session.force_spinning_stop", "1")
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def onnx_forward(opened: Any, wanted: Sequence[str]) -> Callable[[dict[str, np.ndarray]], np.ndarray]:
    known = {node.name for node in opened.get_inputs()}
    return lambda batch: opened.run(None, {name: batch[name] for name in wanted if name in known})[0]


def onnx_batches(job: Job, *, int8: bool) -> Built:
    path, note = job.once(f"onnx file {int8}", lambda: onnx_file(job, int8=int8))
    return Built(in_batches(job, onnx_forward(session(path, job.threads), names(job))), note)


def onnx_cores(job: Job, *, int8: bool) -> Built:
    path, note = job.once(f"onnx file {int8}", lambda: onnx_file(job, int8=int8))
    forward = onnx_forward(session(path, 1), names(job))
    pool = ThreadPoolExecutor(job.threads)

    def predict(rows: Sequence[Row]) -> Answers:
        order = [i for [i] in batched(rows, 1)]
        answers = pool.map(lambda i: trimmed(forward(pad([rows[i]], job.pad_id))[0], rows[i]), order)
        done = dict(zip(order, answers, strict=True))
        return [done[i] for i in range(len(rows))]

    return Built(predict, note)


# OpenVINO


def openvino_model(job: Job) -> Any:
    """Converted from torch, which keeps attention one operation; from the ONNX graph where that fails."""
    import openvino

    try:
        model = openvino.convert_model(Plain(job.model(attn_implementation="sdpa")).eval(), example_input=example(job))
    except Exception:
        model = openvino.Core().read_model(str(job.once("onnx", lambda: onnx_graph(job))))
    apart = difference(job, openvino_forward(compiled(job, model, "f32"), names(job)))
    if apart > TOLERANCE:
        raise Unavailable(f"OpenVINO's model is {apart:.1g} from torch")
    return model


def openvino_int8(job: Job) -> Any:
    import nncf

    rows = [pad([row], job.pad_id) for row in job.calibration]
    examples = nncf.Dataset(rows, lambda row: {name: row[name] for name in names(job)})
    return nncf.quantize(
        job.once("openvino", lambda: openvino_model(job)), examples, model_type=nncf.ModelType.TRANSFORMER,
        subset_size=len(rows),
    )  # fmt: skip


def compiled(job: Job, model: Any, precision: str | None, *, streams: int = 1) -> Any:
    import openvino

    options: dict[str, Any] = {"NUM_STREAMS": streams, "INFERENCE_NUM_THREADS": job.threads}
    if precision:
        options["INFERENCE_PRECISION_HINT"] = precision
    return openvino.Core().compile_model(model, "CPU", options)


def openvino_forward(opened: Any, wanted: Sequence[str]) -> Callable[[dict[str, np.ndarray]], np.ndarray]:
    request = opened.create_infer_request()
    return lambda batch: request.infer({name: batch[name] for name in wanted}, share_inputs=True)[0].copy()


def openvino_streams(job: Job, opened: Any) -> Predict:
    """One sequence a request, a request for each stream."""
    import openvino

    queue = openvino.AsyncInferQueue(opened, job.threads)

    def predict(rows: Sequence[Row]) -> Answers:
        out: list[Any] = [None] * len(rows)

        def keep(request: Any, i: int) -> None:
            out[i] = trimmed(request.get_output_tensor(0).data[0].copy(), rows[i])

        queue.set_callback(keep)
        for [i] in batched(rows, 1):
            batch = pad([rows[i]], job.pad_id)
            queue.start_async({name: batch[name] for name in names(job)}, i)
        queue.wait_all()
        return out

    return predict


def openvino_way(job: Job, *, int8: bool = False, precision: str | None = None, streams: bool = False) -> Built:
    model = job.once("openvino", lambda: openvino_model(job))
    if int8:
        model = job.once("openvino int8", lambda: openvino_int8(job))
    opened = compiled(job, model, precision, streams=job.threads if streams else 1)
    used = opened.get_property("INFERENCE_PRECISION_HINT").to_string()
    if precision is None and not int8 and used == "f32":
        raise Unavailable("OpenVINO's own choice here is float32")
    note = f"NNCF post-training, {len(job.calibration)} examples, the rest in {used}" if int8 else used
    if streams:
        return Built(openvino_streams(job, opened), note)
    return Built(in_batches(job, openvino_forward(opened, names(job))), note)


RUNTIMES = (
    Way("ort-fp32", "ONNX Runtime float32, sorted", lambda job: onnx_batches(job, int8=False)),
    Way("ort-fp32-cores", "ONNX Runtime float32, one a core", lambda job: onnx_cores(job, int8=False), single=False),
    Way("ort-int8", "ONNX Runtime int8, sorted", lambda job: onnx_batches(job, int8=True)),
    Way("ort-int8-cores", "ONNX Runtime int8, one a core", lambda job: onnx_cores(job, int8=True), single=False),
    Way("ov-fp32", "OpenVINO float32, sorted", lambda job: openvino_way(job, precision="f32")),
    Way("ov-own", "OpenVINO as it comes, sorted", lambda job: openvino_way(job)),
    Way(
        "ov-own-streams", "OpenVINO as it comes, one a core", lambda job: openvino_way(job, streams=True), single=False
    ),
    Way("ov-int8", "OpenVINO int8, sorted", lambda job: openvino_way(job, int8=True)),
    Way(
        "ov-int8-streams",
        "OpenVINO int8, one a core",
        lambda job: openvino_way(job, int8=True, streams=True),
        single=False,
    ),
)
