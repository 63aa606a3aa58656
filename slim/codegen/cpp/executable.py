"""A Program as machine code: one call a segment, PyTorch between segments."""

from __future__ import annotations

import ctypes
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import sympy
import torch
from torch import Tensor

from slim import errors
from slim.codegen.build import host_isa, load, shared_object
from slim.codegen.cpp.decoding import GreedyCall, greedy_call
from slim.codegen.cpp.emit import WANTS, Unit, emit
from slim.codegen.cpp.packing import hold
from slim.codegen.executables import Ends, Feedback
from slim.codegen.inputs import check_kind, check_shape, check_writable
from slim.codegen.regions.lower import lower
from slim.codegen.regions.provenance import Kernel, Stage, stages
from slim.codegen.regions.schedule import Foreign, Schedule
from slim.codegen.regions.views import Buffer, Size, View
from slim.compiler.program import Program, where
from slim.compiler.report import Form, Skip

_CPU = torch.device("cpu")
_FILE = "program.cpp"


class CppExecutable:
    """A Program compiled for this machine's processor.

    Weights that have a packed form are held in that form alone, and shared by all executables of one Program.

    Attributes:
        code: ``program.cpp``, the translation unit.
        schedule: the regions that it was made of.
        form: the same in numbers, with what PyTorch runs in between.
    """

    def __init__(self, program: Program) -> None:
        isa = host_isa()
        self.schedule: Schedule = lower(program, WANTS)
        unit = emit(self.schedule)
        self.code = {_FILE: unit.source}
        self.form = _form(self.schedule, unit)
        self._library = _open(shared_object(unit.source, isa))
        self._weights = hold(program.weights, self.schedule.weights, isa)
        pointers = (ctypes.c_void_p * max(1, len(self._weights)))(*(w.data_ptr() for w in self._weights))
        self._state = ctypes.c_void_p(self._library.slim_create(pointers))
        self._unit = unit
        self._touched = {b for region in self.schedule.regions for b in (*region.reads(), *region.writes())}
        self._describe_inputs()
        self._lock = threading.Lock()  # the arena belongs to one call at a time
        self._seconds: list[float] | None = None  # of each region, while they are timed

    def __del__(self) -> None:
        if getattr(self, "_state", None):
            self._library.slim_destroy(self._state)

    def __call__(self, *inputs: Tensor) -> tuple[Any, ...]:
        return self.bind(*inputs)()

    @property
    def stages(self) -> list[Stage]:
        """The regions in the order they run, each with its nodes and its kernel."""
        names = iter(self._unit.names)
        return stages(self.schedule, lambda *_: [Kernel(next(names), _FILE)])

    def bind(self, *inputs: Tensor) -> BoundCall:
        """The same call, to be repeated. An input that is not contiguous is copied here, and no longer looked at.

        Raises:
            BadInput: for inputs whose type or sizes are not those that were compiled.
        """
        return BoundCall(self, inputs)

    def _describe_inputs(self) -> None:
        """Notes what calls check and reuse."""
        unit, inputs = self._unit, self.schedule.inputs
        place = {name: position for position, name in enumerate(unit.dims)}
        self.where = [self.schedule.dims[name] for name in unit.dims]
        self.shapes = [[(size, place.get(str(size), 0)) for size in buffer.shape] for buffer in inputs]
        self.used = [buffer in self._touched for buffer in inputs]
        self.mutated = [_is_written(buffer, self.schedule) for buffer in inputs]
        self.outputs = [(_sizes(buffer, unit.dims), buffer.dtype) for buffer in self.schedule.outputs]
        self.brought = len(unit.brought)

    def run(self, io: Any, dims: Any, inputs: list[Tensor]) -> None:
        """Runs all segments: ``io`` are the addresses of what the call brings, ``dims`` its sizes."""
        with self._lock:
            if self._seconds is not None:
                self._run_timed(io, dims, inputs, self._seconds)
            elif len(self._unit.segments) == 1:
                self._run(io, dims, *self._unit.segments[0])  # type: ignore[misc]
            else:
                results: dict[Buffer, Tensor] = {}
                for segment in self._unit.segments:
                    self._run_segment(segment, io, dims, inputs, results)

    def _run_segment(
        self,
        segment: tuple[int, int] | Foreign,
        io: Any,
        dims: Any,
        inputs: list[Tensor],
        results: dict[Buffer, Tensor],
    ) -> None:
        if isinstance(segment, Foreign):
            self._run_foreign(segment, io, inputs, dict(zip(self._unit.dims, dims, strict=False)), results)
        else:
            self._run(io, dims, *segment)

    def _run(self, io: Any, dims: Any, first: int, last: int) -> None:
        self._check(self._library.slim_run(self._state, io, dims, first, last, torch.get_num_threads()), dims)

    def decode(self, io: Any, dims: Any, loop: Any) -> None:
        """Runs a loop of steps, each on what the one before chose."""
        with self._lock:
            status = self._library.slim_decode(self._state, io, dims, ctypes.byref(loop), torch.get_num_threads())
            self._check(status, dims)

    def _check(self, status: int, dims: Any) -> None:
        if status == 1:
            raise MemoryError(f"no memory for activations of {dict(zip(self._unit.dims, dims, strict=False))}")
        if status == 2:
            raise errors.BadInput(argument="indices", reason="one is outside of the table that it picks from")

    # -- timing --------------------------------------------------------------------------------------------------------

    @contextmanager
    def timed(self) -> Iterator[list[float]]:
        """Inside, calls run region by region; see ``executables.Timed``."""
        seconds = self._seconds = [0.0] * len(self.schedule.regions)
        try:
            yield seconds
        finally:
            self._seconds = None

    @property
    def is_timed(self) -> bool:
        return self._seconds is not None

    def _run_timed(self, io: Any, dims: Any, inputs: list[Tensor], seconds: list[float]) -> None:
        results: dict[Buffer, Tensor] = {}
        stages = itertools.count()
        self._run(io, dims, 0, 0)  # lays out the arena
        for number, region in enumerate(self.schedule.regions):
            segment = region if isinstance(region, Foreign) else ((stage := next(stages)), stage + 1)
            start = time.perf_counter()
            self._run_segment(segment, io, dims, inputs, results)
            seconds[number] += time.perf_counter() - start

    # -- with PyTorch between segments ---------------------------------------------------------------------------------

    def _run_foreign(
        self, region: Foreign, io: Any, inputs: list[Tensor], bound: dict[str, int], results: dict[Buffer, Tensor]
    ) -> None:
        """Runs one node by PyTorch, on tensors over the memory of the program."""

        def place(value: Any) -> Any:
            if isinstance(value, View):
                return self._tensor(value, inputs, bound, results).to(region.dtypes[value])
            return _number(value, bound) if isinstance(value, sympy.Expr) else value

        args, kwargs = _map(region.args, place), _map(region.kwargs, place)
        values = region.node.target(*args, **kwargs)  # type: ignore[operator]
        values = values if isinstance(values, (tuple, list)) else (values,)
        base = len(self.schedule.weights)
        for buffer, value in zip(region.outs, values, strict=True):
            if buffer is not None:
                results[buffer] = value.to(buffer.dtype).contiguous()
                io[self._unit.index[buffer] - base] = results[buffer].data_ptr()

    def _tensor(self, view: View, inputs: list[Tensor], bound: dict[str, int], results: dict[Buffer, Tensor]) -> Tensor:
        """A view of the program's memory as a tensor."""
        buffer = view.buffer
        shape, strides = ([_number(n, bound) for n in sizes] for sizes in (view.shape, view.strides))
        offset = _number(view.offset, bound)
        if buffer.kind == "input":
            whole = inputs[self.schedule.inputs.index(buffer)]
        elif buffer.kind == "weight":
            whole = self._weights[self.schedule.weights.index(buffer)]
        elif buffer.kind == "foreign":
            whole = results[buffer]
        else:
            whole = self._memory(buffer, bound)
        return whole.reshape(-1).as_strided(shape, strides, offset)

    def _memory(self, buffer: Buffer, bound: dict[str, int]) -> Tensor:
        count = _number(buffer.numel, bound)
        if count == 0:
            return torch.empty(0, dtype=buffer.dtype)
        address = self._library.slim_buffer(self._state, self._unit.index[buffer])
        memory = (ctypes.c_char * (count * buffer.dtype.itemsize)).from_address(address)
        return torch.frombuffer(memory, dtype=buffer.dtype)


