# SPDX-License-Identifier: Apache-2.0
"""Main loop of both grouped GEMMs on tcgen05.mma: FP4 weights times tokens of any format, operands swapped.

    grid        one persistent CTA an SM; tile = (128 weight rows, up to tile_m tokens of one expert)
    warp 0      TMA, K blocks of [rows, 128 bytes] with 128-byte swizzle: packed weights of kind::mxf4nvf4, tokens of gemm2
    warp 1      tensor memory; one thread issues tcgen05.cp of scales, tcgen05.mma and tcgen05.commit
    warps 4-7   what TMA cannot bring (load.py): tokens of gemm1, gathered; scales from rows that start anywhere, into the
                tiles that tcgen05.cp wants; e2m1 weights for kind::mxf8f6f4; weights decoded to bf16 for kind::f16
    warps 8-11  epilogue: tcgen05.ld, bias, activation and scales, bf16 through stmatrix.trans, 16-byte row stores

    tensor memory: accumulators [128, tile_m], several times, so that the epilogue of a tile runs under the next one's
                   products; then the scale tiles of weights and tokens, for every stage

Weights are M = 128, so tokens are N, which is a run-time field of the instruction: a tile multiplies only as many token
columns as it has rows, rounded to ``width_step``.

Barriers. A stage's ``full`` counts the 128 threads of warps 4-7, who fence their writes for the asynchronous proxy first,
and where TMA loads something also its thread and its bytes; its ``empty`` is one commit. An accumulator's ``done`` is one
commit, its ``free`` the 128 threads of the epilogue. tcgen05.cp after tcgen05.mma is not among the pairs that the ISA
orders, hence scale columns of their own for every stage: who overwrites them has waited for ``empty``.
K past the end is zero on both sides, also in scale bytes, which may be NaN beyond.

Roofline, B200 (148 SMs, 1.85 GHz, 8 TB/s; data sheet): 9 PFLOP/s of dense FP4 are 16384 multiply-adds a clock and SM, so
128 x 256 x 64 takes 128 clocks; mxfp8 has half of that rate, bf16 a quarter.
Memory: 29 bytes a clock and SM. A weight byte is worth 4 * tokens FLOP, so weights bound the time below about 280 (nvfp4),
140 (mxfp8) or 70 (bf16) tokens an expert. L2 gives an SM about 64 bytes a clock; a K block of 128 x 256 nvfp4 is 48 KB for
512 clocks, 96 a clock: without multicast or CTA pairs, which this kernel has not, prefill ends near two thirds of the peak.
Shared memory: both operands are read once an instruction, 12 KB in 128 clocks, 96 of 128 bytes a clock.
bf16: a thread decodes 64 weights a K block, about 7 instructions a pair, 220 issue slots of its sub-core; products of 128
tokens take 256 clocks, memory 140. So up to 128 tokens an expert decoding is the limit, at some 60 % of memory's speed.
"""

from dataclasses import dataclass

from tvm.script import tirx as T

from tvmmoe.config import ActivationFormat, WeightFormat
from tvmmoe.kernels.sm80.intrinsics import grid_dependency
from tvmmoe.kernels.sm90a import intrinsics as sm90a
from tvmmoe.kernels.sm90a.tile_scheduler import Tile
from tvmmoe.kernels.sm90a.trace import (
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
    load_vec4,
    ptx,
    scalar,
    store_vec4,
    tensor_map,
    u32,
    while_,
)  # fmt: skip
from tvmmoe.kernels.sm100a import descriptors as desc
from tvmmoe.kernels.sm100a.load import PRODUCERS, Producer, Ring

NUM_CTAS = 148  # SMs of a B200; fewer SMs still finish, in more than one wave
ROWS = 128  # weight rows of a tile: the lanes of tensor memory
SMEM_BYTES = 227 * 1024
BARRIER_BYTES = 1024  # barriers, the pointer to tensor memory, alignment
THREADS = 384
FIRST_PRODUCER, FIRST_EPILOGUE = 4, 8  # warps
EPILOGUE_BARRIER = 1  # named barrier of the epilogue's warps
CHUNK_M = 32  # tokens whose results pass through shared memory at a time
# What tuning may choose from, for is_legal to thin out.
KNOBS = {
    "tile_m": (8, 16, 32, 64, 128, 256),
    "k_blocks": (1, 2, 4),
    "num_stages": tuple(range(3, 17)),
    "accumulators": (1, 2, 4),
}


