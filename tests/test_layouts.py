# SPDX-License-Identifier: Apache-2.0
"""Layouts against a literal transcription of the formulas, and every inverse."""

import pytest
import torch

from tvmmoe import ShapeError, layouts


def offset(r, c, padded_columns):
    return (r // 128) * 128 * padded_columns + (c // 4) * 512 + (r % 32) * 16 + ((r % 128) // 32) * 4 + c % 4


@pytest.mark.parametrize("rows, columns", [(128, 4), (256, 12), (100, 5), (130, 90)])
def test_128x4_matches_the_formula(rows, columns):
    scale = torch.randint(1, 256, (2, rows, columns), dtype=torch.uint8)
    swizzled = layouts.to_128x4(scale)
    padded = (columns + 3) // 4 * 4
    index = torch.tensor([[offset(r, c, padded) for c in range(columns)] for r in range(rows)])
    assert torch.equal(swizzled[:, index], scale)
    assert int((swizzled != 0).sum()) == scale.numel()  # padding is zero
    assert torch.equal(layouts.from_128x4(swizzled, rows, columns), scale)


@pytest.mark.parametrize("is_gated", [False, True])
def test_row_permutation_matches_the_formula(is_gated):
    rows = 256
    expected = []
    for n in range(rows):
        s = 32 * (n // 32) + 4 * (n % 8) + (n % 32) // 8
        expected.append(s // 2 + (s % 2) * (rows // 2) if is_gated else s)
    assert layouts.flashinfer_row_permutation(rows, is_gated).tolist() == expected


@pytest.mark.parametrize("is_gated", [False, True])
def test_flashinfer_round_trip(is_gated):
    weights = torch.randint(0, 256, (3, 256, 64), dtype=torch.uint8)
    scale = torch.randint(0, 127, (3, 256, 8), dtype=torch.uint8).view(torch.float8_e4m3fn)
    bias = torch.randn(3, 256)
    there = layouts.to_flashinfer(weights, scale, bias, is_gated=is_gated)
    assert there[1].shape == scale.shape and not torch.equal(there[0], weights)
    back = layouts.from_flashinfer(*there, is_gated=is_gated)
    assert torch.equal(back[0], weights) and torch.equal(back[2], bias)
    assert torch.equal(back[1].view(torch.uint8), scale.view(torch.uint8))


def test_gate_up_orders():
    gate, up = torch.arange(4), torch.arange(10, 14)
    plain = torch.cat((up, gate))[None]
    assert torch.equal(layouts.swap_gate_up(torch.cat((gate, up))[None]), plain)
    interleaved = torch.stack((gate, up), 1).flatten()[None]
    assert torch.equal(layouts.deinterleave_gate_up(interleaved), plain)
    assert torch.equal(layouts.interleave_gate_up(plain), interleaved)


def test_refusals():
    with pytest.raises(ShapeError, match="swizzled: got 500 bytes"):
        layouts.from_128x4(torch.zeros(500, dtype=torch.uint8), 128, 4)
    with pytest.raises(ShapeError, match="rows: got 40"):
        layouts.flashinfer_row_permutation(40, False)
    with pytest.raises(ShapeError, match="even number"):
        layouts.swap_gate_up(torch.zeros(1, 3))
