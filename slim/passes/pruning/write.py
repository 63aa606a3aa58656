"""The model's configuration, once layers have fewer neurons and heads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from slim import errors
from slim.compiler.config import KV_HEADS, empty_model, is_valid
from slim.compiler.dependencies import Kind
from slim.compiler.program import Program
from slim.compiler.uses import EXPERTS
from slim.passes.pruning.sites import HEADS, Site

# What configurations call the width between the linears of an MLP, of dense ones and of experts; the first that fits.
_DENSE = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "shared_expert_intermediate_size",
          "shared_intermediate_size", "d_ff", "dff", "hidden_dim")  # fmt: skip
_EXPERTS = ("moe_intermediate_size", "expert_intermediate_size", "intermediate_size", "ffn_hidden_size")
_NUMBER = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
_UNSAID = "which the configuration of the model cannot say: slim saves it, plain transformers cannot hold it"


def write_config(
    program: Program, sites: Sequence[Site], others: Sequence[Site], gone: Mapping[Site, int]
) -> list[str]:
    """Keeps the configuration true where layers that were alike still are; notes where it cannot be.

    Args:
        sites: those that lose ``gone`` units. others: those of the same kinds that were left alone.
    """
    config, notes = program.facts.config, list[str]()
    if config is None:
        return notes
    for alike in _families(sorted([*sites, *others], key=lambda site: site.linear)):
        left = {site: site.units - gone.get(site, 0) for site in alike}
        first = alike[0]
        if len(set(left.values())) > 1:
            told = ", ".join(f"{site} {count}" for site, count in left.items())
            notes.append(f"layers differ ({told}), {_UNSAID}")
        elif left[first] != first.units:
            said = next((each for each in _written(config, first, left[first]) if _builds(program, each, alike)), None)
            if said is None:
                notes.append(f"layers have {left[first]} {first.kind}s, {_UNSAID}")
            else:
                program.facts.config = config = said
    return notes


def _builds(program: Program, config: dict[str, Any], sites: Sequence[Site]) -> bool:
    """Whether transformers makes the weights of ``sites`` of ``config`` as large as the pruned Program holds them."""
    facts = replace(program.facts, config=config)
    if not is_valid(facts, config):
        return False
    try:
        expected = empty_model(facts).state_dict()
    except errors.UnsupportedModel:  # nothing to compare with
        return True
    except (ValueError, TypeError):
        return False
    names = {member.weight for site in sites for member in site.group.members}
    stored = {(part.base if (part := facts.parts.get(name)) else name): name for name in names}
    return all(
        tuple(expected[base].shape) == (facts.bases[base][0] if base in facts.bases else program.weights.shape(name))
        for base, name in stored.items()
        if base in expected
    )


def can_say_heads(program: Program, lost: Mapping[Site, int]) -> bool:
    """Whether plain transformers builds the model with so many kv heads less."""
    facts = program.facts
    if facts.config is None or not any(lost.values()):
        return True
    if len({(site.units, count) for site, count in lost.items()}) > 1:
        return False
    site, count = next(iter(lost.items()))
    said = next(iter(_written(facts.config, site, site.units - count)), None)
    if said is None or not is_valid(facts, said):
        return False
    try:
        expected = empty_model(replace(facts, config=said)).state_dict()
    except (errors.UnsupportedModel, ValueError, TypeError):
        return False
    part = facts.parts.get(site.weight)
    shape = list(program.weights.shape(site.weight))
    shape[-1] = shape[-1] // site.units * (site.units - count)
    stored = shape[:-2] + shape[:-3:-1] if part is not None and part.transposed else shape
    meta = expected.get(site.weight if part is None else part.base)
    return meta is not None and list(meta.shape) == stored


def _families(sites: Sequence[Site]) -> list[list[Site]]:
    """Sites that one field of a configuration speaks of: of one kind and, as they were, one size."""
    found: dict[tuple[Any, ...], list[Site]] = {}
    for site in sites:
        found.setdefault((site.kind, site.units, site.linear.target is EXPERTS), []).append(site)
    return list(found.values())


def _written(config: dict[str, Any], site: Site, left: int) -> Iterator[dict[str, Any]]:
    """Configurations that may be those of ``left`` units, the likeliest first."""
    if site.kind in HEADS:
        yield from _heads_written(config, site, left)
    elif site.kind is Kind.EXPERT:
        counts = {name: left for name in _NUMBER if config.get(name) == site.units}
        if counts:
            yield {**config, **counts}
    else:
        names = _EXPERTS if site.linear.target is EXPERTS else _DENSE
        named = [name for name in names if config.get(name) == site.units]
        free = [name for name in ("n_inner",) if config.get(name, 0) is None]  # stands for four times the model's width
        for name in (*named, *free):
            yield {**config, name: left}


def _heads_written(config: dict[str, Any], site: Site, left: int) -> Iterator[dict[str, Any]]:
    """Queries, keys and values; and the width of a head, which is otherwise taken to be the model's by the heads."""
    heads = len(site.columns) // site.width
    queries = {name: heads // site.units * left for name in _HEADS if config.get(name) == heads}
    if not queries:
        return
    keys = {name: left for name in KV_HEADS if config.get(name) == site.units and site.kind is Kind.KV_HEAD}
    width = {"head_dim": site.width} if "num_attention_heads" in queries else {}
    yield {**config, **queries, **keys, **width}
