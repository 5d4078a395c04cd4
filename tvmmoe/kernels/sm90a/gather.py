# SPDX-License-Identifier: Apache-2.0
"""gather: hidden states of any format -> bf16 operand of gemm1, one row a local (token, slot) pair.

    grid     (num_tokens * ceil(padded H / 1024)) CTAs of 128 threads
    load     a thread reads 8 consecutive columns once and decodes them exactly: e2m1 * e4m3 fit bf16, e4m3 * 2^k from
             k = -124 on
    order    a 4x4 exchange of words in each quad turns column order into K order (layout.py)
    store    16 bytes a thread into every row of the token; columns past H are zeros

Rows nobody writes (padding of a tile) only meet accumulator columns that nobody reads; two of them may hold the tile's
columns (thin_rows.py).
"""

from tvm.script import tirx as T

from tvmmoe.config import ActivationFormat
from tvmmoe.kernels import numerics
from tvmmoe.kernels.sm80.intrinsics import multiply_pairs, spread_e2m1
from tvmmoe.kernels.sm90a import intrinsics as isa
from tvmmoe.kernels.sm90a.layout import K_BLOCK, padded
from tvmmoe.kernels.sm90a.thin_rows import columns_address, to_columns
from tvmmoe.kernels.sm90a.trace import (
    PAST_L1,
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


def spread_e4m3(low, high):
    """Bytes v of two words as bf16 pair v, times 2^-120, which is what an e4m3's bits are where bf16 has them; 127 is NaN."""
    pairs = []
    for v in range(4):
        bytes_ = scalar("uint32")
        ptx["prmt.b32"](bytes_, low, high, u32(0x11 * v | 0x1100 * (v + 4)))
        pairs.append(scalar("uint32", ((bytes_ >> u32(4)) & u32(0x07F007F0)) | (bytes_ & u32(0x80008000))))
    carries = [let((word & u32(0x7F7F7F7F)) + u32(0x01010101)) for word in (low, high)]
    with if_(((carries[0] | carries[1]) & u32(0x80808080)) != u32(0)):
        for pair in pairs:
            nan = let(((pair & u32(0x07F007F0)) + u32(0x00100010)) & u32(0x08000800))
            assign(pair, pair | ((nan << u32(4)) - (nan >> u32(5))))
    return pairs


class Encoded:
    """Eight columns of a token as they are stored; zeros until :meth:`load`."""

    def __init__(self, form: ActivationFormat):
        self.form = form
        self.count = {ActivationFormat.bf16: 4, ActivationFormat.mxfp8: 2, ActivationFormat.nvfp4: 1}[form]
        self.words, self.scale = regs(self.count, "uint32"), scalar("uint32", u32(0))
        for i in range(self.count):
            store(self.words, u32(0), i)

    def load(self, a, token, column, space: str) -> None:
        row = cast(token, "int64") * a.hidden_size
        if self.form == ActivationFormat.bf16:
            load_vec4(address(a.hidden_states, (row + column) * 2), space, into=self.words)
            return
        block = 32 if self.form == ActivationFormat.mxfp8 else 16
        scale = cast(token, "int64") * (a.hidden_size // block) + column // block
        assign(self.scale, load("uint8", address(a.hidden_states_scale, scale), space))
        first = row + column if self.form == ActivationFormat.mxfp8 else (row + column) // 2
        for i in range(self.count):
            store(self.words, load("uint32", address(a.hidden_states, first + 4 * i), space), i)

    def pairs(self):
        """Decoded: four words of bf16, columns (v, v + 4) each."""
        pairs = regs(4, "uint32")
        if self.form == ActivationFormat.bf16:
            for i in range(4):
                store(pairs, self.words[i], i)
            to_pairs(pairs)
            return pairs
        if self.form == ActivationFormat.mxfp8:
            spread, power, scale = spread_e4m3(self.words[0], self.words[1]), isa.TWO_POW_120, isa.ue8m0_pair(self.scale)
        else:
            factor = let(numerics.block_scale_to_float32(self.scale, 16))
            spread, power, scale = spread_e2m1(let(self.words[0])), isa.TWO_POW_126, pack_bf16(factor, factor)
        for v in range(4):
            store(pairs, multiply_pairs(multiply_pairs(spread[v], u32(power)), scale), v)
        return pairs


class Chunk:
    """Eight columns of a token: thread l of 16 reads chunk 4q + m of its 128-block and writes chunk 4m + q = l.

    A segment has so many ``columns``, a thread 8 of them; of ``num_parts`` of the CTA's threads each has all of them, and
    writes some rows.
    """

    def __init__(self, a, form: ActivationFormat, token, segment, thread, columns: int, num_parts: int = 1):
        index = thread.tid if num_parts == 1 else let(thread.tid % (columns // 8))
        l16 = index % 16
        base = let(segment * columns + index // 16 * 128)
        self.a, self.token, self.thread, self.num_parts = a, token, thread, num_parts
        self.part = T.int32(0) if num_parts == 1 else let(thread.tid // (columns // 8))
        self.lane, self.word = l16 % 4, l16 // 4  # of a quad, and of its words
        self.column = let(cast(base + self.lane * 32 + self.word * 8, "int64"))
        self.position = let(cast(base + l16 * 8, "int64"))
        self.encoded = Encoded(form)

    def load(self, space: str = "global") -> None:
        """Fetch; columns past the row stay zero."""
        with if_(self.column < self.a.hidden_size):
            self.encoded.load(self.a, self.token, self.column, space)

    def write(self, row_of_slot, is_thin=None) -> None:
        """Store the chunk, decoded and in K order, to every row of the token (each part to some), to those of thin slots as
        columns, too, and the rows' scale once."""
        a, width = self.a, padded(self.a.hidden_size)
        words = self.encoded.pairs()
        columns = None if is_thin is None else [to_columns(words[i]) for i in range(4)]
        exchange_quad(words, self.thread.lane)
        with for_((cast(a.top_k, "int32") + SLOTS_AT_ONCE - 1) // SLOTS_AT_ONCE) as group:
            rows = []
            for i in range(0, SLOTS_AT_ONCE, self.num_parts):
                k = let(group * SLOTS_AT_ONCE + i + self.part)
                row = scalar("int32", T.int32(-1))
                with if_(k < cast(a.top_k, "int32")):
                    assign(row, row_of_slot(k))
                rows.append((k, row))
            for k, row in rows:
                with if_(T.And(row >= 0, self.position < width)):
                    if is_thin is not None:
                        with if_(is_thin(k)):
                            self._store_columns(row, columns)
                    offset = cast(row, "int64") * width + self.position
                    store_vec4(address(a.ws["x"], offset * 2), words)
                    with if_(T.And(a.per_token_scale != 0, self.position == 0)):
                        scale = load("float32", address(a.per_token_scale, cast(self.token, "int64") * 4))
                        store_to("float32", address(a.ws["row_scale"], cast(row, "int64") * 4), scale)

    def _store_columns(self, row, columns) -> None:
        width, block = padded(self.a.hidden_size), cast(self.position // K_BLOCK, "int32")
        store_vec4(columns_address(self.a.ws["x"], width, row, block, self.word, self.lane), columns)


def gather(a, form: ActivationFormat) -> None:
    """Emit the kernel for one activation format."""
    segments = segments_of(a, COLUMNS)
    with kernel(f"gather_{form.name}", cast(a.num_tokens * segments, "int32"), THREADS) as thread:
        token = let(thread.cta // cast(segments, "int32"))
        chunk = Chunk(a, form, token, thread.cta % cast(segments, "int32"), thread, COLUMNS)
        chunk.load(PAST_L1)  # route, two kernels before, started after everything that writes it had ended
        ptx.griddepcontrol.wait()
        ptx.griddepcontrol.launch_dependents()
        first = let(cast(token, "int64") * a.top_k)
        rows = a.result("expanded_idx_to_permuted_idx")
        chunk.write(lambda k: load("int32", address(rows, (first + cast(k, "int64")) * 4)))


def segments_of(a, columns: int):
    """CTAs that share a row (host expression)."""
    return (padded(a.hidden_size) + columns - 1) // columns
