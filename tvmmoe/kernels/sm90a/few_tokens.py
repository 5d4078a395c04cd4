# SPDX-License-Identifier: Apache-2.0
"""What comes before the GEMMs of up to four tokens: routing inside of their kernel (gemm_pair.py). Every kernel that waits
for another one and every pass through memory takes a microsecond or two of the 16 to 33 that a call of one token takes.

    prepare   the one kernel before it: clears what it counts with, and writes each token's row as single_row.py reads it
    Roster    each CTA routes the tokens and lists the tiles of their pairs in its shared memory, while prepare is running;
              one warp of the first CTA writes ids, weights and rows, which only finalize reads

Each pair of a token and one of our experts is a tile of its own (single_row.py), in the order of their rows, so that two
tokens of an expert read its weights one right after the other. Rows are numbered as permute.py does it.
"""

from tvm.script import tirx as T

from tvmmoe.config import ActivationFormat
from tvmmoe.kernels.sm90a.gather import Chunk, segments_of
from tvmmoe.kernels.sm90a.layout import FEW_ROWS, FEW_TOKENS, K_BLOCK, MAX_FEW_PAIRS, column_offset, padded
from tvmmoe.kernels.sm90a.route import PER_LANE, Router
from tvmmoe.kernels.sm90a.single_row import windows_of
from tvmmoe.kernels.sm90a.tile_scheduler import clear_claims
from tvmmoe.kernels.sm90a.trace import (
    PAST_L1,
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
    load_vec4,
    ptx,
    scalar,
    shuffle,
    store_to,
    store_vec4,
    warp_add_s32,
    while_,
)  # fmt: skip

MAX_FEW_EXPERTS = 32 * PER_LANE[1]  # more take the kernels of more tokens
THREADS = 256  # of prepare
COLUMNS = THREADS * 8
# Pairs of ours to be expected, beyond which two tokens of an expert are better off in one tile. Measured on an H200 against
# the kernels of more tokens: 24 are 1 to 3 % faster (16: 5 %), 32 are 5 % slower (gpt-oss-120b, Qwen3-235B).
MEAN_FEW_PAIRS = 24
AT_ONCE = 8  # pairs that a lane looks at before it needs the first's value
UNWRITTEN = -1  # num_tiles while what finalize reads is not there yet


def is_few(a):
    """Whether the tokens are so few (host expression)."""
    num_pairs = a.num_tokens * a.top_k
    are_few = T.And(num_pairs <= MAX_FEW_PAIRS, num_pairs * a.local_num_experts <= MEAN_FEW_PAIRS * a.num_experts)
    return T.And(T.And(a.num_tokens <= FEW_TOKENS, are_few), a.num_experts <= MAX_FEW_EXPERTS)


