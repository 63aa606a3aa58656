"""What slim writes for people to look at: every stage into a folder, and into torch's structured trace.

``SLIM_DUMP=dir`` writes files; ``TORCH_TRACE=dir`` makes artifacts that ``tlparse dir`` shows beside torch's own.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch._logging import trace_structured

from slim import errors
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

    def check(self) -> None:
        """Raises SaveFailed where nothing could be written: worth asking before a long compile."""
        if self.folder is None:
            return
        existing = next(parent for parent in (self.folder, *self.folder.absolute().parents) if parent.exists())
        if not existing.is_dir() or not os.access(existing, os.W_OK):
            raise errors.SaveFailed(path=self.folder, reason=f"{existing} is no directory that can be written to")

    def stage(self, name: str, program: Program) -> None:
        """The Program as ``00_lift.py``, ``01_<pass>.py``, ...: text that runs and that reads back."""
        file = f"{self.written:02d}_{name}.py"
        if self.folder is not None:
            self.file(file, str(program))
        _trace(f"slim_{file}", lambda: str(program))
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
            if isinstance(content, str):
                _trace(f"slim_generated_{name.replace('/', '_')}", lambda text=content: text)  # type: ignore[misc]


def _trace(name: str, text: Callable[[], str]) -> None:
    """An artifact in torch's structured trace, made only where there is one."""
    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": name, "encoding": "string"},
        payload_fn=text,
        expect_trace_id=False,  # slim.compile is no frame of Dynamo's; within torch.compile there is one
    )
