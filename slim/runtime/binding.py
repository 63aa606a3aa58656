"""Binding a KV cache into a Program: ``slim.attention`` becomes one over a cache, or over pages."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from slim import errors
from slim.compiler.dialect.kv import bits_of
from slim.compiler.inputs import evaluate
from slim.compiler.patterns import read_pattern
from slim.compiler.program import Program, where
from slim.compiler.rounded_kv import pair_bits, rounded
from slim.compiler.rules import argument
from slim.compiler.types import Input
from slim.runtime import sinks
from slim.runtime.cache import Slot, Tensors
from slim.runtime.eviction import Eviction, objections
from slim.runtime.tokenwise import check_tokenwise

aten, slim = torch.ops.aten, torch.ops.slim

KEY_MASK, TABLE, LENGTHS = "key_mask", "table", "lengths"
# Options of attention that are the same with a cache.
_OPTIONS = ("layer", "scale", "causal", "window", "softcap", "pattern", "skip")


@dataclass(frozen=True)
class Paging:
    """How the tokens of a row lie in pages; see ``slim.paged_attention``.

    Attributes:
        size: tokens of a page.
        fixed: pages of a row that stay, where the others take turns.
        window: newest tokens that every layer keeps; None for all.
        sinks: first tokens that it keeps beside them, and sees as near as in a text of ``window + sinks`` tokens.
    """

    size: int
    fixed: int = 0
    window: int | None = None
    sinks: int = 0

    @property
    def pattern(self) -> str | None:
        """What every layer keeps; None for everything."""
        if self.window is None:
            return None
        return f"window({self.window})" + (f" | columns({self.sinks})" if self.sinks else "")


def check_cacheable(program: Program, paging: Paging | None = None, eviction: Eviction | None = None) -> None:
    """Returns where a cached step of ``program`` computes what the whole would, but for what is left out or evicted.

    Raises:
        CacheUnsupported: naming the node and the reason.
    """
    if not program.attention_nodes():
        raise errors.CacheUnsupported(reason="the model has no attention that slim recognises")
    unevictable = {} if eviction is None else objections(program.attention_nodes())
    for node in program.attention_nodes():
        reason = _objection(program, node) or (_no_pages(node, paging) if paging is not None else unevictable.get(node))
        if reason:
            reason = f"attention of layer {node.kwargs['layer']} {reason}"
            raise errors.CacheUnsupported(reason=reason, where=where(node))
    check_tokenwise(program)


def _objection(program: Program, node: fx.Node) -> str | None:
    if node.target is not slim.attention.default:
        return "has a cache already"
    if argument(node, "bias") is not None:
        return "adds a tensor to its scores, whose columns a cached step cannot know"
    if not argument(node, "causal"):
        return "looks at later tokens"
    mask = argument(node, "key_mask")
    if mask is not None and not _is_attention_mask(mask):
        return "masks keys by more than attention_mask"
    query, key = argument(node, "q").meta["val"], argument(node, "k").meta["val"]
    if query.shape[2] != key.shape[2]:
        return "has keys that are not its own tokens"
    return None


def _no_pages(node: fx.Node, paging: Paging) -> str | None:
    """Why attention cannot read pages; None where it can."""
    text = argument(node, "pattern")
    if text is None:
        return sinks.objection(node) if paging.sinks else None
    if paging.pattern is not None:
        return f"keeps {text} already, which a window of the cache would cut"
    top = read_pattern(text).top
    if top is not None and paging.size % top.size:
        return f"keeps {text}, and pages of {paging.size} tokens are no whole blocks of {top.size}"
    return None


def _is_attention_mask(mask: fx.Node) -> bool:
    """Whether ``mask`` is the input attention_mask in another type and spelling; it is asked on a sample."""
    sample = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1]])
    try:
        value = evaluate(mask, {"attention_mask": sample, "input_ids": torch.zeros_like(sample)})
    except KeyError:  # it reads a weight, or another input
        return False
    return bool(value.dtype == torch.bool and torch.equal(value, sample.bool()))


def bind_cache(
    program: Program,
    *,
    masked: bool = True,
    last_only: bool = False,
    checked: bool = False,
    bits: int = 0,
    paging: Paging | None = None,
    eviction: Eviction | None = None,
) -> Program:
    """The Program of a step over a KV cache: S new tokens after ``T - S`` that the cache holds.

    Its inputs are those of ``program`` for the new tokens, [B, S] (``attention_mask`` only where something beside
    attention reads it), then ``key_mask`` bool [B, T], True at tokens and False at padding, then ``k_cache_i``
    [B, heads, C, width] and ``v_cache_i``, one pair a layer, or a pair for layers that share keys and values; after
    a pair of quantised ones ``k_scale_i`` and ``v_scale_i``, [B, heads, C]. The step writes the new keys and values at
    ``T - S`` and leaves the rest alone. Keys and values that the Program rounds are held as the numbers they are
    rounded to.

    With ``paging`` every row has tokens of its own number: ``key_mask`` gives way to ``table`` int32 [B, P], the pages
    of each row, and ``lengths`` int64 [B], how many tokens it holds; the caches are [N, heads, page size, width], and
    no token is padding.

    With ``eviction`` there is also ``mass_i`` [B, heads, C], to which a step adds what each key gets of attention.

    Args:
        masked: whether there may be padding; without it ``key_mask`` only says how long T is, and attention is faster.
        last_only: compute the first output for the last token alone, [B, 1, V], which is all that generation needs.
        checked: whether ``check_cacheable`` was asked already.
        bits: round to so many, 8 or 4, the keys and values that the Program does not round itself; 0 leaves them.

    Raises:
        CacheUnsupported: where a cached step would not be the same function; see ``check_cacheable``.
    """
    if not checked:
        check_cacheable(program, paging, eviction)
    bound = _Binder(program.copy(), masked, bits, paging, eviction).bind()
    if last_only:
        _keep_last(bound)
    return bound


class _Binder:
    def __init__(
        self, program: Program, masked: bool, bits: int, paging: Paging | None, eviction: Eviction | None
    ) -> None:
        self.program = program
        self.masked = masked
        self.paging = paging
        self.eviction = eviction
        self.nearer: sinks.Nearer | None = None
        self.slots = cache_slots(program, bits, eviction is not None)
        self.pairs: dict[tuple[fx.Node, fx.Node], int] = {}

    def bind(self) -> Program:
        self._sizes_from_tokens()
        nodes = self.program.attention_nodes()
        for node in nodes:
            self.pairs.setdefault((argument(node, "k"), argument(node, "v")), len(self.pairs))
        bound = self._with_inputs()
        start = None if self.paging else _start(bound)
        for node in nodes:
            self._replace(bound, node, start)
        bound.clean()
        declared = {value.name for value in bound.inputs}
        for node in bound.graph.find_nodes(op="placeholder"):
            if node.target not in declared:
                bound.graph.erase_node(node)
        return bound

    def _sizes_from_tokens(self) -> None:
        """Sizes read off attention_mask are read off input_ids: the mask may have no other reader."""
        tokens = _placeholder(self.program, "input_ids")
        for node in list(self.program.nodes(aten.sym_size.int)):
            source: Any = node.args[0]
            if source.op == "placeholder":
                node.replace_input_with(source, tokens)

    def _inputs(self) -> tuple[Input, ...]:
        inputs = [v for v in self.program.inputs if v.name != "attention_mask" or self._mask_is_read()]
        rows: tuple[str, str | int] = ("B", "C")
        if self.paging is None:
            inputs.append(Input(KEY_MASK, torch.bool, ("B", "T")))
        else:
            inputs += [Input(TABLE, torch.int32, ("B", "P")), Input(LENGTHS, torch.int64, ("B",))]
            rows = ("N", self.paging.size)
        for index, slot in enumerate(self.slots):
            for kind in slot.tensors:
                inputs.append(Input(f"{kind.name}_{index}", kind.dtype, self._shape(slot, kind, *rows)))
        return tuple(inputs)

    def _shape(self, slot: Slot, kind: Tensors, first: str, tokens: str | int) -> tuple[str | int, ...]:
        if kind.tokens > 1:
            tokens = tokens // kind.tokens if isinstance(tokens, int) else "K"
        return (first, slot.heads, tokens, *kind.width)

    def _mask_is_read(self) -> bool:
        """Whether anything beside attention looks at attention_mask."""
        masks = {argument(node, "key_mask") for node in self.program.attention_nodes()}
        pending = list(_placeholder(self.program, "attention_mask").users)
        while pending:
            node = pending.pop()
            if node.op == "output" or (node not in masks and not node.users):
                return True
            if node in masks:
                if any(user not in self.program.attention_nodes() for user in node.users):
                    return True
            else:
                pending += node.users
        return False

    def _with_inputs(self) -> Program:
        """The same graph, as a Program with the cache's inputs; the types that its nodes have stay valid."""
        graph, inputs = self.program.graph, self._inputs()
        names = [str(node.target) for node in graph.find_nodes(op="placeholder")]
        last = _placeholder(self.program, names[-1])
        typer = self.program.typer.extended(inputs)
        for value in inputs:
            if value.name not in names:
                with graph.inserting_after(last):
                    last = graph.placeholder(value.name)
                last.meta["val"] = typer.inputs[value.name]
        bound = Program(graph, self.program.weights, inputs, self.program.facts)
        bound.typer = typer
        return bound

    def _replace(self, bound: Program, node: fx.Node, start: fx.Node | None) -> None:
        k, v = argument(node, "k"), argument(node, "v")
        index = self.pairs[k, v]
        held = {kind.name: _placeholder(bound, f"{kind.name}_{index}") for kind in self.slots[index].tensors}
        caches = (held["k_cache"], held["v_cache"])
        more = (argument(node, "sinks"), argument(node, "slopes"), *map(held.get, ("k_scale", "v_scale", "k_bounds")))
        options = {name: node.kwargs[name] for name in _OPTIONS if name in node.kwargs}
        parts = rounded(k), rounded(v)
        stood_for = [node.name]
        if all(parts):  # the cache rounds
            k, v = (part.x for part in parts if part is not None)
            stood_for += [each.name for part in parts if part is not None for each in part.nodes]
        target, places = slim.cached_attention.default, (start, self._mask(bound, node))
        if self.paging is not None:
            target, places = slim.paged_attention.default, (_placeholder(bound, TABLE), _placeholder(bound, LENGTHS))
            options |= self._paged_options(bound, node)
        if self.eviction is not None:
            options |= {"mass": held["mass"], "votes": self.eviction.votes}
        new = bound.insert(node, target, argument(node, "q"), k, v, *caches, *places, *more, like=node, **options)
        new.meta["stands_for"] = stood_for
        node.replace_all_uses_with(new)
        bound.graph.erase_node(node)

    def _mask(self, bound: Program, node: fx.Node) -> fx.Node | None:
        return _placeholder(bound, KEY_MASK) if self.masked and argument(node, "key_mask") is not None else None

    def _paged_options(self, bound: Program, node: fx.Node) -> dict[str, Any]:
        paging = self.paging
        assert paging is not None
        if paging.window is None:
            return {}
        options: dict[str, Any] = {"fixed": paging.fixed, "pattern": paging.pattern}
        if paging.sinks:
            if self.nearer is None:
                self.nearer = sinks.Nearer(bound, paging.window + paging.sinks - 1)
            first = self.nearer.queries(node, argument(node, "q"))
            options |= {} if first is None else {"q_first": first, "first": paging.sinks}
        return options


