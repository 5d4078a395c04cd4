# SPDX-License-Identifier: Apache-2.0
"""The text of refused calls: argument, got, expected, and a hint where a usual mistake is recognisable.

Each ``refuse_*`` looks again, check by check, at what a conjunction in :mod:`tvmmoe.arguments` did not let pass.
"""

import functools
import math
from collections.abc import Iterable
from enum import Enum
from typing import Any, NoReturn

import torch

from tvmmoe.config import MAX_EXPERTS, MAX_SIZE, MAX_TOP_K, ActivationType, RoutingMethodType
from tvmmoe.errors import ArgumentError, DtypeError, ShapeError, UnsupportedError

SIZE_MULTIPLE = 32  # of hidden_size and intermediate_size
FLOAT32_MAX = torch.finfo(torch.float32).max

BF16 = frozenset((torch.bfloat16,))
FLOAT32 = frozenset((torch.float32,))
FLOATS = frozenset((torch.float32, torch.bfloat16))
INT16 = frozenset((torch.int16,))
PACKED = frozenset((torch.uint8,))
E2M1_PAIR = getattr(torch, "float4_e2m1fn_x2", torch.int8)  # torch 2.6 has neither this
E8M0 = getattr(torch, "float8_e8m0fnu", torch.uint8)  # nor this
SCALE_BYTES = frozenset((torch.uint8, torch.float8_e4m3fn, E8M0))

# Hopper's kernels read weights by TMA and hidden_states in 16-byte words; 8 is a K block of nvfp4 scales. The scales of
# hidden_states are read byte by byte, so that any slice of tokens may be passed.
ALIGNMENT = {
    "hidden_states": 16,
    "gemm1_weights": 16,
    "gemm1_weights_scale": 8,
    "gemm2_weights": 16,
    "gemm2_weights_scale": 8,
    "output": 16,
}

_OTHER_ACTIVATIONS = {0: "Gelu", 1: "Relu", 2: "Silu", 5: "SwigluBias", 8: "GegluTanh", 10: "SiTU"}  # of FlashInfer
_NVFP4_SCALES = "nvfp4 hidden_states need all three output scales"
_REQUIRED_WHEN = {
    "hidden_states_scale": "only bfloat16 hidden_states come without; per-tensor fp8 is not supported",
    "output1_scale_scalar": _NVFP4_SCALES,
    "output1_scale_gate_scalar": _NVFP4_SCALES,
    "output2_scale_scalar": _NVFP4_SCALES,
}


@functools.cache
def has_memory(kind: type) -> bool:
    """Whether a tensor class is plain memory: FakeTensor and DTensor, which dispatch operators themselves, are not."""
    return issubclass(kind, torch.Tensor) and kind.__torch_dispatch__ is torch.Tensor.__torch_dispatch__


def is_tensor(value: Any) -> bool:
    """Whether ``value`` can be an argument: plain memory, or a FakeTensor that stands for it."""
    if has_memory(type(value)):
        return not value.is_nested
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(value, FakeTensor)


def _short(value: float) -> str:
    return repr(value) if abs(value) < 2**64 or isinstance(value, float) else f"{value.bit_length()} bits"


def _dtype_name(dtype: torch.dtype | torch.layout) -> str:
    return str(dtype).removeprefix("torch.")


def describe(value: Any) -> str:
    """A tensor as ``uint8 [8, 1024, 512]``; None, a number or a bool by value; anything else by type."""
    if value is None:
        return "None"
    if isinstance(value, bool | int | float):
        return f"{type(value).__name__} {_short(value)}"
    if not isinstance(value, torch.Tensor):
        kind = type(value)
        return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__.split('.')[0]}.{kind.__name__}"
    prefix = "" if is_tensor(value) else f"{type(value).__name__} "
    if value.layout is not torch.strided:
        prefix += f"{_dtype_name(value.layout)} "
    return f"{prefix}{_dtype_name(value.dtype)} {'[...]' if value.is_nested else list(value.shape)}"


# Options