class BoundCall:
    """A call with its inputs at hand: what does not change is looked at once.

    Attributes:
        inputs: kept alive as long as ``io``, their addresses, is. ``dims`` are the sizes.
    """

    def __init__(self, executable: CppExecutable, inputs: tuple[Tensor, ...]) -> None:
        self.executable = executable
        self.io = (ctypes.c_void_p * max(1, executable.brought))()
        self.dims = (ctypes.c_int64 * max(1, len(executable.where)))()
        self.inputs = list(inputs)  # alive as long as their addresses are
        for position, (index, dim) in enumerate(executable.where):
            self.dims[position] = inputs[index].shape[dim]
        for index in range(len(inputs)):
            self._take(index)

    def set(self, index: int, value: Tensor) -> None:
        """Another tensor for one input; sizes that it alone decides may change."""
        self.inputs[index] = value
        for position, (owner, dim) in enumerate(self.executable.where):
            if owner == index:
                self.dims[position] = value.shape[dim]
        self._take(index)

    def __call__(self) -> tuple[Tensor, ...]:
        outputs = self.outputs()
        self.executable.run(self.io, self.dims, self.inputs)
        return outputs

    def outputs(self) -> tuple[Tensor, ...]:
        """New tensors, which the call will write."""
        outputs = tuple(torch.empty(shape(*self.dims), dtype=dtype) for shape, dtype in self.executable.outputs)
        for index, output in enumerate(outputs, len(self.inputs)):
            self.io[index] = output.data_ptr()
        return outputs

    def greedy(self, feedback: Feedback, mask: Tensor | None, ends: Ends) -> GreedyCall | None:
        """The call as a loop of decoding steps; None where it cannot be one, and while regions are timed."""
        return None if self.executable.is_timed else greedy_call(self, feedback, mask, ends)

    def _take(self, index: int) -> None:
        """Notes where an input lies, once it is what generated code trusts it to be."""
        executable, tensor = self.executable, self.inputs[index]
        buffer = executable.schedule.inputs[index]
        sizes = executable.shapes[index]
        wanted = tuple(size if isinstance(size, int) else self.dims[position] for size, position in sizes)
        check_shape(buffer, tensor, wanted)
        if not executable.used[index]:
            return
        check_kind(buffer, tensor, _CPU)
        if not tensor.is_contiguous():
            if executable.mutated[index]:
                check_writable(buffer, tensor)
            self.inputs[index] = tensor = tensor.contiguous()
        self.io[index] = tensor.data_ptr()


