# SPDX-License-Identifier: Apache-2.0
"""Both grouped GEMMs as one kernel, for a token or two: there the gap between two kernels is a tenth of the time. With more
other tiles hide it (T=4 1 %, T=16 5 % slower, gpt-oss-120b on an H100).

    items    those of gemm1, then those of gemm2, claimed from one counter; each role runs two loops, one after the other
    z        whoever stores a part of it counts it (``z_blocks``, of every tile of tokens, which the prologue clears); gemm2
             loads tokens once all are there, and before it asks for the first time, its weights

Every item is claimed by a CTA that runs, so what gemm2 waits for is under way, however few SMs are free. Writes of z reach
the TMA of another SM by fence.proxy.async, release, acquire, fence.proxy.async.
"""

from tvm.script import tirx as T

from tvmmoe.config import ActivationFormat
from tvmmoe.kernels.sm90a import prologue
from tvmmoe.kernels.sm90a.gemm import GroupedGemm, Work
from tvmmoe.kernels.sm90a.gemm1 import Gemm1
from tvmmoe.kernels.sm90a.gemm1_quantized import QuantizedGemm1
from tvmmoe.kernels.sm90a.gemm2 import Gemm2
from tvmmoe.kernels.sm90a.gemm_config import GemmConfig
from tvmmoe.kernels.sm90a.tile_scheduler import PairScheduler, Tile
from tvmmoe.kernels.sm90a.trace import address, assign, cast, for_, if_, let, load, ptx, scalar, u32, while_


def is_served(a, is_gated):
    """Whether the kernel takes the call (host expression): few tokens, and z that gemm1 can store as gemm2 reads it."""
    is_few = T.And(a.num_tokens <= prologue.FEW_TOKENS, prologue.is_small(a))
    return T.And(is_few, T.And(is_gated, a.per_token_scale == 0))


class GemmPair(GroupedGemm):
    """Emits the kernel; while tracing, ``p`` is one problem after the other."""

    def __init__(self, a, config: GemmConfig, form: ActivationFormat):
        assert config.cluster == 1, config
        super().__init__(a, config, Gemm2(a))  # whose results take more shared memory
        is_bf16 = form == ActivationFormat.bf16
        self.name = "gemm_pair" if is_bf16 else f"gemm_pair_{form.name}"
        self.problems = Gemm1(a, is_gated=True) if is_bf16 else QuantizedGemm1(a, form), self.p

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
            ptx.griddepcontrol.wait()
            self.works = [self._begin(p, *m, self._k_steps(p)) for p, m in zip(self.problems, maps, strict=True)]
            self.scheduler.begin_pair(*row_blocks)
            self._use(self.works[0])
            self._run_roles()

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
        with if_(is_issuer):
            for work in self.works:
                for tensor in work.maps:
                    ptx.prefetch.tensormap(T.address_of(tensor))
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

    def _count(self, tile: Tile):
        """Address of the number of stored parts of z of a tile of tokens."""
        return address(self.a.ws["z_blocks"], cast(tile.token_tile, "int64") * 4)

    def _wait_for_tokens(self, tile: Tile) -> None:
        num_stored, expected = scalar("int32", T.int32(0)), let(self.scheduler.row_blocks * self.c.row_groups)
        with while_(num_stored < expected):
            assign(num_stored, load("int32", self._count(tile), "acquire.gpu.global"))
        ptx["fence.proxy.async.global"]()

    def _copy_scales_of_tiles(self, lane) -> None:
        self._in_turn(lambda: super(GemmPair, self)._copy_scales_of_tiles(lane))

    def _multiply_tiles(self) -> None:
        self._in_turn(self._multiply_tiles_of_one)

    def _multiply_tiles_of_one(self) -> None:
        if not self.scheduler.wants_first:
            self._place_rows()
        super()._multiply_tiles()

    def _store_tile(self, tile: Tile, state) -> None:
        super()._store_tile(tile, state)
        if self.scheduler.wants_first:
            ptx["fence.proxy.async.global"]()
            self._warpgroup_sync()
            with if_(self.thread.tid % 128 == 0):
                ptx["red.release.gpu.global.add.u32"](self._count(tile), u32(1))


def gemm_pair(a, config: GemmConfig, form: ActivationFormat) -> None:
    """Emit the kernel for activations of one format, nvfp4 without per-token scales."""
    GemmPair(a, config, form).emit()
