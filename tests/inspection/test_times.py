"""Time by layer: regions of a run are told by the layers that they belong to."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from slim.codegen.regions.provenance import Stage
from slim.compiler.lift import lift
from slim.compiler.machine import Machine
from slim.inspection.layers import calls, generation_work, measure_layers
from slim.inspection.times import predict_layers, time_layers
from slim.runtime.binding import head_of
from slim.runtime.compiled import CompiledModel
from tests.programs import model, program

PROGRAM = lift(model("llama"))


class Clock:
    """An executable of three regions, one of each layer and the head, that take a second, two and four a call."""

    def __init__(self) -> None:
        self.seconds = None
        nodes = [
            next(node.name for node in PROGRAM.attention_nodes() if node.kwargs["layer"] == layer) for layer in (0, 1)
        ]
        self.stages = [
            Stage("attention", (nodes[0],), (), ()),
            Stage("linear", (), ("model.layers.1.mlp.down_proj.weight",), ()),
            Stage("linear", (), ("lm_head.weight",), ()),
        ]

    @contextmanager
    def timed(self):
        self.seconds = [0.0, 0.0, 0.0]
        yield self.seconds
        self.seconds = None

    def call(self) -> None:
        for index in range(3):
            self.seconds[index] += 2.0**index


def test_reading_and_writing_are_told_apart_by_layer():
    clock = Clock()

    def generate(tokens, *, max_new_tokens, streamer, **options):
        streamer.put(tokens)
        for _ in range(3):  # a prompt in three pieces
            clock.call()
        for index in range(max_new_tokens):
            if index:
                clock.call()
            streamer.put(tokens[:, 0])
        streamer.end()

    timed = SimpleNamespace(
        program=PROGRAM, executables={"step_last": clock}, vocabulary=96, device="cpu", generate=generate
    )
    reading, writing = time_layers(timed, 16).values()
    assert reading == {"0": 3.0, "1": 6.0, "rest": 12.0}
    assert writing == {"0": 1.0, "1": 2.0, "rest": 4.0}


def test_a_target_whose_regions_cannot_be_timed_gives_nothing():
    assert time_layers(CompiledModel(PROGRAM, "eager"), 8) == {}


def test_no_part_of_the_roof_is_below_what_it_moves_and_computes():
    machine = Machine(bandwidth=1e9, flops_rate=1e12, threads=1)
    roof = predict_layers(PROGRAM, machine, 16)
    for (name, seconds), sizes in zip(roof.items(), calls(PROGRAM, 16).values(), strict=True):
        work = list(generation_work(PROGRAM, sizes))
        assert sum(seconds.values()) >= sum(nbytes for _, _, nbytes in work) / 1e9, name
        assert sum(seconds.values()) >= sum(flops for _, flops, _ in work) / 1e12, name


@pytest.mark.parametrize(("inputs", "call"), [("x: f32[B, S, 8]", "to read 16 tokens"), ("x: f32[B, 8]", "of a call")])
def test_what_writes_no_tokens_is_called_once(inputs, call):
    module = program('y = aten.linear.default(x, weights["w"])\nreturn (y,)', {"w": torch.ones(4, 8)}, inputs)
    assert list(calls(module, 16)) == [call]
    assert list(predict_layers(module, Machine(1e9, 1e12, 1), 16)) == [call]
    assert set(measure_layers(module, ["rest"], 16).metrics) >= {f"FLOPs {call}", f"bytes moved {call}"}


def test_generation_makes_the_logits_of_the_last_token_alone():
    flops = {node: flops for node, flops, _ in generation_work(PROGRAM, {"B": 1, "S": 16, "T": 16})}
    width, vocabulary = 32, 96
    assert flops[head_of(PROGRAM)] == 2 * width * vocabulary
