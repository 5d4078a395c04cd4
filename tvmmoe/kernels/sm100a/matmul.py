# SPDX-License-Identifier: Apache-2.0
"""out[n, m] = sum over k of weights[m, k] tokens[n, k], both e2m1 with plain block scales, on tcgen05.mma.

    grid      one CTA a tile of 128 weight rows x tile_n tokens
    warp 0    TMA: weights [128, 128 bytes], tokens [tile_n, 128 bytes] a stage (256 columns), 128-byte swizzle
    warp 1    tensor memory; tcgen05.cp of scales, tcgen05.mma, tcgen05.commit
    warps 4-7 scales: thread t brings those of weight row t and token t, four at a time, from rows that start anywhere into
              the tiles that tcgen05.cp wants (descriptors.py); at the end accumulators -> out, a lane a weight row

    tensor memory: tile_n columns of accumulators, then a stage's scale tiles of weights and tokens, for every stage

A stage's full barrier counts the TMA bytes, one arrival of warp 0 and 128 of the scale threads, who fence their writes
for the asynchronous proxy first; its empty barrier is the commit. K past the end is zero on both sides.

This is the product alone, without experts or an epilogue: it compiles and its SASS has UTCOMMA; it has never run.

Roofline, B200 (148 SMs, 1.85 GHz, 8 TB/s; data sheet): 9 PFLOP/s of dense FP4 are 16384 multiply-adds a clock and SM, a
128 x 128 x 64 instruction in 64 clocks, for which a stage's 32 KB arrive at 125 bytes a clock. A weight byte is worth
4 * tokens FLOP: weights bound the time below about 280 tokens an expert.
"""

from dataclasses import dataclass

import tvm
from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder

from tvmmoe.kernels.sm90a.trace import (
    I,
    Smem,
    address,
    assign,
    cast,
    cuda,
    for_,
    if_,
    kernel,
    let,
    load,
    ptx,
    regs,
    scalar,
    store_to,
    tensor_map,
    u32,
)  # fmt: skip
from tvmmoe.kernels.sm100a import descriptors as desc

ROWS = 128  # weight rows of a tile: the lanes of tensor memory
K_STAGE = 256  # columns of a stage: one 128-byte swizzle row of e2m1
TMA = "cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes"
SCALE_THREADS = 128
FIRST_SCALE_WARP = 4


@dataclass(frozen=True)
class MatmulConfig:
    """Compile-time choices."""

    form: desc.Form  # NVFP4 or MXFP4
    tile_n: int  # tokens of a tile, a multiple of 8 up to 128
    num_stages: int = 4

    @property
    def scale_tiles(self) -> int:
        """Scale tiles of 128 rows in one stage."""
        return K_STAGE // self.form.block_size // 4

    @property
    def scale_columns(self) -> int:
        """Columns of tensor memory that one operand's scales of a stage take."""
        return self.scale_tiles * desc.SCALE_TILE_COLUMNS

    @property
    def symbol(self) -> str:
        return f"matmul_{'mxfp4' if self.form.is_ue8m0 else 'nvfp4'}_n{self.tile_n}"


