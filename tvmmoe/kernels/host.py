# SPDX-License-Identifier: Apache-2.0
"""What a CUDA artifact's generated host code does less often, or in a shorter way, than TVM writes it."""

import re

# The driver's function of this name, or null without a driver.
DRIVER_FUNCTION = r"""
#include <cstdint>
#include <cuda.h>
#include <cuda_runtime.h>
template <typename Function>
static Function tvmmoe_driver_function(const char* name) {
  void* symbol = nullptr;
  cudaDriverEntryPointQueryResult status;
  const cudaError_t error = cudaGetDriverEntryPointByVersion(name, &symbol, 12000, cudaEnableDefault, &status);
  return error == cudaSuccess ? reinterpret_cast<Function>(symbol) : nullptr;
}
"""
ALLOW_SHARED_MEMORY = r"""
#include <atomic>
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
    return ALLOW_SHARED_MEMORY + _GUARD.sub(
        r"const int tvmmoe_device = static_cast<int>(\1);\n"
        r"  tvm::ffi::CUDADeviceGuard cuda_device_guard(tvmmoe_device);\n"
        r"  const cudaStream_t tvmmoe_stream = static_cast<cudaStream_t>(TVMFFIEnvGetStream(kDLCUDA, tvmmoe_device));",
        source,
    )


_LAUNCH_BY_DRIVER = r"""
#include <cstring>
#include <tuple>
// By the driver, whose parameters come as they are: 1 to 2 us less a call, on an H100's host. What the driver does not take,
// like the first launch of a thread without a context, the runtime does.
template <auto kernel, typename... Params, typename... Args>
static cudaError_t tvmmoe_launch_as(void (*)(Params...), const cudaLaunchConfig_t* config, const Args&... args) {
  static_assert(sizeof...(Params) == sizeof...(Args), "kernel argument count mismatch");
  static_assert(sizeof(CUlaunchAttribute) == sizeof(cudaLaunchAttribute), "launch attributes differ");
  static const auto launch = tvmmoe_driver_function<decltype(&cuLaunchKernelEx)>("cuLaunchKernelEx");
  static const cudaKernel_t handle = [] {  // of any context
    cudaKernel_t found = nullptr;
    return cudaGetKernel(&found, reinterpret_cast<const void*>(kernel)) == cudaSuccess ? found : nullptr;
  }();
  constexpr unsigned kMaxAttributes = 8;
  CUresult result = CUDA_ERROR_INVALID_CONTEXT;
  if (launch != nullptr && handle != nullptr && config->numAttrs <= kMaxAttributes) {
    CUlaunchAttribute attributes[kMaxAttributes];
    std::memcpy(attributes, config->attrs, config->numAttrs * sizeof(CUlaunchAttribute));
    CUlaunchConfig same = {};
    same.gridDimX = config->gridDim.x, same.gridDimY = config->gridDim.y, same.gridDimZ = config->gridDim.z;
    same.blockDimX = config->blockDim.x, same.blockDimY = config->blockDim.y, same.blockDimZ = config->blockDim.z;
    same.sharedMemBytes = static_cast<unsigned>(config->dynamicSmemBytes);
    same.hStream = config->stream;
    same.attrs = attributes, same.numAttrs = config->numAttrs;
    std::tuple<Params...> values(static_cast<Params>(args)...);
    result = std::apply([&](auto&... value) {
      void* parameters[] = {const_cast<void*>(static_cast<const void*>(&value))...};
      return launch(&same, reinterpret_cast<CUfunction>(handle), parameters, nullptr);
    }, values);
  }
  if (result == CUDA_ERROR_INVALID_CONTEXT) return cudaLaunchKernelEx(config, kernel, static_cast<Params>(args)...);
  return static_cast<cudaError_t>(result);  // the same numbers
}
template <auto kernel, typename... Args>
static cudaError_t tvmmoe_launch(const cudaLaunchConfig_t* config, const Args&... args) {
  return tvmmoe_launch_as<kernel>(kernel, config, args...);
}
"""
_LAUNCH = re.compile(r"tvm_cuda_host_launch\((::\w+), ")


def launched_by_driver(source: str) -> str:
    """What :func:`once_per_call` returned, with other launches."""
    source, count = _LAUNCH.subn(r"tvmmoe_launch<\1>(", source)
    assert count == source.count("cudaLaunchConfig_t cuda_config") > 0, "a launch that TVM writes otherwise"
    return _LAUNCH_BY_DRIVER + source
