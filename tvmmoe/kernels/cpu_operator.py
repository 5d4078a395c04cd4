# SPDX-License-Identifier: Apache-2.0
"""The whole operator as one packed host function over the CPU stages, in the calling convention of ``tvmmoe.abi``.

    route -> permute -> gather -> gemm1 -> requantize -> gemm2 -> finalize

Each arrow is a call of a stage's own packed symbol on views (DLTensors on the stack) of the caller's memory and of the
workspace. The number of tiles is read back after ``permute``: on a CPU that costs nothing, and only live tiles are computed.
"""

import tvm
from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as I

from tvmmoe import abi
from tvmmoe.config import ActivationFormat, ActivationType, WeightFormat
from tvmmoe.kernels.neutral import INF, ONE, ZEROS
from tvmmoe.workspace import cpu_slices, max_num_tiles

STORAGE = {"float32": "float32", "bfloat16": "uint16"}  # TensorIR dtype that holds an element


def stage_symbol(stage: str, *parts: object) -> str:
    """Symbol of a stage: ``gemm1_mxfp4_swiglu_m4``; also the stem of its definition, schedule and test label."""
    return "_".join([stage, *(str(part).lower() for part in parts)])


def entry_symbol(weight_format: WeightFormat, tile_m: int) -> str:
    """Exported name of the operator for one weight format and tile height."""
    return f"fp4_block_scale_moe_{weight_format.name}_m{tile_m}"


def _view(pointer, dtype: str, *shape):
    """A DLTensor on the stack over ``pointer``."""
    dims = [T.int64(d) if isinstance(d, int) else d for d in shape]
    zero = getattr(T, dtype)(0)
    data = T.reinterpret("handle", pointer)
    return T.tvm_stack_make_array(data, T.tvm_stack_make_shape(*dims), 0, len(dims), zero, T.int64(0))


def _call(symbol: str, *args) -> None:
    I.evaluate(T.call_cpacked("__tvm_ffi_" + symbol, *args))


class _Arguments:
    """The entry's parameters as attributes, with workspace slices as pointers under ``ws``."""

    def __init__(self, tile_m: int):
        workspace = I.arg("workspace", I.buffer([tvm.tirx.Var("workspace_bytes", "int64")], "uint8"))
        for name in (*abi.POINTERS, *abi.INTS):
            setattr(self, name, I.arg(name, I.int64()))
        self.routed_scaling_factor = I.arg("routed_scaling_factor", I.float64())
        self.tile_m = tile_m
        self.max_tiles = max_num_tiles(self.num_tokens * self.top_k, self.local_num_experts, tile_m, T.min)
        sizes = (self.num_tokens, self.top_k, self.hidden_size, self.intermediate_size, self.local_num_experts)
        slices, _ = cpu_slices(*sizes, tile_m, T.min, T.max)
        base = T.call_pure_extern("int64", "tvmmoe_address", workspace.data)  # TensorIR has no pointer-to-int cast
        self.ws = {name: base + piece.offset for name, piece in slices.items()}
        self.hb, self.ib = self.hidden_size // 32, self.intermediate_size // 32

    def result(self, name: str):
        """A result that the caller may want: its pointer, or the workspace slice of the same name."""
        given = getattr(self, name)
        return T.if_then_else(given == 0, self.ws[name], given)

    def rows(self, name: str, default: int, *shape):
        """View of an optional float32 argument [rows, *shape]; absent: one row of neutral values."""
        given = getattr(self, name)
        count = self.num_tokens if name == "per_token_scale" else self.local_num_experts
        pointer = T.if_then_else(given == 0, self.ws["neutral"] + 4 * default, given)
        return _view(pointer, "float32", T.if_then_else(given == 0, T.int64(1), count), *shape)


