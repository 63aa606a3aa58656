"""Which whole blocks a model misses least."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, fx

from slim.compiler.config import is_valid
from slim.compiler.objective import Objective
from slim.compiler.passes_base import Context
from slim.compiler.program import Program, Streaming
from slim.compiler.report import Skip
from slim.compiler.stack import Block, Settings, bypass
from slim.compiler.statistics.batches import Batch, first_batches

TOKENS = 4096  # of the calibration data, at most: every block that is tried reads all of them
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


def may_go(blocks: Sequence[Block], protect: Sequence[str]) -> tuple[list[Block], list[Skip]]:
    """The blocks that no pattern of ``protect`` names, and the others."""
    found, skips = list[Block](), list[Skip]()
    for block in blocks:
        named = next((p for p in protect for name in block.weights if fnmatchcase(name, p)), None)
        if named is None:
            found.append(block)
        else:
            skips.append(Skip(str(block), f"{named!r} protects it"))
    return found, skips


def by_loss(
    program: Program, blocks: Sequence[Block], count: int, batches: Sequence[Batch], ctx: Context
) -> dict[Block, float]:
    """``count`` blocks, each the one whose loss moves the output least once those before it are gone; and how far.

    Nats a token of language models, else the relative square; of the output with all blocks so far gone.

    Source: Song et al., SLEB, 2024.
    """
    objective, used = Objective.of(program), first_batches(batches, TOKENS)
    expected = [program.run(*batch.inputs) for batch in used]

    def moved(without: Sequence[Block]) -> float:
        smaller, same = _copied(program)
        gone = set(without)
        bypass([block for block in blocks if block in gone], same)
        smaller.clean()
        pairs = zip(used, expected, strict=True)
        return sum(float(objective.loss(smaller.run(*batch.inputs), wanted, batch)) for batch, wanted in pairs) / len(
            used
        )

    gone: dict[Block, float] = {}
    for _ in ctx.track("leaving out blocks", range(count)):
        tried = {block: moved([*gone, block]) for block in blocks if block not in gone}
        least = min(tried, key=tried.__getitem__)
        gone[least] = tried[least]
    return gone


def by_influence(
    program: Program, blocks: Sequence[Block], count: int, batches: Sequence[Batch], ctx: Context
) -> dict[Block, float]:
    """The ``count`` blocks that turn what they read least: 1 - E cos(x, y) of each, from one run of the model.

    Source: Men et al., ShortGPT, 2024: block influence.
    """
    watching = _Watching(program, blocks)
    for batch in ctx.track("measuring blocks", first_batches(batches, TOKENS)):
        watching.real = batch.real
        watching.run(*batch.inputs)
    influence = {block: 1 - watching.cosines[block] / watching.rows for block in blocks}
    return {block: influence[block] for block in sorted(blocks, key=influence.__getitem__)[:count]}


class _Watching(Streaming):
    """Sums the cosines between what each block reads and what it makes; ``rows`` of them went by."""

    def __init__(self, program: Program, blocks: Sequence[Block]) -> None:
        super().__init__(program)
        self.cosines = dict.fromkeys(blocks, 0.0)
        self.rows = 0
        self.real: Tensor | None = None
        self._ends = {block.exit: block for block in blocks}
        self._entries = {block.entry for block in blocks}
        self._held: dict[fx.Node, Tensor] = {}

    def run(self, *args: Any, **options: Any) -> Any:
        self._held.clear()
        with torch.no_grad():
            return super().run(*args, **options)

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n in self._ends:
            block = self._ends[n]
            cosines = torch.cosine_similarity(self._held.pop(block.entry).float(), value.float(), dim=-1)
            if self.real is not None and cosines.shape == self.real.shape:
                cosines = cosines[self.real]
            self.cosines[block] += float(cosines.double().sum())
            if block is next(iter(self.cosines)):
                self.rows += cosines.numel()
        if n in self._entries:
            self._held[n] = value
        return value


def _copied(program: Program) -> tuple[Program, dict[fx.Node, fx.Node]]:
    """A copy, and its nodes by those of the original."""
    other = program.copy()
    return other, dict(zip(program.graph.nodes, other.graph.nodes, strict=True))


# -- what the configuration says ---------------------------------------------------------------------------------------


def shortened(program: Program, blocks: Sequence[Block], gone: Mapping[Block, float]) -> dict[str, Any] | str:
    """The configuration of the model without the blocks ``gone``; or why there is none. Asked before they are gone.

    Args:
        blocks: all of them, in order.
    """
    config = program.facts.config
    assert config is not None
    if blocks[0].prefix is None:
        return "the weights of its blocks are not numbered"
    total = max(number for block in blocks for number in block.numbers) + 1
    fields = [name for name in _LAYERS if config.get(name) == total]
    if not fields:
        return "it has no field that holds their number"
    lost = {number for block in gone for number in block.numbers}
    left = [number for number in range(total) if number not in lost]
    told = {
        name: [value[number] for number in left]
        for name, value in config.items()
        if isinstance(value, list) and len(value) == total and "layer" in name
    }
    if "attention_types" in config and "attention_layers" in told:  # GPT-Neo says it twice
        told["attention_types"] = [[[kind], 1] for kind in told["attention_layers"]]
    if not told and not _same_settings(program, blocks, gone):
        return "its layers differ in order, and it cannot say which are left"
    said = {**config, **told, **dict.fromkeys(fields, len(left))}
    if not is_valid(replace(program.facts), said):
        return "transformers does not take it with so few layers"
    return said


def _same_settings(program: Program, blocks: Sequence[Block], gone: Mapping[Block, float]) -> bool:
    """Whether the blocks that are left do in order what the first ones of a shorter model do."""
    settings = Settings(program)
    told = [settings.of(block) for block in blocks]
    left = [each for block, each in zip(blocks, told, strict=True) if block not in gone]
    return left == told[: len(left)]
