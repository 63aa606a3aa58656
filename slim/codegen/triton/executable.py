"""A Program as Triton kernels: launched one after the other, or replayed as one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import sympy
import torch
from torch import Tensor

from slim import errors
from slim.codegen.executables import Ends, Feedback
from slim.codegen.inputs import check_kind, check_shape, check_writable
from slim.codegen.regions.lower import lower
from slim.codegen.regions.provenance import Stage, stages
from slim.codegen.regions.schedule import Foreign, Schedule
from slim.codegen.regions.views import Buffer, View
from slim.codegen.triton import modules
from slim.codegen.triton.decoding import GreedyCall, greedy_call
from slim.codegen.triton.device import Device, host
from slim.codegen.triton.emit import WANTS, emit
from slim.codegen.triton.graphs import Replay
from slim.codegen.triton.kernel import Kernel, Own
from slim.codegen.triton.launching import Launch, Sizes, form_of, needs, prepare
from slim.codegen.triton.memory import Arena
from slim.codegen.triton.modules import Module
from slim.codegen.triton.placing import hold
from slim.codegen.triton.tuning import Tuner
from slim.compiler.program import Program, where
from slim.compiler.report import Form, Skip


class TritonExecutable:
    """A Program compiled for the GPU at hand; by Triton's interpreter, for the CPU.

    Weights are moved to the device, one at a time, and shared by all executables of one Program.

    Attributes:
        code: the modules, by file name.
        schedule: the regions that they were made of.
        unit: the same as stages.
        form: the same in numbers, with what PyTorch runs in between.
        tuner: what chooses configurations; None for the defaults.
    """

    def __init__(self, program: Program, device: Device | None = None, tuner: Tuner | None = None) -> None:
        self.device = device or host()
        self.tuner = tuner
        self.schedule: Schedule = lower(program, WANTS)
        self.unit = emit(self.schedule, self.device.processors)
        self._modules = {name: modules.load(kernel) for name, kernel in self.unit.kernels.items()}
        self.code: Mapping[str, str | bytes] = {name: module.source for name, module in self._modules.items()}
        self.form = form(self.schedule, len(self.unit.kernels))
        self.weights = hold(program.weights, self.schedule.weights, self.device.place)
        self.sizes = self._all_sizes()
        self.touched = {b for region in self.schedule.regions for b in (*region.reads(), *region.writes())}
        self.written = {b for region in self.schedule.regions for b in region.writes()}

    def __call__(self, *inputs: Tensor) -> tuple[Any, ...]:
        call = self.bind(*inputs)
        call.run()
        call.check()
        return tuple(call.outputs)

    @property
    def stages(self) -> list[Stage]:
        """The regions in the order they run, each with its nodes and its kernels."""
        return stages(self.schedule, self.unit.placed)

    def bind(self, *inputs: Tensor) -> BoundCall:
        """The same call, to be repeated; from the second time on it is a replay, where the device can.

        Raises:
            BadInput: for inputs whose type or sizes are not those that were compiled.
        """
        return BoundCall(self, inputs)

    def module(self, kernel: Kernel) -> Module:
        """The module that a stage's kernel is in."""
        return self._modules[self.unit.names[id(kernel)]]

    def dims(self, inputs: list[Tensor]) -> dict[str, int]:
        """The sizes and pitches of a call."""
        sizes = {name: inputs[index].shape[dim] for name, (index, dim) in self.schedule.dims.items()}
        return sizes | {name: inputs[index].stride(0) for name, index in self.schedule.pitches.items()}

    def _all_sizes(self) -> Sizes:
        sizes = Sizes([*self.schedule.dims, *self.schedule.pitches])
        buffers = [*self.schedule.inputs, *self.schedule.outputs]
        for step in self.unit.steps:
            if isinstance(step, Foreign):
                buffers += [out for out in step.outs if out is not None]
                for view in step.dtypes:
                    for size in (*view.shape, *view.strides, view.offset):
                        sizes.add(size)
                continue
            sizes.add(step.rows)
            for kernel in (kernel for form in step.forms for kernel in form.kernels):
                buffers += [pointer.memory for pointer in kernel.pointers if isinstance(pointer.memory, Buffer)]
                for size in kernel.sizes.values():
                    sizes.add(size)
        for buffer in buffers:
            for size in buffer.shape:
                sizes.add(size)
        return sizes


