# SPDX-License-Identifier: Apache-2.0
"""GEMMs of one row of tokens (sm90a/single_row.py) keep what float32 does: every exponent of tokens, z and scales, in a sum.

Simulated on the CPU, and on a Hopper GPU.
"""

import pytest
import torch
from test_sm90a import BASE, FEW_TOKENS, HAS_TVM, MX, NV, call, on_hopper, simulated, workspace_slices

from tvmmoe.reference import moe_ref
from tvmmoe.testing import Case, make_case, poison, rel_l2

MACHINES = [
    pytest.param("cpu", marks=pytest.mark.skipif(not HAS_TVM, reason="needs tvm to build kernels")),
    pytest.param("cuda", marks=on_hopper),
]
SIZES = dict(hidden_size=544, intermediate_size=416, num_experts=8, top_k=2)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("simulated_rows")


def output_of(case: Case, kwargs: dict, device: str, folder, workspace=None, early: bool = True) -> torch.Tensor:
    """The kernels' output, on the CPU."""
    function = simulated(case.weight_format, 8, early, folder) if device == "cpu" else None
    kwargs = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in kwargs.items()}
    return call(case, kwargs, 8, do_finalize=True, function=function, workspace=workspace)[0].cpu()


def shift_scales(scales: torch.Tensor, exponents) -> None:
    """Multiply UE8M0 scales by 2^exponents, one for each block of K or for all."""
    codes = scales.view(torch.uint8)
    codes.copy_((codes.int() + exponents).clamp(0, 254))


def spread_blocks(case: Case, spread: int, z_exponent: int) -> dict:
    """Arguments whose blocks of 32 columns are 2^-spread to 2^spread times what they would be, z 2^z_exponent times, and
    scales as much the other way."""
    kwargs = make_case(case)
    exponents = torch.randint(-spread, spread + 1, (case.hidden_size // 32,), generator=torch.Generator().manual_seed(7))
    tokens = kwargs["hidden_states"].float().view(case.num_tokens, -1, 32)
    kwargs["hidden_states"] = torch.ldexp(tokens, exponents[:, None]).view(case.num_tokens, -1).bfloat16()
    assert kwargs["hidden_states"].isfinite().all()
    shift_scales(kwargs["gemm1_weights_scale"], -exponents.int())
    kwargs["output1_scale_scalar"] = torch.full((case.num_experts,), 2.0**z_exponent)
    shift_scales(kwargs["gemm2_weights_scale"], -z_exponent)
    return kwargs


def odd_scales(case: Case, code: int, z_exponent: int) -> tuple[dict, torch.Tensor]:
    """Arguments with scale bytes ``code`` for some columns of the output, and which those are."""
    kwargs = make_case(case)
    kwargs["output1_scale_scalar"] = torch.full((case.num_experts,), 2.0**z_exponent)
    columns = torch.arange(case.hidden_size) % 5 == 0
    kwargs["gemm2_weights_scale"].view(torch.uint8)[:, columns] = code
    return kwargs, columns


@pytest.mark.parametrize("device", MACHINES)
@pytest.mark.parametrize("z_exponent", [-90, 0, 90])
@pytest.mark.parametrize("num_tokens", [1, 3])
def test_tokens_of_all_exponents_add_up(num_tokens, z_exponent, device, folder):
    case = Case(**vars(BASE) | SIZES | dict(num_tokens=num_tokens))
    kwargs = spread_blocks(case, 110, z_exponent)
    expected = moe_ref(**kwargs)[0]
    assert expected.isfinite().all() and expected.any()
    assert rel_l2(output_of(case, kwargs, device, folder), expected) < 1e-3


@pytest.mark.parametrize("device", MACHINES)
@pytest.mark.parametrize("code, z_exponent", [(0, 20), (1, 20), (128, 0), (129, 0), (251, -20), (252, -20), (255, 0)])
def test_scales_of_all_exponents(code, z_exponent, device, folder):
    """Of some columns of the output: 2^-127 is subnormal, 2^125 the largest whose weights are finite in float32, 255 NaN."""
    case = Case(**vars(BASE) | SIZES | dict(num_tokens=1))
    kwargs, columns = odd_scales(case, code, z_exponent)
    expected = moe_ref(**kwargs)[0]
    assert expected[:, ~columns].isfinite().all() and (expected[:, columns].isnan().all() == (code == 255))
    torch.testing.assert_close(output_of(case, kwargs, device, folder), expected, rtol=2e-2, atol=0, equal_nan=True)


@pytest.mark.parametrize("device", MACHINES)
@pytest.mark.parametrize("weight_format", [MX, NV], ids=["mxfp4", "nvfp4"])
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), 3e38, 1e-38, 1e-40])
def test_tokens_that_are_no_usual_numbers(value, weight_format, device, folder):
    """One of a token's columns; the token beside it stays as it is."""
    case = Case(**vars(BASE) | SIZES | dict(num_tokens=2, weight_format=weight_format))
    kwargs = make_case(case)
    kwargs["hidden_states"][1, 77] = value
    expected, actual = moe_ref(**kwargs)[0], output_of(case, kwargs, device, folder)
    assert torch.equal(actual.isnan(), expected.isnan())
    assert rel_l2(actual[:1], expected[:1]) < 1e-3
    if abs(value) < 1:
        assert rel_l2(actual[1:], expected[1:]) < 1e-3


USED = (
    "topk_ids", "expert_weights", "expanded_idx_to_permuted_idx", "num_tiles", "claims", "z_blocks", "few_x", "few_z",
    "gemm2_output",
)  # fmt: skip


@pytest.mark.parametrize("device", MACHINES)
@pytest.mark.parametrize(
    "name", ["two_tokens", "three_tokens", "four_tokens", "top_32", "most_pairs", "one_expert", "hardly_ours", "mxfp8_odd"]
)
def test_nothing_else_of_the_workspace_is_written(name, device, folder):
    """What lies between the slices that a call of few tokens uses, and behind the last, is as it was."""
    case = Case(**vars(BASE) | FEW_TOKENS[name])
    slices, size = workspace_slices(case, 8)
    workspace = poison(torch.empty(size + 4096, dtype=torch.uint8, device=device))
    before = workspace.cpu().clone()
    kwargs = make_case(case)
    actual = output_of(case, kwargs, device, folder, workspace)
    assert rel_l2(actual, moe_ref(**kwargs)[0]) < 1e-3
    is_kept = torch.ones(len(before), dtype=torch.bool)
    for slice_name in USED:
        piece = slices[slice_name]
        is_kept[piece.offset : piece.offset + piece.num_bytes] = False
    after = workspace.cpu()
    assert not torch.equal(after[~is_kept], before[~is_kept])
    assert torch.equal(after[is_kept], before[is_kept])
