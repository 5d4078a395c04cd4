# SPDX-License-Identifier: Apache-2.0
"""What TMA cannot bring into a stage: 128 threads with cp.async, several stages ahead of what they finish.

    request   16 bytes of a token's row a thread; 8 bytes of packed e2m1, which kind::mxf8f6f4 wants in chunks of 16; scales
              as they lie in memory, in one piece where rows are aligned, else in words around bytes that start anywhere;
              for kind::f16 packed weights, to be decoded
    finish    when a request has arrived: scale words -> scale tiles (descriptors.py), or packed weights -> bf16; then the
              fence for the asynchronous proxy and this thread's arrival

TMA's gather4 could bring the tokens of gemm1, but a K that ends inside its box is reported to give wrong results on a B200
(triton-lang/triton#10927), and whether the box or its user is to blame cannot be tried here.

Thread t has the scales of weight row t and of tokens t and t + 128, so only decoding needs what others have requested.

Raw scales of a stage, [words + 2, scaled_rows] words: word i of every row, one more word for rows that start between
words, and eight times the bytes that they start after one. Aligned rows are [scaled_rows, scale_bytes] instead.
"""

from tvm.script import tirx as T

from tvmmoe.config import WeightFormat
from tvmmoe.kernels.sm90a import intrinsics as sm90a
from tvmmoe.kernels.sm90a.gather import from_pairs
from tvmmoe.kernels.sm90a.tile_scheduler import Tile
from tvmmoe.kernels.sm90a.trace import (
    address,
    assign,
    cast,
    cuda,
    for_,
    if_,
    if_else,
    let,
    load,
    load_vec4,
    ptx,
    regs,
    scalar,
    store,
    store_to,
    store_vec4,
    u32,
)  # fmt: skip
from tvmmoe.kernels.sm100a import descriptors as desc
from tvmmoe.kernels.sm120a.intrinsics import funnel

PRODUCERS = 128  # threads, as many as a tile has weight rows
PRODUCER_BARRIER = 2  # named barrier of their warps
CHUNKS = desc.BLOCK_BYTES // 16  # of a row in one K block


class Ring:
    """Where a role is in a ring of buffers: index and phase parity, both in registers."""

    def __init__(self, size: int):
        self.size = size
        self.index, self.phase = scalar("int32", T.int32(0)), scalar("uint32", u32(0))

    def advance(self) -> None:
        assign(self.index, self.index + 1)
        with if_(self.index == self.size):
            assign(self.index, T.int32(0))
            assign(self.phase, self.phase ^ u32(1))


