"""How many channels of the residual stream go, and what the configuration says of those that are left."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from slim import errors
from slim.compiler.config import empty_model, is_valid
from slim.compiler.passes_base import Context
from slim.compiler.program import Program
from slim.compiler.report import Report
from slim.compiler.residual import Stream, find_stream, turn, untie
from slim.passes.pruning import channels, tied
from slim.passes.pruning.budget import TooMuch, multiple_of
from slim.passes.pruning.sites import block_parameters, block_weights
from slim.passes.pruning.tied import Tie

_WIDTHS = ("hidden_size", "n_embd", "d_model", "n_embed", "word_embed_proj_dim", "embedding_size")
_QUERIES = ("num_attention_heads", "n_head", "n_heads", "num_heads")


class Unsaid(Exception):
    """No configuration of transformers describes the model with a narrower stream."""


@dataclass(frozen=True)
class Sizes:
    """What a model holds, with the gain of a tied head's norm in the place of its matrix.

    Attributes:
        channel: by weight, the numbers that go with one channel. itemsize: of each.
        inside: the weights of blocks. blocks, whole: the numbers that these and all hold. nbytes: of all.
    """

    channel: dict[str, float]
    itemsize: dict[str, int]
    inside: frozenset[str]
    blocks: int
    whole: int
    nbytes: int

    @classmethod
    def of(cls, program: Program, stream: Stream, tie: Tie | None) -> Sizes:
        weights = program.weights
        own = {} if tie is None else {tie.weight: weights.numel(tie.weight)}
        channel = {name: weights.numel(name) / stream.width * n for name, n in stream.dims.items() if name not in own}
        itemsize = {name: weights.dtype(name).itemsize for name in channel}
        whole, nbytes = program.parameters - sum(own.values()), program.nbytes - sum(map(weights.nbytes, own))
        if tie is not None:
            channel[tie.gain], itemsize[tie.gain] = 1.0, tie.dtype.itemsize
            whole, nbytes = whole + stream.width, nbytes + stream.width * tie.dtype.itemsize
        inside = frozenset(block_weights(program)) - own.keys()
        return cls(channel, itemsize, inside, sum(map(weights.numel, inside)), whole, nbytes)


@dataclass(frozen=True)
class Narrowing:
    """Attributes:
    criterion: "obs": directions that readers need; "magnitude" and "random" take channels as they are.
    ratio, parameters, bytes: one of them: how much is to go, or what the whole model holds afterwards at most.
    """

    criterion: str
    fits: bool
    reload: bool
    multiple: int | None
    ratio: float | None
    parameters: int | None
    bytes: int | None
    asked_by: str

    def run(self, program: Program, tie: Tie | None, ctx: Context, report: Report) -> None:
        """Narrows the stream of ``program``, whose norms are folded.

        Raises:
            NoStream, TooMuch, Unsaid.
        """
        stream = find_stream(program)
        sizes = Sizes.of(program, stream, tie)
        was = stream.width
        left, config = self._left(program, stream, sizes)
        means = channels.centre(program, stream)
        kept = left - means
        self._turn(program, stream, kept, ctx)
        missing = self._fitted(program, stream, kept, ctx, report)
        channels.delete(program, stream, kept, means)
        if tie is not None:
            tied.join(program, stream, tie)
        if config is not None:
            program.facts.config = config
        elif program.facts.config is not None:
            report.notes.append("the configuration cannot say so: slim saves it, plain transformers cannot hold it")
        report.matched = list(stream.dims)
        report.notes.append(f"the residual stream: {was} to {left} channels{missing}")
        report.notes.append(
            f"{sizes.blocks - block_parameters(program):,} of the {sizes.blocks:,} parameters of blocks are gone, and "
            f"{sizes.whole - program.parameters:,} of all {sizes.whole:,}"
        )

    # -- how many ------------------------------------------------------------------------------------------------------

    def _left(self, program: Program, stream: Stream, sizes: Sizes) -> tuple[int, dict[str, Any] | None]:
        """How many channels stay, and the configuration that says so."""
        step = self.multiple or multiple_of(stream.width)
        most = int(self._most(stream, sizes) + 1e-9) // step * step
        if most < 2:
            raise TooMuch
        before = program.facts.config
        if before is None:
            return most, None
        for left in range(most, 1, -step):
            said = _said(program, stream, left)
            if said is not None and is_valid(program.facts, said):
                if _holds(program, stream, left, said):
                    return left, said
                break  # it does not depend on how many
            if not self.reload:
                break
        if self.reload:
            raise Unsaid
        return most, None

    def _most(self, stream: Stream, sizes: Sizes) -> float:
        """The number of channels at which as much as is to go is gone."""
        if self.ratio is not None:
            each = sum(size for name, size in sizes.channel.items() if name in sizes.inside)
            wanted = self.ratio * sizes.blocks
        elif self.parameters is not None:
            each, wanted = sum(sizes.channel.values()), sizes.whole - self.parameters
        else:
            assert self.bytes is not None
            each = sum(size * sizes.itemsize[name] for name, size in sizes.channel.items())
            wanted = sizes.nbytes - self.bytes
        return stream.width - max(wanted, 0) / each

    # -- which ---------------------------------------------------------------------------------------------------------

    def _turn(self, program: Program, stream: Stream, kept: int, ctx: Context) -> None:
        if self.criterion == "obs":
            basis = channels.directions(program, stream, kept, ctx, f"{self.asked_by}: directions")
        elif self.criterion == "magnitude":
            basis = channels.by_magnitude(program, stream)
        else:
            basis = channels.by_chance(stream)
        turn(program, stream, basis.T, basis)

    def _fitted(self, program: Program, stream: Stream, kept: int, ctx: Context, report: Report) -> str:
        dense = program.copy()
        channels.silence(program, stream, kept)
        if not self.fits:
            return ""
        fitting = channels.Fitting(program, dense, stream, kept)
        fitting.run(ctx, self.asked_by, report.notes)
        worst = max(fitting.missing, key=lambda name: fitting.missing[name])
        lost = sum(fitting.missing.values()) / len(fitting.missing)
        return f"; measured: linears lose {lost:.2%} of what they make, at most {fitting.missing[worst]:.2%} ({worst})"


def untied(program: Program) -> Iterator[str]:
    """Gives heads that cannot stay tied weights of their own, and says what that costs."""
    for name in untie(program):
        size, nbytes = program.weights.numel(name), program.weights.nbytes(name)
        yield f"{name} is no longer tied, as norms' gains lie in it: {size:,} parameters, {nbytes:,} bytes more"


# -- the configuration -------------------------------------------------------------------------------------------------


def _said(program: Program, stream: Stream, left: int) -> dict[str, Any] | None:
    """With a narrower stream, and the width of heads, which is otherwise taken to be the stream's by the heads."""
    config = program.facts.config
    assert config is not None
    widths = {name: left for name in _WIDTHS if config.get(name) == stream.width}
    heads = {int(node.meta["val"].shape[-1]) for node in program.attention_nodes()}
    if not widths or len(heads) > 1:
        return None
    said = {"head_dim": next(iter(heads))} if heads and any(name in config for name in _QUERIES) else {}
    return {**config, **widths, **said}


def _holds(program: Program, stream: Stream, left: int, config: dict[str, Any]) -> bool:
    """Whether the architecture has a place of the right size for everything."""
    facts = program.facts
    try:
        expected = empty_model(replace(facts, config=config)).state_dict()
    except (errors.UnsupportedModel, ValueError, TypeError):
        return False
    dims, sizes = stream.dims, dict[str, int]()
    squares = {str(node.args[1].target) for node in stream.squares}  # type: ignore[union-attr]
    for name in set(program.weights) - squares:  # that become gains
        base = facts.parts[name].base if name in facts.parts else name
        size = round(program.weights.numel(name) * (left / stream.width) ** dims.get(name, 0))
        sizes[base] = sizes.get(base, 0) + size
    known = {name: size for name, size in sizes.items() if name not in facts.constants}
    return all(name in expected and expected[name].numel() == size for name, size in known.items())
