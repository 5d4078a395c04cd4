# SPDX-License-Identifier: Apache-2.0
"""The Hopper artifacts: one file a weight format, and one of fp8 accumulation.

What generated host code uses of the driver is looked up at the first call, so an artifact loads without one.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import tvm

from tvmmoe.config import WeightFormat
from tvmmoe.kernels import host, nvcc
from tvmmoe.kernels.sm90a import operator_fp8
from tvmmoe.kernels.sm90a.operator import SHORT_TILES, TILES, Variant, hand_chosen, operator

FP8_FILE = "moe_mxfp4_mxfp8_sm90a.so"
NATIVE = "arch=compute_90a,code=sm_90a"

_ENCODE_TILED = r"""static inline CUresult tvmmoe_encode_tiled(
    CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* data, const cuuint64_t* dims,
    const cuuint64_t* strides, const cuuint32_t* box, const cuuint32_t* element_strides,
    CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
    CUtensorMapFloatOOBfill fill) {
  static const auto fn = tvmmoe_driver_function<decltype(&cuTensorMapEncodeTiled)>("cuTensorMapEncodeTiled");
  return fn ? fn(map, type, rank, data, dims, strides, box, element_strides, interleave, swizzle, promotion, fill)
            : CUDA_ERROR_NOT_INITIALIZED;
}
static inline CUresult tvmmoe_error_string(CUresult, const char** text) {
  *text = "cuTensorMapEncodeTiled failed";
  return CUDA_SUCCESS;
}
#define cuTensorMapEncodeTiled tvmmoe_encode_tiled
#define cuGetErrorString tvmmoe_error_string
"""


def variants(weight_format: WeightFormat) -> list[Variant]:
    """The hand-chosen variants of one weight format."""

    def variant(tile_m: int) -> Variant:
        config = hand_chosen(weight_format, tile_m)
        return Variant(config, config, hand_chosen(weight_format, tile_m, True) if tile_m in SHORT_TILES else None)

    return list(map(variant, TILES))


def file_name(weight_format: WeightFormat) -> str:
    """Artifact of one weight format."""
    return f"moe_{weight_format.name}_sm90a.so"


def cuda_source(functions: Sequence[Variant]) -> str:
    """CUDA C++ of the operators, host code included."""
    return packed_source({variant.symbol: functools.partial(operator, variant) for variant in functions})


@functools.cache  # tracing takes seconds
def fp8_source() -> str:
    """The same of the operator on fp8 wgmma."""
    return packed_source({operator_fp8.SYMBOL: operator_fp8.operator})


def packed_source(makers: Mapping[str, Callable[[], tvm.tirx.PrimFunc]], arch: str = "sm_90a") -> str:
    """CUDA C++ of packed functions by symbol, which contains ``_moe_``."""
    source = nvcc.packed_source(makers, {"arch": arch}, nvcc.ADDRESS + _ENCODE_TILED)
    if arch == "sm_90a":  # measured there alone
        source = host.launched_by_driver(source)
    return host.DRIVER_FUNCTION + source


def compile_so(source: str, path: Path, *gencodes: str) -> str:
    """Run nvcc; returns its log. Raises RuntimeError with nvcc's message, AssertionError for serialised wgmma."""
    log = nvcc.compile_so(source, path, *gencodes)
    assert "C75" not in "".join(problems := nvcc.report(log)), problems
    return log