@dataclass(frozen=True)
class GemmConfig:
    """Compile-time choices of one GEMM kernel."""

    weight_format: WeightFormat
    activation_format: ActivationFormat  # of gemm1's and gemm2's tokens: bf16 or the weight format's partner
    tile_m: int  # tokens of a tile
    k_blocks: int  # of a pipeline stage
    num_stages: int
    accumulators: int  # in tensor memory

    @property
    def form(self) -> desc.Form:
        return {
            ActivationFormat.nvfp4: desc.NVFP4,
            ActivationFormat.mxfp8: desc.MXFP8,
            ActivationFormat.bf16: desc.BF16,
        }[self.activation_format]

    @property
    def rows(self) -> int:
        """Weight rows of a tile."""
        return ROWS

    @property
    def k_stage(self) -> int:
        """Columns of a stage."""
        return self.k_blocks * self.form.k_block

    @property
    def width_step(self) -> int:
        """N comes in these steps. The ISA has steps of 8; 16 is what kernels that run use."""
        return min(self.tile_m, 16)

    @property
    def is_scaled(self) -> bool:
        """Whether the instruction applies the block scales."""
        return self.form.num_scales > 0

    @property
    def has_weight_map(self) -> bool:
        """Whether weights lie in shared memory as in global memory, so that TMA can bring them.

        For e2m1 of kind::mxf8f6f4 there is CU_TENSOR_MAP_DATA_TYPE_16U4_ALIGN16B, but it wants K % 128 == 0 and rows of
        32-byte multiples: gpt-oss has 2880.
        """
        return self.form is desc.NVFP4

    @property
    def token_bits(self) -> int:
        return {"e2m1": 4, "e4m3": 8, "bf16": 16}[self.form.tokens]

    @property
    def scale_bytes(self) -> int:
        """Block scales of a row in one stage."""
        return self.k_stage // self.weight_format.block_size

    @property
    def scale_words(self) -> int:
        """Words that hold them."""
        return -(-self.scale_bytes // 4)

    @property
    def scaled_rows(self) -> int:
        """Rows whose scales a stage has."""
        return ROWS + (self.tile_m if self.is_scaled else 0)

    @property
    def token_scale_chunks(self) -> int:
        """Scale tiles that the tokens take for every four scales of a row."""
        return -(-self.tile_m // ROWS)

    @property
    def scale_groups(self) -> int:
        """Groups of four scales of a row in one stage: scale tiles along k."""
        return self.scale_bytes // 4 if self.is_scaled else 0

    @property
    def weight_stage(self) -> int:
        """Bytes of weights in one stage."""
        return self.k_blocks * ROWS * desc.BLOCK_BYTES

    @property
    def token_stage(self) -> int:
        """Bytes of tokens in one stage."""
        return self.k_blocks * self.tile_m * desc.BLOCK_BYTES

    @property
    def weight_scale_stage(self) -> int:
        """Bytes of scale tiles of weights in one stage."""
        return self.scale_groups * desc.SCALE_TILE_BYTES

    @property
    def token_scale_stage(self) -> int:
        """Bytes of scale tiles of tokens in one stage."""
        return self.weight_scale_stage * self.token_scale_chunks

    @property
    def raw_scale_stage(self) -> int:
        """Bytes of scales as they lie in memory, in one stage: a word more for skewed rows and one for the skew."""
        return (self.scale_words + 2) * 4 * self.scaled_rows

    @property
    def raw_weight_pitch(self) -> int:
        """Bytes of a row of packed weights that wait to be decoded; 0 where none do."""
        return 0 if self.is_scaled else self.k_stage // 2 + 16

    @property
    def stage_bytes(self) -> int:
        """Shared memory of one stage."""
        scales = self.weight_scale_stage + self.token_scale_stage + self.raw_scale_stage
        return self.weight_stage + self.token_stage + scales + ROWS * self.raw_weight_pitch

    @property
    def smem_bytes(self) -> int:
        """Shared memory of a CTA, with the widest results."""
        return self.num_stages * self.stage_bytes + self.chunk_m * (2 * ROWS + 16) + BARRIER_BYTES

    @property
    def chunk_m(self) -> int:
        return min(self.tile_m, CHUNK_M)

    @property
    def accumulator_columns(self) -> int:
        return max(self.tile_m, 32)

    @property
    def stage_columns(self) -> int:
        """Columns of tensor memory that the scales of a stage take."""
        return self.scale_groups * desc.SCALE_TILE_COLUMNS * (1 + self.token_scale_chunks)

    @property
    def tmem_columns(self) -> int:
        return self.accumulators * self.accumulator_columns + self.num_stages * self.stage_columns

    @property
    def weight_tma_bytes(self) -> int:
        """What a stage's barrier hears of weights from TMA; boxes count whole, also where they leave the tensor."""
        return self.weight_stage if self.has_weight_map else 0

    @property
    def token_box(self) -> int:
        """Token rows of one TMA box; a tile loads as many boxes as its rows need."""
        return min(self.tile_m, 32)


def is_legal(c: GemmConfig) -> bool:
    """Whether a configuration can be built."""
    return (
        all(getattr(c, name) in values for name, values in KNOBS.items())
        and c.smem_bytes <= SMEM_BYTES
        and c.tmem_columns <= desc.TMEM_COLUMNS
    )


class GroupedGemm:
    """Emits one kernel; ``problem`` (gemm1, gemm2) says which rows a tile has and what happens to accumulators."""

    def __init__(self, a, config: GemmConfig, problem):
        assert is_legal(config), config
        self.a, self.c, self.p = a, config, problem
        self.out_columns = ROWS * problem.matrices // 2  # of z or the output in a tile
        self.pitch = self.out_columns * 2 + 16

    def emit(self) -> None:
        a, c, p = self.a, self.c, self.p
        self.maps = [p.weight_map() if c.has_weight_map else None, self._token_map() if p.is_contiguous else None]
        self.has_tma = c.has_weight_map or p.is_contiguous
        row_blocks = cast(p.num_row_blocks(c), "int32")
        with kernel(p.name, T.int32(NUM_CTAS), THREADS) as thread:
            self.thread = thread
            self._allocate()
            grid_dependency()
            self.row_blocks = let(row_blocks)
            self.k_steps = let(cast((p.k + (c.k_stage - 1)) // c.k_stage, "int32"))
            self.num_items = let(load("int32", address(a.ws["num_tiles"])) * self.row_blocks)
            if self.has_tma:
                with if_(thread.warp == 0):
                    with if_(cuda.elect_sync() != u32(0)):
                        self._load()
            with if_(thread.warp == 1):
                with if_(cuda.elect_sync() != u32(0)):
                    self._multiply()
            with if_(T.And(thread.warp >= FIRST_PRODUCER, thread.warp < FIRST_EPILOGUE)):
                Producer(self, let(thread.tid - FIRST_PRODUCER * 32)).run()
            with if_(thread.warp >= FIRST_EPILOGUE):
                self._store()
            self._free()

    def _allocate(self) -> None:
        c, smem, s = self.c, Smem(), self.c.num_stages
        self.ws = smem.alloc(s * c.weight_stage, "uint8", 1024)
        self.xs = smem.alloc(s * c.token_stage, "uint8", 1024)
        if c.is_scaled:
            self.w_scales = smem.alloc(s * c.weight_scale_stage, "uint8", 128)
            self.x_scales = smem.alloc(s * c.token_scale_stage, "uint8", 128)
        else:
            self.raw_weights = smem.alloc(s * ROWS * c.raw_weight_pitch, "uint8", 128)
        self.raw_scales = smem.alloc(s * c.raw_scale_stage, "uint8", 128)
        self.outs = smem.alloc(c.chunk_m * self.pitch, "uint8", 128)
        self.full, self.empty = (smem.alloc(s, "uint64", 8) for _ in range(2))
        self.done, self.free = (smem.alloc(c.accumulators, "uint64", 8) for _ in range(2))
        pointer = smem.alloc(1, "uint32", 8)
        smem.commit()
        self.columns = desc.num_columns(c.tmem_columns)
        with if_(self.thread.warp == 1):
            ptx["tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32"](pointer.ptr_to([0]), u32(self.columns))
            ptx["tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned"]()
        with if_(self.thread.tid == 0):
            for barriers, size, count in (
                (self.full, s, PRODUCERS + self.has_tma),
                (self.empty, s, 1),
                (self.done, c.accumulators, 1),
                (self.free, c.accumulators, 128),
            ):
                for i in range(size):
                    ptx.mbarrier.init.shared.b64(barriers.ptr_to([i]), u32(count))
            ptx.fence.mbarrier_init.release.cluster()
        ptx["tcgen05.fence::before_thread_sync"]()
        cuda.cta_sync()
        ptx["tcgen05.fence::after_thread_sync"]()
        self.tmem = load("uint32", pointer.ptr_to([0]), "shared")

    def _free(self) -> None:
        """All that was issued has been waited for by the epilogue, who comes here last."""
        ptx["tcgen05.fence::before_thread_sync"]()
        cuda.cta_sync()
        with if_(self.thread.warp == 1):
            ptx["tcgen05.fence::after_thread_sync"]()
            ptx["tcgen05.dealloc.cta_group::1.sync.aligned.b32"](self.tmem, u32(self.columns))

    def tiles(self, work) -> None:
        """Call ``work(tile)`` for each of this CTA's tiles."""
        item = scalar("int32", self.thread.cta)
        with while_(item < self.num_items):
            token_tile, row_block = let(item // self.row_blocks), let(item % self.row_blocks)
            offset = let(cast(token_tile, "int64") * 4)
            names = ("tile_expert", "tile_rows")
            work(Tile(token_tile, row_block, *(load("int32", address(self.a.ws[name], offset)) for name in names)))
            assign(item, item + NUM_CTAS)

    # --------------------------------------------------------------------------------------------------------------- TMA

    def _token_map(self):
        c, p = self.c, self.p
        dims, box = [p.token_bytes, self.a.max_tiles * c.tile_m], [desc.BLOCK_BYTES, c.token_box]
        return tensor_map(address(p.tokens), dims, [p.token_bytes], box, "uint8", 3)

    def _load(self) -> None:
        c, p, ring = self.c, self.p, Ring(self.c.num_stages)
        weights, tokens = self.maps

        def work(tile: Tile) -> None:
            coordinates = p.weight_coordinates(tile)
            boxes = let((tile.num_rows + (c.token_box - 1)) // c.token_box)
            num_bytes = T.int32(c.weight_tma_bytes)
            policy = T.uint64(sm90a.EVICT_FIRST) if c.tile_m <= 32 else None  # few tokens: weights are read once
            if tokens is not None:
                num_bytes = let(num_bytes + boxes * (c.k_blocks * c.token_box * desc.BLOCK_BYTES))
            with for_(self.k_steps) as step:
                cuda.mbarrier_wait(self.empty.ptr_to([ring.index]), ring.phase ^ u32(1))
                bar = self.full.ptr_to([ring.index])
                ptx.mbarrier.arrive.expect_tx.shared.b64(bar, cast(num_bytes, "uint32"))
                for block in range(c.k_blocks):
                    column = let((step * c.k_blocks + block) * desc.BLOCK_BYTES)
                    if weights is not None:
                        target = self.ws.ptr_to([ring.index * c.weight_stage + block * (ROWS * desc.BLOCK_BYTES)])
                        _load_box(target, weights, [column, *coordinates], bar, policy)
                    if tokens is not None:
                        first = let(ring.index * c.token_stage + block * (c.tile_m * desc.BLOCK_BYTES))
                        with for_(boxes) as box:
                            target = self.xs.ptr_to([first + box * (c.token_box * desc.BLOCK_BYTES)])
                            row = tile.token_tile * c.tile_m + box * c.token_box
                            _load_box(target, tokens, [column, row], bar)
                ring.advance()

        self.tiles(work)

    # ------------------------------------------------------------------------------------------------------- multiplying

    def _multiply(self) -> None:
        c, ring, accumulator = self.c, Ring(self.c.num_stages), Ring(self.c.accumulators)

        def work(tile: Tile) -> None:
            width = (tile.num_rows + (c.width_step - 1)) // c.width_step * c.width_step
            width_field = let(cast(width // 8, "uint32") << u32(17))
            cuda.mbarrier_wait(self.free.ptr_to([accumulator.index]), accumulator.phase ^ u32(1))
            ptx["tcgen05.fence::after_thread_sync"]()
            target = let(self.tmem + cast(accumulator.index * c.accumulator_columns, "uint32"))
            with for_(self.k_steps) as step:
                cuda.mbarrier_wait(self.full.ptr_to([ring.index]), ring.phase)
                ptx["tcgen05.fence::after_thread_sync"]()
                self._multiply_stage(ring.index, target, width_field, step)
                _commit(self.empty.ptr_to([ring.index]))
                ring.advance()
            _commit(self.done.ptr_to([accumulator.index]))
            accumulator.advance()

        self.tiles(work)

    def _multiply_stage(self, stage, target, width_field, step) -> None:
        c = self.c
        scales = self._copy_scales(stage) if c.is_scaled else None
        for block in range(c.k_blocks):
            w, x = (
                _descriptor(smem.ptr_to([stage * size + block * (size // c.k_blocks)]), 8 * desc.BLOCK_BYTES, True)
                for smem, size in ((self.ws, c.weight_stage), (self.xs, c.token_stage))
            )
            for part in range(c.form.k_block // c.form.k):
                ahead = T.uint64(part * desc.INSTRUCTION_BYTES // 16)
                operands = [target, w + ahead, x + ahead]
                group, scale_id = desc.scale_place(c.form, block * (c.form.k_block // c.form.k) + part)
                operands.append(u32(desc.instruction_descriptor(c.form, ROWS, 0, scale_id)) | width_field)
                if c.is_scaled:
                    columns = [group * desc.SCALE_TILE_COLUMNS * chunks for chunks in (1, c.token_scale_chunks)]
                    operands += [first + u32(column) for first, column in zip(scales, columns, strict=True)]
                else:
                    operands += [u32(0)] * 4  # no lane is disabled
                ptx[c.form.instruction](*operands, T.bool(True) if block or part else step > 0)

    def _copy_scales(self, stage):
        """Scale tiles of a stage to tensor memory; the first columns of the weights' and of the tokens'."""
        c = self.c
        first = c.accumulators * c.accumulator_columns
        place = let(self.tmem + cast(first + stage * c.stage_columns, "uint32"))
        places = [place, let(place + u32(c.scale_groups * desc.SCALE_TILE_COLUMNS))]
        sources = ((self.w_scales, c.weight_scale_stage), (self.x_scales, c.token_scale_stage))
        for target, (smem, size) in zip(places, sources, strict=True):
            for tile in range(size // desc.SCALE_TILE_BYTES):
                # groups of 8 rows of 16 bytes are 128 bytes apart
                source = _descriptor(smem.ptr_to([stage * size + tile * desc.SCALE_TILE_BYTES]), 128, False)
                ptx["tcgen05.cp.cta_group::1.32x128b.warpx4"](target + u32(tile * desc.SCALE_TILE_COLUMNS), source)
        return places

    # ---------------------------------------------------------------------------------------------------------- epilogue

    def _store(self) -> None:
        c, accumulator = self.c, Ring(self.c.accumulators)
        self.index = let(self.thread.tid - FIRST_EPILOGUE * 32)
        self.group, self.quad = let(self.thread.lane // 4), let(self.thread.lane % 4)
        self.first_row = let(self.thread.warp % 4 * 32)  # a warp reads the 32 lanes of its number modulo 4
        # [half][r]: weight rows of this thread's accumulators, those of an m16n8 fragment
        self.rows = [[let(self.first_row + 16 * half + 8 * r + self.group) for r in range(2)] for half in range(2)]

        def work(tile: Tile) -> None:
            state = self.p.begin_tile(self, tile, cast(tile.expert, "int64"))
            cuda.mbarrier_wait(self.done.ptr_to([accumulator.index]), accumulator.phase)
            ptx["tcgen05.fence::after_thread_sync"]()
            lanes = cast(self.first_row, "uint32") << u32(16)
            source = let(self.tmem + lanes + cast(accumulator.index * c.accumulator_columns, "uint32"))
            with for_((tile.num_rows + (c.chunk_m - 1)) // c.chunk_m) as chunk:
                first = let(chunk * c.chunk_m)
                self._store_chunk(tile, state, first, let(source + cast(first, "uint32")))
            ptx["tcgen05.fence::before_thread_sync"]()
            ptx.mbarrier.arrive.shared.b64(self.free.ptr_to([accumulator.index]), u32(1))
            accumulator.advance()

        self.tiles(work)

    def _sync(self) -> None:
        ptx["barrier.sync.aligned"](u32(EPILOGUE_BARRIER), u32(128))

    def _store_chunk(self, tile: Tile, state, first, source) -> None:
        """``chunk_m`` tokens from ``first`` on: accumulators -> problem's values -> bf16 rows."""
        c, p = self.c, self.p
        # [block][half]: 16 lanes x 8 columns. Registers 0 and 1 are row lane / 4 and columns 2 (lane % 4) and one more,
        # 2 and 3 the same of row + 8.
        acc = [[[scalar("uint32") for _ in range(4)] for _ in range(2)] for _ in range(c.chunk_m // 8)]
        for block, halves in enumerate(acc):
            for half, out in enumerate(halves):
                place = source + u32((16 * half << 16) + 8 * block)
                ptx["tcgen05.ld.sync.aligned.16x256b.x1.b32"](*out, place)
        ptx["tcgen05.wait::ld.sync.aligned"]()
        self._sync()  # all have copied the rows of the chunk before
        per_store = 2 // p.matrices  # 8-token blocks of one stmatrix, whose four matrices are (block, half, matrix)
        for block in range(0, c.chunk_m // 8, min(per_store, c.chunk_m // 8)):
            self._store_matrices(tile, state, first, block, acc[block : block + per_store])
        self._sync()
        self._copy_rows(tile, first)

    def _store_matrices(self, tile: Tile, state, first, block: int, acc) -> None:
        """Up to four 8x8 matrices of results into rows of tokens in shared memory."""
        p, pairs = self.p, []
        for i, halves in enumerate(acc):
            tokens = [let(first + (8 * (block + i) + n) + 2 * self.quad) for n in range(2)]
            scales = [p.token_scale(self, tile, token) for token in tokens]
            for half, taken in enumerate(halves):
                for matrix in range(p.matrices):
                    values = [
                        p.values(self, state, half, matrix, [[_as_float(taken[2 * r + n]) for r in range(2)]], [scales[n]])[0]
                        for n in range(2)
                    ]
                    pair = scalar("uint32")
                    ptx["cvt.rn.bf16x2.f32"](pair, values[1], values[0])
                    pairs.append(pair)
        matrix = self.thread.lane // 8 % len(pairs)
        token = block * 8 + matrix // (2 * p.matrices) * 8 + self.thread.lane % 8
        column = self.thread.warp % 4 * (16 * p.matrices) + matrix % (2 * p.matrices) * 8
        sm90a.stmatrix_transposed(self.outs.ptr_to([token * self.pitch + column * 2]), pairs)

    def _copy_rows(self, tile: Tile, first) -> None:
        """Rows of results to global memory, 16 bytes a thread."""
        c, p = self.c, self.p
        chunks = self.out_columns // 8
        per_pass = 128 // chunks
        chunk = let(self.index % chunks)
        column = let(tile.row_block * self.out_columns + chunk * 8)
        for start in range(0, c.chunk_m, per_pass):
            token = let(start + self.index // chunks)
            with if_(
                T.And(T.And(first + token < tile.num_rows, token < c.chunk_m), cast(column, "int64") < p.out_width)
            ):
                words = load_vec4(self.outs.ptr_to([token * self.pitch + chunk * 16]), "shared")
                row = cast(tile.token_tile * c.tile_m + first + token, "int64")
                store_vec4(address(p.out, (row * p.out_width + cast(column, "int64")) * 2), words)


def _as_float(register):
    return let(T.reinterpret("float32", register))


def _descriptor(pointer, stride_bytes: int, is_swizzled: bool):
    """Descriptor of a matrix in shared memory, groups of 8 rows ``stride_bytes`` apart."""
    constant = desc.matrix_descriptor(0, 0, stride_bytes, desc.SWIZZLE_128B if is_swizzled else 0)
    start = cuda.cvta_generic_to_shared(pointer)
    return let(T.uint64(constant) | cast((start & u32(0x3FFFF)) >> u32(4), "uint64"))


def _load_box(target, tensor, place, barrier, policy=None) -> None:
    sm90a.tma_load(len(place), target, T.address_of(tensor), place, barrier, policy)


def _commit(barrier) -> None:
    """The barrier completes when all that this thread has issued so far is done."""
    ptx["tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64"](barrier)
