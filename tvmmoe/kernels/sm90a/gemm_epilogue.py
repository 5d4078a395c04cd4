# SPDX-License-Identifier: Apache-2.0
"""What the consumers of a grouped GEMM do when a tile is multiplied: sum what shares rows, evaluate, store.

    sums     of warpgroups that split K meet in shared memory
    values   the problem's, of 32 tokens at once, in place of their accumulators
    rows     bf16 through stmatrix.trans into rows of tokens, then 16-byte stores
"""

from tvm.script import tirx as T

from tvmmoe.config import WeightFormat
from tvmmoe.kernels.sm90a import intrinsics as isa
from tvmmoe.kernels.sm90a.tile_scheduler import Tile
from tvmmoe.kernels.sm90a.trace import (
    address,
    assign,
    cast,
    if_,
    let,
    load,
    load_vec4,
    ptx,
    regs,
    scalar,
    store,
    store_vec4,
    u32,
)  # fmt: skip

EPILOGUE_TOKENS = 32  # evaluated together
COLUMNS = 8  # of a row that a lane stores


class Epilogue:
    """The part of :class:`tvmmoe.kernels.sm90a.gemm.GroupedGemm` behind the main loop."""

    def _epilogue(self, tile: Tile, state) -> None:
        if self.c.ks == 1:
            self._store_tile(tile, state)
            return
        # Warpgroups that share rows take turns in finishing a tile; the others hand over their sums. Two buffers and
        # one barrier a tile are enough: who passes the barrier of tile i + 1 has read the sums of tile i. Sums are added in
        # pairs, (0 + 1) + (2 + 3), so that the result does not depend on who finishes.
        ks, thread = self.c.ks, self.thread.tid % 128
        base = let((self.row_group * 2 + self.turn % 2) * ((ks - 1) * self.partial_words) + thread)
        finisher = let(self.turn % ks)
        accumulators = [(acc, i) for acc in self.acc for i in range(self.acc_count)]
        with if_(self.k_sub != finisher):
            slot = (self.k_sub ^ finisher) - 1  # 0: the other of the finisher's pair
            mine = let(base + slot * self.partial_words)
            for index, (acc, i) in enumerate(accumulators):
                ptx["st.shared.f32"](self.partial.ptr_to([mine + index * 128]), acc[i])
        ptx["barrier.sync.aligned"](cast(self.row_group + (1 + self.c.warpgroups), "uint32"), u32(128 * ks))

        def partial_sum(slot: int, index: int):
            return load("float32", self.partial.ptr_to([base + (slot * self.partial_words + index * 128)]), "shared")

        with if_(self.k_sub == finisher):
            for index, (acc, i) in enumerate(accumulators):
                store(acc, acc[i] + partial_sum(0, index), i)
            for index, (acc, i) in enumerate(accumulators if ks == 4 else []):
                store(acc, acc[i] + (partial_sum(1, index) + partial_sum(2, index)), i)
            self._store_tile(tile, state)
        assign(self.turn, self.turn + 1)

    def _warpgroup_sync(self) -> None:
        # Not cuda.warpgroup_sync: compilers may move plain loads and stores across that.
        ptx["barrier.sync.aligned"](cast(self.warpgroup + 1, "uint32"), u32(128))

    def _store_tile(self, tile: Tile, state) -> None:
        """Accumulators -> problem's values -> bf16 rows, ``chunk_m`` tokens at a time."""
        c, p = self.c, self.p
        self.out_base = self.warpgroup * (self.chunk_m * self.pitch)
        if state is None:
            state = p.begin_tile(self, tile, cast(tile.expert, "int64"))
        for first in range(0, c.tile_m, EPILOGUE_TOKENS):
            with if_(tile.num_rows > first):
                self._evaluate(tile, state, range(first, min(first + EPILOGUE_TOKENS, c.tile_m), 8))
        for first in range(0, c.tile_m, self.chunk_m):
            with if_(tile.num_rows > first):
                self._warpgroup_sync()
                for mi in range(c.mi):
                    self._store_matrices(mi, first)
                self._warpgroup_sync()
                self._copy_rows(tile, first)

    def _evaluate(self, tile: Tile, state, blocks) -> None:
        """The problem's values of 8-token ``blocks`` instead of their accumulators; matrix r takes the place of row r."""
        scales = [scale for block in blocks for scale in self._token_scales(tile, block)]
        places = [block // 2 + i for block in blocks for i in range(2)]  # of a token's row 0; row 1 is two further
        for mi in range(self.c.mi):
            accumulators = [[self.acc[mi][place + 2 * r] for r in range(2)] for place in places]
            for matrix in range(self.p.matrices):
                values = self.p.values(self, state, mi, matrix, accumulators, scales)
                for place, value in zip(places, values, strict=True):
                    store(self.acc[mi], value, place + 2 * matrix)

    def _token_scales(self, tile: Tile, token: int):
        """Factors of this thread's two tokens of an 8-token block: per-token scale and the decode's 2^NVFP4_SHIFT."""
        if self.c.weight_format == WeightFormat.mxfp4:
            return [None, None]
        scales = regs(2, "float32")
        for i in range(2):
            store(scales, T.float32(2.0**isa.NVFP4_SHIFT), i)
        with if_(self.a.per_token_scale != 0):
            row = cast(tile.token_tile * self.c.tile_m + token + self.quad * 2, "int64")
            for i in range(2):
                value = load("float32", address(self.a.ws["row_scale"], (row + i) * 4))
                store(scales, value * T.float32(2.0**isa.NVFP4_SHIFT), i)
        return [scales[0], scales[1]]

    def _store_matrices(self, mi: int, first: int) -> None:
        """A chunk's values into rows of tokens in shared memory, up to four 8x8 matrices at a time."""
        p, chunk_m = self.p, self.chunk_m
        num_matrices = min(4, p.matrices * (chunk_m // 8))
        for block in range(0, chunk_m // 8, num_matrices // p.matrices):
            pairs = []
            for m in range(num_matrices):
                place = (first // 8 + block + m // p.matrices) * 4 + 2 * (m % p.matrices)
                pair = scalar("uint32")
                ptx["cvt.rn.bf16x2.f32"](pair, self.acc[mi][place + 1], self.acc[mi][place])
                pairs.append(pair)
            matrix = (self.thread.lane // 8) % num_matrices
            token = (block + matrix // p.matrices) * 8 + self.thread.lane % 8
            column = mi * (32 * p.matrices) + self.warp4 * (8 * p.matrices) + (matrix % p.matrices) * 8
            isa.stmatrix_transposed(self.outs.ptr_to([self.out_base + token * self.pitch + column * 2]), pairs)

    def _copy_rows(self, tile: Tile, first: int) -> None:
        chunks = self.out_columns // COLUMNS  # of a row
        per_pass = 128 // chunks
        index = let(self.thread.tid % 128)
        chunk = let(index % chunks)
        for start in range(0, self.chunk_m, per_pass):
            token = let(start + index // chunks)
            column = self.p.out_column(self, tile) + chunk * COLUMNS
            inside = T.And(first + token < tile.num_rows, self.p.is_out_column(column))
            if per_pass > self.chunk_m:
                inside = T.And(inside, token < self.chunk_m)
            row = cast(tile.token_tile * self.c.tile_m + first + token, "int64")
            place = self.outs.ptr_to([self.out_base + token * self.pitch + chunk * (2 * COLUMNS)])
            with if_(inside):
                words = load_vec4(place, "shared")
                store_vec4(address(self.p.out, (row * self.p.out_width + cast(column, "int64")) * 2), words)
