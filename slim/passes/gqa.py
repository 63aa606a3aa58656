"""Merges kv heads: multi-head attention becomes grouped-query attention, without training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NoReturn, cast

import torch
from torch import Tensor, fx

from slim import errors
from slim.compiler.charts import Chart
from slim.compiler.cost import cost
from slim.compiler.parts import place_parts
from slim.compiler.passes_base import FLOAT_KV, FLOAT_WEIGHTS, KNOWN_HEADS, STATISTICS, WHOLE_WEIGHTS, Context, Pass
from slim.compiler.program import Program
from slim.compiler.report import Report, Skip, short_bytes
from slim.compiler.statistics import SiteStatistics, calibration_of, walk
from slim.compiler.statistics.attention import Attended, attended
from slim.compiler.statistics.batches import Batch, first_batches, sequences
from slim.compiler.weights import Deferred
from slim.passes.heads.find import Heads, LeftAlone, find_heads
from slim.passes.heads.grouping import Groups, cheapest, contiguous
from slim.passes.heads.layer import Made, MergedLayer, Moments, Numbers, Stacks, as_weights, merge_layer, pooled
from slim.passes.heads.merge import Stack, aligned_mean
from slim.passes.heads.pictures import losses_chart, spectra_chart
from slim.passes.heads.plan import damages, numbers_a_token, share_out
from slim.passes.heads.refit import refit
from slim.passes.heads.together import Fit, fit_together
from slim.passes.heads.write import write_config, write_heads


@dataclass(frozen=True)
class GQA(Pass):
    """Merges kv heads, so that there are fewer keys and values to compute, to cache and to read.

    Each group of kv heads becomes one, in a basis that loses least of what the group does on the calibration data.
    Values: the joint SVD of all M_h = W_o^h W_v^h of the group, whitened by the layer's input, so that the new W_v
    spans the best shared subspace and each new W_o^h reads it as the old one did. Keys that RoPE rotates: the same
    for each frequency by itself, a pair of channels being one complex channel, because only complex factors commute
    with the rotation; queries absorb the factors. Keys, or channels of them, that are not rotated: the joint SVD of
    W_q^h^T W_k^h. Heads that cost least together are grouped (query heads are permuted accordingly), layers are
    merged one after the other, each on the input that the merged ones before it give, and W_o is then fitted by least
    squares to what it returned in the original. Heads that differ by nothing but such a change of basis merge exactly.
    Then queries, keys, values and the output of each layer are fitted together, by rounds of Gauss-Newton, so that the
    residual stream that the layer adds to is again what it was.

    Shapes: W_k and W_v [G D, n] and their biases get fewer rows; W_q and W_o keep theirs. ``num_key_value_heads`` of
    the configuration follows where all layers agree, and the result then loads in plain transformers.

    A layer is left alone, and the report says why, where a learned norm of queries or keys follows the heads (unless
    method is "mean"), where another layer reads its keys, where q, k and v are not plain linears (MLA), and where its
    kv heads do not divide into the groups asked for.

    Args:
        kv_heads: how many each layer keeps: a number for all; a share of what it has, in (0, 1), rounded down to a
            divisor; or a list with a number for every attention layer in the order of execution.
            "auto": as many for each layer as its share of ``kv_bytes`` allows. Layers that lose much when they are
            merged alone, measured at one head and predicted between, keep more of theirs (greedy along the lower
            convex hulls of loss over bytes). Such a result is saved by slim, and no config of transformers holds it.
        method: "aligned" is the above. Baselines: "procrustes" turns heads towards each other (each RoPE pair by an
            angle), takes the mean and restores its norm; "mean" takes the mean of neighbours as they are, and needs
            no calibration. They fit nothing anew.
        rounds: of Gauss-Newton, each over calibration text of its own (8,192 tokens, where there are as many). None is
            three where heads are "aligned". 0 is much faster: the closed forms alone.
        kv_bytes: for "auto": the share of all keys' and values' bytes that is kept, in (0, 1).

    Source: the closed forms are this project's own (docs/gqa.md). Mean pooling: Ainslie et al., GQA, 2023.
    Procrustes, mean and norm: Jin et al., Align Attention Heads Before Merging Them, 2024.

    Example:
        >>> slim.compile(model, passes=[GQA(2)], calibration=texts)
        >>> slim.compile(model, passes=[GQA("auto", kv_bytes=0.25)], calibration=texts)
    """

    kv_heads: int | float | tuple[int, ...] | Literal["auto"]
    method: Literal["aligned", "procrustes", "mean"] = "aligned"
    kv_bytes: float | None = None
    rounds: int | None = None

    requires = frozenset({FLOAT_WEIGHTS, WHOLE_WEIGHTS, FLOAT_KV, KNOWN_HEADS, STATISTICS})

    def check(self) -> None:
        """Refuses numbers of heads that no layer can have, and options that nothing uses."""
        if self.rounds is not None and (self.rounds < 0 or self.method != "aligned"):
            self._refuse('it is a number of rounds of fitting, and only method="aligned" fits anything', "rounds")
        if self.kv_heads == "auto":
            self._check_budget()
            return
        if self.kv_bytes is not None:
            self._refuse(f"it is for kv_heads='auto', and kv_heads is {self.kv_heads}", "kv_bytes")
        if isinstance(self.kv_heads, float) and not 0.0 < self.kv_heads < 1.0:
            self._refuse(f"a share of the heads lies between 0 and 1, and {self.kv_heads} does not")
        numbers = self.kv_heads if isinstance(self.kv_heads, tuple) else (self.kv_heads,)
        if not numbers or min(numbers) <= 0:
            self._refuse("a layer keeps one kv head at least")

    def _check_budget(self) -> None:
        if self.method == "mean":
            self._refuse("means need no calibration, and 'auto' measures on it what layers lose")
        if self.kv_bytes is None or not 0.0 < self.kv_bytes < 1.0:
            self._refuse(f"'auto' needs a share between 0 and 1, and {self.kv_bytes} is none", "kv_bytes")

    def _refuse(self, reason: str, option: str = "kv_heads") -> NoReturn:
        raise errors.BadPassOption(pass_name=self.name, option=option, reason=reason)

    def run(self, program: Program, ctx: Context) -> Report:
        """Changes the weights of attention layers, the shapes behind them, and ``facts.config``."""
        report = Report()
        before, held, meant = _kv_bytes(program), _kv_heads(program), program.copy()
        layers = list(self._layers(program, report))
        if self.method == "aligned" and layers:
            _look(program, layers, self._batches(program, ctx))
        if self.kv_heads == "auto" and layers:
            layers = self._planned(program, ctx, layers, report)
        merged = (
            self._pooled(program, ctx, layers) if self.method == "mean" else self._walked(program, ctx, layers, report)
        )
        done = list(merged)
        if self._rounds and done:
            self._fit_together(program, meant, ctx, done, report)
        for layer in done:
            place_parts(program, layer.heads.weights)
            report.matched.append(layer.heads.site)
            report.notes.append(str(layer))
        report.charts = _charts(done)
        program.infer()
        if layers:
            note = write_config(program, held, _kv_heads(program))
            report.notes += [] if note is None else [note]
            after = short_bytes(_kv_bytes(program))
            report.notes.append(f"keys and values of a token take {after}; they took {short_bytes(before)}")
        return report

    # -- choosing --------------------------------------------------------------------------------------------------

    def _layers(self, program: Program, report: Report) -> Iterator[_Layer]:
        """The layers to merge; the others go into the report with the reason."""
        nodes = program.attention_nodes()
        if isinstance(self.kv_heads, tuple) and len(self.kv_heads) != len(nodes):
            self._refuse(f"it names {len(self.kv_heads)} layers, and this model has {len(nodes)}")
        for index, node in enumerate(nodes):
            try:
                heads = find_heads(program, node)
                wanted = self._wanted(index, heads.k.heads)
                self._check_basis(heads)
            except LeftAlone as reason:
                report.skipped.append(Skip(node.meta.get("module") or node.name, str(reason)))
                continue
            yield _Layer(index, heads, wanted, program.weights.raw(heads.out_weight))

    def _wanted(self, index: int, held: int) -> int:
        """How many of its ``held`` kv heads a layer is to keep."""
        if self.kv_heads == "auto":
            wanted = 1  # at first: what is left of it depends on the others
        elif isinstance(self.kv_heads, float):
            wanted = max((n for n in range(1, held) if held % n == 0 and n <= self.kv_heads * held), default=1)
        else:
            wanted = self.kv_heads[index] if isinstance(self.kv_heads, tuple) else self.kv_heads
        if wanted >= held:
            raise LeftAlone(f"it has no more than {held} kv head{'s' * (held > 1)}")
        if held % wanted:
            raise LeftAlone(f"its {held} kv heads do not divide into {wanted} groups")
        return wanted

    def _check_basis(self, heads: Heads) -> None:
        """Refuses layers whose heads can be given no common basis."""
        if self.method == "mean":
            return
        for one in (heads.q, heads.k, heads.v):
            if one.norm is not None:
                raise LeftAlone(
                    f"a norm follows its {one.what}, and heads that are normed one by one have no common basis "
                    '(method="mean" merges them as they are)'
                )
        if len({one.linear.args[0] for one in (heads.q, heads.k, heads.v)}) > 1:
            raise LeftAlone("its queries, keys and values are made of different rows")

    # -- merging ---------------------------------------------------------------------------------------------------

    def _pooled(self, program: Program, ctx: Context, layers: Sequence[_Layer]) -> Iterator[_Layer]:
        """Merges every layer into means."""
        for layer in ctx.track("merging kv heads", layers):
            write_heads(program, layer.heads, pooled(program, layer.heads, layer.kv_heads), layer.kv_heads)
            yield layer

    def _walked(self, program: Program, ctx: Context, layers: Sequence[_Layer], report: Report) -> Iterator[_Layer]:
        """Merges every layer on what its input has become by then, and fits what reads it."""
        if not layers:
            return
        fits = self.method == "aligned"
        steps: dict[fx.Node, tuple[_Layer, Callable[[Program, _Layer, SiteStatistics], Made]]] = {}
        for layer in layers:
            steps[layer.rows_in] = (layer, self._merge)
            if fits:
                steps[layer.rows_out] = (layer, _fit)
        blocks = walk(
            program, list(steps), ctx, asked_by=repr(self), gram=True, cross=fits, dense=fits, grain="site",
            notes=report.notes,
        )  # fmt: skip
        for block in blocks:
            (site,) = block.values
            layer, step = steps[site]
            if not block.restored:
                block.results.update(step(program, layer, block.statistics[site]))
            layer.take(program, block.results)
            if step is _fit or not fits:
                yield layer

    def _merge(self, program: Program, layer: _Layer, statistics: SiteStatistics) -> Made:
        stacks, merged = self._merged(program, layer, statistics, layer.kv_heads)
        told = {_KEYS: torch.tensor(merged.key_loss), _VALUES: torch.tensor(merged.value_loss)}
        told |= {_SPECTRUM: stacks.values.spectrum(), _GROUPS: torch.tensor(merged.groups)}
        return told | as_weights(program, layer.heads, merged)

    def _merged(
        self, program: Program, layer: _Layer, statistics: SiteStatistics, kv_heads: int
    ) -> tuple[Stacks, MergedLayer]:
        numbers = Numbers.of(program, layer.heads, layer.attended)
        moments = Moments.of(statistics, layer.heads)
        stacks = Stacks.of(numbers, moments)
        groups = layer.groups(stacks, kv_heads)
        if self.method == "aligned":
            return stacks, merge_layer(numbers, stacks, groups, Stack.merge, moments)
        return stacks, merge_layer(numbers, stacks, groups, aligned_mean)

    @property
    def _rounds(self) -> int:
        return self.rounds if self.rounds is not None else _ROUNDS if self.method == "aligned" else 0

    def _fit_together(
        self, program: Program, meant: Program, ctx: Context, layers: Sequence[_Layer], report: Report
    ) -> None:
        """Rounds over layers that are merged already."""
        batches = calibration_of(program, ctx, repr(self)).batches
        if sum(1 for _ in sequences(batches)) < 2:
            report.notes.append(
                "calibration is one sequence, and rounds of fitting need another to be tried on: none ran"
            )
            return
        heads = [layer.heads for layer in layers]
        fits = fit_together(program, meant, heads, batches, ctx, self._rounds, repr(self))
        for layer, fit in zip(sorted(layers, key=lambda one: one.heads.attention), fits, strict=True):
            layer.fit = fit

    # -- under a budget --------------------------------------------------------------------------------------------

    def _batches(self, program: Program, ctx: Context) -> list[Batch]:
        return first_batches(calibration_of(program, ctx, repr(self)).batches, _LOOKED_AT)

    def _planned(self, program: Program, ctx: Context, layers: Sequence[_Layer], report: Report) -> list[_Layer]:
        """The layers that lose heads to the budget, with the heads that they keep."""
        by_site = {layer.heads.site: layer for layer in layers}

        def merge(heads: Heads, statistics: SiteStatistics, kv_heads: int) -> MergedLayer:
            return self._merged(program, by_site[heads.site], statistics, kv_heads)[1]

        heads = [layer.heads for layer in layers]
        lost = damages(program, ctx, heads, self._batches(program, ctx), merge, repr(self))
        held = [numbers_a_token(one) * one.k.heads for one in heads]
        share = cast(float, self.kv_bytes)
        rest = _kv_numbers(program) - sum(held)  # of layers that are left alone
        chosen = share_out(heads, lost, share * (rest + sum(held)) - rest)
        if chosen is None:
            least = (rest + sum(map(numbers_a_token, heads))) / (rest + sum(held))
            self._refuse(f"one kv head a layer, where that can be, takes {least:.1%} already", "kv_bytes")
        report.notes.append(f"kv heads within {share:.1%} of the bytes: {', '.join(map(str, chosen))}")
        found = []
        for layer, kv_heads in zip(layers, chosen, strict=True):
            if kv_heads == layer.heads.k.heads:
                report.skipped.append(Skip(layer.heads.site, "the budget leaves it all its kv heads"))
            else:
                found.append(replace(layer, kv_heads=kv_heads))
        return found


_ROUNDS = 3  # of Gauss-Newton
_LOOKED_AT = 4096  # tokens of calibration: where heads look needs no more
# What layers tell of themselves, among the results of a walk; no weight is called that.
_SPECTRUM, _GROUPS = "spectrum of values", "groups"
_KEYS, _VALUES, _OUTPUT = "loss of keys", "loss of values", "loss of the output"


@dataclass
class _Layer:
    """A layer on its way: ``original`` is the output projection's weight as it was."""

    index: int
    heads: Heads
    kv_heads: int
    original: Tensor | Deferred
    attended: Attended | None = None
    losses: dict[str, float] = field(default_factory=dict)
    spectrum: list[float] = field(default_factory=list)
    merged: list[list[int]] = field(default_factory=list)
    fit: Fit | None = None

    @property
    def rows_in(self) -> fx.Node:
        """What the linears of q, k and v read."""
        return _rows(self.heads.q.linear)

    @property
    def rows_out(self) -> fx.Node:
        """What the output projection reads."""
        return _rows(self.heads.out)

    def groups(self, stacks: Stacks, kv_heads: int) -> Groups:
        """Which kv heads to merge: neighbours, where what is added to the scores differs from head to head."""
        held = self.heads.k.heads
        if self.heads.ordered:
            return contiguous(held, kv_heads)
        return cheapest(stacks.pair_costs(), kv_heads, stacks.cost)

    def take(self, program: Program, results: Made) -> None:
        """Puts the results of a stretch into ``program``."""
        self.losses |= {name: float(results[name]) for name in (_KEYS, _VALUES, _OUTPUT) if name in results}
        told = {*self.losses, _SPECTRUM, _GROUPS}
        if _SPECTRUM in results:
            self.spectrum, self.merged = results[_SPECTRUM].tolist(), results[_GROUPS].tolist()
        made = {name: value for name, value in results.items() if name not in told}
        write_heads(program, self.heads, made, self.kv_heads)

    def __str__(self) -> str:
        text = f"layer {self.index}: {self.heads.k.heads} to {self.kv_heads} kv heads"
        if not self.losses:
            return text
        predicted = (
            f"; predicted: keys lose {self.losses[_KEYS]:.2%} of their energy, values {self.losses[_VALUES]:.2%}"
        )
        measured = f"; measured: the output loses {self.losses[_OUTPUT]:.2%}" if _OUTPUT in self.losses else ""
        groups = ", ".join("+".join(map(str, group)) for group in self.merged)
        return f"{text} ({groups}){predicted}{measured}{'' if self.fit is None else self.fit}"


