# SPDX-License-Identifier: Apache-2.0
"""Layouts of weights, scales and biases: FlashInfer's and those of checkpoints to the plain row-major one, and back.

Plain is what the operator takes. gemm1 has ``f * I`` rows, gemm2 H, and every tensor is [E_loc, rows, ...]:

    gated gemm1      plain   [up 0 .. I-1 | gate 0 .. I-1]                up = w3, gate = w1
    [gate; up]               [gate 0 .. I-1 | up 0 .. I-1]                swap_gate_up
    interleaved              [gate 0, up 0, gate 1, up 1, ..]             deinterleave_gate_up (gpt-oss)

FlashInfer takes row n = plain row src(n), of weights, scales and biases alike, for epilogue_tile_m = 128 (64):

    S(n) = 32*(n div 32) + 4*(n mod 8) + (n mod 32) div 8          (64: 16*(n div 16) + 2*(n mod 8) + (n mod 16) div 8)
    G(m) = m div 2 + (m mod 2)*I                                   even rows up, odd rows gate
    src  = G(S(n)) for a gated gemm1, S(n) for everything else

           n     0  1  2 ..  7 |  8  9 .. 15 | 16 .. 23 | 24 .. 31 | 32 ..
        S(n)     0  4  8 .. 28 |  1  5 .. 29 |  2 .. 30 |  3 .. 31 | 32 ..

and then swizzles scales by tiles of 128 rows x 4 columns, padded with 0 to whole tiles. A tile is 512 consecutive
bytes; tiles run along the columns first (Cp: padded columns):

    offset(r, c) = (r div 128)*128*Cp + (c div 4)*512 + (r mod 32)*16 + ((r mod 128) div 32)*4 + c mod 4

        byte of a tile     0 .. 3    4 .. 7    8 .. 11   12 .. 15   16 .. 19   ..   508 .. 511
        row, columns 0-3   0         32        64        96         1          ..   127
"""

import torch
import torch.nn.functional as F

from tvmmoe.errors import ArgumentError, DtypeError, ShapeError
from tvmmoe.refusals import describe

TILE_ROWS = 128
TILE_COLUMNS = 4
GROUP_ROWS = 32  # of a tile: rows r, r + 32, r + 64, r + 96 share 16 bytes


# Scales


