"""What a comparison keeps on disk: which run a directory is of, and what each contestant has come to."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from thresher.comparing.standings import Standing, Target
from thresher.errors import DataError, OptionError
from thresher.report._support import write_whole

RUN = "run.json"
STANDINGS = "standings.json"
RESULT = "comparison.json"
PAGE = "comparison.html"
CHART = "frontier.svg"
BEST, START, METHODS = "best", "start", "methods"
OURS = (START, METHODS, BEST, RESULT, PAGE, CHART)
OTHERS = ("thresher.json", "config.json", "modules.json", "exported.json")


def same_run(directory: Path, settings: Mapping[str, Any], free: Mapping[str, Any]) -> dict[str, Any]:
    """Note in `directory` which run it is of, and give back its free settings: those it was begun with, else `free`.

    A free setting that is None is whatever the directory was begun with. Raises OptionError for a directory of another run, or
    that holds something else.
    """
    file = directory / RUN
    now = json.loads(json.dumps({**settings, **free}))
    if not file.is_file():
        if found := [name for name in OTHERS if (directory / name).exists()]:
            raise OptionError(f"{directory} holds a saved model ({found[0]}); give a directory of its own.")
        if found := [name for name in OURS if (directory / name).exists()]:
            raise OptionError(
                f"{directory} holds {', '.join(found)} but no {RUN} of a comparison, which would write over it; give another "
                "directory."
            )
        return now  # type: ignore[no-any-return]
    before = _read(file, "without it nobody knows what the directory holds, so give another directory")
    open_ = {name for name, value in free.items() if value is None}
    changed = [name for name in {**before, **now} if name not in open_ and before.get(name) != now.get(name)]
    if changed:
        raise OptionError(
            f"{directory} holds a comparison with other settings ({', '.join(changed)}); remove it, or give another directory."
        )
    return before


def begin(directory: Path, settings: Mapping[str, Any]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / RUN, settings)


class Kept:
    """The standings of one contestant in a file, by what each setting was chosen for.

    about: what they are of. None stands for a target that the contestant does not reach, with the reason beside it.
    Raises OptionError for standings of another contestant of the name, DataError for a damaged file.
    """

    def __init__(self, directory: Path, about: Mapping[str, Any]) -> None:
        self.file = directory / STANDINGS
        self.about = json.loads(json.dumps(about))
        self.found: dict[str, Standing] = {}
        self.missed: dict[str, str] = {}
        if not self.file.is_file():
            return
        values = _read(self.file, "remove it to measure again")
        try:
            before = values["about"]
            self.found = {key: Standing.from_dict(one) for key, one in values["found"].items()}
            self.missed = dict(values["missed"])
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{self.file} is damaged; remove it to measure again.") from error
        changed = [name for name in {**before, **self.about} if before.get(name) != self.about.get(name)]
        if changed:
            raise OptionError(
                f"{directory} holds {about['name']} with other settings ({', '.join(changed)}); remove it, or give another "
                "directory."
            )

    def has(self, key: str) -> bool:
        return key in self.found or key in self.missed

    def reopen(self, target: Target) -> None:
        """Forget what was chosen for this speedup where it falls short of it: when it was no run's target, a sample of the rows
        had to do."""
        one = self.found.get(target.key)
        if target.kind == "speedup" and one is not None and one.chosen.speedup < target.value:
            del self.found[target.key]

    def write(self) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        found = {key: one.to_dict() for key, one in self.found.items()}
        write_json(self.file, {"about": self.about, "found": found, "missed": self.missed})


@contextlib.contextmanager
def replaced(directory: Path, *, empty: bool) -> Iterator[Path]:
    """A folder to write to that takes the place of `directory` when the block ends well; `empty`: nothing does."""
    new = directory.with_name(f".{directory.name}")
    shutil.rmtree(new, ignore_errors=True)
    try:
        yield new
        shutil.rmtree(directory, ignore_errors=True)
        if not empty:
            new.rename(directory)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def write_json(file: Path, values: Mapping[str, Any]) -> None:
    write_whole(file, json.dumps(values, indent=1) + "\n")


def _read(file: Path, what_to_do: str) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise TypeError(type(values).__name__)
        return values
    except (ValueError, TypeError) as error:
        raise DataError(f"{file} is damaged ({error}); {what_to_do}.") from error


__all__ = ["BEST", "CHART", "METHODS", "PAGE", "RESULT", "START", "Kept", "begin", "replaced", "same_run", "write_json"]
