"""Compiles kernels of a Llama of 1B's shape ahead of time, and prints what each takes as JSON.

A process of its own: where the tests run, Triton interprets.
"""

import json
import sys
from collections.abc import Iterator
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.pairs import RandomPairs
from slim.codegen.regions.lower import lower
from slim.codegen.regions.products import Linear
from slim.codegen.regions.schedule import Attention, Schedule
from slim.codegen.triton.ahead import compile_for
from slim.codegen.triton.decoding import choose
from slim.codegen.triton.device import ahead
from slim.codegen.triton.emit import WANTS, Unit, emit
from slim.codegen.triton.kernel import Kernel, Stage
from slim.codegen.triton.launching import Sizes, form_of
from slim.compiler.lift import lift
from slim.compiler.passes_base import Context, Pass
from slim.compiler.program import Program
from slim.compiler.uses import UNPACKS
from slim.passes.sparse_attention import SparseAttention
from slim.runtime.binding import Paging, bind_cache
from slim.runtime.eviction import Eviction
from tests.programs import program

# Llama 3.2 1B, but for the number of layers, which share their kernels, and the vocabulary, which only decides how
# large the grid of the head is.
SHAPE = dict(
    hidden_size=2048, intermediate_size=8192, num_attention_heads=32, num_key_value_heads=8, num_hidden_layers=1,
    vocab_size=8016, max_position_embeddings=8192, tie_word_embeddings=False,
)  # fmt: skip

# Where the other kernels are as those of another schedule: compiling takes its time.
ONLY = {"evicted": {"weigh_keys"}, "votes": {"vote", "attention_prefill"}}

# (B, S, T, C) of calls: a launch makes a kernel special to sizes that are 1 or multiples of 16.
CALLS = ((1, 1, 5, 256), (3, 1, 5, 99), (1, 37, 37, 99))


def llama() -> list[Schedule]:
    """Steps without and with padding."""
    torch.manual_seed(0)
    lifted = lift(LlamaForCausalLM(LlamaConfig(**SHAPE)).to(torch.bfloat16).eval())
    return [lower(bind_cache(lifted, masked=masked, last_only=True), WANTS) for masked in (False, True)]


def pairs(*passes: Pass) -> Schedule:
    """Linears of the same Llama in pivot storage: those whose kernels hold most at once."""
    torch.manual_seed(0)
    lifted = lift(LlamaForCausalLM(LlamaConfig(**SHAPE)).to(torch.bfloat16).eval())
    for each in (RandomPairs(0.6), *passes):
        each.run(lifted, Context())
    schedule = lower(bind_cache(lifted, masked=False, last_only=True), WANTS)
    placing = [r for r in schedule.regions if isinstance(r, Linear) and any(part.placed for part in r.parts)]
    schedule.regions = [placing[0], placing[4], placing[-1]]  # q, k and v; pivots and others that a residual reads
    return schedule


def sparse(text: str | None, skip: float, paging: Paging | None, eviction: Eviction | None = None) -> Schedule:
    """Attention of the same Llama by a pattern, over a ring, or over tokens of which some are evicted."""
    torch.manual_seed(0)
    lifted = lift(LlamaForCausalLM(LlamaConfig(**SHAPE)).to(torch.bfloat16).eval())
    if text is not None:
        SparseAttention(text, skip=skip).run(lifted, Context())
    options: dict[str, Any] = {"masked": paging is None, "paging": paging, "eviction": eviction}
    schedule = lower(bind_cache(lifted, last_only=True, bits=8, **options), WANTS)
    schedule.regions = [region for region in schedule.regions if isinstance(region, Attention)]
    return schedule


# format -> (bits of a number, group, format of zero points, type in memory)
FORMATS = {
    "int8": (8, 0, "", torch.int8), "int4": (4, 32, "", torch.uint8), "fp8": (8, 0, "", torch.float8_e4m3fn),
    "int3": (3, 64, "", torch.uint8), "nf4": (4, 64, "", torch.uint8), "int4-int4": (4, 32, "int4", torch.uint8),
    "int3-int8": (3, 32, "int8", torch.uint8),
}  # fmt: skip


