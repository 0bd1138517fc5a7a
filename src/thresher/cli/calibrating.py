"""thresher calibrate: from a target to the strength that meets it, without training."""

from __future__ import annotations

from pathlib import Path

from thresher.cli.gains import STOCK_IS, gains, gains_table
from thresher.cli.options import (
    BatchSize,
    ChangedModel,
    Column,
    DataSource,
    Device,
    Json,
    Limit,
    MaxLength,
    MaxLoss,
    MethodSetting,
    MethodToAttach,
    ModelDirectory,
    Seed,
    SkipBad,
    Speedup,
    Windows,
    assignments,
    directory_to_write,
    one_target,
    place_of,
    untrained_method,
)
from thresher.cli.screen import Result, command
from thresher.errors import OptionError
from thresher.report.console import count


@command
def calibrate(
    directory: ModelDirectory,
    data: DataSource,
    speedup: Speedup = None,
    max_loss: MaxLoss = None,
    method: MethodToAttach = None,
    settings: MethodSetting = None,
    column: Column = None,
    max_length: MaxLength = None,
    windows: Windows = None,
    limit: Limit = None,
    seed: Seed = 0,
    skip_bad: SkipBad = False,
    out: ChangedModel = None,
    batch_size: BatchSize = None,
    device: Device = "auto",
    as_json: Json = False,
) -> Result:
    """Set the strength of a method, or of the early exit beside it, without training, so that a target holds on DATA.

    [bold]thresher calibrate faster imdb:test --max-loss 0.01 --limit 1000[/]
    """
    one_target(speedup, max_loss, required=True)
    config = untrained_method(method, settings)
    place = place_of(device)

    import thresher
    from thresher.calibration import calibrate as search
    from thresher.cli.graphs import in_windows
    from thresher.cli.models import open_model
    from thresher.cli.truth import Truth
    from thresher.measure.run import run, run_packed
    from thresher.model import attachment_of

    opened = in_windows(open_model(directory, place, plain_is_news=method is None), windows)
    work = opened.text_work()
    if config is not None:
        if out is None:
            raise OptionError("--method attaches a policy that DIR was not saved with; give --out for the result.")
        thresher.attach(opened.model, opened.work.fitting(config, opened.tokenizer, opened.model))
    elif not opened.has_policy and attachment_of(opened.model).exit is None:
        raise OptionError(
            f"{directory} has no method to calibrate; give one that needs no training (--method attention-mass --out DIR), or "
            "run thresher fit."
        )
    target = out or Path(directory)
    directory_to_write(target)
    columns = assignments(column, "--column")
    rows = opened.work.read(data, columns, limit=limit, seed=seed, skip_bad=skip_bad)
    work = work.settled(rows, columns)
    attachment_of(opened.model).notes["task"] = work.notes()
    encoded = opened.encode(rows, columns, max_length=max_length)
    truth = Truth.of(encoded)
    stock = run_packed(opened.model, encoded.rows, batch_size=batch_size).predictions
    quality = work.quality(truth, stock)
    found = search(
        opened.model,
        encoded.rows,
        speedup=speedup,
        max_loss=max_loss,
        quality=quality,
        batch_size=batch_size,
        knob="both",
    )
    after = run(opened.model, encoded.rows, batch_size=batch_size)
    opened.save(target)
    result = gains(work, truth, stock, after.predictions)
    attached = attachment_of(opened.model)
    parts = {"the method": attached.policy, "the exit": attached.exit}
    strengths = {name: float(part.config.strength) for name, part in parts.items() if part is not None}
    said = ", ".join(
        f"{value:.4g}" + (f" of {name}" if len(strengths) > 1 else "") for name, value in strengths.items()
    )
    return Result(
        {
            "directory": str(target),
            "strength": found.strength,
            "strengths": strengths,
            "speedup": after.speedup,
            "rows": len(rows),
            **result,
        },
        [
            gains_table(f"Strength {said} on {count(len(rows))} rows", result, after.speedup),
            STOCK_IS,
            f"Saved to {target}.",
        ],
    )
