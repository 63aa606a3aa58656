"""A Program as machine code: one call a segment, PyTorch between segments."""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch import Tensor

from slim import errors
from slim.codegen.build import host_isa, load, shared_object
from slim.codegen.cpp.emit import Unit, emit
from slim.codegen.cpp.packing import held
from slim.codegen.regions.lower import lower
from slim.codegen.regions.schedule import Foreign, Schedule
from slim.codegen.regions.views import Buffer, Size, View
from slim.compiler.program import Program, where
from slim.compiler.report import Form, Skip


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
        self.schedule: Schedule = lower(program)
        unit = emit(self.schedule)
        self.code = {"program.cpp": unit.source}
        self.form = _form(self.schedule, unit)
        self._library = _open(shared_object(unit.source, isa))
        self._weights = [held(program.weights, buffer, isa) for buffer in self.schedule.weights]
        pointers = (ctypes.c_void_p * max(1, len(self._weights)))(*(w.data_ptr() for w in self._weights))
        self._state = ctypes.c_void_p(self._library.slim_create(pointers))
        self._unit = unit
        self._read = {buffer for region in self.schedule.regions for buffer in (*region.reads(), *region.writes())}
        self._bind(unit)
        self._lock = threading.Lock()  # the arena belongs to one call at a time

    def __del__(self) -> None:
        if getattr(self, "_state", None):
            self._library.slim_destroy(self._state)

    def _bind(self, unit: Unit) -> None:
        """Prepares what every call reuses."""
        inputs = self.schedule.inputs
        self._io = (ctypes.c_void_p * max(1, len(unit.brought)))()
        self._dims = (ctypes.c_int64 * max(1, len(unit.dims)))()
        self._where = [self.schedule.dims[name] for name in unit.dims]
        self._used = [buffer in self._read for buffer in inputs]
        self._mutated = [_is_cache(buffer, self.schedule) for buffer in inputs]
        place = {name: position for position, name in enumerate(unit.dims)}
        self._shapes = [[(size, place.get(str(size), 0)) for size in buffer.shape] for buffer in inputs]
        caches = [shape for shape, mutated in zip(self._shapes, self._mutated, strict=True) if mutated]
        self._lasting = sorted({at for shape in caches for size, at in shape if not isinstance(size, int)})
        self._last: list[int] = []
        self._seen: list[weakref.ref[Tensor]] = [weakref.ref(_NOTHING)] * len(inputs)
        self._outputs = [(_sizes(buffer, unit.dims), buffer.dtype) for buffer in self.schedule.outputs]
        self._whole = len(unit.segments) == 1

    def __call__(self, *inputs: Tensor) -> tuple[Any, ...]:
        with self._lock:
            kept = self._take(inputs)
            dims = tuple(self._dims)
            outputs = tuple(torch.empty(shape(*dims), dtype=dtype) for shape, dtype in self._outputs)
            for index, output in enumerate(outputs, len(inputs)):
                self._io[index] = output.data_ptr()
            if self._whole:
                self._run(*self._unit.segments[0])  # type: ignore[misc]
            else:
                self._run_segments(kept, dims)
            return outputs

    def _take(self, inputs: tuple[Tensor, ...]) -> list[Tensor]:
        """Notes where the inputs lie, and how large they are; most are the tensors of the call before."""
        dims, seen, kept = self._dims, self._seen, list(inputs)
        for position, (index, dim) in enumerate(self._where):
            dims[position] = inputs[index].shape[dim]
        lasting = [dims[position] for position in self._lasting]
        if lasting != self._last:
            seen[:] = [weakref.ref(_NOTHING)] * len(seen)  # of other sizes: all are looked at anew
        for index, tensor in enumerate(inputs):
            if seen[index]() is not tensor:
                kept[index] = usable = self._usable(index, tensor)
                self._io[index] = usable.data_ptr()
                if usable is tensor and self._mutated[index]:
                    seen[index] = weakref.ref(tensor)
        self._last = lasting
        return kept

    def _usable(self, index: int, tensor: Tensor) -> Tensor:
        """The input as generated code can read it, which trusts what it is given."""
        buffer = self.schedule.inputs[index]
        wanted = tuple(
            size if isinstance(size, int) else self._dims[position] for size, position in self._shapes[index]
        )
        if tuple(tensor.shape) != wanted:
            reason = f"its shape is {list(tensor.shape)}, and beside the other inputs it must be {list(wanted)}"
            raise errors.BadInput(argument=buffer.name, reason=reason)
        if not self._used[index]:
            return tensor
        if tensor.dtype != buffer.dtype:
            reason = f"it is {tensor.dtype}, and the program was compiled for {buffer.dtype}"
            raise errors.BadInput(argument=buffer.name, reason=reason)
        if tensor.is_contiguous():
            return tensor
        if self._mutated[index]:
            raise errors.BadInput(argument=buffer.name, reason="a cache that is written to must be contiguous")
        return tensor.contiguous()

    def _run(self, first: int, last: int) -> None:
        status = self._library.slim_run(self._state, self._io, self._dims, first, last, torch.get_num_threads())
        if status == 1:
            raise MemoryError(f"no memory for activations of {dict(zip(self._unit.dims, self._dims, strict=False))}")
        if status == 2:
            raise errors.BadInput(argument="indices", reason="one is outside of the table that it picks from")

    # -- with PyTorch between segments ---------------------------------------------------------------------------------

    def _run_segments(self, inputs: list[Tensor], dims: tuple[int, ...]) -> None:
        results: dict[Buffer, Tensor] = {}
        for segment in self._unit.segments:
            if isinstance(segment, Foreign):
                self._run_foreign(segment, inputs, dims, results)
            else:
                self._run(*segment)

    def _run_foreign(
        self, region: Foreign, inputs: list[Tensor], dims: tuple[int, ...], results: dict[Buffer, Tensor]
    ) -> None:
        """Runs one node by PyTorch, on tensors over the memory of the program."""
        bound = dict(zip(self._unit.dims, dims, strict=True))

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
                self._io[self._unit.index[buffer] - base] = results[buffer].data_ptr()

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


_NOTHING = torch.empty(0)


def _open(path: Any) -> ctypes.CDLL:
    library = load(path)
    library.slim_create.restype = ctypes.c_void_p
    library.slim_create.argtypes = [ctypes.c_void_p]
    library.slim_destroy.restype = None
    library.slim_destroy.argtypes = [ctypes.c_void_p]
    library.slim_run.argtypes = [*[ctypes.c_void_p] * 3, *[ctypes.c_int] * 3]
    library.slim_buffer.argtypes = [ctypes.c_void_p, ctypes.c_int]
    library.slim_buffer.restype = ctypes.c_void_p
    return library


def _form(schedule: Schedule, unit: Unit) -> Form:
    foreign = [Skip(where(region.node), region.reason) for region in schedule.foreign]
    return Form(len(schedule.regions) - len(foreign), unit.kernels, schedule.segments, foreign)


def _is_cache(buffer: Buffer, schedule: Schedule) -> bool:
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
