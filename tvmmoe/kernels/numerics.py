# SPDX-License-Identifier: Apache-2.0
"""Element encodings and activation functions as TensorIR expressions: the twins of ``tvmmoe.numerics``, bit for bit.

Every helper takes and returns an expression; nothing here owns a loop. They vectorise: no table look-ups, selects instead of
branches, and no calls but of tanh and exp in the exact functions.
"""

from tvm.script import tirx as T

FLOAT32_NAN_BITS = 0x7FC00000


def bits(x):
    """The uint32 pattern of a float32."""
    return T.reinterpret("uint32", x)


def float_of(pattern):
    """The float32 with this uint32 pattern."""
    return T.reinterpret("float32", pattern)


def is_nan(x):
    """By the bits of a float32: TVM takes x == x for true, and its max and min drop NaN."""
    return T.bitwise_and(bits(x), T.uint32(0x7FFFFFFF)) > T.uint32(0x7F800000)


def e2m1_to_float32(code):
    """Value of the e2m1 code in the low four bits of a uint32."""
    magnitude = T.bitwise_and(code, T.uint32(7))
    normal = float_of(T.shift_left(magnitude, T.uint32(22)) + T.uint32(126 << 23))
    value = T.Select(magnitude < T.uint32(2), T.Cast("float32", T.Cast("int32", magnitude)) * T.float32(0.5), normal)
    return float_of(T.bitwise_xor(bits(value), T.shift_left(T.bitwise_and(code, T.uint32(8)), T.uint32(28))))


def e4m3_to_float32(byte):
    """Value of an e4m3 byte: sign, subnormals and the NaN 0x7f included."""
    code = T.Cast("uint32", byte)
    magnitude = T.bitwise_and(code, T.uint32(0x7F))
    normal = T.shift_left(magnitude, T.uint32(20)) + T.uint32(120 << 23)
    small = bits(T.Cast("float32", T.Cast("int32", magnitude)) * T.float32(2.0**-9))
    pattern = T.Select(magnitude < T.uint32(8), small, normal)
    pattern = T.Select(magnitude == T.uint32(0x7F), T.uint32(FLOAT32_NAN_BITS), pattern)
    return float_of(T.bitwise_or(pattern, T.shift_left(T.bitwise_and(code, T.uint32(0x80)), T.uint32(24))))


def ue8m0_to_float32(byte):
    """2^(byte - 127); byte 0 is the subnormal 2^-127, 255 is NaN."""
    code = T.Cast("uint32", byte)
    pattern = T.Select(code == T.uint32(0), T.uint32(1 << 22), T.shift_left(code, T.uint32(23)))
    return float_of(T.Select(code == T.uint32(255), T.uint32(FLOAT32_NAN_BITS), pattern))


def block_scale_to_float32(byte, block_size):
    """Weight or activation block scale: e4m3 for blocks of 16 (nvfp4), ue8m0 for blocks of 32 (mxfp4, mxfp8)."""
    return e4m3_to_float32(byte) if block_size == 16 else ue8m0_to_float32(byte)


def bf16_to_float32(pattern):
    """Value of a bfloat16 held as uint16 (TVM's own bfloat16 would change the dtype that callers see)."""
    return float_of(T.shift_left(T.Cast("uint32", pattern), T.uint32(16)))


def float32_to_bf16(x):
    """bfloat16 pattern (uint16) nearest to a float32, ties to even; NaN stays NaN."""
    pattern = bits(x)
    carry = T.uint32(0x7FFF) + T.bitwise_and(T.shift_right(pattern, T.uint32(16)), T.uint32(1))
    rounded = T.Select(is_nan(x), T.bitwise_or(pattern, T.uint32(0x400000)), pattern + carry)
    return T.Cast("uint16", T.shift_right(rounded, T.uint32(16)))


def with_sign_of(value, source):
    """The non-negative ``value`` with the sign bit of ``source``."""
    return float_of(T.bitwise_or(bits(value), T.bitwise_and(bits(source), T.uint32(0x80000000))))


def round_to_e2m1(x):
    """Nearest e2m1 value, ties to the even code, saturating at 6; x is float32."""
    a = T.abs(x)

    def step(condition, height):
        return T.Select(condition, T.float32(height), T.float32(0))

    value = step(T.float32(0.25) < a, 0.5) + step(T.float32(0.75) <= a, 0.5) + step(T.float32(1.25) < a, 0.5)
    value = value + step(T.float32(1.75) <= a, 0.5) + step(T.float32(2.5) < a, 1) + step(T.float32(3.5) <= a, 1)
    return with_sign_of(value + step(T.float32(5) < a, 2), x)


