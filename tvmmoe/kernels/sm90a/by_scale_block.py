# SPDX-License-Identifier: Apache-2.0
"""Main loop for one or two columns of tokens: the columns of mma.sync that would be padding take scales off decoding.

The four lanes of a quad hold weights of four scale blocks (layout.py), which an MMA adds up, and it has eight columns. Column
2 s + i has column i of the tokens in the K of lane s, and zeros elsewhere: so each scale block has a sum of its own, in the
lane that knows its scale, and is multiplied by that once a K block, not once a pair of weights.

A fragment stays e2m1 * 2^-126 (intrinsics.decode_word), subnormal or not, as the tensor core takes it; columns are times a
power of two instead. A word of weights takes 13 instructions, not 17, a K block no vote on large scales, and nothing is
rounded before the sum.

    columns    [K block, 4 words, 2 columns, 4 lanes of a quad, 8] bf16: 8 columns of K as pairs (v, v + 4)
"""

from tvm.script import tirx as T

from tvmmoe.config import WeightFormat
from tvmmoe.kernels.sm80.intrinsics import mma
from tvmmoe.kernels.sm90a import intrinsics as isa
from tvmmoe.kernels.sm90a.layout import COLUMNS_BYTES, K_BLOCK, column_offset
from tvmmoe.kernels.sm90a.trace import (
    Smem,
    cast,
    cuda,
    if_,
    let,
    load,
    load_vec4,
    regs,
    shuffle_xor,
    store,
    store_to,
    u32,
)  # fmt: skip

ZERO_BYTES = COLUMNS_BYTES  # what lanes without tokens load: at the same offsets as those with, from other banks
# Of mxfp4 each byte's scale as float32 in shared memory: a load for three instructions, 1 to 2 % at T=4 to 16.
NUM_POWERS = 256


def constant_bytes(weight_format: WeightFormat) -> int:
    """Shared memory for what a CTA writes once."""
    return ZERO_BYTES + (4 * NUM_POWERS if weight_format == WeightFormat.mxfp4 else 0)


class ByScaleBlock:
    """The part of a :class:`tvmmoe.kernels.sm90a.gemm.GroupedGemm` that multiplies so.

    Whose part it is has ``_add(sums, factors)`` add those of a scale block, [2 * row of weights + column], times the scale of
    either row.
    """

    def _allocate_constants(self, smem: Smem) -> None:
        self.zeros = smem.alloc(ZERO_BYTES, "uint8", 128)
        self.powers = smem.alloc(NUM_POWERS, "float32", 128) if self.c.weight_format == WeightFormat.mxfp4 else None

    def _write_constants(self) -> None:
        """Before the CTA synchronises."""
        tid = self.thread.tid
        with if_(tid < ZERO_BYTES // 4):
            store_to("uint32", self.zeros.ptr_to([tid * 4]), u32(0), "shared")
        if self.powers is not None:
            with if_(tid < NUM_POWERS):
                power = isa.ue8m0_factor(let(cast(tid, "uint32")))
                store_to("float32", self.powers.ptr_to([tid]), power, "shared")

    def _place_columns(self) -> None:
        """Where this lane's columns of a stage are, or zeros."""
        block, column = self.group // 2, self.group % 2
        has_tokens = let(cast(block == self.quad, "int32")) != 0
        first = self.k_sub * (self.first_block * COLUMNS_BYTES) + column_offset(0, column, self.quad)
        tokens, zeros = self.xs.ptr_to([first]), self.zeros.ptr_to([column_offset(0, 0, (block + 1) % 4)])
        place = T.Select(has_tokens, cuda.cvta_generic_to_shared(tokens), cuda.cvta_generic_to_shared(zeros))
        self.column_place = self._kept(place)

        def step(num_bytes: int):
            return let(T.Select(has_tokens, u32(num_bytes), u32(0)))

        self.column_step = step(self.x_stage)  # from a stage to the next
        self.column_block = step(self.block_step * COLUMNS_BYTES)  # from a K block of the warp to its next one

    def _multiply_stage_by_scale_block(self, blocks) -> None:
        """This warp's K ``blocks`` of a stage, which is then free."""
        c, stage = self.c, cast(self.stage, "uint32")
        words, columns = let(self.word_place + stage * u32(self.w_stage)), let(self.column_place + stage * self.column_step)
        scales = let(stage * u32(self.s_stage))
        rows, step = [row * (K_BLOCK // 2) for row in self._row_offsets()[0]], self.block_step
        raw = [self._load_scales(let(scales + u32(block * step * c.scale_bytes))) for block in blocks]
        weights = [
            [load_vec4(words + u32(block * step * self.w_block + row), "shared") for row in rows] for block in blocks
        ]
        for block in blocks:
            place = let(columns + u32(block) * self.column_block) if block else columns
            tokens = [load_vec4(place + u32(word * (COLUMNS_BYTES // 4)), "shared") for word in range(4)]
            self._multiply_by_scale_block(weights[block], tokens, raw[block])
        cuda.warp_sync()
        self._release(self.stage)

    def _multiply_by_scale_block(self, weights, tokens, raw) -> None:
        """A K block of two rows of weights."""
        factors = [self._factors(each) for each in raw]
        words_per_scale = 4 // len(factors[0])
        for word in range(4):
            if word % words_per_scale == 0:
                sums = self._no_sums()
            fragment = regs(8, "uint32")
            for r in range(2):
                isa.decode_word(weights[r][word], None, fragment, r, self.factors)
            for step in range(2):
                b = [tokens[word][2 * step + i] for i in range(2)]
                mma(sums, 0, [fragment[4 * step + i] for i in range(4)], b)
            if (word + 1) % words_per_scale == 0:
                self._add(sums, [of_row[word // words_per_scale] for of_row in factors])

    def _factors(self, raw) -> list:
        """float32 of a row's scales in this lane's part of a K block."""
        if self.powers is not None:
            return [load("float32", self.powers.ptr_to([cast(raw, "int32")]), "shared")]
        return isa.e4m3_factors(raw)

    @staticmethod
    def _no_sums():
        """Accumulators of a scale block. One chain of MMAs: two take longer to add up than they save where a warp has another
        K block to go on with (T=16 +2 %)."""
        sums = regs(4, "float32")
        for i in range(4):
            store(sums, T.float32(0), i)
        return sums


def sum_of_quad(value):
    """The sum over the lanes of a quad, in each of them."""
    for distance in (1, 2):
        value = let(value + shuffle_xor(value, distance))
    return value
