"""The cache itself: what may be asked for, and how it grows."""

import pytest
import torch

import slim
from slim import errors
from slim.runtime.cache import KVCache, KVCacheConfig, Slot

SLOTS = (Slot(heads=2, key_width=4, value_width=6, dtype=torch.float32),) * 3


@pytest.mark.parametrize(
    "options", [{"layout": "heap"}, {"dtype": "int7"}, {"max_tokens": 0}, {"max_tokens": 2.5}, {"window": -1}], ids=str
)
def test_what_makes_no_sense_is_refused(options):
    with pytest.raises(errors.BadInput, match=next(iter(options))):
        KVCacheConfig(**options)


def test_sinks_without_a_window_contradict_it():
    with pytest.raises(errors.ContradictoryOptions):
        KVCacheConfig(sinks=4)


def test_growing_keeps_what_is_held():
    cache = KVCache(SLOTS, batch=2, capacity=4)
    for tensor in cache.tensors:
        tensor.fill_(7.0)
    cache.prepare(4, torch.tensor([[False, True, True, True], [True] * 4]))
    cache.advance(4)
    cache.reserve(1)
    assert cache.capacity == 8
    assert all(bool((tensor[:, :, :4] == 7).all()) for tensor in cache.tensors)
    assert cache.prepare(1).tolist() == [[False, True, True, True, True], [True] * 5]


def test_bytes_are_those_of_its_tensors():
    cache = KVCache(SLOTS, batch=2, capacity=10)
    assert cache.nbytes == 3 * 2 * 10 * SLOTS[0].bytes_per_token
    assert SLOTS[0].bytes_per_token == 2 * (4 + 6) * 4


def test_it_never_grows_beyond_its_limit():
    cache = KVCache(SLOTS, batch=1, capacity=4, max_tokens=6)
    cache.prepare(4)
    cache.advance(4)
    cache.prepare(2)
    cache.advance(2)
    assert cache.capacity == 6
    with pytest.raises(errors.PromptTooLong, match="7 tokens do not fit a cache of 6"):
        cache.prepare(1)


def test_nothing_is_held_before_it_is_written():
    cache = KVCache(SLOTS, batch=1)
    cache.prepare(3)
    assert cache.length == 0


def test_reset_forgets_tokens_and_padding_and_keeps_the_memory():
    cache = KVCache(SLOTS, batch=1, capacity=4)
    cache.prepare(2, torch.tensor([[False, True]]))
    cache.advance(2)
    memory = [tensor.data_ptr() for tensor in cache.tensors]
    cache.reset()
    assert cache.length == cache.get_seq_length() == 0
    assert bool(cache.prepare(2).all())
    assert [tensor.data_ptr() for tensor in cache.tensors] == memory


@pytest.mark.parametrize(
    ("order", "said"),
    [(0, "0 is no list of rows"), ([], r"\[\] is no list of rows"), ([2], "2 is no row; there are 2")],
)
def test_an_order_of_rows_that_is_none_is_refused(order, said):
    cache = KVCache(SLOTS, batch=2, capacity=4)
    with pytest.raises(errors.BadInput, match=said):
        cache.fork(order)


@pytest.mark.parametrize("given", [{"window": 4}, "paged", KVCacheConfig], ids=str)
def test_what_is_no_configuration_is_refused_before_anything_is_compiled(given):
    with pytest.raises(errors.BadInput, match="is no KVCacheConfig"):
        slim.compile("no/such/model", kv_cache=given)
    with pytest.raises(errors.BadInput, match="None is no number of tokens"):
        KVCacheConfig(window=4, sinks=None)
