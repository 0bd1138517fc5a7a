"""thresher.export: trace, quantize, check against the torch engine, and only then put the directory in place."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import re
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

from thresher import checkpoint
from thresher.errors import DataError, OptionError, ThresherError
from thresher.exported import directory as files
from thresher.exported.chain import cut
from thresher.exported.directory import Link, Manifest, Runtime
from thresher.exported.graph import Ends, call, check_exportable, input_names, write_graph
from thresher.exported.runner import Output, Runner
from thresher.exported.sessions import require
from thresher.exported.tidying import tidied
from thresher.linears import has_int8_instructions, warn_without_int8_instructions
from thresher.measure.run import said
from thresher.model import attachment_of, evaluating, find_encoder
from thresher.policy import Point, tracing

TOLERANCE = 1e-4
TIES = 0.1  # the share of rows in which a rounding may decide between two tokens of equal score

DEFAULT_MAX_LENGTH = 512

TRACED = "traced.onnx"  # before it is cut and brought into its runtime's form
GRAPH_FILE = re.compile(r"model(-\d+)?\.(onnx|xml|bin)")


@dataclass(frozen=True)
class Export:
    """What was written, and how far it is from the torch engine on the rows it was checked with.

    difference: the largest, in float32, over rows from which the same tokens were dropped, and which left after the same layer;
    ties: the share of the others, where a rounding decides between two tokens, or on which side of a threshold a row is.
    int8_difference: the largest of the int8 graph from float32, and int8_agreement the share of rows whose largest answer is
    at the same place (None without int8).
    """

    directory: Path
    runtime: Runtime
    difference: float
    ties: float
    int8_difference: float | None = None
    int8_agreement: float | None = None


def export(
    model: Any,
    directory: str | Path,
    *,
    runtime: Runtime = "onnx",
    int8: bool | None = None,
    tokenizer: Any = None,
    rows: Sequence[Mapping[str, Sequence[int]]] | None = None,
    max_length: int | None = None,
) -> Export:
    """Write an attached model as one graph that drops tokens inside itself, with what runs it without torch. With an early exit
    it is a chain of graphs, of which a row passes as many as it needs; the exit stays as it is set now.

    runtime: "onnx" (ONNX Runtime) or "openvino". int8: quantize the layers' weights, by channel; None: as the model is
    attached (`thresher.quantize`).
    tokenizer: written beside the graph, so that `Runner.predict` takes texts; a SentenceTransformer's or CrossEncoder's own
    is taken by itself. rows: real inputs (token ids) to check with, and to calibrate OpenVINO's int8 by, which needs them;
    without them random ones of 1 to max_length tokens.
    max_length: the most tokens a sequence may have; None for what model and tokenizer read, at most 512.

    Everything is written or nothing. int8 suits the kind of processor that it is exported on; one without the instructions is
    warned of. Raises OptionError for a policy that no graph can hold, DataError for rows that are no token ids of the model,
    and ThresherError when a package is missing or the graph does not answer as the torch engine does.
    """
    if runtime not in get_args(Runtime):
        raise OptionError(f"runtime is one of {', '.join(get_args(Runtime))}, not {runtime!r}.")
    check_exportable(model)
    require(runtime, "export" if runtime == "onnx" else None)
    _onnx()
    int8 = attachment_of(model).engine.precision == "int8" if int8 is None else int8
    tokenizer = tokenizer if tokenizer is not None else getattr(model, "tokenizer", None)
    limit = _limit(model, tokenizer, max_length)
    if int8 and runtime == "openvino" and rows is None:
        raise OptionError(
            "OpenVINO's int8 is calibrated on rows like those that it will read: give some, by rows= or as DATA on the "
            "command line."
        )
    if int8:
        warn_without_int8_instructions()
    checked = _random_rows(model, limit) if rows is None else _given_rows(rows, limit)
    with checkpoint.staged(directory, last=files.MANIFEST) as staging:
        inputs, ends = write_graph(model, staging / TRACED, fused=runtime == "onnx")
        _onnx().save(tidied(_onnx().load(staging / TRACED)), staging / TRACED)
        if tokenizer is not None:
            _write_tokenizer(tokenizer, staging)
        manifest = _manifest(model, runtime, inputs, ends, limit)
        manifest, exact = _finish(manifest, ends, staging, checked)
        expected = [_by_torch(model, row) for row in checked]
        difference, ties = _compare(expected, exact)
        found = {"difference": difference, "ties": ties}
        if int8:
            _quantize(staging / TRACED, checked, manifest)
            manifest, approximate = _finish(dataclasses.replace(manifest, int8=True), ends, staging, checked)
            found |= _int8_cost(exact, approximate)
        (staging / TRACED).unlink()
        _write_manifest(dataclasses.replace(manifest, checked=found), staging)
    written = files.read(directory).files
    for other in Path(directory).iterdir():
        if GRAPH_FILE.fullmatch(other.name) and other.name not in written:
            other.unlink()  # an earlier export's, which this one takes the place of
    return Export(Path(directory), runtime, **found)


def _finish(
    manifest: Manifest, ends: Ends, staging: Path, rows: list[dict[str, list[int]]]
) -> tuple[Manifest, list[Output]]:
    """Bring the graph into its runtime's form, and what it says of the rows."""
    sources = [staging / TRACED]
    if len(ends) > 1:
        links = cut(_onnx().load(sources[0]), ends)
        manifest = dataclasses.replace(manifest, chain=tuple(link for link, _ in links))
        sources = [staging / f"{TRACED}-{number}" for number in range(len(links))]
        for source, (_, part) in zip(sources, links, strict=True):
            _onnx().save(part, source)
    for source, file in zip(sources, manifest.graphs, strict=True):
        if manifest.runtime == "openvino":
            _to_openvino(source, staging / file)
        else:
            shutil.copyfile(source, staging / file)
        if len(ends) > 1:
            source.unlink()
    _write_manifest(manifest, staging)
    return manifest, Runner(staging, workers=1).run(rows)


