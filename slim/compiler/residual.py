"""The residual stream: the values that blocks read and add to, and a change of the basis they are written in.

>>> stream = find_stream(program)
>>> turn(program, stream, rotation.T, rotation)  # what writes to the stream is turned, and what reads it turned back
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from slim.compiler.parts import place_parts
from slim.compiler.program import Program, where
from slim.compiler.raising.cleanup import RESHAPES
from slim.compiler.rows import leaves_rows_whole
from slim.compiler.rules import argument
from slim.compiler.scaling import by_rows
from slim.compiler.uses import EMBEDDING, EXPERTS, LINEAR, Role, uses

aten, slim = torch.ops.aten, torch.ops.slim

NORMS = (slim.rms_norm.default, slim.layer_norm.default)
_WRITERS = (EMBEDDING, LINEAR, EXPERTS)
_SUMS = frozenset({aten.add.Tensor, aten.sub.Tensor})
_FACTORS = frozenset({aten.mul.Tensor, aten.div.Tensor, aten.mul.Scalar, aten.div.Scalar, aten.neg.default})
_OVER_ROWS = frozenset({aten.sum.dim_IntList, aten.mean.dim})


class NoStream(Exception):
    """Why a Program has no residual stream whose basis is free."""


@dataclass(eq=False)
class Stream:
    """Values that share a basis of ``width`` channels, and the weights that this basis is in.

    Attributes:
        values: in the order of the graph; what norms make of the stream is among them.
        writers: linears, expert linears and embeddings that make such values.
        readers: linears and expert linears that read them.
        norms: those over the stream; none has a gain or a shift.
        squares: of the readers, those that make what is read through a table that begins the stream: their results
            are in the basis of its entries.
        constants: weights [..., width] that are values themselves.
    """

    width: int
    values: list[fx.Node] = field(default_factory=list)
    writers: list[fx.Node] = field(default_factory=list)
    readers: list[fx.Node] = field(default_factory=list)
    norms: list[fx.Node] = field(default_factory=list)
    squares: list[fx.Node] = field(default_factory=list)
    constants: list[fx.Node] = field(default_factory=list)

    @property
    def rows(self) -> list[str]:
        """Matrices [..., width, n] that write."""
        return _names(node.args[1] for node in self.writers if node.target is not EMBEDDING)

    @property
    def entries(self) -> list[str]:
        """Tables, biases and constants [..., width]."""
        tables = [node.args[0] if node.target is EMBEDDING else argument(node, "bias") for node in self.writers]
        return _names([*tables, *self.constants])

    @property
    def columns(self) -> list[str]:
        """Matrices [..., m, width] that read."""
        return _names(node.args[1] for node in self.readers)

    @property
    def dims(self) -> dict[str, int]:
        """How many dimensions of each of its weights are channels."""
        twice = {*self.rows, *_names(node.args[1] for node in self.squares)} & set(self.columns)
        return {name: 1 + (name in twice) for name in dict.fromkeys([*self.rows, *self.entries, *self.columns])}


def _names(nodes: object) -> list[str]:
    return list(dict.fromkeys(str(node.target) for node in nodes if node is not None))  # type: ignore[attr-defined]


# -- finding -----------------------------------------------------------------------------------------------------------


def find_stream(program: Program) -> Stream:
    """The residual stream that the model's tables of embeddings begin: of several, the one that most linears read.

    Raises:
        NoStream: where there is none, or where something works on its channels one by one, so that no other basis
            would do: a norm with a gain, a product of two of its values, a result of the model.
    """
    found: list[Stream] = []
    for table in program.nodes(EMBEDDING):
        if not any(table in stream.values for stream in found):
            found.append(_followed(table))
    if not found:
        raise NoStream("no table of embeddings begins a residual stream")
    return max(found, key=lambda stream: len(stream.readers))


def _followed(start: fx.Node) -> Stream:
    """Everything in the basis of ``start``, in both directions."""
    stream, seen, waiting = Stream(int(start.meta["val"].shape[-1])), set[fx.Node](), [start]
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            waiting += [*_sources(stream, node), *_followers(stream, node)]
    for part in ("values", "writers", "readers", "norms", "constants"):
        setattr(stream, part, sorted(dict.fromkeys(getattr(stream, part))))
    stream.squares = [node for node in stream.readers if _is_square(stream, node)]
    _check_weights(stream)
    return stream


def _sources(stream: Stream, node: fx.Node) -> list[fx.Node]:
    """What of a value's arguments is in its basis; nothing where it is written."""
    stream.values.append(node)
    if node.op == "get_attr":
        stream.constants.append(node)
        return []
    if node.target in _WRITERS:
        stream.writers.append(node)
        return []
    if node.target in NORMS:
        stream.norms.append(node)
    shared = _shared(node, stream.width)
    if not shared:
        raise NoStream(f"its channels are made by {node.target or node.op}, in {where(node)}")
    return shared


def _followers(stream: Stream, node: fx.Node) -> Iterator[fx.Node]:
    for user in node.users:
        if user.target in (LINEAR, EXPERTS) and [i for i, a in enumerate(user.args) if a is node] == [0]:
            stream.readers.append(user)
        elif node in _shared(user, stream.width):
            yield user
        elif user.op == "output":
            raise NoStream(f"it is a result of the model: {where(node)}")
        elif user.target is not aten.sym_size.int:
            raise NoStream(f"its channels are read one by one by {user.target}, in {where(user)}")