def _open(path: Any) -> ctypes.CDLL:
    library = load(path)
    library.slim_create.restype = ctypes.c_void_p
    library.slim_create.argtypes = [ctypes.c_void_p]
    library.slim_destroy.restype = None
    library.slim_destroy.argtypes = [ctypes.c_void_p]
    library.slim_run.argtypes = [*[ctypes.c_void_p] * 3, *[ctypes.c_int] * 3]
    library.slim_decode.argtypes = [*[ctypes.c_void_p] * 4, ctypes.c_int]
    library.slim_buffer.argtypes = [ctypes.c_void_p, ctypes.c_int]
    library.slim_buffer.restype = ctypes.c_void_p
    return library


def _form(schedule: Schedule, unit: Unit) -> Form:
    foreign = [Skip(where(region.node), region.reason) for region in schedule.foreign]
    return Form(len(schedule.regions) - len(foreign), unit.kernels, schedule.segments, foreign)


def _is_written(buffer: Buffer, schedule: Schedule) -> bool:
    return any(buffer in region.writes() for region in schedule.regions)


def _sizes(buffer: Buffer, dims: list[str]) -> Callable[..., tuple[int, ...]]:
    """dims -> the shape of ``buffer``."""
    symbols = [sympy.Symbol(name, integer=True, positive=True) for name in dims]
    if all(isinstance(size, int) for size in buffer.shape):
        return lambda *_: buffer.shape
    return sympy.lambdify(symbols, tuple(buffer.shape), modules="math")


def _number(size: Size, bound: dict[str, int]) -> int:
    if isinstance(size, int):
        return size
    return int(sympy.sympify(size).subs({symbol: bound[symbol.name] for symbol in sympy.sympify(size).free_symbols}))


def _map(value: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(value, (list, tuple)) and not isinstance(value, View):
        return type(value)(_map(item, change) for item in value)
    if isinstance(value, dict):
        return {key: _map(item, change) for key, item in value.items()}
    return change(value)
