# SPDX-License-Identifier: Apache-2.0
"""gather: hidden states of any format -> bf16 operand of gemm1, one row a local (token, slot) pair.

    grid     (num_tokens * ceil(padded H / 1024)) CTAs of 128 threads
    load     a thread reads 8 consecutive columns once and decodes them exactly (e2m1 * e4m3 and e4m3 * 2^k fit bf16)
    order    a 4x4 exchange of words in each quad turns column order into K order (layout.py)
    store    16 bytes a thread into every row of the token; columns past H are zeros

Rows nobody writes (padding of a tile) only meet accumulator columns that nobody reads.
"""

from tvm.script import tirx as T

from tvmmoe.config import ActivationFormat
from tvmmoe.kernels import numerics
from tvmmoe.kernels.sm90a.layout import padded
from tvmmoe.kernels.sm90a.trace import (
    address,
    assign,
    cast,
    for_,
    if_,
    kernel,
    let,
    load,
    load_vec4,
    ptx,
    regs,
    scalar,
    shuffle_xor,
    store,
    store_to,
    store_vec4,
    u32,
)  # fmt: skip

THREADS = 128
COLUMNS = THREADS * 8
SLOTS_AT_ONCE = 8


def pack_bf16(low, high):
    """Two float32 as a bf16 pair, round to nearest even."""
    pair = scalar("uint32")
    ptx["cvt.rn.bf16x2.f32"](pair, high, low)
    return pair


def exchange_quad(words, lane) -> None:
    """Transpose the 4x4 matrix of words (lane of a quad, word): word c of lane q moves to word q of lane c."""
    for distance in (1, 2):
        keeps_low = let(cast(lane, "uint32") & u32(distance)) == u32(0)
        for low in (c for c in range(4) if not c & distance):
            high = low | distance
            received = shuffle_xor(let(T.Select(keeps_low, words[high], words[low])), distance)
            mine_low, mine_high = let(words[low]), let(words[high])
            store(words, T.Select(keeps_low, mine_low, received), low)
            store(words, T.Select(keeps_low, received, mine_high), high)


def to_pairs(words) -> None:
    """Columns (0,1)(2,3)(4,5)(6,7) of four words -> pairs (v, v + 4) that the decoder multiplies together."""
    low, high = [let(words[i]) for i in range(2)], [let(words[i]) for i in range(2, 4)]
    for v in range(4):
        selector = 0x5410 if v % 2 == 0 else 0x7632
        pair = scalar("uint32")
        ptx["prmt.b32"](pair, low[v // 2], high[v // 2], u32(selector))
        store(words, pair, v)


def from_pairs(words) -> None:
    """Inverse of :func:`to_pairs`."""
    pairs = [let(words[i]) for i in range(4)]
    for i in range(4):
        selector = 0x5410 if i < 2 else 0x7632
        word = scalar("uint32")
        ptx["prmt.b32"](word, pairs[2 * (i % 2)], pairs[2 * (i % 2) + 1], u32(selector))
        store(words, word, i)


def _decode(form: ActivationFormat, a, token, column):
    """Eight columns of a token as four bf16 pairs in column order."""
    row = cast(token, "int64") * a.hidden_size
    if form == ActivationFormat.bf16:
        return load_vec4(address(a.hidden_states, (row + column) * 2))
    block = 32 if form == ActivationFormat.mxfp8 else 16
    per_row = a.hidden_size // block
    scale_byte = load("uint8", address(a.hidden_states_scale, cast(token, "int64") * per_row + column // block))
    scale = let(numerics.block_scale_to_float32(scale_byte, block))
    words = regs(4, "uint32")
    if form == ActivationFormat.mxfp8:
        data = [load("uint32", address(a.hidden_states, row + column + 4 * i)) for i in range(2)]
        values = [numerics.e4m3_to_float32((data[i // 4] >> u32(8 * (i % 4))) & u32(0xFF)) for i in range(8)]
    else:
        data = load("uint32", address(a.hidden_states, (row + column) // 2))
        values = [numerics.e2m1_to_float32(let(data >> u32(4 * i))) for i in range(8)]
    for i in range(4):
        store(words, pack_bf16(let(values[2 * i] * scale), let(values[2 * i + 1] * scale)), i)
    return words


class Chunk:
    """Eight columns of a token: thread l of 16 reads chunk 4q + m of its 128-block and writes chunk 4m + q = l."""

    def __init__(self, a, form: ActivationFormat, token, segment, thread, columns: int):
        l16 = thread.tid % 16
        base = let(segment * columns + thread.tid // 16 * 128)
        self.a, self.form, self.token, self.thread = a, form, token, thread
        self.column = let(cast(base + (l16 % 4) * 32 + (l16 // 4) * 8, "int64"))
        self.position = let(cast(base + l16 * 8, "int64"))
        self.words = regs(4, "uint32")
        for i in range(4):
            store(self.words, u32(0), i)

    def load(self) -> None:
        """Fetch and decode; columns past the row stay zero."""
        with if_(self.column < self.a.hidden_size):
            decoded = _decode(self.form, self.a, self.token, self.column)
            for i in range(4):
                store(self.words, decoded[i], i)

    def write(self, row_of_slot) -> None:
        """Store the chunk, in K order, to every row of the token, and the rows' scale once."""
        a, width = self.a, padded(self.a.hidden_size)
        to_pairs(self.words)
        exchange_quad(self.words, self.thread.lane)
        with for_((cast(a.top_k, "int32") + SLOTS_AT_ONCE - 1) // SLOTS_AT_ONCE) as group:
            rows = []
            for i in range(SLOTS_AT_ONCE):
                k = let(group * SLOTS_AT_ONCE + i)
                row = scalar("int32", T.int32(-1))
                with if_(k < cast(a.top_k, "int32")):
                    assign(row, row_of_slot(k))
                rows.append(row)
            for row in rows:
                with if_(row >= 0):
                    with if_(self.position < width):
                        offset = cast(row, "int64") * width + self.position
                        store_vec4(address(a.ws["x"], offset * 2), self.words)
                    with if_(T.And(a.per_token_scale != 0, self.position == 0)):
                        scale = load("float32", address(a.per_token_scale, cast(self.token, "int64") * 4))
                        store_to("float32", address(a.ws["row_scale"], cast(row, "int64") * 4), scale)


def gather(a, form: ActivationFormat) -> None:
    """Emit the kernel for one activation format."""
    segments = segments_of(a, COLUMNS)
    with kernel(f"gather_{form.name}", cast(a.num_tokens * segments, "int32"), THREADS) as thread:
        token = let(thread.cta // cast(segments, "int32"))
        chunk = Chunk(a, form, token, thread.cta % cast(segments, "int32"), thread, COLUMNS)
        ptx.griddepcontrol.wait()
        ptx.griddepcontrol.launch_dependents()
        chunk.load()
        first = let(cast(token, "int64") * a.top_k)
        rows = a.result("expanded_idx_to_permuted_idx")
        chunk.write(lambda k: load("int32", address(rows, (first + cast(k, "int64")) * 4)))


def segments_of(a, columns: int):
    """CTAs that share a row (host expression)."""
    return (padded(a.hidden_size) + columns - 1) // columns