class Producer:
    """Emits the role of these threads."""

    def __init__(self, gemm, index):
        self.g, self.c, self.p, self.index = gemm, gemm.c, gemm.p, index
        self.lag = self.c.num_stages - 2  # requests that are on their way while the one before them is finished
        self.words = self.c.scale_words
        p, c = self.p, self.c
        self.row_bytes = let(cast(p.k // c.weight_format.block_size, "int32"))
        self.piece = min(16, c.scale_bytes)
        token_scales = p.token_scales if c.is_scaled else T.int64(0)
        misaligned = (p.scales | token_scales | p.k // c.weight_format.block_size) & T.int64(self.piece - 1)
        self.is_aligned = let(cast(misaligned == 0, "int32")) != 0
        self.slots = [let(index + PRODUCERS * i) for i in range(-(-c.scaled_rows // PRODUCERS))]  # raw scale rows

    def run(self) -> None:
        c, g = self.c, self.g
        requested, finished, pending = Ring(c.num_stages), Ring(c.num_stages), scalar("int32", T.int32(0))

        def finish() -> None:
            self._finish(finished.index)
            finished.advance()

        def finish_oldest() -> None:
            ptx["cp.async.wait_group"](self.lag)
            finish()

        def work(tile: Tile) -> None:
            self._plan(tile)
            with for_(g.k_steps) as step:
                cuda.mbarrier_wait(g.empty.ptr_to([requested.index]), requested.phase ^ u32(1))
                self._request(requested.index, step)
                ptx["cp.async.commit_group"]()
                requested.advance()
                if_else(pending == self.lag, finish_oldest, lambda: assign(pending, pending + 1))

        g.tiles(work)
        ptx["cp.async.wait_group"](0)
        with for_(pending):
            finish()

    # ------------------------------------------------------------------------------------------------------- requesting

    def _plan(self, tile: Tile) -> None:
        """Where this thread's rows of a tile begin; 0: nothing to copy."""
        c, p = self.c, self.p
        self.chunk = let(self.index % CHUNKS)
        # Rows of a thread are 16 apart, so that their chunks are exchanged alike.
        row = let(self.index // CHUNKS)
        self.place = let(desc.chunk_offset(row, self.chunk))
        self.tokens = []  # TMA brings those that lie together
        for first in range(0, 0 if p.is_contiguous else c.tile_m, PRODUCERS // CHUNKS):
            token, pointer = let(row + first), scalar("int64", T.int64(0))
            with if_(token < tile.num_rows):
                assign(pointer, p.tokens + p.operand_row(c, tile, token) * p.token_bytes)
            self.tokens.append(pointer)
        weights = let(p.weights + cast(tile.expert, "int64") * (p.rows_per_expert * (p.k // 2)))
        self.weights = []
        if not c.has_weight_map:
            per_row = CHUNKS if c.is_scaled else c.k_stage // 32
            for first in range(0, PRODUCERS, PRODUCERS // per_row):
                weight_row = p.row(c, tile, let(first + self.index // per_row))
                self.weights.append(let(weights + cast(weight_row, "int64") * (p.k // 2)))
        self._plan_scales(tile)

    def _plan_scales(self, tile: Tile) -> None:
        c, p, row_bytes = self.c, self.p, cast(self.row_bytes, "int64")
        expert = let(p.scales + cast(tile.expert, "int64") * (p.rows_per_expert * row_bytes))
        self.scales = [let(expert + cast(p.row(c, tile, self.index), "int64") * row_bytes)]
        for slot in self.slots[1:]:
            token, pointer = let(slot - PRODUCERS), scalar("int64", T.int64(0))
            with if_(token < tile.num_rows):
                assign(pointer, p.token_scales + p.operand_row(c, tile, token) * row_bytes)
            self.scales.append(pointer)

    def _request(self, stage, step) -> None:
        """Request step ``step`` into stage ``stage``; what ends inside it is zero after the end."""
        c, g = self.c, self.g
        size = c.token_stage // c.k_blocks
        for block in range(c.k_blocks if self.tokens else 0):
            column = let((step * c.k_blocks + block) * desc.BLOCK_BYTES + self.chunk * 16)
            num_bytes = let(T.Select(cast(column, "int64") < self.p.token_bytes, T.int32(16), T.int32(0)))
            for i, pointer in enumerate(self.tokens):
                place = self.place + i * (PRODUCERS // CHUNKS * desc.BLOCK_BYTES)
                target = g.xs.ptr_to([stage * c.token_stage + block * size + place])
                with if_(pointer != 0):
                    sm90a.copy_async(target, address(pointer, cast(column, "int64")), 16, num_bytes)
        if not c.has_weight_map:
            (self._request_widened if c.is_scaled else self._request_packed)(stage, step)
        at = let(step * c.scale_bytes)
        left = let(self.row_bytes - at)
        for slot, pointer in zip(self.slots, self.scales, strict=True):
            with if_(pointer != 0):
                self._request_scales(stage, slot, let(pointer + cast(at, "int64")), left)

    def _request_widened(self, stage, step) -> None:
        """e2m1 for kind::mxf8f6f4: 16 of them in the first 8 bytes of a chunk, which has the place of a token's chunk."""
        c, g = self.c, self.g
        size = c.weight_stage // c.k_blocks
        for block in range(c.k_blocks):
            column = let((step * c.k_blocks + block) * (c.form.k_block // 2) + self.chunk * 8)
            num_bytes = let(T.Select(cast(column, "int64") < self.p.k // 2, T.int32(8), T.int32(0)))
            for i, pointer in enumerate(self.weights):
                place = self.place + i * (PRODUCERS // CHUNKS * desc.BLOCK_BYTES)
                target = g.ws.ptr_to([stage * c.weight_stage + block * size + place])
                sm90a.copy_async(target, address(pointer, cast(column, "int64")), 8, num_bytes)

    def _request_packed(self, stage, step) -> None:
        """Packed weights that :meth:`_decode` will read."""
        c = self.c
        per_row = c.k_stage // 32
        piece, row = let(self.index % per_row), let(self.index // per_row)
        column = let(step * (c.k_stage // 2) + piece * 16)
        num_bytes = let(T.Select(cast(column, "int64") < self.p.k // 2, T.int32(16), T.int32(0)))
        for i, pointer in enumerate(self.weights):
            place = let((row + i * (PRODUCERS // per_row)) * c.raw_weight_pitch + piece * 16)
            target = self.g.raw_weights.ptr_to([stage * (PRODUCERS * c.raw_weight_pitch) + place])
            sm90a.copy_async(target, address(pointer, cast(column, "int64")), 16, num_bytes)

    def _request_scales(self, stage, slot, source, left) -> None:
        """One row's scales of a step, ``left`` bytes of them before the row ends."""
        c = self.c

        def in_pieces():
            for offset in range(0, c.scale_bytes, self.piece):
                size = T.max(T.min(left - offset, T.int32(self.piece)), T.int32(0))
                target = self._raw(stage, let(slot * c.scale_bytes + offset))
                sm90a.copy_async(target, address(source, offset), self.piece, size)

        def in_words():
            skew = let(cast(source & T.int64(3), "int32"))
            aligned, end = let(source - cast(skew, "int64")), let(left + skew)
            for i in range(self.words + 1):
                size = T.max(T.min(end - 4 * i, T.int32(4)), T.int32(0))
                sm90a.copy_async(self._raw_word(stage, slot, i), address(aligned, 4 * i), 4, size)
            store_to("uint32", self._raw_word(stage, slot, self.words + 1), cast(skew * 8, "uint32"), "shared")

        self._if_aligned(in_pieces, in_words)

    def _if_aligned(self, in_pieces, in_words) -> None:
        if self.c.scale_bytes < 4:  # a step's scales may start inside a word in any case
            in_words()
        else:
            if_else(self.is_aligned, in_pieces, in_words)

    def _raw(self, stage, offset):
        return self.g.raw_scales.ptr_to([stage * self.c.raw_scale_stage + offset])

    def _raw_word(self, stage, slot, i: int):
        return self._raw(stage, let((i * self.c.scaled_rows + slot) * 4))

    # -------------------------------------------------------------------------------------------------------- finishing

    def _finish(self, stage) -> None:
        """This thread's part of a stage is there: give it to the tensor core."""
        if self.c.is_scaled:
            for i, slot in enumerate(self.slots):
                with if_(slot < self.c.scaled_rows):
                    self._store_scales(stage, i, self._scale_words(stage, slot))
        else:
            ptx["barrier.sync.aligned"](u32(PRODUCER_BARRIER), u32(PRODUCERS))  # and everybody's part
            self._decode(stage)
        ptx.fence.proxy.async_.shared__cta()
        ptx.mbarrier.arrive.shared.b64(self.g.full.ptr_to([stage]), u32(1))

    def _scale_words(self, stage, slot):
        """The scales of a row in a stage, four a word."""
        words = regs(self.words, "uint32")

        def in_pieces():
            for i in range(self.words):
                pointer = self._raw(stage, let(slot * self.c.scale_bytes + 4 * i))
                store(words, load("uint32", pointer, "shared"), i)

        def in_words():
            raw = [load("uint32", self._raw_word(stage, slot, i), "shared") for i in range(self.words + 2)]
            for i in range(self.words):
                store(words, funnel(raw[i], raw[i + 1], raw[-1]), i)

        self._if_aligned(in_pieces, in_words)
        return words

    def _store_scales(self, stage, i: int, words) -> None:
        """Words of weight row (i = 0) or token into the scale tiles of the stage."""
        c, g = self.c, self.g
        smem, size, chunks, chunk = g.w_scales, c.weight_scale_stage, 1, 0
        if i:
            smem, size, chunks, chunk = g.x_scales, c.token_scale_stage, c.token_scale_chunks, i - 1
        place = let(desc.scale_offset(self.index, 0))
        for group in range(c.scale_groups):
            tile = (group * chunks + chunk) * desc.SCALE_TILE_BYTES
            store_to("uint32", smem.ptr_to([stage * size + tile + place]), words[group], "shared")

    def _decode(self, stage) -> None:
        """Row ``index`` of packed weights -> bf16 in K blocks, exactly: e2m1 * 2^-126 is a bf16 pattern of its bits."""
        c, g = self.c, self.g
        scales = self._scale_words(stage, self.index)
        raw = let(stage * (PRODUCERS * c.raw_weight_pitch) + self.index * c.raw_weight_pitch)
        for piece in range(c.k_stage // 32):  # 32 columns, four chunks of bf16
            words = load_vec4(g.raw_weights.ptr_to([raw + piece * 16]), "shared")
            factors = self._factors(scales, piece)
            for i in range(4):
                chunk = piece * 4 + i
                block = stage * c.weight_stage + chunk // CHUNKS * (c.weight_stage // c.k_blocks)
                target = g.ws.ptr_to([block + desc.chunk_offset(self.index, chunk % CHUNKS)])
                store_vec4(target, _decode_word(words[i], factors[i * len(factors) // 4]), "shared")

    def _factors(self, scales, piece: int):
        """bf16 pairs of the scales of 32 columns: one of ue8m0, or two of e4m3."""
        is_mx = self.c.weight_format is WeightFormat.mxfp4
        places = [piece] if is_mx else [2 * piece, 2 * piece + 1]
        factors = [let((scales[i // 4] >> u32(8 * (i % 4))) & u32(0xFF)) for i in places]
        return [(sm90a.ue8m0_pair if is_mx else _e4m3_pair)(byte) for byte in factors]


def _decode_word(word, factor):
    """Eight e2m1 of a word times their scale as four bf16 pairs in column order."""
    spread, pairs = regs(8, "uint32"), regs(4, "uint32")
    sm90a.decode_word(word, u32(sm90a.TWO_POW_126), spread, 0, None)  # (v, v + 4) for v = 0 ... 3
    for v in range(4):
        store(pairs, spread[2 * v], v)
    from_pairs(pairs)
    for i in range(4):
        ptx["mul.rn.bf16x2"](pairs[i], pairs[i], factor)
    return pairs


def _e4m3_pair(byte):
    """An e4m3 as a bf16 pair, exactly: its bits, moved to where bf16 has them, are e4m3 * 2^-120; 127 is NaN."""
    magnitude, pair = let(byte & u32(0x7F)), scalar("uint32")
    pattern = let((magnitude << u32(4) | (byte & u32(0x80)) << u32(8)) * u32(0x10001))
    ptx["mul.rn.bf16x2"](pair, pattern, u32(sm90a.TWO_POW_120))
    return let(T.Select(magnitude == u32(0x7F), u32(0x7FFF7FFF), pair))
