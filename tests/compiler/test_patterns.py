"""Sparsity patterns: their text, and what they mean."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import slim.compiler.dialect  # noqa: F401  registers the operations
from slim import errors
from slim.compiler.patterns import by_head, read_pattern
from slim.compiler.patterns.mask import pattern_mask
from slim.compiler.patterns.picture import picture, share_kept
from slim.compiler.patterns.terms import Columns, Window
from tests.patterns import PATTERNS, patterns

attention, cached_attention = torch.ops.slim.attention, torch.ops.slim.cached_attention


def tensors(seed: int, batch: int, heads: int, kv_heads: int, tokens: int, width: int = 8) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, n, tokens, width, generator=generator) for n in (heads, kv_heads, kv_heads)]


@given(patterns())
def test_text_is_read_back_as_it_was(text: str) -> None:
    assert str(read_pattern(text)) == text


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("window()", "wrong number"),
        ("window(0)", "numbers of tokens"),
        ("window(4.5)", "numbers of tokens"),
        ("window(2147483648)", "numbers of tokens"),
        ("window(True)", "numbers of tokens"),
        ("windows(4)", "none of dense"),
        ("columns(4)", "would see no key"),
        ("window(4) & columns(1)", "none of dense"),
        ("0-1: window(4); 3: dense", "do not follow"),
        ("a: dense", "names no heads"),
        ("0: top(4, 2); 1: top(8, 2)", "in common"),
        ("window(4", "was never closed"),
        ("", "invalid syntax"),
    ],
)
def test_what_is_no_pattern_is_refused_with_the_reason(text: str, reason: str) -> None:
    with pytest.raises(errors.BadInput, match=reason):
        read_pattern(text)


def test_a_pattern_is_a_picture() -> None:
    assert picture("window(2) | columns(1)", 4).splitlines() == ["█···", "██··", "███·", "█·██"]
    assert picture("blocks(2, 1) | summary(2, 1)", 4).splitlines() == ["█···", "██··", "·██·", "·███"]
    assert picture("window(1) | stride(2)", 5).splitlines()[4] == "█·█·█"


def test_heads_that_are_alike_are_written_once() -> None:
    window, dense = (Window(4), Columns(1)), ()
    assert str(by_head([window, window])) == "window(4) | columns(1)"
    assert str(by_head([dense, window, window])) == "0: dense; 1-2: window(4) | columns(1)"


def test_one_in_eight_blocks_is_about_an_eighth() -> None:
    assert share_kept("top(8, 8)", 256) < 0.25
    assert share_kept("window(32) | columns(4)", 256) == pytest.approx((256 * 36 - 36 * 35 / 2) / (256 * 257 / 2), 0.01)


@pytest.mark.parametrize("text", PATTERNS)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 999), tokens=st.integers(1, 150), heads=st.sampled_from([(4, 4), (4, 2), (4, 1)]))
def test_attention_is_dense_attention_with_the_mask_of_the_pattern(
    text: str, seed: int, tokens: int, heads: tuple[int, int]
) -> None:
    q, k, v = tensors(seed, 2, *heads, tokens)
    got = attention(q, k, v, layer=0, scale=0.35, pattern=text)
    causal = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    kept = causal & pattern_mask(text, q, k, causal[None, None], None, scale=0.35, offset=0)
    assert bool(kept.any(-1).all())  # every row sees a key
    wide = [x.repeat_interleave(heads[0] // heads[1], 1).double() for x in (k, v)]
    scores = (q.double() @ wide[0].transpose(2, 3) * 0.35).masked_fill(~kept, float("-inf"))
    torch.testing.assert_close(got.double(), scores.softmax(-1) @ wide[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("text", [text for text in PATTERNS if "vertical_slash" not in text])
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 999), tokens=st.integers(2, 150), new=st.integers(1, 40))
def test_a_step_over_a_cache_is_the_row_of_the_prefill(text: str, seed: int, tokens: int, new: int) -> None:
    new = min(new, tokens - 1)
    q, k, v = tensors(seed, 2, 4, 2, tokens)
    whole = attention(q, k, v, layer=0, scale=0.35, pattern=text)
    caches = [torch.zeros(2, 2, tokens, 8) for _ in range(2)]
    for cache, x in zip(caches, (k, v), strict=True):
        cache[:, :, : tokens - new] = x[:, :, : tokens - new]
    start = tokens - new
    step = cached_attention(
        q[:, :, start:], k[:, :, start:], v[:, :, start:], *caches, start, layer=0, scale=0.35, pattern=text
    )
    torch.testing.assert_close(step, whole[:, :, start:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("text", [text for text in PATTERNS if "vertical_slash" not in text])
def test_padding_on_the_left_moves_the_pattern_along(text: str) -> None:
    q, k, v = tensors(0, 1, 4, 2, 90)
    alone = attention(q, k, v, layer=0, scale=0.35, pattern=text)
    padded = [torch.nn.functional.pad(x, (0, 0, 13, 0), value=3.0) for x in (q, k, v)]
    mask = torch.ones(1, 103, dtype=torch.bool)
    mask[:, :13] = False
    got = attention(*padded, mask, layer=0, scale=0.35, pattern=text)
    torch.testing.assert_close(got[:, :, 13:], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("text", ["window(4096)", "top(4, 1)", "stride(1)", "0-1: dense; 2-3: blocks(512, 1)"])
def test_a_pattern_that_keeps_all_is_dense(text: str) -> None:
    q, k, v = tensors(1, 2, 4, 2, 100)
    sparse, dense = (attention(q, k, v, layer=0, scale=0.35, pattern=pattern) for pattern in (text, None))
    torch.testing.assert_close(sparse, dense, rtol=1e-6, atol=1e-6)


def test_gradients_flow_through_a_pattern() -> None:
    q, k, v = (x.requires_grad_() for x in tensors(2, 1, 4, 2, 20))
    attention(q, k, v, layer=0, scale=0.35, pattern="window(3) | columns(1)").sum().backward()
    assert q.grad is not None
    assert bool(q.grad.isfinite().all())
    assert bool((q.grad != 0).any())
