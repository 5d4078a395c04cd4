# SPDX-License-Identifier: Apache-2.0
"""gemm1 of a gated activation that rounds z to the activation format before it stores it (requantize.py): a launch and a
pass over z less. For a token or two (gemm_pair); with more, what it adds to every tile's end is longer than that pass.

A scale block of z is 32 or 16 neighbouring columns, which the tiles of gemm1.py divide among four or two 64-row fragments.
Here a fragment is 32 neighbouring columns, up rows and gate rows, and a lane takes two of a token's. In K order (layout.py)
they are a word of two lanes' columns, words 16 bytes apart: four times the stores, of a z that is small.
"""

from tvm.script import tirx as T

from tvmmoe.config import ActivationFormat
from tvmmoe.kernels.sm90a.gather import pack_bf16
from tvmmoe.kernels.sm90a.gemm import GroupedGemm
from tvmmoe.kernels.sm90a.gemm1 import Gemm1
from tvmmoe.kernels.sm90a.gemm_config import GemmConfig
from tvmmoe.kernels.sm90a.requantize import amax_bits, round_mxfp8, round_nvfp4
from tvmmoe.kernels.sm90a.tile_scheduler import Tile
from tvmmoe.kernels.sm90a.trace import (
    address,
    assign,
    bits,
    cast,
    if_,
    let,
    load,
    ptx,
    regs,
    scalar,
    shuffle_xor,
    store,
    store_to,
    tensor_map,
    u32,
)  # fmt: skip


class QuantizedGemm1(Gemm1):
    """Rows and epilogue for :class:`GroupedGemm`; ``form`` is mxfp8, or nvfp4 without per-token scales."""

    chunk_columns = 2

    def __init__(self, a, form: ActivationFormat):
        super().__init__(a, is_gated=True)
        self.form = form

    def row_map(self, c: GemmConfig, base, row, box_bytes: int):
        size = self.a.intermediate_size
        dims, strides = [row, size, self.a.local_num_experts * self.halves], [row, size * row]
        box = [box_bytes, self.columns(c), self.halves]
        return tensor_map(address(base), dims, strides, box, "uint8", 0, c.l2_promotion)

    def row_coordinates(self, c: GemmConfig, tile: Tile):
        return [let(tile.row_block * self.columns(c)), let(tile.expert * self.halves)]

    def _column(self, c: GemmConfig, tile: Tile, smem_row):
        return tile.row_block * self.columns(c) + smem_row % self.columns(c)

    def first_row(self, gemm: GroupedGemm):
        return gemm.fragment(0) * 32 + gemm.warp4 * 8 + gemm.group

    def row_steps(self, c: GemmConfig) -> tuple[int, int]:
        return 32, self.columns(c)

    def row_modulo_8(self, gemm: GroupedGemm, r: int):
        return gemm.group

    def store_chunk(self, is_inside, place, row, column) -> None:
        """Round two columns as part of their scale block, and store them in K order."""
        word, values = scalar("uint32", u32(0)), regs(2, "float32")
        with if_(is_inside):
            assign(word, load("uint32", place, "shared"))
        store(values, bits(let(word << u32(16)), "float32"), 0)
        store(values, bits(let(word & u32(0xFFFF0000)), "float32"), 1)
        self._round(values)
        # Columns (v, v + 4) of 8 are neighbours in K order: here of the lane two further.
        mine = let(pack_bf16(values[0], values[1]))
        other = let(shuffle_xor(mine, 2))
        pair = let(cast(column // 2 % 4, "uint32"))  # columns 2 pair and 2 pair + 1 of 8
        low, high = scalar("uint32"), scalar("uint32")
        ptx["prmt.b32"](low, mine, other, u32(0x5410))
        ptx["prmt.b32"](high, other, mine, u32(0x7632))
        is_low = pair < u32(2)
        v = let(cast(T.Select(is_low, 2 * pair, 2 * pair - u32(3)), "int64"))
        block, q, m = column // 128, column // 32 % 4, column // 8 % 4
        position = block * 128 + 32 * m + 8 * v + 2 * q
        with if_(is_inside):
            store_to("uint32", address(self.out, (row * self.out_width + position) * 2), T.Select(is_low, low, high))

    def _round(self, values) -> None:
        """Two values, those of 16 lanes being 32 neighbouring columns of a token."""
        amax = amax_bits(values, 0, 2)
        for distance in (1, 2, 4, 8) if self.form == ActivationFormat.mxfp8 else (1, 2, 4):
            amax = let(T.max(amax, shuffle_xor(amax, distance)))
        largest = let(bits(amax, "float32"))
        if self.form == ActivationFormat.mxfp8:
            round_mxfp8(values, range(2), largest)
        else:
            round_nvfp4(values, range(2), largest)
