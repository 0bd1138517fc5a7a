"""A training run that can be stopped and gone on with: what it was started with, what is kept, and when it is cleared away."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from thresher.cli.screen import Interrupted, notice
from thresher.errors import DataError, OptionError, TargetError


@contextlib.contextmanager
def resumable(out: Path, settings: dict[str, Any]) -> Iterator[None]:
    """Train into `out` inside this block. Its work folder goes when the block is done; else it stays, if it holds a stage.

    Raises OptionError when the folder is of a run with other settings. The target is no such setting: finished stages serve
    any. Interrupts and missed targets say what was kept.
    """
    work = out / "training"
    _same_run(work, json.loads(json.dumps(settings)))
    try:
        yield
    except KeyboardInterrupt:
        if not _stages(work):
            raise
        raise Interrupted(
            f"Interrupted. Finished stages and the last checkpoint (one every 500 steps) are kept in {work}; the same command "
            "goes on from there."
        ) from None
    except TargetError as error:
        if not _stages(work):
            raise
        raise TargetError(
            f"{error} The trained stages are kept in {work}; the same command with another target uses them."
        ) from error
    else:
        shutil.rmtree(work, ignore_errors=True)
    finally:
        if not _stages(work):
            shutil.rmtree(work, ignore_errors=True)
            with contextlib.suppress(OSError):
                out.rmdir()  # only where it is empty


def _stages(work: Path) -> list[Path]:
    return [entry for entry in work.iterdir() if entry.is_dir()] if work.is_dir() else []


def _same_run(work: Path, settings: dict[str, Any]) -> None:
    file = work / "run.json"
    if file.is_file():
        try:
            before = json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            raise DataError(
                f"{file} is damaged, so nobody knows what the unfinished run in {work} was begun with; remove that directory."
            ) from None
        changed = [name for name in settings if before.get(name) != settings[name]]
        if changed:
            raise OptionError(
                f"{work} holds an unfinished run with other settings ({', '.join(changed)}); remove that directory, or give "
                "another --out."
            )
        notice(f"Going on with the unfinished run in {work}")
    work.mkdir(parents=True, exist_ok=True)
    staging = file.with_name(f"{file.name}.{os.getpid()}")  # under torchrun every process writes the same
    staging.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    staging.replace(file)
