"""What a command shows: results on standard output, everything else on standard error; and how errors end it."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec

import typer
from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from thresher.errors import ThresherError

if TYPE_CHECKING:
    from thresher.report.tokens import TokenMap

P = ParamSpec("P")

WIDTH_OF_A_FILE = 120  # where standard output is no terminal
PACKAGE = Path(__file__).parents[1]


@dataclass(frozen=True)
class Result:
    """What a command found: `data` for --json, `shown` for people."""

    data: Any
    shown: Sequence[RenderableType]


def quoted(word: object) -> str:
    """As it can be pasted into a shell."""
    return shlex.quote(str(word))


class TokenMapView:
    """A token map: shaded where the console has colours, in brackets where it has none."""

    def __init__(self, token_map: TokenMap) -> None:
        self.map = token_map

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        from thresher.report.tokens import legend, to_plain, to_terminal

        coloured = console.is_terminal and not console.no_color and console.color_system is not None
        yield to_terminal(self.map) if coloured else Text(to_plain(self.map))
        answer = f"{self.map.note}; " if self.map.note else ""
        yield Text(answer + self.map.remark, style="dim")
        if coloured:
            yield legend(self.map.layers, answer=self.map.answer is not None, frozen=self.map.frozen_at is not None)
        yield Text("")


class Interrupted(Exception):
    """Ctrl-C, with what was kept and how to go on."""


def command(run: Callable[P, Result]) -> Callable[P, None]:
    """A command that prints its result; its parameters must include `as_json`. Known errors become one sentence and status 2.

    Whatever a library prints on the way goes to standard error, so standard output holds the result alone. What this package
    warns of is shown as a notice.
    """

    @functools.wraps(run)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> None:
        stdout = sys.stdout
        try:
            with contextlib.redirect_stdout(sys.stderr), _warnings_as_notices():
                result = run(*args, **kwargs)
            _print(result, bool(kwargs["as_json"]), stdout)
        except BrokenPipeError:
            raise
        except (ThresherError, OSError) as error:
            if os.environ.get("THRESHER_DEBUG"):
                raise
            _say(f"Error: {_sentence(error)}", "bold red")
            raise typer.Exit(2) from None
        except (KeyboardInterrupt, Interrupted) as stop:
            _say(str(stop) or "Interrupted; nothing was written.", "bold red")
            raise typer.Exit(130) from None

    guarded.__annotations__ = {**run.__annotations__, "return": None}
    return guarded


def notice(text: str) -> None:
    """A remark on standard error."""
    _say(f"Note: {text.rstrip('.')}.", "dim")


@contextlib.contextmanager
def _warnings_as_notices() -> Iterator[None]:
    """Each of this package's warnings once, as a notice; those of others as they are."""
    said: set[str] = set()
    with warnings.catch_warnings():
        others = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], filename: str, *where: Any, **more: Any) -> None:
            if not Path(filename).is_relative_to(PACKAGE):
                others(message, category, filename, *where, **more)
            elif str(message) not in said:
                said.add(str(message))
                notice(str(message))

        warnings.showwarning = show  # type: ignore[assignment]
        warnings.filterwarnings("always", category=UserWarning, module=r"thresher\.")
        yield


@contextlib.contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar with the time left, on a terminal's standard error; yields what to call with the number of steps just done."""
    with progress_bar() as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.update(task, advance=done)


def progress_bar(*, percent: bool = False) -> Progress:
    """percent: for what is counted in shares of the whole, 0 to 1, rather than in steps."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn() if percent else MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def _print(result: Result, as_json: bool, stdout: Any) -> None:
    if as_json:
        stdout.write(json.dumps(_finite(result.data), indent=1, allow_nan=False) + "\n")
        return
    console = Console(file=stdout, highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console = Console(file=stdout, highlight=False, width=WIDTH_OF_A_FILE)
    for part in result.shown:
        # Only what is laid out by rich may wrap: a plain line stays whole for whoever copies or greps it.
        console.print(part, markup=False, soft_wrap=isinstance(part, str))


def _finite(value: Any) -> Any:
    """JSON has no infinities: null stands for them."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return value if isinstance(value, str | int | None) else str(value)


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and not isinstance(error, ThresherError):
        where = f" {error.filename}" if error.filename else ""
        return f"Cannot use{where}: {error.strerror or error}.".replace("Cannot use:", "The system refused:")
    return " ".join(str(error).split())


def _say(text: str, style: str) -> None:
    Console(stderr=True, highlight=False).print(text, style=style, markup=False, soft_wrap=True)
