# SPDX-License-Identifier: Apache-2.0
"""gather for the fp8 GEMM: mxfp8 hidden states -> e4m3 operand of gemm1, one row a local (token, slot) pair.

    grid     one CTA of 128 threads a token, a thread takes scale blocks of 32 columns
    base     the token's largest scale byte; a block is folded, times 2^(byte - base), into e4m3
    window   every folded block that is not zero keeps a value of at least MIN_FOLDED (gemm_fp8.py), and the base is in
             range; otherwise the bytes stay as they came
    order    a 4x4 exchange of words in each quad turns column order into K order (intrinsics_fp8.py)
    store    16 bytes a thread into every row of the token, a scale byte a block (the base of folded ones), and the row's
             factor: 2^(base - 127), or 0 outside of the window. Columns past H are zeros.
"""

from tvm.script import tirx as T

from tvmmoe.kernels import numerics
from tvmmoe.kernels.sm90a import intrinsics_fp8 as fp8
from tvmmoe.kernels.sm90a.gather import exchange_quad
from tvmmoe.kernels.sm90a.layout import padded
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
    load_vec4,
    ptx,
    regs,
    scalar,
    store,
    store_to,
    store_vec4,
    u32,
    warp_max_s32,
)  # fmt: skip

THREADS = 128
INSIDE, OUTSIDE = 1, 2  # what a block that is not zero says about its token; the largest counts, 0 is a zero token


class Token:
    """The CTA's token, its scale blocks by number."""

    def __init__(self, a, thread, partial):
        self.a, self.thread, self.partial = a, thread, partial
        self.index = let(cast(thread.cta, "int64"))
        self.blocks = let(cast(a.hidden_size // 32, "int32"))
        self.rounds = let(cast((padded(a.hidden_size) // 32 + THREADS - 1) // THREADS, "int32"))

    def block_max(self, value):
        """Largest int32 of the CTA."""
        top = warp_max_s32(value)
        cuda.cta_sync()  # the partial maxima of the last call have been read
        with if_(self.thread.lane == 0):
            I.buffer_store(self.partial, top, [self.thread.warp])
        cuda.cta_sync()
        for warp in range(THREADS // 32):
            assign(top, T.max(top, self.partial[warp]))
        return top

    def scale_byte(self, block):
        """int32; of the last block for those past the row."""
        offset = self.index * (self.a.hidden_size // 32) + cast(T.min(block, self.blocks - 1), "int64")
        return let(cast(load("uint8", address(self.a.hidden_states_scale, offset)), "int32"))

    def words(self, block):
        """32 columns, zeros past the row."""
        quarters = [regs(4, "uint32") for _ in range(2)]
        for half, words in enumerate(quarters):
            for i in range(4):
                store(words, u32(0), i)
            with if_(block < self.blocks):
                offset = self.index * self.a.hidden_size + cast(block * 32 + half * 16, "int64")
                load_vec4(address(self.a.hidden_states, offset), into=words)
        return quarters

    def base(self):
        """Largest scale byte."""
        top = scalar("int32", T.int32(0))
        with for_(self.rounds) as i:
            assign(top, T.max(top, self.scale_byte(i * THREADS + self.thread.tid)))
        return self.block_max(top)

    def state(self, base):
        """0, INSIDE or OUTSIDE."""
        state = scalar("int32", T.Select(base == 255, T.int32(OUTSIDE), T.int32(0)))  # NaN, also times zeros
        with for_(self.rounds) as i:
            block = let(i * THREADS + self.thread.tid)
            shift = let(base - self.scale_byte(block))
            amax = scalar("uint32", u32(0))
            for words in self.words(block):
                for word in range(4):
                    for byte in range(4):
                        assign(amax, T.max(amax, (words[word] >> u32(8 * byte)) & u32(0x7F)))
            with if_(amax > u32(0)):
                folded = let(numerics.e4m3_to_float32(amax) * fp8.power_of_two(T.max(127 - shift, T.int32(1))))
                lost = T.And(shift > 0, folded < T.float32(fp8.MIN_FOLDED))
                is_bad = T.Or(lost, T.Or(base < fp8.MIN_BASE, base > fp8.MAX_BASE))
                assign(state, T.max(state, T.Select(is_bad, T.int32(OUTSIDE), T.int32(INSIDE))))
        return self.block_max(state)


def row_factor(base, state):
    """2^(base - 127), 0 outside of the window, 1 for zeros."""
    factor = let(fp8.power_of_two(base))
    assign(factor, T.Select(state == OUTSIDE, T.float32(0), T.Select(state == INSIDE, factor, T.float32(1))))
    return factor

def write_byte(pointer, value) -> None:
    """One byte of a 32-bit register."""
    ptx["st.global.u8"](pointer, cast(value, "uint32"))


def write_quarters(row_address, block, quarters) -> None:
    """A scale block's two chunks of 16 bytes, exchanged with the quad's, into a row in K order."""
    for half, words in enumerate(quarters):
        position = block // 4 * 128 + (half * 4 + block % 4) * 16
        store_vec4(address(row_address, cast(position, "int64")), words)


def _write_block(a, token: Token, block, quarters, scale_byte, factor) -> None:
    """Store a block to every row of the token; the first block's thread also stores the rows' factor."""
    width = padded(a.hidden_size)
    for words in quarters:
        exchange_quad(words, token.thread.lane)
    with for_(cast(a.top_k, "int32")) as k:
        slot = token.index * a.top_k + cast(k, "int64")
        row = cast(load("int32", address(a.result("expanded_idx_to_permuted_idx"), slot * 4)), "int64")
        with if_(T.And(row >= 0, block < cast(width // 32, "int32"))):
            write_quarters(let(a.ws["x"] + row * (2 * width)), block, quarters)
            write_byte(address(a.ws["x_scale"], row * (width // 32) + cast(block, "int64")), scale_byte)
            with if_(block == 0):
                store_to("float32", address(a.ws["row_scale"], row * 4), factor)


def gather_fp8(a) -> None:
    """Emit the kernel."""
    with kernel("gather_fp8", cast(a.num_tokens, "int32"), THREADS) as thread:
        smem = Smem()
        partial = smem.alloc(THREADS // 32, "int32")
        smem.commit()
        token = Token(a, thread, partial)
        ptx.griddepcontrol.wait()
        ptx.griddepcontrol.launch_dependents()
        base = token.base()
        state = token.state(base)
        is_outside = state == OUTSIDE
        factor = row_factor(base, state)
        with for_(token.rounds) as i:
            block = let(i * THREADS + thread.tid)
            quarters, byte = token.words(block), token.scale_byte(block)
            shift = let(T.Select(is_outside, T.int32(0), T.min(base - byte, T.int32(15))))
            for words in quarters:
                fp8.fold(words, shift)
            _write_block(a, token, block, quarters, let(T.Select(is_outside, byte, base)), factor)
