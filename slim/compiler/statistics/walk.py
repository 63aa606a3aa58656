"""Walks a Program over calibration batches, a stretch at a time, collecting statistics and taking changes in.

Weights of a stretch are read once for all batches, and of the activations only those between two stretches are held.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, fx

from slim.compiler.passes_base import Context
from slim.compiler.program import Program
from slim.compiler.statistics.accumulate import Accumulator, SiteStatistics, Wanted
from slim.compiler.statistics.batches import Batch, Calibration
from slim.compiler.statistics.checkpoint import Checkpoint
from slim.compiler.statistics.segments import Grain, Kinds, cuts, named, readers

Values = dict[fx.Node, Any]
Seen = Callable[[fx.Node, Any], None]


@dataclass(eq=False)
class Block:
    """A stretch of the walk, whose sites may be rewritten before the walk goes on.

    Attributes:
        values: its sites: the nodes whose rows enter linears.
        statistics: of each site; empty where ``restored``.
        results: tensors that the caller wants back if the walk is interrupted and begun again: it puts here what it
            made, and finds it here where ``restored``.
        passed: what was kept of each batch as it came by; empty where nothing was asked for, or ``restored``.
        restored: an earlier walk went past this stretch; there are its results, and no statistics.
    """

    values: list[fx.Node]
    statistics: dict[fx.Node, SiteStatistics]
    results: dict[str, Tensor] = field(default_factory=dict)
    passed: list[Passed] = field(default_factory=list)
    restored: bool = False


@dataclass(frozen=True, eq=False)
class Passed:
    """Values of one batch, whole: ``now``, and as ``meant`` by the model before it was changed; see ``Batch.real``."""

    now: Values
    meant: Values
    real: Tensor | None


class _Track:
    """One Program on its way over the batches: what is alive of each, and which nodes are done."""

    def __init__(self, program: Program, batches: Sequence[Batch]) -> None:
        self.program = program
        self.inputs = [dict(zip((i.name for i in program.inputs), batch.inputs, strict=True)) for batch in batches]
        self.live: list[Values] = [{} for _ in batches]
        self.done: set[fx.Node] = set()
        self.weight_bytes = 0

    @property
    def nbytes(self) -> int:
        """Of all that is alive."""
        held = {id(v): v.nbytes for values in self.live for v in values.values() if isinstance(v, Tensor)}
        return sum(held.values())

    def stretch(self, until: fx.Node | None) -> _Stretch:
        return _Stretch(self, until)


class _Stretch:
    """The nodes from where a track is to ``until``, with the weights they read."""

    def __init__(self, track: _Track, until: fx.Node | None) -> None:
        self.track = track
        kinds = Kinds(track.program)
        self.own = self._nodes(until, kinds)
        self.order = self._with_cheap(kinds)
        self.constants = self._constants(kinds)
        self.out = self._live_out(kinds)
        track.weight_bytes = sum(v.nbytes for v in self.constants.values() if isinstance(v, Tensor))

    def _nodes(self, until: fx.Node | None, kinds: Kinds) -> list[fx.Node]:
        nodes = []
        for node in self.track.program.nodes():
            if node is until:
                break
            if node not in self.track.done and node not in kinds.constant and node not in kinds.cheap:
                nodes.append(node)
        return nodes

    def _with_cheap(self, kinds: Kinds) -> list[fx.Node]:
        """The nodes to run for a batch, in order."""
        wanted, waiting = set(self.own), list(self.own)
        while waiting:
            for source in waiting.pop().all_input_nodes:
                if source in kinds.cheap and source not in wanted:
                    wanted.add(source)
                    waiting.append(source)
        return [node for node in self.track.program.graph.nodes if node in wanted]

    def _constants(self, kinds: Kinds) -> Values:
        """What is the same for all batches: weights, restored from what they are stored as."""
        wanted: set[fx.Node] = set()
        waiting = [source for node in self.order for source in node.all_input_nodes if source in kinds.constant]
        needed = set(waiting)
        while waiting:
            node = waiting.pop()
            if node not in wanted:
                wanted.add(node)
                waiting += node.all_input_nodes
        values: Values = {}
        for node in self.track.program.graph.nodes:
            if node in wanted:
                values[node] = _weight(self.track.program, node) if node.op == "get_attr" else _call(node, values)
        return {node: value for node, value in values.items() if node in needed}

    def _live_out(self, kinds: Kinds) -> set[fx.Node]:
        """What a later stretch reads: of what was alive before, and of what this one makes."""
        past = self.track.done | set(self.own)
        candidates = {node for values in self.track.live[:1] for node in values} | set(self.own)
        return {node for node in candidates if any(u not in past and u not in kinds.cheap for u in node.users)}

    @torch.no_grad()
    def run(self, index: int, seen: Seen) -> Values:
        """Runs batch ``index``; what is alive after it. ``seen`` is told of every value, those before it too."""
        batch, values = self.track.inputs[index], dict(self.track.live[index])
        for node, value in values.items():
            seen(node, value)
        last = self._last_uses()
        for node in self.order:
            if node.op == "placeholder":
                values[node] = batch[str(node.target)]
            else:
                values[node] = _call(node, _Both(values, self.constants))
            seen(node, values[node])
            for spent in last.get(node, ()):
                if spent not in self.out:
                    values.pop(spent, None)
        return {node: _own(value) for node, value in values.items() if node in self.out}

    def _last_uses(self) -> dict[fx.Node, list[fx.Node]]:
        """Node -> the values that nothing reads after it."""
        last: dict[fx.Node, fx.Node] = {}
        for node in self.order:
            last[node] = node
            for source in node.all_input_nodes:
                last[source] = node
        found: dict[fx.Node, list[fx.Node]] = {}
        for value, node in last.items():
            found.setdefault(node, []).append(value)
        return found

    def passed(self, live: list[Values]) -> None:
        """The track goes on from the end of this stretch."""
        self.track.live = live
        self.track.done |= set(self.own)


class _Both:
    """Values of a batch, and those of all."""

    def __init__(self, own: Values, shared: Values) -> None:
        self._own, self._shared = own, shared

    def __getitem__(self, node: fx.Node) -> Any:
        return self._own[node] if node in self._own else self._shared[node]


def _call(node: fx.Node, values: Values | _Both) -> Any:
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: values[n])
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _own(value: Any) -> Any:
    """In memory of its own, and as a checkpoint brings it back: sums add up in the order of memory."""
    return value.contiguous() if isinstance(value, Tensor) else value


def _weight(program: Program, node: fx.Node) -> Tensor:
    return program.weights[str(node.target)]


def _note(twins: dict[fx.Node, fx.Node], meant: dict[fx.Node, Tensor], node: fx.Node, value: Any) -> None:
    """Keeps what a site of the model as it was holds, under the site of the model as changed."""
    if node in twins:
        meant[twins[node]] = value


def _quiet(node: fx.Node, value: Any) -> None:
    pass


class Walk:
    """One walk over a Program; ``walk`` is its face."""

    def __init__(
        self,
        program: Program,
        values: Sequence[fx.Node],
        ctx: Context,
        calibration: Calibration,
        wanted: Wanted,
        grain: Grain,
        changes: bool,
        label: str,
        meant: Program | None = None,
        beside: Mapping[fx.Node, Sequence[fx.Node]] | None = None,
        makers: Mapping[fx.Node, fx.Node] | None = None,
        whole: Mapping[fx.Node, Sequence[fx.Node]] | None = None,
    ) -> None:
        self.whole = whole or {}
        self.beside = {site: list(values) for site, values in (beside or {}).items() if values}
        self.makers = makers
        self.sources = {site: cast("fx.Node", linear.args[0]) for site, linear in (makers or {}).items()}
        self.program, self.ctx, self.wanted, self.changes, self.label = program, ctx, wanted, changes, label
        self.batches = calibration.batches
        self.ends: list[fx.Node | None] = [*cuts(program, [self._linears(value) for value in values], grain), None]
        self.groups = self._by_stretch(values)
        self.ends = self.ends[: len(self.groups)]
        self.track = _Track(program, self.batches)
        self.dense: _Track | None = None
        self.twins: dict[fx.Node, fx.Node] = {}
        if wanted.cross:
            copy = program.copy() if meant is None else meant
            self.dense = _Track(copy, self.batches)
            by_name = {node.name: node for node in copy.graph.nodes}
            self.twins = {node: by_name[node.name] for node in program.graph.nodes if node.name in by_name}
        self.peak = 0
        self._steps = 0

    def _by_stretch(self, values: Sequence[fx.Node]) -> list[list[fx.Node]]:
        """The sites of each stretch, by where their readers are; stretches behind the last site are left out."""
        order = {node: index for index, node in enumerate(self.program.graph.nodes)}
        bounds = [order[end] if end is not None else len(order) for end in self.ends]
        groups: list[list[fx.Node]] = [[] for _ in bounds]
        for value in values:
            if not readers(value):
                raise ValueError(f"no linear reads {value}")
            first = min(order[linear] for linear in self._linears(value))
            groups[next(i for i, bound in enumerate(bounds) if first < bound)].append(value)
        while groups and not groups[-1]:
            groups.pop()
        return groups

    def _linears(self, value: fx.Node) -> list[fx.Node]:
        """What a stretch with this site holds: its readers, and the linear that it is made by, where that was told."""
        return readers(value) + ([self.makers[value]] if self.makers and value in self.makers else [])

    def __iter__(self) -> Iterator[Block]:
        checkpoint = Checkpoint.of(self.program, self.batches, self._purpose())
        start = self._restore(checkpoint)
        for index in range(start):
            yield Block(self.groups[index], {}, checkpoint.results(index), restored=True)
        if start:
            self._resume(checkpoint, start)
        for index in range(start, len(self.groups)):
            passed: list[Passed] = []
            block = Block(self.groups[index], self._collect(index, passed), passed=passed)
            yield block
            passed.clear()
            checkpoint.keep(index, block.results)
            if index + 1 < len(self.groups):
                if self.changes:
                    self._advance(index)
                checkpoint.save(index + 1, self._state())
        self.ctx.progress(self.label, 1, 1)
        checkpoint.drop()

    def _purpose(self) -> str:
        """What tells this walk from others over the same Program and data: who asked, with which options, for what."""
        sites = [[(value.name, self.beside.get(value)) for value in each] for each in self.groups]
        return repr((self.label, self.wanted, self.changes, sites, self.makers, self.whole))

    # -- one stretch -----------------------------------------------------------------------------------------------

    def _collect(self, index: int, passed: list[Passed]) -> dict[fx.Node, SiteStatistics]:
        """Runs the stretch and sums up its sites; goes past it where nothing will be changed."""
        sums: dict[fx.Node, Accumulator] = {}
        stretch = self.track.stretch(self.ends[index])
        dense = self.dense.stretch(self._twin(self.ends[index])) if self.dense else None
        whole = {node for value in self.groups[index] for node in self.whole.get(value, ())}
        watched = {node for value in self.groups[index] for node in (value, *self.beside.get(value, ()))} | whole
        twins = {self.twins[node]: node for node in watched} if dense else {}
        after: list[Values] = []
        dense_after: list[Values] = []
        for number, batch in enumerate(self.batches):
            self._tell()
            meant: dict[fx.Node, Tensor] = {}
            if dense is not None:
                dense_after.append(dense.run(number, partial(_note, twins, meant)))
            now: dict[fx.Node, Tensor] = {}
            alive = stretch.run(number, partial(self._add, self.groups[index], sums, batch, meant, now))
            if not self.changes:
                after.append(alive)
            if whole:
                kept = _Both(now, stretch.constants)
                passed.append(Passed({n: kept[n] for n in whole}, {n: meant[n] for n in whole & {*meant}}, batch.real))
            self._weigh(sums, [*after, *dense_after])
        if dense is not None:
            dense.passed(dense_after)
        if not self.changes:
            stretch.passed(after)
        return {value: sums[value].finish() for value in self.groups[index]}

    def _add(
        self,
        values: Sequence[fx.Node],
        sums: dict[fx.Node, Accumulator],
        batch: Batch,
        meant: dict[fx.Node, Tensor],
        now: dict[fx.Node, Tensor],
        node: fx.Node,
        value: Any,
    ) -> None:
        """Counts the rows of ``value`` in, if it is one of the sites; what is beside one is kept until it comes."""
        if node in meant or node in self.sources.values():
            now[node] = value
        if node not in values:
            return
        dense = self._dense(node, batch.real, meant, now) if node in meant else None
        if node not in sums:
            wanted = self.wanted if self.makers is None or node in self.makers else replace(self.wanted, rows=0)
            width = None if dense is None else dense.shape[-1]
            sums[node] = Accumulator(named(node), value.shape[-1], wanted, width)
        sample = None
        if node in self.sources and dense is not None and self.wanted.rows:
            sample = torch.cat([_real_rows(now[self.sources[node]], batch.real).float(), dense], -1)
        sums[node].add(_real_rows(value, batch.real), dense, sample)

    def _dense(
        self, site: fx.Node, real: Tensor | None, meant: dict[fx.Node, Tensor], now: dict[fx.Node, Tensor]
    ) -> Tensor:
        """The rows of ``site`` in the model as it was, and with them what the values beside it have lost."""
        rows = _real_rows(meant[site], real)
        lost = [_real_rows(meant[node].float() - now[node].float(), real) for node in self.beside.get(site, ())]
        return torch.cat([rows.float(), torch.stack(lost).sum(0)], -1) if lost else rows

    def _advance(self, index: int) -> None:
        """Runs the stretch as the caller left it."""
        stretch = self.track.stretch(self.ends[index])
        after = []
        for number in range(len(self.batches)):
            self._tell()
            after.append(stretch.run(number, _quiet))
        stretch.passed(after)

    def _twin(self, node: fx.Node | None) -> fx.Node | None:
        return None if node is None else self.twins[node]

    def _tell(self) -> None:
        total = len(self.groups) * len(self.batches) * (2 if self.changes else 1)
        self.ctx.progress(self.label, min(self._steps, total - 1), total)
        self._steps += 1

    def _weigh(self, sums: dict[fx.Node, Accumulator], after: list[Values]) -> None:
        tracks = [track for track in (self.track, self.dense) if track is not None]
        held = sum(track.nbytes + track.weight_bytes for track in tracks) + sum(each.nbytes for each in sums.values())
        new = sum(v.nbytes for values in after for v in values.values() if isinstance(v, Tensor))
        self.peak = max(self.peak, held + new)

    # -- interrupted and begun again -------------------------------------------------------------------------------

    def _state(self) -> list[list[Values]]:
        return [track.live for track in (self.track, self.dense) if track is not None]

    def _restore(self, checkpoint: Checkpoint) -> int:
        return min(checkpoint.stretches, len(self.groups))

    def _resume(self, checkpoint: Checkpoint, start: int) -> None:
        """Puts the tracks where they were; by now the caller has made its changes again."""
        states = checkpoint.state()
        for track, twin in ((self.track, False), (self.dense, True)):
            if track is None:
                continue
            end = self.ends[start - 1]
            stretch = track.stretch(self._twin(end) if twin else end)
            by_name = {node.name: node for node in track.program.graph.nodes}
            live = [{by_name[name]: value for name, value in values.items()} for values in states[int(twin)]]
            stretch.passed(live)


def _real_rows(value: Tensor, real: Tensor | None) -> Tensor:
    """[rows, n] without those of pad tokens, where the value's rows are those of the batch's tokens."""
    if real is not None and not bool(real.all()):
        if value.shape[:2] == real.shape:
            return value[real].reshape(-1, value.shape[-1])
        if value.dim() == 2 and len(value) == real.numel():
            return value[real.reshape(-1)]
    return value.reshape(-1, value.shape[-1])