def _write_manifest(manifest: Manifest, staging: Path) -> None:
    (staging / files.MANIFEST).unlink(missing_ok=True)
    manifest.write(staging)


def _onnx() -> Any:
    try:
        import onnx
    except ImportError as error:
        raise ThresherError('Exporting needs the onnx package; run pip install "thresher[export]".') from error
    return onnx


def _manifest(model: Any, runtime: Runtime, inputs: tuple[str, ...], ends: Ends, limit: int) -> Manifest:
    attachment = attachment_of(model)
    encoder, policy, entrance = find_encoder(model), attachment.policy, attachment.engine.entrance
    exit = attachment.exit if len(ends) > 1 else None
    _, outputs = ends[-1]
    labels = getattr(encoder.config, "id2label", None) or {}
    geometry = entrance.geometry
    point = Point.AFTER_ATTENTION if policy is None else policy.config.point
    return Manifest(
        runtime=runtime,
        int8=False,
        method=None if policy is None else policy.config.method,
        inputs=inputs,
        outputs=outputs,
        max_length=limit,
        geometry={
            "layers": geometry.layers,
            "hidden": geometry.hidden,
            "intermediate": geometry.intermediate,
            "gated": geometry.gated,
            "width": geometry.attention,
            "midpoint": point is Point.AFTER_ATTENTION and all(m is not None for m in entrance.midpoints),
            "before": point is Point.BEFORE_LAYER,
        },
        overhead=tuple(_overhead(policy, layer) for layer in range(1, geometry.layers + 1)),
        chain=(Link(0, inputs, outputs),),
        known={name: _known(encoder.config, name) for name in inputs},
        exit=None if exit is None else exit.config.method,
        branch=(0.0, 0.0, 0.0) if exit is None else _written(exit.overhead_flops, 1),
        branch_reads_dropped=exit is not None and exit.config.answers_dropped,
        after=None if exit is None else exit.config.after,
        labels=tuple(str(labels[k]) for k in sorted(labels)) if "logits" in outputs else (),
        notes=attachment.notes,
    )


