"""What the report in HTML tells in tests: a compilation of a tiny model, with code that is written and not built."""

from types import SimpleNamespace

from slim.codegen.cpp.emit import WANTS, emit
from slim.codegen.regions.lower import lower
from slim.codegen.regions.provenance import Kernel, stages
from slim.compiler.machine import Machine
from slim.inspection.layers import calls
from slim.inspection.page import Story
from slim.inspection.tell import tell
from slim.runtime.speed import Speed
from tests.programs import model

HEADS = "0-1: dense; 2-3: window(4) | columns(1)"
PASSES = 'fold_norms, quantize("int8")'
SPARSE = f'sparse_attention("{HEADS}", layers=[0])'
PATTERN = f"causal, {HEADS}"


def with_code(story: Story) -> Story:
    """The same story with the code of the whole Program, as the CPU target writes it, without building it."""
    schedule = lower(story.programs[-1], WANTS)
    unit = emit(schedule)
    names = iter(unit.names)
    made = stages(schedule, lambda *_: [Kernel(next(names), "program.cpp")])
    story.compiled = SimpleNamespace(
        target=SimpleNamespace(name="cpu"), code={"whole/program.cpp": unit.source}, stages={"whole": made}
    )
    return story


def tiny_story() -> Story:
    """A Llama of two layers after three passes, measured in round numbers."""
    made = with_code(tell("tiny", model("llama"), f"{PASSES}, {SPARSE}", target="eager"))
    made.machine, made.speed = Machine(2e10, 5e10, 1), Speed([1000.0], [100.0])
    made.seconds = {call: {"0": 1e-4, "1": 2e-4} for call in calls(made.programs[-1], made.tokens)}
    made.sensitive = True
    return made
