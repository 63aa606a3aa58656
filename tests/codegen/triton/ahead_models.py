"""Compiles kernels of a Llama of 1B's shape ahead of time, and prints what each takes as JSON.

A process of its own: where the tests run, Triton interprets.
"""

import json
import sys
from collections.abc import Iterator
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from slim.codegen.regions.lower import lower
from slim.codegen.triton.ahead import compile_for
from slim.codegen.triton.decoding import choose
from slim.codegen.triton.emit import WANTS, Unit, emit
from slim.codegen.triton.kernel import Kernel, Stage
from slim.codegen.triton.launching import Sizes, form_of
from slim.compiler.lift import lift
from slim.compiler.program import Program
from slim.compiler.uses import UNPACKS
from slim.runtime.binding import bind_cache
from tests.programs import program

# Llama 3.2 1B, but for the number of layers, which share their kernels, and the vocabulary, which only decides how
# large the grid of the head is.
SHAPE = dict(
    hidden_size=2048, intermediate_size=8192, num_attention_heads=32, num_key_value_heads=8, num_hidden_layers=1,
    vocab_size=8016, max_position_embeddings=8192, tie_word_embeddings=False,
)  # fmt: skip
PROCESSORS = 132

# (B, S, T, C) of calls: a launch makes a kernel special to sizes that are 1 or multiples of 16.
CALLS = ((1, 1, 5, 256), (3, 1, 5, 99), (1, 37, 37, 99))


def llama() -> list[Unit]:
    """Steps without and with padding."""
    torch.manual_seed(0)
    lifted = lift(LlamaForCausalLM(LlamaConfig(**SHAPE)).to(torch.bfloat16).eval())
    return [_unit(bind_cache(lifted, masked=masked, last_only=True)) for masked in (False, True)]


def _unit(made: Program) -> Unit:
    return emit(lower(made, WANTS), PROCESSORS)


# format -> (bits of a number, group, type in memory)
FORMATS = {"int8": (8, 0, torch.int8), "int4": (4, 32, torch.uint8), "fp8": (8, 0, torch.float8_e4m3fn)}


def gate_and_up(format: str) -> Program:
    """The linear of the same Llama whose kernels hold most at once, its weights in a format."""
    bits, group, dtype = FORMATS[format]
    n, m = SHAPE["hidden_size"], SHAPE["intermediate_size"]
    weights: dict[str, Any] = {"gain": torch.ones(n, dtype=torch.bfloat16)}
    lines = ['n = slim.rms_norm.default(x, weights["gain"], eps=1e-5)']
    for name in ("gate", "up"):
        weights[name] = torch.zeros(m, n * bits // 8, dtype=torch.uint8).view(dtype)
        options, scale = f"axis=1, group_size={group}", torch.ones(m, n // group if group else 1, dtype=torch.float16)
        weights[f"{name}_scale"] = scale if group else scale[:, 0].float()
        numbers = f'weights["{name}"]'
        if format in UNPACKS:
            lines.append(f"q{name} = slim.unpack_{format}.default({numbers})")
            numbers = f"q{name}"
        arguments = f'{numbers}, weights["{name}_scale"], {options if group else "axis=0"}, dtype=torch.bfloat16'
        lines += [f"w{name} = slim.dequantize.default({arguments})", f"{name} = aten.linear.default(n, w{name})"]
    lines += ["a = aten.silu.default(gate)", "y = aten.mul.Tensor(a, up)", "return (y,)"]
    return program("\n".join(lines), weights, inputs=f"x: bf16[B, S, {n}]")


def launched(unit: Unit) -> Iterator[tuple[Kernel, dict[str, int]]]:
    """Kernels with the sizes that calls give them, where a launch makes another kernel of these."""
    sizes = Sizes(["B", "S", "T", "C", "key_mask_pitch"])
    stages = [step for step in unit.steps if isinstance(step, Stage)]
    for stage in stages:
        for size in (stage.rows, *(s for form in stage.forms for k in form.kernels for s in k.sizes.values())):
            sizes.add(size)
    seen = set()
    for batch, new, keys, capacity in CALLS:
        size = sizes.bind({"B": batch, "S": new, "T": keys, "C": capacity, "key_mask_pitch": capacity})
        for kernel in (kernel for stage in stages for kernel in form_of(stage, size).kernels):
            given = {name: size(value) for name, value in kernel.sizes.items()}
            key = (kernel.code, *((n == 1, n % 16 == 0) for n in given.values()))
            if 1 in given.values() and key not in seen:
                seen.add(key)
                yield kernel, given


def main(arch: str) -> None:
    units = llama()
    kernels = {"choose": choose(SHAPE["vocab_size"], torch.bfloat16, 2, 0, True)}
    kernels |= {kernel.code: kernel for unit in units for kernel in unit.kernels.values()}
    found: list[dict[str, Any]] = []

    def take(kernel: Kernel, format: str, sizes: dict[str, int] | None = None) -> None:
        made = compile_for(kernel, arch, sizes=sizes)
        facts = {name: getattr(made, name) for name in ("registers", "spills", "shared")}
        found.append({"kernel": kernel.name, "format": format, "special": bool(sizes), **facts})

    for kernel in kernels.values():
        take(kernel, "bf16")
    for format in FORMATS:
        for kernel in _unit(gate_and_up(format)).kernels.values():
            if kernel.code not in kernels:
                take(kernel, format)
    if arch == "sm_90":
        for unit in units:
            for kernel, sizes in launched(unit):
                take(kernel, "bf16", sizes)
    print("RESULT", json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
