# SPDX-License-Identifier: Apache-2.0
"""The Hopper artifacts: one file a weight format, and one of fp8 accumulation.

The one driver function that generated host code uses is looked up at the first call, so an artifact loads without a
driver.
"""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import tvm

from tvmmoe.config import WeightFormat
from tvmmoe.kernels import nvcc
from tvmmoe.kernels.sm90a import operator_fp8
from tvmmoe.kernels.sm90a.gemm_config import GemmConfig
from tvmmoe.kernels.sm90a.operator import TILES, Variant, operator

FP8_FILE = "moe_mxfp4_mxfp8_sm90a.so"
NATIVE = "arch=compute_90a,code=sm_90a"

_INCLUDES = r"""
#include <cstdint>
#include <cuda.h>
#include <cuda_runtime.h>
"""
_DRIVER_LOOKUP = r"""static inline CUresult tvmmoe_encode_tiled(
    CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* data, const cuuint64_t* dims,
    const cuuint64_t* strides, const cuuint32_t* box, const cuuint32_t* element_strides,
    CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
    CUtensorMapFloatOOBfill fill) {
  static auto fn = [] {
    void* symbol = nullptr;
    cudaDriverEntryPointQueryResult status;
    auto rc = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &symbol, 12000, cudaEnableDefault, &status);
    return rc == cudaSuccess ? reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(symbol) : nullptr;
  }();
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
    configs = [GemmConfig(weight_format, tile_m, *choices) for tile_m, choices in TILES.items()]
    return [Variant(config, config) for config in configs]


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
    return once_per_call(nvcc.packed_source(makers, {"arch": arch}, _INCLUDES + nvcc.ADDRESS + _DRIVER_LOOKUP))


_ALLOW_SHARED_MEMORY = r"""
#include <atomic>
#include <cstdint>
#include <cuda_runtime.h>
// Most bytes that a kernel may ask for, told to the runtime once a device; `devices` has a bit for each.
template <typename... Params>
static cudaError_t tvmmoe_allow_shared_memory(
    void (*kernel)(Params...), int num_bytes, int device, std::atomic<uint64_t>& devices) {
  const uint64_t bit = device < 64 ? uint64_t(1) << device : 0;
  if (devices.load(std::memory_order_relaxed) & bit) return cudaSuccess;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, num_bytes);
  if (error == cudaSuccess) devices.fetch_or(bit, std::memory_order_relaxed);
  return error;
}
"""
_GUARD = re.compile(r"tvm::ffi::CUDADeviceGuard cuda_device_guard\((.*)\);")
_DEVICE = re.compile(r"int (cuda_device(?:_\d+)?);\s+if \(::tvm_cuda_host_check\(cudaGetDevice\(&\1\)\) != 0\) return -1;\s+")
_STREAM = re.compile(r"static_cast<cudaStream_t>\(TVMFFIEnvGetStream\(kDLCUDA, cuda_device(?:_\d+)?\)\)")
_SHARED_MEMORY = re.compile(
    r"(if \(::tvm_cuda_host_check\()cudaFuncSetAttribute\(::(\w+), cudaFuncAttributeMaxDynamicSharedMemorySize, (\w+)\)"
)


def once_per_call(source: str) -> str:
    """The same host code, but device and stream are asked for once a call, and shared memory is allowed once a device."""
    kernels = [match[2] for match in _SHARED_MEMORY.finditer(source)]
    assert len(set(kernels)) == len(kernels), "a kernel that is launched from two places may need more in one of them"
    for match in _SHARED_MEMORY.finditer(source):
        declared = source.rindex(f"auto {match[3]} = ", 0, match.start())
        assert re.match(r"auto \w+ = \d+;", source[declared:]), "shared memory that depends on the call"
    source = _SHARED_MEMORY.sub(
        r"static std::atomic<uint64_t> devices{0};\n\1tvmmoe_allow_shared_memory(::\2, \3, tvmmoe_device, devices)", source
    )
    source = _STREAM.sub("tvmmoe_stream", _DEVICE.sub("", source))
    assert "cudaGetDevice(&cuda_device" not in source
    return _ALLOW_SHARED_MEMORY + _GUARD.sub(
        r"const int tvmmoe_device = static_cast<int>(\1);\n"
        r"  tvm::ffi::CUDADeviceGuard cuda_device_guard(tvmmoe_device);\n"
        r"  const cudaStream_t tvmmoe_stream = static_cast<cudaStream_t>(TVMFFIEnvGetStream(kDLCUDA, tvmmoe_device));",
        source,
    )


def compile_so(source: str, path: Path, *gencodes: str) -> str:
    """Run nvcc; returns its log. Raises RuntimeError with nvcc's message, AssertionError for serialised wgmma."""
    log = nvcc.compile_so(source, path, *gencodes)
    assert "C75" not in "".join(problems := nvcc.report(log)), problems
    return log
