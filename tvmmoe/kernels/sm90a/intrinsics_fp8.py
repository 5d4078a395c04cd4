# SPDX-License-Identifier: Apache-2.0
"""Instructions of the fp8 GEMM: e2m1 -> e4m3 through byte tables, fp8 wgmma, exact scaling by powers of two.

K order. Inside a 128-block lane q of a quad owns the 16 weight bytes of k = 32q .. 32q + 31, one scale block. MMA step j
(k32) takes word j of them: nibbles 4h .. 4h + 3 are A register 2h + r of fragment row r. So operand position

    i = 32 j + 16 h + 4 q + b    (j < 4, h < 2, q < 4, b < 4)    is column    k = 32 q + 8 j + 4 h + b

Decode of a word, 9 instructions for 8 values. ``prmt`` looks four magnitudes up in 8 bytes, each with its sign bit set;
a second one makes 0x40 of nibbles below 8 (selector bit 3 copies the sign of 0x40, which is 0), and subtracting it twice
clears the sign of those. No byte borrows from its neighbour.

Table entry ``i`` holds the magnitudes times 2^(i - 255 + TOP_EXPONENT) as e4m3: index scale byte - row's largest + 255.
e2m1 * 2^s is an e4m3 number for -8 <= s <= 6 (0.5 * 2^-8 is the smallest subnormal, 6 * 2^6 = 384), so a row whose scale
bytes differ by at most MAX_SPREAD is exact.
"""

from tvm.script import tirx as T

from tvmmoe.kernels.sm90a.trace import (
    address,
    assign,
    cast,
    if_else,
    let,
    load,
    load_vec4,
    ptx,
    scalar,
    store,
    u32,
    while_,
)  # fmt: skip

MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
TOP_EXPONENT = 6  # s of a row's largest scale
MAX_SPREAD = 14  # octaves between a row's largest and smallest scale
TABLE_ENTRIES, TABLE_BYTES = 256, 2048
UNIT_TABLE = (0xBCB8B080, 0xCCC8C4C0)  # the entry of s = 0
SIGN_TEST = 0x40404040  # both sources of the second prmt
# Bases of rows and tokens beyond these would over- or underflow when one follows the other in float32.
MIN_BASE, MAX_BASE = 34, 224
# A folded block whose largest value is below this has lost more than 2^-10 of 7/8. Blocks that an encoder made have a
# largest value above 224, so it is 8 octaves.
MIN_FOLDED = 0.875
NAN_BITS = 0x7FC00000
VECTORS_AT_ONCE = 3  # scale bytes of a row on their way, times 16: a producer thread has few registers


def k_of_position(position: int) -> int:
    """Column of a 128-block that sits at ``position`` of the fp8 operand."""
    j, h, q, b = position // 32, position // 16 % 2, position // 4 % 4, position % 4
    return 32 * q + 8 * j + 4 * h + b


def write_table_entry(table, index) -> None:
    """Entry ``index`` of the table in shared memory."""
    exponent = let(T.max(index - (255 - TOP_EXPONENT), T.int32(-20)))  # below, everything is zero
    factor = let(T.reinterpret("float32", (exponent + 127) << 23))
    halves = []
    for i in range(0, 8, 2):
        pair = scalar("uint16")
        low, high = MAGNITUDES[i], MAGNITUDES[i + 1]
        ptx["cvt.rn.satfinite.e4m3x2.f32"](pair, factor * T.float32(high), factor * T.float32(low))
        halves.append(let(cast(pair, "uint32")))
    words = [let(halves[i] | (halves[i + 1] << u32(16)) | u32(0x80808080)) for i in (0, 2)]
    ptx["st.shared.v2.b32"](table.ptr_to([index * 8]), *words)


def decode_word(word, table, destination, r: int, sign_test) -> None:
    """Eight e2m1 of ``word`` -> A registers r and 2 + r of a k32 step, through a table entry of two words; ``sign_test``
    is SIGN_TEST in a register."""
    magnitudes = let(word & u32(0x77777777))
    for h in range(2):
        value, positive = scalar("uint32"), scalar("uint32")
        ptx["prmt.b32"](value, table[0], table[1], magnitudes if h == 0 else magnitudes >> u32(16))
        ptx["prmt.b32"](positive, sign_test, sign_test, word if h == 0 else word >> u32(16))
        store(destination, positive * u32(0xFFFFFFFE) + value, 2 * h + r)