def _placeholder(program: Program, name: str) -> fx.Node:
    return next(iter(program.graph.find_nodes(op="placeholder", target=name)))


def _start(program: Program) -> fx.Node:
    """How many tokens the cache holds: all keys but the new ones."""
    mask, tokens = _placeholder(program, KEY_MASK), _placeholder(program, "input_ids")
    first = next(node for node in program.graph.nodes if node.op != "placeholder")
    keys = program.insert(first, aten.sym_size.int, mask, 1, like=mask)
    new = program.insert(first, aten.sym_size.int, tokens, 1, like=tokens)
    return program.insert(first, operator.sub, keys, new, like=mask)


def cache_slots(program: Program, bits: int = 0, mass: bool = False) -> tuple[Slot, ...]:
    """What the cache of a Program holds, bound or not: a slot for every pair of keys and values.

    Args:
        bits: of numbers where the Program does not round its keys and values itself.
        mass: whether a Program that is not bound is to count what each key gets of attention.

    Raises:
        CacheUnsupported: for 4 bits and heads of odd width.
    """
    pairs: dict[tuple[fx.Node, fx.Node], fx.Node] = {}
    for node in program.attention_nodes():
        pairs.setdefault((argument(node, "k"), argument(node, "v")), node)
    return tuple(_slot(node, bits, mass) for node in pairs.values())


