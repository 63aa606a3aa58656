"""Rounds keys and values, so that the KV cache holds int8 or int4 numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx

from slim.compiler.dialect.kv import LEVELS
from slim.compiler.passes_base import FLOAT_KV, Context, Pass
from slim.compiler.program import Program
from slim.compiler.report import Report, Skip
from slim.compiler.rounded_kv import readers_of, round_before, rounded
from slim.compiler.rules import argument
from slim.compiler.statistics import calibration_of
from slim.compiler.statistics.attention import watch
from slim.compiler.statistics.batches import Batch, first_batches

aten, slim = torch.ops.aten, torch.ops.slim

_TOKENS = 8192  # of calibration that are looked at: means and errors of a layer need no more
_TOLERATED = 0.08  # of what attention returns: a layer's error from int4 keys above which they get int8


@dataclass(frozen=True)
class QuantizeKV(Pass):
    """Holds the keys and values of past tokens as int8 or int4 numbers, with a scale for each token of each head.

    In front of each attention, k and v [B, G, S, D] are rounded and restored by nodes of the graph, so that a plain
    forward shows what it costs; over a cache, the numbers and the scales are what it holds. int8: D + 4 bytes a token
    and head, int4: D / 2 + 4, against 4 D in float32.

    With calibration data a constant is taken off the keys of each head first: their mean over the calibration tokens,
    after rotation. It adds the same to all scores of a query, which softmax does not see, so that nothing has to be
    put back; what is left is smaller, and so is its rounding. (Not where attention has sinks or caps its scores.)

    Args:
        dtype: "int8" or "int4".
        keys: the format of keys where it is to be another one. None: that of ``dtype``, but int8 in layers where int4
            keys alone change what attention returns by more than 8 % on the calibration data (root mean square);
            the report names them. "int8" and "int4" decide for all layers, and need no calibration data.

    Raises:
        NeedsCalibration: for int4 with keys=None and nothing to measure on.

    Source: per-token, per-head rounding is that of Lin et al., QServe, 2024; the mean of the keys, Zhang et al.,
    SageAttention, 2024; that keys need more care than values, Liu et al., KIVI, 2024.

    Example:
        >>> slim.compile(model, passes=[QuantizeKV("int4")], calibration=texts)
    """

    dtype: Literal["int8", "int4"] = "int8"
    keys: Literal["int8", "int4"] | None = None

    invalidates = frozenset({FLOAT_KV})

    def run(self, program: Program, ctx: Context) -> Report:
        """Puts nodes in front of attention, and a weight for what is taken off the keys."""
        report = Report()
        nodes = list(self._choose(program, report))
        means: dict[fx.Node, Tensor] = {}
        wide: dict[fx.Node, float] = {}
        if nodes and (ctx.calibration is not None or (self.dtype == "int4" and self.keys is None)):
            batches = first_batches(calibration_of(program, ctx, self.name).batches, _TOKENS)
            report.notes.append(f"looked at {sum(batch.tokens for batch in batches):,} calibration tokens")
            means = _means(program, nodes, batches)
            if self.dtype == "int4" and self.keys is None:
                wide = {k: e for k, e in _errors(program, nodes, batches, means).items() if e > _TOLERATED}
        for node in ctx.track("rounding keys and values", nodes):
            self._rewrite(program, node, means, wide, report)
        return report

    def _choose(self, program: Program, report: Report) -> Sequence[fx.Node]:
        chosen = []
        for node in program.attention_nodes():
            reason = _objection(node)
            if reason:
                report.skipped.append(Skip(_name(node), reason))
            else:
                chosen.append(node)
        return chosen

    def _rewrite(
        self, program: Program, node: fx.Node, means: dict[fx.Node, Tensor], wide: dict[fx.Node, float], report: Report
    ) -> None:
        k, v = argument(node, "k"), argument(node, "v")
        if rounded(k) is None:  # or a layer that shares it came first
            bits = self._bits(k, self.keys or ("int8" if k in wide else self.dtype), "keys", node, report)
            if k in wide:
                text = f"{_name(node)}: keys are int8, as int4 ones change its result by {wide[k]:.0%}"
                report.notes.append(text)
            self._round(program, k, v, 0, bits, means.get(k), node)
        if rounded(argument(node, "v")) is None:
            bits = self._bits(v, self.dtype, "values", node, report)
            self._round(program, v, k, 1, bits, None, node)
        report.matched.append(_name(node))

    def _bits(self, x: fx.Node, wanted: str, what: str, node: fx.Node, report: Report) -> int:
        width = int(x.meta["val"].shape[3])
        if wanted == "int4" and width % 2:
            report.notes.append(f"{_name(node)}: {what} are int8, as int4 needs heads of even width, not {width}")
            return 8
        return 4 if wanted == "int4" else 8

    @staticmethod
    def _round(
        program: Program, x: fx.Node, other: fx.Node, place: int, bits: int, mean: Tensor | None, node: fx.Node
    ) -> None:
        """Rounds ``x`` for all attention nodes that read it as k (``place`` 0) or as v (1)."""
        name = ("k", "v")[place]
        readers = [reader for reader in readers_of(x) if argument(reader, name) is x]
        first = min(readers)  # fx orders nodes by their place in the graph
        source = x
        if mean is not None:
            offset = f"key_offset_{node.kwargs['layer']}"
            program.weights[offset] = mean.to(x.meta["val"].dtype)
            program.facts.constants.add(offset)
            program.weights.masks |= {offset}
            source = program.insert(first, aten.sub.Tensor, x, program.weight_node(offset), like=first)
        restored = round_before(program, first, source, bits)
        for reader in readers:
            reader.update_arg(1 + place, restored)


def _objection(node: fx.Node) -> str | None:
    if node.target is not slim.attention.default:
        return "it has a cache already"
    if not argument(node, "causal"):
        return "it looks at later tokens, so that no cache can hold its keys"
    values = [argument(node, name) for name in ("k", "v")]
    if any(rounded(value) is not None for value in values):
        return "its keys and values are rounded already"
    if not all(value.meta["val"].dtype.is_floating_point for value in values):
        return "its keys and values are no floats"
    if argument(node, "q").meta["val"].shape[2] != values[0].meta["val"].shape[2]:
        return "its keys are not those of its own tokens"
    return None


def _name(node: fx.Node) -> str:
    return f"attention of layer {node.kwargs['layer']}"


# -- looking at the calibration data -----------------------------------------------------------------------------------


def _means(program: Program, nodes: Sequence[fx.Node], batches: Sequence[Batch]) -> dict[fx.Node, Tensor]:
    """The mean [G, 1, D] of each k whose attentions all are blind to it."""
    sums: dict[fx.Node, Tensor] = {}
    counts: dict[fx.Node, int] = {}
    first = {argument(node, "k"): node for node in reversed(nodes) if _is_blind(argument(node, "k"))}
    for batch in batches:

        def seen(node: fx.Node, args: Any, kwargs: Any, result: Tensor, batch: Batch = batch) -> None:
            k = argument(node, "k")
            rows = args[1].double().transpose(1, 2)  # [B, S, G, D]
            rows = rows.flatten(0, 1) if batch.real is None else rows[batch.real]
            sums[k] = sums.get(k, 0) + rows.sum(0)
            counts[k] = counts.get(k, 0) + len(rows)

        watch(program, list(first.values()), batch, seen)
    means = {k: (total / counts[k])[:, None].float() for k, total in sums.items()}
    return {k: mean for k, mean in means.items() if bool(mean.isfinite().all())}


def _is_blind(k: fx.Node) -> bool:
    """Whether taking a constant off keys changes nothing: all their readers are a plain softmax away from it."""
    return all(
        argument(node, "v") is not k and argument(node, "sinks") is None and argument(node, "softcap") is None
        for node in readers_of(k)
    )


def _errors(
    program: Program, nodes: Sequence[fx.Node], batches: Sequence[Batch], means: dict[fx.Node, Tensor]
) -> dict[fx.Node, float]:
    """How far int4 keys move what attention returns, root mean square relative to itself; the worst of its readers."""
    moved: dict[fx.Node, Tensor] = {}
    size: dict[fx.Node, Tensor] = {}
    for batch in batches:

        def seen(node: fx.Node, args: Any, kwargs: Any, result: Tensor, batch: Batch = batch) -> None:
            k = args[1] if argument(node, "k") not in means else args[1] - means[argument(node, "k")].to(args[1].dtype)
            other = node.target(args[0], _rounded(k, 4), *args[2:], **kwargs)  # type: ignore[operator]
            for total, value in ((moved, other - result), (size, result)):
                rows = value.double().transpose(1, 2)
                rows = rows if batch.real is None else rows[batch.real]
                total[node] = total.get(node, torch.zeros((), dtype=torch.float64)) + rows.square().sum()

        watch(program, nodes, batch, seen)
    found: dict[fx.Node, float] = {}
    for node in nodes:
        error = float((moved[node] / size[node].clamp_min(torch.finfo(torch.float64).tiny)).sqrt())
        found[argument(node, "k")] = max(error, found.get(argument(node, "k"), 0.0))
    return found


def _rounded(x: Tensor, bits: int) -> Tensor:
    low, high = LEVELS[bits]
    step = slim.token_scale(x, bits=bits)
    return slim.dequantize(slim.quantize(x, step, axis=2, low=low, high=high), step, axis=2, dtype=x.dtype)
