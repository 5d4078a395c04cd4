# SPDX-License-Identifier: Apache-2.0
"""Main loop of both grouped GEMMs: FP4 weights times quantised tokens on block-scaled mma.sync, operands swapped.

Grid, loads and stores are those of sm80/pipeline.py. m16n8k64 takes both operands as they lie in memory, m16n8k32 wants
an e2m1 a byte: weights are widened in registers, tokens split into even and odd columns to match (any order of k inside
a scale block is right as long as both sides have it). There is no copy of weights, scales or tokens in another layout:
gemm1 gathers token rows through ``row_token``.

    shared memory of a stage (pitches keep ldmatrix, 8 rows of 16 bytes, on distinct banks)
      weights  [rows, k_step / 2 + 16]                  tokens  [tile_m, k_step / 2 + 16] or [tile_m, k_step + 32]

Roofline, RTX 5090 (170 SMs, 2.4 GHz, 1.79 TB/s), from data sheets and published issue rates, not measured here: one
m16n8k64 in 16 clocks a sub-core is 4096 FLOP/clk/SM, 1.67 PFLOP/s for nvfp4; m16n8k32 issues at the same rate, so mxfp8
has half. A weight byte is worth 4 * tokens FLOP, so weights bound the time below about 230 (nvfp4) or 115 (mxfp8)
tokens an expert. Shared memory, 128 B/clk/SM: a warp of 32 rows x 64 tokens reads 3 KB and multiplies 256 clocks for each
64 columns; four such warps keep it 40 % busy. The main loop of 128 x 128 nvfp4 issues 190 instructions for 32 OMMA (SASS),
512 clocks of a sub-core's tensor pipe.
"""

from dataclasses import dataclass

from tvmmoe.config import WeightFormat
from tvmmoe.kernels.sm80.intrinsics import load_matrices
from tvmmoe.kernels.sm80.pipeline import MmaConfig, MmaGemm
from tvmmoe.kernels.sm90a.trace import let, load, ptx, regs
from tvmmoe.kernels.sm120a import intrinsics as isa


@dataclass(frozen=True)
class GemmConfig(MmaConfig):
    """Compile-time choices of one GEMM kernel; tokens are nvfp4 with nvfp4 weights, mxfp8 with mxfp4."""

    emulate: bool = False  # the mma instruction; for GPUs without it

    has_token_scales = True

    @property
    def form(self) -> isa.Form:
        return isa.NVFP4 if self.weight_format is WeightFormat.nvfp4 else isa.MXFP8

    @property
    def token_bytes(self) -> int:
        """Of a token in one stage."""
        return self.k_step // 2 if self.weight_format is WeightFormat.nvfp4 else self.k_step

    @property
    def weight_pitch(self) -> int:
        return self.weight_bytes + 16

    @property
    def token_pitch(self) -> int:
        # mxfp8 tokens are read 8 bytes a lane, 4 rows of 32 bytes at once
        return self.token_bytes + (16 if self.weight_format is WeightFormat.nvfp4 else 32)


class GroupedGemm(MmaGemm):
    """Operands in shared memory -> accumulators."""

    def weight_place(self, row, column):
        """Where a byte of a weight row goes in a stage."""
        return row * self.c.weight_pitch + column

    def _plan_fragments(self) -> None:
        """Where this lane reads its operands in a stage."""
        c, lane = self.c, self.thread.lane
        # ldmatrix: lanes 0-7 give rows 0-7, lanes 8-15 rows 8-15, and again for the next 16 bytes
        self.weight_at = let((self.first_row + lane % 16) * c.weight_pitch + lane // 16 * 16)
        token = self.first_token + self.group
        if c.weight_format is WeightFormat.nvfp4:  # 4 matrices: both halves of k, then of the next 8 tokens or k
            self.token_at = let(c.token_base + (self.first_token + lane % 8) * c.token_pitch + lane // 8 * 16)
        else:
            self.token_at = let(c.token_base + token * c.token_pitch + self.quad * 8)
        # Lanes 0 and 1 of a quad supply the scales of rows g and g + 8, lane 0 those of column g; the others' are ignored.
        scale_row = self.first_row + self.group + self.quad % 2 * 8
        self.scale_row, self.scale_token = let(scale_row), let(token + c.rows)
        self.weight_skews = [let(self.skews[self.scale_row + 16 * i]) for i in range(c.mi)]
        self.token_skews = [let(self.skews[self.scale_token + 8 * j]) for j in range(c.ni)]

    def _scale_words(self, base, row, skew):
        """The scales of a row in a stage, four a word."""
        c = self.c
        count = c.scale_bytes // 4
        at = let(base + c.scale_base + row * (2 * c.scale_bytes))
        words = [load("uint32", self.smem.ptr_to([at + 4 * i]), "shared") for i in range(count + 1)]
        return [isa.funnel(words[i], words[i + 1], skew) for i in range(count)]

    def _multiply(self, stage) -> None:
        c = self.c
        base = let(stage * c.stage_bytes)
        weight_scales = [self._scale_words(base, self.scale_row + 16 * i, self.weight_skews[i]) for i in range(c.mi)]
        token_scales = [self._scale_words(base, self.scale_token + 8 * j, self.token_skews[j]) for j in range(c.ni)]
        per_word = 4 // c.form.num_scales  # instructions that a word of scales serves
        for pair in range(0, c.k_step // c.form.k, 2):  # two instructions along k share loads
            weights, tokens = self._weights(base, pair), self._tokens(base, pair)
            for step in range(2):
                word, byte = (pair + step) // per_word, (pair + step) % per_word * c.form.num_scales
                for i in range(c.mi):
                    for j in range(c.ni):
                        isa.mma(
                            c.form, self.acc[i], 4 * j, weights[step][i], tokens[step][j], weight_scales[i][word],
                            token_scales[j][word], byte_id=byte, emulate=c.emulate,
                        )  # fmt: skip

    def _weights(self, base, pair: int):
        """A operands [step][mi] of two instructions along k."""
        c, result = self.c, [[], []]
        for i in range(c.mi):
            at = self.weight_at + 16 * i * c.weight_pitch
            if c.weight_format is WeightFormat.nvfp4:
                for step in range(2):
                    words = load_matrices(self.smem.ptr_to([base + at + 32 * (pair + step)]))
                    result[step].append([words[n] for n in range(4)])
            else:
                words = load_matrices(self.smem.ptr_to([base + at + 16 * pair]))
                for step in range(2):
                    (low, low_odd), (high, high_odd) = (isa.widen_e2m1(words[2 * step + n]) for n in range(2))
                    result[step].append([let(word) for word in (low, high, low_odd, high_odd)])
        return result

    def _tokens(self, base, pair: int):
        """B operands [step][ni] of two instructions along k."""
        c, result = self.c, [[], []]
        for j in range(c.ni):
            at = self.token_at + 8 * j * c.token_pitch
            if c.weight_format is WeightFormat.nvfp4:
                words = load_matrices(self.smem.ptr_to([base + at + 32 * pair]))
                for step in range(2):
                    result[step].append([words[2 * step], words[2 * step + 1]])
            else:
                for step in range(2):
                    pair_of_words = regs(2, "uint32")
                    pointer = self.smem.ptr_to([base + at + 32 * (pair + step)])
                    ptx["ld.shared.v2.b32"](pair_of_words[0], pair_of_words[1], pointer)
                    result[step].append(isa.split_bytes(pair_of_words[0], pair_of_words[1]))
        return result
