"""Caches that evict: what is kept, and that attention sees that and nothing else."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface

import slim
from benchmarks import zoo
from slim import KVCacheConfig, errors
from slim.codegen import build
from slim.codegen.cpp import emit as cpp
from slim.codegen.regions.lower import lower
from slim.codegen.triton import emit as triton
from slim.runtime.binding import bind_cache
from slim.runtime.compiled import CompiledModel
from slim.runtime.evicting import EvictingKVCache
from slim.runtime.eviction import Eviction, objections
from tests.compiled import difference, lifted, pair, prompt

TARGETS = ["eager", pytest.param("cpu", marks=pytest.mark.skipif(build.missing() is not None, reason="no C++ here"))]
KINDS = ["h2o", "snapkv"]


def compiled(name: str, target: str, kind: Any, budget: int, **options: Any) -> CompiledModel:
    return CompiledModel(lifted(name), target, kv_cache=KVCacheConfig(eviction=kind, budget=budget, **options))


class Oracle:
    """The rule in plain words: all keys are kept for ever, and a mask says which a head still sees."""

    def __init__(self, name: str, rule: Eviction) -> None:
        self.rule, self.model = rule, zoo.build(name)
        self.layers: dict[int, dict[str, Tensor]] = {}
        AttentionInterface.register("oracle", self.attend)
        self.model.set_attn_implementation("oracle")
        self.seen = 0

    def attend(self, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: float, **_: Any) -> Any:
        batch, groups, new, _ = k.shape
        state = self.layers.setdefault(module.layer_idx, {
            "k": k[:, :, :0], "v": v[:, :, :0], "mass": torch.zeros(batch, groups, 0),
            "kept": torch.ones(batch, groups, 0, dtype=torch.bool),
        })  # fmt: skip
        for name, more in (("k", k), ("v", v), ("mass", torch.zeros(k.shape[:3])), ("kept", torch.ones(k.shape[:3]))):
            state[name] = torch.cat([state[name], more.to(state[name].dtype)], 2)
        share, keys = q.shape[1] // groups, state["k"].shape[2]
        scores = q @ state["k"].repeat_interleave(share, 1).mT * scaling
        seen = torch.ones(new, keys, dtype=torch.bool).tril(keys - new) & state["kept"][:, :, None]
        weights = scores.masked_fill(~seen.repeat_interleave(share, 1), float("-inf")).softmax(-1)
        counted = weights[:, :, -self.rule.votes :] if self.rule.votes else weights
        if 0 < self.rule.votes <= new:
            state["mass"].zero_()
        state["mass"] += counted.unflatten(1, (groups, share)).sum((2, 3))
        return (weights @ state["v"].repeat_interleave(share, 1)).transpose(1, 2).contiguous(), None

    def __call__(self, tokens: Tensor) -> Tensor:
        count, held = tokens.shape[1], next(iter(self.kept()), [[[]]])[0][0]
        if len(held) + count > self.rule.budget and count <= self.rule.at_once:
            self.evict()
        positions = torch.arange(self.seen, self.seen + count)[None]
        with torch.no_grad():
            logits: Tensor = self.model(tokens, position_ids=positions, use_cache=False).logits
        self.seen += count
        if len(self.kept()[0][0][0]) > self.rule.budget:
            self.evict()
        return logits

    def kept(self) -> list[list[list[list[int]]]]:
        """The tokens that each layer, row and head still sees."""
        return [
            [[head.nonzero()[:, 0].tolist() for head in row] for row in state["kept"]] for state in self.layers.values()
        ]

    def evict(self) -> None:
        for state, rows in zip(self.layers.values(), self.kept(), strict=True):
            for b, heads in enumerate(rows):
                for g, held in enumerate(heads):
                    older, mass = held[: len(held) - self.rule.newest], state["mass"][b, g, held]
                    score = {token: float(mass[max(0, i - 2) : i + 3].mean()) for i, token in enumerate(older)}
                    stay = sorted(older, key=lambda token: -score[token])[: self.rule.kept - self.rule.newest]
                    state["kept"][b, g] = False
                    state["kept"][b, g, stay + held[len(older) :]] = True
            state["mass"] *= 0.0 if self.rule.votes else 0.7


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("name", "kind"), [("llama", "h2o"), ("llama", "snapkv"), ("gpt2", "h2o")])
def test_logits_are_those_of_all_keys_under_a_mask_that_hides_what_was_evicted(name, kind, target):
    model, oracle = compiled(name, target, kind, 64), Oracle(name, Eviction(kind, 64))
    tokens = torch.randint(3, zoo.VOCAB, (2, 131), generator=torch.Generator().manual_seed(1))
    cache = model.new_cache(2)
    for start, stop in ((0, 80), *((i, i + 1) for i in range(80, 109)), *((i, i + 2) for i in range(109, 131, 2))):
        part = tokens[:, start:stop]
        found, wanted = model(part, past_key_values=cache).logits, oracle(part)
        assert difference(found, wanted) < 1e-4, (start, stop)
        assert [cache.held(slot).tolist() for slot in range(len(cache.slots))] == oracle.kept()
        assert cache.length <= 64
    assert cache.stats().evicted == 131 - cache.length
    assert cache.stats().choices > 10


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", KINDS)
def test_what_fits_the_budget_is_written_as_without_eviction(kind, target):
    tokens, mask = prompt()
    options = dict(attention_mask=mask, max_new_tokens=40, do_sample=False, eos_token_id=None, pad_token_id=0)
    wanted = pair("llama")[1].generate(tokens, **options)
    assert torch.equal(compiled("llama", target, kind, 49).generate(tokens, **options), wanted)


@pytest.mark.parametrize("target", TARGETS)
def test_bursts_write_what_steps_write_and_memory_stays_within_the_budget(target):
    model = compiled("llama", target, "h2o", 16)
    tokens, _ = prompt(padded=False)
    cache, stepped = model.new_cache(3), model.new_cache(3)
    written = model.generate(
        tokens, past_key_values=cache, max_new_tokens=60, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    logits = model(tokens, past_key_values=stepped).logits[:, -1]
    for column in range(tokens.shape[1], written.shape[1]):
        assert torch.equal(logits.argmax(-1), written[:, column])
        logits = model(written[:, column : column + 1], past_key_values=stepped).logits[:, -1]
    assert cache.capacity == 16
    assert cache.nbytes == sum(slot.bytes_per_token for slot in cache.slots) * 3 * 16
    assert cache.stats().seen == cache.get_seq_length() == written.shape[1] - 1


@pytest.mark.parametrize("tokens", [5, 12, 30])
@pytest.mark.parametrize("kind", KINDS)
def test_padding_leaves_first_and_a_padded_row_is_the_row_alone(kind, tokens):
    model, pads = compiled("llama", "auto", kind, 16), 34 - tokens
    short, long = (
        torch.randint(3, zoo.VOCAB, (1, n), generator=torch.Generator().manual_seed(n)) for n in (tokens, 34)
    )
    padded = torch.cat([torch.cat([torch.zeros(1, pads, dtype=torch.int64), short], 1), long])
    mask = torch.ones_like(padded)
    mask[0, :pads] = 0
    options = dict(max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0)
    together = model.generate(padded, attention_mask=mask, **options)
    assert torch.equal(together[:1, pads:], model.generate(short, **options))
    assert torch.equal(together[1:], model.generate(long, **options))


def test_a_long_prompt_is_run_in_pieces_and_takes_no_more_than_one_of_them_beside_the_budget():
    model = compiled("llama", "auto", "h2o", 16)
    cache = model.new_cache(1)
    assert cache.pieces(1200) == [512, 512, 176]
    most = []
    cache._resize = lambda capacity: (most.append(capacity), EvictingKVCache._resize(cache, capacity))
    logits = model(torch.full((1, 1200), 5), past_key_values=cache).logits
    assert logits.shape[1] == 1200
    assert max(most) <= 16 + 512
    assert cache.capacity == 16


@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_numbers_and_their_scales_move_together(bits):
    tokens, mask = prompt()
    options = dict(attention_mask=mask, max_new_tokens=60, do_sample=False, eos_token_id=None, pad_token_id=0)
    written = [
        compiled("llama", target, "h2o", 24, dtype=bits).generate(tokens, **options) for target in ("eager", "auto")
    ]
    assert torch.equal(*written)


def test_rows_fork_and_nothing_is_taken_back():
    model = compiled("llama", "auto", "h2o", 16)
    tokens, _ = prompt(padded=False)
    cache = model.new_cache(3)
    model(tokens.repeat(1, 3), past_key_values=cache)
    cache.fork([2, 0])
    assert cache.held(0).shape[0] == cache.mask.shape[0] == 2
    alone = model.new_cache(1)
    model(tokens[2:].repeat(1, 3), past_key_values=alone)
    step = torch.tensor([[7], [7]])
    assert torch.allclose(
        model(step, past_key_values=cache).logits[:1], model(step[:1], past_key_values=alone).logits, atol=1e-5
    )
    cache.truncate(28)
    with pytest.raises(errors.CacheUnsupported, match="cannot go back"):
        cache.truncate(20)


def test_a_mask_that_changes_its_mind_is_refused():
    model = compiled("llama", "eager", "h2o", 16)
    tokens, mask = prompt()
    cache = model.new_cache(3)
    model(tokens, attention_mask=mask, past_key_values=cache)
    with pytest.raises(errors.BadInput, match="hides tokens"):
        model(tokens[:, :1], attention_mask=torch.ones(3, 10, dtype=torch.int64), past_key_values=cache)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"eviction": "lru", "budget": 64}, "eviction"), ({"eviction": "h2o"}, "budget"),
        ({"eviction": "h2o", "budget": 7}, "budget"), ({"eviction": "h2o", "budget": 64.0}, "budget"),
    ],
    ids=str,
)  # fmt: skip
def test_a_rule_that_does_not_exist_and_no_budget_are_refused(options, named):
    with pytest.raises(errors.BadInput, match=named):
        KVCacheConfig(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"budget": 64}, {"eviction": "h2o", "budget": 64, "window": 32},
        {"eviction": "h2o", "budget": 64, "layout": "paged"},
    ],
    ids=str,
)  # fmt: skip
def test_options_that_contradict_eviction_are_refused(options):
    with pytest.raises(errors.ContradictoryOptions):
        KVCacheConfig(**options)


def test_attention_that_hangs_on_places_is_refused_with_the_reason():
    with pytest.raises(errors.CacheUnsupported, match="by how far away they are"):
        compiled("mistral", "eager", "h2o", 16)


def test_layers_that_share_keys_are_refused():
    first, second = lifted("llama").attention_nodes()
    assert objections([first, second]) == {}
    second.args = (second.args[0], *first.args[1:])
    assert "shares keys" in objections([first, second])[second]


def test_every_target_has_a_kernel_that_counts_what_keys_get():
    bound = bind_cache(lifted("llama"), eviction=Eviction("h2o", 16))
    for wants in (cpp.WANTS, triton.WANTS):
        assert lower(bound, wants).foreign == []


def test_it_is_saved_with_the_model(tmp_path):
    model = compiled("llama", "eager", "snapkv", 16)
    model.save(tmp_path)
    assert slim.load(tmp_path, target="eager").kv_cache == model.kv_cache
