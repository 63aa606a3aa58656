"""A probe: one small seeded batch on which two Programs of the same inputs are compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from slim.compiler.blocks import row_blocks
from slim.compiler.program import Program
from slim.compiler.types import Input, expression
from slim.compiler.weights import Derived

# Two rows of thirteen tokens, one of them padded by four: enough for masks, positions and every layer to matter,
# and small beside the weights that have to be read anyway.
ROWS, TOKENS, PADS = 2, 13, 4
_OTHER_SIZES = (3, 5, 7, 11, 17)

Outputs = tuple[Any, ...]


@dataclass(frozen=True, eq=False)
class Probe:
    """Inputs for a Program, and which of its results belong to real tokens.

    Attributes:
        inputs: one value an input, in the order of ``program.inputs``.
        real: bool [B, S], False at padding; None where the Program has no attention mask.
        by_token: for each flat output, whether its first two dimensions are [B, S].
    """

    inputs: tuple[Tensor, ...]
    real: Tensor | None
    by_token: tuple[bool, ...]

    def run(self, program: Program) -> Outputs:
        """The flat outputs; weights on disk pass through memory one at a time."""
        return program.run(*self.inputs)

    def error(self, before: Outputs, after: Outputs) -> float:
        """max |before - after| / max |before| on real tokens, the worst over all outputs.

        Infinite where the two are not finite in the same places, or where anything but a float differs.
        """
        return max((self._error(*pair) for pair in zip(before, after, self.by_token, strict=True)), default=0.0)

    def _error(self, before: Any, after: Any, by_token: bool) -> float:
        if not isinstance(before, Tensor) or not isinstance(after, Tensor):
            return 0.0 if before == after else float("inf")
        if before.shape != after.shape:
            return float("inf")
        if by_token and self.real is not None:
            before, after = before[self.real], after[self.real]
        if not before.is_floating_point():
            return 0.0 if torch.equal(before, after) else float("inf")
        return _relative(before.float(), after.float())


def _relative(before: Tensor, after: Tensor) -> float:
    finite = before.isfinite()
    if not torch.equal(finite, after.isfinite()):
        return float("inf")
    before, after = before[finite], after[finite]
    if before.numel() == 0:
        return 0.0
    moved, largest = float((before - after).abs().max()), float(before.abs().max())
    if moved == 0.0:
        return 0.0
    return moved / largest if largest > 0.0 else float("inf")


def make_probe(
    program: Program, example: Sequence[Tensor] | None = None, seed: int = 0, *, tokens: int = TOKENS
) -> Probe:
    """A probe for ``program``: ``example`` where given, else random tokens, masks and positions that fit together.

    Args:
        example: one tensor an input of the Program, in its order, for inputs that random values do not suit.
        seed: the same seed gives the same probe.
        tokens: of a row; fewer where the model was made for fewer, ``TOKENS`` where it is not known for how many.
    """
    generator = torch.Generator().manual_seed(seed)
    maker = _Maker(program, generator, min(max(TOKENS, tokens), _made_for(program)))
    inputs = tuple(example) if example is not None else tuple(maker.value(item) for item in program.inputs)
    names = [item.name for item in program.inputs]
    real = inputs[names.index("attention_mask")].bool() if "attention_mask" in names else None
    return Probe(inputs, real if real is not None and real.dim() == 2 else None, _by_token(program))


def _made_for(program: Program) -> int:
    """Tokens that the model's configuration and its tables have positions for."""
    config = program.facts.config or {}
    limits = [program.facts.max_length, *(config.get(name) for name in ("max_position_embeddings", "n_positions"))]
    return min((limit for limit in limits if limit), default=TOKENS)


def _by_token(program: Program) -> tuple[bool, ...]:
    """Outputs whose first two dimensions are those of the attention mask, by their symbols and not by their sizes."""
    masks = [n.meta["val"] for n in program.graph.find_nodes(op="placeholder") if n.target == "attention_mask"]
    values = program.graph.output_node().args[0]
    flat = values if isinstance(values, (tuple, list)) else (values,)
    if not masks or masks[0].dim() != 2:
        return (False,) * len(flat)
    wanted = [expression(size, program.dims) for size in masks[0].shape]
    return tuple(_leading(program, value) == wanted for value in flat)


