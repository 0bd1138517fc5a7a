"""The command line as tests call it, and the rows they give it."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

from typer.testing import CliRunner, Result

from thresher.cli.commands import app

WORDS = [f"w{i}" for i in range(5, 64)]


def write_rows(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def synthetic(count: int = 40, **renamed: str) -> list[dict[str, Any]]:
    """Texts whose class is whether the first word is odd."""
    draw = random.Random(0)
    rows = []
    for _ in range(count):
        words = draw.choices(WORDS, k=draw.randint(6, 20))
        rows.append(
            {renamed.get("text", "text"): " ".join(words), renamed.get("label", "label"): int(words[0][1:]) % 2}
        )
    return rows


def call(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words], env={"HF_HUB_OFFLINE": "1", "COLUMNS": "200"})


def ok(*words: object) -> Any:
    """The JSON a command prints; standard output must hold nothing else."""
    done = call(*words, "--json")
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout)


def fails(*words: object, match: str, status: int = 2) -> str:
    """One sentence on standard error, nothing on standard output, no traceback."""
    done = call(*words)
    assert (done.exit_code, done.stdout) == (status, ""), done.output
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("Error: ")
    assert re.search(match, last), last
    assert "Traceback" not in done.stderr
    return done.stderr
