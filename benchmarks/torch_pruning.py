"""Prune beside Torch-Pruning's own pruner: neurons of MLPs alone, the same number a layer, nothing trained.

    pip install --no-deps --target benchmarks/.peers/torch-pruning torch-pruning
    python -m benchmarks.torch_pruning            # results/torch_pruning.json and .md

Attention is left alone: where queries share keys and values, Torch-Pruning does not come back from the group of a key's
rows. The MLPs are where it runs on all models here.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any, Literal

import torch

import slim
from benchmarks.kept import read_kept, write_kept
from benchmarks.quality_peers.cases import CASES, Case
from slim.passes import Prune
from slim.passes.pruning.budget import multiple_of
from slim.runtime.perplexity import score

PEER = Path(__file__).resolve().parent / ".peers" / "torch-pruning"
RESULTS = Path(__file__).resolve().parent / "results" / "torch_pruning.json"
SEQUENCES = {"babyllama361": 48, "stories260K": 48}  # of calibration
PASSAGES = 60


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(SEQUENCES), choices=list(CASES))
    parser.add_argument("--shares", nargs="+", type=float, default=(0.2, 0.4), help="of the neurons of each layer")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    sys.path.insert(0, str(PEER))
    kept = read_kept(options.output)
    for name in options.models:
        case = CASES[name]()
        before = nats(slim.compile(case.model, target="eager", verify=False), case)
        for share in options.shares:
            kept.setdefault(name, {})[f"{share:g}"] = found = measure(case, share, before)
            print(name, f"{share:.0%}", found, flush=True)
        write_kept(options.output, kept, table(kept))


def measure(case: Case, share: float, before: float) -> dict[str, Any]:
    """Nats a token lost, and seconds."""
    width = int(json.loads((case.model / "config.json").read_text())["intermediate_size"])
    left = int(width * (1 - share)) // multiple_of(width) * multiple_of(width)
    found: dict[str, Any] = {"width": width, "left": left}
    for way in ("magnitude", "taylor"):
        start = time.perf_counter()
        model = peer(case, way, width - left)
        seconds = round(time.perf_counter() - start, 1)
        assert {layer.mlp.down_proj.in_features for layer in model.model.layers} == {left}
        found[f"Torch-Pruning, {way}"] = {"lost": nats(model, case) - before, "seconds": seconds}
    for criterion in ("taylor", "obs"):
        start = time.perf_counter()
        made = ours(case, criterion, width, left)
        seconds = round(time.perf_counter() - start, 1)
        found[f"slim, {criterion}"] = {"lost": nats(made, case) - before, "seconds": seconds}
    return found


def nats(model: Any, case: Case) -> float:
    found = score(model, case.passages[:PASSAGES])
    return found.nats / found.tokens


def ours(case: Case, criterion: Literal["taylor", "obs"], width: int, left: int) -> Any:
    """The pass, told to leave as many neurons as the peer does."""
    program = slim.compile(case.model, target="eager", verify=False).program
    from slim.compiler.dependencies import Dependencies
    from slim.passes.pruning.prices import Load, Prices
    from slim.passes.pruning.sites import find_sites

    sites = [site for site in find_sites(program, Dependencies(program))[0] if site.units == width]
    prices = Prices("blocks", Load.of(program, 512))
    ratio = prices.holding(program).gone(dict.fromkeys(sites, width - left)) / prices.total(program)
    pass_ = Prune(ratio - 1e-6, criterion, units="neurons")
    calibration = case.tensors()[: SEQUENCES[case.name]]
    made = slim.compile(case.model, [pass_], calibration=calibration, target="eager", verify=False)
    assert made.program.facts.config is not None
    assert made.program.facts.config["intermediate_size"] == left
    return made


def peer(case: Case, way: str, gone: int) -> Any:
    """A transformers model that Torch-Pruning's own pruner has taken ``gone`` neurons of each layer out of."""
    import torch_pruning as tp
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(case.model, dtype=torch.float32).eval()
    model.config.use_cache = False
    tokens = case.tensors()[: SEQUENCES[case.name]]
    kinds = {"magnitude": tp.importance.GroupMagnitudeImportance, "taylor": tp.importance.GroupTaylorImportance}
    roots = [part for layer in model.model.layers for part in (layer.mlp.gate_proj, layer.mlp.up_proj)]
    width = roots[0].out_features
    pruner = tp.pruner.BasePruner(
        model,
        example_inputs={"input_ids": tokens[0][:, :16], "use_cache": False},
        importance=kinds[way](),
        pruning_ratio=0.0,
        pruning_ratio_dict=dict.fromkeys(roots, (gone - 1e-06) / width),
        ignored_layers=[part for part in model.modules() if isinstance(part, torch.nn.Linear) and part not in roots],
        output_transform=lambda out: out.logits,
    )
    if way == "taylor":
        for row in tokens:
            model(input_ids=row, labels=row).loss.backward()
    pruner.step()
    for parameter in model.parameters():
        parameter.grad = None
    model.config.intermediate_size = width - gone
    return model


def table(kept: dict[str, Any]) -> str:
    ways = ("Torch-Pruning, magnitude", "Torch-Pruning, taylor", "slim, taylor", "slim, obs")
    lines = ["| model | neurons | " + " | ".join(ways) + " |", "|---" * (len(ways) + 2) + "|"]
    for name, found in kept.items():
        for row in found.values():
            cells = [f"{row[way]['lost']:.3f}" for way in ways]
            lines.append(f"| {name} | {row['width']} to {row['left']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
