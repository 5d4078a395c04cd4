# SPDX-License-Identifier: Apache-2.0
"""Instructions of the mma.sync GEMMs that any GPU since sm_80 has, and FP4 decode without those that came later.

Decode as in sm90a.intrinsics: an e2m1's bits in a bf16 are e2m1 * 2^-126, and multiplications by powers of two or by an
e4m3 are exact. sm_80 multiplies bf16 pairs by fma with -0 alone.

    mxfp4  2^126 * 2^(b-127) = 2^(b-1) is finite for b <= 128. A K block in which a lane of the warp holds a larger byte
           takes two multiplications, 2^126 and 2^(b-127): right for every b from 0 to 254, NaN for 255.
    nvfp4  an e4m3's bits in a bf16 are e4m3 * 2^-120; two multiplications by 2^119 make 2^118 * e4m3, whose 2^-8
           (NVFP4_SHIFT) the epilogue undoes.
"""

from tvmmoe.kernels.sm90a.trace import cuda, let, ptx, regs, scalar, u32

MINUS_ZERO = 0x80008000  # bf16 pairs
TWO_POW_119 = 0x7B007B00
_MMA = "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"


def mma(acc, first: int, a, b) -> None:
    """acc[first : first + 4] += a[16, 16] * b[16, 8]: 4 and 2 registers of bf16 pairs."""
    d = [acc[first + i] for i in range(4)]
    ptx[_MMA](*d, *a, *b, *d)


def multiply_pairs(a, b):
    """Products of two bf16 pairs, rounded once."""
    out = scalar("uint32")
    ptx["fma.rn.bf16x2"](out, a, b, u32(MINUS_ZERO))
    return out


def spread_e2m1(word):
    """Eight e2m1 of a word as four bf16 pairs, nibbles (p, p + 4) of pair p, times 2^-126."""
    pairs = []
    for position in range(4):
        magnitude = (word << u32(6 - 4 * position)) if position < 2 else (word >> u32(4 * position - 6))
        sign = (word << u32(12 - 4 * position)) if position < 3 else word
        pairs.append(let((magnitude & u32(0x01C001C0)) | (sign & u32(MINUS_ZERO))))
    return pairs


def e4m3_multipliers(pair):
    """2^118 * e4m3 of the two bytes of ``pair`` (uint32), each as a bf16 pair of equal halves."""
    magnitude = let((pair & u32(0x7F)) | ((pair & u32(0x7F00)) << u32(8)))
    nan = let(((magnitude + u32(0x10001)) >> u32(7)) & u32(0x10001))
    sign = ((pair & u32(0x80)) << u32(8)) | ((pair & u32(0x8000)) << u32(16))
    value = multiply_pairs(let((magnitude << u32(4)) | sign | (nan * u32(0x7FC0))), u32(TWO_POW_119))
    value = multiply_pairs(value, u32(TWO_POW_119))
    halves = []
    for selector in (0x1010, 0x3232):
        half = scalar("uint32")
        ptx["prmt.b32"](half, value, value, u32(selector))
        halves.append(half)
    return halves


def load_matrices(pointer):
    """ldmatrix: four 8x8 matrices of b16, lane 8m + r gives the address of row r of matrix m."""
    words = regs(4, "uint32")
    ptx["ldmatrix.sync.aligned.m8n8.x4.shared.b16"](*[words[i] for i in range(4)], pointer)
    return words


def transpose(pair):
    """movmatrix: the 8x8 matrix of b16 whose row lane / 4 holds this pair, transposed in registers."""
    out = scalar("uint32")
    ptx["movmatrix.sync.aligned.m8n8.trans.b16"](out, pair)
    return out


_GRID_DEPENDENCY = r"""
__device__ __forceinline__ void tvmmoe_grid_dependency() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;\n\tgriddepcontrol.launch_dependents;" ::: "memory");
#endif
}
"""


def grid_dependency() -> None:
    """Wait for the grids before this one and let the next one start; nothing where the GPU cannot (before sm_90)."""
    cuda.func_call("tvmmoe_grid_dependency", source_code=_GRID_DEPENDENCY, return_type="void")
