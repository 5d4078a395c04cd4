# SPDX-License-Identifier: Apache-2.0
"""Which tile a persistent CTA of a grouped GEMM computes next.

The first one has the CTA's number (but in PairScheduler). Each next one the TMA warp claims from a counter in the workspace
while the last stages of one are loaded, looks it up and announces it to the other roles by a ring in shared memory. SMs
differ in speed by several percent, so tiles that were dealt out beforehand end that far apart; and what consumers look up
themselves, they wait for (5 % where tiles are short). In a cluster the first CTA's TMA warp does so for all of them.

A kernel before the GEMMs clears the counters. Which CTA computes a tile changes nothing about its result.
"""

from typing import NamedTuple

from tvm.script import tirx as T

from tvmmoe.kernels.sm90a import intrinsics as isa
from tvmmoe.kernels.sm90a.gemm_config import MAX_STAGES, NUM_CTAS, GemmConfig
from tvmmoe.kernels.sm90a.trace import (
    PAST_L1,
    Smem,
    address,
    assign,
    cast,
    cuda,
    if_,
    if_else,
    let,
    load,
    load_vec4,
    ptx,
    scalar,
    shuffle,
    store_to,
    store_vec4,
    u32,
)  # fmt: skip

# Announcing a tile proves that the consumers have released a stage of the one MAX_STAGES + 1 before it, whose slot they may
# still read: each tile has a stage or more, and the TMA warp waits for a stage before it fills it again.
RING = 16
assert RING >= MAX_STAGES + 2


class Tile(NamedTuple):
    """What a CTA works on."""

    token_tile: object  # negative: there is none left
    row_block: object
    expert: object
    num_rows: object  # live tokens


class RowTile(NamedTuple):
    """What a CTA of gemm_pair works on."""

    token_tile: object  # number of a pair in the Roster, whose row of z it is; negative: there is none left
    row_block: object
    expert: object
    row: object  # of gemm2_output


