# SPDX-License-Identifier: Apache-2.0
"""FP4 and FP8 block formats in torch: encode, decode, pack; on any device, any leading dimensions.

nvfp4: e2m1, blocks of 16, e4m3 block scale, one global factor. mxfp4: e2m1, blocks of 32, ue8m0 scale. mxfp8: e4m3,
blocks of 32, ue8m0 scale. Sources: OCP MX v1.0 (e2m1, e4m3, ue8m0), operator-semantics 1.1 (rounding, scales).
"""

import torch

from tvmmoe.errors import DtypeError, ShapeError

E2M1_MAX = 6.0
E4M3_MAX = 448.0
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
# (midpoint, whether the midpoint itself rounds up): ties go to the even code.
_E2M1_STEPS = ((0.25, False), (0.75, True), (1.25, False), (1.75, True), (2.5, False), (3.5, True), (5.0, False))
_FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def encode_e2m1(x: torch.Tensor) -> torch.Tensor:
    """Nearest e2m1 code (uint8, 0..15) of every element: ties to the even code, saturating at 6, -0 kept."""
    magnitude = x.float().abs()
    code = torch.signbit(x).to(torch.uint8) << 3
    for midpoint, is_included in _E2M1_STEPS:
        code += magnitude >= midpoint if is_included else magnitude > midpoint
    return code


def decode_e2m1(codes: torch.Tensor) -> torch.Tensor:
    """float32 value of every e2m1 code (uint8, 0..15)."""
    return torch.tensor(E2M1_VALUES, device=codes.device)[codes.int()]


def pack_e2m1(codes: torch.Tensor) -> torch.Tensor:
    """Two codes a byte along the last dimension, even index in the low nibble."""
    if codes.shape[-1] % 2:
        raise ShapeError(f"codes: got last dimension {codes.shape[-1]}, expected an even number")
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack_e2m1(packed: torch.Tensor) -> torch.Tensor:
    """Inverse of :func:`pack_e2m1`: uint8 codes, last dimension doubled."""
    if packed.dtype != torch.uint8:
        raise DtypeError(f"packed: got {packed.dtype}, expected torch.uint8")
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)


def encode_e4m3(x: torch.Tensor) -> torch.Tensor:
    """Nearest float8_e4m3fn, ties to even, saturating at 448; NaN stays NaN."""
    return x.float().clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def decode_ue8m0(byte: torch.Tensor) -> torch.Tensor:
    """2^(byte - 127) as float32; byte 0 is the subnormal 2^-127, 255 is NaN."""
    code = byte.view(torch.uint8).int()
    pattern = torch.where(code == 0, 1 << 22, code << 23)
    return torch.where(code == 255, 0x7FC00000, pattern).view(torch.float32)


def ue8m0_ceil(x: torch.Tensor) -> torch.Tensor:
    """Smallest byte (uint8, 0..254) whose scale is at least ``x``, a non-negative float32; 0 gives byte 0."""
    pattern = x.float().contiguous().view(torch.int32)
    byte = (pattern >> 23) + ((pattern & 0x7FFFFF) != 0)
    return torch.where(pattern <= 1 << 22, 0, byte).clamp(max=254).to(torch.uint8)


