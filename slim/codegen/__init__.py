"""From a Program to something that runs: the targets, and how one is chosen.

A target is a value; one that is to come is in the table already, and says so when it is asked for.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass

from slim import errors
from slim.codegen import build, eager
from slim.codegen.cpp.executable import CppExecutable
from slim.codegen.executables import Bound, Ends, Executable, Feedback, GreedySteps
from slim.compiler.program import Program

__all__ = ["TARGETS", "Bound", "Ends", "Executable", "Feedback", "GreedySteps", "Target", "select"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Target:
    """Something a Program can be lowered to.

    Attributes:
        name: as the user writes it.
        missing: why it cannot be used on this machine; None where it can.
        lower: makes an Executable of a Program, whose weights it shares.
    """

    name: str
    missing: Callable[[], str | None]
    lower: Callable[[Program], Executable]


def _later() -> str:
    return "it comes with a later version of slim"


def _refuse(program: Program) -> Executable:
    raise errors.TargetUnavailable(target="cuda", reason=_later())


# In the order that "auto" prefers them.
TARGETS: dict[str, Target] = {
    "cuda": Target("cuda", _later, _refuse),
    "cpu": Target("cpu", build.missing, CppExecutable),
    "eager": Target("eager", lambda: None, eager.EagerExecutable),
}
_CROSS = re.compile(r"(cuda):sm_\d+")  # another machine's device, compiled for ahead of time


def select(name: str) -> Target:
    """The target called ``name``; "auto" is the best one that this machine has.

    Raises:
        UnknownTarget, TargetUnavailable: naming what is missing.

    Example:
        >>> select("eager").name
        'eager'
    """
    if name == "auto":
        chosen = next(target for target in TARGETS.values() if target.missing() is None)
        if chosen.name == "eager":
            _warn_of_eager()
        return chosen
    cross = _CROSS.fullmatch(name)
    target = TARGETS.get(cross[1] if cross else name)
    if target is None:
        raise errors.UnknownTarget(target=name, known=("auto", *TARGETS, "cuda:sm_90"))
    missing = target.missing()
    if missing:
        raise errors.TargetUnavailable(target=name, reason=missing)
    return target


@functools.cache
def _warn_of_eager() -> None:
    """Once a process: what runs is right, and slow."""
    log.warning(
        "no code can be generated here (%s): running eagerly, at a fraction of the speed. Install a C++ compiler, or "
        'say target="eager" to do without this warning.',
        TARGETS["cpu"].missing(),
    )