def wgmma(width: int, acc, a, descriptor, accumulate: bool) -> None:
    """acc[64, width] (+)= a[64, 32] (registers) * b[32, width] (shared, tokens major)."""
    name = f"wgmma.mma_async.sync.aligned.m64n{width}k32.f32.e4m3.e4m3"
    ptx[name](*[acc[i] for i in range(width // 2)], *[a[i] for i in range(4)], descriptor, accumulate, 1, 1)


def power_of_two(exponent_byte):
    """2^(byte - 127) of an int32 byte 1 .. 254."""
    return T.reinterpret("float32", exponent_byte << 23)


def half_powers(byte):
    """Two float32 whose product is 2^(byte - 127), each of about half its exponent; byte 255 is NaN."""
    low = let(byte >> u32(1))
    first = T.Select(byte == u32(255), u32(NAN_BITS), (low + u32(64)) << u32(23))
    return let(T.reinterpret("float32", let(first))), let(T.reinterpret("float32", (byte - low + u32(63)) << u32(23)))


def fold(words, shift) -> None:
    """The e4m3 of four words times 2^-shift, 0 <= shift <= 15, to the nearest e4m3, ties to even; NaN stays."""
    # As f16 2^-shift is exact: normal up to 14, the subnormal 2^-15; so are the products, multiples of 2^-24.
    factor = let(T.Select(shift < 15, (T.int32(15) - shift) << 10, T.int32(0x200)))
    pair = let(cast(factor | (factor << 16), "uint32"))
    for i in range(4):
        halves = []
        for h in range(2):
            wide, narrow = scalar("uint32"), scalar("uint16")
            ptx["cvt.rn.f16x2.e4m3x2"](wide, let(cast((words[i] >> u32(16 * h)) & u32(0xFFFF), "uint16")))
            ptx["mul.rn.f16x2"](wide, wide, pair)
            ptx["cvt.rn.satfinite.e4m3x2.f16x2"](narrow, wide)
            halves.append(let(cast(narrow, "uint32")))
        store(words, halves[0] | (halves[1] << u32(16)), i)


def byte_extremes(start, num_bytes):
    """(largest, smallest) of ``num_bytes`` global bytes from int64 ``start``, int32."""
    largest, smallest = scalar("uint32", u32(0)), scalar("uint32", u32(0x00FF00FF))  # u16 pairs
    end = let(start + cast(num_bytes, "int64"))
    at = let(start)

    def add(for_largest, for_smallest):
        for shift in (0, 8):
            ptx["max.u16x2"](largest, largest, let((for_largest >> u32(shift)) & u32(0x00FF00FF)))
            ptx["min.u16x2"](smallest, smallest, let((for_smallest >> u32(shift)) & u32(0x00FF00FF)))

    def in_vectors():
        with while_(at < end):
            loads = [load_vec4(address(T.min(at + 16 * i, end - 16))) for i in range(VECTORS_AT_ONCE)]
            for words in loads:
                for i in range(4):
                    add(words[i], words[i])
            assign(at, at + 16 * VECTORS_AT_ONCE)

    def in_words():  # aligned ones; bytes outside of the row do not count
        assign(at, at & T.int64(-4))
        with while_(at < end):
            word = load("uint32", address(at))
            before = let(cast(T.max(start - at, T.int64(0)) * 8, "uint32"))
            after = let(cast(T.max(at + 4 - end, T.int64(0)) * 8, "uint32"))
            inside = let((u32(0xFFFFFFFF) << before) & (u32(0xFFFFFFFF) >> after))
            add(let(word & inside), let(word | ~inside))
            assign(at, at + 4)

    if_else(((start | end) & T.int64(15)) == T.int64(0), in_vectors, in_words)
    top = let(cast(T.max(largest & u32(0xFFFF), largest >> u32(16)), "int32"))
    return top, let(cast(T.min(smallest & u32(0xFFFF), smallest >> u32(16)), "int32"))