def refuse_options(
    num_experts: Any,
    top_k: Any,
    n_group: Any,
    topk_group: Any,
    intermediate_size: Any,
    local_expert_offset: Any,
    local_num_experts: Any,
    routed_scaling_factor: Any,
    do_finalize: Any,
    enable_pdl: Any,
    tune_max_num_tokens: Any,
    norm_topk_prob: Any,
) -> None:
    """Raise for the first wrong one; returns if ``routed_scaling_factor`` is merely an int."""
    require_int("num_experts", num_experts, 1, MAX_EXPERTS)
    require_int("top_k", top_k, 1, min(MAX_TOP_K, num_experts), f"min({MAX_TOP_K}, num_experts)=")
    require_int("local_num_experts", local_num_experts, 1, num_experts, "num_experts=")
    last = num_experts - local_num_experts
    require_int("local_expert_offset", local_expert_offset, 0, last, "num_experts-local_num_experts=")
    require_int("intermediate_size", intermediate_size, 1, MAX_SIZE)
    if intermediate_size % SIZE_MULTIPLE:
        raise ArgumentError(f"intermediate_size: got {intermediate_size}, expected a multiple of {SIZE_MULTIPLE}")
    require_int("tune_max_num_tokens", tune_max_num_tokens, 1)
    for name, value in (("n_group", n_group), ("topk_group", topk_group)):
        if value is not None:
            require_int(name, value, 0, or_none=" or None")
    for name, value in (("do_finalize", do_finalize), ("norm_topk_prob", norm_topk_prob)):
        if type(value) is not bool:
            raise DtypeError(f"{name}: got {describe(value)}, expected bool")
    if enable_pdl is not None and type(enable_pdl) is not bool:
        raise DtypeError(f"enable_pdl: got {describe(enable_pdl)}, expected bool or None")
    if type(routed_scaling_factor) not in (float, int):
        raise DtypeError(f"routed_scaling_factor: got {describe(routed_scaling_factor)}, expected float or None")
    if not -FLOAT32_MAX <= routed_scaling_factor <= FLOAT32_MAX:
        got = _short(routed_scaling_factor)
        raise ArgumentError(f"routed_scaling_factor: got {got}, expected a finite float32 or None")


def require_int(
    name: str, value: Any, low: int, high: int | None = None, high_is: str = "", or_none: str = ""
) -> None:
    if type(value) is not int:
        raise DtypeError(f"{name}: got {describe(value)}, expected int{or_none}")
    if value < low or (high is not None and value > high):
        upper = "or more" if high is None else f"... {high_is}{high}"
        raise ArgumentError(f"{name}: got {_short(value)}, expected {low} {upper}{or_none}")


def routing_method(value: Any) -> RoutingMethodType:
    """The member of a foreign enum's value; raises for anything else but a member or its int."""
    expected = ", ".join(f"{method.name}={int(method)}" for method in RoutingMethodType)
    return _member("routing_method_type", RoutingMethodType, value, expected, {10: "Unspecified"})


def activation_type(value: Any) -> ActivationType:
    """The same for an activation."""
    expected = ", ".join(f"{activation.name}={int(activation)}" for activation in ActivationType) + " (or 9)"
    return _member("activation_type", ActivationType, value, expected, _OTHER_ACTIVATIONS)


