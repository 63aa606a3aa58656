"""Which pass, and which of its sites, moves the output of a model over a threshold; or which rule of the lift."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from slim import errors
from slim.compiler.lift import lift, lift_path
from slim.compiler.passes_base import Context, Pass, Progress
from slim.compiler.pipeline import probe_tokens, run_pipeline
from slim.compiler.probe import Probe, make_probe
from slim.compiler.program import Program, where
from slim.compiler.report import PipelineReport
from slim.compiler.rules import Rule, observed
from slim.compiler.verify import verify
from slim.inspection.hybrid import Hybrid
from slim.inspection.sites import Culprit, find_site
from slim.passes import as_passes

aten = torch.ops.aten


@dataclass(frozen=True)
class BadRewrite:
    """A rule whose right side is another number than its left.

    Attributes:
        stage: "lift", or the pass that applied it.
        rule: its name, which reads as an equation.
        site: the node, and the line of the model's source.
        error: how far the two are apart on the probe, relative to the largest number of the left one.
    """

    stage: str
    rule: str
    site: str
    error: float

    def __str__(self) -> str:
        return f"{self.stage}: the rule {self.rule} is off by {self.error:.1e} at {self.site}"


@dataclass
class Finding:
    """What ``bisect`` found; ``print`` it.

    Attributes:
        threshold: the error that is still allowed.
        errors: (stage, error since the lift) for "lift" and every pass.
        stage: the pass that crosses the threshold, as text; None where none does.
        index: its place in the pipeline, from 0.
        culprit: its site or sites, with errors; None where no pass crosses.
        places: the nodes that the culprit inserts or changes, with the lines of the model's source.
        inserted: those among them that only the Program after the pass has.
        rewrites: rules that changed a value, in the order they were applied, without those that only hand on what an
            earlier one did to their operand. Of the lift only where a module was given.
    """

    threshold: float
    errors: list[tuple[str, float]] = field(default_factory=list)
    stage: str | None = None
    index: int | None = None
    culprit: Culprit | None = None
    places: list[str] = field(default_factory=list)
    inserted: list[str] = field(default_factory=list)
    rewrites: list[BadRewrite] = field(default_factory=list)

    def __bool__(self) -> bool:
        """Whether anything is wrong."""
        return self.culprit is not None or bool(self.rewrites)

    def __str__(self) -> str:
        width = max(len(stage) for stage, _ in [*self.errors, ("stage", 0.0)])
        lines = [f"{'stage':<{width}}  error since the lift"]
        for index, (stage, error) in enumerate(self.errors):
            crossing = f"  over {self.threshold:g}" if index - 1 == self.index and self.stage is not None else ""
            lines.append(f"{stage:<{width}}  {error:.1e}{crossing}")
        lines += map(str, self.rewrites[:_SHOWN])
        if len(self.rewrites) > _SHOWN:
            lines.append(f"... and {len(self.rewrites) - _SHOWN} more rewrites that changed a number")
        if self.culprit is None:
            lines.append(f"no pass moves the output by more than {self.threshold:g}")
        else:
            lines += self._site(self.culprit)
        return "\n".join(lines)

    def _site(self, culprit: Culprit) -> list[str]:
        named = culprit.sites[:_SHOWN] + (["..."] if len(culprit.sites) > _SHOWN else [])
        found = [f"{'site' if len(culprit.sites) == 1 else 'sites'}: {', '.join(named)}"]
        found.append(f"  before {culprit.before:.1e}, with it {culprit.with_it:.1e}, it alone {culprit.alone:.1e}")
        verbs = ("inserts" if place in self.inserted else "changes" for place in self.places)
        found += [f"  {verb} {place}" for verb, place in itertools.islice(zip(verbs, self.places, strict=True), _SHOWN)]
        if culprit.largest:
            found.append("largest alone: " + "; ".join(f"{site} {error:.1e}" for site, error in culprit.largest))
        return [*found, f"  {culprit.note}"] if culprit.note else found


_SHOWN = 8


def bisect(
    model: nn.Module | str | Path | Program,
    passes: str | Pass | Sequence[str | Pass],
    threshold: float = 1e-2,
    *,
    calibration: Any = None,
    example_inputs: Any = None,
    strict: bool = True,
    progress: Progress | None = None,
) -> Finding:
    """Finds the first pass after which a probe's output is off by more than ``threshold``, and the site that does it.

    Errors are max |lifted - now| / max |lifted| on a small random batch, as in the report. Every rewrite by a rule,
    in a pass or, where a module is given, in the lift, is checked besides: both sides are computed, and must be one
    number. Sites are separated by running hybrids of the Program before the pass and the one after it, for any pass;
    where sites only make sense together (scales moved from one into the other) they are named together.

    Args:
        model, passes, calibration, example_inputs, strict, progress: as ``slim.compile`` takes them; also a Program.
        threshold: the error that is still allowed.

    Raises:
        BadInput: for a threshold that no error could cross.
        What ``slim.compile`` raises of a model or pass; but a lossless pass that loses something is bisected.

    Example:
        >>> print(slim.inspection.bisect(model, 'fold_norms, quantize("int4")', 0.05))
    """
    _check(model, threshold)
    pipeline = as_passes(passes)
    watcher = _Watcher()
    if isinstance(model, nn.Module):
        with observed(watcher.see):
            lifted = lift(model, example_inputs)
    else:  # from disk, where the numbers come after the rules
        lifted = model if isinstance(model, Program) else lift_path(model, example_inputs)
    probe = watcher.probe = make_probe(lifted, tokens=probe_tokens(pipeline))
    stages: list[Program] = []
    spoilt: dict[str, str] = {}

    def watch(program: Program) -> None:
        stages.append(program)
        spoilt.update(_spoilt(*stages[-2:]) if len(stages) > 1 else {})
        if spoilt:  # what comes behind it would fail for that
            raise _Stopped
        watcher.stages = watcher.stages[1:]

    watcher.stages += map(repr, pipeline)
    ctx = Context(verify=False, calibration=calibration, strict=strict, watch=watch)
    ctx.progress = progress or ctx.progress
    with observed(watcher.see), contextlib.suppress(_Stopped):
        run_pipeline(lifted, pipeline, ctx)
    done = ctx.report.passes
    for after, item in zip(stages[1:], done, strict=True):
        verify(after, item.text)
    outputs = probe.run(lifted)
    found = Finding(threshold, [("lift", 0.0)])
    for after, item in zip(stages[1:], done, strict=True):
        broken = bool(spoilt) and after is stages[-1]
        found.errors.append((item.text, math.inf if broken else probe.error(outputs, probe.run(after))))
    found.rewrites = watcher.bad
    _find(found, probe, outputs, stages, ctx.report, spoilt)
    return found


def _check(model: object, threshold: object) -> None:
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or not 0 <= threshold < math.inf:
        reason = f"it must be 0 or more, and finite, not {threshold!r}"
        raise errors.BadInput(argument="threshold", reason=reason, of="slim.inspection.bisect")
    if not isinstance(model, (nn.Module, str, Path, Program)):
        reason = f"{type(model).__name__} is neither a module nor a path nor a Program"
        raise errors.BadInput(argument="model", reason=reason, of="slim.inspection.bisect")


class _Stopped(Exception):
    """No more passes are to run."""


def _spoilt(before: Program, after: Program) -> dict[str, str]:
    """The weights that are not finite after a pass, and were others before it: name -> what they hold."""
    found = {}
    for name in after.weights:
        if name in before.weights and after.weights.raw(name) is before.weights.raw(name):
            continue
        try:
            after.weights[name]
        except errors.NonFiniteWeight as error:
            found[name] = f"{error.count} {error.kind} value{'s' * (error.count > 1)}"
    return found


def _find(
    found: Finding,
    probe: Probe,
    outputs: tuple[Any, ...],
    stages: list[Program],
    report: PipelineReport,
    spoilt: dict[str, str],
) -> None:
    """Fills in the pass that crosses the threshold, and its site, or the weights that the last one spoilt."""
    crossing = next((i for i, (_, error) in enumerate(found.errors) if not error <= found.threshold), None)
    if crossing is None:
        return
    before, after, made = stages[crossing - 1], stages[crossing], report.passes[crossing - 1]

    def measure(hybrid: Hybrid, chosen: frozenset[str]) -> float:
        return probe.error(outputs, hybrid.run(probe.inputs, chosen))

    found.stage, found.index = made.text, crossing - 1
    if spoilt and after is stages[-1]:
        found.culprit = _culprit(after, spoilt, found.errors[crossing - 1][1])
    else:
        found.culprit = find_site(before, after, made.matched, measure, found.threshold, lossless=made.lossless)
    old = {node.name: node for node in before.graph.nodes}
    nodes = old | {node.name: node for node in after.graph.nodes}
    found.places = [where(nodes[name]) for name in found.culprit.nodes]
    found.inserted = [where(nodes[name]) for name in found.culprit.nodes if name not in old]


def _culprit(after: Program, spoilt: dict[str, str], before: float) -> Culprit:
    """Weights with NaN or infinity, and the nodes that read them."""
    readers = [node.name for node in after.nodes() if any(str(n.target) in spoilt for n in node.all_input_nodes)]
    note = "; ".join(f"the pass left {held} in {name}" for name, held in spoilt.items())
    return Culprit(list(spoilt), readers, before, math.inf, math.inf, note=note)


class _Watcher:
    """Computes both sides of every rewrite on a probe, each value once."""

    def __init__(self) -> None:
        self.probe: Probe | None = None
        self.bad: list[BadRewrite] = []
        self.stages = ["lift"]
        self._values: dict[fx.Node, Any] = {}  # as they should be
        self._wrong: dict[fx.Node, Any] = {}  # of what a rule made, as it is

    def see(self, program: Program, rule: Rule, old: fx.Node, new: fx.Node) -> None:
        probe = self.probe or make_probe(program)
        a, b = (self._value(program, node, probe) for node in (old, new))
        error = Probe((), None, (False,)).error((a,), (b,))
        if not error <= _exact(a):
            if not self._hands_on(program, old, b):
                self.bad.append(BadRewrite(self.stages[0], rule.name, where(old), error))
            self._values[new], self._wrong[new] = a, b  # what reads it is judged by itself

    @torch.no_grad()
    def _hands_on(self, program: Program, old: fx.Node, now: Any) -> bool:
        """Whether ``old`` is as wrong, over what earlier rewrites made of its operands."""
        if not self._wrong.keys() & set(old.all_input_nodes):
            return False
        before = _called(old, {**self._values, **self._wrong})
        return Probe((), None, (False,)).error((before,), (now,)) <= _exact(now)

    @torch.no_grad()
    def _value(self, program: Program, node: fx.Node, probe: Probe) -> Any:
        """Computes what is not known yet, sources first."""
        waiting = [node]
        while waiting:
            here = waiting[-1]
            missing = [source for source in here.all_input_nodes if source not in self._values]
            if here in self._values or not missing:
                waiting.pop()
                if here not in self._values:
                    self._values[here] = self._computed(program, here, probe)
            else:
                waiting += missing
        return self._values[node]

    def _computed(self, program: Program, node: fx.Node, probe: Probe) -> Any:
        if node.op == "placeholder":
            names = [item.name for item in program.inputs]
            return probe.inputs[names.index(str(node.target))]
        if node.op == "get_attr":
            return program.weights[str(node.target)]
        return _called(node, self._values)


def _called(node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
    args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
    return _LENIENT.get(node.target, node.target)(*args, **kwargs)


# While rules run, a copy may be gone that made memory contiguous for a view.
_LENIENT: dict[Any, Any] = {aten.view.default: aten.reshape.default, aten._unsafe_view.default: aten.reshape.default}


def _exact(value: Any) -> float:
    """How far two ways to compute one number may be apart."""
    narrow = isinstance(value, Tensor) and value.is_floating_point()
    return max(1e-4, 32 * torch.finfo(value.dtype).eps) if narrow else 0.0
