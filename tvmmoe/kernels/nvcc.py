# SPDX-License-Identifier: Apache-2.0
"""Packed functions -> one CUDA C++ unit -> nvcc -> a shared object that needs libtvm_ffi alone: what all CUDA targets share.

Compile variants in batches: an nvcc run costs about 5 s whatever it compiles. The CUDA runtime is linked statically, so
an artifact loads without a driver.
"""

import contextlib
import os
import re
import subprocess
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import tvm
import tvm_ffi
from tvm.backend.cuda import export_cuda_host

from tvmmoe.kernels import host
from tvmmoe.kernels.sm90a.trace import kernel_names

# TensorIR has no cast from pointer to integer: the kernels' host functions call this.
ADDRESS = r"""static inline __host__ __device__ int64_t tvmmoe_address(const void* pointer) {
  return reinterpret_cast<int64_t>(pointer);
}
"""


def packed_source(
    makers: Mapping[str, Callable[[], tvm.tirx.PrimFunc]],
    target: Mapping[str, object],
    prelude: str = "#include <cstdint>\n" + ADDRESS,
    pipeline: str = "tirx",
) -> str:
    """CUDA C++ of packed functions by symbol, host code included; their kernels get the names they were traced by.

    ``target`` has the attributes of TVM's target beside its kind; ``pipeline`` is s_tir for scheduled blocks.
    """
    functions, names = {}, {}
    kernel_names()  # a trace that failed has left its own
    for symbol, make in makers.items():
        functions[symbol] = make()
        for i, name in enumerate(kernel_names()):
            names[f"{symbol}_kernel" + (f"_{i}" if i else "")] = f"{symbol}_{name}"
    full_target = tvm.target.Target({"kind": "cuda", **target}, host={"kind": "cuda_host"})
    with _source_alone():
        source = export_cuda_host(tvm.tirx.build(tvm.IRModule(functions), target=full_target, pipeline=pipeline))
    source = re.sub(r"\w+_kernel(_\d+)?\b", lambda match: names.get(match[0], match[0]), source)
    assert not re.search(r"_moe_\w+_kernel(_\d+)?\b", source), "a kernel without a name"
    # The launch attribute is a compile-time property in TIRx; enable_pdl makes it one of the call.
    flag = "val.programmaticStreamSerializationAllowed = "
    assert (flag + "1;" in source) == ("programmaticStreamSerialization" in source)
    source = source.replace("TVM_DLL int64_t tvmmoe_address(uint8_t*);", "")  # in the prelude, not imported
    source = prelude + source.replace(flag + "1;", flag + "(enable_pdl != 0);")
    return host.once_per_call(source) if pipeline == "tirx" else source  # others' shared memory may depend on the call


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


def compile_so(source: str, path: Path, *gencodes: str) -> str:
    """Run nvcc for these ``-gencode`` values; returns its log. Raises RuntimeError with nvcc's message."""
    path.parent.mkdir(parents=True, exist_ok=True)
    includes = [tvm_ffi.libinfo.find_include_path(), tvm_ffi.libinfo.find_dlpack_include_path()]
    # compress-mode: 1.3 MB where the default makes 3.3 of sm120a's two chips; drivers from CUDA 12.4 on unpack it.
    command = [
        "nvcc", "-shared", "--compress-mode=size", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-std=c++17", "-O3",
        *(f"-I{folder}" for folder in includes), *(word for gencode in gencodes for word in ("-gencode", gencode)),
        "-Xptxas", "-v,--warn-on-spills", "-diag-suppress=174,177,550",
        # Of the host's linker alone: the device's notes its folders in the cubin, which then differs from place to place.
        "-Xlinker", f"-L{Path(tvm_ffi.libinfo.find_libtvm_ffi()).parent},--no-as-needed,-ltvm_ffi",
        "-o", str(path), "-x", "cu", "-",
    ]  # fmt: skip
    done = subprocess.run(command, input=source, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"nvcc failed for {path.name}:\n{done.stdout[-4000:]}{done.stderr[-8000:]}")
    return done.stdout + done.stderr


def report(log: str) -> list[str]:
    """Lines of an nvcc log that cost speed: serialised wgmma (none is tolerated) and spills (a few words are)."""
    return [line.strip() for line in log.splitlines() if re.search(r"[1-9]\d* bytes spill|C75\d\d", line)]


def sass_of(path: Path) -> str:
    """Disassembly of a library."""
    return _cuobjdump("-sass", path)


def sass_by_kernel(path: Path) -> dict[str, str]:
    """Disassembly of each kernel of a library, by name."""
    return {part.split()[0]: part for part in sass_of(path).split("Function : ")[1:]}


def chips_of(path: Path) -> set[str]:
    """Chips, like sm_90a, that a library holds machine code for."""
    return set(re.findall(r"\.(sm_\w+)\.cubin", _cuobjdump("-lelf", path)))


def ptx_of(path: Path) -> str:
    """PTX in a library."""
    return _cuobjdump("-ptx", path)


def _cuobjdump(option: str, path: Path) -> str:
    """On PATH, with nvdisasm, or of the wheels that the extra ``test`` installs."""
    wheels = Path(sysconfig.get_path("purelib")) / "nvidia" / "cu13" / "bin"
    environment = os.environ | {"PATH": f"{os.environ['PATH']}:{wheels}"}
    command = ["cuobjdump", option, str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
