"""Folders that slim writes to for people: dumps of every stage, and reproducers of passes that failed."""

from __future__ import annotations

import hashlib
import os
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from slim import errors
from slim.compiler.passes_base import Pass
from slim.compiler.pipeline_text import write_pipeline
from slim.compiler.program import Program


def cache_dir() -> Path:
    """Where slim keeps what it can make again: the environment's SLIM_CACHE, else ~/.cache/slim."""
    return Path(os.environ.get("SLIM_CACHE") or Path.home() / ".cache" / "slim").expanduser()


@dataclass
class Dump:
    """Writes numbered stages into ``folder``; into nothing where that is None."""

    folder: Path | None
    written: int = 0

    @classmethod
    def to(cls, folder: Path | None) -> Dump:
        """``folder``, or the environment's SLIM_DUMP."""
        chosen = folder or os.environ.get("SLIM_DUMP")
        return cls(Path(chosen) if chosen else None)

    def stage(self, name: str, program: Program) -> None:
        """The Program as ``00_lift.py``, ``01_<pass>.py``, ...: text that runs and that reads back."""
        if self.folder is not None:
            self.file(f"{self.written:02d}_{name}.py", str(program))
        self.written += 1

    def file(self, name: str, content: str | bytes) -> None:
        """Raises SaveFailed where the folder cannot be written to."""
        if self.folder is None:
            return
        path = self.folder / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.encode() if isinstance(content, str) else content)
        except OSError as error:
            raise errors.SaveFailed(path=path, reason=str(error)) from error

    def code(self, files: Mapping[str, str | bytes]) -> None:
        """What was generated, below ``generated/``."""
        for name, content in files.items():
            self.file(f"generated/{name}", content)


def write_reproducer(
    program: Program, passes: Sequence[Pass], failed: Pass, error: BaseException, folder: Path | None
) -> str:
    """A folder with what is needed to see ``failed`` fail again, except the weights.

    Args:
        program: the Program as it was before the pass.
        passes: the whole pipeline.
        folder: where dumps go; the cache takes the reproducer where there is none.

    Returns:
        The folder, or why there is none: a reproducer that cannot be written must not hide the failure it is for.
    """
    trace = "".join(traceback.format_exception(error))
    mark = hashlib.sha256(trace.encode()).hexdigest()[:8]
    home = (folder or cache_dir()) / "reproducers" / f"{time.strftime('%Y%m%d-%H%M%S')}-{failed.name}-{mark}"
    try:
        home.mkdir(parents=True, exist_ok=True)
        (home / "before.py").write_text(str(program), encoding="utf-8")
        (home / "pipeline.txt").write_text(
            f"# {failed!r} failed, as pass {list(passes).index(failed) + 1} of:\n{write_pipeline(passes)}\n",
            encoding="utf-8",
        )
        (home / "traceback.txt").write_text(trace, encoding="utf-8")
    except Exception as reason:  # a full disk, or a Program too broken to print
        return f"(none: {reason})"
    return str(home)