def round_to_e4m3(x):
    """Nearest e4m3 value, ties to even, saturating at 448; NaN stays NaN. x is float32."""
    pattern = T.bitwise_and(bits(x), T.uint32(0x7FFFFFFF))
    # 20 of the 23 mantissa bits go: add just under half an ulp, plus the last kept bit for ties to even.
    carry = T.uint32(0x7FFFF) + T.bitwise_and(T.shift_right(pattern, T.uint32(20)), T.uint32(1))
    normal = float_of(T.bitwise_and(pattern + carry, T.uint32(0xFFF00000)))
    # Below 2^-6 the grid is 2^-9: the ulp of 1.5 * 2^14, so that adding it rounds there.
    magic = T.uint32(0x46C00000)
    small = float_of(bits(float_of(pattern) + float_of(magic))) - float_of(magic)
    value = T.Select(pattern < T.uint32(121 << 23), small, T.min(normal, T.float32(448)))
    value = T.Select(T.uint32(0x7F800000) < pattern, float_of(pattern), value)
    return with_sign_of(value, x)


def ue8m0_scale_ceil(x):
    """Smallest 2^(b - 127), 0 <= b <= 254, that is >= x; x a non-negative float32 (0 gives byte 0)."""
    pattern = bits(x)
    byte = T.shift_right(pattern + T.uint32(0x7FFFFF), T.uint32(23))
    byte = T.min(T.Select(pattern <= T.uint32(1 << 22), T.uint32(0), byte), T.uint32(254))
    return ue8m0_to_float32(byte)


def exp_float32(x):
    """e^x with relative error below 2e-7; x is clamped to [-87.3, 88.7] first (no call, so loops vectorise).

    Cody-Waite reduction x = n ln2 + r, |r| <= 0.35, and the Taylor polynomial of degree 7 in Horner form.
    """
    clamped = T.max(T.min(x, T.float32(88.7)), T.float32(-87.3))
    magic = T.float32(1.5 * 2**23)
    shifted = clamped * T.float32(1.4426950408889634) + magic
    n = float_of(bits(shifted)) - magic
    r = clamped - n * T.float32(0.693359375) + n * T.float32(2.12194440e-4)
    value = T.float32(1 / 5040)
    for coefficient in (1 / 720, 1 / 120, 1 / 24, 1 / 6, 0.5, 1.0, 1.0):
        value = value * r + T.float32(coefficient)
    exponent = T.shift_left(bits(shifted), T.uint32(23))  # the low bits of 1.5 * 2^23 + n are n
    return T.Select(is_nan(x), x, float_of(bits(value) + exponent))


def sigmoid_float32(x):
    """1 / (1 + e^-x)."""
    return T.float32(1) / (T.float32(1) + exp_float32(T.float32(0) - x))


def normal_cdf_float32(x):
    """PHI(x) = (1 + erf(x / sqrt 2)) / 2, absolute error below 1e-7 (Abramowitz and Stegun 7.1.26)."""
    a = T.abs(x) * T.float32(0.7071067811865476)
    t = T.float32(1) / (T.float32(1) + T.float32(0.3275911) * a)
    poly = T.float32(1.061405429)
    for coefficient in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
        poly = poly * t + T.float32(coefficient)
    tail = poly * t * exp_float32(T.float32(0) - a * a) * T.float32(0.5)
    return T.Select(x < T.float32(0), tail, T.float32(1) - tail)


def sigmoid_exact(x):
    """0.5 * tanh(x / 2) + 0.5, tanh in float64 rounded once: the form that routing keys are compared in.

    The double evaluation makes the float32 result, and so every top-k choice, independent of the math library.
    """
    half = T.Cast("float64", x) * T.float64(0.5)
    return T.float32(0.5) * T.Cast("float32", T.call_pure_extern("float64", "tanh", half)) + T.float32(0.5)


def exp_float64(x):
    """e^x in double precision."""
    return T.call_pure_extern("float64", "exp", x)


def sortable_key(x):
    """int32 whose signed order is the order of the float32 (+0 above -0, positive NaN on top)."""
    pattern = T.reinterpret("int32", x)
    return T.bitwise_xor(pattern, T.bitwise_and(T.shift_right(pattern, 31), T.int32(0x7FFFFFFF)))
