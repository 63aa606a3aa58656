"""What generated kernels call for single numbers and have no name for in Triton."""

# mypy: disable-error-code="no-untyped-def"
# Triton reads these as its own language, in which a parameter has the type of its argument.

from __future__ import annotations

import triton
import triton.language as tl


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
def from_fp8(bits):
    """float32 of e4m3 numbers held as uint8: their bits, shifted, are a float16 that is 2^-8 times as large."""
    wide = bits.to(tl.int16)
    half = (((wide & 0x80) << 8) | ((wide & 0x7F) << 7)).to(tl.float16, bitcast=True)
    return half.to(tl.float32) * 256.0