def to_128x4(block_scale: torch.Tensor) -> torch.Tensor:
    """Swizzle scale bytes, every matrix of the last two dimensions by itself.

    Parameters
    ----------
    block_scale : any one-byte dtype [..., rows, columns]

    Returns
    -------
    swizzled : same dtype [..., R * C]
        R and C are rows and columns rounded up to 128 and 4; padding is 0.

    Raises
    ------
    DtypeError, ShapeError
    """
    _check_bytes("block_scale", block_scale)
    if block_scale.dim() < 2 or 0 in block_scale.shape[-2:]:
        raise ShapeError(f"block_scale: got {describe(block_scale)}, expected [..., rows, columns], both at least 1")
    rows, columns = block_scale.shape[-2:]
    padded = F.pad(block_scale.view(torch.uint8), (0, -columns % TILE_COLUMNS, 0, -rows % TILE_ROWS))
    # [row tile, group of 32, row, column tile, column] -> [row tile, column tile, row, group of 32, column]
    tiles = padded.unflatten(-1, (-1, TILE_COLUMNS)).unflatten(-3, (-1, TILE_ROWS // GROUP_ROWS, GROUP_ROWS))
    return tiles.transpose(-4, -2).flatten(-5).view(block_scale.dtype)


def from_128x4(swizzled: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Inverse of :func:`to_128x4`.

    Parameters
    ----------
    swizzled : any one-byte dtype [..., R * C], [..., R, C] or [..., R / 128, C / 4, 32, 4, 4]
        R and C are rows and columns rounded up to 128 and 4. FlashInfer's scales are [E_loc, R, C].
    rows, columns : int
        Of one scale matrix without padding.

    Returns
    -------
    block_scale : same dtype [..., rows, columns]

    Raises
    ------
    ArgumentError, DtypeError, ShapeError
    """
    _check_bytes("swizzled", swizzled)
    for name, value in (("rows", rows), ("columns", columns)):
        if value < 1:
            raise ArgumentError(f"{name}: got {value}, expected at least 1")
    grid = -(-rows // TILE_ROWS), -(-columns // TILE_COLUMNS)
    padded = grid[0] * TILE_ROWS, grid[1] * TILE_COLUMNS
    tile = GROUP_ROWS, TILE_ROWS // GROUP_ROWS, TILE_COLUMNS
    shape = tuple(swizzled.shape)
    for form in ((padded[0] * padded[1],), padded, (*grid, *tile)):
        if shape[-len(form) :] == form:
            tiles = swizzled.view(torch.uint8).reshape(*shape[: -len(form)], *grid, *tile)
            plain = tiles.transpose(-4, -2).flatten(-5, -3).flatten(-2)
            return plain[..., :rows, :columns].contiguous().view(swizzled.dtype)
    expected = f"[..., {padded[0] * padded[1]}] or [..., {padded[0]}, {padded[1]}]"
    raise ShapeError(f"swizzled: got {describe(swizzled)}, expected {expected} (padded rows={rows}, columns={columns})")


# FlashInfer's row order


def flashinfer_row_permutation(rows: int, is_gated: bool, epilogue_tile_m: int = 128) -> torch.Tensor:
    """Plain row that each row of FlashInfer's tensors is.

    Parameters
    ----------
    rows : int
        A multiple of 32 (16 for ``epilogue_tile_m`` 64).
    is_gated : bool
        True for gemm1 with a gated activation, whose rows are [up; gate]; False for any other gemm1 and for gemm2.
    epilogue_tile_m : int
        128, or 64, which no FP4 kernel of FlashInfer uses.

    Returns
    -------
    src : int64 [rows], on the CPU
        shuffled = plain[src].

    Raises
    ------
    ArgumentError
    """
    block = _shuffle_block(epilogue_tile_m)
    if rows < 1 or rows % block:
        raise ArgumentError(f"rows: got {rows}, expected a multiple of {block} for epilogue_tile_m={epilogue_tile_m}")
    n = torch.arange(rows)
    src = block * (n // block) + block // 8 * (n % 8) + n % block // 8
    return src // 2 + src % 2 * (rows // 2) if is_gated else src


def shuffle_rows(x: torch.Tensor, is_gated: bool, dim: int = 1, epilogue_tile_m: int = 128) -> torch.Tensor:
    """Plain rows to FlashInfer's order.

    Parameters
    ----------
    x : [E_loc, rows, ...]
        Packed weights, linear scales (before :func:`to_128x4`) or a bias; any dtype.
    is_gated, epilogue_tile_m
        See :func:`flashinfer_row_permutation`.
    dim : int, optional
        Dimension of the rows, 1 if not given; of one expert's weights or scales, which look like a bias of all, it must be.

    Returns
    -------
    shuffled : like ``x``

    Raises
    ------
    ArgumentError, ShapeError
    """
    return _take(x, _permutation_of(x, is_gated, dim, epilogue_tile_m), dim)


def unshuffle_rows(x: torch.Tensor, is_gated: bool, dim: int = 1, epilogue_tile_m: int = 128) -> torch.Tensor:
    """Inverse of :func:`shuffle_rows`."""
    return _take(x, torch.argsort(_permutation_of(x, is_gated, dim, epilogue_tile_m)), dim)


def _permutation_of(x: torch.Tensor, is_gated: bool, dim: int, epilogue_tile_m: int) -> torch.Tensor:
    return flashinfer_row_permutation(
        _check_rows("x", x, dim, _shuffle_block(epilogue_tile_m)), is_gated, epilogue_tile_m
    )


def _shuffle_block(epilogue_tile_m: int) -> int:
    """Rows that S permutes among themselves."""
    if epilogue_tile_m not in (64, 128):
        raise ArgumentError(f"epilogue_tile_m: got {epilogue_tile_m}, expected 64 or 128")
    return epilogue_tile_m // 4


def to_flashinfer(
    weights: torch.Tensor, block_scale: torch.Tensor, bias: torch.Tensor | None = None, *, is_gated: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """One GEMM's tensors from plain to the layout that FlashInfer's operator takes.

    Parameters
    ----------
    weights : uint8 [E_loc, rows, K / 2]
        ``rows`` a multiple of 128.
    block_scale : scale bytes [E_loc, rows, columns]
        Linear; ``columns`` a multiple of 4, because FlashInfer's tensor has no room for padding.
    bias : float32 [E_loc, rows], optional
        Values stay as they are: FlashInfer's unit is ours.
    is_gated : bool
        True for gemm1 with a gated activation, False for any other gemm1 and for gemm2.

    Returns
    -------
    weights, block_scale, bias : shapes and dtypes as given
        Rows shuffled, scales also swizzled. FlashInfer wants ``block_scale.view(torch.float8_e4m3fn)`` in all formats.

    Raises
    ------
    DtypeError, ShapeError
    """
    _check_gemm(weights, block_scale, bias)
    swizzled = to_128x4(shuffle_rows(block_scale, is_gated)).view(block_scale.shape)
    return shuffle_rows(weights, is_gated), swizzled, None if bias is None else shuffle_rows(bias, is_gated)


def from_flashinfer(
    weights: torch.Tensor, block_scale: torch.Tensor, bias: torch.Tensor | None = None, *, is_gated: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Inverse of :func:`to_flashinfer`: shuffled and swizzled tensors, same shapes, to plain."""
    _check_gemm(weights, block_scale, bias)
    linear = unshuffle_rows(from_128x4(block_scale, *block_scale.shape[1:]), is_gated)
    return unshuffle_rows(weights, is_gated), linear, None if bias is None else unshuffle_rows(bias, is_gated)


# Orders of gate and up


def swap_gate_up(x: torch.Tensor, dim: int | None = None) -> torch.Tensor:
    """[gate; up] to [up; gate], or back.

    Parameters
    ----------
    x : [E_loc, rows, ...]
        Weights, linear scales or a bias of gemm1; any dtype.
    dim : int, optional
        Dimension of the rows, 1 if not given; of one expert's weights or scales, which look like a bias of all, it must be.

    Returns
    -------
    swapped : like ``x``

    Raises
    ------
    DtypeError, ShapeError
        The number of rows is odd.
    """
    dim = _rows_of(x, dim)
    half = _check_rows("x", x, dim, 2) // 2
    return _take(x, torch.arange(2 * half).roll(half), dim)


def deinterleave_gate_up(x: torch.Tensor, dim: int | None = None) -> torch.Tensor:
    """Interleaved rows, 2i = gate and 2i + 1 = up as in gpt-oss, to [up; gate]; arguments of :func:`swap_gate_up`."""
    dim = _rows_of(x, dim)
    rows = torch.arange(_check_rows("x", x, dim, 2))
    return _take(x, torch.cat((rows[1::2], rows[0::2])), dim)


def interleave_gate_up(x: torch.Tensor, dim: int | None = None) -> torch.Tensor:
    """[up; gate] to interleaved rows, 2i = gate and 2i + 1 = up; inverse of :func:`deinterleave_gate_up`."""
    dim = _rows_of(x, dim)
    up, gate = torch.arange(_check_rows("x", x, dim, 2)).chunk(2)
    return _take(x, torch.stack((gate, up), dim=1).flatten(), dim)


def _rows_of(x: object, dim: int | None) -> int:
    """Dimension of the rows of gemm1 in ``x``."""
    if dim is None and isinstance(x, torch.Tensor) and x.dim() == 2 and x.element_size() == 1:
        expected = "[local_num_experts, rows, columns], or dim=0 for the rows of one expert"
        raise ShapeError(f"x: got {describe(x)}, expected {expected}")
    return 1 if dim is None else dim


def _take(x: torch.Tensor, index: torch.Tensor, dim: int) -> torch.Tensor:
    """x.index_select, for the one-byte floats too."""
    index = index.to(x.device)
    if x.element_size() == 1:
        return x.view(torch.uint8).index_select(dim, index).view(x.dtype)
    return x.index_select(dim, index)


# Checks


def _check_tensor(name: str, x: object) -> None:
    if not isinstance(x, torch.Tensor):
        raise DtypeError(f"{name}: got {describe(x)}, expected a tensor")


def _check_bytes(name: str, x: object) -> None:
    if not isinstance(x, torch.Tensor) or x.element_size() != 1:
        raise DtypeError(f"{name}: got {describe(x)}, expected uint8, float8_e4m3fn or float8_e8m0fnu")


def _check_rows(name: str, x: object, dim: int, multiple: int) -> int:
    """Number of rows."""
    _check_tensor(name, x)
    if not -x.dim() <= dim < x.dim():
        raise ShapeError(f"{name}: got {describe(x)}, expected rows in dimension {dim}")
    if x.shape[dim] == 0 or x.shape[dim] % multiple:
        expected = f"a multiple of {multiple} rows in dimension {dim}"
        raise ShapeError(f"{name}: got {describe(x)}, expected {expected}")
    return x.shape[dim]


def _check_gemm(weights: object, block_scale: object, bias: object) -> None:
    _check_tensor("weights", weights)
    if weights.dim() != 3:
        raise ShapeError(f"weights: got {describe(weights)}, expected [local_num_experts, rows, columns/2]")
    _check_rows("weights", weights, 1, TILE_ROWS)
    experts, rows = weights.shape[:2]
    _check_bytes("block_scale", block_scale)
    if block_scale.dim() != 3 or block_scale.shape[:2] != (experts, rows) or block_scale.shape[2] % TILE_COLUMNS:
        expected = f"[{experts}, {rows}, a multiple of {TILE_COLUMNS}]"
        raise ShapeError(f"block_scale: got {describe(block_scale)}, expected {expected}")
    if bias is not None:
        _check_tensor("bias", bias)
        if bias.shape != (experts, rows):
            raise ShapeError(f"bias: got {describe(bias)}, expected [{experts}, {rows}]")