Step = Launch | Callable[[], None]


class BoundCall:
    """A call with its memory: what the kernels are launched on, step by step.

    Attributes:
        inputs: alive as long as their addresses are.
        outputs: what the kernels write, again in every run.
        dims: sizes of the call by name.
        live: those that kernels read from memory, in the order of the unit's.
    """

    dims: dict[str, int]
    live: Tensor
    outputs: list[Tensor]
    _untuned: Tuner | None  # what is still to choose how the steps run

    def __init__(self, executable: TritonExecutable, inputs: tuple[Tensor, ...]) -> None:
        self.executable = executable
        self.inputs = list(inputs)
        self.fault = torch.zeros(1, dtype=torch.int32, device=executable.device.place)
        self._lay_out()

    def set(self, index: int, value: Tensor) -> None:
        """Another tensor for one input. Where only a size changes that kernels read from memory, nothing is redone."""
        before, self.inputs[index] = self.inputs[index], value
        dims = self.executable.dims(self.inputs)
        changed = {name for name in dims if dims[name] != self.dims[name]}
        in_place = value.data_ptr() == before.data_ptr() and value.dtype == before.dtype
        if not in_place or not changed <= set(self.executable.unit.live):
            self._lay_out()
            return
        check_shape(self.executable.schedule.inputs[index], value, self._shape(index, dims))
        self.dims = dims
        for name in changed:
            self.live[self.executable.unit.live.index(name)].fill_(dims[name])

    def __call__(self) -> tuple[Tensor, ...]:
        self.replay()
        return tuple(output.clone() for output in self.outputs)

    def replay(self) -> None:
        """Runs the call as a captured graph, once it has run without."""
        self._replay()

    def run(self) -> None:
        """Runs every step; the first time, a tuner may choose how."""
        tuner, self._untuned = self._untuned, None
        for position, step in enumerate(self.steps):
            if tuner is not None and isinstance(step, Launch):
                step = self.steps[position] = step.tuned(tuner)
            step()

    def check(self) -> None:
        """Raises BadInput where an index was out of range; waits for the device."""
        if int(self.fault):
            self.fault.zero_()
            raise errors.BadInput(argument="indices", reason="one is outside of the table that it picks from")

    def greedy(self, feedback: Feedback, mask: Tensor | None, ends: Ends) -> GreedyCall | None:
        """The call as a loop of decoding steps; None where it cannot be one."""
        return greedy_call(self, feedback, mask, ends)

    # -- memory --------------------------------------------------------------------------------------------------------

    def _lay_out(self) -> None:
        """Checks the inputs, plans the memory and prepares every launch."""
        executable = self.executable
        place = executable.device.place
        self.dims = executable.dims(self.inputs)
        self.size = executable.sizes.bind(self.dims)
        for index in range(len(self.inputs)):
            self._take(index)
        self.live = torch.tensor([self.dims[n] for n in executable.unit.live] or [0], device=place)
        self.outputs = [self._empty(buffer) for buffer in executable.schedule.outputs]
        schedule = executable.schedule
        self._memory: dict[Buffer | Own, Tensor] = {"live": self.live, "fault": self.fault}
        self._memory.update(zip(schedule.weights, executable.weights, strict=True))
        self._memory.update(zip(schedule.inputs, self.inputs, strict=True))
        self._memory.update(zip(schedule.outputs, self.outputs, strict=True))
        self._lay_out_steps()
        self._replay = Replay(self.run, executable.device.has_graphs and not executable.schedule.foreign)

    def _lay_out_steps(self) -> None:
        executable = self.executable
        plan: list[list[Kernel] | Foreign] = [
            step if isinstance(step, Foreign) else form_of(step, self.size).kernels for step in executable.unit.steps
        ]
        uses = [[step] if not isinstance(step, list) else step for step in plan]
        touched = [list(_temps(part)) for step in uses for part in step]
        self._memory.update(Arena(touched, self.size).allocate(executable.device.place).items())
        kernels = [kernel for step in plan if isinstance(step, list) for kernel in step]
        scratch, counters = self._own(kernels)
        self._memory |= {"scratch": scratch, "counters": counters}
        self._untuned = executable.tuner
        self.steps: list[Step] = []
        for step in plan:
            if isinstance(step, Foreign):
                self.steps.append(self._foreign(step))
            else:
                self.steps += [self._launch(kernel) for kernel in step]

    def _own(self, kernels: list[Kernel]) -> tuple[Tensor, Tensor]:
        """(scratch, counters), enough for any kernel in any configuration that may be chosen."""
        counts = [(0, 0)]
        for kernel in kernels:
            module = self.executable.module(kernel)
            configs = module.configs if self.executable.tuner else module.configs[:1]
            counts += [needs(kernel, module, config, self.size) for config in configs]
        floats, integers = (max(1, *(count[i] for count in counts)) for i in (0, 1))
        place = self.executable.device.place
        return (
            torch.empty(floats, dtype=torch.float32, device=place),
            torch.zeros(integers, dtype=torch.int32, device=place),
        )

    def _launch(self, kernel: Kernel) -> Launch:
        module = self.executable.module(kernel)
        return prepare(kernel, module, module.configs[0], self.size, self._memory.__getitem__)

    def _empty(self, buffer: Buffer) -> Tensor:
        shape = [self.size(size) for size in buffer.shape]
        return torch.empty(shape, dtype=buffer.dtype, device=self.executable.device.place)

    def _shape(self, index: int, dims: Mapping[str, int]) -> list[int]:
        return [dims[str(s)] if not isinstance(s, int) else s for s in self.executable.schedule.inputs[index].shape]

    def _take(self, index: int) -> None:
        """Checks one input; what is not laid out as kernels read it is copied."""
        executable, tensor = self.executable, self.inputs[index]
        buffer = executable.schedule.inputs[index]
        check_shape(buffer, tensor, self._shape(index, self.dims))
        if buffer not in executable.touched:
            return
        check_kind(buffer, tensor, executable.device.place)
        if buffer in executable.written:
            check_writable(buffer, tensor)
        elif index in executable.schedule.pitches.values() and tensor.stride(-1) == 1:
            return
        self.inputs[index] = tensor.contiguous()

    # -- with PyTorch between kernels ----------------------------------------------------------------------------------

    def _foreign(self, region: Foreign) -> Callable[[], None]:
        """One node by PyTorch, on tensors over the memory of the call."""
        outs = [None if out is None else self._memory[out] for out in region.outs]

        def place(value: Any) -> Any:
            if isinstance(value, View):
                return self._tensor(value).to(region.dtypes[value])
            if isinstance(value, sympy.Expr):
                return int(value.subs({s: self.dims[s.name] for s in value.free_symbols}))
            return value

        def run() -> None:
            args, kwargs = _map(region.args, place), _map(region.kwargs, place)
            values = region.node.target(*args, **kwargs)  # type: ignore[operator]
            values = values if isinstance(values, (tuple, list)) else (values,)
            for out, value in zip(outs, values, strict=True):
                if out is not None:
                    out.copy_(value)

        return run

    def _tensor(self, view: View) -> Tensor:
        shape, strides = ([self.size(n) for n in sizes] for sizes in (view.shape, view.strides))
        memory = self._memory[view.buffer]  # itself a part of the arena, or of a tensor of the caller's
        return memory.as_strided(shape, strides, memory.storage_offset() + self.size(view.offset))


def _temps(part: Kernel | Foreign) -> list[Buffer]:
    """The buffers of the call's own that a step touches."""
    if isinstance(part, Foreign):
        buffers = [*part.reads(), *part.writes()]
    else:
        buffers = [pointer.memory for pointer in part.pointers if isinstance(pointer.memory, Buffer)]
    return [buffer for buffer in buffers if buffer.kind in ("temp", "foreign")]


def form(schedule: Schedule, kernels: int) -> Form:
    """What the report says."""
    foreign = [Skip(where(region.node), region.reason) for region in schedule.foreign]
    return Form(len(schedule.regions) - len(foreign), kernels, schedule.segments, foreign)


def _map(value: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(value, (list, tuple)) and not isinstance(value, View):
        return type(value)(_map(item, change) for item in value)
    if isinstance(value, dict):
        return {key: _map(item, change) for key, item in value.items()}
    return change(value)


__all__ = ["BoundCall", "TritonExecutable", "form"]