def operator(weight_format: WeightFormat, tile_m: int) -> tvm.tirx.PrimFunc:
    """The packed host function for one weight format and tile height."""
    with IRBuilder() as builder:
        with I.prim_func():
            symbol = entry_symbol(weight_format, tile_m)
            I.func_name(symbol)
            I.func_attr({"global_symbol": symbol})
            a = _Arguments(tile_m)
            with I.If(a.num_tokens > 0), I.Then():
                _route(a)
                _experts(a, weight_format)
                with I.If(a.do_finalize != 0), I.Then():
                    _finalize(a)
    return builder.get()


def _route(a: _Arguments) -> None:
    _call("neutral", _view(a.ws["neutral"], "float32", 2 * a.intermediate_size + a.hidden_size + 2))
    for is_bf16, dtype in enumerate(("float32", "bfloat16")):
        for bias_is_bf16, bias_dtype in enumerate(("float32", "bfloat16")):
            with I.If(T.And(a.logits_is_bf16 == is_bf16, a.bias_is_bf16 == bias_is_bf16)), I.Then():
                has_bias = T.Cast("int64", a.routing_bias != 0)
                bias = T.if_then_else(a.routing_bias == 0, a.ws["neutral"], a.routing_bias)
                replay = T.if_then_else(a.routing_replay_out == 0, a.ws["neutral"], a.routing_replay_out)
                replay_rows = T.if_then_else(a.routing_replay_out == 0, T.int64(0), a.num_tokens)
                _call(
                    stage_symbol("route", dtype, bias_dtype),
                    _view(a.routing_logits, STORAGE[dtype], a.num_tokens, a.num_experts),
                    _view(bias, STORAGE[bias_dtype], T.if_then_else(a.routing_bias == 0, T.int64(1), a.num_experts)),
                    _view(a.ws["topk_ids"], "int32", a.num_tokens, a.top_k),
                    _view(a.result("expert_weights"), "uint16", a.num_tokens, a.top_k),
                    _view(replay, "int16", replay_rows, a.top_k),
                    a.routing_method,
                    has_bias,
                    a.n_group,
                    a.topk_group,
                    a.routed_scaling_factor,
                    a.norm_topk_prob,
                )
    _call(
        "permute",
        _view(a.ws["topk_ids"], "int32", a.num_tokens, a.top_k),
        _view(a.result("expanded_idx_to_permuted_idx"), "int32", a.num_tokens, a.top_k),
        _view(a.ws["permuted_idx_to_token_idx"], "int32", a.max_tiles, a.tile_m),
        _view(a.ws["tile_expert"], "int32", a.max_tiles),
        _view(a.ws["num_tiles"], "int32", 1),
        a.local_expert_offset,
        a.local_num_experts,
    )


def _experts(a: _Arguments, weight_format: WeightFormat) -> None:
    """gather, gemm1, requantize and gemm2 over the live tiles."""
    data = I.Bind(T.reinterpret("handle", a.ws["num_tiles"]))
    live = I.decl_buffer([1], "int32", data=data)
    nt = I.Bind(T.Cast("int64", live[0]))
    with I.If(nt > 0), I.Then():
        tile_expert = (a.ws["tile_expert"], "int32", nt)
        row_token = (a.ws["permuted_idx_to_token_idx"], "int32", nt, a.tile_m)
        _gather(a, nt, row_token)
        for activation in ActivationType:
            with I.If(a.activation == int(activation)), I.Then():
                _gemm1(a, nt, weight_format, activation, tile_expert, row_token)
        _requantize(a, nt)
        per_32 = 32 // weight_format.block_size
        _call(
            stage_symbol("gemm2", weight_format.name, f"m{a.tile_m}"),
            _view(a.ws["operand"], "float32", nt, a.tile_m, a.ib, 2, 16),
            _view(a.gemm2_weights, "uint8", a.local_num_experts, a.hb, 32, a.ib, 16),
            _view(a.gemm2_weights_scale, "uint8", a.local_num_experts, a.hb, 32, a.ib, per_32),
            _view(*tile_expert),
            _view(*row_token),
            _view(a.ws["row_scale"], "float32", nt, a.tile_m),
            a.rows("gemm2_bias", ZEROS, a.hb, 32),
            a.rows("output2_scale_scalar", ONE),
            _view(a.result("gemm2_output"), "uint16", nt, a.tile_m, a.hb, 32),
        )


