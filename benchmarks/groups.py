"""How long it takes to find what goes together, and whether it is right: models of 32 narrow layers.

    python -m benchmarks.groups                # results/groups.json and .md

Of every model a third of the units of each group is taken out; the output must be that of the model with zeros in
their place. Query heads, which are found in a run of their own, are taken out apart, and so are experts, which must
behave as if they were never chosen (tests/compiler/test_dependencies.py holds that).
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from benchmarks.kept import read_kept, write_kept
from slim.compiler.dependencies import Dependencies, Group, Kind
from slim.compiler.lift import lift
from slim.compiler.probe import make_probe
from slim.compiler.program import Program

RESULTS = Path(__file__).resolve().parent / "results" / "groups.json"
_SIZES = dict(
    vocab_size=96, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    max_position_embeddings=64, pad_token_id=0,
)  # fmt: skip
_GPT2 = dict(n_embd=32, n_head=4, n_positions=64, vocab_size=96)
# MiniLM is a BERT, deep for its width.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("llama", _SIZES),
    "Qwen2": ("qwen2", _SIZES),
    "Phi-3": ("phi3", _SIZES),
    "GPT-NeoX": ("gpt_neox", _SIZES),
    "GPT-2": ("gpt2", _GPT2),
    "Mixtral": ("mixtral", {**_SIZES, "num_local_experts": 8}),
    "BERT": ("bert", _SIZES),
    "MiniLM": ("bert", {**_SIZES, "hidden_size": 48, "num_attention_heads": 12, "intermediate_size": 192}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    kept = read_kept(options.output)
    for name in options.models:
        kept[name] = measure(built(name, options.layers), options.rounds)
        print(name, kept[name], flush=True)
        write_kept(options.output, kept, table(kept))


def built(name: str, layers: int) -> Program:
    """Random weights, norms and biases too."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    torch.manual_seed(0)
    kind, sizes = MODELS[name]
    depth = {"n_layer": layers} if kind == "gpt2" else {"num_hidden_layers": layers}
    loader = AutoModel if kind == "bert" else AutoModelForCausalLM
    model = loader.from_config(AutoConfig.for_model(kind, **sizes, **depth)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return lift(model)


def measure(program: Program, rounds: int) -> dict[str, Any]:
    """Seconds, the best of ``rounds``; units by kind; the largest relative error of what is left."""
    seconds = min(_seconds(program) for _ in range(rounds))
    found = Dependencies(program)
    units: Counter[str] = Counter()
    for group in found.groups:
        units[str(group.kind)] += group.units
    error = removal_error(program, "kv")
    queries = sum(g.units for g in Dependencies(program, "query").groups if g.kind is Kind.QUERY_HEAD)
    if queries:
        units["query head"] = queries
        error = max(error, removal_error(program, "query"))
    return {"seconds": round(seconds, 3), "nodes": len(program.graph.nodes), "units": dict(units), "error": error}


def _seconds(program: Program) -> float:
    start = time.perf_counter()
    Dependencies(program)
    return time.perf_counter() - start


def removal_error(program: Program, by: Any) -> float:
    """Between the model without some units of each group but of experts, and the model with them at zero."""
    generator = torch.Generator().manual_seed(1)
    smaller, zeroed = program.copy(), program.copy()
    found = Dependencies(smaller, by)
    gone: dict[Group, torch.Tensor] = {}
    for group in found.groups:
        if group.kind is not Kind.EXPERT:
            gone[group] = torch.randperm(group.units, generator=generator)[: max(1, group.units // 3)]
    for group, units in gone.items():
        for member in group.members:
            indices = torch.isin(member.unit, units).nonzero()[:, 0]
            zeroed.weights[member.weight] = zeroed.weights[member.weight].clone().index_fill_(member.dim, indices, 0)
    found.remove(gone)
    smaller.clean()
    probe = make_probe(program)
    return float(probe.error(probe.run(zeroed), probe.run(smaller)))


def table(kept: dict[str, Any]) -> str:
    lines = ["| model | nodes | seconds | units | error |", "|---|---|---|---|---|"]
    for name, found in kept.items():
        units = ", ".join(f"{count:,} {kind}s" for kind, count in found["units"].items())
        lines.append(f"| {name} | {found['nodes']:,} | {found['seconds']:.2f} | {units} | {found['error']:.1g} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
