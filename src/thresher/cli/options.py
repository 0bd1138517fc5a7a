"""The options that several commands share, and the words on the command line turned into values."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from thresher.errors import OptionError, nearest

TARGET, DATA, METHOD, TRAINING, OUTPUT = "Target (one of them)", "Data", "Method", "Training", "Output"
SEARCH = "Search"

Kind = Literal["classification", "regression", "embedding", "response", "qa", "tagging"]
Precision = Annotated[
    Literal["auto", "float32", "bfloat16"],
    typer.Option("--precision", help="auto: bfloat16 where the machine multiplies it fast.", rich_help_panel=TRAINING),
]

DataSource = Annotated[
    str,
    typer.Argument(
        metavar="DATA",
        help="A .jsonl, .json, .csv, .tsv or .parquet file (also .gz), a folder or hub data set with its split "
        "(imdb:train), or the built-in python-docs.",
    ),
]
EVALUATIONS = 100
Evaluations = Annotated[
    int | None,
    typer.Option(min=1, help=f"Retention configurations to try. Default: {EVALUATIONS}.", rich_help_panel=SEARCH),
]
Searcher = Annotated[
    Literal["nsga2", "evolutionary", "random"] | None,
    typer.Option(help="nsga2 (default, needs optuna) or evolutionary, LAT's and ASE's.", rich_help_panel=SEARCH),
]
ModelDirectory = Annotated[
    str,
    typer.Argument(metavar="DIR", help="What thresher fit or save_pretrained wrote; a plain checkpoint drops nothing."),
]
AnsweringDirectory = Annotated[
    str,
    typer.Argument(
        metavar="DIR",
        help="What thresher fit, save_pretrained or thresher export wrote; a plain checkpoint drops nothing.",
    ),
]
Speedup = Annotated[
    float | None,
    typer.Option(
        help="FLOPs of the model that drops nothing, divided by FLOPs spent: 2 is half the work.",
        metavar="RATIO",
        rich_help_panel=TARGET,
    ),
]
AtSpeedup = Annotated[
    float | None,
    typer.Option(
        "--speedup",
        help="Run at the point of the model's frontier (thresher search) with at least this FLOPs speedup. Default: as saved.",
        metavar="RATIO",
        rich_help_panel=METHOD,
    ),
]
AtThreshold = Annotated[
    float | None,
    typer.Option(
        "--tau",
        help="Let rows leave early by this threshold of the model's exit. Default: as saved.",
        metavar="THRESHOLD",
        rich_help_panel=METHOD,
    ),
]
MaxLoss = Annotated[
    float | None,
    typer.Option(
        help="The most the metric may fall: 0.01 is one point of accuracy. The fastest setting that holds is taken.",
        metavar="LOSS",
        rich_help_panel=TARGET,
    ),
]
Column = Annotated[
    list[str] | None,
    typer.Option(
        help="A column by another name: text=review, text_pair=answer, label=stars. Repeat for each.",
        metavar="NAME=COLUMN",
        rich_help_panel=DATA,
    ),
]
Limit = Annotated[
    int | None,
    typer.Option(
        help="Use this many rows of DATA, drawn with --seed. Default: all.", metavar="ROWS", rich_help_panel=DATA
    ),
]
MaxLength = Annotated[
    int | None,
    typer.Option(
        help="Tokens read of a row. Default: as fitted, else what the model reads, at most 512.",
        metavar="TOKENS",
        rich_help_panel=DATA,
    ),
]
Windows = Annotated[
    int | None,
    typer.Option(
        "--windows",
        min=0,
        help="Read long texts whole, in windows that share this many tokens: answered by their mean; a tagger's word in the "
        "window that shows most around it. Default: as fitted, else long texts are cut.",
        metavar="STRIDE",
        rich_help_panel=DATA,
    ),
]
NoAnswer = Annotated[
    float | None,
    typer.Option(
        "--no-answer",
        help="Of questions that may have none: by how much having none must score above the best answer. Default: as fitted, "
        "else 0; thresher evaluate says which is best.",
        metavar="SCORE",
        rich_help_panel=DATA,
    ),
]
ValidationLimit = Annotated[
    int | None,
    typer.Option(
        "--validation-limit",
        help="Use this many rows of --validation. Default: all.",
        metavar="ROWS",
        rich_help_panel=DATA,
    ),
]
SkipBad = Annotated[
    bool,
    typer.Option(
        "--skip-bad",
        help="Of questions about passages: leave out bad rows, each named on standard error, rather than stop at the first.",
        rich_help_panel=DATA,
    ),
]
MethodToAttach = Annotated[
    str | None,
    typer.Option(
        "--method",
        help="For a plain checkpoint: the method to attach, without training it. Needs --out.",
        rich_help_panel=METHOD,
    ),
]
MethodSetting = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="A setting of the method, such as threshold=.01 or retention=.8,.6,.4 (see thresher methods). Repeat for each.",
        metavar="NAME=VALUE",
        rich_help_panel=METHOD,
    ),
]
ExitSetting = Annotated[
    list[str] | None,
    typer.Option(
        "--set-exit",
        help="A setting of the exit, such as threshold=.3 or patience=2 (see thresher methods). Repeat for each.",
        metavar="NAME=VALUE",
        rich_help_panel=METHOD,
    ),
]
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="For every random choice.", rich_help_panel=DATA)]
BatchSize = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Rows run at a time. Default: as many as have 4,096 tokens together.",
        metavar="ROWS",
        rich_help_panel=OUTPUT,
    ),
]
Workers = Annotated[
    int | None,
    typer.Option(
        help="Of an exported directory: rows run at a time, one a core. Default: all cores.",
        metavar="CORES",
        rich_help_panel=OUTPUT,
    ),
]
Device = Annotated[
    Literal["auto", "cpu", "cuda"],
    typer.Option(help="Where the model runs. auto: cuda where there is a GPU.", rich_help_panel=OUTPUT),
]
ChangedModel = Annotated[
    Path | None, typer.Option("--out", help="Default: DIR itself.", metavar="DIR", rich_help_panel=OUTPUT)
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.", rich_help_panel=OUTPUT)]


def one_target(speedup: float | None, max_loss: float | None, *, required: bool) -> None:
    if speedup is not None and max_loss is not None:
        raise OptionError("Give one target, --speedup or --max-loss, not both.")
    if required and speedup is None and max_loss is None:
        raise OptionError("Give a target: --speedup 2.0, or --max-loss 0.01.")
    if speedup is not None and not 1.0 <= speedup < float("inf"):
        raise OptionError(f"--speedup must be at least 1, not {speedup}.")
    if max_loss is not None and not 0.0 <= max_loss < float("inf"):
        raise OptionError(f"--max-loss must be at least 0, not {max_loss}.")


def place_of(device: str) -> str:
    """cpu or cuda. Raises OptionError when a GPU is asked for that torch does not find."""
    import torch

    found = torch.cuda.is_available()
    if device == "cuda" and not found:
        raise OptionError("--device cuda: torch finds no GPU here; give --device cpu, or leave it out.")
    return device if device != "auto" else "cuda" if found else "cpu"


def assignments(items: Sequence[str] | None, option: str) -> dict[str, str]:
    """`["a=1"]` as `{"a": "1"}`."""
    pairs = {}
    for item in items or ():
        name, equals, value = item.partition("=")
        if not (name.strip() and equals and value.strip()):
            raise OptionError(f"{option} takes NAME=VALUE, not {item!r}.")
        if name.strip() in pairs:
            raise OptionError(f"{option} {name.strip()} is given twice.")
        pairs[name.strip()] = value.strip()
    return pairs


def method_config(method: str, settings: Sequence[str] | None) -> Any:
    """The configuration of a method with the settings given as `--set name=value`."""
    from thresher.exits import EXIT_CONFIGS
    from thresher.methods import config_class

    if method in EXIT_CONFIGS:
        raise OptionError(f"{method!r} is an early exit, which goes beside a method or alone: --exit {method}.")
    return _configured(config_class(method), settings, "--set")


def untrained_method(method: str | None, settings: Sequence[str] | None) -> Any:
    """The configuration of a method that is attached as it is; None where none is asked for."""
    if settings and method is None:
        raise OptionError("--set needs --method, whose setting it is.")
    return None if method is None else method_config(method, settings)


def exit_config(exit: str, settings: Sequence[str] | None) -> Any:
    """The configuration of an exit with the settings given as `--set-exit name=value`."""
    from thresher.exits import exit_class
    from thresher.methods import CONFIGS

    if exit in CONFIGS:
        raise OptionError(f"{exit!r} is a method, not an early exit: --method {exit}.")
    return _configured(exit_class(exit), settings, "--set-exit")


def _configured(kind: Any, settings: Sequence[str] | None, option: str) -> Any:
    given = assignments(settings, option)
    hints = field_types(kind)
    return kind.from_dict({name: convert(name, text, hints.get(name, str)) for name, text in given.items()})


def stage_overrides(settings: Sequence[str] | None) -> dict[str, Any]:
    """`--stage epochs=2` and `--stage soft.epochs=2` as `fit` takes them."""
    from thresher.policy import Stage

    hints = field_types(Stage)
    hints.pop("name")
    found = {}
    for key, text in assignments(settings, "--stage").items():
        setting = key.rpartition(".")[2]
        if setting not in hints:
            raise OptionError(f"A stage has no setting {setting!r}{nearest(setting, hints)}")
        found[key] = convert(key, text, hints[setting])
    return found


def field_types(kind: type) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def convert(name: str, text: str, hint: Any) -> Any:
    """`text` as the type of a dataclass field: a number, a switch, a word, a list of them, or none."""
    choices = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if types.NoneType in choices and text.lower() == "none":
        return None
    kind = next(choice for choice in choices if choice is not types.NoneType)
    if typing.get_origin(kind) is tuple:
        item = typing.get_args(kind)[0]
        return tuple(convert(name, part.strip(), item) for part in text.strip("()[]").split(",") if part.strip())
    if typing.get_origin(kind) is Literal:
        known = typing.get_args(kind)
        if text not in known:
            raise OptionError(f"{name} cannot be {text!r}{nearest(text, known)}")
        return text
    if kind is bool:
        switches = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
        if text.lower() not in switches:
            raise OptionError(f"{name} takes true or false, not {text!r}.")
        return switches[text.lower()]
    try:
        return kind(text)
    except ValueError:
        wanted = {int: "a whole number", float: "a number"}.get(kind, kind.__name__)
        raise OptionError(f"{name} takes {wanted}, not {text!r}.") from None


def directory_to_write(path: Path, *, graph: bool = False) -> None:
    """Fail before the work rather than after it; leaves no trace. Raises OSError or OptionError.

    graph: whether an exported graph is to be written rather than a model; a directory holds one of them.
    """
    from thresher.checkpoint import SETTINGS
    from thresher.exported.directory import MANIFEST

    _try_to_write(path)
    other = "a saved model" if graph else "an exported graph"
    if any((path / name).is_file() for name in ((SETTINGS, "config.json") if graph else (MANIFEST,))):
        raise OptionError(f"{path} holds {other}; give another directory to write to.")


def file_to_write(path: Path) -> None:
    """As `directory_to_write`."""
    if path.is_dir():
        raise OptionError(f"{path} is a directory; give a file to write to.")
    _try_to_write(path.parent)


def _try_to_write(directory: Path) -> None:
    """Make a file in a directory that may not be there yet, and take away again what was not there before."""
    if directory.exists() and not directory.is_dir():
        raise OptionError(f"{directory} is a file; give a directory to write to.")
    new = [one for one in (directory, *directory.parents) if not one.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    probe = directory / ".thresher-probe"
    try:
        probe.touch()
        probe.unlink()
    finally:
        for one in new:
            one.rmdir()
