"""What slim writes for people to look at: every stage into a folder, and into torch's structured trace.

``SLIM_DUMP=dir`` writes files; ``TORCH_TRACE=dir`` makes artifacts that ``tlparse dir`` shows beside torch's own. The
first compilation has ``dir`` to itself, those after it have ``dir/2``, ``dir/3``, ...: nothing is written over.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch._logging import trace_structured

from slim import errors
from slim.compiler.program import Program
from slim.compiler.report import PipelineReport


def cache_dir() -> Path:
    """Where slim keeps what it can make again: the environment's SLIM_CACHE, else ~/.cache/slim."""
    return Path(os.environ.get("SLIM_CACHE") or Path.home() / ".cache" / "slim").expanduser()


_MARK = "00_lift.py"  # what a compilation writes first: a folder that has one is taken


@dataclass
class Dump:
    """Writes what one compilation makes into a folder of its own; into nothing where ``root`` is None.

    Attributes:
        root: what the user named; see ``folder``.
        stages: how many have been written.
    """

    root: Path | None
    stages: int = 0

    @classmethod
    def to(cls, root: Path | None) -> Dump:
        """``root``, or the environment's SLIM_DUMP."""
        chosen = root or os.environ.get("SLIM_DUMP")
        return cls(Path(chosen) if chosen else None)

    def check(self) -> None:
        """Raises SaveFailed where nothing could be written: worth asking before a long compile."""
        if self.root is None:
            return
        existing = next(parent for parent in (self.root, *self.root.absolute().parents) if parent.exists())
        if not existing.is_dir() or not os.access(existing, os.W_OK):
            raise errors.SaveFailed(path=self.root, reason=f"{existing} is no directory that can be written to")

    @functools.cached_property
    def folder(self) -> Path | None:
        """``root``, or the first of ``root/2``, ``root/3``, ... that no compilation, of any process, has taken.

        Raises:
            SaveFailed: where none can be made.
        """
        if self.root is None:
            return None
        for folder in itertools.chain([self.root], (self.root / str(number) for number in itertools.count(2))):
            with _saving(folder):
                folder.mkdir(parents=True, exist_ok=True)
                if _take(folder / _MARK):
                    return folder
        raise AssertionError("there are always more numbers")

    def stage(self, name: str, program: Program) -> None:
        """The Program as ``00_lift.py``, ``01_<pass>.py``, ...: text that runs and that reads back."""
        file = f"{self.stages:02d}_{name}.py"
        if self.root is not None:
            self.file(file, str(program))
        _trace(f"slim_{file}", lambda: str(program))
        self.stages += 1

    def report(self, report: PipelineReport) -> None:
        """What was done so far as ``report.json``, in place of the one before."""
        if self.root is not None:
            self.file("report.json", report.to_json())
        _trace("slim_report.json", report.to_json)

    def code(self, files: Mapping[str, str | bytes]) -> None:
        """What was generated, below ``generated/``."""
        for name, content in files.items():
            self.file(f"generated/{name}", content)
            if isinstance(content, str):
                _trace(f"slim_generated_{name.replace('/', '_')}", lambda text=content: text)  # type: ignore[misc]

    def file(self, name: str, content: str | bytes) -> None:
        """Raises SaveFailed where the folder cannot be written to."""
        if self.folder is None:
            return
        path = self.folder / name
        with _saving(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def _saving(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise errors.SaveFailed(path=path, reason=str(error)) from error


def _take(mark: Path) -> bool:
    """Whether ``mark`` was not there; it is then."""
    try:
        mark.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def _trace(name: str, text: Callable[[], str]) -> None:
    """An artifact in torch's structured trace, made only where there is one."""
    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": name, "encoding": "string"},
        payload_fn=text,
        expect_trace_id=False,  # slim.compile is no frame of Dynamo's; within torch.compile there is one
    )
