"""What the HTML report shows, as one value of JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from slim.codegen.regions.provenance import Stage
from slim.compiler.cost import cost
from slim.compiler.machine import Machine
from slim.compiler.program import Program
from slim.compiler.report import PipelineReport, Report, Size
from slim.compiler.sources import source_line
from slim.compiler.text import print_node
from slim.compiler.types import show_shape
from slim.compiler.uses import ATTENTION
from slim.inspection.layers import (
    calls,
    generation_work,
    layer_of_node,
    measure_layers,
    names_of,
    old_layers,
    sensitivity,
)
from slim.inspection.masks import CELLS, Gallery
from slim.inspection.times import LayerSeconds, predict_layers
from slim.runtime.compiled import CompiledModel
from slim.runtime.speed import Speed


@dataclass
class Story:
    """A compilation, as far as it is known.

    Attributes:
        model: what the user called it.
        programs: the Program as lifted and after each pass; the last alone where the others were not kept.
        report: of the pipeline; None where there was none.
        compiled: the last of them, lowered; None where it was not.
        tokens: how many the costs are for.
        machine, speed: what was measured, for the roofline; None where nothing was.
        seconds: what each layer takes, where that was measured.
        sensitive: whether to measure what each layer alone does to the output.
        start: what the first Program is called.
        probe_tokens: how many it takes to see what the passes do.
    """

    model: str
    programs: Sequence[Program]
    report: PipelineReport | None = None
    compiled: CompiledModel | None = None
    tokens: int = 128
    machine: Machine | None = None
    speed: Speed | None = None
    seconds: LayerSeconds = field(default_factory=dict)
    sensitive: bool = False
    start: str = "lift"
    probe_tokens: int = 0


def collect(story: Story) -> dict[str, Any]:
    """The value that the scripts of the page read."""
    lines = _Lines()
    passes = story.report.passes if story.report is not None else []
    complete = len(story.programs) == len(passes) + 1
    names = [story.start, *(item.text for item in passes)] if complete else ["after all passes"]
    final, compiled = story.programs[-1], story.compiled
    code, stages = ({}, {}) if compiled is None else (compiled.code, compiled.stages)
    return {
        "title": f"{story.model}: slim",
        "model": story.model,
        "architecture": final.facts.architecture,
        "target": "" if compiled is None else compiled.target.name,
        "irs": [
            {"name": name, "lines": lines.of(program)}
            for name, program in zip(names, story.programs, strict=True)
        ],
        "lines": lines.table,
        "origins": lines.origins,
        "whole": complete,
        "steps": [_start(story, passes), *map(_step, passes)],
        "report": _remarks(story.report),
        "weights": {name: _held(final, name) for name in final.weights},
        "code": _short(code),
        "regions": {name: [_region(stage) for stage in made] for name, made in stages.items()},
        "layers": _layers(story),
        "tokens": story.tokens,
        "roofline": _roofline(story),
    }  # fmt: skip


class _Lines:
    """Lines of IR, each different one once; stages are lists of numbers of lines."""

    def __init__(self) -> None:
        self.table: list[list[Any]] = []  # [text, number of its origin]
        self.origins: list[list[str]] = []  # [module, file:line, text of that line]
        self._numbers: dict[tuple[str, int], int] = {}
        self._origins: dict[tuple[str, str], int] = {}

    def of(self, program: Program) -> list[int]:
        return [self._number(text, node) for text, node in _printed(program)]

    def _number(self, text: str, node: fx.Node) -> int:
        key = (text, self._origin(node))
        if key not in self._numbers:
            self._numbers[key] = len(self.table)
            self.table.append(list(key))
        return self._numbers[key]

    def _origin(self, node: fx.Node) -> int:
        key = (str(node.meta.get("module", "")), str(node.meta.get("where", "")))
        if key not in self._origins:
            self._origins[key] = len(self.origins)
            self.origins.append([*key, source_line(key[1]) or ""])
        return self._origins[key]


def _printed(program: Program) -> Iterator[tuple[str, fx.Node]]:
    for node in program.nodes():
        yield print_node(program, node), node
    output = program.graph.output_node()
    results = output.args[0]
    flat = results if isinstance(results, (tuple, list)) else (results,)
    yield f"return: {', '.join(map(str, flat))}", output


# -- the pipeline ------------------------------------------------------------------------------------------------------


def _start(story: Story, passes: Sequence[Report]) -> dict[str, Any]:
    program = story.programs[0]
    size = (passes[0].before if passes else None) or Size.of(program)
    return {"name": story.start, "size": dataclasses.asdict(size), "seconds": {}, "notes": program.facts.notes}


def _step(item: Report) -> dict[str, Any]:
    return {
        "name": item.text,
        "size": None if item.after is None else dataclasses.asdict(item.after),
        "seconds": item.seconds,
        "error": item.error,
        "drift": item.drift,
        "lossless": item.lossless,
        "matched": item.matched,
        "skipped": [list(skip) for skip in item.skipped],
        "notes": item.notes,
        "charts": [dataclasses.asdict(chart) for chart in item.charts],
        "rules": _rules(item.rules),
        "nodes": dataclasses.asdict(item.changes.nodes),
        "weights": dataclasses.asdict(item.changes.weights),
    }


def _remarks(report: PipelineReport | None) -> dict[str, Any]:
    if report is None:
        return {"seconds": {}, "rules": [], "forms": {}, "error": None}
    forms = {name: dataclasses.asdict(form) for name, form in report.forms.items()}
    return {"seconds": report.seconds, "rules": _rules(report.rules), "forms": forms, "error": report.error}


def _rules(counts: Mapping[str, Any]) -> list[list[Any]]:
    return [[name, count.tried, count.matched, count.misses] for name, count in counts.items()]


def _held(program: Program, name: str) -> list[Any]:
    weights = program.weights
    return [show_shape(weights.dtype(name), weights.shape(name)), weights.nbytes(name)]


def _region(stage: Stage) -> dict[str, Any]:
    kernels = [[kernel.name, kernel.file] for kernel in stage.kernels]
    return {"text": stage.text, "nodes": stage.nodes, "weights": stage.weights, "kernels": kernels}


_CODE = 2_000_000  # characters of generated code that a page holds


def _short(code: Mapping[str, str | bytes]) -> dict[str, str]:
    """Texts, those that people write before those that compilers do, until the page would be too large."""
    texts = {name: text for name, text in code.items() if isinstance(text, str)}
    left = _CODE
    for name in sorted(texts, key=lambda name: name.endswith((".ptx", ".amdgcn"))):
        left -= len(texts[name])
        if left < 0:
            texts[name] = f"{len(texts[name]):,} characters: left out of this page. compiled.code has them.\n"
    return texts


# -- pictures ----------------------------------------------------------------------------------------------------------


def _layers(story: Story) -> dict[str, Any]:
    """Each metric as named series of a number a layer, and what attention sees."""
    first, last = story.programs[0], story.programs[-1]
    names = names_of([first, last])
    was = old_layers(first, last)
    costs = measure_layers(last, names, story.tokens).metrics
    after = {title: _placed(values, names, was) for title, values in costs.items()}
    before = after if last is first else measure_layers(first, names, story.tokens).metrics
    metrics = [
        _metric(title, {_came(story): before.get(title), "now": after.get(title)}) for title in {**before, **after}
    ]
    metrics += _times(story, names, was)
    if story.sensitive and last is not first:
        title = "output moved where this layer alone is compressed"
        metrics.append(_metric(title, {"now": sensitivity(first, last, names, story.probe_tokens)}))
    return {"names": names, "metrics": metrics, **_masks(last, story.tokens, was)}


_Values = list[float | None] | None


def _came(story: Story) -> str:
    """What the first Program is called beside the last."""
    return "as lifted" if story.start == "lift" else story.start


def _placed(values: list[float | None], names: list[str], was: Mapping[str, str]) -> list[float | None]:
    """Numbers of layers in the places that these had in the first Program."""
    found: list[float | None] = [None] * len(names)
    for name, value in zip(names, values, strict=True):
        if value is not None:
            found[names.index(was.get(name, name))] = value
    return found


def _metric(title: str, series: dict[str, _Values]) -> dict[str, Any]:
    """Series that say the same are drawn once, and those that say nothing not at all."""
    drawn: dict[str, _Values] = {}
    for name, values in series.items():
        drawn = {other: told for other, told in drawn.items() if told != values}
        if values is not None:
            drawn[name] = values
    return {"title": title, "series": drawn}


def _times(story: Story, names: list[str], was: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    if story.machine is None:
        return
    for name, seconds in predict_layers(story.programs[-1], story.machine, story.tokens).items():
        series = {"predicted, float32 roof": seconds, "measured": story.seconds.get(name)}
        values = {
            title: None if found is None else _placed([found.get(layer) for layer in names], names, was)
            for title, found in series.items()
        }
        yield _metric(f"seconds {name}", values)


def _masks(program: Program, tokens: int, was: Mapping[str, str]) -> dict[str, Any]:
    """Pictures, and [layer, mask] for every attention in order; masks name pictures by their numbers."""
    gallery = Gallery()
    masks = []
    for node in program.nodes(*ATTENTION):
        layer = layer_of_node(node)
        masks.append([was.get(layer, layer), dataclasses.asdict(gallery.of(node, tokens))])
    return {"masks": masks, "pictures": gallery.pictures, "cells": CELLS}


def _roofline(story: Story) -> dict[str, Any] | None:
    """FLOPs and bytes of the calls, and what was measured of them."""
    final = story.programs[-1]
    writes = final.facts.kind == "causal_lm"
    points = []
    for label, program in ((_came(story), story.programs[0]), ("compiled", final)):
        if cost(program).flops == 0 or (label != "compiled" and len(story.programs) == 1):
            continue
        kinds = ("prefill", "decode") if writes else ("call",)
        for kind, sizes in zip(kinds, calls(program, story.tokens).values(), strict=True):
            work = list(generation_work(program, sizes))
            flops, moved = sum(each[1] for each in work), sum(each[2] for each in work)
            measured = None
            if story.speed is not None and label == "compiled":
                rate = (story.speed.prefill if kind == "prefill" else story.speed.decode).best
                measured = rate / sizes["S"] * flops
            points.append([f"{kind}, {label}", flops, moved, measured])
    machine = None if story.machine is None else dataclasses.asdict(story.machine)
    return {"machine": machine, "points": points, "writes": writes} if points else None
