"""A run that may be interrupted: what tells it from another one, and who writes when several processes train."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from thresher.errors import DataError, OptionError
from thresher.report._support import write_whole

RUN = "fit.json"


def refuse_another_run(work: Path, settings: dict[str, Any]) -> None:
    """Raises OptionError when `work` holds an unfinished run with other settings (plain JSON values), DataError when what says
    so is damaged."""
    file = work / RUN
    if file.is_file():
        before = settings_in(file)
        changed = [name for name in settings if before.get(name) != settings[name]]
        if changed:
            raise OptionError(
                f"{work} holds an unfinished run with other settings ({', '.join(changed)}); remove it, or "
                "give another directory."
            )


def begin(work: Path, settings: dict[str, Any]) -> None:
    """Note in `work` which run it is of."""
    work.mkdir(parents=True, exist_ok=True)
    write_whole(work / RUN, json.dumps(settings) + "\n")


def settings_in(file: Path) -> dict[str, Any]:
    """What a run was begun with. Raises DataError for a file that is not whole."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return found
    except ValueError:
        pass
    raise DataError(
        f"{file} is damaged, so nobody knows what the unfinished run in {file.parent} was begun with; remove that directory."
    )


def last_checkpoint(directory: Path) -> str | None:
    """The newest checkpoint of transformers in `directory` that is whole; None where there is none.

    They are written file by file, the state last: one without it is of a run that was killed meanwhile. It is taken away, since
    transformers could not go on from it, and might keep it rather than a newer one.
    """
    steps = (place.name.rpartition("-")[2] for place in directory.glob(f"{PREFIX_CHECKPOINT_DIR}-*"))
    for step in sorted((int(number) for number in steps if number.isdecimal()), reverse=True):
        place = directory / f"{PREFIX_CHECKPOINT_DIR}-{step}"
        try:
            json.loads((place / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            shutil.rmtree(place, ignore_errors=True)  # another process of the same training may have been first
        else:
            return str(place)
    return None


def by_one(processes: PartialState, write: Callable[[], object]) -> None:
    """Let the main process write, once every other one is done with what was there, and the others wait for it."""
    processes.wait_for_everyone()
    if processes.is_main_process:
        write()
    processes.wait_for_everyone()
