# SPDX-License-Identifier: Apache-2.0
"""Tiles of one or two rows (sm90a/thin_tiles.py) keep what float32 does and leave to the other way what they could not.

Simulated on the CPU, and on a Hopper GPU.
"""

import functools

import pytest
import torch
from test_requantize import in_column_order
from test_single_row import MACHINES, odd_scales, output_of, shift_scales, spread_blocks
from test_sm90a import BASE, HAS_TVM, MX, SIMULATED, call, simulated, source_of, workspace_slices

from tvmmoe.config import ActivationFormat, ActivationType
from tvmmoe.kernels.sm90a import layout
from tvmmoe.reference import moe_ref
from tvmmoe.testing import Case, make_case, rel_l2

if HAS_TVM:
    import tvm_ffi

    from tvmmoe.kernels.sm90a import simulate, thin_rows, thin_tiles
    from tvmmoe.kernels.sm120a.simulate import compile_so

needs_tvm = pytest.mark.skipif(not HAS_TVM, reason="needs tvm to build kernels")
# Mostly one or two rows an expert, some three
SIZES = dict(num_tokens=7, hidden_size=544, intermediate_size=416, num_experts=24, top_k=3)
CASES = {
    "bf16": {},
    "arrange": dict(num_tokens=18, num_experts=64),
    "long": dict(hidden_size=1056, intermediate_size=1120, has_gemm1_bias=True, has_gemm2_bias=True, clamp_limit=1.5),
    "short_k": dict(hidden_size=64, intermediate_size=64),
    "several_segments": dict(num_tokens=5, hidden_size=8352, intermediate_size=96, num_experts=8, top_k=2),
    "geglu": dict(activation=ActivationType.Geglu, intermediate_size=1056),
    "relu2": dict(activation=ActivationType.Relu2, intermediate_size=288),
    "identity": dict(activation=ActivationType.Identity, hidden_size=1056, has_gemm1_bias=True),
    "mxfp8": dict(activation_format=ActivationFormat.mxfp8, intermediate_size=1056),
    "mxfp8_relu2": dict(activation_format=ActivationFormat.mxfp8, activation=ActivationType.Relu2),
    "experts_5_to_11": dict(local_expert_offset=5, local_num_experts=7),
    "one_row_each": dict(num_tokens=5, num_experts=64, top_k=1),
    "four_tokens": dict(num_tokens=4, num_experts=8, top_k=8),
}  # fmt: skip


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("simulated_thin")


def case_of(**changes) -> Case:
    return Case(**vars(BASE) | SIZES | changes)


@pytest.mark.parametrize("device", MACHINES)
@pytest.mark.parametrize("name", CASES)
def test_thin_tiles_match_reference(name, device, folder):
    case = case_of(**CASES[name])
    kwargs = make_case(case)
    expected = moe_ref(**kwargs)[0]
    for early in (False, True) if device == "cpu" else (False,):
        assert rel_l2(output_of(case, kwargs, device, folder, early=early), expected) < 1e-3


@pytest.mark.parametrize("device", MACHINES)
@pytest.mark.parametrize("z_exponent", [-110, -80, 0, 20, 50])
@pytest.mark.parametrize("spread", [20, 110])
def test_tokens_of_all_exponents_add_up(spread, z_exponent, device, folder):
    """The smaller spread, and z of the middle exponents, are inside of the window."""
    case = case_of()
    kwargs = spread_blocks(case, spread, z_exponent)
    expected = moe_ref(**kwargs)[0]
    assert expected.isfinite().all() and expected.any()
    assert rel_l2(output_of(case, kwargs, device, folder), expected) < 1e-3


@pytest.mark.parametrize("device", MACHINES)
@pytest.mark.parametrize("value", [2.0**-95, 1.99 * 2.0**32])
def test_sums_at_the_ends_of_the_window_are_exact(value, device, folder):
    """All tokens of one magnitude, scales as much the other way."""
    case = case_of(activation=ActivationType.Identity)
    kwargs = make_case(case)
    tokens = kwargs["hidden_states"]
    tokens.copy_(torch.where(tokens < 0, -value, value))
    codes = kwargs["gemm1_weights_scale"].view(torch.uint8)
    codes.copy_(codes.int() - round(torch.tensor(value).log2().item()))
    expected = moe_ref(**kwargs)[0]
    assert expected.isfinite().all() and expected.any()
    assert rel_l2(output_of(case, kwargs, device, folder), expected) < 1e-3


@pytest.mark.parametrize("device", MACHINES)
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), 3e38, 2.0**33, 2.0**-96, 1e-38, 1e-40])
@pytest.mark.parametrize("column", [77, 8300])
def test_tokens_that_are_no_usual_numbers(column, value, device, folder):
    """One of a token's columns, which the CTA that looks at it loads early or late; other tokens stay as they are."""
    sizes = CASES["several_segments"] if column > 544 else {}
    case = case_of(**sizes)
    kwargs = make_case(case)
    kwargs["hidden_states"][1, column] = value
    expected, actual = moe_ref(**kwargs)[0], output_of(case, kwargs, device, folder)
    others = torch.arange(case.num_tokens) != 1
    assert torch.equal(actual.isnan(), expected.isnan())
    assert rel_l2(actual[others], expected[others]) < 1e-3
    if abs(value) < 1:
        assert rel_l2(actual[1], expected[1]) < 1e-3


