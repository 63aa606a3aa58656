"""Writing merged heads into a Program: weights, shapes, types, the model's configuration."""

from __future__ import annotations

from torch import fx

from slim.compiler.config import KV_HEADS
from slim.compiler.program import Program
from slim.passes.heads.find import RESHAPES, Heads, Projection
from slim.passes.heads.layer import Made


def write_heads(program: Program, heads: Heads, made: Made, kv_heads: int) -> None:
    """Puts new weights in place; keys and values then have ``kv_heads`` heads, and every type says so."""
    for name, value in made.items():
        program.weights[name] = value.contiguous()
        node = program.weight_node(name)
        node.meta["val"] = program.typer.value(node, program.weights)
    for one in (heads.k, heads.v):
        for node in one.path:
            if node.target in RESHAPES:
                _say_heads(node, one, kv_heads)
        for node in (one.linear, *one.path):
            node.meta["val"] = program.typer.value(node, program.weights)


def _say_heads(node: fx.Node, one: Projection, kv_heads: int) -> None:
    """The reshape that cuts rows into heads may name how many there are."""
    shape = list(node.args[1])  # type: ignore[arg-type]
    source = node.args[0].meta["val"].shape  # type: ignore[union-attr]
    if len(shape) == 4 and len(source) < 4 and shape[2] == one.heads:
        shape[2] = kv_heads
    elif shape[-1] == one.heads * one.width:
        shape[-1] = kv_heads * one.width
    node.args = (node.args[0], shape, *node.args[2:])


def write_config(program: Program, before: set[int], after: set[int]) -> str | None:
    """Keeps the model's configuration true where all layers have one number of kv heads; a note where it cannot be.

    Args:
        before, after: the numbers of kv heads that layers had, and have.
    """
    config = program.facts.config
    if config is None:
        return None
    fields = [name for name in KV_HEADS if name in config and {config[name]} == before]
    if len(after) > 1:
        return "its layers differ in kv heads, which plain transformers cannot say: such a model exports to slim alone"
    if not fields:
        return "its configuration has no field for kv heads: plain transformers cannot hold the result"
    for name in fields:
        config[name] = next(iter(after))
    return None
