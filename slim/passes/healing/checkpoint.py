"""What training leaves on disk, so that an interrupted run goes on where it was."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from slim.compiler.dump import cache_dir
from slim.compiler.program import Program
from slim.compiler.statistics.batches import Batch
from slim.compiler.statistics.checkpoint import EVERY, fingerprint, write_whole

if TYPE_CHECKING:
    from slim.passes.healing.train import Best

log = logging.getLogger(__name__)


class Checkpoint:
    """The file of one run, which its Program, its data and its options name."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._last = time.monotonic()

    @classmethod
    def of(cls, program: Program, batches: Sequence[Batch], asked_by: str) -> Checkpoint:
        return cls(cache_dir() / "healing" / f"{fingerprint(program, batches, f'{_FORM} {asked_by}')}.safetensors")

    @torch.no_grad()
    def restore(self, optimizer: Any, parameters: Sequence[Tensor], best: Best) -> int:
        """Puts everything where an earlier run left it; how many steps that had done."""
        if not self.path.exists():
            return 0
        try:
            with safe_open(self.path, framework="pt") as file:
                told = file.metadata() or {}
            tensors = load_file(self.path)
            steps, held = int(told["steps"]), (int(told["best step"]), int(told["since"]), float(told["score"]))
            states = [_state(tensors, i) for i in range(len(parameters))]
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            log.warning("%s cannot be used (%s): healing begins anew", self.path, error)
            return 0
        best.step, best.since, best.score = held
        best.state = [tensors[f"best/{i}"].to(p.device) for i, p in enumerate(parameters)]
        for index, parameter in enumerate(parameters):
            parameter.copy_(tensors[f"now/{index}"])
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": dict(enumerate(states)), "param_groups": groups})
        log.info("going on with healing that was interrupted after %d steps: %s", steps, self.path)
        return steps

    def save(self, steps: int, optimizer: Any, parameters: Sequence[Tensor], best: Best) -> None:
        """Writes where the run is, if that is due; a disk that is full stops nothing."""
        if time.monotonic() - self._last < EVERY:
            return
        tensors = {f"now/{i}": parameter for i, parameter in enumerate(parameters)}
        tensors |= {f"best/{i}": kept for i, kept in enumerate(best.state)}
        for index, state in optimizer.state_dict()["state"].items():
            tensors |= {f"{key}/{index}": value for key, value in state.items()}
        told = {"steps": steps, "best step": best.step, "since": best.since, "score": repr(best.score)}
        copies = {name: value.detach().cpu().clone() for name, value in tensors.items()}
        write_whole(self.path, copies, {key: str(value) for key, value in told.items()})
        self._last = time.monotonic()

    def drop(self) -> None:
        """The run is over."""
        with contextlib.suppress(OSError):
            self.path.unlink()


def _state(tensors: dict[str, Tensor], index: int) -> dict[str, Tensor]:
    """What the optimiser kept of a parameter."""
    return {key: tensors[f"{key}/{index}"] for key in _STATE if f"{key}/{index}" in tensors}


_FORM = 3  # what the parameters mean: another where what is trained changes, or a file of before would be gone on from
_STATE = ("step", "exp_avg", "exp_avg_sq")
