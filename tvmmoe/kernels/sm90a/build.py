# SPDX-License-Identifier: Apache-2.0
"""TIRx -> one CUDA C++ unit a weight format -> nvcc -> self-contained shared objects that need libtvm_ffi alone.

Compile variants in batches: an nvcc run costs about 5 s whatever it compiles. The CUDA runtime is linked statically and
the one driver function that generated host code uses is looked up at the first call, so an artifact loads without a
driver.
"""

import contextlib
import functools
import re
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import tvm
import tvm_ffi
from tvm.backend.cuda import export_cuda_host

from tvmmoe.config import WeightFormat
from tvmmoe.kernels.sm90a.gemm import GemmConfig
from tvmmoe.kernels.sm90a.operator import TILES, TILES_FP8, Variant, operator
from tvmmoe.kernels.sm90a.trace import kernel_names

DRIVER_LOOKUP = r"""
#include <cstdint>
#include <cuda.h>
#include <cuda_runtime.h>
static inline __host__ __device__ int64_t tvmmoe_address(const void* pointer) {
  return reinterpret_cast<int64_t>(pointer);
}
static inline CUresult tvmmoe_encode_tiled(
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


def fp8_variants() -> list[Variant]:
    """The variants of mxfp8 x mxfp4 on fp8 wgmma."""
    stages = [[GemmConfig(WeightFormat.mxfp4, tile_m, *c) for c in choices] for tile_m, choices in TILES_FP8.items()]
    return [Variant(*configs, is_fp8=True) for configs in stages]


FP8_FILE = "moe_mxfp4_mxfp8_sm90a.so"


def file_name(weight_format: WeightFormat) -> str:
    """Artifact of one weight format."""
    return f"moe_{weight_format.name}_sm90a.so"


def cuda_source(functions: Sequence[Variant]) -> str:
    """CUDA C++ of the operators, host code included."""
    return packed_source({variant.symbol: functools.partial(operator, variant) for variant in functions})


def packed_source(makers: Mapping[str, Callable[[], tvm.tirx.PrimFunc]]) -> str:
    """CUDA C++ of packed functions by symbol, which contains ``_moe_``; their kernels get the names they were traced by."""
    target = tvm.target.Target({"kind": "cuda", "arch": "sm_90a"}, host={"kind": "cuda_host"})
    functions, names = {}, {}
    for symbol, make in makers.items():
        functions[symbol] = make()
        for i, name in enumerate(kernel_names()):
            names[f"{symbol}_kernel" + (f"_{i}" if i else "")] = f"{symbol}_{name}"
    with _source_alone():
        source = export_cuda_host(tvm.tirx.build(tvm.IRModule(functions), target=target, pipeline="tirx"))
    source = re.sub(r"\w+_kernel(_\d+)?\b", lambda match: names.get(match[0], match[0]), source)
    assert not re.search(r"_moe_\w+_kernel(_\d+)?\b", source), "a kernel without a name"
    # The launch attribute is a compile-time property in TIRx; enable_pdl makes it one of the call.
    flag = "val.programmaticStreamSerializationAllowed = "
    assert flag + "1;" in source
    source = source.replace("TVM_DLL int64_t tvmmoe_address(uint8_t*);", "")  # defined above, not imported
    return DRIVER_LOOKUP + source.replace(flag + "1;", flag + "(enable_pdl != 0);")


@contextlib.contextmanager
def _source_alone() -> Iterator[None]:
    """Where a GPU is present TVM compiles what it generates by NVRTC, which refuses it; nvcc does so later, with the host."""
    name = "tvm_callback_cuda_compile"
    before = tvm_ffi.get_global_func(name)
    tvm_ffi.register_global_func(name, lambda code: b"", override=True)
    try:
        yield
    finally:
        tvm_ffi.register_global_func(name, before, override=True)


def compile_so(source: str, path: Path) -> str:
    """Run nvcc; returns its log. Raises RuntimeError with nvcc's message."""
    path.parent.mkdir(parents=True, exist_ok=True)
    includes = [tvm_ffi.libinfo.find_include_path(), tvm_ffi.libinfo.find_dlpack_include_path()]
    command = [
        "nvcc", "-shared", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-std=c++17", "-O3",
        *(f"-I{folder}" for folder in includes), "-gencode", "arch=compute_90a,code=sm_90a",
        "-Xptxas", "-v,--warn-on-spills", "-diag-suppress=174,177",
        f"-L{Path(tvm_ffi.libinfo.find_libtvm_ffi()).parent}", "-ltvm_ffi", "-o", str(path), "-x", "cu", "-",
    ]  # fmt: skip
    done = subprocess.run(command, input=source, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"nvcc failed for {path.name}:\n{done.stdout[-4000:]}{done.stderr[-8000:]}")
    return done.stdout + done.stderr


def report(log: str) -> list[str]:
    """Lines of an nvcc log that cost speed: serialised wgmma (none is tolerated) and spills (a few words are)."""
    return [line.strip() for line in log.splitlines() if re.search(r"[1-9]\d* bytes spill|C75\d\d", line)]


def build_sm90a(out_dir: Path, variants_of: Callable[[WeightFormat], list[Variant]] = variants) -> None:
    """Build one artifact a weight format, and that of fp8, into ``out_dir``."""
    units = {file_name(weight_format): variants_of(weight_format) for weight_format in WeightFormat}
    for file, functions in (units | {FP8_FILE: fp8_variants()}).items():
        problems = report(compile_so(cuda_source(functions), Path(out_dir) / file))
        assert not any("C75" in line for line in problems), problems