def prepare(a, form: ActivationFormat) -> None:
    """Emit the kernel for one activation format."""
    segments = segments_of(a, COLUMNS)
    with kernel(f"prepare_{form.name}", cast(a.num_tokens * segments, "int32"), THREADS) as thread:
        token = let(thread.cta // cast(segments, "int32"))
        chunk = Chunk(a, form, token, let(thread.cta % cast(segments, "int32")), thread, COLUMNS)
        ptx.griddepcontrol.wait()
        ptx.griddepcontrol.launch_dependents()  # not before: gemm_pair reads logits without waiting
        chunk.load()
        with if_(thread.cta == 0):
            with if_(thread.tid < MAX_FEW_PAIRS):
                store_to("int32", address(a.ws["z_blocks"], cast(thread.tid, "int64") * 4), T.int32(0))
            with if_(thread.tid == 0):
                store_to("int32", address(a.ws["num_tiles"]), T.int32(UNWRITTEN))
                clear_claims(a)
        pairs, width = chunk.encoded.pairs(), padded(a.hidden_size)
        windows = zip(*(windows_of(let(pairs[i])) for i in range(4)), strict=True)
        with if_(chunk.position < width):
            block = a.ws["few_x"] + (cast(token, "int64") * width + chunk.position // K_BLOCK * K_BLOCK) * 4
            for i, words in enumerate(windows):
                store_vec4(address(block, cast(column_offset(chunk.word, i, chunk.lane), "int64")), words)


class Roster:
    """The tiles of a call in a CTA's shared memory: all threads write keys, a warp a token chooses, one warp lists.

    Lists of 32 pairs at most. An expert may be chosen more than once (route.CLOSED), even by one token.
    """

    NUM_BYTES = 16 * MAX_FEW_PAIRS + 4 * 4 * MAX_FEW_PAIRS + 16

    def __init__(self, a, smem: Smem, thread, num_threads: int):
        """Everything here stays; only the router's tables lie over the stages, which nobody loads before tiles are listed."""
        self.a, self.thread = a, thread
        self._tiles = smem.alloc(4 * MAX_FEW_PAIRS, "uint32", 16)  # expert, row, token
        self._experts, self._rows = (smem.alloc(MAX_FEW_PAIRS, "int32", 4) for _ in range(2))  # of pairs
        self._scores, self._shares = (smem.alloc(MAX_FEW_PAIRS, "float32", 4) for _ in range(2))
        self._num_tiles = smem.alloc(1, "int32", 4)
        with smem.from_start():
            entries = FEW_TOKENS * MAX_FEW_EXPERTS
            self.router = Router(a, smem, FEW_TOKENS, num_threads, entries, PER_LANE[:2], PAST_L1)

    def write_keys(self) -> None:
        """Before the CTA synchronises and :meth:`choose`."""
        self.router.begin(self.thread, T.int32(0), let(cast(self.a.num_tokens, "int32")))
        self.router.write_keys()

    def choose(self) -> None:
        """A warp a token; before the CTA synchronises and :meth:`list_tiles`."""
        router, token, lane = self.router, self.thread.warp, self.thread.lane
        with if_(token < router.num_tokens):
            expert, share = router.choose(token)
            with if_(lane < router.top_k):
                pair = let(token * router.top_k + lane)
                I.buffer_store(self._experts, expert, [pair])
                I.buffer_store(self._scores, router.score(token, expert), [pair])
                I.buffer_store(self._shares, share, [pair])

    def list_tiles(self) -> None:
        """By one warp, a lane a pair; the CTA synchronises before anyone reads."""
        lane, top_k = self.thread.lane, self.router.top_k
        num_pairs = let(self.router.num_tokens * top_k)
        local = let(self._experts[lane] - cast(self.a.local_expert_offset, "int32"))
        is_ours = T.And(lane < num_pairs, T.And(local >= 0, local < cast(self.a.local_num_experts, "int32")))
        local = let(T.Select(is_ours, local, T.int32(-1)))
        # Of pairs with this expert, and those before this one; all of ours whose rows come before this one's
        rows, rank, tile = (scalar("int32", T.int32(0)) for _ in range(3))

        def count(pair, other):
            is_same, is_before = other == local, T.And(other == local, pair < lane)
            assign(rows, rows + cast(is_same, "int32"))
            assign(rank, rank + cast(is_before, "int32"))
            assign(tile, tile + cast(T.Or(is_before, T.And(other >= 0, other < local)), "int32"))

        self._for_pairs(num_pairs, local, count)
        blocks, first_row = let((rows + (FEW_ROWS - 1)) // FEW_ROWS), scalar("int32", T.int32(0))
        begins = let(cast(T.And(local >= 0, rank == 0), "int32")) != 0
        entry = let(T.Select(begins, local * MAX_FEW_PAIRS + blocks, T.int32(0x7FFFFFFF)))

        def add(pair, other):
            is_before = other < local * MAX_FEW_PAIRS
            assign(first_row, first_row + T.Select(is_before, other % MAX_FEW_PAIRS * FEW_ROWS, T.int32(0)))

        self._for_pairs(num_pairs, entry, add)
        num_tiles = warp_add_s32(let(cast(local >= 0, "int32")))
        with if_(lane == 0):
            I.buffer_store(self._num_tiles, num_tiles, [0])
        row = let(T.Select(local >= 0, first_row + rank, T.int32(-1)))
        I.buffer_store(self._rows, row, [lane])
        with if_(local >= 0):
            words = [local, row, lane // top_k, T.int32(0)]
            store_vec4(self._tiles.ptr_to([tile * 4]), [let(cast(word, "uint32")) for word in words], "shared")

    @staticmethod
    def _for_pairs(num_pairs, value, emit) -> None:
        """``emit(pair, value)`` of every pair's lane, and of some lanes without one."""
        with for_((num_pairs + (AT_ONCE - 1)) // AT_ONCE) as group:
            pairs = [let(group * AT_ONCE + i) for i in range(AT_ONCE)]
            for pair, other in zip(pairs, [let(shuffle(value, pair)) for pair in pairs], strict=True):
                emit(pair, other)

    def num_tiles(self):
        """Pairs of ours."""
        return let(self._num_tiles[0])

    def tile(self, index) -> list:
        """Local expert, row of the results and token of a tile."""
        words = load_vec4(self._tiles.ptr_to([index * 4]), "shared")
        return [cast(words[i], "int32") for i in range(3)]

    def write_results(self) -> None:
        """By one warp of the card: the list of slots that finalize waits for (:func:`wait_for_results`)."""
        router, lane = self.router, self.thread.lane
        with for_(router.num_tokens) as token:
            pair = let(token * router.top_k + T.Select(lane < router.top_k, lane, T.int32(0)))
            weight = router.weigh(let(self._scores[pair]), let(self._shares[pair]))
            router.write(token, let(self._experts[pair]), weight)
            with if_(lane < router.top_k):
                place = address(self.a.result("expanded_idx_to_permuted_idx"), cast(pair, "int64") * 4)
                store_to("int32", place, let(self._rows[pair]))
        cuda.warp_sync()
        with if_(lane == 0):
            ptx["st.release.gpu.global.b32"](address(self.a.ws["num_tiles"]), self.num_tiles())


def wait_for_results(a) -> None:
    """Until gemm_pair has written ids, weights and rows. Of a call that other kernels serve, those that do have ended."""
    with if_(a.num_tokens <= FEW_TOKENS):
        num_tiles = scalar("int32", T.int32(UNWRITTEN))
        with while_(num_tiles == UNWRITTEN):
            assign(num_tiles, load("int32", address(a.ws["num_tiles"]), "acquire.gpu.global"))
