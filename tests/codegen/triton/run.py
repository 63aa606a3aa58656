"""Runs single regions for tests: by Triton's interpreter, or on the GPU where there is one."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from slim.codegen.regions.schedule import Region
from slim.codegen.regions.views import Buffer
from slim.codegen.triton import attention, linear, loops, modules  # noqa: F401  they register what writes regions
from slim.codegen.triton.device import host
from slim.codegen.triton.kernel import Config, Kernel, Own
from slim.codegen.triton.launching import Sizes, form_of, needs, prepare
from slim.codegen.triton.writer import WRITERS, Target


def run(
    region: Region, tensors: Mapping[Buffer, Tensor], dims: Mapping[str, int] | None = None,
    target: Target | None = None, config: Config | None = None,
) -> list[Kernel]:  # fmt: skip
    """Runs ``region`` on ``tensors``, which hold its inputs and take its outputs; returns the kernels that ran.

    ``config`` replaces the default of every kernel that has its constants.
    """
    dims = dict(dims or {})
    target = target or Target()
    stage = WRITERS[type(region)](region, target)
    sizes = Sizes(list(dims))
    kernels = [kernel for form in stage.forms for kernel in form.kernels]
    for size in (
        stage.rows,
        *(s for k in kernels for s in k.sizes.values()),
        *(s for t in stage.temps for s in t.shape),
    ):
        sizes.add(size)
    size = sizes.bind(dims)
    place = host().place
    held: dict[Buffer | Own, Tensor] = {buffer: tensor.to(place) for buffer, tensor in tensors.items()}
    for temp in stage.temps:
        held[temp] = torch.full([size(s) for s in temp.shape], 7, dtype=temp.dtype, device=place)
    held["live"] = torch.tensor([dims[name] for name in target.live] or [0], device=place)
    held["fault"] = torch.zeros(1, dtype=torch.int32, device=place)
    ran = form_of(stage, size).kernels
    for kernel in ran:
        module = modules.load(kernel)
        chosen = config if config and set(config) >= set(kernel.constants) else kernel.configs[0]
        scratch, counters = needs(kernel, module, chosen, size)
        held["scratch"] = torch.full((max(1, scratch),), float("nan"), device=place)
        held["counters"] = torch.zeros(max(1, counters), dtype=torch.int32, device=place)
        prepare(kernel, module, chosen, size, held.__getitem__)()
        assert not held["counters"].any(), "a kernel leaves its counters at zero"
    assert not held["fault"].any(), "an index is out of range"
    for buffer in region.writes():
        tensors[buffer].copy_(held[buffer])
    return ran