def _shared(node: fx.Node, width: int) -> list[fx.Node]:
    """The arguments that a value shares its basis with: turning them turns it."""
    if node.op != "call_function" or node.target in (LINEAR, EXPERTS):
        return []
    sources = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor)]
    wide = [n for n in sources if n.meta["val"].dim() and n.meta["val"].shape[-1] == width]
    if node.target in NORMS:
        _check_bare(node)
        return wide
    if node.target in _SUMS:
        return wide if len(wide) == len(sources) and not _numbers(node) else []
    if node.target in _FACTORS:
        others = [n for n in node.args if isinstance(n, fx.Node) and n is not wide[0]] if wide else []
        once = len(wide) == 1 and width > 1 and node.args.count(wide[0]) == 1
        return wide if once and not any(_has_channels(n) for n in others) else []
    if node.target in _OVER_ROWS:
        dims, rank = argument(node, "dim"), sources[0].meta["val"].dim()
        return wide if dims and all(dim % rank != rank - 1 for dim in dims) else []
    return wide if len(wide) == 1 and leaves_rows_whole(wide[0], node) else []


def _numbers(node: fx.Node) -> bool:
    return any(isinstance(value, (int, float)) for value in node.args)


def _has_channels(node: fx.Node) -> bool:
    """Whether a factor has more than one number a row."""
    value = node.meta["val"]
    return bool(value.dim()) and value.shape[-1] != 1


def _check_bare(norm: fx.Node) -> None:
    names = ("weight", "bias") if norm.target is slim.layer_norm.default else ("weight",)
    for held in (argument(norm, name) for name in names):
        if held is not None:
            raise NoStream(f"{held.target} scales its channels one by one, in {where(norm)}")


def _is_square(stream: Stream, reader: fx.Node) -> bool:
    """Whether what a linear makes is read by nothing but a linear over a table that begins the stream."""
    head = next(iter(reader.users), None)
    tables = [node.args[0] for node in stream.writers if node.target is EMBEDDING]
    return reader.target is LINEAR and len(reader.users) == 1 and _reads_through(head, reader, tables)


def _reads_through(head: fx.Node | None, value: fx.Node, tables: Sequence[object]) -> bool:
    return head is not None and head.target is LINEAR and head.args[0] is value and head.args[1] in tables


def _check_weights(stream: Stream) -> None:
    """Each of its weights is held as it is, and only there."""
    own = set(stream.writers) | set(stream.readers) | set(stream.values)
    own |= {head for square in stream.squares for head in square.users}
    for node in [*stream.writers, *stream.readers]:
        held = [node.args[0]] if node.target is EMBEDDING else [node.args[1]]
        if node in stream.writers and node.target is not EMBEDDING and argument(node, "bias") is not None:
            held.append(argument(node, "bias"))
        for weight in held:
            assert isinstance(weight, fx.Node)
            if weight.op != "get_attr":
                raise NoStream(f"{where(node)} has a weight that is computed, by {weight.target}")
            other = next((user for user in weight.users if user not in own), None)
            if other is not None:
                raise NoStream(f"{weight.target} is read by {where(other)} too")
    twice = set(stream.entries) & (set(stream.rows) | set(stream.columns))
    if twice:
        raise NoStream(f"{min(twice)} both begins it and reads it")


def untie(program: Program) -> list[str]:
    """Gives tables that are matrices of linears too a copy for these, under their own name; the names that are new."""
    made = []
    for node in list(program.graph.find_nodes(op="get_attr")):
        found = uses(node)
        linears = [use.node for use in found if use.role is Role.LINEAR]
        other = next((name for name, kept in program.facts.tied.items() if kept == node.target), None)
        if other is None or not linears or len(linears) == len(found):
            continue
        del program.facts.tied[other]
        program.weights[other] = program.weights.raw(str(node.target))
        for linear in linears:
            linear.replace_input_with(node, program.weight_node(other))
        made.append(other)
    if made and program.facts.config is not None:
        program.facts.config = {**program.facts.config, "tie_word_embeddings": False}
    return made


# -- changing ----------------------------------------------------------------------------------------------------------


def turn(program: Program, stream: Stream, writers: Tensor, readers: Tensor) -> None:
    """Writes the stream in another basis: what was x is ``writers`` x, and what is read of it is ``readers`` of that.

    Where ``readers @ writers`` is the identity, and norms see rows as long as they were (by the root of the width), the
    function stays the same. ``stream`` is afterwards what it is in the Program as changed.

    Args:
        writers: [new width, width]. readers: [width, new width].

    Example:
        >>> turn(program, stream, rotation.T, rotation)
    """
    weights = program.weights
    for name in stream.rows:
        weights[name] = _left(writers, weights[name])
    for name in stream.entries:
        weights[name] = _right(weights[name], writers.T)
    for name in stream.columns:
        weights[name] = _right(weights[name], readers)
    for name in _names(node.args[1] for node in stream.squares):
        weights[name] = _left(readers.T, weights[name])
    if len(writers) != stream.width:
        _resize(stream, len(writers))
        program.infer()
        place_parts(program, stream.dims)


def _left(matrix: Tensor, weight: Tensor) -> Tensor:
    return (matrix.double() @ weight.double()).to(weight.dtype)


def _right(weight: Tensor, matrix: Tensor) -> Tensor:
    wide = matrix.double()
    shape = (*weight.shape[:-1], wide.shape[-1])
    if weight.dim() == 1:
        return (weight.double() @ wide).to(weight.dtype)
    return by_rows(weight, shape, weight.dtype, lambda rows: weight[rows].double() @ wide)


def _resize(stream: Stream, width: int) -> None:
    """Sizes that operations name."""
    for node in stream.values:
        if node.target in (*RESHAPES, aten.expand.default):
            sizes = list(node.args[1])  # type: ignore[arg-type]
            if sizes[-1] == stream.width:
                node.args = (node.args[0], [*sizes[:-1], width], *node.args[2:])
    stream.width = width