@pytest.mark.parametrize("device", MACHINES)
@pytest.mark.parametrize("code, z_exponent", [(0, 20), (1, 20), (128, 0), (129, 0), (251, -20), (252, -20), (255, 0)])
def test_scales_of_all_exponents(code, z_exponent, device, folder):
    """Of some columns of the output: 2^-127 is subnormal, 255 NaN."""
    case = case_of()
    kwargs, columns = odd_scales(case, code, z_exponent)
    expected = moe_ref(**kwargs)[0]
    assert expected[:, ~columns].isfinite().all() and (expected[:, columns].isnan().all() == (code == 255))
    actual = output_of(case, kwargs, device, folder)
    assert torch.equal(actual.isnan(), expected.isnan())
    for part in (columns, ~columns):
        if not actual[:, part].isnan().any():
            assert rel_l2(actual[:, part], expected[:, part]) < 1e-3


def columns_of(rows: torch.Tensor) -> torch.Tensor:
    """[2, K] -> the columns of a thin tile, as by_scale_block.py describes them, without their factor."""
    blocks = rows.unflatten(1, (-1, 4, 4, 8))  # [row, K block, lane, word, 8]
    pairs = blocks[..., [0, 4, 1, 5, 2, 6, 3, 7]]
    return pairs.permute(1, 3, 0, 2, 4).flatten()


@needs_tvm
@pytest.mark.parametrize("name", ["bf16", "arrange", "relu2", "mxfp8"])
def test_workspace_holds_columns_of_thin_tiles(name, folder):
    """x of thin tiles, and z, as their rows have it; whether a row is outside."""
    case = case_of(**CASES[name])
    slices, _ = workspace_slices(case, 8)
    kwargs = make_case(case)
    if case.activation_format == ActivationFormat.bf16:
        kwargs["hidden_states"][2, 5] = 2.0**40
    results = {}

    def function(workspace, *arguments):
        simulated(MX, 8, False, folder)(workspace, *arguments)
        results.update({name: workspace[piece.offset :][: piece.num_bytes].clone() for name, piece in slices.items()})

    call(case, kwargs, 8, do_finalize=False, function=function)  # so x is not overwritten
    num_tiles = results["num_tiles"].view(torch.int32)[0]
    rows_of_tile = results["tile_rows"].view(torch.int32)[:num_tiles]
    assert num_tiles > 4 and (rows_of_tile <= 2).sum() > 3
    for operand, flags, width in (("x", "x_outside", case.hidden_size), ("z", "z_outside", case.intermediate_size)):
        rows = results[operand].view(torch.bfloat16).view(-1, 8, layout.padded(width))
        is_outside = results[flags].view(torch.int32).view(-1, 2)
        for tile in range(num_tiles):
            live = rows_of_tile[tile].item()
            if live > layout.THIN_ROWS:
                continue
            plain = in_column_order(rows[tile, :live])
            stored = rows[tile, 2:4].flatten().unflatten(0, (-1, 4, 2, 4, 8))
            expected = columns_of(torch.cat([plain, plain])[:2] * 2.0**94).unflatten(0, (-1, 4, 2, 4, 8))
            assert torch.equal(stored[:, :, :live], expected[:, :, :live])
            magnitudes = plain.float().abs()
            has_outside = ((magnitudes != 0) & ((magnitudes < 2.0**-95) | (magnitudes >= 2.0**33))).any(1)
            assert torch.equal(is_outside[tile, :live] != 0, has_outside), (operand, tile)


@needs_tvm
def test_thin_tiles_and_no_others_are_multiplied_so(folder):
    """With a wrong factor they are wrong; of tokens outside of the window none is."""
    assert SIMULATED["m8"] == (MX, 8, False)
    case = case_of(num_experts=64)  # hardly a tile of three rows
    kwargs = make_case(case)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(thin_tiles, "BEFORE_SCALE", thin_rows.BEFORE_SCALE * 4)
        symbol, source = source_of(MX, 8)
    compile_so(simulate.host_source(source), folder / "wrong_factor.so")
    function = tvm_ffi.load_module(str(folder / "wrong_factor.so"))[symbol]
    run = functools.partial(call, case, tile_m=8, do_finalize=True, function=function)
    assert rel_l2(run(kwargs)[0], moe_ref(**kwargs)[0]) > 0.5
    kwargs["hidden_states"][:, 0] = 2.0**-100  # x is outside of the window, and by the next lines z
    kwargs["output1_scale_scalar"] = torch.full((case.num_experts,), 2.0**90)
    shift_scales(kwargs["gemm2_weights_scale"], -90)
    assert rel_l2(run(kwargs)[0], moe_ref(**kwargs)[0]) < 1e-3