def _leading(program: Program, value: Any) -> list[Any]:
    type_ = value.meta["val"] if isinstance(value, fx.Node) else None
    if not isinstance(type_, Tensor):
        return []
    return [expression(size, program.dims) for size in type_.shape[:2]]


class _Maker:
    """Makes a value for each input from its name, type and use."""

    def __init__(self, program: Program, generator: torch.Generator, tokens: int) -> None:
        self.program = program
        self.generator = generator
        self.sizes = _sizes(program.inputs, tokens)

    def value(self, item: Input) -> Tensor:
        shape = tuple(self.sizes[dim] if isinstance(dim, str) else dim for dim in item.shape)
        if item.name == "attention_mask" and len(shape) == 2:
            return self._mask(shape).to(item.dtype)
        if item.name == "position_ids" and len(shape) == 2:
            return (self._mask(shape).cumsum(-1) - 1).clamp_min(0).to(item.dtype)
        if item.dtype.is_floating_point:
            return torch.randn(shape, generator=self.generator).to(item.dtype)
        if item.dtype == torch.bool:
            return torch.ones(shape, dtype=torch.bool)
        rows = self._rows_indexed_by(item.name)
        return torch.randint(0, rows, shape, generator=self.generator).to(item.dtype)

    def _mask(self, shape: tuple[int, ...]) -> Tensor:
        """The first row padded: on the left as generation pads, on the right as encoders do."""
        mask = torch.ones(shape, dtype=torch.long)
        pads = min(PADS, shape[1] - 1)
        if self.program.facts.kind == "causal_lm":
            mask[0, :pads] = 0
        else:
            mask[0, shape[1] - pads :] = 0
        return mask

    def _rows_indexed_by(self, name: str) -> int:
        """Rows of the smallest table that the input ``name`` picks rows from; 2 where there is none."""
        rows = []
        for node in self.program.nodes(torch.ops.aten.embedding.default):
            table, indices = node.args[0], node.args[1]
            if isinstance(indices, fx.Node) and indices.target == name and isinstance(table, fx.Node):
                rows.append(int(table.meta["val"].shape[0]))
        return min(rows, default=2)


def _sizes(inputs: tuple[Input, ...], tokens: int) -> Mapping[str, int]:
    """A size for every symbol: B rows, S tokens, and unlike ones for the rest."""
    symbols = dict.fromkeys(dim for item in inputs for dim in item.shape if isinstance(dim, str))
    others = [symbol for symbol in symbols if symbol not in ("B", "S")]
    return {"B": ROWS, "S": tokens} | {s: _OTHER_SIZES[i % len(_OTHER_SIZES)] for i, s in enumerate(others)}


def tolerance(program: Program) -> float:
    """How far a lossless pass may move the output: 1e-5 in float32, and as many roundings in a narrower type."""
    weights = program.weights
    held = {
        weights.dtype(name) for name in weights if weights.numel(name) > 1 and weights.dtype(name).is_floating_point
    }
    narrow = max((torch.finfo(dtype).eps for dtype in held), default=torch.finfo(torch.float32).eps)
    return max(1e-5, 8 * narrow)


def rounding_noise(probe: Probe, program: Program, outputs: Outputs) -> float:
    """How far ``outputs`` move when every float weight does by about one unit in its last place.

    Deep or badly conditioned models amplify rounding, in bfloat16 far beyond any fixed tolerance: this is what a
    change that is nothing but rounding looks like in this model. Costs one run.
    """
    shaken = program.copy()
    for name in list(shaken.weights):
        if shaken.weights.dtype(name).is_floating_point:
            shaken.weights[name] = _Shaken(shaken.weights.raw(name))
    return probe.error(outputs, probe.run(shaken))


@dataclass(frozen=True, eq=False)
class _Shaken(Derived):
    """A weight that is off by one part in 1/eps at most, the same each time it is read."""

    def load(self) -> Tensor:
        weight = self.source()
        generator = torch.Generator().manual_seed(weight.numel())
        flat, eps = weight.reshape(-1), torch.finfo(weight.dtype).eps
        out = torch.empty_like(flat)
        for part in row_blocks(flat.shape):
            noise = torch.rand(flat[part].shape, generator=generator).to(flat.device) * 2 - 1
            out[part] = (flat[part].float() * (1 + eps * noise)).to(flat.dtype)
        return out.view(weight.shape)