class Matmul:
    """Emits the kernel."""

    def __init__(self, config: MatmulConfig):
        self.c = c = config
        self.x_bytes, self.w_bytes = c.tile_n * 128, ROWS * 128
        self.s_bytes = c.scale_tiles * desc.SCALE_TILE_BYTES

    def function(self) -> tvm.tirx.PrimFunc:
        """The host function: pointers to weights, their scales, tokens, their scales and out; then m, n, k."""
        c = self.c
        with IRBuilder() as builder:
            with I.prim_func():
                I.func_name(c.symbol)
                I.func_attr({"global_symbol": c.symbol})
                for name in ("weights", "weight_scales", "tokens", "token_scales", "out", "m", "n", "k"):
                    setattr(self, name, I.arg(name, I.int64()))
                row = self.k // 2
                maps = [
                    tensor_map(address(data), [row, rows], [row], [128, box], "uint8", 3)
                    for data, rows, box in ((self.weights, self.m, ROWS), (self.tokens, self.n, c.tile_n))
                ]
                tiles_m, tiles_n = (self.m + (ROWS - 1)) // ROWS, (self.n + (c.tile_n - 1)) // c.tile_n
                with kernel(c.symbol, cast(tiles_m * tiles_n, "int32"), 256) as thread:
                    self.thread, self.maps = thread, maps
                    self.first_row = let(thread.cta % cast(tiles_m, "int32") * ROWS)
                    self.first_token = let(thread.cta // cast(tiles_m, "int32") * c.tile_n)
                    self._emit()
        return builder.get()

    def _emit(self) -> None:
        warp = self.thread.warp
        self._allocate()
        self.k_steps = let(cast((self.k + (K_STAGE - 1)) // K_STAGE, "int32"))
        self.stage, self.phase = scalar("int32", T.int32(0)), scalar("uint32", u32(0))
        with if_(warp == 0):
            with if_(cuda.elect_sync() != u32(0)):
                self._load_operands()
        with if_(warp == 1):
            with if_(cuda.elect_sync() != u32(0)):
                self._multiply()
        with if_(warp >= FIRST_SCALE_WARP):
            index = let(self.thread.tid - FIRST_SCALE_WARP * 32)
            self._load_scales(index)
            self._store(index)
        ptx["tcgen05.fence::before_thread_sync"]()
        cuda.cta_sync()
        with if_(warp == 1):
            ptx["tcgen05.fence::after_thread_sync"]()
            ptx["tcgen05.dealloc.cta_group::1.sync.aligned.b32"](self.tmem, u32(self.columns))

    def _allocate(self) -> None:
        c, smem = self.c, Smem()
        self.ws, self.xs = (smem.alloc(c.num_stages * size, "uint8", 1024) for size in (self.w_bytes, self.x_bytes))
        self.w_scales, self.x_scales = (smem.alloc(c.num_stages * self.s_bytes, "uint8", 128) for _ in range(2))
        self.full, self.empty = (smem.alloc(c.num_stages, "uint64", 8) for _ in range(2))
        self.finished, pointer = smem.alloc(1, "uint64", 8), smem.alloc(1, "uint32", 8)
        smem.commit()
        self.columns = desc.num_columns(c.tile_n + c.num_stages * 2 * c.scale_columns)
        with if_(self.thread.warp == 1):
            ptx["tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32"](pointer.ptr_to([0]), u32(self.columns))
            ptx["tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned"]()
        with if_(self.thread.tid == 0):
            for i in range(c.num_stages):
                ptx.mbarrier.init.shared.b64(self.full.ptr_to([i]), u32(1 + SCALE_THREADS))
                ptx.mbarrier.init.shared.b64(self.empty.ptr_to([i]), u32(1))
            ptx.mbarrier.init.shared.b64(self.finished.ptr_to([0]), u32(1))
            ptx.fence.mbarrier_init.release.cluster()
        ptx["tcgen05.fence::before_thread_sync"]()
        cuda.cta_sync()
        ptx["tcgen05.fence::after_thread_sync"]()
        self.tmem = load("uint32", pointer.ptr_to([0]), "shared")

    def _advance(self) -> None:
        assign(self.stage, self.stage + 1)
        with if_(self.stage == self.c.num_stages):
            assign(self.stage, T.int32(0))
            assign(self.phase, self.phase ^ u32(1))

    def _load_operands(self) -> None:
        with for_(self.k_steps) as step:
            cuda.mbarrier_wait(self.empty.ptr_to([self.stage]), self.phase ^ u32(1))
            bar = self.full.ptr_to([self.stage])
            ptx.mbarrier.arrive.expect_tx.shared.b64(bar, u32(self.w_bytes + self.x_bytes))
            for smem, size, data, row in (
                (self.ws, self.w_bytes, self.maps[0], self.first_row),
                (self.xs, self.x_bytes, self.maps[1], self.first_token),
            ):
                ptx[TMA](smem.ptr_to([self.stage * size]), T.address_of(data), step * (K_STAGE // 2), row, bar)
            self._advance()

    # ------------------------------------------------------------------------------------------------------ multiplying

    def _descriptor(self, smem, offset, stride_bytes: int, swizzle: int):
        """Descriptor of a matrix ``offset`` bytes into a shared buffer."""
        constant = desc.matrix_descriptor(0, 0, stride_bytes, swizzle)
        start = cuda.cvta_generic_to_shared(smem.ptr_to([offset]))
        return let(T.uint64(constant) | cast((start & u32(0x3FFFF)) >> u32(4), "uint64"))

    def _multiply(self) -> None:
        c = self.c
        with for_(self.k_steps) as step:
            cuda.mbarrier_wait(self.full.ptr_to([self.stage]), self.phase)
            ptx["tcgen05.fence::after_thread_sync"]()
            places = []
            for operand, smem in enumerate((self.w_scales, self.x_scales)):
                column = c.tile_n + (self.stage * 2 + operand) * c.scale_columns
                place = let(self.tmem + cast(column, "uint32"))
                for tile in range(c.scale_tiles):
                    # groups of 8 rows of 16 bytes are 128 bytes apart
                    offset = self.stage * self.s_bytes + tile * desc.SCALE_TILE_BYTES
                    source = self._descriptor(smem, offset, 128, 0)
                    target = place + u32(tile * desc.SCALE_TILE_COLUMNS)
                    ptx["tcgen05.cp.cta_group::1.32x128b.warpx4"](target, source)
                places.append(place)
            w = self._descriptor(self.ws, self.stage * self.w_bytes, 1024, desc.SWIZZLE_128B)
            x = self._descriptor(self.xs, self.stage * self.x_bytes, 1024, desc.SWIZZLE_128B)
            for part in range(K_STAGE // c.form.k):
                column, scale_id = desc.scale_place(c.form, part)
                ahead = T.uint64(part * c.form.k // 2 // 16)  # e2m1 of both operands, 16 bytes a unit
                ptx[c.form.instruction](
                    self.tmem, w + ahead, x + ahead, u32(desc.instruction_descriptor(c.form, ROWS, c.tile_n, scale_id)),
                    places[0] + u32(column), places[1] + u32(column), T.bool(True) if part else step > 0,
                )  # fmt: skip
            self._commit(self.empty.ptr_to([self.stage]))
            self._advance()
        self._commit(self.finished.ptr_to([0]))

    def _commit(self, barrier) -> None:
        """The barrier completes when all that this thread has issued so far is done."""
        ptx["tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64"](barrier)

    # ------------------------------------------------------------------------------------------- scales, and accumulators

    def _load_scales(self, index) -> None:
        """Thread ``index`` of 128: scales of weight row and token ``index``, one stage ahead in registers."""
        rows = [
            self._scale_row(self.weight_scales, cast(self.first_row + index, "int64"), self.m),
            self._scale_row(self.token_scales, cast(self.first_token + index, "int64"), self.n),
        ]
        place = let(index % 32 * 16 + index // 32 * 4)
        words = [self._scale_words(row, T.int32(0)) for row in rows]
        with for_(self.k_steps) as step:
            cuda.mbarrier_wait(self.empty.ptr_to([self.stage]), self.phase ^ u32(1))
            for smem, of_row in zip((self.w_scales, self.x_scales), words, strict=True):
                for tile in range(self.c.scale_tiles):
                    offset = self.stage * self.s_bytes + tile * desc.SCALE_TILE_BYTES + place
                    store_to("uint32", smem.ptr_to([offset]), of_row[tile], "shared")
            ptx.fence.proxy.async_.shared__cta()
            ptx.mbarrier.arrive.shared.b64(self.full.ptr_to([self.stage]), u32(1))
            for row, of_row in zip(rows, words, strict=True):
                self._scale_words(row, let(step + 1), of_row)
            self._advance()

    def _scale_row(self, scales, row, num_rows):
        """Address of a row's scales and their number, 0 for rows past the end."""
        row_bytes = self.k // self.c.form.block_size
        return let(scales + row * row_bytes), let(T.Select(row < num_rows, cast(row_bytes, "int32"), T.int32(0)))

    def _scale_words(self, row, step, into=None):
        """The scales of a stage, four a word, zeros past the end; the row may start at any byte."""
        first, num_bytes = row
        words = regs(self.c.scale_tiles, "uint32") if into is None else into
        at = let(step * (K_STAGE // self.c.form.block_size))
        start = let(first + cast(at, "int64"))
        skew = let(cast(start & T.int64(3), "int32"))
        left = let(num_bytes - at)
        raw = []
        for i in range(self.c.scale_tiles + 1):
            word = scalar("uint32", u32(0))
            with if_(left + skew > 4 * i):
                assign(word, load("uint32", address(start - cast(skew, "int64"), 4 * i)))
            raw.append(word)
        for i in range(self.c.scale_tiles):
            word = scalar("uint32")
            ptx["shf.r.wrap.b32"](word, raw[i], raw[i + 1], cast(skew * 8, "uint32"))
            inside = T.max(T.min(left - 4 * i, T.int32(4)), T.int32(0))
            mask = T.Select(inside == 4, u32(0xFFFFFFFF), (u32(1) << cast(inside * 8 & 31, "uint32")) - u32(1))
            I.buffer_store(words, word & mask, [i])
        return words

    def _store(self, index) -> None:
        """Accumulators, a lane a weight row: neighbouring lanes write neighbouring columns of a token."""
        row = let(self.first_row + index)
        cuda.mbarrier_wait(self.finished.ptr_to([0]), u32(0))
        ptx["tcgen05.fence::after_thread_sync"]()
        lanes = cast(self.thread.warp % 4 * 32, "uint32") << u32(16)
        for first in range(0, self.c.tile_n, 8):
            acc = regs(8, "uint32")
            ptx["tcgen05.ld.sync.aligned.32x32b.x8.b32"](*[acc[i] for i in range(8)], self.tmem + lanes + u32(first))
            ptx["tcgen05.wait::ld.sync.aligned"]()
            for i in range(8):
                token = let(cast(self.first_token + (first + i), "int64"))
                with if_(T.And(token < self.n, cast(row, "int64") < self.m)):
                    store_to("uint32", address(self.out, (token * self.m + cast(row, "int64")) * 4), acc[i])


def matmul(config: MatmulConfig) -> tvm.tirx.PrimFunc:
    """The packed function of one configuration."""
    return Matmul(config).function()
