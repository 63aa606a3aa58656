"""From a Program to something that runs: the targets, and how one is chosen.

A target is a value; one that this machine lacks is in the table all the same, and says so when it is asked for.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch

from slim import errors
from slim.codegen import build, eager
from slim.codegen.cpp.executable import CppExecutable
from slim.codegen.executables import Bound, Ends, Executable, Feedback, GreedySteps, Timed
from slim.codegen.triton import device
from slim.codegen.triton.elsewhere import AheadExecutable
from slim.codegen.triton.executable import TritonExecutable
from slim.codegen.triton.tuning import Tuner
from slim.compiler.program import Program

__all__ = ["TARGETS", "Bound", "Ends", "Executable", "Feedback", "GreedySteps", "Target", "Timed", "select"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Target:
    """Something a Program can be lowered to.

    Attributes:
        name: as the user writes it.
        missing: why it cannot be used on this machine; None where it can.
        lower: makes an Executable of a Program, whose weights it shares.
        place: the device that it moves weights to, and where inputs must lie; None leaves them where they are.
        runs: whether what it makes can be called here.
    """

    name: str
    missing: Callable[[], str | None]
    lower: Callable[[Program], Executable]
    place: Callable[[], torch.device | None] = lambda: None
    runs: bool = True


# In the order that "auto" prefers them.
TARGETS: dict[str, Target] = {
    "cuda": Target("cuda", device.missing, TritonExecutable, lambda: device.host().place),
    "cpu": Target("cpu", build.missing, CppExecutable),
    "eager": Target("eager", lambda: None, eager.EagerExecutable),
}
_CROSS = re.compile(r"cuda:((sm_|gfx)\w+)")  # another machine's device, compiled for ahead of time


def select(name: str, tune: float | None = None) -> Target:
    """The target called ``name``; "auto" is the best one that this machine has.

    Args:
        tune: seconds to spend on choosing configurations of kernels; None takes the defaults. For "cuda" alone.

    Raises:
        UnknownTarget, TargetUnavailable: naming what is missing. BadInput: where there is nothing to tune.

    Example:
        >>> select("eager").name
        'eager'
    """
    target = _best() if name == "auto" else _named(name)
    if tune is None:
        return target
    if target.name != "cuda" or device.interpreting():
        raise errors.BadInput(argument="tune", reason=f"kernels are tuned on a GPU, and the target is {target.name!r}")
    if not tune > 0:
        raise errors.BadInput(argument="tune", reason=f"it is a number of seconds, not {tune}")
    return replace(target, lower=partial(TritonExecutable, tuner=Tuner(tune, device.host().name)))


def _best() -> Target:
    """The first that can be used. Interpreted kernels are for looking at numbers: they must be asked for."""
    usable = [target for target in TARGETS.values() if target.missing() is None]
    chosen = next(target for target in usable if not (target.name == "cuda" and device.interpreting()))
    if chosen.name == "eager":
        _warn_of_eager()
    return chosen


def _named(name: str) -> Target:
    cross = _CROSS.fullmatch(name)
    target = _elsewhere(cross[1]) if cross else TARGETS.get(name)
    if target is None:
        raise errors.UnknownTarget(target=name, known=("auto", *TARGETS, "cuda:sm_90"))
    missing = target.missing()
    if missing:
        raise errors.TargetUnavailable(target=name, reason=missing)
    return target


def _elsewhere(architecture: str) -> Target:
    """Kernels for a GPU that is not here."""
    return Target(f"cuda:{architecture}", device.cannot_compile, lambda p: AheadExecutable(p, architecture), runs=False)


@functools.cache
def _warn_of_eager() -> None:
    """Once a process: what runs is right, and slow."""
    log.warning(
        "no code can be generated here (%s): running eagerly, at a fraction of the speed. Install a C++ compiler, or "
        'say target="eager" to do without this warning.',
        TARGETS["cpu"].missing(),
    )