def gate_and_up(format: str, rounded: bool = False) -> Program:
    """The linear of the same Llama whose kernels hold most at once, its weights in a format, its rows perhaps int8."""
    bits, group, zeros, dtype = FORMATS[format]
    n, m = SHAPE["hidden_size"], SHAPE["intermediate_size"]
    weights: dict[str, Any] = {"gain": torch.ones(n, dtype=torch.bfloat16)}
    lines = ['n = slim.rms_norm.default(x, weights["gain"], eps=1e-5)']
    if rounded:
        lines += ["s = slim.token_scale.default(n)", "q = slim.quantize.default(n, s, axis=1)"]
        lines.append("r = slim.dequantize.default(q, s, axis=1, dtype=torch.bfloat16)")

    def numbers(name: str, kind: str, shape: tuple[int, int], bits: int, dtype: torch.dtype) -> str:
        weights[name] = torch.zeros(shape[0], shape[1] * bits // 8, dtype=torch.uint8).view(dtype)
        if kind not in UNPACKS:
            return f'weights["{name}"]'
        lines.append(f'{name}_numbers = slim.unpack_{kind}.default(weights["{name}"])')
        return f"{name}_numbers"

    for name in ("gate", "up"):
        grid = (m, n // group) if group else (m,)
        weights[f"{name}_scale"] = torch.ones(grid, dtype=torch.float16 if group else torch.float32)
        arguments = [numbers(name, format.partition("-")[0], (m, n), bits, dtype), f'weights["{name}_scale"]']
        if zeros:
            kind = {"int4": (4, torch.uint8), "int8": (8, torch.int8)}[zeros]
            arguments.append(numbers(f"{name}_zero", zeros, (m, n // group), *kind))
        arguments += [f"axis=1, group_size={group}" if group else "axis=0", "dtype=torch.bfloat16"]
        lines.append(f"w{name} = slim.dequantize.default({', '.join(arguments)})")
        lines.append(f"{name} = aten.linear.default({'r' if rounded else 'n'}, w{name})")
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


def facts(kernel: Kernel, arch: str, sizes: dict[str, int] | None = None) -> dict[str, Any]:
    """What it takes."""
    made = compile_for(kernel, arch, sizes=sizes)
    return {"kernel": kernel.name, **{name: getattr(made, name) for name in ("arch", "registers", "spills", "shared")}}


def main(*archs: str) -> None:
    schedules = {"bf16": llama(), "pairs": [pairs()]}
    schedules["ring"] = [sparse(None, 0.0, Paging(64, fixed=1, window=1024, sinks=4))]
    schedules["best blocks"] = [sparse("top(64, 8) | columns(4)", 1e-3, Paging(64))]
    schedules["votes"] = [sparse("vertical_slash(1000, 1000) | columns(64)", 1e-3, None)]
    schedules["evicted"] = [sparse(None, 0.0, None, Eviction("h2o", 1024))]
    schedules["bigbird"] = [sparse("blocks(64, 3) | columns(64) | random(64, 3, 0)", 1e-3, None)]
    for format in FORMATS:
        schedules[format] = [lower(gate_and_up(format), WANTS)]
    for format in ("int8", "int4"):
        schedules[f"{format} of int8"] = [lower(gate_and_up(format, rounded=True), WANTS)]
    chosen = choose(SHAPE["vocab_size"], torch.bfloat16, 2, 0, True)
    found = []
    for arch in archs:
        kernels = {chosen.code: ("bf16", chosen)}
        for format, several in schedules.items():
            for unit in (emit(schedule, ahead(arch).processors) for schedule in several):
                wanted = [each for each in unit.kernels.values() if each.name in ONLY.get(format, {each.name})]
                kernels = {kernel.code: (format, kernel) for kernel in wanted} | kernels
        found += [{"format": format, **facts(kernel, arch)} for format, kernel in kernels.values()]
    for schedule in schedules["bf16"]:
        special = launched(emit(schedule, ahead("sm_90").processors))
        found += [{"format": "bf16", **facts(kernel, "sm_90", sizes)} for kernel, sizes in special]
    print("RESULT", json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
