# SPDX-License-Identifier: Apache-2.0
"""Routing and both grouped GEMMs as one kernel, for up to four tokens: there the gap between two kernels is a tenth of the
time, and hardly two tokens have an expert in common.

    tiles    each CTA lists them itself, before its warps part (few_tokens.Roster)
    rows     one a tile (single_row.py); two tokens of an expert are two tiles
    items    those of gemm1, then those of gemm2, claimed from one counter; each role runs two loops, one after the other
    z        whoever has stored a part of it reports it (Report) to the producers' last warp, which counts it (``z_blocks``,
             of every tile of tokens, cleared by prepare); gemm2 loads tokens once all are there, and before it asks for the
             first time, its weights

Every item is claimed by a CTA that runs, so what gemm2 waits for is under way, however few SMs are free. Writes of z reach
the TMA of another SM by fence.proxy.async, an mbarrier, release, acquire, fence.proxy.async.
"""

from tvm.script import tirx as T

from tvmmoe.config import ActivationFormat
from tvmmoe.kernels.sm90a.few_tokens import Roster, is_few
from tvmmoe.kernels.sm90a.gemm import GroupedGemm, Work
from tvmmoe.kernels.sm90a.gemm1 import Gemm1
from tvmmoe.kernels.sm90a.gemm_config import GemmConfig
from tvmmoe.kernels.sm90a.layout import FEW_ROWS
from tvmmoe.kernels.sm90a.single_row import RowGemm1, RowGemm2, SingleRow
from tvmmoe.kernels.sm90a.tile_scheduler import PairScheduler, RowTile
from tvmmoe.kernels.sm90a.trace import (
    I,
    Smem,
    address,
    assign,
    cast,
    cuda,
    for_,
    if_,
    if_else,
    let,
    load,
    ptx,
    scalar,
    u32,
    while_,
)  # fmt: skip


def is_served(a):
    """Whether the kernel takes the call (host expression): few tokens, and z that gemm1 can store as gemm2 reads it."""
    return T.And(is_few(a), T.And(a.is_gated, a.per_token_scale == 0))


class GemmPair(SingleRow, GroupedGemm):
    """Emits the kernel; while tracing, ``p`` is one problem after the other."""

    scale_lanes = 64  # a row each; the last warp keeps the books

    def __init__(self, a, config: GemmConfig, form: ActivationFormat):
        self.initializing_thread = 128 * config.warpgroups  # which has no key of up to 512 to write
        assert config.cluster == 1 and config.tile_m == FEW_ROWS, config
        self.problems = RowGemm1(a, form), RowGemm2(a)
        super().__init__(a, config, self.problems[1])
        self.name = "gemm_pair" if form == ActivationFormat.bf16 else f"gemm_pair_{form.name}"

    @property
    def has_scale_map(self) -> bool:
        """Never: one problem's rows may be aligned and the other's not, and scale warps follow the tiles of both."""
        return False

    def _scheduler(self) -> PairScheduler:
        return PairScheduler(self.a, self.c, Gemm1.number)

    def emit(self) -> None:
        maps, row_blocks = [self._maps(p) for p in self.problems], [self._row_blocks(p) for p in self.problems]
        with self._kernel(self.name):
            self._allocate()
            self.works = [self._begin(p, *m, self._k_steps(p)) for p, m in zip(self.problems, maps, strict=True)]
            self.scheduler.begin_pair(*row_blocks, self.roster)
            self._find_tiles()
            self._use(self.works[0])
            self._run_roles()

    def reserved_bytes(self) -> int:
        return Roster.NUM_BYTES + Report.NUM_BYTES

    def _allocate_more(self, smem: Smem) -> None:
        super()._allocate_more(smem)
        self.roster = Roster(self.a, smem, self.thread, (self.c.warpgroups + 1) * 128)
        self.report = Report(smem)

    def _initialize(self) -> None:
        """Barriers, and keys for the choice of experts."""
        super()._initialize()
        with if_(self.thread.tid == self.initializing_thread):
            self.report.initialize()
        self.roster.write_keys()

    def _find_tiles(self) -> None:
        """List them, and claim the first item meanwhile."""
        self.roster.choose()
        with if_(self.thread.warp == 4 * self.c.warpgroups):
            with if_(cuda.elect_sync() != u32(0)):
                for work in self.works:
                    self._prefetch_maps(work)
                ptx.griddepcontrol.wait()
                self.scheduler.claim(T.bool(True))
        cuda.cta_sync()
        with if_(self.thread.warp == 0):
            self.roster.list_tiles()
        cuda.cta_sync()
        ptx.griddepcontrol.wait()  # which has been over for a while

    def _load_tokens(self, tile: RowTile, step, x_bytes, token_map) -> None:
        row = self.scheduler.token if self.scheduler.wants_first else tile.token_tile
        self._load_box(token_map, 0, [0, step * self.c.k_blocks, row])

    def _use(self, work: Work) -> None:
        super()._use(work)
        self.scheduler.wants_first = work.p is self.problems[0]

    def _in_turn(self, emit) -> None:
        """Emit a role's loop for both problems; the role that is traced next begins with the first one again."""
        for work in self.works:
            self._use(work)
            emit()
        self._use(self.works[0])

    def _issue_loads(self, is_issuer) -> None:
        self.scheduler.lead(is_issuer, "global")
        early = scalar("int32", T.int32(0))
        self._in_turn(lambda: self._load_tiles(is_issuer, early))

    def _load_tiles(self, is_issuer, early) -> None:
        is_second = not self.scheduler.wants_first
        if is_second:
            self._set_policy()
            assign(early, T.min(self.k_steps, T.int32(self.stages)))
        with while_(self.scheduler.is_left):
            if is_second:
                self._load_weights_early(is_issuer, early)
                self._wait_for_tokens(self.scheduler.tile)
            self._load_tile(is_issuer, early)

    def _load_weights_early(self, is_issuer, early) -> None:
        """Fill that many stages with weights, and go back to the first of them."""
        tile, stage, phase = self.scheduler.tile, let(self.stage), let(self.phase)
        coordinates, x_bytes = self.p.row_coordinates(self.c, tile), self._token_bytes(tile)
        with for_(early) as step:
            self._wait_for_room()
            with if_(is_issuer):
                self._load_weights(self.stage, step, coordinates, x_bytes)
            self._advance()
        assign(self.stage, stage)
        assign(self.phase, phase)

    def _count(self, token_tile):
        """Address of the number of stored parts of z of a tile of tokens."""
        return address(self.a.ws["z_blocks"], cast(token_tile, "int64") * 4)

    def _wait_for_tokens(self, tile: RowTile) -> None:
        num_stored, expected = scalar("int32", T.int32(0)), let(self.scheduler.row_blocks)
        with while_(num_stored < expected):
            assign(num_stored, load("int32", self._count(tile.token_tile), "acquire.gpu.global"))
        ptx["fence.proxy.async.global"]()

    def _produce_scales(self, lane) -> None:
        def keep_books():
            with if_(self.thread.cta == 0):
                self.roster.write_results()
            self._count_parts()

        if_else(lane < self.scale_lanes, lambda: super(GemmPair, self)._produce_scales(lane), keep_books)

    def _count_parts(self) -> None:
        """Count the parts of z that this CTA's consumers report, which need not wait until all can see what they stored."""
        turn, tile = scalar("int32", T.int32(0)), scalar("int32", T.int32(0))
        with while_(tile >= 0):
            assign(tile, self.report.receive(turn, self.thread))
            assign(turn, turn + 1)
            with if_(T.And(tile >= 0, self.thread.lane == 0)):
                ptx["red.release.gpu.global.add.u32"](self._count(tile), u32(1))

    def _copy_scales_of_tiles(self, lane) -> None:
        self._in_turn(lambda: super(GemmPair, self)._copy_scales_of_tiles(lane))

    def _multiply_tiles(self) -> None:
        self._in_turn(self._multiply_tiles_of_one)

    def _multiply_tiles_of_one(self) -> None:
        if not self.scheduler.wants_first:
            with if_(self._is_my_turn()):
                self.report.send(self.turn, T.int32(-1), self.thread)
            self._place_rows()
        super()._multiply_tiles()

    def _store(self, tile: RowTile, state, sums) -> None:
        super()._store(tile, state, sums)
        if self.scheduler.wants_first:
            ptx["fence.proxy.async.global"]()
            self.report.send(self.turn, tile.token_tile, self.thread)


