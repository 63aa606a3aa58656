"""Generated Triton sources: kept as files that are named after their text, and imported once a process.

The file is for people, tracebacks and profilers. What runs, and what Triton compiles, is the text that was generated,
never what a file happens to hold.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.util
import linecache
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slim import errors
from slim.codegen import build
from slim.codegen.triton import interpreter
from slim.codegen.triton.kernel import Config, Kernel

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Module:
    """A generated module in this process.

    Attributes:
        path: the file with the source.
        configs: what may be chosen; the first is the default.
        plan: (sizes, config) -> the grid, the float32 of scratch, the int32 counters.
        launch: (pointers, sizes, config) runs the kernel on the current device.
        function: the jitted kernel, of the name that the ``Kernel`` has.
    """

    path: Path
    source: str
    configs: Sequence[Config]
    plan: Callable[[Sequence[int], Config], tuple[tuple[int, ...], int, int]]
    launch: Callable[[Sequence[Any], Sequence[int], Config], None]
    function: Any


def load(kernel: Kernel) -> Module:
    """The kernel's module, the same one whenever its text is the same.

    Raises:
        SaveFailed: where the cache cannot be written.

    Example:
        >>> load(kernel).plan([1000], {"BLOCK": 256})
        ((4,), 0, 0)
    """
    source = kernel.source
    path = folder() / f"{kernel.name}-{build.key(source)}.py"
    return _imported(path, kernel.name, source)


def folder() -> Path:
    """The part of the cache that is Triton's: generated sources, choices of the tuner, compiled kernels."""
    return build.cache_folder() / "triton"


@contextmanager
def compiling() -> Iterator[None]:
    """Inside, Triton keeps what it compiles in slim's cache, unless the user's TRITON_CACHE_DIR names a place."""
    from triton import knobs

    with knobs.cache.scope():
        if not os.environ.get("TRITON_CACHE_DIR"):
            knobs.cache.dir = str(folder() / "compiled")
        yield


def keep(path: Path, text: str) -> None:
    """Makes the file hold ``text``. Other processes see it whole, or not at all.

    Raises:
        SaveFailed: where the cache cannot be written.
    """

    def write(made: Path) -> None:
        made.write_bytes(text.encode())

    try:
        if path.exists() and path.read_bytes() != text.encode():
            path.unlink(missing_ok=True)
    except OSError as error:
        raise errors.SaveFailed(path=path, reason=str(error)) from error
    build.once(path, write)


class _Text(importlib.abc.InspectLoader):
    """Imports a text in hand: neither the file nor a .pyc beside it is read."""

    def __init__(self, source: str, path: Path) -> None:
        self._source = source
        self._path = path

    def get_source(self, fullname: str) -> str:
        return self._source

    def get_code(self, fullname: str) -> Any:
        return self.source_to_code(self._source, str(self._path))


@functools.cache
def _imported(path: Path, name: str, source: str) -> Module:
    if path.exists() and path.read_bytes() != source.encode():
        log.warning("%s is not what slim wrote there: it is written anew", path)
    keep(path, source)
    if interpreter.interpreting():
        interpreter.mend()
    # Triton asks for the text of a function: with no time of change, linecache never looks at the file
    linecache.cache[str(path)] = (len(source), None, source.splitlines(keepends=True), str(path))
    loader = _Text(source, path)
    spec = importlib.util.spec_from_file_location(path.stem, path, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return Module(path, source, tuple(module.CONFIGS), module.plan, module.launch, getattr(module, name))
