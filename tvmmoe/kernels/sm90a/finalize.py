# SPDX-License-Identifier: Apache-2.0
"""finalize: out[t] = bf16(sum over slots, ascending, of float(weight) * float(row)).

    grid     num_tokens * ceil(H_out / 1024) CTAs of 128 threads, 8 columns a thread
    load     lane k knows the row and the weight of slot k (top_k is 32 at most); rows of 8 slots are requested before the
             first is added
    store    16 bytes, or single elements where H_out is no multiple of 8

A slot of another rank (row -1) contributes nothing; a token with none of ours gets zeros.
"""

from tvm.script import tirx as T

from tvmmoe.config import MAX_TOP_K
from tvmmoe.kernels import numerics
from tvmmoe.kernels.sm90a.few_tokens import wait_for_results
from tvmmoe.kernels.sm90a.gather import pack_bf16
from tvmmoe.kernels.sm90a.trace import (
    PAST_L1,
    address,
    assign,
    bits,
    cast,
    for_,
    if_,
    if_else,
    kernel,
    let,
    load,
    load_vec4,
    ptx,
    regs,
    scalar,
    shuffle,
    store,
    store_to,
    store_vec4,
    u32,
)  # fmt: skip

THREADS = 128
COLUMNS = THREADS * 8
SLOTS_AT_ONCE = 8
assert MAX_TOP_K <= 32  # a lane a slot


def _slot(a, token, lane):
    """Row, -1 where there is none, and weight of the token's slot ``lane``."""
    row, weight = scalar("int32", T.int32(-1)), scalar("float32", T.float32(0))
    with if_(lane < cast(a.top_k, "int32")):
        slot = let(cast(token, "int64") * a.top_k + cast(lane, "int64"))
        assign(row, load("int32", address(a.result("expanded_idx_to_permuted_idx"), slot * 4), PAST_L1))
        weight_bits = load("uint16", address(a.result("expert_weights"), slot * 2), PAST_L1)
        assign(weight, numerics.bf16_to_float32(weight_bits))
    return row, weight


def _add_slots(a, row, weight, first, column, sums) -> None:
    """Add the rows of gemm2_output of slots ``first`` ... , in slot order, where they have a row and a ``column``."""
    rows = [let(shuffle(row, first + i)) for i in range(SLOTS_AT_ONCE)]
    data = []
    for each in rows:
        words = regs(4, "uint32")
        with if_(T.And(each >= 0, column < a.output_hidden_size)):
            offset = cast(each, "int64") * a.hidden_size + column
            load_vec4(address(a.result("gemm2_output"), offset * 2), into=words)
        data.append(words)
    for number, (each, words) in enumerate(zip(rows, data, strict=True)):
        factor = let(shuffle(weight, first + number))
        with if_(each >= 0):
            for i in range(4):
                low = bits(let(words[i] << u32(16)), "float32")
                high = bits(let(words[i] & u32(0xFFFF0000)), "float32")
                store(sums, sums[2 * i] + factor * low, 2 * i)
                store(sums, sums[2 * i + 1] + factor * high, 2 * i + 1)


def finalize(a, waits_for_results: bool = False) -> None:
    """Emit the kernel. What writes slots has ended when it starts, for every kernel waits before it starts the next; or, if
    this one ``waits_for_results``, is gemm_pair."""
    width = a.output_hidden_size
    segments = (width + COLUMNS - 1) // COLUMNS
    with kernel("finalize", cast(a.num_tokens * segments, "int32"), THREADS) as thread:
        token = let(thread.cta // cast(segments, "int32"))
        column = let(cast(thread.cta % cast(segments, "int32") * COLUMNS + thread.tid * 8, "int64"))
        sums = regs(8, "float32")
        for i in range(8):
            store(sums, T.float32(0), i)
        if waits_for_results:
            wait_for_results(a)
        row, weight = _slot(a, token, thread.lane)
        ptx.griddepcontrol.wait()
        ptx.griddepcontrol.launch_dependents()
        with for_((cast(a.top_k, "int32") + SLOTS_AT_ONCE - 1) // SLOTS_AT_ONCE) as i:
            _add_slots(a, row, weight, i * SLOTS_AT_ONCE, column, sums)
        with if_(column < width):
            words = regs(4, "uint32")
            for i in range(4):
                store(words, pack_bf16(sums[2 * i], sums[2 * i + 1]), i)
            out = let(a.output + (cast(token, "int64") * width + column) * 2)

            def one_by_one():
                for i in range(8):
                    with if_(column + i < width):
                        half = let(cast((words[i // 2] >> u32(16 * (i % 2))) & u32(0xFFFF), "uint16"))
                        store_to("uint16", address(out, 2 * i), half)

            is_aligned = ((width * 2) & T.int64(15)) + (a.output & T.int64(15)) == T.int64(0)
            if_else(is_aligned, lambda: store_vec4(address(out), words), one_by_one)