def _gather(a: _Arguments, nt, row_token) -> None:
    shapes = {
        ActivationFormat.bf16: ("uint16", (a.hb, 16, 2), 1),
        ActivationFormat.mxfp8: ("uint8", (a.hb, 16, 2), 1),
        ActivationFormat.nvfp4: ("uint8", (a.hb, 16), 2),
    }
    for form, (dtype, shape, per_32) in shapes.items():
        with I.If(a.activation_format == int(form)), I.Then():
            is_bf16 = form == ActivationFormat.bf16
            _call(
                stage_symbol("gather", form.name),
                _view(a.hidden_states, dtype, a.num_tokens, *shape),
                _view(
                    a.ws["neutral"] if is_bf16 else a.hidden_states_scale,
                    "uint8",
                    1 if is_bf16 else a.num_tokens,
                    a.hb,
                    per_32,
                ),
                _view(*row_token),
                _view(a.ws["operand"], "float32", nt, a.tile_m, a.hb, 2, 16),
            )


def _gemm1(a: _Arguments, nt, weight_format: WeightFormat, activation: ActivationType, tile_expert, row_token) -> None:
    halves, per_32 = 2 if activation.is_gated else 1, 32 // weight_format.block_size
    _call(
        stage_symbol("gemm1", weight_format.name, activation.name, f"m{a.tile_m}"),
        _view(a.ws["operand"], "float32", nt, a.tile_m, a.hb, 2, 16),
        _view(a.gemm1_weights, "uint8", a.local_num_experts, halves, a.ib, 32, a.hb, 16),
        _view(a.gemm1_weights_scale, "uint8", a.local_num_experts, halves, a.ib, 32, a.hb, per_32),
        _view(*tile_expert),
        _view(*row_token),
        a.rows("per_token_scale", ONE),
        a.rows("gemm1_bias", ZEROS, halves, a.ib, 32),
        a.rows("gemm1_alpha", ONE),
        a.rows("gemm1_beta", ZEROS),
        a.rows("gemm1_clamp_limit", INF),
        a.rows("output1_scale_scalar", ONE),
        a.rows("output1_scale_gate_scalar", ONE),
        _view(a.ws["z"], "uint16", nt, a.tile_m, a.ib, 32),
    )


def _requantize(a: _Arguments, nt) -> None:
    per_token = a.per_token_scale != 0
    is_nvfp4 = a.activation_format == int(ActivationFormat.nvfp4)
    modes = {
        "bf16": (a.activation_format == int(ActivationFormat.bf16), 1),
        "mxfp8": (a.activation_format == int(ActivationFormat.mxfp8), 1),
        "nvfp4": (T.And(is_nvfp4, T.Not(per_token)), 2),
        "nvfp4_per_token": (T.And(is_nvfp4, per_token), 2),
    }
    for mode, (condition, blocks) in modes.items():
        with I.If(condition), I.Then():
            _call(
                stage_symbol("requantize", mode),
                _view(a.ws["z"], "uint16", nt, a.tile_m, a.ib, blocks, 16 // blocks, 2),
                _view(a.ws["operand"], "float32", nt, a.tile_m, a.ib, 2, blocks, 16 // blocks),
                _view(a.ws["row_scale"], "float32", nt, a.tile_m),
            )


def _finalize(a: _Arguments) -> None:
    _call(
        "finalize",
        _view(a.result("gemm2_output"), "uint16", a.max_tiles * a.tile_m, a.hidden_size),
        _view(a.result("expert_weights"), "uint16", a.num_tokens, a.top_k),
        _view(a.result("expanded_idx_to_permuted_idx"), "int32", a.num_tokens, a.top_k),
        _view(a.output, "uint16", a.num_tokens, a.output_hidden_size),
    )
