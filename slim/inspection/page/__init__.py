"""The report in HTML: one file that opens from disk, with no network and no library.

``page.html`` is the frame; ``page.css`` and the scripts go into it, and so does what ``collect`` found, as JSON.
"""

from __future__ import annotations

import json
import os
from importlib import resources
from pathlib import Path
from typing import Any

from slim import errors
from slim.errors.base import StrPath
from slim.inspection.page.collect import Story, collect

__all__ = ["Story", "check_writable", "collect", "render", "write_page"]


_SCRIPTS = (  # one a view, between what all of them use and what is clicked; in this order they make one script
    "numbers.js", "ir.js", "details.js", "pictures.js", "pipeline.js", "layers.js", "roofline.js", "code.js", "main.js",
)  # fmt: skip


def render(data: dict[str, Any]) -> str:
    """The whole page over ``data``, which is what ``collect`` gives."""
    # "<" does not occur in the JSON, so that no text in it can end the script it stands in
    parts = {"DATA": json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"), "TITLE": _escaped(data["title"])}
    parts |= {"CSS": _file("page.css"), "JS": "\n".join(map(_file, _SCRIPTS))}
    page = _file("page.html")
    for name, text in parts.items():
        before, _, after = page.partition(f"@{name}@")
        page = f"{before}{text}{after}"
    return page


def check_writable(path: StrPath) -> None:
    """Raises SaveFailed where no file could be written to ``path``: worth asking before a long compile."""
    file = Path(path)
    if file.is_dir():
        raise errors.SaveFailed(path=file, reason="there is a directory of that name")
    if not file.parent.is_dir():
        raise errors.SaveFailed(path=file, reason=f"there is no directory {file.parent}")
    if not os.access(file if file.exists() else file.parent, os.W_OK):
        raise errors.SaveFailed(path=file, reason="it cannot be written to")


def write_page(story: Story, path: StrPath) -> Path:
    """Writes the report of ``story``; raises SaveFailed where the file cannot be written."""
    file = Path(path)
    try:
        file.write_text(render(collect(story)), encoding="utf-8")
    except OSError as error:
        raise errors.SaveFailed(path=file, reason=error.strerror or str(error)) from error
    return file


def _file(name: str) -> str:
    return resources.files(__name__).joinpath(name).read_text(encoding="utf-8")


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")
