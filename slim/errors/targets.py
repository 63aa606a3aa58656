"""Targets, and building for them."""

import textwrap
from collections.abc import Collection

from slim.errors.base import SlimError, StrPath, did_you_mean


class UnknownTarget(SlimError, ValueError):
    """The target's name means nothing to slim."""

    message = "there is no target '{target}'.{suggestion}"
    hint = "the targets are: {known}."

    target: str
    known: Collection[str]

    @property
    def suggestion(self) -> str:
        return did_you_mean(self.target, self.known)


class TargetUnavailable(SlimError, RuntimeError):
    """The target is known, and this machine cannot build for it or run it."""

    message = "target '{target}' is not available here: {reason}"
    hint = 'target="auto" takes the best that is there; target="eager" runs everywhere.'

    target: str
    reason: str


class BuildFailed(SlimError, RuntimeError):
    """The C++ compiler refused what it was given."""

    message = "{what} failed:\n{listing}\n  command: {command}\n  source: {source}"
    hint = (
        "if the compiler is older than g++ 12 or clang 15, name a newer one in the environment's CXX; otherwise this "
        'is a fault in slim: please report it with the text above. target="eager" needs no compiler.'
    )

    what: str  # "compiling linear.cpp"
    command: str
    output: str  # the first lines of what the compiler said
    source: StrPath  # where the source was kept

    @property
    def listing(self) -> str:
        return textwrap.indent(self.output, "    ")


class KernelFailed(SlimError, RuntimeError):
    """Triton refused a kernel that slim wrote."""

    message = "compiling the kernel '{what}' for {arch} failed:\n{listing}\n  source: {source}"
    hint = (
        "this is a fault in slim, or slim does not know this version of Triton: please report it with the text above "
        'and the source file. target="eager" needs no kernels.'
    )

    what: str  # the kernel's name
    arch: str  # "sm_90"
    output: str  # what Triton said
    source: StrPath  # where the kernel's source was kept

    @property
    def listing(self) -> str:
        return textwrap.indent(self.output, "    ")


class BadEnvironment(SlimError, ValueError):
    """An environment variable of slim's has a value that cannot be used."""

    message = "{variable}={value} cannot be used: {reason}"
    hint = "leave {variable} unset for what suits this machine, or set it to one of: {accepted}."

    variable: str
    value: str
    reason: str
    accepted: Collection[str]
