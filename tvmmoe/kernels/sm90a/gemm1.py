# SPDX-License-Identifier: Apache-2.0
"""gemm1: x [rows, H] times up and gate rows of an expert -> z [rows, I] in the K order of gemm2.

A gated 64-row fragment is 32 up rows and their 32 gate rows: of a thread's two fragment rows, r = 0 is up and r = 1 the
gate of the same column, so bias, clamp, activation and scales need no exchange. A tile's rows are those whose z columns
are neighbours in K order (layout.py), which makes z one contiguous store a token. With s = position // 8 in the
128-block of z and g the fragment row in its slab of 8,

    column n = 32 (g // 2) + 8 (s // 4) + s % 4 + 4 (g % 2)

TMA fetches exactly those rows with a 5-D view of the weights, [K/2, b + 2m, q, c, expert and half] for
n = 32q + 8m + c + 4b, b innermost so that the rows of a quarter warp's 16-byte loads fall on different banks.
"""

import functools

from tvm.script import tirx as T

from tvmmoe.config import ActivationType
from tvmmoe.kernels.sm90a import intrinsics as isa
from tvmmoe.kernels.sm90a.gemm import GroupedGemm
from tvmmoe.kernels.sm90a.gemm_config import GemmConfig
from tvmmoe.kernels.sm90a.layout import padded
from tvmmoe.kernels.sm90a.thin_tiles import grouped_gemm
from tvmmoe.kernels.sm90a.tile_scheduler import Tile
from tvmmoe.kernels.sm90a.trace import address, assign, cast, if_, if_else, let, load, scalar, tensor_map