def _overhead(policy: Any, layer: int) -> tuple[float, float, float]:
    """The policy's own FLOPs, for a whole number of blocks where it counts in blocks."""
    if policy is None:
        return (0.0, 0.0, 0.0)
    return _written(partial(policy.overhead_flops, layer), policy.grain)


def _written(flops: Callable[[int], int], grain: int) -> tuple[float, float, float]:
    """FLOPs for n tokens as c0 + c1 n + c2 n^2, which are exact where n is a multiple of `grain`."""
    at = [flops(n * grain) for n in (0, 1, 2)]
    c2 = (at[2] - 2 * at[1] + at[0]) / 2
    c1 = at[1] - at[0] - c2
    assert at[0] + 100 * c1 + 100 * 100 * c2 == flops(100 * grain), "more than quadratic"
    return (float(at[0]), c1 / grain, c2 / grain**2)


def _known(config: Any, name: str) -> int:
    """How many ids an input may have."""
    return int(config.vocab_size if name == "input_ids" else config.type_vocab_size)


def _given_rows(rows: Sequence[Mapping[str, Sequence[int]]], limit: int) -> list[dict[str, list[int]]]:
    found = []
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, Mapping) or "input_ids" not in row:
            raise DataError(f"Row {number} of those to check the graph with has no input_ids.")
        found.append({k: list(v)[:limit] for k, v in row.items() if k in ("input_ids", "token_type_ids")})
    if not found:
        raise OptionError("The rows to check the graph with are empty; give some, or None for random ones.")
    return found


def _limit(model: Any, tokenizer: Any, asked: int | None) -> int:
    encoder = find_encoder(model)
    most = encoder.config.max_position_embeddings
    if encoder.config.model_type in ("roberta", "xlm-roberta", "camembert", "mpnet"):
        most -= encoder.config.pad_token_id + 1  # positions start after the padding's
    if asked is not None:
        if not isinstance(asked, int) or not 2 < asked <= most:
            raise OptionError(f"max_length must be from 3 to the {most} tokens the model can read, not {asked!r}.")
        return asked
    own = getattr(model, "max_seq_length", None) or getattr(tokenizer, "model_max_length", None) or most
    return int(min(most, own, DEFAULT_MAX_LENGTH))


