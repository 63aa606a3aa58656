"""What generated kernels call for single numbers and have no name for in Triton."""

# mypy: disable-error-code="no-untyped-def"
# Triton reads these as its own language, in which a parameter has the type of its argument.

from __future__ import annotations

import triton
import triton.language as tl

from slim.compiler.dialect.quant import NF4

NF4_LOW, NF4_HIGH = (
    tl.constexpr(int.from_bytes(bytes(level & 255 for level in half), "little")) for half in (NF4[:8], NF4[8:])
)


@triton.jit
def silu(x):
    return x * tl.sigmoid(x)


@triton.jit
def tanh(x):
    e = tl.exp(-2.0 * tl.abs(x))
    y = (1.0 - e) / (1.0 + e)
    small = x - x * x * x * 0.333333333
    return tl.where(tl.abs(x) < 0.01, small, tl.where(x < 0, -y, y))


@triton.jit
def gelu(x):
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def gelu_tanh(x):
    return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))


@triton.jit
def log1p(x):
    u = 1.0 + x
    near = u == 1.0
    return tl.where(near, x, tl.log(tl.where(near, 2.0, u)) * x / tl.where(near, 1.0, u - 1.0))


@triton.jit
def expm1(x):
    small = x * (1.0 + x * (0.5 + x * (0.16666667 + x * 0.041666667)))
    return tl.where(tl.abs(x) < 0.03, small, tl.exp(x) - 1.0)


@triton.jit
def round_even(x):
    """To the nearest integer, ties to the even one: adding 1.5 * 2^23 leaves no bits for a fraction."""
    magic = 12582912.0
    return tl.where(tl.abs(x) < 4194304.0, (x + magic) - magic, x)


@triton.jit
def trunc(x):
    return tl.where(x < 0, tl.ceil(x), tl.floor(x))


@triton.jit
def power(x, y):
    """x ** y; a negative x has a power where y is whole."""
    size = tl.exp2(y * tl.log2(tl.abs(x)))
    whole = y == tl.floor(y)
    odd = tl.abs(y - 2.0 * tl.floor(y * 0.5)) == 1.0
    signed = tl.where((x < 0) & odd, -size, size)
    result = tl.where((x < 0) & (whole == 0), float("nan"), signed)
    return tl.where(y == 0.0, 1.0, result)


@triton.jit
def sign(x):
    return (x > 0).to(tl.int32) - (x < 0).to(tl.int32)


@triton.jit
def floor_div(a, b):
    q = a // b
    return tl.where((a % b != 0) & ((a < 0) != (b < 0)), q - 1, q)


@triton.jit
def floor_mod(a, b):
    r = a % b
    return tl.where((r != 0) & ((r < 0) != (b < 0)), r + b, r)


@triton.jit
def floor_mod_float(a, b):
    return a - b * tl.floor(a / b)


@triton.jit
def product(a, b):
    return a * b


@triton.jit
def eight_of(bits):
    """[..., 8]: the numbers of three bits in each 24, the lowest first."""
    even = tl.join(tl.join(bits & 7, bits >> 12 & 7), tl.join(bits >> 6 & 7, bits >> 18 & 7))
    odd = tl.join(tl.join(bits >> 3 & 7, bits >> 15 & 7), tl.join(bits >> 9 & 7, bits >> 21 & 7))
    return tl.join(even, odd)


@triton.jit
def every_eighth(x):
    """The numbers of x at 0, 8, 16, ..., those at 1, 9, 17, ..., and so on."""
    half = tl.reshape(x, (x.shape[0] // 8, 2, 2, 2))
    even, odd = tl.split(half)
    a, c = tl.split(even)
    b, d = tl.split(odd)
    x0, x4 = tl.split(a)
    x2, x6 = tl.split(c)
    x1, x5 = tl.split(b)
    x3, x7 = tl.split(d)
    return x0, x1, x2, x3, x4, x5, x6, x7


@triton.jit
def nf4_level(code):
    """int8 of codes 0 to 15: the levels of NF4 in steps of 1/127, which lie as bytes in two numbers."""
    low: tl.constexpr = NF4_LOW
    high: tl.constexpr = NF4_HIGH
    levels = tl.where(code > 7, high, low)
    return (levels >> (code & 7).to(tl.int64) * 8).to(tl.int8)


@triton.jit
def from_fp8(bits):
    """float32 of e4m3 numbers held as uint8: their bits, shifted, are a float16 that is 2^-8 times as large."""
    wide = bits.to(tl.int16)
    half = (((wide & 0x80) << 8) | ((wide & 0x7F) << 7)).to(tl.float16, bitcast=True)
    return half.to(tl.float32) * 256.0


@triton.jit
def draws(block, head, low, high, count: tl.constexpr, seed: tl.constexpr):
    """Whether a head draws one of the blocks from ``low`` to ``high`` for a block of queries: Random in patterns."""
    x = ((block + head) * 0).to(tl.uint32)  # of the shape of both
    found = (x > 0) & (low > high)
    for number in tl.static_range(count):
        x = block.to(tl.uint32) * 0xC2B2AE3D + head.to(tl.uint32) * 0x85EBCA77
        x += (seed * 0x9E3779B1 + number * 0x27D4EB2F) & 0xFFFFFFFF
        x = (x ^ (x >> 15)) * 0x2C1B3C6D
        x = (x ^ (x >> 12)) * 0x297A2D39
        x = x ^ (x >> 15)
        chosen = (x % tl.maximum(block, 1).to(tl.uint32)).to(tl.int32)
        found = found | ((chosen >= low) & (chosen <= high) & (block > 0))
    return found


@triton.jit
def descent(x):
    """int32 that order floats up to 0 as they are, none below 0; -inf is 0."""
    return 0x7F800000 - tl.abs(x).to(tl.int32, bitcast=True)


@triton.jit
def nth_highest(rows, count, wanted, block: tl.constexpr):
    """The ``wanted``-th highest [n] of the first ``count`` int32 at ``rows`` [n, 1], of which none is below 0.

    It is made bit by bit, the highest first. 0 where there are fewer than wanted; above all where none is.
    """
    found = wanted * 0
    for step in range(31):
        trial = found | (1 << (30 - step))
        reach = wanted * 0
        for first in range(0, count, block):
            i = first + tl.arange(0, block)
            x = tl.load(rows + i[None, :], mask=(i < count)[None, :], other=-1)
            reach += tl.sum((x >= trial[:, None]).to(tl.int32), 1)
        found = tl.where(reach >= wanted, trial, found)
    return found


@triton.jit
def bits_from(words, block, mask):
    """int64: the bits of ``words``, 32 in each, from bit ``block`` on; 33 of them count."""
    place = words + block // 32
    low = tl.load(place, mask=mask, other=0).to(tl.int64) & 0xFFFFFFFF
    high = tl.load(place + 1, mask=mask, other=0).to(tl.int64) << 32
    return (low | high) >> (block % 32).to(tl.int64)
