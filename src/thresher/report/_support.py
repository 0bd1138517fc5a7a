"""What every page and plot needs: optional libraries, templates, and files that appear whole or not at all."""

from __future__ import annotations

import base64
import hashlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thresher.errors import ThresherError

if TYPE_CHECKING:
    from jinja2 import Environment


@contextmanager
def needs(library: str) -> Iterator[None]:
    """Wrap the import of an optional library, so that its absence says which extra brings it."""
    try:
        yield
    except ImportError as error:
        raise ThresherError(f'This needs {library}, which is not installed; pip install "thresher[demo]".') from error


def write_whole(path: str | os.PathLike[str], content: str | bytes) -> Path:
    """Write a file in one step: readers see the old content or the new, and a failure leaves nothing behind."""
    target = Path(path)
    # A lone surrogate (text once decoded with surrogateescape) must not cost the whole file.
    data = content.encode("utf-8", "replace") if isinstance(content, str) else content
    # The random name stands in the target's own folder, as only a rename within one file system is atomic.
    temporary = target.parent / f".{secrets.token_hex(6)}.tmp"
    try:
        try:
            with temporary.open("xb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, target)
        except BaseException:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise ThresherError(f"Cannot write {target}: {error.strerror or error}.") from error
    return target


@cache
def _environment() -> Environment:
    with needs("jinja2"):
        from jinja2 import Environment, PackageLoader, StrictUndefined
    return Environment(
        loader=PackageLoader("thresher.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def render_template(name: str, **values: Any) -> str:
    """A self-contained page: the style and the one script are inlined, and the page forbids itself anything else."""
    environment = _environment()
    from markupsafe import Markup  # comes with jinja2

    def source(asset: str) -> str:
        assert environment.loader is not None
        return environment.loader.get_source(environment, asset)[0]

    script = source("layers.js")
    # The page's policy names the script by its hash, so nothing that slipped into the text could ever run.
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    page = environment.get_template(name)
    return page.render(style=Markup(source("style.css")), script=Markup(script), script_hash=digest, **values)
