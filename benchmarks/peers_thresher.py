"""Thresher's own ways in `peers.py`: a table of callables; one whose API is not there is printed with that reason."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import thresher
from peers_data import Answers, Row
from peers_ways import Built, Job, Unavailable, Way, in_batches, torch_forward
from thresher.model import attachment_of


def needs(*names: str) -> None:
    for name in names:
        if not callable(getattr(thresher, name, None)):
            raise Unavailable(f"this Thresher has no thresher.{name}")


def attached(job: Job, *, drop: bool) -> tuple[Any, str]:
    """The start, packed; or the given attached model, or the start with attention mass, untrained."""
    if not drop:
        return thresher.attach(job.model()), "nothing dropped"
    if job.method is not None:
        model = thresher.load(job.method).eval()
        attachment = attachment_of(model)
        parts = [part.config.method for part in (attachment.policy, attachment.exit) if part is not None]
        return model, f"{' and '.join(parts)}, as saved"
    return thresher.attach(job.model(), thresher.AttentionMass()), "attention-mass, untrained"


def packed(job: Job, *, drop: bool = False, int8: bool = False) -> Built:
    model, note = attached(job, drop=drop)
    if int8:
        needs("quantize")
        model = thresher.quantize(model)
    return Built(in_batches(job, torch_forward(model)), note)


def exported(job: Job, *, drop: bool = False, int8: bool = False, runtime: str = "onnx") -> Built:
    """One sequence a call, one worker a core; a single request gets all cores."""
    needs("export", "Runner")
    model, note = attached(job, drop=drop)
    directory = job.work / f"exported-{runtime}-{int(drop)}-{int(int8)}"
    thresher.export(
        model, directory, runtime=runtime, int8=int8, rows=job.calibration, max_length=max(job.max_tokens, 8)
    )
    runner = thresher.Runner(directory, workers=job.threads)

    def predict(rows: Sequence[Row]) -> Answers:
        return list(runner.answers(rows))

    return Built(predict, note, (lambda rows: runner.speedup(runner.run(rows))) if drop else None)


def way(id: str, label: str, make: Any, **options: Any) -> Way:
    return Way(id, label, lambda job: make(job, **options), ours=True)


THRESHER = (
    way("packed", "Thresher packed", packed),
    way("packed-int8", "Thresher packed int8", packed, int8=True),
    way("packed-drop", "Thresher packed, dropping", packed, drop=True),
    way("packed-drop-int8", "Thresher packed int8, dropping", packed, drop=True, int8=True),
    way("exported-int8", "Thresher exported int8", exported, int8=True),
    way("exported-drop", "Thresher exported, dropping", exported, drop=True),
    way("exported-drop-int8", "Thresher exported int8, dropping", exported, drop=True, int8=True),
    way("exported-ov-drop-int8", "Thresher exported to OpenVINO int8, dropping", exported, drop=True, int8=True,
        runtime="openvino"),
)  # fmt: skip
