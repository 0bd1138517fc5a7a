"""What an exported directory holds: the graph, the tokenizer, and exported.json, which vouches for both. Needs no torch."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from thresher.errors import CheckpointError
from thresher.stamped import sha256

FORMAT = 3
MANIFEST = "exported.json"
TOKENIZER = "tokenizer.json"
DIGEST = "digest"

Runtime = Literal["onnx", "openvino"]
SUFFIX = {"onnx": ".onnx", "openvino": ".xml"}
DROPPED_AT, LEAVES = "dropped_at", "leaves"


def after(layer: int, name: str) -> str:
    """An output of the graph that ends after a layer, where the last graph has `name`."""
    return f"{name}_after_{layer}" if layer else name


@dataclass(frozen=True)
class Link:
    """One graph of the chain that a sequence passes, and what it reads and makes, by name.

    layer: the layer after which a row may leave; 0 for the last graph, where every row ends.
    """

    layer: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Manifest:
    """inputs, outputs: of the whole chain, by name; the first output is the answer. int8: whether the layers' weights are.

    chain: the graphs; more than one where rows may leave early (`exit` names the rule). branch: the exit's own FLOPs after a
    layer, written as `overhead`; branch_reads_dropped: whether these count the tokens the row came with; after: the layers
    where it is asked, None: all but the last.
    geometry: sizes of the encoder; overhead: for each layer [c0, c1, c2], the method's own FLOPs on n tokens being c0 + c1 n
    + c2 n^2. labels: names of the classes, or none. notes: what the model carried (its task). checked: how far the graph
    was found from the torch engine. files: sha256 by name. known: of each input, how many ids there are, counted from 0.
    """

    runtime: Runtime
    int8: bool
    method: str | None
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    max_length: int
    geometry: dict[str, Any]
    overhead: tuple[tuple[float, float, float], ...]
    chain: tuple[Link, ...]
    known: dict[str, int]
    exit: str | None = None
    branch: tuple[float, float, float] = (0.0, 0.0, 0.0)
    branch_reads_dropped: bool = False
    after: tuple[int, ...] | None = None
    labels: tuple[str, ...] = ()
    notes: dict[str, Any] = field(default_factory=dict)
    checked: dict[str, float] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)

    @property
    def graphs(self) -> list[str]:
        """The file of each link."""
        suffix = SUFFIX[self.runtime]
        return [
            f"model{suffix}" if number == 1 else f"model-{number}{suffix}" for number in range(1, len(self.chain) + 1)
        ]

    def write(self, directory: Path) -> None:
        """Write exported.json, with the checksums of the files that are there now, and its own."""
        files = {str(f.relative_to(directory)): sha256(f) for f in sorted(directory.rglob("*")) if f.is_file()}
        values = json.loads(json.dumps({"format": FORMAT, **asdict(self), "files": files}))
        text = json.dumps({**values, DIGEST: _digest(values)}, indent=1)
        (directory / MANIFEST).write_text(text + "\n", encoding="utf-8")


def is_exported(directory: Any) -> bool:
    return (Path(directory) / MANIFEST).is_file()


def read(directory: Any) -> Manifest:
    """Read exported.json and check every file against it.

    Raises CheckpointError: no such directory, another format, a file that is missing or has changed.
    """
    path = Path(directory)
    file = path / MANIFEST
    if not file.is_file():
        raise CheckpointError(f"{path} has no {MANIFEST}; give a directory that thresher.export wrote.")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        version, stated = values["format"], values.pop(DIGEST, None)
        changed = stated != _digest(values)
        if version == FORMAT and not changed:
            manifest = _manifest({name: value for name, value in values.items() if name != "format"})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{file} is corrupted ({type(error).__name__}: {error}); export the model again."
        ) from error
    if version != FORMAT:
        raise CheckpointError(
            f"{file} has format {version!r}, this version reads {FORMAT}; export the model again with this version."
        )
    if changed:
        raise CheckpointError(f"{file} has changed since it was exported; export the model again.")
    for name, digest in manifest.files.items():
        if not (path / name).is_file():
            raise CheckpointError(f"{path} lacks {name}; copy the whole directory or export the model again.")
        if sha256(path / name) != digest:
            raise CheckpointError(f"{path / name} has changed since it was exported; export the model again.")
    return manifest


def _digest(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _manifest(values: dict[str, Any]) -> Manifest:
    manifest = Manifest(
        **{
            **values,
            "inputs": tuple(values["inputs"]),
            "outputs": tuple(values["outputs"]),
            "labels": tuple(values["labels"]),
            "overhead": tuple(tuple(layer) for layer in values["overhead"]),
            "branch": tuple(values["branch"]),
            "after": values.get("after") and tuple(values["after"]),
            "chain": tuple(Link(x["layer"], tuple(x["inputs"]), tuple(x["outputs"])) for x in values["chain"]),
        }
    )
    if manifest.runtime not in get_args(Runtime):
        raise ValueError(f"runtime is {manifest.runtime!r}")
    if not manifest.chain or not set(manifest.graphs) <= set(manifest.files):
        raise ValueError("it names no graph")
    return manifest


__all__ = [
    "DROPPED_AT",
    "FORMAT",
    "LEAVES",
    "MANIFEST",
    "SUFFIX",
    "TOKENIZER",
    "Link",
    "Manifest",
    "Runtime",
    "after",
    "is_exported",
    "read",
    "sha256",
]
