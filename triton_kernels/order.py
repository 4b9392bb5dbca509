"""The total order of every choice, as int64 keys: higher score first, then lower index.

NaN counts as -inf and -0.0 as +0.0. Comparing keys as signed integers is comparing tokens, so a maximum of keys is an
exact, order-free argmax. Every key of a token is larger than NO_KEY.
"""

from __future__ import annotations

import triton
import triton.language as tl

NO_KEY = tl.constexpr(-(2**63))  # what masked-off lanes hold: below the key of any token


@triton.jit
def product(a, b):
    """a * b, rounded before it enters a sum: a compiler may fuse multiply and add, and does where it can.

    Every backend rounds the numbers that decide a choice as the reference does, one operation at a time.
    """
    return tl.fma(a, b, 0.0)


@triton.jit
def ordered_bits(score):
    """float32 scores as int64 in [0, 2^32) that compare as the scores do."""
    bits = score.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    # on the bits, so that no mode of the compiler flushes a denormal score to zero
    bits = tl.where(magnitude > 0x7F800000, -0x800000, bits)
    bits = tl.where(magnitude == 0, 0, bits)
    # negative floats fall as their magnitude bits rise
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return bits.to(tl.int64) + 2147483648


@triton.jit
def make_key(score, index):
    """int64 keys of float32 scores at indices in [0, 2^32)."""
    return ((ordered_bits(score) - 2147483648) << 32) | (4294967295 - index.to(tl.int64))


@triton.jit
def key_index(key):
    """The index in a key, int64."""
    return 4294967295 - (key & 4294967295)


@triton.jit
def key_score(key):
    """The float32 score in a key (-inf for NaN, +0.0 for -0.0)."""
    bits = (key >> 32).to(tl.int32)
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return bits.to(tl.float32, bitcast=True)