class Report:
    """Which tiles of gemm1 are stored, from consumers to the warp that counts them: a few places, used in turns. To release z
    to the GPU takes 0.6 to 1.7 us, for which whoever stored it came late to the next tile."""

    NUM = 4  # places
    NUM_BYTES = 20 * NUM

    def __init__(self, smem: Smem):
        self._sent, self._taken = (smem.alloc(self.NUM, "uint64", 8) for _ in range(2))
        self._tiles = smem.alloc(self.NUM, "int32", 4)

    def initialize(self) -> None:
        """By one thread, before the CTA synchronises."""
        for i in range(self.NUM):
            ptx.mbarrier.init.shared.b64(self._sent.ptr_to([i]), u32(1))
            ptx.mbarrier.init.shared.b64(self._taken.ptr_to([i]), u32(1))

    def place(self, turn) -> tuple:
        """Of the turn's report, and the parity of its barriers."""
        return let(turn % self.NUM), let(cast(turn // self.NUM, "uint32") & u32(1))

    def send(self, turn, token_tile, thread) -> None:
        """The turn's tile, negative after the last one, by the warp whose turn it is. At most NUM of them are under way."""
        place, parity = self.place(turn)
        cuda.mbarrier_wait(self._taken.ptr_to([place]), parity ^ u32(1))
        cuda.warp_sync()
        with if_(thread.lane == 0):
            I.buffer_store(self._tiles, token_tile, [place])
            ptx.mbarrier.arrive.shared.b64(self._sent.ptr_to([place]), u32(1))

    def receive(self, turn, thread):
        """The turn's tile, by a warp."""
        place, parity = self.place(turn)
        cuda.mbarrier_wait(self._sent.ptr_to([place]), parity)
        tile = let(self._tiles[place])
        cuda.warp_sync()
        with if_(thread.lane == 0):
            ptx.mbarrier.arrive.shared.b64(self._taken.ptr_to([place]), u32(1))
        return tile


def gemm_pair(a, config: GemmConfig, form: ActivationFormat) -> None:
    """Emit the kernel for activations of one format, nvfp4 without per-token scales."""
    GemmPair(a, config, form).emit()
