"""The commands together, as one typer application. One file a group of commands; heavy imports wait inside them."""

from __future__ import annotations

from typing import Annotated

import typer

from thresher.cli import (
    about,
    benching,
    calibrating,
    comparing,
    exporting,
    fitting,
    measuring,
    pairing,
    post_training,
    quantizing,
    scorers,
    searching,
    using,
)

app = typer.Typer(
    name="thresher",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

FASTER = (
    fitting.fit,
    comparing.compare,
    calibrating.calibrate,
    searching.search,
    quantizing.quantize,
    post_training.post_train,
    scorers.fit_scorer,
)

for panel, commands in (
    ("Make a model faster", FASTER),
    ("Measure it", (measuring.evaluate, benching.bench)),
    ("Use it", (using.predict, using.explain, exporting.export, pairing.index, pairing.rank)),
    ("Look around", (about.methods, about.demo)),
):
    for command in commands:
        app.command(rich_help_panel=panel)(command)


def _version(asked: bool) -> None:
    if asked:
        from thresher import __version__

        typer.echo(f"thresher {__version__}")
        raise typer.Exit


@app.callback(
    epilog="Start with [bold]thresher demo[/], or with a model of your own: "
    "[bold]thresher fit MODEL DATA --speedup 2 --out DIR[/]. "
    "Every command takes --json (one document on standard output; notices and progress go to standard error). "
    "Errors exit with 2 and one sentence; THRESHER_DEBUG=1 shows the traceback."
)
def thresher(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Make Hugging Face encoders cheaper to run by reading less: tokens drop layer by layer, and are really gone."""


__all__ = ["app"]
