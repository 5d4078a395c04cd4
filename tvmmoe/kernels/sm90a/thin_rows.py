# SPDX-License-Identifier: Apache-2.0
"""x and z of thin tiles, those of one or two rows, as by_scale_block.py takes them: beside the rows in K order, in the place
of two rows of the tile's padding.

    columns    the tile's rows times 2^94, from row 2 of the tile on. They are exact in a sum of float32 if values are zero or
               2^-95 up to 2^33: products, times 2^-32, are then multiples of 2^-135, and sums finite
    outside    [tile, row]: whether a row has other values, and its tile must not be multiplied so

What stores a row stores both, and what multiplies chooses. (Weights that overflow float32, 2 * 2^127, do not in columns.)
"""

from tvm.script import tirx as T

from tvmmoe.kernels.sm90a.layout import COLUMNS_BYTES, K_BLOCK, THIN_ROWS, THIN_TILE_M, column_offset
from tvmmoe.kernels.sm90a.trace import I, Smem, address, cast, if_, let, ptx, scalar, store_to, u32

FIRST_ROW = 2  # of a tile, whose place the columns take
TWO_POW_94 = 0x6E806E80  # bf16 pair
BEFORE_SCALE = 2.0**32  # what sums of products by fragments lack
# Makes of the bits of a magnitude in the window, 0x1000 up to 0x5000, those whose upper two are 1 and 0.
TO_WINDOW = 0x70007000


def is_outside(pairs):
    """Whether one of some bf16 in uint32 registers must not be multiplied so."""
    outside = u32(0)
    for pair in pairs:
        magnitudes = let(pair & u32(0x7FFF7FFF))
        is_nonzero, distance = magnitudes + u32(0x7FFF7FFF), let(magnitudes + u32(TO_WINDOW))
        outside = outside | (is_nonzero & (~distance | (distance << u32(1))))
    return let(outside & u32(0x80008000)) != u32(0)


def to_columns(pair):
    """A pair of bf16 as columns have it."""
    scaled = scalar("uint32")
    ptx["mul.rn.bf16x2"](scaled, pair, u32(TWO_POW_94))
    return scaled


def columns_address(base, width, row, block, word, lane):
    """Of 8 columns of a row, of a word and lane of a K block, beside the rows of ``width`` at ``base``."""
    first = cast(row // THIN_TILE_M * THIN_TILE_M + FIRST_ROW, "int64") * (width * 2)
    offset = block * COLUMNS_BYTES + column_offset(word, row % THIN_TILE_M, lane)
    return address(base, first + cast(offset, "int64"))


def mark(base, row, value) -> None:
    """Note whether a row of a thin tile has values outside, in the slice at ``base``."""
    index = row // THIN_TILE_M * THIN_ROWS + row % THIN_TILE_M
    store_to("int32", address(base, cast(index, "int64") * 4), value)


class Window:
    """Whether a token that a CTA places has values outside; in shared memory."""

    def __init__(self, smem: Smem, thread):
        self._has_outside = smem.alloc(1, "int32", 4)
        self._thread = thread

    def clear(self) -> None:
        """The CTA synchronises before :meth:`check`."""
        with if_(self._thread.tid == 0):
            I.buffer_store(self._has_outside, T.int32(0), [0])

    def check(self, pairs) -> None:
        """By each thread; the CTA synchronises before :meth:`is_outside`."""
        with if_(is_outside([pairs[i] for i in range(4)])):
            I.buffer_store(self._has_outside, T.int32(1), [0])

    def is_outside(self):
        return let(self._has_outside[0])


assert FIRST_ROW + THIN_ROWS <= THIN_TILE_M and COLUMNS_BYTES == THIN_ROWS * 2 * K_BLOCK
