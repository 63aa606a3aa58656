"""What a walk leaves on disk, so that an interrupted one goes on where it was.

Small walks write nothing: the first checkpoint is due after half a minute.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, fx

from slim.compiler.dump import cache_dir
from slim.compiler.program import Program
from slim.compiler.statistics.batches import Batch
from slim.compiler.weights import Stored

log = logging.getLogger(__name__)

EVERY = 30.0  # seconds between checkpoints

State = list[list[dict[fx.Node, Any]]]


class Checkpoint:
    """The file of one walk, which its Program, its data and what is done with them name."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.stretches = 0
        self._results: dict[int, dict[str, Tensor]] = {}
        self._last = time.monotonic()
        self._open()

    @classmethod
    def of(cls, program: Program, batches: Sequence[Batch], purpose: str) -> Checkpoint:
        return cls(cache_dir() / "walks" / f"{fingerprint(program, batches, purpose)}.safetensors")

    def _open(self) -> None:
        """Reads what an earlier walk left, if that can be used."""
        if not self.path.exists():
            return
        try:
            with safe_open(self.path, framework="pt") as file:
                self.stretches = int((file.metadata() or {})["stretches"])
                for key in file.keys():  # noqa: SIM118  it is no mapping
                    kind, index, name = key.split("/", 2)
                    if kind == "result":
                        self._results.setdefault(int(index), {})[name] = _aligned(file.get_tensor(key))
            log.info("going on with a walk that was interrupted after %d stretches: %s", self.stretches, self.path)
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            log.warning("%s cannot be used (%s): the walk begins anew", self.path, error)
            self.stretches, self._results = 0, {}

    def results(self, index: int) -> dict[str, Tensor]:
        return self._results.get(index, {})

    def keep(self, index: int, results: Mapping[str, Tensor]) -> None:
        """Notes what the caller made of a stretch; written with the next checkpoint."""
        self._results[index] = dict(results)

    def state(self) -> list[list[dict[str, Tensor]]]:
        """For each track and batch what was alive, by the name of its node."""
        found: dict[tuple[int, int], dict[str, Tensor]] = {}
        with safe_open(self.path, framework="pt") as file:
            counts = json.loads((file.metadata() or {})["batches"])
            for key in file.keys():  # noqa: SIM118
                kind, index, name = key.split("/", 2)
                if kind.startswith("live"):
                    found.setdefault((int(kind[4:]), int(index)), {})[name] = _aligned(file.get_tensor(key))
        return [[found.get((track, batch), {}) for batch in range(count)] for track, count in enumerate(counts)]

    def save(self, stretches: int, state: State) -> None:
        """Writes where the walk is, if one is due; a disk that is full stops no walk."""
        if time.monotonic() - self._last < EVERY:
            return
        live = [
            (f"live{track}/{batch}/{node.name}", value)
            for track, batches in enumerate(state)
            for batch, values in enumerate(batches)
            for node, value in values.items()
        ]
        if not all(isinstance(value, Tensor) for _, value in live):
            return
        kept = [(f"result/{i}/{name}", value) for i, made in self._results.items() for name, value in made.items()]
        metadata = {"stretches": str(stretches), "batches": json.dumps([len(batches) for batches in state])}
        tensors = {key: value.contiguous().clone() for key, value in [*live, *kept]}
        write_whole(self.path, tensors, metadata)
        self._last = time.monotonic()

    def drop(self) -> None:
        """The walk is over."""
        with contextlib.suppress(OSError):
            self.path.unlink()


def write_whole(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """A checkpoint under its name when it is all there; a disk that is full stops no work."""
    temporary = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, temporary, metadata)
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        log.warning("no checkpoint can be written to %s: %s", path, error)
        with contextlib.suppress(OSError):
            temporary.unlink()


def fingerprint(program: Program, batches: Sequence[Batch], purpose: str) -> str:
    """A name for what is done with a Program on some data: another for other weights, data or purposes."""
    mark = zlib.crc32(str(program).encode())
    for name in program.weights:
        mark = _weight_mark(program, name, mark)
    for batch in batches:
        for value in batch.inputs:
            mark = _tensor_mark(value, mark)
    return f"{zlib.crc32(purpose.encode(), mark):08x}"


def _aligned(read: Tensor) -> Tensor:
    """In memory as torch lays it out, and not as it lies in the file: products add up in an order that hangs on it."""
    return read.clone()


def _weight_mark(program: Program, name: str, mark: int) -> int:
    value = program.weights.raw(name)
    if isinstance(value, Tensor):
        return _tensor_mark(value, mark)
    if isinstance(value, Stored):  # by its file, which need not be read
        told = value.file.stat()
        return zlib.crc32(repr((str(value.file), told.st_size, told.st_mtime_ns, value.key)).encode(), mark)
    return _tensor_mark(value.load(), mark)


def _tensor_mark(value: Tensor, mark: int) -> int:
    flat = value.detach().cpu().contiguous().reshape(-1)
    return zlib.crc32(flat.view(torch.uint8).numpy().data, mark) if flat.numel() else mark