def _blocks(name: str, x: torch.Tensor, block: int) -> torch.Tensor:
    """float32 ``x`` with its last dimension split into blocks."""
    if x.dtype not in _FLOATS:
        raise DtypeError(f"{name}: got {x.dtype}, expected torch.bfloat16, torch.float16 or torch.float32")
    if x.dim() == 0 or x.shape[-1] % block:
        raise ShapeError(f"{name}: got shape {tuple(x.shape)}, expected a last dimension that is a multiple of {block}")
    return x.float().unflatten(-1, (x.shape[-1] // block, block))


def _scale_bytes(values: torch.Tensor, scale: torch.Tensor, num_columns: int, block: int) -> torch.Tensor:
    """The scale as uint8, after checking that it belongs to ``values``."""
    if scale.dtype not in (torch.uint8, torch.float8_e8m0fnu, torch.float8_e4m3fn):
        raise DtypeError(f"scale: got {scale.dtype}, expected uint8, float8_e8m0fnu or float8_e4m3fn bytes")
    expected = (*values.shape[:-1], num_columns // block)
    if num_columns % block or tuple(scale.shape) != expected:
        raise ShapeError(f"scale: got shape {tuple(scale.shape)}, expected {expected} (blocks of {block})")
    return scale.contiguous().view(torch.uint8)


def _nonzero(x: torch.Tensor) -> torch.Tensor:
    """``x`` with 1 in place of 0: a divisor for blocks whose quotient is multiplied by 0."""
    return torch.where(x == 0, torch.ones((), device=x.device), x)


def nvfp4_global_scale(x: torch.Tensor, dim: int | tuple[int, ...] | None = None) -> torch.Tensor:
    """Encode factor 448 * 6 / amax(x) that uses the full range of the block scales; 1 for an all-zero tensor.

    ``dim`` reduces over those dimensions only: ``dim=(-2, -1)`` gives one factor per expert.
    """
    amax = x.abs().float().amax() if dim is None else x.abs().amax(dim).float()
    return torch.where(amax == 0, torch.ones_like(amax), E4M3_MAX * E2M1_MAX / _nonzero(amax))


def quantize_nvfp4(x: torch.Tensor, global_scale: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize rows to nvfp4, 16 values per block.

    Parameters
    ----------
    x : float [..., columns]
        columns a multiple of 16.
    global_scale : float32, broadcastable to the leading dimensions, optional
        Encode factor g, see :func:`nvfp4_global_scale`; None is 1.

    Returns
    -------
    values : uint8 [..., columns // 2]
        Two e2m1 per byte, even column in the low nibble.
    block_scale : float8_e4m3fn [..., columns // 16]
        e4m3(g * amax(block) / 6); x ~ values * block_scale / g.
    """
    blocks = _blocks("x", x, 16)
    if global_scale is not None:
        factor = global_scale.float()
        while 0 < factor.dim() < blocks.dim() and factor.numel() > 1:
            factor = factor.unsqueeze(-1)
        blocks = blocks * factor
    scale = encode_e4m3(blocks.abs().amax(-1) / E2M1_MAX)
    decoded = scale.float()[..., None]
    codes = encode_e2m1(torch.where(decoded == 0, 0.0, blocks / _nonzero(decoded)).flatten(-2))
    return pack_e2m1(codes), scale


def dequantize_nvfp4(
    values: torch.Tensor, block_scale: torch.Tensor, global_scale: torch.Tensor | None = None
) -> torch.Tensor:
    """float32 values of nvfp4 rows, divided by the encode factor ``global_scale`` if one is given."""
    codes = unpack_e2m1(values)
    scale = _scale_bytes(values, block_scale, codes.shape[-1], 16).view(torch.float8_e4m3fn).float()
    decoded = (decode_e2m1(codes).unflatten(-1, (codes.shape[-1] // 16, 16)) * scale[..., None]).flatten(-2)
    return decoded if global_scale is None else decoded / global_scale


def quantize_nvfp4_per_token(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """nvfp4 with a factor of its own per row: ``values``, ``block_scale`` and ``per_token_scale`` = amax(row) / (448 * 6).

    x ~ values * block_scale * per_token_scale. A row of zeros gives zeros throughout.
    """
    blocks = _blocks("x", x, 16)
    per_token = (
        blocks.abs().flatten(-2).amax(-1) / (E4M3_MAX * E2M1_MAX) if x.numel() else blocks.new_zeros(x.shape[:-1])
    )
    row = _nonzero(per_token)[..., None]
    scale = encode_e4m3(blocks.abs().amax(-1) / E2M1_MAX / row)
    divisor = _nonzero(scale.float() * row)[..., None]
    return pack_e2m1(encode_e2m1((blocks / divisor).flatten(-2))), scale, per_token


def quantize_mxfp4(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize rows to mxfp4: packed e2m1 [..., columns/2] and ue8m0 bytes (uint8) [..., columns/32].

    Scale 2^ceil(log2(amax / 6)): no value of a block saturates. A zero block has byte 0 and codes 0.
    """
    blocks = _blocks("x", x, 32)
    scale = ue8m0_ceil(blocks.abs().amax(-1) / E2M1_MAX)
    codes = encode_e2m1((blocks / decode_ue8m0(scale)[..., None]).flatten(-2))
    return pack_e2m1(codes), scale


def dequantize_mxfp4(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """float32 values of mxfp4 rows."""
    codes = unpack_e2m1(values)
    factor = decode_ue8m0(_scale_bytes(values, scale, codes.shape[-1], 32))
    return (decode_e2m1(codes).unflatten(-1, (codes.shape[-1] // 32, 32)) * factor[..., None]).flatten(-2)


def quantize_mxfp8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize rows to mxfp8: float8_e4m3fn [..., columns] and ue8m0 bytes (uint8) [..., columns/32]."""
    blocks = _blocks("x", x, 32)
    scale = ue8m0_ceil(blocks.abs().amax(-1) / E4M3_MAX)
    return encode_e4m3((blocks / decode_ue8m0(scale)[..., None]).flatten(-2)), scale


def dequantize_mxfp8(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """float32 values of mxfp8 rows."""
    if values.dtype != torch.float8_e4m3fn:
        raise DtypeError(f"values: got {values.dtype}, expected torch.float8_e4m3fn")
    factor = decode_ue8m0(_scale_bytes(values, scale, values.shape[-1], 32))
    return (values.float().unflatten(-1, (values.shape[-1] // 32, 32)) * factor[..., None]).flatten(-2)
