"""thresher predict, thresher explain: answers, and which words they rest on."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import RenderableType

from thresher.cli.options import (
    DATA,
    OUTPUT,
    AnsweringDirectory,
    AtSpeedup,
    AtThreshold,
    BatchSize,
    Column,
    Device,
    ExitSetting,
    Json,
    MaxLength,
    ModelDirectory,
    NoAnswer,
    SkipBad,
    Windows,
    Workers,
    assignments,
    file_to_write,
    place_of,
)
from thresher.cli.screen import Result, TokenMapView, command, progress
from thresher.errors import OptionError
from thresher.report.console import count, table

if TYPE_CHECKING:
    import datasets

    from thresher.report.tokens import TokenMap


SHOWN_TEXT = 60

Texts = Annotated[
    list[str] | None, typer.Option("--text", help="A text. Repeat for more.", metavar="TEXT", rich_help_panel=DATA)
]
Pairs = Annotated[
    list[str] | None,
    typer.Option(
        "--pair", help="The second text of a pair, one for each --text.", metavar="TEXT", rich_help_panel=DATA
    ),
]


@command
def predict(
    directory: AnsweringDirectory,
    data: Annotated[
        str | None, typer.Argument(metavar="DATA", help="Rows as for fit, labels not needed; or give --text.")
    ] = None,
    text: Texts = None,
    pair: Pairs = None,
    speedup: AtSpeedup = None,
    tau: AtThreshold = None,
    exit_settings: ExitSetting = None,
    column: Column = None,
    max_length: MaxLength = None,
    windows: Windows = None,
    no_answer: NoAnswer = None,
    skip_bad: SkipBad = False,
    out: Annotated[
        Path | None,
        typer.Option(help="Write one JSON object a row, in order.", metavar="FILE.jsonl", rich_help_panel=OUTPUT),
    ] = None,
    batch_size: BatchSize = None,
    workers: Workers = None,
    device: Device = "auto",
    as_json: Json = False,
) -> Result:
    """Answer rows or texts: label and probability, value, embedding, a piece of the passage, or entities.

    [bold]thresher predict faster --text "A film that never ends."[/]
    """
    if (data is None) == (not text):
        raise OptionError("Give either DATA or --text.")
    if skip_bad and data is None:
        raise OptionError("--skip-bad needs DATA, whose rows may be bad.")
    if out is not None:
        file_to_write(out)
    columns = assignments(column, "--column")

    from thresher.cli.graphs import answering_from, in_windows, open_to_answer

    how = {"speedup": speedup, "tau": tau, "exit_settings": exit_settings}
    opened = open_to_answer(directory, device, batch_size=batch_size, workers=workers, **how)  # type: ignore[arg-type]
    opened = answering_from(in_windows(opened, windows), no_answer)
    work = opened.text_work()
    rows = _given(text, pair) if data is None else work.read(data, columns, labelled=False, skip_bad=skip_bad)
    rows = work.named(rows, columns)
    rows = work.unlabelled(rows)
    texts = work.shown(rows)
    encoded = work.encode(rows, opened.tokenizer, opened.limit(max_length), labels=False)
    with progress("predicting", len(encoded.rows)) as done:
        after = opened.answer(encoded.rows, batch_size=batch_size, on_done=done)
    said = work.answers(after.predictions, encoded)
    if out is not None:
        _write(out, "".join(json.dumps(answer, ensure_ascii=False) + "\n" for answer in said))
        return Result(
            {"file": str(out), "rows": len(said), "speedup": after.speedup},
            [f"Wrote {count(len(said))} answers to {out}."],
        )
    named = [name for name in said[0] if name not in ("n_best", "tags")]
    shown = [(_short(one), *(_cell(answer[name]) for name in named)) for one, answer in zip(texts, said, strict=True)]
    return Result(
        {"predictions": said, "speedup": after.speedup},
        [table(f"{count(len(said))} answers", ("text", *named), shown)],
    )


@command
def explain(
    directory: ModelDirectory,
    text: Texts = None,
    pair: Pairs = None,
    max_length: MaxLength = None,
    windows: Windows = None,
    no_answer: NoAnswer = None,
    speedup: AtSpeedup = None,
    tau: AtThreshold = None,
    exit_settings: ExitSetting = None,
    saliency: Annotated[
        str | None,
        typer.Option(
            help="Also how much each token matters: gradient-x-input, integrated-gradients, attention, or contribution "
            "(of a model fitted with adapler).",
            metavar="METHOD",
        ),
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(help="Write a page with a slider for the layer.", metavar="FILE", rich_help_panel=OUTPUT),
    ] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> Result:
    """Show which words a model stopped reading, at which layer, and after which one the text left early.

    Without colours, [2:words] are those dropped at layer 2, and {2:words} those whose tag was settled (frozen) after it.

    [bold]thresher explain faster --text "Not a dull film at all." --html map.html[/]
    """
    if not text:
        raise OptionError('Give a text to explain: --text "…".')
    if html is not None:
        file_to_write(html)
    place = place_of(device)

    from thresher.cli.graphs import answering_from, in_windows, leaving_by
    from thresher.cli.models import open_model
    from thresher.cli.question_work import QuestionWork
    from thresher.explanation import explain as token_maps
    from thresher.report.tokens import to_html
    from thresher.tasks.answering import EncodedQuestions

    opened = leaving_by(open_model(directory, place, speedup=speedup), directory, tau, exit_settings)
    opened = answering_from(in_windows(opened, windows), no_answer)
    rows = opened.work.unlabelled(_given(text, pair))
    limit = opened.limit(max_length)
    # Encoded here as well, for what it says of cut and empty texts.
    encoded = opened.work.encode(rows, opened.tokenizer, limit, labels=False)
    texts = opened.work.texts(rows, opened.tokenizer, limit)
    asking: dict[str, Any] = {"salient": saliency}
    if isinstance(opened.work, QuestionWork) and isinstance(encoded, EncodedQuestions):
        asking |= {"threshold": opened.work.threshold, "questions": encoded.windows.question.tolist()}
    maps = token_maps(opened.model, opened.tokenizer, texts, limit, **asking)
    shown: list[RenderableType] = []
    for one in maps:
        shown += [TokenMapView(one), *([] if saliency is None else [_saliency_table(one)])]
    if html is not None:
        _write(html, to_html(maps, f"What {directory} read"))
        shown.append(f"Wrote {html}.")
    return Result({"maps": [{**asdict(one), "kept": one.kept} for one in maps], "html": html and str(html)}, shown)


def _saliency_table(token_map: TokenMap) -> RenderableType:
    """The tokens that matter most, beside the layer at which each was dropped."""
    from thresher.report.tokens import saliency_columns, saliency_rows

    rows = [(_short(token), *rest) for token, *rest in saliency_rows(token_map)]
    return table(f"What matters most, by {token_map.saliency_by}", saliency_columns(token_map), rows)


def _write(file: Path, text: str) -> None:
    from thresher.report._support import write_whole

    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, text)


def _given(text: list[str] | None, pair: list[str] | None) -> datasets.Dataset:
    import datasets

    columns = {"text": [_whole(one) for one in text or ()]}
    if pair:
        if len(pair) != len(columns["text"]):
            raise OptionError(f"Give one --pair for each --text, not {len(pair)} for {len(columns['text'])}.")
        columns["text_pair"] = [_whole(one) for one in pair]
    return datasets.Dataset.from_dict(columns)


def _whole(text: str) -> str:
    """A text without the stand-ins for bytes of the command line that are not UTF-8; tokenizers refuse those."""
    return text.encode("utf-8", "replace").decode()


def _short(text: str) -> str:
    """One line, of characters that a terminal neither obeys nor refuses."""
    text = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in " ".join(text.split()))
    return text if len(text) <= SHOWN_TEXT else text[: SHOWN_TEXT - 1] + "…"


def _cell(value: Any) -> str:
    if isinstance(value, list) and not (value and isinstance(value[0], float)):
        return _short(", ".join(f"{one['text']} ({one['type']})" for one in value))  # entities
    if isinstance(value, list):
        return f"[{', '.join(f'{x:.3f}' for x in value[:4])}, …] ({len(value)})"
    return f"{value:.4f}" if isinstance(value, float) else _short(str(value))
