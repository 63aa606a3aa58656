"""Compiles every kernel of a Llama of 1B's shape ahead of time, and prints what each takes as JSON.

A process of its own: where the tests run, Triton interprets.
"""

import json
import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from slim.codegen.regions.lower import lower
from slim.codegen.triton.ahead import compile_for
from slim.codegen.triton.decoding import choose
from slim.codegen.triton.emit import WANTS, emit
from slim.codegen.triton.kernel import Stage
from slim.codegen.triton.launching import Sizes, form_of
from slim.compiler.lift import lift
from slim.compiler.passes_base import Context
from slim.compiler.pipeline import run_pipeline
from slim.compiler.program import Program
from slim.passes import as_passes
from slim.runtime.binding import bind_cache

# Llama 3.2 1B, but for the number of layers, which share their kernels, and the vocabulary, which only decides how
# large the grid of the head is.
SHAPE = dict(
    hidden_size=2048, intermediate_size=8192, num_attention_heads=32, num_key_value_heads=8, num_hidden_layers=1,
    vocab_size=32064, max_position_embeddings=8192, tie_word_embeddings=False,
)  # fmt: skip


# (B, S, T, C) of calls: a launch makes a kernel special to sizes that are 1 or multiples of 16.
CALLS = ((1, 1, 5, 256), (8, 1, 21, 256), (1, 37, 37, 99), (3, 128, 129, 300), (1, 600, 600, 1024))


def check_launches(program: Program) -> None:
    """Every kernel compiles as calls of several sizes would have it."""
    for masked in (False, True):
        schedule = lower(bind_cache(program, masked=masked, last_only=True), WANTS)
        unit = emit(schedule, 132)
        sizes = Sizes([*schedule.dims, *schedule.pitches])
        stages = [step for step in unit.steps if isinstance(step, Stage)]
        for stage in stages:
            for size in (stage.rows, *(s for form in stage.forms for k in form.kernels for s in k.sizes.values())):
                sizes.add(size)
        for batch, new, keys, capacity in CALLS:
            size = sizes.bind({"B": batch, "S": new, "T": keys, "C": capacity, "key_mask_pitch": capacity})
            for kernel in (kernel for stage in stages for kernel in form_of(stage, size).kernels):
                compile_for(kernel, "sm_90", sizes={name: size(value) for name, value in kernel.sizes.items()})


def main(passes: str, *archs: str) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE)).to(torch.bfloat16).eval()
    program, _ = run_pipeline(lift(model), as_passes(passes), Context(verify=False))
    kernels = {"choose": choose(SHAPE["vocab_size"], torch.bfloat16, 2, 0, True)}
    for masked in (False, True):
        unit = emit(lower(bind_cache(program, masked=masked, last_only=True), WANTS), 132)
        kernels |= {kernel.code: kernel for kernel in unit.kernels.values()}
    found = []
    for arch in archs:
        for kernel in kernels.values():
            made = compile_for(kernel, arch)
            facts = {name: getattr(made, name) for name in ("arch", "registers", "spills", "shared")}
            found.append({"kernel": kernel.name, **facts})
    check_launches(program)
    print("RESULT", json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
