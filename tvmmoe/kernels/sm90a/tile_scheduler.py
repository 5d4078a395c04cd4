# SPDX-License-Identifier: Apache-2.0
"""Which tile a persistent CTA of a grouped GEMM computes next.

The first one has the CTA's number. Each next one the TMA warp claims from a counter in the workspace while the last stages of
one are loaded, looks it up and announces it to the other roles by a ring in shared memory. SMs differ in speed by several
percent, so tiles that were dealt out beforehand end that far apart; and what the consumers would look up themselves they would
wait for (5 % where tiles are short). Clusters still take every 66th.

The kernel that writes the tile list clears the counters. Which CTA computes a tile changes nothing about its result.
"""

from typing import NamedTuple

from tvm.script import tirx as T

from tvmmoe.kernels.sm90a.gemm_config import MAX_STAGES, NUM_CTAS, GemmConfig
from tvmmoe.kernels.sm90a.trace import (
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

PAST_L1 = "relaxed.gpu.global"  # before griddepcontrol.wait a line of L1 may be older than the tile list
RING = 16  # tiles between the TMA warp and the slowest reader: one a stage and one on either side
assert RING >= MAX_STAGES + 2


class Tile(NamedTuple):
    """What a CTA works on."""

    token_tile: object  # negative: there is none left
    row_block: object
    expert: object
    num_rows: object  # live tokens


class TileScheduler:
    """Tiles of one GEMM; every role has its own place in them after :meth:`begin_role`."""

    def __init__(self, a, config: GemmConfig, number: int):
        self.a, self.c, self.number = a, config, number
        self.is_dynamic, self.num_ctas = config.cluster == 1, NUM_CTAS

    def allocate(self, smem: Smem, thread) -> None:
        """Shared memory; the CTA synchronises after :meth:`initialize`."""
        self.thread = thread
        if self.is_dynamic:
            fields = RING * len(Tile._fields)
            self.ring, self.is_announced = smem.alloc(fields, "uint32", 16), smem.alloc(RING, "uint64", 8)

    def initialize(self) -> None:
        if self.is_dynamic:
            with if_(self.thread.tid < RING):
                ptx.mbarrier.init.shared.b64(self.is_announced.ptr_to([self.thread.tid]), u32(1))

    def begin(self, row_blocks, is_list_fresh: bool) -> None:
        """Count tiles, of which each tile of tokens has ``row_blocks`` (host expression) for a cluster."""
        self.row_blocks = let(row_blocks)
        if is_list_fresh:  # into L1, while the count is on its way: every role asks for the first tile at once
            offset = let(cast(self.thread.cta // self.c.cluster // self.row_blocks, "int64") * 4)
            for name in ("tile_expert", "tile_rows"):
                load("int32", address(self.a.ws[name], offset))
        self.num_tiles = let(load("int32", address(self.a.ws["num_tiles"]), PAST_L1) * self.row_blocks)
        self.rank = let(self.thread.cta % self.c.cluster)  # in the cluster

    def begin_role(self, space: str = "global") -> None:
        """State of one role, at the CTA's first tile: what all of them shared would not stay in uniform registers."""
        self.index = scalar("int32", self.thread.cta // self.c.cluster)
        self.num_done, self.claimed = scalar("int32", T.int32(0)), scalar("int32", T.int32(0))
        self.tile = Tile(*(scalar("int32", T.int32(-1)) for _ in Tile._fields))
        self._look_up(space)

    def _look_up(self, space: str = "global") -> None:
        """``tile`` of ``index``."""

        def find() -> None:
            assign(self.tile.token_tile, self.index // self.row_blocks)
            assign(self.tile.row_block, self.index % self.row_blocks * self.c.cluster + self.rank)
            offset = let(cast(self.tile.token_tile, "int64") * 4)
            assign(self.tile.expert, load("int32", address(self.a.ws["tile_expert"], offset), space))
            assign(self.tile.num_rows, load("int32", address(self.a.ws["tile_rows"], offset), space))

        if_else(self.index < self.num_tiles, find, lambda: assign(self.tile.token_tile, T.int32(-1)))

    @property
    def is_left(self):
        """Whether there is a tile."""
        return self.tile.token_tile >= 0

    def advance(self) -> None:
        """To the tile that the TMA warp has announced, or past the end."""
        if not self.is_dynamic:
            assign(self.index, self.index + self.num_ctas // self.c.cluster)
            self._look_up()
            return
        slot = let(self.num_done % RING)
        cuda.mbarrier_wait(self.is_announced.ptr_to([slot]), cast(self.num_done // RING, "uint32") & u32(1))
        words = load_vec4(self.ring.ptr_to([slot * 4]), "shared")
        for i, register in enumerate(self.tile):
            assign(register, cast(words[i], "int32"))
        assign(self.num_done, self.num_done + 1)

    def claim(self, is_issuer) -> None:
        """Of the TMA warp: ask for the next tile, which :meth:`announce` waits for."""
        if self.is_dynamic:
            with if_(is_issuer):
                before = scalar("uint32")
                counter = address(self.a.ws["claims"], 4 * self.number)
                ptx["atom.relaxed.gpu.global.add.u32"](before, counter, u32(1))
                assign(self.claimed, cast(before, "int32") + self.num_ctas)

    def announce(self, is_issuer) -> None:
        """Of the TMA warp: advance, and tell everyone where to.

        Nobody reads a slot of the ring any more when its turn comes again: each tile has a stage or more, which all
        readers have left before the TMA warp fills it again.
        """
        if not self.is_dynamic:
            self.advance()
            return
        assign(self.index, shuffle(self.claimed, T.int32(0)) if self.c.is_issued_by_warp else self.claimed)
        self._look_up()
        slot = let(self.num_done % RING)
        with if_(is_issuer):
            store_vec4(self.ring.ptr_to([slot * 4]), [let(cast(value, "uint32")) for value in self.tile], "shared")
            ptx.mbarrier.arrive.shared.b64(self.is_announced.ptr_to([slot]), u32(1))
        assign(self.num_done, self.num_done + 1)


def clear_claims(a) -> None:
    """Before the first GEMM, by one thread."""
    for number in range(2):
        store_to("int32", address(a.ws["claims"], 4 * number), T.int32(0))
