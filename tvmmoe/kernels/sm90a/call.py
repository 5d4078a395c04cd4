# SPDX-License-Identifier: Apache-2.0
"""A call while it is traced: what the host function of an operator, or of a part of one, takes and knows."""

from collections.abc import Callable, Mapping
from typing import Any

import tvm
from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as I  # noqa: E741

from tvmmoe import abi
from tvmmoe.config import ActivationType
from tvmmoe.kernels.sm90a.trace import if_
from tvmmoe.workspace import Slice, max_num_tiles, usual_num_tiles


class Arguments:
    """The entry's parameters (tvmmoe.abi) as attributes, workspace slices as int64 addresses under ``ws``."""

    def __init__(self, tile_m: int, slices: Callable[..., tuple[Mapping[str, Slice], Any]], has_thin_tiles: bool = False):
        """Tiles of ``tile_m`` tokens; ``slices`` is that of a layout module."""
        self.has_thin_tiles = has_thin_tiles
        workspace = I.arg("workspace", I.buffer([tvm.tirx.Var("workspace_size", "int64")], "uint8"))
        for name in (*abi.POINTERS, *abi.INTS):
            setattr(self, name, I.arg(name, I.int64()))
        self.routed_scaling_factor = I.arg("routed_scaling_factor", I.float64())
        pairs, sizes = self.num_tokens * self.top_k, (self.hidden_size, self.intermediate_size, self.local_num_experts)
        self.max_tiles = max_num_tiles(pairs, self.local_num_experts, tile_m, T.min)
        self.usual_tiles = usual_num_tiles(pairs, self.local_num_experts, self.num_experts, tile_m, T.min)
        pieces, _ = slices(self.num_tokens, self.top_k, *sizes, tile_m, minimum=T.min)
        # TensorIR has no cast from pointer to integer; nvcc.ADDRESS defines this function.
        base = I.Bind(T.call_pure_extern("int64", "tvmmoe_address", workspace.data))
        self.ws = {name: base + piece.offset for name, piece in pieces.items()}

    @property
    def is_gated(self):
        """Whether gemm1 has gate rows: Swiglu and Geglu, whose numbers come before the others' (host expression)."""
        return self.activation <= int(ActivationType.Geglu)

    def result(self, name: str):
        """Address of a result that the caller may want, or else of the workspace slice of the same name."""
        given = getattr(self, name)
        return T.Select(given == 0, self.ws[name], given)


def host_function(
    symbol: str, launch_params: list[str], arguments: Callable[[], Arguments], launch: Callable[[Arguments], None]
) -> tvm.tirx.PrimFunc:
    """A packed function that takes ``arguments()`` and launches, unless there are no tokens, what ``launch`` emits."""
    with IRBuilder() as builder:
        with I.prim_func():
            I.func_name(symbol)
            I.func_attr({"global_symbol": symbol, "tirx.kernel_launch_params": launch_params})
            a = arguments()
            with if_(a.num_tokens > 0):
                launch(a)
    return builder.get()
