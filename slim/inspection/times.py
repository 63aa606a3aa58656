"""How long each layer takes: measured by the regions of generated code, and what no kernel could beat."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack

import torch

from slim.codegen import Timed
from slim.codegen.regions.provenance import Stage
from slim.compiler.machine import Machine
from slim.compiler.program import Program
from slim.inspection.layers import REST, calls, generation_work, layer_of, layer_of_node
from slim.runtime.compiled import CompiledModel
from slim.runtime.speed import random_prompt

_ROUNDS, _NEW_TOKENS = 3, 8

LayerSeconds = dict[str, dict[str, float]]  # what is timed, as ``calls`` names it -> layer -> seconds


def predict_layers(program: Program, machine: Machine, tokens: int) -> LayerSeconds:
    """The roof: every node takes the longer of moving its bytes and of computing."""
    found: LayerSeconds = {name: defaultdict(float) for name in calls(program, tokens)}
    for name, sizes in calls(program, tokens).items():
        for node, flops, nbytes in generation_work(program, sizes):
            found[name][layer_of_node(node)] += max(nbytes / machine.bandwidth, flops / machine.flops_rate)
    return found


def time_layers(compiled: CompiledModel, tokens: int) -> LayerSeconds:
    """Best of a few rounds of a language model's ``generate``: reading ``tokens`` tokens, and writing one after them.

    Regions run one by one, so that layers add up to more than a whole call takes. What was not timed by region, on
    targets other than "cpu", is left out.
    """
    rounds = [_Round(compiled, tokens).seconds() for _ in range(_ROUNDS)]
    return {
        name: {layer: min(one[name][layer] for one in rounds) for layer in rounds[0][name]}
        for name in rounds[0]
    }  # fmt: skip


class _Round:
    """One ``generate`` with every region timed; also the streamer that it tells when tokens come."""

    def __init__(self, compiled: CompiledModel, tokens: int) -> None:
        self._compiled, self._tokens = compiled, tokens
        self._running: list[tuple[list[str], list[float]]] = []  # of an executable: layers and seconds of its regions
        self._seen: list[dict[str, float]] = []  # seconds by layer when the prompt, and each new token, came

    def seconds(self) -> LayerSeconds:
        with ExitStack() as stack:
            for executable in self._compiled.executables.values():
                if isinstance(executable, Timed):
                    layers = list(_layers(self._compiled.program, executable.stages))
                    self._running.append((layers, stack.enter_context(executable.timed())))
            if not self._running:
                return {}
            prompt = random_prompt(int(self._compiled.vocabulary or 2), self._tokens).to(self._compiled.device)
            self._compiled.generate(
                prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=_NEW_TOKENS, do_sample=False,
                eos_token_id=None, streamer=self,
            )  # fmt: skip
        _, first, *_, last = self._seen
        reading, writing = calls(self._compiled.program, self._tokens)
        return {
            reading: first,
            writing: {layer: (total - first[layer]) / (_NEW_TOKENS - 1) for layer, total in last.items()},
        }

    def put(self, tokens: torch.Tensor) -> None:
        total: dict[str, float] = defaultdict(float)
        for layers, seconds in self._running:
            for layer, spent in zip(layers, seconds, strict=True):
                total[layer] += spent
        self._seen.append(total)

    def end(self) -> None:
        pass


def _layers(program: Program, stages: Sequence[Stage]) -> Iterator[str]:
    """The layer of each region: that of the weights that it reads, or else of the nodes that it computes."""
    of_node = {node.name: layer_of_node(node) for node in program.nodes()}
    for stage in stages:
        found = [*map(layer_of, stage.weights), *(of_node.get(name, REST) for name in stage.nodes)]
        yield next((layer for layer in found if layer != REST), REST)
