# SPDX-License-Identifier: Apache-2.0
"""finalize adds a token's slots in ascending order from 0: where rows cancel, any other order gives another sum."""

import importlib.util

import pytest
import torch
from test_requantize import kernel_alone

from tvmmoe import abi
from tvmmoe.kernels.sm90a import layout
from tvmmoe.reference import finalize_ref

needs_tvm = pytest.mark.skipif(importlib.util.find_spec("tvm") is None, reason="needs tvm to build kernels")
# In bfloat16 numbers; as float32, 2^30 + 1 is 2^30.
LARGE = 2.0**30
ROWS_OF_Y = [LARGE, -LARGE, 1.0, 18.0, 3.0, -LARGE, LARGE]
SLOTS = torch.tensor([[0, 1, 2, 3], [-1, 5, 6, 4], [3, 2, -1, -1]], dtype=torch.int32)  # rows, -1: another rank's
SUMS = [LARGE - LARGE + 1 + 18, 3.0, 19.0]
BACKWARDS = [0.0, 0.0, 19.0]  # 18 + 1 - 2^30 is -2^30
H = 64


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    """gemm2_output and weights of 1."""
    y = torch.tensor(ROWS_OF_Y)[:, None].repeat(1, H).bfloat16()
    return y, torch.ones(SLOTS.shape, dtype=torch.bfloat16)


def expected(sums: list[float]) -> torch.Tensor:
    return torch.tensor(sums)[:, None].repeat(1, H).bfloat16()


def test_reference_adds_in_ascending_order():
    y, weights = inputs()
    assert torch.equal(finalize_ref(y, weights, SLOTS.flatten()), expected(SUMS))
    backwards = finalize_ref(y, weights, SLOTS.flip(1).contiguous().flatten())
    assert torch.equal(backwards, expected(BACKWARDS)), "the order does not matter here, so the test shows nothing"


@needs_tvm
def test_cpu_adds_in_ascending_order():
    from test_cpu_stages import runner

    y, weights = inputs()
    output = torch.empty(len(SLOTS), H, dtype=torch.bfloat16)
    runner("scheduled")("finalize", y, weights, SLOTS, output)
    assert torch.equal(output, expected(SUMS))


@needs_tvm
def test_hopper_adds_in_ascending_order(tmp_path):
    """The kernel that all CUDA targets have, on this CPU."""
    from tvmmoe.kernels.sm90a.finalize import finalize

    (y, weights), (num_tokens, top_k) = inputs(), SLOTS.shape
    output = torch.empty(num_tokens, H, dtype=torch.bfloat16)
    workspace = torch.zeros(layout.slices(num_tokens, top_k, H, 32, 16, 8)[1], dtype=torch.uint8)
    tensors = dict(gemm2_output=y, expert_weights=weights, expanded_idx_to_permuted_idx=SLOTS, output=output)
    pointers = dict.fromkeys(abi.POINTERS, 0) | {name: tensor.data_ptr() for name, tensor in tensors.items()}
    ints = dict(num_tokens=num_tokens, top_k=top_k, hidden_size=H, output_hidden_size=H, intermediate_size=32)
    ints |= dict(num_experts=16, local_num_experts=16, do_finalize=1)
    function = kernel_alone("finalize_moe_m8", finalize, tmp_path / "finalize.so")
    function(workspace, *pointers.values(), *[ints.get(name, 0) for name in abi.INTS], 1.0)
    assert torch.equal(output, expected(SUMS))
