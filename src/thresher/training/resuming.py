"""A run that may be interrupted: what tells it from another one, and who writes when several processes train."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import PartialState

from thresher.errors import OptionError

RUN = "fit.json"


def refuse_another_run(work: Path, settings: dict[str, Any]) -> None:
    """Raises OptionError when `work` holds an unfinished run with other settings (plain JSON values)."""
    file = work / RUN
    if file.is_file():
        before = json.loads(file.read_text(encoding="utf-8"))
        changed = [name for name in settings if before.get(name) != settings[name]]
        if changed:
            raise OptionError(
                f"{work} holds an unfinished run with other settings ({', '.join(changed)}); remove it, or "
                "give another directory."
            )


def begin(work: Path, settings: dict[str, Any]) -> None:
    """Note in `work` which run it is of."""
    work.mkdir(parents=True, exist_ok=True)
    (work / RUN).write_text(json.dumps(settings) + "\n", encoding="utf-8")


def by_one(processes: PartialState, write: Callable[[], object]) -> None:
    """Let the main process write, once every other one is done with what was there, and the others wait for it."""
    processes.wait_for_everyone()
    if processes.is_main_process:
        write()
    processes.wait_for_everyone()
