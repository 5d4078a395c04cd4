# SPDX-License-Identifier: Apache-2.0
"""Layouts of weights and scales: FlashInfer's shuffled and swizzled ones to plain row-major and back.

Row order of gemm1 (plain): ``[up: 0 .. I-1, gate: I .. 2I-1]``. Formulas: operator-semantics 2.2 to 2.4.

    128x4 swizzle: byte (r, c) of a tile of 128 rows x 4 columns lies at (r % 32) * 16 + (r // 32) * 4 + c
    row shuffle:   row n of the shuffled matrix is row S(n) of the plain one, S(n) = 32*(n//32) + 4*(n%8) + (n%32)//8
    gated gemm1:   S is followed by the interleave G(m) = m//2 + (m%2)*I: even rows up, odd rows gate
"""

import torch

from tvmmoe.errors import ShapeError

TILE_ROWS = 128
TILE_COLUMNS = 4


def _round_up(value: int, multiple: int) -> int:
    return (value + multiple - 1) // multiple * multiple


def to_128x4(scale: torch.Tensor) -> torch.Tensor:
    """Swizzle a scale matrix [..., rows, columns] of one-byte elements.

    Returns
    -------
    Tensor [..., ceil(rows / 128) * 128 * ceil(columns / 4) * 4]
        Flat; padding bytes are 0.
    """
    rows, columns = scale.shape[-2:]
    padded = torch.zeros(
        *scale.shape[:-2],
        _round_up(rows, TILE_ROWS),
        _round_up(columns, TILE_COLUMNS),
        dtype=torch.uint8,
        device=scale.device,
    )
    padded[..., :rows, :columns] = scale.view(torch.uint8)
    tiles = padded.unflatten(-2, (-1, 4, 32)).unflatten(-1, (-1, 4))  # [row tile, r // 32, r % 32, column tile, c]
    return tiles.movedim(-2, -4).transpose(-3, -2).flatten(-5).contiguous().view(scale.dtype)


def from_128x4(swizzled: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Inverse of :func:`to_128x4`: a matrix [..., rows, columns] from the last dimension's padded bytes."""
    padded_rows, padded_columns = _round_up(rows, TILE_ROWS), _round_up(columns, TILE_COLUMNS)
    if swizzled.shape[-1] != padded_rows * padded_columns:
        raise ShapeError(
            f"swizzled: got {swizzled.shape[-1]} bytes a matrix, expected {padded_rows * padded_columns} "
            f"(rows={rows} padded to {padded_rows}, columns={columns} padded to {padded_columns})"
        )
    tiles = swizzled.view(torch.uint8).unflatten(-1, (padded_rows // 128, padded_columns // 4, 32, 4, 4))
    plain = tiles.transpose(-3, -2).movedim(-4, -2)  # [row tile, r // 32, r % 32, column tile, c]
    return plain.flatten(-2).flatten(-4, -2)[..., :rows, :columns].contiguous().view(swizzled.dtype)


def flashinfer_row_permutation(rows: int, is_gated: bool, epilogue_tile_m: int = 128) -> torch.Tensor:
    """int64 [rows]: ``src`` with shuffled = plain[src], for gemm1 (``is_gated`` as the activation) or gemm2 (False)."""
    if epilogue_tile_m not in (64, 128):
        raise ShapeError(f"epilogue_tile_m: got {epilogue_tile_m}, expected 64 or 128")
    block = 32 if epilogue_tile_m == 128 else 16
    if rows % block:
        raise ShapeError(f"rows: got {rows}, expected a multiple of {block}")
    n = torch.arange(rows)
    source = block * (n // block) + (block // 8) * (n % 8) + (n % block) // 8
    return source // 2 + (source % 2) * (rows // 2) if is_gated else source


def to_flashinfer(
    weights: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None, *, is_gated: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Plain weights [E, rows, K/2], scales [E, rows, columns] and bias [E, rows] to what FlashInfer takes.

    rows must be a multiple of 128, columns of 4: FlashInfer's scale tensor has no room for padding.
    """
    rows, columns = scale.shape[-2:]
    if rows % TILE_ROWS or columns % TILE_COLUMNS:
        raise ShapeError(f"scale: got {rows} x {columns} a matrix, expected multiples of {TILE_ROWS} x {TILE_COLUMNS}")
    source = flashinfer_row_permutation(rows, is_gated).to(weights.device)
    swizzled = to_128x4(scale.view(torch.uint8)[:, source]).view(scale.dtype)
    return weights[:, source], swizzled.unflatten(-1, (rows, columns)), None if bias is None else bias[:, source]


def from_flashinfer(
    weights: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None, *, is_gated: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Inverse of :func:`to_flashinfer`: shuffled and swizzled tensors to plain row-major."""
    rows, columns = scale.shape[-2:]
    source = flashinfer_row_permutation(rows, is_gated).to(weights.device)
    inverse = torch.argsort(source)
    plain_scale = from_128x4(scale.view(torch.uint8).flatten(-2), rows, columns)[:, inverse].view(scale.dtype)
    return weights[:, inverse], plain_scale, None if bias is None else bias[:, inverse]


def _halves(x: torch.Tensor, dim: int) -> int:
    if x.shape[dim] % 2:
        raise ShapeError(f"x: got {x.shape[dim]} rows, expected an even number (two halves)")
    return x.shape[dim] // 2


def swap_gate_up(x: torch.Tensor, dim: int = 1) -> torch.Tensor:
    """[gate; up] rows to [up; gate], or back: weights, scales or biases, rows along ``dim``."""
    return (
        x.view(torch.uint8).roll(_halves(x, dim), dim).view(x.dtype)
        if x.itemsize == 1
        else x.roll(_halves(x, dim), dim)
    )


def deinterleave_gate_up(x: torch.Tensor, dim: int = 1) -> torch.Tensor:
    """Interleaved rows (gpt-oss: even gate, odd up) to [up; gate]."""
    index = torch.arange(2 * _halves(x, dim), device=x.device)
    return _take(x, torch.cat((index[1::2], index[0::2])), dim)


def interleave_gate_up(x: torch.Tensor, dim: int = 1) -> torch.Tensor:
    """Inverse of :func:`deinterleave_gate_up`."""
    half = _halves(x, dim)
    index = torch.arange(half, device=x.device)
    return _take(x, torch.stack((index + half, index), dim=1).flatten(), dim)


def _take(x: torch.Tensor, index: torch.Tensor, dim: int) -> torch.Tensor:
    """index_select that also takes torch's float8 dtypes."""
    return x.view(torch.uint8).index_select(dim, index).view(x.dtype) if x.itemsize == 1 else x.index_select(dim, index)
