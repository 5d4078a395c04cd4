# SPDX-License-Identifier: Apache-2.0
"""TIRx -> CUDA C++ -> cubin for sm_100a, to be inspected: no artifact is made of it yet."""

import subprocess
from pathlib import Path

import tvm
import tvm_ffi
from tvm.backend.cuda import export_cuda_host

DATACENTER = "arch=compute_100a,code=sm_100a"
ULTRA = "arch=compute_103a,code=sm_103a"


def cuda_source(symbol: str, function: tvm.tirx.PrimFunc) -> str:
    """CUDA C++ of a packed function, host code included."""
    target = tvm.target.Target({"kind": "cuda", "arch": "sm_100a"}, host={"kind": "cuda_host"})
    return export_cuda_host(tvm.tirx.build(tvm.IRModule({symbol: function}), target=target, pipeline="tirx"))


def compile_cubin(source: str, path: Path, gencode: str = DATACENTER) -> str:
    """Run nvcc; returns its log. Raises RuntimeError with nvcc's message."""
    path.parent.mkdir(parents=True, exist_ok=True)
    includes = [tvm_ffi.libinfo.find_include_path(), tvm_ffi.libinfo.find_dlpack_include_path()]
    command = [
        "nvcc", "-cubin", "-std=c++17", "-O3", *(f"-I{folder}" for folder in includes), "-gencode", gencode,
        "-Xptxas", "-v", "-diag-suppress=174,177,550", "-o", str(path), "-x", "cu", "-",
    ]  # fmt: skip
    done = subprocess.run(command, input=source, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"nvcc failed for {path.name}:\n{done.stdout[-4000:]}{done.stderr[-8000:]}")
    return done.stdout + done.stderr
