"""The lines of a model's own source that nodes came from."""

from __future__ import annotations

import functools
import linecache
import sys
from pathlib import Path


def source_line(where: str) -> str | None:
    """The text at "transformers/models/llama/modeling_llama.py:66"; None where that file is not on this machine."""
    file, _, line = where.rpartition(":")
    path = _find(file)
    if path is None or not line.isdigit():
        return None
    return linecache.getline(path, int(line)).strip() or None


@functools.cache
def _find(file: str) -> str | None:
    """The file as it is named, or below one of the folders that Python imports from."""
    if not file:
        return None
    return next((str(path) for path in (Path(root or ".") / file for root in sys.path) if path.is_file()), None)