def _charts(layers: Sequence[_Layer]) -> list[Chart]:
    told = [layer for layer in layers if layer.losses]
    if not told:
        return []
    losses = {str(layer.index): layer.losses for layer in told}
    spectra = {str(layer.index): layer.spectrum for layer in told}
    return [losses_chart(losses), spectra_chart(spectra, {str(layer.index): layer.kv_heads for layer in told})]


def _look(program: Program, layers: Sequence[_Layer], batches: Sequence[Batch]) -> None:
    """Sees where the heads of all layers look in the original."""
    found = attended(program, [layer.heads.attention for layer in layers], batches)
    for layer in layers:
        layer.attended = found[layer.heads.attention]


def _fit(program: Program, layer: _Layer, statistics: SiteStatistics) -> Made:
    original = layer.original if isinstance(layer.original, Tensor) else layer.original.load()
    made, missing = refit(program, layer.heads, original, statistics)
    return made | {_OUTPUT: torch.tensor(missing)}


def _rows(linear: fx.Node) -> fx.Node:
    rows = linear.args[0]
    assert isinstance(rows, fx.Node)
    return rows


def _kv_bytes(program: Program) -> int:
    return cost(program).kv_bytes_per_token


def _kv_numbers(program: Program) -> int:
    """How many numbers all layers cache for each token."""
    values = [value.meta["val"] for node in program.attention_nodes() for value in node.args[1:3]]  # type: ignore[union-attr]
    return sum(int(value.shape[1]) * int(value.shape[3]) for value in values)


def _kv_heads(program: Program) -> set[int]:
    """The numbers of kv heads that layers have."""
    return {int(node.args[1].meta["val"].shape[1]) for node in program.attention_nodes()}  # type: ignore[union-attr]