def _member(name: str, enum: type[Any], value: Any, expected: str, others: dict[int, str]) -> Any:
    """Names must agree, too: 7 is SwigluStep in FlashInfer's enum, 6 is Custom in vLLM's routing methods."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise DtypeError(f"{name}: got {describe(value)}, expected int or enum, one of {expected}")
    other = value.name if isinstance(value, Enum) else others.get(value)
    try:
        member = enum(int(value))
    except ValueError:
        member = None
    if member is not None and (other is None or other.lower() == member.name.lower()):
        return member
    error, suffix = (ArgumentError, "") if other is None else (UnsupportedError, f" ({other})")
    raise error(f"{name}: got {_short(int(value))}{suffix}, expected one of {expected}")


# Tensors


def refuse_tensor(
    name: str,
    tensor: Any,
    dtypes: frozenset[torch.dtype],
    shape: tuple[int, ...],
    device: torch.device,
    labels: tuple[str, ...],
    nominal: tuple[int, ...],
    note: str,
) -> None:
    """Raise for the first check that fails; returns for a tensor subclass (FakeTensor, say) that passes all.

    ``labels``, ``nominal`` and ``note`` describe the expected shape; ``shape`` may be within its limits.
    """
    names = " or ".join(sorted(map(_dtype_name, dtypes)))
    sizes = ", ".join(f"{label}={size}" for label, size in zip(labels, nominal, strict=True))
    expected = f"{names} [{sizes}]{note}"
    if tensor is None and name in _REQUIRED_WHEN:
        raise ArgumentError(f"{name}: got None, expected {expected} ({_REQUIRED_WHEN[name]})")
    if not is_tensor(tensor):
        hint = " (precomputed expert ids are not taken)" if name == "routing_logits" and tensor is None else ""
        raise DtypeError(f"{name}: got {describe(tensor)}, expected {expected}{hint}")
    got = describe(tensor)
    if tensor.layout is not torch.strided:
        raise DtypeError(f"{name}: got {got}, expected {expected}")
    if tensor.dtype not in dtypes:
        raise DtypeError(f"{name}: got {got}, expected {expected}{_dtype_hint(tensor.dtype, dtypes)}")
    if tensor.shape != shape:
        raise ShapeError(f"{name}: got {got}, expected {expected}{_shape_hint(name, tuple(tensor.shape), shape)}")
    if tensor.device != device:
        raise ArgumentError(f"{name}: got a tensor on {tensor.device}, expected {device} as hidden_states")
    if not tensor.is_contiguous():
        raise ArgumentError(not_contiguous(name, tensor))


def refuse_freed(tensors: dict[str, torch.Tensor | None]) -> NoReturn:
    """Blame the first that has elements and no memory."""
    name, tensor = next((name, t) for name, t in tensors.items() if t is not None and not t.data_ptr())
    raise ArgumentError(f"{name}: got {describe(tensor)} whose storage is freed, expected memory")


def not_contiguous(name: str, tensor: torch.Tensor) -> str:
    """Message for strides that are not those of a row-major tensor."""
    strides = list(tensor.stride())
    return f"{name}: got {describe(tensor)} with strides {strides}, expected contiguous (call .contiguous())"


def _dtype_hint(dtype: torch.dtype, dtypes: Iterable[torch.dtype]) -> str:
    if dtypes is FLOAT32 and dtype.is_floating_point:
        return " (call .float())"
    if dtypes is PACKED or dtypes is SCALE_BYTES:
        if dtype in (torch.int8, E2M1_PAIR):
            return " (call .view(torch.uint8))"
        if dtypes is PACKED and dtype.is_floating_point:
            return " (not quantized? two e2m1 codes per byte, see tvmmoe.numerics)"
        if dtype.is_floating_point:
            return " (encoded scale bytes, see tvmmoe.numerics)"
    return ""


def _shape_hint(name: str, got: tuple[int, ...], want: tuple[int, ...]) -> str:
    """The usual mistake behind a shape, or nothing."""
    if name in ("hidden_states_scale", "gemm1_weights_scale", "gemm2_weights_scale"):
        hint = _scale_hint(got, want)
        if hint:
            return hint
    if name in ("gemm1_weights", "gemm2_weights"):
        if got == (*want[:-1], 2 * want[-1]):
            return " (unpacked? two e2m1 codes per byte)"
        if got == (want[0], 2 * want[2], want[1]):
            return " (transposed and unpacked?)"
    same_rank = len(got) == len(want)
    if same_rank and got != want and got == (*want[:-2], *want[:-3:-1]):
        return " (transposed?)"
    if name.startswith("gemm1_") and same_rank and len(got) > 1 and got[0] == want[0] and got[2:] == want[2:]:
        if got[1] == 2 * want[1]:
            return " (a gated activation has 2*intermediate_size rows, this one not)"
        if 2 * got[1] == want[1]:
            return " (a gated activation has [up; gate] rows)"
    if math.prod(got) == math.prod(want):
        return f" (call .view({', '.join(map(str, want))}) if the order is that)"
    if got in ((), (1,)) and len(want) == 1:
        return f" (one value for all? .expand({want[0]}).contiguous())"
    if same_rank and got[1:] == want[1:]:
        if name == "routing_bias":
            return " (routing is over the experts of all ranks)"
        if name.startswith(("gemm", "output1", "output2")):
            return " (one entry per expert of this rank)"
    return ""


def _scale_hint(got: tuple[int, ...], want: tuple[int, ...]) -> str:
    """Swizzled, flattened, or of the other block size."""
    *experts, rows, columns = want
    count, num_experts = math.prod(got), math.prod(experts)
    if count == 0:
        return ""
    block_sizes = (columns, 2 * columns, columns // 2)  # the expected one, half of it, twice of it
    for candidate in block_sizes:
        padded = num_experts * (-(-rows // 128) * 128) * (-(-candidate // 4) * 4)
        if count == padded not in (num_experts * rows * candidate, num_experts * rows * columns):
            return " (looks 128x4-swizzled: use tvmmoe.layouts.from_128x4)"
    if got[:-1] == want[:-1] and got[-1] in block_sizes:
        return f" (block size {'half' if got[-1] == 2 * columns else 'twice'} of what hidden_states and weights have)"
    for candidate in block_sizes:
        if len(got) != len(want) and count == num_experts * rows * candidate:
            view = f".view({', '.join(map(str, (*experts, rows, candidate)))})"
            return f" (flattened? call {view}; if 128x4-swizzled, tvmmoe.layouts.from_128x4)"
    return ""


def refuse_sizes(
    hidden_states: torch.Tensor,
    gemm1_weights: Any,
    gemm2_weights: Any,
    shape1: tuple[int, ...],
    shape2: tuple[int, ...],
    is_gated: bool,
) -> None:
    """Blame what disagrees with both weights if they agree with each other; else return."""
    if not (is_tensor(gemm1_weights) and is_tensor(gemm2_weights)):
        return
    if not gemm1_weights.dim() == gemm2_weights.dim() == 3:
        return
    (experts1, rows1, columns1), (experts2, rows2, columns2) = gemm1_weights.shape, gemm2_weights.shape
    hidden_size, intermediate_size = rows2, 2 * columns2
    if experts1 != experts2 or hidden_size != 2 * columns1 or rows1 != intermediate_size * (2 if is_gated else 1):
        return
    both = f"gemm1_weights {list(gemm1_weights.shape)} and gemm2_weights {list(gemm2_weights.shape)}"
    if hidden_size != shape2[1]:
        hint = ""
        if hidden_states.dtype is torch.uint8 and 2 * hidden_size == shape2[1]:
            hint = " (unpacked? nvfp4 has two e2m1 codes per byte; mxfp8 must be a float8_e4m3fn view)"
        raise ShapeError(
            f"hidden_states: got {describe(hidden_states)}, hidden_size={shape2[1]}, "
            f"expected hidden_size={hidden_size} as in {both}{hint}"
        )
    if experts1 != shape1[0]:
        raise ArgumentError(f"local_num_experts: got {shape1[0]}, expected {experts1} as in {both}")
    raise ArgumentError(f"intermediate_size: got {2 * shape2[2]}, expected {intermediate_size} as in {both}")


def refuse_overlap(name: str, other: str) -> NoReturn:
    """``name`` is written while ``other`` is still read."""
    raise ArgumentError(f"{name}: got memory that {other} shares, expected memory of its own")


def refuse_alignment(tensors: Iterable[torch.Tensor | None]) -> NoReturn:
    """``tensors`` in the order of ALIGNMENT."""
    for (name, alignment), tensor in zip(ALIGNMENT.items(), tensors, strict=True):
        if tensor is not None and tensor.data_ptr() % alignment:
            address = f"{tensor.data_ptr():#x}"
            raise ArgumentError(f"{name}: got data at {address}, expected a multiple of {alignment} (call .clone())")
    raise AssertionError("every tensor is aligned")
