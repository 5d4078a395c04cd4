# SPDX-License-Identifier: Apache-2.0
"""What tcgen05.mma is told besides registers: descriptors and places in shared and tensor memory, as plain arithmetic.

Bit fields are those of the PTX ISA, "Shared memory descriptor", "Instruction descriptor" (tables for .kind::f16, for
.kind::mxf8f6f4 and for .kind::mxf4 / .kind::mxf4nvf4) and "Block scaling"; the tests restate them.

Operands. A K block is 128 bytes of a row in shared memory, whose eight 16-byte chunks are exchanged as TMA's 128-byte
swizzle does: chunk c of row r is chunk c ^ r % 8 of its 128 bytes. One instruction takes 32 bytes, so four make a block:

    form   tokens            weights                                       columns of an instruction and of a block
    nvfp4  e2m1, two a byte  e2m1, two a byte                              64, 256
    mxfp8  e4m3              e2m1, 16 in the first 8 bytes of a chunk      32, 128
    bf16   bfloat16          bfloat16, decoded on their way                16, 64

Scales in tensor memory. 128 rows with four scales each are 512 bytes: row r is lane r % 32, column r / 32, its scales the
bytes of that 32-bit cell, lowest k first. tcgen05.cp.32x128b.warpx4 brings 32 rows of 16 bytes from shared memory to 32
lanes x 4 columns, four times over for the four warps' lanes, so in shared memory a row's four scales are the word at
16 (r % 32) + 4 (r / 32). An instruction reads num_scales bytes of each cell, from byte ``scale id`` on.
"""

from typing import NamedTuple

SWIZZLE_128B = 2
BLOCK_BYTES = 128  # of a row in one K block
INSTRUCTION_BYTES = 32
SCALE_TILE_BYTES = 512  # 128 rows, four scales each
SCALE_TILE_COLUMNS = 4
TMEM_COLUMNS = 512
_E2M1 = {"mxf4nvf4": 1, "mxf8f6f4": 5}
_E4M3 = {"mxf8f6f4": 0}
_BF16 = 1
_FLOAT32 = 1  # the accumulator of kind::f16; block-scaled kinds have no other


class Form(NamedTuple):
    """One kind of tcgen05.mma: both operands K-major."""

    kind: str
    k: int
    num_scales: int  # of a row in one instruction; 0: not block-scaled
    is_ue8m0: bool
    weights: str  # e2m1 or bf16
    tokens: str  # e2m1, e4m3 or bf16

    @property
    def k_block(self) -> int:
        """Columns of a K block."""
        return self.k * BLOCK_BYTES // INSTRUCTION_BYTES

    @property
    def instruction(self) -> str:
        scaled = f".block_scale.scale_vec::{self.num_scales}X" if self.num_scales else ""
        return f"tcgen05.mma.cta_group::1.kind::{self.kind}{scaled}"


NVFP4 = Form("mxf4nvf4", 64, 4, False, "e2m1", "e2m1")
MXFP8 = Form("mxf8f6f4", 32, 1, True, "e2m1", "e4m3")
BF16 = Form("f16", 16, 0, False, "bf16", "bf16")


def encode(num_bytes: int) -> int:
    """An address or offset of shared memory as a descriptor has it: 18 bits in units of 16 bytes."""
    return (num_bytes & 0x3FFFF) >> 4


def matrix_descriptor(address: int, leading_bytes: int, stride_bytes: int, swizzle: int) -> int:
    """64-bit descriptor of a matrix in shared memory that starts where its swizzle pattern starts.

    Parameters
    ----------
    address, leading_bytes, stride_bytes : int
        Multiples of 16. For K-major tiles with a swizzle the leading offset is not used and the stride is the distance
        of groups of 8 rows.
    swizzle : int
        0 none, 1 128 bytes in atoms of 32, 2 128 bytes, 4 64 bytes, 6 32 bytes.
    """
    low = encode(address) | encode(leading_bytes) << 16
    return low | encode(stride_bytes) << 32 | 0b001 << 46 | swizzle << 61


def instruction_descriptor(form: Form, m: int, n: int, scale_id: int = 0) -> int:
    """32-bit descriptor of a dense K-major product; ``scale_id`` is the first byte of both operands' scale cells."""
    if not form.num_scales:
        return _FLOAT32 << 4 | _BF16 << 7 | _BF16 << 10 | n >> 3 << 17 | m >> 4 << 24
    tokens = _E2M1 if form.tokens == "e2m1" else _E4M3
    types = _E2M1[form.kind] << 7 | tokens[form.kind] << 10
    return scale_id << 4 | types | n >> 3 << 17 | form.is_ue8m0 << 23 | m >> 7 << 27 | scale_id << 29


def chunk_offset(row, chunk):
    """Byte of a 16-byte chunk in a K block, whose rows follow each other; ints or expressions."""
    return row * BLOCK_BYTES + (chunk ^ row % 8) * 16


def scale_offset(row, scale):
    """Byte of a scale in a tile of shared memory, for 128 rows and four scales; ints or expressions."""
    return row % 32 * 16 + row // 32 * 4 + scale


def scale_cell(row: int, scale: int) -> tuple[int, int, int]:
    """(lane, column, byte) of the same scale in tensor memory, in the first of the four copies."""
    return row % 32, row // 32, scale


def copied_cell(offset: int) -> tuple[int, int, int]:
    """(lane, column, byte) where tcgen05.cp.32x128b puts a byte of 512."""
    return offset // 16, offset % 16 // 4, offset % 4


def scale_place(form: Form, step: int) -> tuple[int, int]:
    """(scale tile along k, scale id) of the ``step``-th instruction along k."""
    return divmod(step * form.num_scales, 4)


def num_columns(needed: int) -> int:
    """Columns to allocate: a power of two from 32 to 512."""
    columns = max(32, 1 << (needed - 1).bit_length())
    assert columns <= TMEM_COLUMNS, needed
    return columns
