# SPDX-License-Identifier: Apache-2.0
"""Element encodings e2m1, e4m3, ue8m0 and the block formats nvfp4, mxfp4, mxfp8 made of them, in torch.

=======  =======  =====  ===========  =====================================================
format   element  block  block scale  value
=======  =======  =====  ===========  =====================================================
nvfp4    e2m1     16     e4m3         e2m1 * e4m3 / global_scale, or * per_token_scale
mxfp4    e2m1     32     ue8m0        e2m1 * 2^(byte - 127)
mxfp8    e4m3     32     ue8m0        e4m3 * 2^(byte - 127)
=======  =======  =====  ===========  =====================================================

Blocks run along the last dimension. Rounding is to nearest, ties to the even code, saturating. Arithmetic is float32
with true quotients, the same on the CPU and on CUDA. Formats: OCP MX v1.0; scale rules: FlashInfer's encoders, without
their approximate reciprocals, so a block whose largest magnitude is exactly full scale may get another byte there.
"""

from collections.abc import Callable, Iterator

import torch

from tvmmoe.errors import ArgumentError, DtypeError, ShapeError
from tvmmoe.refusals import describe

E2M1_MAX = 6.0
E4M3_MAX = 448.0
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)  # by code

NVFP4_BLOCK = 16
MX_BLOCK = 32

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
BYTES = tuple(getattr(torch, name) for name in ("uint8", "float8_e4m3fn", "float8_e8m0fnu") if hasattr(torch, name))

# Elements that are worked on at a time. On the CPU the float32 copy of a part stays in L2.
CPU_PART = 1 << 20
CUDA_PART = 1 << 24


# Elements


def encode_e2m1(x: torch.Tensor) -> torch.Tensor:
    """Round to the nearest e2m1 code.

    Parameters
    ----------
    x : float32, bfloat16 or float16 [...]

    Returns
    -------
    codes : uint8 [...]
        Index into ``E2M1_VALUES``. Ties go to the even code, magnitudes above 5 to 6; -0 stays -0, NaN becomes 0.

    Raises
    ------
    DtypeError
    """
    _check_dtype("x", x, FLOATS)
    a = x.float().abs()
    codes = (a > 0.25).to(torch.uint8)
    codes += a >= 0.75
    codes += a > 1.25
    codes += a >= 1.75
    codes += a > 2.5
    codes += a >= 3.5
    codes += a > 5
    return codes + (torch.signbit(x).to(torch.uint8) << 3)


def decode_e2m1(codes: torch.Tensor) -> torch.Tensor:
    """Values of e2m1 codes.

    Parameters
    ----------
    codes : uint8 [...]
        One per byte; the upper four bits are ignored.

    Returns
    -------
    x : float32 [...]

    Raises
    ------
    DtypeError
    """
    _check_dtype("codes", codes, (torch.uint8,))
    codes = codes.to(torch.int16)
    # The same bits s|ee|m as float16 (exponent bias 15 instead of 1), subnormals included.
    half = ((codes & 8) << 12 | (codes & 7) << 9).view(torch.float16)
    return half.float() * 2.0**14


def pack_e2m1(codes: torch.Tensor) -> torch.Tensor:
    """Two codes per byte, even column in the low nibble.

    Parameters
    ----------
    codes : uint8 [..., columns]
        The upper four bits are ignored; ``columns`` even.

    Returns
    -------
    packed : uint8 [..., columns // 2]

    Raises
    ------
    DtypeError, ShapeError
    """
    _check_dtype("codes", codes, (torch.uint8,))
    _check_columns("codes", codes, 2)
    return (codes[..., 0::2] & 0xF) | (codes[..., 1::2] << 4)


def unpack_e2m1(packed: torch.Tensor) -> torch.Tensor:
    """Inverse of :func:`pack_e2m1`: uint8 [..., columns // 2] to codes uint8 [..., columns]."""
    _check_dtype("packed", packed, (torch.uint8,))
    _check_columns("packed", packed, 1)
    return torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2)


@torch.no_grad()
def encode_e4m3(x: torch.Tensor) -> torch.Tensor:
    """Round to the nearest e4m3 number.

    Parameters
    ----------
    x : float32, bfloat16 or float16 [...]

    Returns
    -------
    y : float8_e4m3fn [...]
        Ties to even, saturated to +-448 (infinities too); -0 stays -0, NaN stays NaN.

    Raises
    ------
    DtypeError
    """
    _check_dtype("x", x, FLOATS)
    # Without the clamp torch < 2.13 makes NaN of what is above 464.
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def decode_e4m3(codes: torch.Tensor) -> torch.Tensor:
    """float32 values of e4m3 bytes (float8_e4m3fn, or a uint8 or float8_e8m0fnu view); 0x7f and 0xff are NaN."""
    _check_dtype("codes", codes, BYTES)
    return codes.view(torch.float8_e4m3fn).float()


