"""Linears: matrix products with a weight become ``aten.linear``, and fused ones are taken apart.

A linear whose output is only ever read in parts (q, k, v; gate, up), whether the parts lie one after another or
interleaved head by head, becomes one linear a part. The parts remember where in the fused weight they came from.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import fx

from slim.compiler.program import Program, where
from slim.compiler.rules import Count, Counts, Match, NearMiss, Rule, argument, call
from slim.compiler.weights import Part, PartOf

aten, slim = torch.ops.aten, torch.ops.slim
LINEAR = aten.linear.default
EXPERT_LINEAR = slim.expert_linear.default


# -- products with a weight --------------------------------------------------------------------------------------------


def derive(program: Program, source: str, local: Part, origin: Part, name: str) -> fx.Node:
    """The node of weight ``name``, which is ``local`` of weight ``source``; the program remembers its ``origin``."""
    weights, facts = program.weights, program.facts
    if name not in weights:
        if origin.base == source:
            facts.bases.setdefault(source, (weights.shape(source), weights.dtype(source)))
        part = PartOf(weights.raw(source), local)
        weights[name] = part if weights.is_deferred(source) else part.load()
        facts.parts[name] = origin
    return program.weight_node(name)


def transposed(program: Program, weight: Any) -> fx.Node | None:
    """The node of weight^T, for a weight [in, out] (or [experts, in, out]) kept the other way round."""
    name = program.weight_of(weight)
    if name is None:
        return None
    shape = program.weights.shape(name)
    local = Part(name, shape, tuple((0, n) for n in shape), shape, transposed=True)
    known = program.facts.parts.get(name)
    origin = local if known is None else replace(known, transposed=not known.transposed)
    return derive(program, name, local, origin, f"{name}_t")


def _product(m: Match) -> fx.Node | None:
    """x W = linear(x, W^T)"""
    weight = m["w"]
    if isinstance(weight, fx.Node) and weight.target in _TRANSPOSES and _swaps_last(weight):
        inner = weight.args[0]
        if m.program.weight_of(inner) is not None and len(inner.meta["val"].shape) == 2:
            return m.new(LINEAR, m["x"], inner)
    if m.program.weight_of(weight) is None or len(weight.meta["val"].shape) != 2:
        return None
    return m.new(LINEAR, m["x"], transposed(m.program, weight))


_TRANSPOSES = frozenset({aten.t.default, aten.transpose.int, aten.permute.default})


def _swaps_last(node: fx.Node) -> bool:
    if node.target is aten.t.default:
        return True
    rank = len(node.meta["val"].shape)
    if node.target is aten.permute.default:
        return [d % rank for d in node.args[1]] == [*range(rank - 2), rank - 1, rank - 2]
    return sorted(d % rank for d in node.args[1:3]) == [rank - 2, rank - 1]


def _with_bias(m: Match) -> fx.Node | None:
    if m.program.weight_of(m["b"]) is None:
        return None
    weight = m["w"]
    if m.program.weight_of(weight) is None:
        return None
    return m.new(LINEAR, m["x"], transposed(m.program, weight), m["b"])


def _bias_after(m: Match) -> fx.Node | None:
    """linear(x, W) + b = linear(x, W, b)"""
    bias, product = m["b"], m["linear"]
    width = product.meta["val"].shape[-1]
    if m.program.weight_of(bias) is None or list(bias.meta["val"].shape) != [width]:
        return None
    if len(product.users) > 1:
        raise NearMiss("the product without its bias is read elsewhere")
    return m.new(LINEAR, m["x"], m["w"], bias)


def _lifted_through(m: Match) -> fx.Node | None:
    """reshape(linear(reshape(x, [-1, n]))) = linear(x): a flattened batch is put back where it was."""
    x, out = m["x"], m.node.meta["val"]
    lead = list(x.meta["val"].shape[:-1])
    same = len(out.shape) == len(lead) + 1 and [_e(a) for a in out.shape[:-1]] == [_e(a) for a in lead]
    if not same or _e(x.meta["val"].shape[-1]) != _e(m["w"].meta["val"].shape[1]):
        return None
    return m.new(LINEAR, x, m["w"], m["b"])


def _e(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else int(size)


def _expert_transposed(m: Match) -> fx.Node | None:
    weight = m["w"]
    if weight.target not in _TRANSPOSES or not _swaps_last(weight):
        return None
    inner = transposed(m.program, weight.args[0])
    return None if inner is None else m.new(EXPERT_LINEAR, m["x"], inner, m["b"], m["expert"])


LINEARS = (
    Rule("x W = linear(x, W')", call(aten.matmul.default, aten.mm.default, args=("x", "w")), _product),
    Rule("b + x W = linear(x, W', b)", call(aten.addmm.default, args=("b", "x", "w"), alpha=1, beta=1), _with_bias),
    Rule(
        "linear(x, W) + b = linear(x, W, b)",
        call(aten.add.Tensor, args=(call(LINEAR, args=("x", "w", None), name="linear"), "b"), commutes=True, alpha=1),
        _bias_after,
    ),
    Rule(
        "reshape(linear(reshape(x))) = linear(x)",
        call(aten.reshape.default, args=(call(LINEAR, args=(call(aten.reshape.default, args=("x",)), "w", "b")),)),
        _lifted_through,
    ),
    Rule(
        "expert_linear(x, W') = expert_linear(x, W)",
        call(EXPERT_LINEAR, args=("x", "w", "b", "expert")),
        _expert_transposed,
    ),
)

# -- fused linears -----------------------------------------------------------------------------------------------------

SPLITS = frozenset({aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int})


@dataclass(frozen=True)
class Piece:
    """One part of a fused output: the node that reads it, and ``[start, stop)`` along ``axis`` of its source."""

    node: fx.Node
    axis: int
    start: int
    stop: int
    drops_axis: bool = False


def split_fused(program: Program, counts: Counts) -> None:
    """Takes apart every linear that is only read in parts."""
    count = counts.setdefault("linear(x, [W1; W2; ...])[part i] = linear(x, Wi)", Count())
    for node in list(program.nodes(LINEAR, EXPERT_LINEAR)):
        if not isinstance(node.args[1], fx.Node) or program.weight_of(node.args[1]) is None:
            continue
        source, grid, moves = _grid(node)
        if not any(user.target in SPLITS | {aten.slice.Tensor, aten.select.int} for user in source.users):
            continue
        count.tried += 1
        try:
            pieces = _pieces(source)
            _replace_pieces(program, node, source, grid, moves, pieces)
            count.matched += 1
        except NearMiss as miss:
            count.misses.append(f"{where(node)}: {miss}")
    program.clean()


def _grid(linear: fx.Node) -> tuple[fx.Node, list[int], list[fx.Node]]:
    """The node whose parts are read, the sizes its features are spread over, and the moves between.

    Features are the last dimension of the linear; a reshape may spread them over several, which transposes may move.
    """
    width = int(linear.meta["val"].shape[-1])
    source, grid, moves = linear, [width], []
    while len(source.users) == 1:
        user = next(iter(source.users))
        shape = user.meta["val"].shape if isinstance(user.meta.get("val"), torch.Tensor) else ()
        rank = len(linear.meta["val"].shape) - 1
        if user.target is aten.reshape.default and source is linear and len(shape) > rank + 1:
            spread = list(shape[rank:])
            lead = [_e(a) for a in shape[:rank]] == [_e(a) for a in linear.meta["val"].shape[:-1]]
            if not lead or any(isinstance(size, torch.SymInt) for size in spread):
                break
            grid = [int(size) for size in spread]
        elif user.target in _TRANSPOSES and len(grid) > 1:
            pass
        else:
            break
        moves.append(user)
        source = user
    return source, grid, moves


def _pieces(source: fx.Node) -> list[Piece]:
    """Every reader of ``source`` as a part of one axis."""
    found: list[Piece] = []
    rank = len(source.meta["val"].shape)
    for user in list(source.users):
        if user.target in SPLITS:
            found += _split_pieces(user, rank)
        elif user.target is aten.slice.Tensor:
            found.append(_slice_piece(user, rank))
        elif user.target is aten.select.int:
            axis, index = user.args[1] % rank, user.args[2]
            size = int(source.meta["val"].shape[axis])
            found.append(Piece(user, axis, index % size, index % size + 1, drops_axis=True))
        else:
            raise NearMiss(f"{user.name} reads the whole of it")
    if len({piece.axis for piece in found}) != 1:
        raise NearMiss("its parts are taken along different axes")
    covered = sorted({(piece.start, piece.stop) for piece in found})
    if any(a[1] > b[0] for a, b in pairwise(covered)):
        raise NearMiss("its parts overlap")
    return found


def _split_pieces(split: fx.Node, rank: int) -> list[Piece]:
    axis = int(argument(split, "dim")) % rank
    unbind = split.target is aten.unbind.int
    starts, offset = [], 0
    for value in split.meta["val"]:
        size = 1 if unbind else int(value.shape[axis])
        starts.append((offset, offset + size))
        offset += size
    if any(user.target is not operator.getitem for user in split.users):
        raise NearMiss(f"{split.name} is read as a whole")
    return [Piece(user, axis, *starts[user.args[1]], drops_axis=unbind) for user in split.users]


def _slice_piece(node: fx.Node, rank: int) -> Piece:
    axis = int(argument(node, "dim")) % rank
    size = node.args[0].meta["val"].shape[axis]
    if isinstance(size, torch.SymInt) or argument(node, "step") != 1:
        raise NearMiss(f"{node.name} takes every {argument(node, 'step')}th feature")
    start, end = argument(node, "start") or 0, argument(node, "end")
    start = start + size if start < 0 else min(start, size)
    end = size if end is None else end + size if end < 0 else min(end, size)
    return Piece(node, axis, int(start), int(end))


def _replace_pieces(
    program: Program, linear: fx.Node, source: fx.Node, grid: list[int], moves: list[fx.Node], pieces: list[Piece]
) -> None:
    lead = len(linear.meta["val"].shape) - 1
    axis = _axis_before(moves, pieces[0].axis, len(source.meta["val"].shape)) - lead
    if axis < 0:
        raise NearMiss("its parts are taken along the batch or the length")
    roles = sorted({(piece.start, piece.stop) for piece in pieces})
    for piece in pieces:
        suffix = f"_{roles.index((piece.start, piece.stop))}"
        index = tuple((piece.start, piece.stop) if i == axis else (0, n) for i, n in enumerate(grid))
        new = _part_linear(program, linear, piece.node, suffix, grid, index)
        part_grid = [stop - start for start, stop in index]
        for move in moves:
            new = _moved(program, new, move, lead, part_grid, piece.node)
        if piece.drops_axis:
            new = program.insert(piece.node, aten.select.int, new, piece.axis, 0, like=piece.node)
        piece.node.replace_all_uses_with(new, propagate_meta=False)


def _axis_before(moves: list[fx.Node], axis: int, rank: int) -> int:
    """Where an axis was before the transposes."""
    for move in reversed(moves):
        if move.target is aten.permute.default:
            axis = move.args[1][axis] % rank
        elif move.target in _TRANSPOSES:
            a, b = (d % rank for d in move.args[1:3])
            axis = b if axis == a else a if axis == b else axis
    return axis


def _part_linear(
    program: Program, linear: fx.Node, before: fx.Node, suffix: str, grid: list[int], index: tuple[tuple[int, int], ...]
) -> fx.Node:
    x, weight = linear.args[:2]
    bias = argument(linear, "bias")
    new_weight = _rows(program, weight, suffix, grid, index)
    new_bias = None if bias is None else _rows(program, bias, suffix, grid, index, is_bias=True)
    if linear.target is EXPERT_LINEAR:
        return program.insert(before, EXPERT_LINEAR, x, new_weight, new_bias, argument(linear, "expert"), like=linear)
    return program.insert(before, LINEAR, x, new_weight, new_bias, like=linear)


def _rows(
    program: Program,
    weight: fx.Node,
    suffix: str,
    grid: list[int],
    index: tuple[tuple[int, int], ...],
    is_bias: bool = False,
) -> fx.Node:
    """Some output rows of a weight [..., m, n] or bias [..., m], where m is spread over ``grid``."""
    name = str(weight.target)
    shape = program.weights.shape(name)
    lead, tail = (shape[:-1], ()) if is_bias else (shape[:-2], shape[-1:])
    rows = 1
    for start, stop in index:
        rows *= stop - start
    whole = tuple((0, n) for n in lead), tuple((0, n) for n in tail)
    local = Part(name, (*lead, *grid, *tail), (*whole[0], *index, *whole[1]), (*lead, rows, *tail))
    known = program.facts.parts.get(name)
    if known is None:
        origin = local
    elif known == Part(known.base, known.grid, tuple((0, n) for n in known.grid), known.grid, transposed=True):
        # a Conv1D weight: its rows are the columns of what is stored
        origin = Part(
            known.base, (*lead, *tail, *grid), (*whole[0], *whole[1], *index), (*lead, *tail, rows), transposed=True
        )
    else:
        raise NearMiss(f"{name} is a part already")
    return derive(program, name, local, origin, f"{name.removesuffix('_t')}{suffix}")


def _moved(program: Program, x: fx.Node, move: fx.Node, lead: int, part_grid: list[int], before: fx.Node) -> fx.Node:
    """The reshape or transpose between the linear and its parts, done to one part."""
    if move.target is aten.reshape.default:
        shape: Any = move.args[1]
        sizes = [*shape[:lead], *part_grid]
        first = next((i for i, size in enumerate(sizes) if not isinstance(size, fx.Node)), None)
        if first is not None and not any(size == -1 for size in sizes if not isinstance(size, fx.Node)):
            sizes[first] = -1
        return program.insert(before, aten.reshape.default, x, sizes, like=move)
    return program.insert(before, move.target, x, *move.args[1:], like=move)