def _random_rows(model: Any, limit: int) -> list[dict[str, list[int]]]:
    """Token ids of many lengths, the extremes among them; half of the rows have two segments."""
    config = find_encoder(model).config
    generator = np.random.default_rng(0)
    lengths = sorted({1, 2, 3, limit, *(int(n) for n in np.geomspace(4, limit, 13))} - set(range(limit + 1, 513)))
    # Ids near zero are padding and other marks, which position ids are counted from in some families.
    low = min(max(int(config.pad_token_id or 0) + 1, 5), config.vocab_size - 1)
    rows = []
    for number, n in enumerate(lengths):
        ids = generator.integers(low, config.vocab_size, n).tolist()
        rows.append({"input_ids": ids, "token_type_ids": [int(number % 2 and i > n // 3) for i in range(n)]})
    return rows


def _feed(row: Mapping[str, Sequence[int]], inputs: tuple[str, ...]) -> dict[str, Any]:
    zeros = [0] * len(row["input_ids"])
    return {name: np.asarray([row.get(name, zeros)], dtype=np.int64) for name in inputs}


def _write_tokenizer(tokenizer: Any, staging: Path) -> None:
    """The whole of it for transformers, of which the runner reads tokenizer.json."""
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise OptionError("Only a fast tokenizer (with a tokenizer.json) can be exported; leave tokenizer= out.")
    tokenizer.save_pretrained(str(staging))


def _quantize(traced: Path, rows: list[dict[str, list[int]]], manifest: Manifest) -> None:
    if manifest.runtime == "openvino":
        _quantize_for_openvino(traced, rows, manifest)
        return
    quiet = logging.getLogger()
    level = quiet.level
    from onnxruntime.quantization import QuantType, quantize_dynamic

    try:
        quiet.setLevel(logging.ERROR)  # it advises to preprocess, which changes nothing in these graphs
        quantize_dynamic(
            traced,
            traced,
            per_channel=True,
            weight_type=QuantType.QInt8,
            op_types_to_quantize=["MatMul"],  # the layers' own; pooler and head see one token and stay exact
            reduce_range=not has_int8_instructions(),
            extra_options={"DefaultTensorType": _onnx().TensorProto.FLOAT},  # of what a fused operator makes
        )
    finally:
        quiet.setLevel(level)


def _quantize_for_openvino(traced: Path, rows: list[dict[str, list[int]]], manifest: Manifest) -> None:
    onnx = _onnx()
    try:
        import nncf
    except ImportError as error:
        raise ThresherError('int8 for OpenVINO needs nncf; run pip install "thresher[openvino]".') from error
    feeds = [_feed(row, manifest.inputs) for row in rows]
    logging.getLogger("nncf").setLevel(logging.ERROR)
    quantized = nncf.quantize(
        _with_initializers(onnx.load(traced)),
        nncf.Dataset(feeds),
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=len(feeds),
    )
    onnx.save(quantized, traced)


def _with_initializers(model: Any) -> Any:
    """The model with its constants as initializers: the parameters of a policy and of branches are traced as nodes, where NNCF
    does not look for a bias."""
    graph = model.graph
    for node in [node for node in graph.node if node.op_type == "Constant"]:
        (value,) = node.attribute
        if value.HasField("t"):
            value.t.name = node.output[0]
            graph.initializer.append(value.t)
            graph.node.remove(node)
    return model


def _to_openvino(traced: Path, path: Path) -> None:
    openvino = require("openvino")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        openvino.save_model(openvino.convert_model(str(traced)), str(path), compress_to_fp16=False)


def _by_torch(model: Any, row: Mapping[str, Sequence[int]]) -> Output:
    """The same from the torch engine in float32."""
    features = {k: torch.tensor([list(v)]) for k, v in row.items()}
    if "token_type_ids" in features and "token_type_ids" not in input_names(model):
        del features["token_type_ids"]
    engine = attachment_of(model).engine
    precision = engine.precision
    try:
        engine.set_precision("float32")
        with evaluating(model), torch.inference_mode(), tracing(record=True) as traces:
            outputs = call(model, features)
    finally:
        engine.set_precision(precision)
    if "last_hidden_state" in outputs and not ({"sentence_embedding", "scores"} & set(outputs)):
        answer = outputs["last_hidden_state"]
    else:
        answer = said(outputs, torch.ones_like(features["input_ids"]))
    trace = traces[-1]
    return Output(answer[0].float().numpy(), trace.dropped_at()[0].numpy(), trace.exited_at[0])


def _compare(expected: list[Output], got: list[Output]) -> tuple[float, float]:
    """The largest difference where the same tokens were dropped and the row left alike, and the share of the other rows.
    Raises ThresherError."""
    same = [
        np.array_equal(a.dropped_at, b.dropped_at) and a.exited_at == b.exited_at
        for a, b in zip(expected, got, strict=True)
    ]
    pairs = itertools.compress(zip(expected, got, strict=True), same)
    difference = max((float(np.abs(a.answer - b.answer).max()) for a, b in pairs), default=float("inf"))
    ties = 1 - sum(same) / len(same)
    if not difference <= TOLERANCE or ties > TIES:
        raise ThresherError(
            f"The graph does not answer as the torch engine does (difference {difference:.2g}, allowed {TOLERANCE:.2g}; other "
            f"tokens dropped in {ties:.0%} of the rows, allowed {TIES:.0%}), so nothing was exported; please report the "
            "model's family and your versions."
        )
    return difference, ties


def _int8_cost(exact: list[Output], approximate: list[Output]) -> dict[str, float]:
    pairs = list(zip(exact, approximate, strict=True))
    return {
        "int8_difference": max(float(np.abs(a.answer - b.answer).max()) for a, b in pairs),
        "int8_agreement": float(np.mean([a.answer.argmax() == b.answer.argmax() for a, b in pairs])),
    }


__all__ = ["Export", "export"]
