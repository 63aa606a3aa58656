"""What a Program costs to hold and to run, as sympy expressions read off the types of its nodes.

The symbols are those of the Program, B (rows) and S (new tokens), and T: all tokens attended to, the new ones among
them. Prefill is S = T, decoding is S = 1.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import sympy
import torch
from torch import fx

from slim.compiler.patterns.pairs import keys_seen, pairs
from slim.compiler.program import Program
from slim.compiler.rounded_kv import held_bytes, pair_bits
from slim.compiler.rules import argument
from slim.compiler.types import expression
from slim.compiler.uses import ATTENTION, EXPERTS, LINEAR, RESTORING, Role, stored_in, uses

aten, slim = torch.ops.aten, torch.ops.slim

S, T = (sympy.Symbol(name, integer=True, positive=True) for name in ("S", "T"))
_ZERO = sympy.Integer(0)


class Work(NamedTuple):
    """One kind of node: what each such node computes and moves, and how many there are."""

    kind: str
    flops: sympy.Expr
    nbytes: sympy.Expr
    nodes: int


@dataclass(frozen=True)
class BoundCost:
    """A Cost at given sizes."""

    flops: int
    bytes_moved: int
    kv_bytes: int


@dataclass(frozen=True)
class Cost:
    """What a Program costs.

    Attributes:
        parameters: numbers held, tied weights once, scales of quantised weights not counted.
        weight_bytes: bytes of all weights, scales included.
        kv_bytes_per_token: bytes of keys and values that one token of one row adds to the cache, over all layers.
        work: the nodes that compute: matrix products and attention, by kind.

    FLOPs are those of matrix products and attention (two a multiply-add); the rest is noise beside them. Bytes moved
    are what perfectly fused kernels still have to move: each weight once (of a table only the rows picked, of experts
    at most one a row), the inputs and results of matrix products, and the cache.

    Example:
        >>> cost(program).decode_flops          # in B and T
        >>> cost(program).bind(B=1, S=128, T=128).flops
    """

    parameters: int
    weight_bytes: int
    kv_bytes_per_token: int
    work: tuple[Work, ...]

    @property
    def flops(self) -> sympy.Expr:
        return sympy.Add(*(item.flops * item.nodes for item in self.work))

    @property
    def bytes_moved(self) -> sympy.Expr:
        return sympy.Add(*(item.nbytes * item.nodes for item in self.work))

    @property
    def prefill_flops(self) -> sympy.Expr:
        """FLOPs of reading S tokens into an empty cache."""
        return sympy.expand(self.flops.subs(T, S))

    @property
    def decode_flops(self) -> sympy.Expr:
        """FLOPs of one new token a row, the T-th of its row."""
        return sympy.expand(self.flops.subs(S, 1))

    def bind(self, **sizes: int) -> BoundCost:
        """Numbers for ``B``, ``S``, ``T`` and whatever other dimensions the Program has; T is S where not given."""
        sizes = {"T": sizes.get("S", 1), **sizes}
        rows = sizes.get("B", 1)
        kv_bytes = self.kv_bytes_per_token * rows * sizes["T"]
        return BoundCost(number(self.flops, sizes), number(self.bytes_moved, sizes), kv_bytes)

    def roofline(self, bandwidth: float, flops_rate: float) -> sympy.Expr:
        """Seconds no kernel can beat: each node takes the longer of moving its bytes and computing.

        Args:
            bandwidth: bytes a second that the machine reads. flops_rate: floating-point operations a second.
        """
        terms = (item.nodes * sympy.Max(item.flops / flops_rate, item.nbytes / bandwidth) for item in self.work)
        return sympy.Add(*terms)


def number(value: sympy.Expr, sizes: dict[str, int]) -> int:
    """An expression in sizes at given ones."""
    bound = value.subs({sympy.Symbol(name, integer=True, positive=True): size for name, size in sizes.items()})
    missing = sorted(map(str, bound.free_symbols))
    if missing:
        raise TypeError(f"bind() needs {', '.join(missing)} too")
    return int(bound)


def cost(program: Program, kv_bits: int = 0) -> Cost:
    """The cost of ``program``, from the operations and types of its nodes alone.

    Args:
        kv_bits: bits of a number in the KV cache, where the Program itself does not round it; 0 for floats.
    """
    reader = _Reader(program, kv_bits)
    found: Counter[tuple[str, sympy.Expr, sympy.Expr]] = Counter()
    for node in program.nodes():
        found.update(reader.work(node))
    kv_bytes = sum(reader.kv_bytes(node) for node in program.attention_nodes())
    work = tuple(Work(*key, count) for key, count in found.items())
    return Cost(program.parameters, program.nbytes, kv_bytes, work)


def node_work(program: Program, kv_bits: int = 0) -> Iterator[tuple[fx.Node, Work]]:
    """The same, node by node, for those that compute or are the first to read a weight."""
    reader = _Reader(program, kv_bits)
    for node in program.nodes():
        yield from ((node, Work(*found, 1)) for found in reader.work(node))


class _Reader:
    """Reads costs off nodes; each weight is paid for where it is first used."""

    def __init__(self, program: Program, kv_bits: int) -> None:
        self.program = program
        self.kv_bits = kv_bits
        self.read: set[str] = set()

    def work(self, node: fx.Node) -> Iterator[tuple[str, sympy.Expr, sympy.Expr]]:
        weights = sum((self._weight_bytes(w, node) for w in self._new_weights(node)), _ZERO)
        if node.target in ATTENTION:
            yield "attention", self._attention_flops(node), weights + self._attention_bytes(node)
        elif node.target in _DEPTH:
            flops = 2 * self._numel(node) * self._size(node.args[_DEPTH[node.target][0]], _DEPTH[node.target][1])
            activations = self._bytes(node) + self._activation_bytes(node)
            yield _kind(node), flops, weights + activations
        elif node.target in _CONVOLUTIONS:
            depth = math.prod(node.args[1].meta["val"].shape[1:])  # type: ignore[union-attr]
            yield _kind(node), 2 * depth * self._numel(node), weights + self._bytes(node) + self._activation_bytes(node)
        elif weights != 0:
            yield _kind(node), _ZERO, weights

    # -- attention -----------------------------------------------------------------------------------------------------

    def _attention_flops(self, node: fx.Node) -> sympy.Expr:
        """Two products over every pair of a query and a key it may see."""
        q, v = node.args[0], node.args[2]
        seen = pairs(node, self._size(q, 2), T)
        return 2 * self._size(q, 0) * self._size(q, 1) * seen * (self._size(q, 3) + self._size(v, 3))

    def _attention_bytes(self, node: fx.Node) -> sympy.Expr:
        """Queries, results, the new keys and values written, and all keys and values in sight read."""
        q, k = node.args[:2]
        seen = keys_seen(node, self._size(q, 2), T)
        cached = self._size(q, 0) * self.kv_bytes(node) * (seen + self._size(k, 2))
        return self._bytes(q) + self._bytes(node) + cached

    def kv_bytes(self, node: fx.Node) -> int:
        """Bytes of one token's key and value in one layer, with the scales of rounded ones."""
        bits = pair_bits(node)
        bits = bits if all(bits) else (self.kv_bits, self.kv_bits)
        values = [argument(node, name).meta["val"] for name in ("k", "v")]
        return sum(
            int(value.shape[1]) * held_bytes(int(value.shape[3]), each, value.dtype)
            for value, each in zip(values, bits, strict=True)
        )

    # -- weights -------------------------------------------------------------------------------------------------------

    def _new_weights(self, node: fx.Node) -> list[fx.Node]:
        """The weights that ``node`` is the first to read; those of a dequantize count where its result is used."""
        if stored_in(node):
            return []
        inputs = dict.fromkeys(weight for value in node.all_input_nodes for weight in stored_in(value))
        new = [n for n in inputs if str(n.target) not in self.read and not self._is_looked_up(n, node)]
        self.read |= {str(n.target) for n in new if not self._only_rows(n)}
        return new

    def _is_looked_up(self, weight: fx.Node, node: fx.Node) -> bool:
        """Whether ``node`` takes rows of a table that another, a head tied to it, reads whole and pays for."""
        return not self._only_rows(weight) and any(u.node is node and u.role is Role.TABLE for u in uses(weight))

    def _only_rows(self, weight: fx.Node) -> bool:
        """Whether no node reads all of the weight: it pays for its rows at each use."""
        return {use.role for use in uses(weight)} <= {Role.TABLE, Role.EXPERTS}

    def _weight_bytes(self, weight: fx.Node, node: fx.Node) -> sympy.Expr:
        name = str(weight.target)
        whole = sympy.Integer(self.program.weights.nbytes(name))
        if not self._only_rows(weight) or whole == 0:
            return whole
        units = self.program.weights.shape(name)[0]
        picked = self._numel(node.args[1 if node.target is aten.embedding.default else 3])
        return whole / units * sympy.Min(units, picked)

    # -- sizes ---------------------------------------------------------------------------------------------------------

    def _size(self, value: Any, dim: int) -> sympy.Expr:
        return expression(value.meta["val"].shape[dim], self.program.dims)

    def _numel(self, value: Any) -> sympy.Expr:
        return sympy.Mul(*(expression(size, self.program.dims) for size in value.meta["val"].shape))

    def _bytes(self, value: Any) -> sympy.Expr:
        return self._numel(value) * value.meta["val"].dtype.itemsize

    def _activation_bytes(self, node: fx.Node) -> sympy.Expr:
        """Bytes of the operands that are neither weights nor made from them."""
        return sympy.Add(*(self._bytes(n) for n in node.all_input_nodes if not self._is_weight(n)))

    @staticmethod
    def _is_weight(node: fx.Node) -> bool:
        return node.op == "get_attr" or node.target in RESTORING or not isinstance(node.meta["val"], torch.Tensor)


def _kind(node: fx.Node) -> str:
    return str(getattr(node.target, "_opname", node.name))


_CONVOLUTIONS = (
    aten.convolution.default, aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.conv1d.padding,
    aten.conv2d.padding, aten.conv3d.padding,
)  # fmt: skip

# Matrix products: which argument, and which of its dimensions, is summed over.
_DEPTH: dict[Any, tuple[int, int]] = {
    LINEAR: (0, -1), EXPERTS: (0, -1), aten.matmul.default: (0, -1), aten.mm.default: (0, -1), aten.mv.default: (0, -1),
    aten.bmm.default: (0, -1), aten.dot.default: (0, -1), aten.addmm.default: (1, -1), aten.baddbmm.default: (1, -1),
}  # fmt: skip
