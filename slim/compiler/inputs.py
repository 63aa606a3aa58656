"""Inputs of a language model: what must hold of them, found in the graph, and the positions they stand at."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from slim import errors
from slim.compiler.program import Program

aten, slim = torch.ops.aten, torch.ops.slim

_LOOKUPS = frozenset({aten.embedding.default, aten.index_select.default, aten.index.Tensor})


def vocabulary(program: Program) -> int | None:
    """Rows of the smallest table that token ids are looked up in."""
    rows = [table.meta["val"].shape[0] for table, ids in _lookups(program) if _sources(ids) == {"input_ids"}]
    return min(map(int, rows), default=None)


POSITIONS = "the positions of the model,"  # what a prompt may be too long for, before their number


def position_limit(program: Program) -> int | None:
    """How many positions the model has learned or tabulated; None where nothing but training limits them."""
    limits = [program.facts.max_length]
    for table, ids in _lookups(program):
        if _sources(ids) == {"position_ids"}:
            limits.append(_positions_within(ids, int(table.meta["val"].shape[0])))
    return min((limit for limit in limits if limit is not None), default=None)


def _lookups(program: Program) -> list[tuple[fx.Node, fx.Node]]:
    """Every (table, indices) of the graph, whose tables are weights or made of weights."""
    found = []
    for node in program.nodes(*_LOOKUPS):
        indices: Any = node.args[2] if node.target is aten.index_select.default else node.args[1]
        if isinstance(indices, (list, tuple)):
            indices = indices[0]
        table = node.args[0]
        if isinstance(indices, fx.Node) and isinstance(table, fx.Node) and not _sources(table):
            found.append((table, indices))
    return found


def _sources(node: fx.Node) -> set[str]:
    """The inputs whose values ``node`` is computed from; sizes do not count."""
    names: set[str] = set()
    pending, seen = [node], set()
    while pending:
        here = pending.pop()
        if here in seen or not isinstance(here.meta.get("val"), (Tensor, tuple, list)):
            continue
        seen.add(here)
        if here.op == "placeholder":
            names.add(str(here.target))
        pending += here.all_input_nodes
    return names


def _positions_within(indices: fx.Node, rows: int) -> int:
    """How many positions, from 0, come out as an index below ``rows``: the graph of the indices is run on them all."""
    positions = torch.arange(rows + 1)[None]
    try:
        values = evaluate(indices, {"position_ids": positions, "input_ids": positions}).reshape(-1)
    except KeyError:  # it reads a weight: then nothing is known, and looking up says so itself
        return rows
    outside = (values >= rows).nonzero()
    return int(outside[0]) if len(outside) else rows


def evaluate(node: fx.Node, inputs: dict[str, Tensor]) -> Any:
    """The value of ``node`` for some inputs; KeyError where it needs more than they say."""
    if node.op == "placeholder":
        return inputs[str(node.target)]
    if node.op != "call_function":
        raise KeyError(node.op)
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: evaluate(n, inputs))
    return node.target(*args, **kwargs)  # type: ignore[operator]


def checked_tokens(tokens: Any, vocab: int | None, argument: str = "input_ids") -> Tensor:
    """``tokens`` as int64 [B, S].

    Raises:
        BadInput: for another type or shape. EmptyPrompt. TokenOutOfRange: naming token and position.
    """
    if not isinstance(tokens, Tensor):
        reason = f"it must be a tensor of token ids, not {type(tokens).__name__}"
        raise errors.BadInput(argument=argument, reason=reason)
    if tokens.dim() != 2 or tokens.is_floating_point() or tokens.dtype == torch.bool:
        reason = f"it must be integers [batch, length], not {tokens.dtype} {list(tokens.shape)}"
        raise errors.BadInput(argument=argument, reason=reason)
    if tokens.numel() == 0:
        raise errors.EmptyPrompt()
    low, high = torch.aminmax(tokens)
    if low < 0 or (vocab is not None and high >= vocab):
        _refuse_token(tokens, vocab)
    return tokens.long()


def _refuse_token(tokens: Tensor, vocab: int | None) -> None:
    outside = tokens < 0 if vocab is None else (tokens < 0) | (tokens >= vocab)
    row, column = outside.nonzero()[0].tolist()
    position = column if tokens.shape[0] == 1 else (row, column)
    raise errors.TokenOutOfRange(token=int(tokens[row, column]), position=position, vocab=vocab or 0)


def checked_mask(mask: Any, tokens: Tensor, past: int = 0) -> Tensor:
    """``mask`` as int64 [B, past + S], 1 at tokens and 0 at padding; raises BadInput for any other shape."""
    expected = (tokens.shape[0], past + tokens.shape[1])
    if not isinstance(mask, Tensor) or tuple(mask.shape) != expected:
        found = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        reason = f"it must be a tensor {list(expected)} (batch, all tokens so far), not {found}"
        raise errors.BadInput(argument="attention_mask", reason=reason)
    return (mask != 0).long()


def checked_positions(positions: Any, tokens: Tensor, limit: int | None) -> Tensor:
    """``positions`` as int64 [B, S]; a single row serves the whole batch.

    Raises:
        BadInput: for another shape. PromptTooLong: beyond the model's table of positions.
    """
    if not isinstance(positions, Tensor) or positions.shape[-1] != tokens.shape[1] or positions.dim() > 2:
        reason = f"they must be a tensor {list(tokens.shape)}, one position a token"
        raise errors.BadInput(argument="position_ids", reason=reason)
    if limit is not None and int(positions.max()) >= limit:
        raise errors.PromptTooLong(length=int(positions.max()) + 1, capacity=limit, room=POSITIONS)
    return positions.long().expand(tokens.shape)