def _slot(node: fx.Node, bits: int, mass: bool) -> Slot:
    k, v = (argument(node, name).meta["val"] for name in ("k", "v"))
    if node.target is not slim.attention.default:
        mass = argument(node, "mass") is not None
        sides = tuple(bits_of(argument(node, f"{name}_cache").meta["val"].dtype) for name in ("k", "v"))
    else:
        sides = pair_bits(node)
        sides = sides if all(sides) else (bits, bits)
    pattern = argument(node, "pattern")
    top = None if pattern is None else read_pattern(pattern).top
    widths, bounds = (int(k.shape[3]), int(v.shape[3])), 0 if top is None else top.size
    slot = Slot(int(k.shape[1]), *widths, k.dtype, sides[0], sides[1], bounds, mass)
    for width, each in ((slot.key_width, slot.key_bits), (slot.value_width, slot.value_bits)):
        if each == 4 and width % 2:
            reason = f"int4 keeps two numbers in a byte, and heads of layer {node.kwargs['layer']} are {width} wide"
            raise errors.CacheUnsupported(reason=reason, where=where(node))
    return slot


# -- the last token alone ----------------------------------------------------------------------------------------------


def _keep_last(program: Program) -> None:
    """Drops all tokens but the last ahead of the head: the linear that the first output is made of."""
    head = head_of(program)
    if head is None:
        return  # then all tokens are computed, and the caller takes the last
    tokens = _placeholder(program, "input_ids")
    length = program.insert(head, aten.sym_size.int, tokens, 1, like=head)
    before = program.insert(head, operator.sub, length, 1, like=head)
    hidden = head.args[0]
    head.update_arg(0, program.insert(head, aten.slice.Tensor, hidden, 1, before, length, like=head))
    node: fx.Node | None = head
    while node is not None:  # what follows is now one token long
        node.meta["val"] = program.typer.value(node, program.weights)
        node = next(iter(node.users), None)


def head_of(program: Program) -> fx.Node | None:
    """The linear over [B, S, width] that only the first output depends on, through nothing but pointwise operations."""
    node: Any = program.graph.output_node().args[0][0]  # type: ignore[index]
    while isinstance(node, fx.Node) and len(node.users) == 1:
        if node.target is aten.linear.default:
            return node if node.meta["val"].dim() == 3 else None
        computed = [n for n in node.all_input_nodes if n.op == "call_function"]
        if len(computed) != 1 or torch.Tag.pointwise not in getattr(node.target, "tags", ()):
            return None
        node = computed[0]
    return None
