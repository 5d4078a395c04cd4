# SPDX-License-Identifier: Apache-2.0
"""Instructions of the Hopper GEMM: FP4 decode in registers, wgmma with a register A operand, TMA, cp.async, stmatrix. Those
of its mma.sync are in sm80.intrinsics.

Decode. A bf16 whose bits 8:6 are an e2m1's ``eem`` and bit 15 its sign is e2m1 * 2^-126, exactly (0.5 is a bf16
subnormal and multiplies as one). One mul.bf16x2 by 2^126 * scale then gives e2m1 * scale for two nibbles, exactly:

    mxfp4  2^126 * 2^(b-127) = 2^(b-1) is finite for b <= 128. Larger bytes take two multiplications, 2^126 and
           2^(b-127), in a branch that a warp enters only if it holds such a byte; so every b from 0 to 254 is right
           and 255 is NaN.
    nvfp4  2^126 * e4m3 overflows from 4 on, so the multiplier is 2^(126 - NVFP4_SHIFT) * e4m3 (448 * 2^118 is finite)
           and the accumulators carry 2^-NVFP4_SHIFT, which the epilogue undoes.
"""

from tvm.script import tirx as T

from tvmmoe.kernels.sm90a.trace import assign, bits, cast, cuda, let, ptx, regs, scalar, store, u32

NVFP4_SHIFT = 8
SQRT_HALF = 0.707106769084930419921875  # as float32
EVICT_FIRST, EVICT_NORMAL = 0x12F0000000000000, 0x1000000000000000  # L2 policies
TMA = "cp.async.bulk.tensor.{}d.shared::cta.global.mbarrier::complete_tx::bytes"
TMA_TO_CLUSTER = "cp.async.bulk.tensor.{}d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
TWO_POW_120, TWO_POW_126 = 0x7B807B80, 0x7E807E80  # bf16 pairs
_MAX_FAST_UE8M0 = 128


def tma_load(rank: int, destination, descriptor, coordinates, barrier, policy=None) -> None:
    """Tile of ``descriptor`` at ``coordinates`` (innermost first) into shared memory; ``policy`` of L2 is a uint64."""
    if policy is None:
        ptx[TMA.format(rank)](destination, descriptor, *coordinates, barrier)
    else:
        ptx[TMA.format(rank) + ".L2::cache_hint"](destination, descriptor, *coordinates, barrier, policy)


def tma_load_to_cluster(rank: int, destination, descriptor, coordinates, barrier, cluster: int) -> None:
    """:func:`tma_load` to the same place in every CTA of a cluster, counted by each one's own barrier."""
    ptx[TMA_TO_CLUSTER.format(rank)](destination, descriptor, *coordinates, barrier, T.uint16((1 << cluster) - 1))


def in_cluster(pointer, cta):
    """Address of the same shared memory in CTA ``cta`` of the cluster."""
    remote = scalar("uint32")
    ptx.mapa.shared__cluster.u32(remote, cuda.cvta_generic_to_shared(pointer), cast(cta, "uint32"))
    return remote


def arrive_in_cluster(barrier, cta) -> None:
    """Arrive at the same barrier of CTA ``cta`` of the cluster."""
    ptx.mbarrier.arrive.shared__cluster.b64(in_cluster(barrier, cta))


def copy_async(destination, source, size: int, num_bytes) -> None:
    """cp.async of ``size`` bytes of which the first ``num_bytes`` are read and the rest are zeros."""
    ptx["cp.async.ca.shared.global"](destination, source, size, cast(num_bytes, "uint32"))


def store_words(pointer, words) -> None:
    """One or two uint32 to shared memory."""
    ptx["st.shared.b32" if len(words) == 1 else "st.shared.v2.b32"](pointer, *words)


def shared_descriptor_base(pointer):
    """Low word of the wgmma descriptor of a K-major tile, 128-byte swizzle, at ``pointer`` (16-byte units, LBO 1).

    Shared memory ends below 2^18, so the address is within its 14 bits.
    """
    return (cuda.cvta_generic_to_shared(pointer) >> u32(4)) + u32(0x10000)


def shared_descriptor(low_word):
    """64-bit descriptor: swizzle mode 1 in bits 63:62, stride between 8-row groups 64 (x 16 bytes)."""
    return T.uint64(0x4000004000000000) | cast(low_word, "uint64")


