"""What a benchmark measured so far: numbers as JSON, and beside them the table that people read."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def read_kept(file: Path) -> dict[str, Any]:
    """What an earlier run left in ``file``; nothing where there was none."""
    kept: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    return kept


def write_kept(file: Path, kept: Any, table: str) -> None:
    """Writes ``kept`` to ``file`` and ``table`` to the .md of its name; an interruption leaves the old ones whole."""
    file.parent.mkdir(parents=True, exist_ok=True)
    for path, text in ((file, json.dumps(kept, indent=1)), (file.with_suffix(".md"), table)):
        partial = path.with_name(path.name + ".partial")
        partial.write_text(text.rstrip("\n") + "\n")
        os.replace(partial, path)
