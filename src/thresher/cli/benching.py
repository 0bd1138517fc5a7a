"""thresher bench: what was gained, in this machine's seconds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import RenderableType

from thresher.cli.gains import slower
from thresher.cli.options import (
    DATA,
    OUTPUT,
    AnsweringDirectory,
    AtSpeedup,
    AtThreshold,
    Column,
    DataSource,
    Device,
    ExitSetting,
    Json,
    MaxLength,
    Seed,
    SkipBad,
    Windows,
    Workers,
    assignments,
)
from thresher.cli.screen import Result, command, progress
from thresher.errors import OptionError
from thresher.report.console import count, percent, ratio, seconds, table

if TYPE_CHECKING:
    import datasets

    from thresher.cli.graphs import OpenedGraph
    from thresher.cli.models import Opened
    from thresher.measure.latency import Comparison, Spread
    from thresher.measure.profile import StageTimes
    from thresher.measure.serving import Gain, Served

SIZES = "1,8,32"


@command
def bench(
    directory: AnsweringDirectory,
    data: DataSource,
    speedup: AtSpeedup = None,
    tau: AtThreshold = None,
    exit_settings: ExitSetting = None,
    batch_size: Annotated[
        str | None,
        typer.Option(
            help=f"Rows run at a time, one size or several. Default: {SIZES}.", metavar="ROWS,…", rich_help_panel=OUTPUT
        ),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Timed rounds after one to warm up.", rich_help_panel=OUTPUT)] = 7,
    profile: Annotated[
        bool,
        typer.Option(
            "--profile",
            help="Also where the time goes, by stage of a pass: for each --batch-size given, else in batches of 4,096 tokens.",
            rich_help_panel=OUTPUT,
        ),
    ] = False,
    against: Annotated[
        str | None,
        typer.Option(
            help="Of an exported directory: a second one to compare it with.", metavar="DIR", rich_help_panel=OUTPUT
        ),
    ] = None,
    column: Column = None,
    max_length: MaxLength = None,
    windows: Windows = None,
    limit: Annotated[
        int, typer.Option(min=1, help="Rows of DATA, drawn with --seed.", metavar="ROWS", rich_help_panel=DATA)
    ] = 128,
    seed: Seed = 0,
    skip_bad: SkipBad = False,
    workers: Workers = None,
    device: Device = "auto",
    as_json: Json = False,
) -> Result:
    """Measure the speedup on this machine: paired, interleaved runs, padding's share apart.

    Of an exported directory: rows a second with one worker a core, and the time of one request on all cores.

    [bold]thresher bench faster imdb:test --batch-size 1,32[/]
    """
    sizes = _sizes(batch_size or SIZES)
    columns = assignments(column, "--column")

    from thresher.cli.graphs import OpenedGraph, in_windows, open_to_answer

    how = {"speedup": speedup, "tau": tau, "exit_settings": exit_settings}
    opened = open_to_answer(directory, device, batch_size=batch_size, workers=workers, **how)  # type: ignore[arg-type]
    opened = in_windows(opened, windows)
    rows = opened.work.read(data, columns, limit=limit, seed=seed, labelled=False, skip_bad=skip_bad)
    about = {"directory": directory, "data": data, "rows": len(rows), "rounds": rounds}
    if isinstance(opened, OpenedGraph):
        if profile:
            raise OptionError(
                f"{directory} is an exported graph, which has no stages; profile the saved model instead."
            )
        graphs = [opened] if against is None else [opened, _second(against, workers)]
        return _of_graphs(graphs, rows, columns, max_length, about)
    if against is not None:
        raise OptionError(f"--against compares two exported directories, and {directory} is none.")
    texts, encoded = _encoded(opened, rows, columns, max_length)
    # First, as it refuses a GPU at once.
    stages = _profiles(opened, texts, encoded, sizes if batch_size else [None], rounds) if profile else []
    return _of_model(opened, encoded, sizes, stages, about)


def _sizes(text: str) -> list[int]:
    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError:
        sizes = []
    if not sizes or min(sizes) < 1:
        raise OptionError(f"--batch-size takes whole numbers of at least 1, such as {SIZES}, not {text!r}.")
    return sizes


def _encoded(
    opened: Opened | OpenedGraph, rows: datasets.Dataset, columns: dict[str, str], max_length: int | None
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """The texts, and their token ids; without labels, which timing has no use for."""
    texts = opened.work.unlabelled(opened.work.named(rows, columns))
    return texts, opened.work.encode(texts, opened.tokenizer, opened.limit(max_length), labels=False).rows


def _spread(value: Spread) -> str:
    return f"{ratio(value.median)} ({value.low:.2f}-{value.high:.2f})"


# --- a model ---------------------------------------------------------------------------------------------------------


def _of_model(
    opened: Opened,
    encoded: datasets.Dataset,
    sizes: Sequence[int],
    stages: Sequence[tuple[int | None, StageTimes]],
    about: dict[str, Any],
) -> Result:
    from thresher.measure.latency import compare

    rounds = about["rounds"]
    comparisons = []
    with progress("timing", (rounds + 1) * len(sizes)) as done:
        for size in sizes:
            comparisons.append(compare(opened.model, encoded, size, rounds, on_round=lambda _: done(1)))
    first = comparisons[0]
    found: dict[str, Any] = {
        **about,
        "tokens_per_row": first.tokens_per_row,
        "threads": first.threads,
        "device": first.device,
        "flops": first.flops,
        "on_paper": first.on_paper,
        "batch_sizes": [_record(one) for one in comparisons],
    }
    if stages:
        found["profile"] = [{"batch_size": size, "seconds": asdict(times)} for size, times in stages]
    shown = _shown(comparisons, about)
    if first.on_paper is not None and first.on_paper > 1:
        shown.append(
            f"By equation 4 of Block-Skim, which counts nothing but the tokens that each layer kept: {ratio(first.on_paper)}."
        )
    measured = {one.batch_size: one.measured.median for one in comparisons} if _reads_less(opened) else {}
    if (remark := slower(about["directory"], first.tokens_per_row, first.flops, measured)) is not None:
        shown.append(remark)
    return Result(found, [*shown, *(_stage_table(size, times) for size, times in stages)])


def _reads_less(opened: Opened) -> bool:
    from thresher.model import attachment_of

    return opened.has_policy or attachment_of(opened.model).exit is not None


def _shown(comparisons: Sequence[Comparison], about: dict[str, Any]) -> list[RenderableType]:
    first = comparisons[0]
    return [
        table(
            f"{about['directory']}: {count(first.rows)} rows of {first.tokens_per_row:.0f} tokens, {about['rounds']} rounds",
            ("batch", "padding only", "kernels", "measured", "FLOPs", "over sorted stock"),
            [
                (
                    one.batch_size,
                    _spread(one.padding_only),
                    _spread(one.kernels),
                    _spread(one.measured),
                    ratio(one.flops),
                    _spread(one.over_sorted),
                )
                for one in comparisons
            ],
        ),
        "Padding only: stock padded / packed with torch's kernels. Kernels: that / packed. Measured: packed / thresher. All "
        "three in arrival order. Over sorted stock: stock "
        "/ thresher, both sorted by length. Medians and quartiles of paired rounds.",
        table(
            f"Time a row on {first.device}, {first.threads} thread{'s' if first.threads > 1 else ''}",
            ("batch", *first.timings),
            [
                (one.batch_size, *(seconds(timing.median / one.rows) for timing in one.timings.values()))
                for one in comparisons
            ],
        ),
    ]


def _record(one: Comparison) -> dict[str, Any]:
    return {
        "batch_size": one.batch_size,
        "padding_only": vars(one.padding_only),
        "kernels": vars(one.kernels),
        "measured": vars(one.measured),
        "over_sorted": vars(one.over_sorted),
        "seconds": {name: vars(timing.seconds) for name, timing in one.timings.items()},
    }


def _profiles(
    opened: Opened, texts: datasets.Dataset, encoded: datasets.Dataset, sizes: Sequence[int | None], rounds: int
) -> list[tuple[int | None, StageTimes]]:
    from thresher.measure.profile import profile

    longest = max(map(len, encoded["input_ids"]))

    def tokenise() -> object:
        return opened.work.encode(texts, opened.tokenizer, longest, labels=False, quiet=True)

    with progress("profiling", (rounds + 1) * len(sizes)) as done:
        return [
            (
                size,
                profile(
                    opened.model, encoded, batch_size=size, rounds=rounds, tokenise=tokenise, on_round=lambda _: done(1)
                ),
            )
            for size in sizes
        ]


def _stage_table(size: int | None, times: StageTimes) -> RenderableType:
    ways = (times.packed, times.thresher)
    whole = [sum(way.values()) for way in ways]
    rows = [
        (stage, *(cell for way, total in zip(ways, whole, strict=True) for cell in _cells(way[stage], total)))
        for stage in times.packed
        if any(way[stage] for way in ways)
    ]
    return table(
        f"Where the time goes, in batches of {'4,096 tokens' if size is None else f'{count(size)} rows'}",
        ("stage", "packed, ms", "share", "thresher, ms", "share"),
        [*rows, ("together", *(cell for total in whole for cell in _cells(total, total)))],
        "For all rows: medians of the rounds. Both ways have tokenise in common; norms: what is left of a layer.",
    )


def _cells(value: float, total: float) -> tuple[str, str]:
    return f"{1e3 * value:.2f}", percent(value / total)


# --- exported directories --------------------------------------------------------------------------------------------


def _second(name: str, workers: int | None) -> OpenedGraph:
    from thresher.cli.graphs import open_graph
    from thresher.exported.directory import is_exported

    if not is_exported(Path(name).expanduser()):
        raise OptionError(f"--against compares two exported directories, and {name} is none.")
    return open_graph(name, workers)


def _of_graphs(
    graphs: Sequence[OpenedGraph],
    rows: datasets.Dataset,
    columns: dict[str, str],
    max_length: int | None,
    about: dict[str, Any],
) -> Result:
    """Of one exported directory, or of one against another."""
    from thresher.cli.graphs import feeds
    from thresher.measure.serving import gain, serve

    models = {
        str(number): (graph.runner, feeds(_encoded(graph, rows, columns, max_length)[1]))
        for number, graph in enumerate(graphs)
    }
    with progress("timing", 2 * (about["rounds"] + 1)) as done:
        served = list(serve(models, rounds=about["rounds"], on_round=lambda _: done(1)).values())
    found = {**about, **_served_record(graphs[0], served[0])}
    shown: list[RenderableType] = [_served_table(graphs, served, about)]
    for graph, one in zip(graphs, served, strict=True):
        if (remark := slower(graph.runner.path, one.tokens_per_row, one.flops, graph=True)) is not None:
            shown.append(remark)
    if len(graphs) > 1:
        gained = gain(served[1], served[0])
        found["against"] = {"directory": str(graphs[1].runner.path), **_served_record(graphs[1], served[1])}
        found["over_against"] = {"rows_per_second": vars(gained.many), "request": vars(gained.single)}
        shown.append(_gain_line(graphs, gained))
    return Result(found, shown)


def _served_record(graph: OpenedGraph, one: Served) -> dict[str, Any]:
    manifest = graph.runner.manifest
    return {
        "runtime": manifest.runtime,
        "int8": manifest.int8,
        "method": manifest.method,
        "exit": manifest.exit,
        "tokens_per_row": one.tokens_per_row,
        "workers": one.workers,
        "flops": one.flops,
        "rows_per_second": vars(one.rows_per_second),
        "request_seconds": {"median": one.latency(0.5), "p95": one.latency(0.95)},
    }


def _served_table(graphs: Sequence[OpenedGraph], served: Sequence[Served], about: dict[str, Any]) -> RenderableType:
    from thresher.cli.graphs import described

    first = served[0]
    cores = f"{first.workers} core{'s' if first.workers > 1 else ''}"
    return table(
        f"{count(first.rows)} rows of {first.tokens_per_row:.0f} tokens, {about['rounds']} rounds, {cores}",
        ("directory", "what", "rows a second", "one request", "95% within", "FLOPs"),
        [
            (
                graph.runner.path,
                described(graph.runner.manifest),
                f"{one.rows_per_second.median:,.1f} ({one.rows_per_second.low:,.1f}-{one.rows_per_second.high:,.1f})",
                seconds(one.latency(0.5)),
                seconds(one.latency(0.95)),
                ratio(one.flops),
            )
            for graph, one in zip(graphs, served, strict=True)
        ],
        "Rows a second: all rows at once, one worker a core. One request: a row at a time, all cores together. Without "
        "tokenising.",
    )


def _gain_line(graphs: Sequence[OpenedGraph], gained: Gain) -> str:
    return (
        f"{graphs[0].runner.path} is {_spread(gained.many)} as fast as {graphs[1].runner.path} on many rows, "
        f"{_spread(gained.single)} on one request; medians and quartiles of paired rounds."
    )