class TileScheduler:
    """Tiles of one GEMM. The TMA warp's role finds and announces them, the others follow; each has its own ``tile``."""

    tile_type = Tile

    def __init__(self, a, config: GemmConfig, number: int):
        self.a, self.c, self.number, self.num_ctas = a, config, number, NUM_CTAS
        self.num_given = NUM_CTAS // config.cluster  # items that need no claim

    def allocate(self, smem: Smem, thread) -> None:
        """Shared memory; the CTA synchronises after :meth:`initialize`."""
        self.thread = thread
        fields = RING * len(Tile._fields)
        self.ring, self.is_announced = smem.alloc(fields, "uint32", 16), smem.alloc(RING, "uint64", 8)

    def initialize(self) -> None:
        with if_(self.thread.tid < RING):
            ptx.mbarrier.init.shared.b64(self.is_announced.ptr_to([self.thread.tid]), u32(1))

    def begin(self, row_blocks, is_list_fresh: bool) -> None:
        """Count what is there to do: each tile of tokens has ``row_blocks`` (host expression) items for a cluster."""
        self.row_blocks = let(row_blocks)
        if is_list_fresh:  # into L1, while the count is on its way
            first_tile = self.thread.cta // self.c.cluster // self.row_blocks
            offset = let(cast(first_tile, "int64") * 4)
            for name in ("tile_expert", "tile_rows"):
                load("int32", address(self.a.ws[name], offset))
        self.num_tiles = load("int32", address(self.a.ws["num_tiles"]), PAST_L1)
        self.num_items = let(self.num_tiles * self.row_blocks)
        self.rank = let(self.thread.cta % self.c.cluster)  # in the cluster

    def _begin_role(self) -> None:
        """Registers of one role: what all of them shared would not stay in uniform ones."""
        self.num_seen = scalar("int32", T.int32(0))
        self.tile = self.tile_type(*(scalar("int32", T.int32(0)) for _ in self.tile_type._fields))

    @property
    def is_left(self):
        """Whether there is a tile."""
        return self.tile.token_tile >= 0

    # ------------------------------------------------------------------------------------------- all roles but one

    def follow(self) -> None:
        """Begin a role that takes the tiles as they are announced."""
        self._begin_role()
        self.advance()

    def advance(self) -> None:
        """To the next tile, or past the end."""
        slot = let(self.num_seen % RING)
        cuda.mbarrier_wait(self.is_announced.ptr_to([slot]), cast(self.num_seen // RING, "uint32") & u32(1))
        assign(self.num_seen, self.num_seen + 1)
        self.read_again()

    def read_again(self) -> None:
        """The tile, into registers that need not hold it in between."""
        words = load_vec4(self.ring.ptr_to([(self.num_seen - 1) % RING * 4]), "shared")
        for i, register in enumerate(self.tile):
            assign(register, cast(words[i], "int32"))
        if self.c.cluster > 1:
            assign(self.tile.row_block, self.tile.row_block + self.rank)

    # ------------------------------------------------------------------------------------------------ the TMA warp

    def lead(self, is_issuer, space: str) -> None:
        """Begin the role that finds the tiles; the list of tiles is read from ``space`` at first."""
        self._begin_role()
        self.claimed = scalar("int32", self.thread.cta // self.c.cluster)
        self.announce(is_issuer, space)

    def announce_first(self, is_issuer) -> None:
        """Once the kernel before this one has ended: what :meth:`lead` could not tell."""

    def claim(self, is_issuer) -> None:
        """Ask for the next tile, which :meth:`announce` waits for."""
        with if_(T.And(is_issuer, self.rank == 0) if self.c.cluster > 1 else is_issuer):
            before = scalar("uint32")
            ptx["atom.relaxed.gpu.global.add.u32"](before, _counter(self.a, self.number), u32(1))
            assign(self.claimed, cast(before, "int32") + self.num_given)

    def announce(self, is_issuer, space: str = "global") -> None:
        """Advance to the claimed tile, and tell everyone."""
        if self.c.cluster == 1:
            self._look_up(space)
            self._tell(is_issuer)
            return
        assert self.c.is_issued_by_warp, self.c
        with if_(is_issuer):
            barrier = self.is_announced.ptr_to([let(self.num_seen % RING)])
            ptx.mbarrier.arrive.expect_tx.shared.b64(barrier, u32(4 * len(Tile._fields)))

        def lead() -> None:
            self._look_up(space)
            with if_(self.thread.lane < self.c.cluster):
                self._publish_in_cluster(self.thread.lane)
            assign(self.num_seen, self.num_seen + 1)

        def follow() -> None:
            self.advance()
            cuda.warp_sync()  # so that the issuer's next arrival is behind all lanes' reads of the slot

        if_else(self.rank == 0, lead, follow)

    def _tell(self, is_issuer) -> None:
        """Everyone in the CTA of ``tile``."""
        with if_(is_issuer):
            self._publish()
        assign(self.num_seen, self.num_seen + 1)

    def _look_up(self, space: str) -> None:
        """``tile`` of what was claimed."""
        index = let(shuffle(self.claimed, T.int32(0)) if self.c.is_issued_by_warp else self.claimed)

        def find() -> None:
            item, row_blocks = self._item(index)
            assign(self.tile.token_tile, item // row_blocks)
            assign(self.tile.row_block, item % row_blocks * self.c.cluster)
            self._read_list(space)

        if_else(index < self.num_items, find, lambda: assign(self.tile.token_tile, T.int32(-1)))

    def _read_list(self, space: str) -> None:
        """The expert and the rows of the tile of tokens."""
        offset = let(cast(self.tile.token_tile, "int64") * 4)
        assign(self.tile.expert, load("int32", address(self.a.ws["tile_expert"], offset), space))
        assign(self.tile.num_rows, load("int32", address(self.a.ws["tile_rows"], offset), space))

    def _item(self, index):
        """Number of what was claimed among those of its GEMM, and that one's row blocks."""
        return index, self.row_blocks

    def _place(self):
        """Words of ``tile``, where they go in the ring and the barrier of that slot."""
        slot = let(self.num_seen % RING)
        words = [let(cast(value, "uint32")) for value in self.tile]
        return words, self.ring.ptr_to([slot * 4]), self.is_announced.ptr_to([slot])

    def _publish(self) -> None:
        """Write ``tile`` into the ring."""
        words, ring, barrier = self._place()
        store_vec4(ring, words, "shared")
        ptx.mbarrier.arrive.shared.b64(barrier, u32(1))

    def _publish_in_cluster(self, cta) -> None:
        """Write ``tile`` into the ring of CTA ``cta``.

        Its barrier counts the bytes, as those of a TMA: a release to the cluster and its acquire would wait for all stores
        and empty the SM's L1.
        """
        words, ring, barrier = self._place()
        there = isa.in_cluster(ring, cta), isa.in_cluster(barrier, cta)
        ptx["st_async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32"](there[0], *words, there[1])


class PairScheduler(TileScheduler):
    """Tiles of both GEMMs in one kernel: the second's come after the first's.

    Even the first one is claimed: CTAs wait for tiles of the first GEMM, so none may belong to a CTA that does not run yet.
    """

    wants_first = True  # while tracing: of which GEMM
    tile_type = RowTile

    def __init__(self, a, config: GemmConfig, number: int):
        super().__init__(a, config, number)
        self.num_given = 0

    def begin_pair(self, row_blocks, second_row_blocks, roster) -> None:
        """Before the CTA has its list; :meth:`lead` counts what that has."""
        self.row_blocks, self.second_row_blocks, self.roster = let(row_blocks), let(second_row_blocks), roster
        self.rank = T.int32(0)
        self.claimed, self.token = scalar("int32", T.int32(0)), scalar("int32", T.int32(0))

    def _read_list(self, space: str) -> None:
        for register, value in zip((*self.tile[2:], self.token), self.roster.tile(self.tile.token_tile), strict=True):
            assign(register, value)

    def _begin_role(self) -> None:
        super()._begin_role()
        self.is_second = scalar("int32", T.int32(0))

    def lead(self, is_issuer, space: str) -> None:
        """Count what the list has, and begin with the item that is claimed already."""
        self._begin_role()
        num_tiles = self.roster.num_tiles()
        self.num_of_first = let(num_tiles * self.row_blocks)
        self.num_items = let(self.num_of_first + num_tiles * self.second_row_blocks)
        self.announce(is_issuer, space)

    @property
    def is_left(self):
        is_wanted = super().is_left
        return T.And(is_wanted, self.is_second == 0) if self.wants_first else is_wanted

    def _item(self, index):
        assign(self.is_second, cast(index >= self.num_of_first, "int32"))
        is_second = self.is_second != 0
        item = let(T.Select(is_second, index - self.num_of_first, index))
        return item, let(T.Select(is_second, self.second_row_blocks, self.row_blocks))

    def _place(self):
        words, ring, barrier = super()._place()
        words[-1] = let(words[-1] | cast(self.is_second << 16, "uint32"))  # above the row
        return words, ring, barrier

    def read_again(self) -> None:
        super().read_again()
        assign(self.is_second, self.tile.row >> 16 & 1)
        assign(self.tile.row, self.tile.row & 0xFFFF)


def _counter(a, number: int):
    """Address of a GEMM's claims."""
    return address(a.ws["claims"], 4 * number)


def clear_claims(a) -> None:
    """Before the first GEMM, by one thread."""
    for number in range(2):
        store_to("int32", _counter(a, number), T.int32(0))