def decode_ue8m0(codes: torch.Tensor) -> torch.Tensor:
    """Values of ue8m0 bytes.

    Parameters
    ----------
    codes : uint8, or a float8_e8m0fnu or float8_e4m3fn view [...]

    Returns
    -------
    scale : float32 [...]
        2^(byte - 127), exact; byte 0 is the subnormal 2^-127, byte 255 is NaN.

    Raises
    ------
    DtypeError
    """
    _check_dtype("codes", codes, BYTES)
    codes = codes.view(torch.uint8).int()
    bits = torch.where(codes == 0, 1 << 22, codes << 23)
    return torch.where(codes == 255, 0x7FC00000, bits).view(torch.float32)


def ue8m0_ceil(x: torch.Tensor) -> torch.Tensor:
    """Smallest ue8m0 byte whose scale is not below ``x``.

    Parameters
    ----------
    x : float32, bfloat16 or float16 [...]

    Returns
    -------
    codes : uint8 [...]
        From the exponent bits, so exact: powers of two map to themselves. 0 (and below) gives byte 0; what is above
        2^127, +inf included, gives 254; NaN gives 255.

    Raises
    ------
    DtypeError
    """
    _check_dtype("x", x, FLOATS)
    x = x.float()
    bits = x.view(torch.int32)
    codes = torch.where(bits <= 1 << 22, 0, (bits + 0x7FFFFF) >> 23).clamp(max=254)
    return torch.where(x.isnan(), 255, codes).to(torch.uint8)


# Block formats


@torch.no_grad()
def nvfp4_global_scale(x: torch.Tensor, dim: int | tuple[int, ...] | None = None) -> torch.Tensor:
    """The factor that makes nvfp4 use the full range of its block scales: 448 * 6 / amax.

    Parameters
    ----------
    x : float32, bfloat16 or float16 [...]
    dim : int or tuple of int, optional
        Dimensions that share a factor; (-2, -1) gives one for every expert. None: all.

    Returns
    -------
    global_scale : float32, the shape of ``x`` without ``dim``
        Positive, finite, and so is its inverse: at most 2^126, 1 where everything is zero. NaN where ``x`` has a NaN.

    Raises
    ------
    DtypeError
    """
    _check_dtype("x", x, FLOATS)
    amax = _row_amax(x, tuple(range(x.dim())) if dim is None else dim).float().clamp(max=torch.finfo(torch.float32).max)
    factor = torch.full_like(amax, E4M3_MAX * E2M1_MAX) / amax
    return torch.where(amax == 0, 1.0, factor.clamp(max=2.0**126))


