"""From a Program to something that runs: the targets, and how one is chosen.

A target is a value; one that is to come is in the table already, and says so when it is asked for.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from slim import errors
from slim.codegen import eager
from slim.compiler.program import Program

__all__ = ["TARGETS", "Executable", "Target", "select"]


class Executable(Protocol):
    """A lowered Program.

    Attributes:
        code: name -> source of everything that was generated for it.
    """

    @property
    def code(self) -> Mapping[str, str]: ...
    def __call__(self, *inputs: Tensor) -> tuple[Any, ...]:
        """The flat outputs for one tensor an input, in the order of the Program's inputs."""
        ...


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
    raise errors.TargetUnavailable(target="cpu or cuda", reason=_later())


# In the order that "auto" prefers them.
TARGETS: dict[str, Target] = {
    "cuda": Target("cuda", _later, _refuse),
    "cpu": Target("cpu", _later, _refuse),
    "eager": Target("eager", lambda: None, eager.EagerExecutable),
}
_CROSS = re.compile(r"(cuda):sm_\d+")  # another machine's device, compiled for ahead of time


def select(name: str) -> Target:
    """The target called ``name``; "auto" is the best one that this machine has.

    Raises:
        UnknownTarget, TargetUnavailable: naming what is missing.

    Example:
        >>> select("auto").name
        'eager'
    """
    if name == "auto":
        return next(target for target in TARGETS.values() if target.missing() is None)
    cross = _CROSS.fullmatch(name)
    target = TARGETS.get(cross[1] if cross else name)
    if target is None:
        raise errors.UnknownTarget(target=name, known=("auto", *TARGETS, "cuda:sm_90"))
    missing = target.missing()
    if missing:
        raise errors.TargetUnavailable(target=name, reason=missing)
    return target