class Gemm1:
    """Rows and epilogue of gemm1 for :class:`GroupedGemm`."""

    operand_scales = "x_scale"  # slice of an fp8 operand's scale bytes, on Hopper
    number = 0  # of the GEMM
    knows_tiles = False  # the kernel before this one writes the tile list

    def __init__(self, a, is_gated: bool):
        self.a, self.is_gated = a, is_gated
        self.name = "gemm1_gated" if is_gated else "gemm1"
        self.halves = 2 if is_gated else 1
        self.matrices = 1 if is_gated else 2  # 8-column output matrices of a warp's 16 fragment rows
        self.k, self.padded_k, self.operand = a.hidden_size, padded(a.hidden_size), a.ws["x"]
        self.weights, self.scales = a.gemm1_weights, a.gemm1_weights_scale
        self.rows_per_expert = self.halves * a.intermediate_size
        self.out, self.out_width = a.ws["z"], padded(a.intermediate_size)

    def columns(self, c: GemmConfig) -> int:
        """z columns of a tile."""
        return c.rows // self.halves

    def num_row_blocks(self, c: GemmConfig):
        return self.out_width // self.columns(c)

    def row_map(self, c: GemmConfig, base, row, box_bytes: int):
        """Tensor map of a tile's rows in weights or their scales, of ``row`` bytes each."""
        size = self.a.intermediate_size  # rows of a half
        dims = [row, T.int64(8), size // 32, T.int64(4), self.a.local_num_experts * self.halves]
        strides = [4 * row, 32 * row, row, size * row]
        box = [box_bytes, self.columns(c) // 16, 4, 4, self.halves]
        return tensor_map(address(base), dims, strides, box, "uint8", 0, c.l2_promotion)

    def _block(self, c: GemmConfig, tile: Tile):
        """(128-block of z, first m of the tile in it)."""
        per_block = 128 // self.columns(c)
        return tile.row_block // per_block, tile.row_block % per_block * (self.columns(c) // 32)

    def row_coordinates(self, c: GemmConfig, tile: Tile):
        block, m = self._block(c, tile)
        return [let(2 * m), let(4 * block), T.int32(0), let(tile.expert * self.halves)]

    def _column(self, c: GemmConfig, tile: Tile, smem_row):
        """z column of a row of the tile in shared memory."""
        block, m = self._block(c, tile)
        per_m = self.columns(c) // 16
        bm, q, j = smem_row % per_m, smem_row // per_m % 4, smem_row // (4 * per_m) % 4
        return block * 128 + 32 * q + 8 * (m + bm // 2) + 4 * (bm % 2) + j

    def row(self, c: GemmConfig, tile: Tile, smem_row):
        """Weight row in the expert, clamped into the tensor where z has no such column."""
        size = cast(self.a.intermediate_size, "int32")
        half = smem_row // self.columns(c)
        return half * size + T.min(self._column(c, tile, smem_row), size - 1)

    def first_row(self, gemm: GroupedGemm):
        """Row in shared memory of the first fragment row of this thread."""
        per_m, index, g, w = self.columns(gemm.c) // 16, gemm.fragment(0), gemm.group, gemm.warp4
        if self.is_gated:
            return g % 2 + 2 * index + per_m * (g // 2 + 4 * w)
        return g % 2 + 2 * (2 * index + w // 2) + per_m * (g // 2 + 8 * (w % 2))

    def row_steps(self, c: GemmConfig) -> tuple[int, int]:
        """From a fragment to the next, and to the other fragment row."""
        per_m = self.columns(c) // 16
        return (2, 16 * per_m) if self.is_gated else (4, 4 * per_m)

    def row_modulo_8(self, gemm: GroupedGemm, r: int):
        """Weight row of fragment row ``r``, modulo 8."""
        return gemm.group % 2 * 4 + (gemm.warp4 if self.is_gated else 2 * (gemm.warp4 % 2) + r)

    def begin_tile(self, gemm: GroupedGemm, tile: Tile, expert):
        """Factors of the int64 ``expert`` and this thread's biases."""
        a = self.a

        def per_expert(pointer, default):
            value = scalar("float32", T.float32(default))
            with if_(pointer != 0):
                assign(value, load("float32", address(pointer, expert * 4)))
            return value

        state = {
            "alpha": per_expert(a.gemm1_alpha, 1), "beta": per_expert(a.gemm1_beta, 0),
            "limit": per_expert(a.gemm1_clamp_limit, float("inf")), "result": per_expert(a.output1_scale_scalar, 1),
            "gate": per_expert(a.output1_scale_gate_scalar, 1), "bias": [], "is_column": [],
        }  # fmt: skip
        size = cast(a.intermediate_size, "int32")
        state["is_geglu"] = let(cast(a.activation == int(ActivationType.Geglu), "int32")) != 0
        state["is_relu2"] = let(cast(a.activation == int(ActivationType.Relu2), "int32")) != 0
        for pair in gemm.rows:
            biases, inside = [], []
            for smem_row in pair:
                bias = scalar("float32", T.float32(0))
                inside.append(let(cast(self._column(gemm.c, tile, smem_row) < size, "int32")) != 0)
                with if_(a.gemm1_bias != 0):
                    index = expert * self.rows_per_expert + cast(self.row(gemm.c, tile, smem_row), "int64")
                    assign(bias, load("float32", address(a.gemm1_bias, index * 4)))
                biases.append(bias)
            state["bias"].append(biases)
            state["is_column"].append(inside)
        return state

    def values(self, gemm: GroupedGemm, state, mi: int, matrix: int, accumulators, token_scales) -> list:
        """z of one row and some tokens from their accumulators; zero in columns past I, which gemm2 multiplies by zeros.

        Several at once: one branch for all of them, in which their latencies overlap.
        """

        def with_bias(acc, scale, r: int):
            return let((acc[r] if scale is None else acc[r] * scale) + state["bias"][mi][r])

        tokens = list(zip(accumulators, token_scales, strict=True))
        is_column = state["is_column"][mi][matrix]
        if not self.is_gated:
            results = []
            for acc, scale in tokens:
                raw = with_bias(acc, scale, matrix)
                root = isa.maximum(let(state["gate"] * raw), T.float32(0))
                z = state["result"] * T.Select(state["is_relu2"], root * root, raw)
                results.append(let(T.Select(is_column, z, T.float32(0))))
            return results
        limit = state["limit"]
        pairs = []
        for acc, scale in tokens:
            clamped = isa.maximum(isa.minimum(with_bias(acc, scale, 0), limit), let(T.float32(0) - limit))
            up = let(clamped + state["beta"])
            gate = let(state["gate"] * isa.minimum(with_bias(acc, scale, 1), limit))
            pairs.append((up, gate, scalar("float32")))

        def activate(function):
            for _, gate, activated in pairs:
                assign(activated, function(gate, state["alpha"]))

        activations = isa.normal_cdf_times, isa.sigmoid_times
        if_else(state["is_geglu"], *(functools.partial(activate, function) for function in activations))
        result = state["result"]
        return [let(T.Select(is_column, result * up * activated, T.float32(0))) for up, _, activated in pairs]

    def out_column(self, gemm: GroupedGemm, tile: Tile):
        """First z position of the warpgroup's part of the tile."""
        return tile.row_block * self.columns(gemm.c) + gemm.row_group * gemm.out_columns

    def is_out_column(self, column):
        return column < cast(self.out_width, "int32")


def gemm1(a, config: GemmConfig, is_gated: bool) -> None:
    """Emit the kernel."""
    grouped_gemm(a, config, Gemm1(a, is_gated))
