# SPDX-License-Identifier: Apache-2.0
"""CPU artifact: every stage scheduled and compiled by TVM's llvm target, linked with the operator into one library.

Stages and operator are separate objects: TVM's llvm backend cannot call a packed symbol defined in its own module.
"""

import hashlib
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import tvm
import tvm_ffi
from tvm import tirx

from tvmmoe.config import ActivationFormat, ActivationType, WeightFormat
from tvmmoe.kernels import finalize, gather, gemm1, gemm2, neutral, permute, requantize, route
from tvmmoe.kernels.cpu_operator import entry_symbol, operator, stage_symbol
from tvmmoe.spaces import cpu as space

TILE_M = (1, 4, 8, 16)
LEVELS = ("x86-64", "x86-64-v3")
RUNTIME_SOURCE = Path(__file__).with_name("cpu_runtime.c")
DTYPES = ("float32", "bfloat16")


Choose = Callable[[str, str, int], space.GemmConfig]  # of stage, weight format and tile height


def by_hand(stage: str, weight_format: str, tile_m: int) -> space.GemmConfig:
    """The hand-chosen sizes."""
    return space.GemmConfig()


def stages(choose: Choose = by_hand) -> Iterator[tuple[str, tirx.PrimFunc]]:
    """(symbol, scheduled definition) of every stage of the CPU artifact."""
    for dtype in DTYPES:
        for bias_dtype in DTYPES:
            yield stage_symbol("route", dtype, bias_dtype), space.schedule_route(route.route(dtype, bias_dtype))
    yield "permute", permute.permute()
    yield "neutral", neutral.neutral()
    yield "finalize", space.schedule_finalize(finalize.finalize())
    for form in ActivationFormat:
        yield stage_symbol("gather", form.name), space.schedule_gather(gather.gather(form))
    for mode in requantize.MODES:
        yield stage_symbol("requantize", mode), space.schedule_requantize(requantize.requantize(mode))
    for weight_format in WeightFormat:
        for tile_m in TILE_M:
            symbol = stage_symbol("gemm2", weight_format.name, f"m{tile_m}")
            config = choose("gemm2", weight_format.name, tile_m)
            yield symbol, space.schedule_gemm(gemm2.gemm2(weight_format, tile_m), config)
            config = choose("gemm1", weight_format.name, tile_m)
            for activation in ActivationType:
                symbol = stage_symbol("gemm1", weight_format.name, activation.name, f"m{tile_m}")
                yield symbol, space.schedule_gemm(gemm1.gemm1(weight_format, activation, tile_m), config)


def entries() -> Iterator[tuple[str, tirx.PrimFunc]]:
    """(symbol, host function) of every exported entry."""
    for weight_format in WeightFormat:
        for tile_m in TILE_M:
            yield entry_symbol(weight_format, tile_m), operator(weight_format, tile_m)


def functions(choose: Choose = by_hand) -> dict[str, tirx.PrimFunc]:
    """Everything the artifact is compiled from, by symbol."""
    return {symbol: func.with_attr("global_symbol", symbol) for symbol, func in (*stages(choose), *entries())}


def tir_sha256(compiled: dict[str, tirx.PrimFunc]) -> str:
    """Hash of :func:`functions` and of the runtime source: what a manifest entry is fresh against."""
    digest = hashlib.sha256(RUNTIME_SOURCE.read_bytes())
    for symbol, func in compiled.items():
        # Not the printed script: that follows the syntax of the Python that prints it.
        digest.update(f"{symbol} {tvm_ffi.structural_hash(func, map_free_vars=True):x}\n".encode())
    return digest.hexdigest()


def build(compiled: dict[str, tirx.PrimFunc], level: str, library: Path) -> None:
    """Compile :func:`functions` for one x86-64 level and link them with the runtime hooks into ``library``."""
    target = tvm.target.Target({"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": level})
    with tempfile.TemporaryDirectory() as folder:
        objects = []
        for symbol, func in compiled.items():
            objects.append(f"{folder}/{symbol}.o")
            tvm.compile(tvm.IRModule({symbol: func}), target=target).mod.write_to_file(objects[-1])
        exports = Path(folder, "exports.map")
        names = [*(symbol for symbol, _ in entries()), "set_num_threads"]
        exports.write_text("{ global: " + " ".join(f"__tvm_ffi_{name};" for name in names) + " local: *; };\n")
        include = [f"-I{tvm_ffi.libinfo.find_include_path()}", f"-I{tvm_ffi.libinfo.find_dlpack_include_path()}"]
        subprocess.run(
            [
                "gcc",
                "-shared",
                "-fPIC",
                "-O2",
                "-s",
                "-Wall",
                "-Werror",
                *include,
                str(RUNTIME_SOURCE),
                *objects,
                f"-Wl,--version-script={exports}",
                "-Wl,--gc-sections",
                "-lpthread",
                "-lm",
                "-o",
                str(library),
            ],
            check=True,
        )
