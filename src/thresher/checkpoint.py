"""What a saved directory holds beside the plain checkpoint: thresher.json and thresher.safetensors."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import safetensors.torch
import transformers
from safetensors import SafetensorError
from torch import nn

from thresher.errors import CheckpointError, OptionError
from thresher.exits import Exit, ExitConfig, exit_class
from thresher.foreign import loaded
from thresher.linears import Precision
from thresher.methods import config_class
from thresher.policy import Policy, PolicyConfig
from thresher.stamped import DIGEST, check_weights, read_settings, sha256

FORMAT = 1
SETTINGS = "thresher.json"
WEIGHTS = "thresher.safetensors"
OPTIONAL = type(None)
FIELDS: dict[str, type | tuple[type, ...]] = {
    "method": (str, OPTIONAL),
    "config": dict,
    "model_class": str,
    "outer": str,
    "notes": dict,
    "precision": str,
    "exit": (dict, OPTIONAL),
}
OF_EXIT = "exit."  # what the names of an exit's weights begin with


@contextlib.contextmanager
def staged(directory: Any, last: str = SETTINGS) -> Iterator[Path]:
    """A folder inside `directory` to write to; what was written moves into place when the block ends well.

    A failure leaves no trace and what was there before. Raises CheckpointError with the reason.
    """
    target = Path(directory)
    new = not target.exists()
    staging = None
    try:
        target.mkdir(parents=True, exist_ok=True)
        # Inside the target: a mount point's parent may be another file system, or not ours to write to.
        staging = Path(tempfile.mkdtemp(prefix=".thresher-", dir=target))
        yield staging
        files = [f for f in staging.rglob("*") if f.is_file()]
        for file in sorted(files, key=lambda f: f.name == last):  # it vouches for the rest
            place = target / file.relative_to(staging)
            place.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, place)
        new = False
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"Could not write the model to {target}: {error}.") from error
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)
        if new:
            with contextlib.suppress(OSError):
                target.rmdir()


def write(
    directory: Any,
    write_plain: Callable[[str], object],
    policy: Policy[Any] | None,
    model_class: type,
    outer: str,
    notes: dict[str, Any],
    precision: Precision,
    exit: Exit[Any] | None = None,
) -> None:
    """Write the plain checkpoint and what Thresher keeps beside it, all or nothing."""
    with staged(directory) as staging:
        write_plain(str(staging))
        state = dict(policy.state_dict()) if policy else {}
        state |= {OF_EXIT + name: value for name, value in exit.state_dict().items()} if exit else {}
        safetensors.torch.save_file({k: v.detach().cpu().contiguous() for k, v in state.items()}, staging / WEIGHTS)
        settings = {
            "format": FORMAT,
            "method": policy.config.method if policy else None,
            "config": policy.config.to_dict() if policy else {},
            "model_class": model_class.__name__,
            "outer": outer,
            DIGEST: sha256(staging / WEIGHTS),
            "notes": notes,
            "precision": precision,
            "exit": _described(exit) if exit else None,
        }
        (staging / SETTINGS).write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")


def _described(exit: Exit[Any]) -> dict[str, Any]:
    layers, hidden, outputs = exit.sizes
    return {
        "method": exit.config.method,
        "config": exit.config.to_dict(),
        "layers": layers,
        "hidden": hidden,
        "outputs": outputs,
    }


@dataclass(frozen=True)
class Saved:
    """A directory that was read and found whole."""

    directory: Path
    config: PolicyConfig | None
    model_class: str
    outer: str
    notes: dict[str, Any]
    precision: Precision
    exit: ExitConfig | None = None
    exit_sizes: tuple[int, ...] = ()  # layers, hidden size and outputs that its branches were trained for

    def load_plain(self, device: Any = None) -> Any:
        """The model without its policy, in eval mode."""
        if self.outer in ("SentenceTransformer", "CrossEncoder"):
            return loaded(lambda: self._load_outer(device), self.directory, self.outer)
        model = loaded(self._load_inner, self.directory, self.model_class)
        return model.eval() if device is None else model.eval().to(device)

    def _load_outer(self, device: Any) -> Any:
        try:
            import sentence_transformers
        except ImportError as error:
            raise CheckpointError(
                f'{self.directory} holds a {self.outer}: install it with pip install "thresher[embed]".'
            ) from error
        kind = getattr(sentence_transformers, self.outer)
        return kind(str(self.directory), device=None if device is None else str(device))

    def _load_inner(self) -> Any:
        return getattr(transformers, self.model_class).from_pretrained(self.directory)

    def load_policy(self, policy: Policy[Any]) -> None:
        """Fill a policy built from `config` with what it had learned. Raises CheckpointError where that was for other sizes."""
        self._fill(policy, "", f"method {policy.config.method!r}")

    def load_exit(self, exit: Exit[Any]) -> None:
        """Fill an exit with what it had learned. Raises CheckpointError where it was trained for other sizes."""
        if self.exit_sizes != exit.sizes:
            raise CheckpointError(
                f"The exits in {self.directory} were trained for {_said(self.exit_sizes)}, and the model beside them has "
                f"{_said(exit.sizes)}; train them again (thresher fit)."
            )
        self._fill(exit, OF_EXIT, f"exit {exit.config.method!r}")

    def _fill(self, module: nn.Module, prefix: str, name: str) -> None:
        try:
            weights = safetensors.torch.load_file(self.directory / WEIGHTS)
            state = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(OF_EXIT) is bool(prefix)}
            sizes = {key: value.shape for key, value in state.items()}
            if sizes != {key: value.shape for key, value in module.state_dict().items()}:
                raise CheckpointError(
                    f"What the {name} in {self.directory} has learned does not fit: it is of other sizes than the model "
                    "beside it and the settings; put back the files that were saved together, or train it again "
                    "(thresher fit)."
                )
            module.load_state_dict(state)
        except (RuntimeError, SafetensorError) as error:
            raise mismatch(self.directory, error) from error


def _said(sizes: tuple[int, ...]) -> str:
    return "{} layers of size {} and {} outputs".format(*sizes)


def mismatch(directory: Any, error: Exception) -> CheckpointError:
    reason = " ".join(str(error).split())
    return CheckpointError(f"{SETTINGS} in {directory} does not fit the model saved beside it: {reason}")


def read(directory: Any) -> Saved:
    """Check a directory and read its settings. Raises CheckpointError."""
    path = Path(directory)
    file = path / SETTINGS
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a directory; give the one that save_pretrained wrote.")
    if not file.is_file():
        raise CheckpointError(
            f"{path} has no {SETTINGS}, so it was not saved by Thresher; load it with transformers and call thresher.attach."
        )
    settings = read_settings(
        file, FIELDS, FORMAT, "model", defaults={"notes": {}, "precision": "float32", "exit": None}
    )
    exit = settings["exit"] or {}
    check_weights(path / WEIGHTS, file, settings[DIGEST], "model")
    try:
        if settings["precision"] not in get_args(Precision):
            raise ValueError(f"precision is {settings['precision']!r}")
        method = settings["method"]
        config = None if method is None else config_class(method).from_dict(settings["config"])
        exit_config = exit_class(exit["method"]).from_dict(exit["config"]) if exit else None
        sizes = tuple(int(exit[name]) for name in ("layers", "hidden", "outputs")) if exit else ()
    except (OptionError, TypeError, KeyError, ValueError) as error:
        raise CheckpointError(f"{file} is corrupted ({error}); save the model again.") from error
    return Saved(
        path,
        config,
        settings["model_class"],
        settings["outer"],
        settings["notes"],
        settings["precision"],
        exit_config,
        sizes,
    )


__all__ = ["SETTINGS", "WEIGHTS", "Saved", "mismatch", "read", "staged", "write"]
