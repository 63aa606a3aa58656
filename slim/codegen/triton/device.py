"""Where Triton's kernels run: the GPU that PyTorch sees, or the CPU by Triton's interpreter."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

import torch

from slim.codegen.triton.interpreter import interpreting


@dataclass(frozen=True)
class Device:
    """A place to run.

    Attributes:
        place: where tensors lie.
        name: as its driver calls it, for what is kept about it.
        processors: programs that run side by side at least.
    """

    place: torch.device
    name: str
    processors: int

    @property
    def has_graphs(self) -> bool:
        """Whether a sequence of launches can be captured and replayed."""
        return self.place.type == "cuda"


def cannot_compile() -> str | None:
    """Why kernels cannot be compiled here, for whatever device; None where they can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install 'slim-compiler[cuda]'"
    return None


def missing() -> str | None:
    """Why kernels cannot run here; None where they can."""
    reason = cannot_compile()
    if reason:
        return reason
    if torch.cuda.is_available() or interpreting():
        return None
    return (
        'PyTorch sees no GPU. "cuda:sm_90" compiles ahead of time for one; with TRITON_INTERPRET=1 in the environment '
        "Triton's interpreter runs the kernels on the CPU, slowly"
    )


def host() -> Device:
    """The current GPU; the CPU where kernels are interpreted."""
    if interpreting():
        return Device(torch.device("cpu"), "interpreter", 4)
    place = torch.device("cuda", torch.cuda.current_device())
    properties = torch.cuda.get_device_properties(place)
    return Device(place, properties.name, properties.multi_processor_count)


# Processors of what is compiled for ahead of time, where the default configurations ask.
PROCESSORS = {"sm_80": 108, "sm_90": 132, "gfx942": 304}


def ahead(architecture: str) -> Device:
    """A device that is not here."""
    return Device(torch.device("cpu"), architecture, PROCESSORS.get(architecture, 108))