def wgmma(tile_m: int, acc, a, descriptor, accumulate) -> None:
    """acc[64, tile_m] (+)= a[64, 16] (registers) * b[16, tile_m] (shared, tokens major)."""
    name = f"wgmma.mma_async.sync.aligned.m64n{tile_m}k16.f32.bf16.bf16"
    ptx[name](*[acc[i] for i in range(tile_m // 2)], *a, descriptor, accumulate, 1, 1, 0)


# Multipliers of decode_word. Every lane reads its own copy from shared memory, so that ptxas neither knows them (it would
# turn a multiplication by a known power of two into LEA, on the ALU, which limits the main loop) nor keeps them in uniform
# registers (IMAD takes none beside a literal).
SHIFT_FACTORS = (64, 4)


def decode_word(word, multiplier, destination, r: int, factors) -> None:
    """Eight e2m1 of ``word`` -> four bf16 pairs: destination[4 * step + 2 * h + r] of MMA steps 0 and 1; without
    ``multiplier`` they stay times 2^-126.

    With ``factors``, registers that hold SHIFT_FACTORS: a nibble n = 8 s + eem times 64 has eem in place and s in bit 9;
    adding 0x7E00 carries s into bit 15 and leaves bits 14:9 to be cleared. That is two ALU operations a pair; without
    factors, by shifts, it is up to four.
    """
    upper = let(word >> u32(8)) if factors else None
    for position in range(4):
        if factors:
            nibbles = (word if position < 2 else upper) & u32((0x000F000F, 0x00F000F0)[position % 2])
            pair = let((nibbles * factors[position % 2] + u32(0x7E007E00)) & u32(0x81C081C0))
        else:
            magnitude = (word << u32(6 - 4 * position)) if position < 2 else (word >> u32(4 * position - 6))
            sign = (word << u32(12 - 4 * position)) if position < 3 else word
            pair = let((magnitude & u32(0x01C001C0)) | (sign & u32(0x80008000)))
        index = position // 2 * 4 + position % 2 * 2 + r
        if multiplier is None:
            store(destination, pair, index)
        else:
            ptx["mul.rn.bf16x2"](destination[index], pair, multiplier)


def scale_again(destination, multiplier, r: int) -> None:
    """Second multiplication of what :func:`decode_word` wrote."""
    for position in range(4):
        element = destination[position // 2 * 4 + position % 2 * 2 + r]
        ptx["mul.rn.bf16x2"](element, element, multiplier)


def any_large(scale_bytes):
    """Whether a lane of the warp holds a byte that takes two multiplications."""
    largest = scalar("uint32", scale_bytes[0])
    for byte in scale_bytes[1:]:
        assign(largest, T.max(largest, byte))
    return let(T.cuda.any_sync(u32(0xFFFFFFFF), largest > u32(_MAX_FAST_UE8M0)), "int32") != 0


def ue8m0_pair(byte):
    """2^(b - 127) as a bf16 pair; b = 0 is the subnormal 2^-127, b = 255 is NaN."""
    nan = ((byte + u32(1)) >> u32(8)) * u32(0x007F007F)  # arithmetic: predicates are short in the main loop
    return let(T.max(byte * u32(0x00800080), u32(0x00400040)) + nan)


class Ue8m0Multipliers:
    """Multipliers of one warp's mxfp4 rows for one K block."""

    def __init__(self, scale_bytes):
        self._bytes = scale_bytes
        self._first = [let(byte * u32(0x00800080) + u32((126 << 7) * 0x10001)) for byte in scale_bytes]

    def first(self, row: int, word: int):
        return self._first[row]

    def second(self, row: int):
        return ue8m0_pair(self._bytes[row])


class E4m3Multipliers:
    """Multipliers of one warp's nvfp4 rows: two 16-blocks in a thread's 32 columns."""

    def __init__(self, scale_pairs):
        self._values = []
        for pair in scale_pairs:
            out = regs(2, "uint32")
            for i, value in enumerate(e4m3_factors(pair)):
                scaled = let(value * T.float32(2.0 ** (126 - NVFP4_SHIFT)))
                ptx["cvt.rn.bf16x2.f32"](out[i], scaled, scaled)
            self._values.append(out)

    def first(self, row: int, word: int):
        return self._values[row][word // 2]


def ue8m0_factor(byte):
    """2^(b - 127) as float32; b = 0 is subnormal, b = 255 is NaN: infinity times zero."""
    # Of integers the larger would take two instructions.
    power = let(T.max(bits(let(byte << u32(23)), "float32"), T.float32(2.0**-127)))
    return let(T.call_pure_extern("float32", "fmaf", power, T.float32(0), power))


def e4m3_factors(pair) -> list:
    """Two e4m3 as float32."""
    halves = scalar("uint32")
    ptx["cvt.rn.f16x2.e4m3x2"](halves, pair)
    factors = []
    for i in range(2):
        half = let(cast((halves >> u32(16 * i)) & u32(0xFFFF), "uint16"))
        value = scalar("float32")
        ptx["cvt.f32.f16"](value, T.reinterpret("float16", half))
        factors.append(value)
    return factors


def stmatrix_transposed(pointer, pairs) -> None:
    """One 8x8 matrix of bf16 a quarter warp: rows of shared memory are tokens, columns are fragment rows."""
    ptx[f"stmatrix.sync.aligned.m8n8.x{len(pairs)}.trans.shared.b16"](pointer, *pairs)


def maximum(a, b):
    """The larger, NaN if either is: fmaxf would drop it."""
    out = scalar("float32")
    ptx["max.NaN.f32"](out, a, b)
    return out


def minimum(a, b):
    """The smaller, NaN if either is."""
    out = scalar("float32")
    ptx["min.NaN.f32"](out, a, b)
    return out


def sigmoid_times(x, alpha):
    """x * sigmoid(alpha * x); e^inf gives x / inf = 0."""
    return T.cuda.fdividef(x, T.float32(1) + T.call_pure_extern("float32", "__expf", T.float32(0) - alpha * x))


def normal_cdf_times(x, alpha):
    """x * PHI(alpha * x), PHI by erf."""
    erf = T.call_pure_extern("float32", "erff", alpha * x * T.float32(SQRT_HALF))
    return x * (T.float32(0.5) + T.float32(0.5) * erf)
