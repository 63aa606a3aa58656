"""Whether a Program computes each token from that token alone, attention apart: what a KV cache rests on.

A cached step runs the graph on the new tokens only. That is right when every operation but attention takes token i
of its arguments to token i of its result. An operation is asked, not recognised: it is run on four random tokens,
then on the first and on the other three, and both must agree.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from slim import errors
from slim.compiler.program import Program, where
from slim.compiler.types import expression
from slim.compiler.uses import ATTENTION

aten, slim = torch.ops.aten, torch.ops.slim

# Row by row by their definition, and too wide to try out: only the place of the tokens is looked at.
_BY_ROW = frozenset({aten.linear.default, slim.expert_linear.default, aten.embedding.default})
_BATCH, _TOKENS = 2, 4
_PARTS = ((0, 1), (1, 4))  # start and stop of the parts that the tokens are tried in
_INTEGERS = (97, 2, 1)  # bounds of random integers: wide ones tell more, narrow ones are indices to anything
_SEEDS = 5


def check_tokenwise(program: Program) -> None:
    """Returns where the Program may be cached.

    Raises:
        CacheUnsupported: naming the first operation that looks at more than its own token, and its line.
    """
    sizes = _sizes(program)
    seen: dict[Any, str | None] = {}
    kinds = _Kinds(program)
    for node in program.nodes():
        if node.target in ATTENTION or not _tensors(node.meta["val"]):
            continue
        trial = _Trial(node, sizes, kinds)
        key = trial.key()
        if key not in seen:
            seen[key] = trial.objection()
        if seen[key]:
            raise errors.CacheUnsupported(reason=f"{_name(node)} {seen[key]}", where=where(node))


@dataclass(frozen=True)
class _Sizes:
    """The symbols of the batch and of the sequence."""

    batch: sympy.Symbol
    tokens: sympy.Symbol

    def bind(self, size: sympy.Expr, tokens: int) -> int:
        """The size as a number, for ``tokens`` tokens; other symbols count as the batch does."""
        values = {symbol: tokens if symbol == self.tokens else _BATCH for symbol in size.free_symbols}
        return int(size.subs(values))


def _sizes(program: Program) -> _Sizes:
    for value in program.inputs:
        if value.name == "input_ids" and len(value.shape) == 2 and isinstance(value.shape[1], str):
            batch, tokens = (sympy.Symbol(str(d), integer=True, positive=True) for d in value.shape)
            return _Sizes(batch, tokens)
    raise errors.CacheUnsupported(reason="the model has no input_ids [B, S] of any length")


@dataclass(frozen=True)
class _Kind:
    """The type of a value: its dtype and sizes, or the size that it is."""

    dtype: torch.dtype | None
    shape: tuple[sympy.Expr, ...]

    def axis(self, tokens: sympy.Symbol) -> int | None:
        """The dimension that the tokens lie along."""
        return next((i for i, size in enumerate(self.shape) if tokens in size.free_symbols), None)


class _Trial:
    """One operation, to be tried out."""

    def __init__(self, node: fx.Node, sizes: _Sizes, kinds: _Kinds) -> None:
        self.node = node
        self.sizes = sizes
        self.arguments = {n: kinds[n] for n in node.all_input_nodes}
        results = kinds[node]
        self.results = [results] if isinstance(results, _Kind) else [kind for kind in results if kind.dtype is not None]

    def key(self) -> Any:
        """Equal for operations that a trial cannot tell apart."""
        kinds = fx.map_arg((self.node.args, self.node.kwargs), lambda n: self.arguments[n])
        return self.node.target, repr(kinds)

    def objection(self) -> str | None:
        """Why the operation may mix tokens; None where it does not."""
        tokens = self.sizes.tokens
        kinds = [kind for kind in (*self.arguments.values(), *self.results) if isinstance(kind, _Kind)]
        concerned = [kind for kind in kinds if any(tokens in size.free_symbols for size in kind.shape)]
        if not concerned:
            return None
        for kind in self.results:
            along = [size for size in kind.shape if tokens in size.free_symbols]
            if len(along) > 1:
                return "pairs every token with every other one"
            if along and not _is_multiple(along[0], tokens):
                return "changes the number of tokens"
        if self.node.target in _BY_ROW:
            return self._by_row()
        return self._try()

    def _by_row(self) -> str | None:
        looked_up, rows = (0, 1) if self.node.target is aten.embedding.default else (1, 0)
        table, x = (self.arguments[self.node.args[i]] for i in (looked_up, rows))  # type: ignore[index]
        wide = x.axis(self.sizes.tokens) == len(x.shape) - 1 and self.node.target is not aten.embedding.default
        return "mixes the tokens" if wide or table.axis(self.sizes.tokens) is not None else None

    def _try(self) -> str | None:
        error: Exception | None = None
        for highest in _INTEGERS:
            try:
                agree = all(self._agrees(highest, seed) for seed in range(_SEEDS))
            except Exception as raised:  # whatever the operation raises on values it does not expect
                error = raised
                continue
            return None if agree else "looks at more than one token at a time"
        return f"cannot be tried out ({type(error).__name__}: {str(error).partition(chr(10))[0]})"

    def _agrees(self, highest: int, seed: int) -> bool:
        generator = torch.Generator().manual_seed(seed)
        values = {n: self._random(kind, highest, generator) for n, kind in self.arguments.items()}
        whole = self._run(values, 0, _TOKENS)
        for part in _PARTS:
            pieces = self._run(values, *part)
            for kind, result, piece in zip(self.results, whole, pieces, strict=True):
                if not _agree(self._part(kind, result, *part), piece):
                    return False
        return True

    def _run(self, values: dict[fx.Node, Any], start: int, stop: int) -> list[Tensor]:
        given = {n: self._part(self.arguments[n], value, start, stop) for n, value in values.items()}
        args, kwargs = fx.map_arg((self.node.args, self.node.kwargs), lambda n: given[n])
        return _tensors(self.node.target(*args, **kwargs))  # type: ignore[operator]

    def _random(self, kind: Any, highest: int, generator: torch.Generator) -> Any:
        if not isinstance(kind, _Kind):
            return [self._random(item, highest, generator) for item in kind]
        if kind.dtype is None:
            return None  # a size: known once it is known of which part
        shape = [self.sizes.bind(size, _TOKENS) for size in kind.shape]
        if kind.dtype.is_floating_point:
            return torch.randn(shape, generator=generator).to(kind.dtype)
        return torch.randint(0, 2 if kind.dtype == torch.bool else highest, shape, generator=generator).to(kind.dtype)

    def _part(self, kind: Any, value: Any, start: int, stop: int) -> Any:
        """Tokens ``start`` to ``stop`` of a value; a size, as it would be for so many tokens."""
        if not isinstance(kind, _Kind):
            return [self._part(k, v, start, stop) for k, v in zip(kind, value, strict=True)]
        if kind.dtype is None:
            return self.sizes.bind(kind.shape[0], stop - start)
        axis = kind.axis(self.sizes.tokens)
        if axis is None:
            return value
        has_batch = self.sizes.batch in kind.shape[axis].free_symbols
        split = value.unflatten(axis, (_BATCH if has_batch else 1, _TOKENS, -1))
        return split.narrow(axis + 1, start, stop - start).flatten(axis, axis + 2)


class _Kinds(dict[fx.Node, Any]):
    """The kind of every node's value, found when it is first asked for."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.dims = program.dims

    def __missing__(self, node: fx.Node) -> Any:
        self[node] = found = self._kind(node.meta["val"])
        return found

    def _kind(self, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [self._kind(item) for item in value]
        if isinstance(value, Tensor):
            return _Kind(value.dtype, tuple(self._size(size) for size in value.shape))
        return _Kind(None, (self._size(value),))

    def _size(self, size: Any) -> sympy.Expr:
        return sympy.Integer(size) if isinstance(size, int) else expression(size, self.dims)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [v for item in value for v in _tensors(item)] if isinstance(value, (list, tuple)) else []


def _is_multiple(size: sympy.Expr, tokens: sympy.Symbol) -> bool:
    """Whether ``size`` counts whole tokens: S, B*S, 8*B*S."""
    quotient = sympy.cancel(size / tokens)
    return tokens not in quotient.free_symbols and sympy.denom(quotient) == 1


def _agree(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    return torch.allclose(a.float(), b.float(), rtol=1e-2 if a.dtype.itemsize < 4 else 1e-4, atol=1e-4, equal_nan=True)


def _name(node: fx.Node) -> str:
    return str(node.target).removesuffix(".default")
