# SPDX-License-Identifier: Apache-2.0
"""TIRx -> one CUDA C++ unit -> nvcc -> a shared object that needs libtvm_ffi alone, for the chip or emulated.

The same functions are compiled twice: for sm_120a with the instructions, and with ``emulate`` for any GPU since sm_80,
which is how they run where no Blackwell is at hand.
"""

import re
import subprocess
from collections.abc import Mapping
from pathlib import Path

import tvm
import tvm_ffi
from tvm.backend.cuda import export_cuda_host

NATIVE = "arch=compute_120a,code=sm_120a"
# sm_121a: the same instructions, another chip (DGX Spark)
GB10 = "arch=compute_121a,code=sm_121a"
EMULATED = "arch=compute_80,code=[sm_80,sm_90]"
EMULATED_SM90 = "arch=compute_90,code=sm_90"  # with programmatic dependent launch, which Hopper's stages use
SMEM_BYTES = 99 * 1024  # most that a CTA may have

_PRELUDE = r"""
#include <cstdint>
static inline __host__ __device__ int64_t tvmmoe_address(const void* pointer) {
  return reinterpret_cast<int64_t>(pointer);
}
"""


def cuda_source(
    functions: Mapping[str, tvm.tirx.PrimFunc], kernel_names: list[str] | None = None, pipeline: str = "tirx"
) -> str:
    """CUDA C++ of packed functions, host code included.

    ``kernel_names`` has the kernels of a single function, in launch order: TIRx itself only numbers them. ``pipeline`` is
    s_tir for scheduled blocks.
    """
    limits = {"max_threads_per_block": 1024, "max_shared_memory_per_block": SMEM_BYTES}
    target = tvm.target.Target({"kind": "cuda", "arch": "sm_120a", **limits}, host={"kind": "cuda_host"})
    source = export_cuda_host(tvm.tirx.build(tvm.IRModule(dict(functions)), target=target, pipeline=pipeline))
    if kernel_names is not None:
        (symbol,) = functions
        names = {f"{symbol}_kernel" + (f"_{i}" if i else ""): f"{symbol}_{name}" for i, name in enumerate(kernel_names)}
        source = re.sub(rf"\b{symbol}_kernel(_\d+)?\b", lambda match: names[match[0]], source)
    flag = "val.programmaticStreamSerializationAllowed = "  # a property of a call, not of the compiled function
    source = source.replace(flag + "1;", flag + "(enable_pdl != 0);")
    return _PRELUDE + source.replace("TVM_DLL int64_t tvmmoe_address(uint8_t*);", "")


def compile_so(source: str, path: Path, gencode: str) -> str:
    """Run nvcc; returns its log. Raises RuntimeError with nvcc's message."""
    path.parent.mkdir(parents=True, exist_ok=True)
    includes = [tvm_ffi.libinfo.find_include_path(), tvm_ffi.libinfo.find_dlpack_include_path()]
    command = [
        "nvcc", "-shared", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-std=c++17", "-O3",
        *(f"-I{folder}" for folder in includes), "-gencode", gencode,
        "-Xptxas", "-v,--warn-on-spills", "-diag-suppress=174,177,550",
        f"-L{Path(tvm_ffi.libinfo.find_libtvm_ffi()).parent}", "-ltvm_ffi", "-o", str(path), "-x", "cu", "-",
    ]  # fmt: skip
    done = subprocess.run(command, input=source, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"nvcc failed for {path.name}:\n{done.stdout[-4000:]}{done.stderr[-8000:]}")
    return done.stdout + done.stderr