@torch.no_grad()
def quantize_nvfp4(
    x: torch.Tensor, global_scale: torch.Tensor | float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise to nvfp4, 16 values per block.

    Parameters
    ----------
    x : float32, bfloat16 or float16 [..., columns]
        ``columns`` a multiple of 16. Read in parts: the temporaries of a large tensor are small.
    global_scale : float32 of one element or of leading dimensions of ``x``, or float, optional
        The encode factor g, 448 * 6 / amax for full range: :func:`nvfp4_global_scale`. [E] is one for every expert of
        x [E, rows, columns]. None is 1.

    Returns
    -------
    values : uint8 [..., columns // 2]
        Two e2m1 per byte, even column in the low nibble; e2m1(g * x / block_scale), 0 where the block scale is 0.
    block_scale : float8_e4m3fn [..., columns // 16]
        e4m3(g * amax(block) / 6), saturated to 448; linear layout (see :func:`tvmmoe.layouts.to_128x4`). A block with a
        NaN has scale NaN.

    Raises
    ------
    ArgumentError, DtypeError, ShapeError

    Notes
    -----
    x ~ e2m1 * block_scale / g. The operator is never told g: its output scales contain 1 / g.
    """
    blocks = _blocks("x", x, NVFP4_BLOCK)
    factor = _block_factor(global_scale, x, len(blocks))

    def encode(part: slice) -> tuple[torch.Tensor, torch.Tensor]:
        block = blocks[part].float()
        if factor is not None:
            block = block * factor[part]
        scale = encode_e4m3(_divide(_amax(block), E2M1_MAX))
        return _encode_packed(block / _zero_to_inf(scale.float())), scale

    return _quantize(encode, x, blocks, torch.uint8, torch.float8_e4m3fn)


@torch.no_grad()
def quantize_nvfp4_per_token(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantise to nvfp4 with a float32 factor for every row.

    Parameters
    ----------
    x : float32, bfloat16 or float16 [..., columns]
        ``columns`` a multiple of 16.

    Returns
    -------
    values : uint8 [..., columns // 2]
        Two e2m1 per byte, even column in the low nibble; e2m1(x / (block_scale * per_token_scale)).
    block_scale : float8_e4m3fn [..., columns // 16]
        e4m3((amax(block) / 6) / per_token_scale).
    per_token_scale : float32 [...]
        amax(row) / (448 * 6); a row of zeros is 0 in all three results.

    Raises
    ------
    DtypeError, ShapeError

    Notes
    -----
    x ~ ``dequantize_nvfp4(values, block_scale) * per_token_scale[..., None]``.
    """
    blocks = _blocks("x", x, NVFP4_BLOCK)
    per_token_scale = _divide(_row_amax(x, -1).float(), E4M3_MAX * E2M1_MAX)
    factor = per_token_scale.reshape(-1, 1).repeat_interleave(x.shape[-1] // NVFP4_BLOCK, dim=0)

    def encode(part: slice) -> tuple[torch.Tensor, torch.Tensor]:
        block, p = blocks[part].float(), factor[part]
        scale = encode_e4m3(_divide(_amax(block), E2M1_MAX) / _zero_to_inf(p))
        return _encode_packed(block / _zero_to_inf(scale.float() * p)), scale

    return *_quantize(encode, x, blocks, torch.uint8, torch.float8_e4m3fn), per_token_scale


@torch.no_grad()
def dequantize_nvfp4(
    values: torch.Tensor, block_scale: torch.Tensor, global_scale: torch.Tensor | float | None = None
) -> torch.Tensor:
    """Values of nvfp4: e2m1 * block_scale / global_scale.

    Parameters
    ----------
    values : uint8 [..., columns // 2]
        Two e2m1 per byte, even column in the low nibble.
    block_scale : float8_e4m3fn, or a uint8 or float8_e8m0fnu view [..., columns // 16]
    global_scale : float32 of one element or of leading dimensions of ``values``, or float, optional
        As given to :func:`quantize_nvfp4`; None is 1, then every value is exact.

    Returns
    -------
    x : float32 [..., columns]

    Raises
    ------
    ArgumentError, DtypeError, ShapeError
    """
    scale = _decode_scale(values, torch.uint8, block_scale, NVFP4_BLOCK)
    factor = _block_factor(global_scale, values, len(scale))
    decode_packed = _packed_decoder(values, NVFP4_BLOCK)

    def decode(part: slice) -> torch.Tensor:
        block = decode_packed(part) * scale[part]
        return block if factor is None else block / factor[part]

    return _dequantize(decode, values, scale, NVFP4_BLOCK)


@torch.no_grad()
def quantize_mxfp4(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise to mxfp4, 32 values per block.

    Parameters
    ----------
    x : float32, bfloat16 or float16 [..., columns]
        ``columns`` a multiple of 32. Read in parts: the temporaries of a large tensor are small.

    Returns
    -------
    values : uint8 [..., columns // 2]
        Two e2m1 per byte, even column in the low nibble.
    block_scale : uint8 [..., columns // 32]
        ue8m0 bytes of 2^ceil(log2(amax(block) / 6)), linear layout; 0 for a block of zeros, 255 for one with a NaN.
        ``.view(torch.float8_e8m0fnu)`` or ``.view(torch.float8_e4m3fn)`` at will.

    Raises
    ------
    DtypeError, ShapeError
    """
    return _quantize_mx(x, E2M1_MAX, _encode_packed, torch.uint8)


@torch.no_grad()
def dequantize_mxfp4(values: torch.Tensor, block_scale: torch.Tensor) -> torch.Tensor:
    """Values of mxfp4: e2m1 * 2^(byte - 127).

    Parameters
    ----------
    values : uint8 [..., columns // 2]
        Two e2m1 per byte, even column in the low nibble.
    block_scale : uint8, or a float8_e8m0fnu or float8_e4m3fn view [..., columns // 32]
        ue8m0 bytes, whatever the dtype says.

    Returns
    -------
    x : float32 [..., columns]
        Exact; above 1.5 * 2^127 infinite.

    Raises
    ------
    DtypeError, ShapeError
    """
    scale = _decode_scale(values, torch.uint8, block_scale, MX_BLOCK)
    decode_packed = _packed_decoder(values, MX_BLOCK)
    return _dequantize(lambda part: decode_packed(part) * scale[part], values, scale, MX_BLOCK)


@torch.no_grad()
def quantize_mxfp8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise to mxfp8, 32 values per block.

    Parameters
    ----------
    x : float32, bfloat16 or float16 [..., columns]
        ``columns`` a multiple of 32.

    Returns
    -------
    values : float8_e4m3fn [..., columns]
    block_scale : uint8 [..., columns // 32]
        ue8m0 bytes of 2^ceil(log2(amax(block) / 448)), linear layout; 0 for a block of zeros, 255 for one with a NaN.

    Raises
    ------
    DtypeError, ShapeError
    """
    return _quantize_mx(x, E4M3_MAX, encode_e4m3, torch.float8_e4m3fn)


@torch.no_grad()
def dequantize_mxfp8(values: torch.Tensor, block_scale: torch.Tensor) -> torch.Tensor:
    """Values of mxfp8: e4m3 * 2^(byte - 127).

    Parameters
    ----------
    values : float8_e4m3fn [..., columns]
    block_scale : uint8, or a float8_e8m0fnu or float8_e4m3fn view [..., columns // 32]
        ue8m0 bytes, whatever the dtype says.

    Returns
    -------
    x : float32 [..., columns]
        Exact unless infinite.

    Raises
    ------
    DtypeError, ShapeError
    """
    scale = _decode_scale(values, torch.float8_e4m3fn, block_scale, MX_BLOCK)
    blocks = values.reshape(-1, MX_BLOCK)
    return _dequantize(lambda part: decode_e4m3(blocks[part]) * scale[part], values, scale, MX_BLOCK)


# Blocks, in parts


def _parts(num_blocks: int, block_size: int, device: torch.device) -> Iterator[slice]:
    step = max(1, (CPU_PART if device.type == "cpu" else CUDA_PART) // block_size)
    return (slice(start, start + step) for start in range(0, num_blocks, step))


def _quantize(
    encode: Callable[[slice], tuple[torch.Tensor, torch.Tensor]],
    x: torch.Tensor,
    blocks: torch.Tensor,
    values_dtype: torch.dtype,
    scale_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Elements and scales of all blocks, in the shape of ``x`` but for the last dimension."""
    num_blocks, block_size = blocks.shape
    width = block_size // 2 if values_dtype == torch.uint8 else block_size
    values = torch.empty(num_blocks, width, dtype=values_dtype, device=x.device)
    scale = torch.empty(num_blocks, 1, dtype=scale_dtype, device=x.device)
    for part in _parts(num_blocks, block_size, x.device):
        values[part], scale[part] = encode(part)
    *rows, columns = x.shape
    return values.view(*rows, columns // block_size * width), scale.view(*rows, columns // block_size)


def _quantize_mx(
    x: torch.Tensor, maximum: float, encode_elements: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks of 32 under 2^ceil(log2(amax / maximum)), ``maximum`` the largest value of the element format."""
    blocks = _blocks("x", x, MX_BLOCK)

    def encode(part: slice) -> tuple[torch.Tensor, torch.Tensor]:
        block = blocks[part].float()
        scale = ue8m0_ceil(_divide(_amax(block), maximum))
        return encode_elements(block / decode_ue8m0(scale)), scale

    return _quantize(encode, x, blocks, dtype, torch.uint8)


def _dequantize(
    decode: Callable[[slice], torch.Tensor], values: torch.Tensor, scale: torch.Tensor, block_size: int
) -> torch.Tensor:
    out = torch.empty(len(scale), block_size, dtype=torch.float32, device=values.device)
    for part in _parts(len(scale), block_size, values.device):
        out[part] = decode(part)
    return out.view(*values.shape[:-1], _columns(values))


def _encode_packed(x: torch.Tensor) -> torch.Tensor:
    return pack_e2m1(encode_e2m1(x))


def _packed_decoder(values: torch.Tensor, block_size: int) -> Callable[[slice], torch.Tensor]:
    """Decoder of a range of blocks, by a table of what the two codes of a byte mean."""
    blocks = values.reshape(-1, block_size // 2)
    pairs = decode_e2m1(unpack_e2m1(torch.arange(256, dtype=torch.uint8, device=values.device)[:, None]))
    return lambda part: pairs.index_select(0, blocks[part].flatten().int()).view(-1, block_size)


def _columns(values: torch.Tensor) -> int:
    """Elements in a row, two per byte if packed."""
    return values.shape[-1] * (2 if values.dtype == torch.uint8 else 1)


def _amax(blocks: torch.Tensor) -> torch.Tensor:
    return blocks.abs().amax(-1, keepdim=True)


def _row_amax(x: torch.Tensor, dim: int | tuple[int, ...]) -> torch.Tensor:
    """x.abs().amax(dim) without a copy of ``x``; 0 if there is nothing."""
    if x.numel() == 0:
        return x.sum(dim)
    return torch.maximum(x.amax(dim).abs(), x.amin(dim).abs())


def _divide(x: torch.Tensor, divisor: float) -> torch.Tensor:
    """x / divisor rounded once; for a Python number torch on CUDA multiplies by the rounded reciprocal."""
    return x / torch.full((), divisor, dtype=torch.float32, device=x.device)


def _zero_to_inf(divisor: torch.Tensor) -> torch.Tensor:
    """The divisor, with inf for 0 so that the quotient is 0."""
    return torch.where(divisor == 0, torch.inf, divisor)


# Checks


def _check_dtype(name: str, tensor: object, dtypes: tuple[torch.dtype, ...]) -> None:
    if not isinstance(tensor, torch.Tensor) or tensor.dtype not in dtypes:
        expected = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise DtypeError(f"{name}: got {describe(tensor)}, expected {expected}")


def _check_columns(name: str, tensor: torch.Tensor, multiple: int) -> None:
    if tensor.dim() == 0 or tensor.shape[-1] == 0 or tensor.shape[-1] % multiple:
        raise ShapeError(f"{name}: got {describe(tensor)}, expected a last dimension that is a multiple of {multiple}")


def _blocks(name: str, x: torch.Tensor, block_size: int) -> torch.Tensor:
    """[num_blocks, block_size] of a float tensor."""
    _check_dtype(name, x, FLOATS)
    _check_columns(name, x, block_size)
    return x.reshape(-1, block_size)


def _decode_scale(values: torch.Tensor, dtype: torch.dtype, block_scale: torch.Tensor, block_size: int) -> torch.Tensor:
    """Block scales as float32 [num_blocks, 1]: e4m3 for blocks of 16, ue8m0 for blocks of 32."""
    _check_dtype("values", values, (dtype,))
    _check_columns("values", values, block_size // 2 if dtype == torch.uint8 else block_size)
    _check_dtype("block_scale", block_scale, BYTES)
    expected = [*values.shape[:-1], _columns(values) // block_size]
    if list(block_scale.shape) != expected:
        hint = f"{expected} (values {list(values.shape)}, blocks of {block_size}, linear layout)"
        raise ShapeError(f"block_scale: got {describe(block_scale)}, expected {hint}")
    _check_device("block_scale", block_scale, values)
    return (decode_e4m3 if block_size == NVFP4_BLOCK else decode_ue8m0)(block_scale).reshape(-1, 1)


def _check_device(name: str, tensor: torch.Tensor, other: torch.Tensor) -> None:
    if tensor.device != other.device:
        raise ArgumentError(f"{name}: got a tensor on {tensor.device}, expected {other.device}")


def _block_factor(global_scale: torch.Tensor | float | None, x: torch.Tensor, num_blocks: int) -> torch.Tensor | None:
    """float32 [num_blocks, 1] for the blocks of ``x``, packed or not; None is None."""
    if global_scale is None:
        return None
    if isinstance(global_scale, float | int):
        return torch.full((1, 1), global_scale, dtype=torch.float32, device=x.device).expand(num_blocks, 1)
    _check_dtype("global_scale", global_scale, (torch.float32,))
    _check_device("global_scale", global_scale, x)
    if global_scale.numel() == 1:
        return global_scale.reshape(1, 1).expand(num_blocks, 1)
    if global_scale.dim() >= x.dim() or global_scale.shape != x.shape[: global_scale.dim()]:
        expected = f"one element or leading dimensions of {describe(x)}"
        raise ShapeError(f"global_scale: got {describe(global_scale)}, expected {expected}")
    return global_scale.reshape(-1, 1).repeat_interleave(num_blocks // max(1, global_scale.numel()), dim=0)
