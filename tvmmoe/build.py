# SPDX-License-Identifier: Apache-2.0
"""Build artifacts and their manifest entries: ``python -m tvmmoe.build --target cpu|sm90a|...``. Needs the extra ``tune``."""

import argparse
import functools
import hashlib
import importlib
import importlib.util
import json
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import tvm
import tvm_ffi

from tvmmoe import loader, relaunch
from tvmmoe.abi import ARTIFACT_ABI
from tvmmoe.config import ActivationFormat, WeightFormat
from tvmmoe.crossovers import limits_of_others, manifest_ranges, path_of, recorded_limits
from tvmmoe.errors import ArgumentError
from tvmmoe.kernels import cpu
from tvmmoe.kernels.cpu_operator import entry_symbol
from tvmmoe.select import VERIFIED

CPU_CROSSOVERS = "x86-64-v3"  # whose measured limits both levels take
HOST_SOURCE = Path(cpu.__file__).with_name("relaunch.cc")
_QUANTIZED = {WeightFormat.mxfp4: ActivationFormat.mxfp8, WeightFormat.nvfp4: ActivationFormat.nvfp4}


@dataclass(frozen=True, eq=False)
class CudaTarget:
    """A target that nvcc compiles: one file a weight format, with a variant for each tile height.

    Its package ``tvmmoe.kernels.<name>`` has ``build`` (variants, file_name, cuda_source, compile_so) and ``layout``
    (workspace_bytes); ``tvmmoe.tuning.<name>``, where it exists, has ``chosen``.
    """

    name: str
    gencodes: tuple[str, ...]  # of nvcc; the GPUs that they serve are in select.CUDA_TARGETS
    # Tile height -> rows per expert from which it serves, where schedules/<name>/crossovers.json has not been measured.
    default_limits: Mapping[int, float] = field(default_factory=dict)
    has_fp8: bool = False  # one more file, for mxfp8 x mxfp4: build has FP8_FILE, fp8_source and operator_fp8
    tiles: tuple[int, ...] = ()  # the heights that are built, all of them if none is named
    formats: tuple[WeightFormat, ...] = tuple(WeightFormat)
    records: Path | None = None  # folder of tuning records instead of schedules/

    @property
    def build(self) -> ModuleType:
        return importlib.import_module(f"tvmmoe.kernels.{self.name}.build")

    def activation_formats(self, weight_format: WeightFormat) -> list[str]:
        """Names of what the kernels read."""
        return [form.name for form in (ActivationFormat.bf16, _QUANTIZED[weight_format])]


def gencode(chip: str) -> str:
    """nvcc's option for the machine code of one chip, like 90a."""
    return f"arch=compute_{chip},code=sm_{chip}"


# Default limits: a tile serves until the mean load and two deviations of random routing (sqrt of the mean) exceed it, since
# an expert's second tile reads its weights again and compute is not the limit there.
CUDA_TARGETS = {
    target.name: target
    for target in (
        CudaTarget("sm90a", (gencode("90a"),), has_fp8=True),
        CudaTarget("sm100a", (gencode("100a"), gencode("103a")), default_limits={8: 0.0, 32: 4.0, 128: 22.0, 256: 107.0}),
        CudaTarget("sm120a", (gencode("120a"), gencode("121a")), default_limits={8: 0.0, 32: 4.0, 64: 22.0, 128: 50.0}),
        CudaTarget("sm80", ("arch=compute_80,code=[compute_80,sm_80]",),
                   default_limits={8: 0.0, 16: 4.0, 32: 10.0, 64: 22.0, 128: 50.0}),
    )
}
TARGETS = ("cpu", "host", *CUDA_TARGETS)


def _version_of(command: str, line: int) -> str:
    """One line of what ``command --version`` prints: gcc has its version on the first, nvcc on the last."""
    return subprocess.run([command, "--version"], capture_output=True, text=True, check=True).stdout.split("\n")[line]


def file_record(path: Path, target: str, tir_sha256: str, compiler: str, verified: str) -> dict[str, Any]:
    """Manifest record of one artifact file."""
    return {
        "target": target,
        "bytes": path.stat().st_size,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "tir_sha256": tir_sha256,
        "tvm": tvm.__version__,
        "compiler": compiler,
        "verified": verified,
    }


def selection_rows(
    target: str,
    weight_format: WeightFormat,
    activation_formats: list[str],
    min_rows_per_expert: Mapping[int, float],
    symbols: dict[int, str],
    file: str,
    others: Mapping[str, Mapping[int, float]] | None = None,
) -> list[dict[str, Any]]:
    """Manifest entries (loader.Entry) of a weight format, by tile height; ``others`` are limits by a GPU's name."""
    ranges = manifest_ranges(min_rows_per_expert, others or {}, symbols)
    return [
        {
            "target": target,
            "weight_format": weight_format.name,
            "activation_formats": activation_formats,
            "tile_m": tile_m,
            "symbol": symbol,
            "file": file,
            **ranges[tile_m],
        }
        for tile_m, symbol in symbols.items()
    ]


def cpu_functions(records: Path | None = None) -> dict[str, Any]:
    """What the CPU artifacts are compiled from, with the sizes that the tuning records choose (default: of schedules/)."""
    from tvmmoe.tuning.cpu import chosen

    return cpu.functions(functools.cache(functools.partial(chosen, root=records)))


def build_cpu(folder: Path, records: Path | None = None) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Both x86-64 levels: file records and selection entries."""
    compiled = cpu_functions(records)
    digest = cpu.tir_sha256(compiled)
    files = {}
    (folder / "cpu").mkdir(parents=True, exist_ok=True)
    for level in cpu.LEVELS:
        file = f"cpu/fp4_block_scale_moe_{level}.so"
        cpu.build(compiled, level, folder / file)
        files[file] = file_record(folder / file, level, digest, f"llvm in tvm; {_version_of('gcc', 0)}", "measured")
    return files, cpu_entries()


def cpu_entries() -> list[dict[str, Any]]:
    """Selection entries of both levels."""
    entries, limits = [], {form: recorded_limits(CPU_CROSSOVERS, cpu.TILE_M, form.name) for form in WeightFormat}
    for level in cpu.LEVELS:
        for weight_format in WeightFormat:
            symbols = {tile_m: entry_symbol(weight_format, tile_m) for tile_m in cpu.TILE_M}
            formats = [ActivationFormat.bf16.name, _QUANTIZED[weight_format].name]
            file = f"cpu/fp4_block_scale_moe_{level}.so"
            entries += selection_rows(level, weight_format, formats, limits[weight_format], symbols, file)
    return entries


def build_host(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What eager calls of any device go through; the hash is that of its source, and it serves no entry of its own."""
    path = folder / relaunch.FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    includes = [tvm_ffi.libinfo.find_include_path(), tvm_ffi.libinfo.find_dlpack_include_path()]
    command = [
        "g++", "-shared", "-fPIC", "-O2", "-s", "-std=c++17", "-fno-exceptions", "-fvisibility=hidden", "-Wall", "-Werror",
        *(f"-I{include}" for include in includes), str(HOST_SOURCE),
        f"-L{Path(tvm_ffi.libinfo.find_libtvm_ffi()).parent}", "-ltvm_ffi", "-o", str(path),
    ]  # fmt: skip
    subprocess.run(command, check=True)
    digest = hashlib.sha256(HOST_SOURCE.read_bytes()).hexdigest()
    return {relaunch.FILE: file_record(path, "host", digest, _version_of("g++", 0), "measured")}, []


def shipped_variants(target: CudaTarget, weight_format: WeightFormat) -> list[Any]:
    """What ``target.build`` compiles: what the tuning records choose, by hand where there are none."""
    variants = target.build.variants(weight_format)
    if importlib.util.find_spec(f"tvmmoe.tuning.{target.name}") is not None:
        choices = importlib.import_module(f"tvmmoe.tuning.{target.name}").chosen(weight_format.name, target.records)
        variants = [type(variants[0])(**configs) for configs in choices.values()]
    return [variant for variant in variants if not target.tiles or variant.tile_m in target.tiles]


@functools.cache  # tracing takes half a minute
def cuda_source(target: CudaTarget, weight_format: WeightFormat) -> str:
    """CUDA C++ of one artifact file."""
    return target.build.cuda_source(shipped_variants(target, weight_format))


def build_cuda(target: CudaTarget, folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Compile every file of a target into ``folder/<name>``: file records and selection entries."""
    for weight_format in target.formats:
        path = folder / target.name / target.build.file_name(weight_format)
        target.build.compile_so(cuda_source(target, weight_format), path, *target.gencodes)
    if target.has_fp8:
        target.build.compile_so(target.build.fp8_source(), folder / target.name / target.build.FP8_FILE, *target.gencodes)
    return cuda_records(target, folder, "compiled")


def cuda_records(target: CudaTarget, folder: Path, verified: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """File records and selection entries of what lies in ``folder/<name>``; the TIR hash is that of the CUDA source."""
    files, entries = fp8_records(target, folder, verified) if target.has_fp8 else ({}, [])
    for weight_format in target.formats:
        file = f"{target.name}/{target.build.file_name(weight_format)}"
        digest = hashlib.sha256(cuda_source(target, weight_format).encode()).hexdigest()
        files[file] = file_record(folder / file, target.name, digest, _version_of("nvcc", -2), verified)
        symbols = {variant.tile_m: variant.symbol for variant in shipped_variants(target, weight_format)}
        formats = target.activation_formats(weight_format)
        limits = limits_of(target, symbols, weight_format)
        others = limits_of_others(target.name, list(symbols), weight_format.name)
        entries += selection_rows(target.name, weight_format, formats, limits, symbols, file, others)
    return files, entries


def fp8_records(target: CudaTarget, folder: Path, verified: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The same of the file of fp8 accumulation alone."""
    operator, file = target.build.operator_fp8, f"{target.name}/{target.build.FP8_FILE}"
    digest = hashlib.sha256(target.build.fp8_source().encode()).hexdigest()
    limits, symbols = {operator.TILE_M: operator.MIN_ROWS}, {operator.TILE_M: operator.SYMBOL}
    rows = selection_rows(target.name, WeightFormat.mxfp4, [ActivationFormat.mxfp8.name], limits, symbols, file)
    record = file_record(folder / file, target.name, digest, _version_of("nvcc", -2), verified)
    return {file: record}, [row | {"accumulation": "fp8"} for row in rows]


def limits_of(target: CudaTarget, tiles: Iterable[int], weight_format: WeightFormat) -> Mapping[int, float]:
    """Rows per expert from which each tile height serves: as measured, or else the target's own."""
    is_measured = path_of(target.name).is_file()
    return recorded_limits(target.name, list(tiles), weight_format.name) if is_measured else target.default_limits


def write_manifest(folder: Path, files: dict[str, Any], entries: Iterable[dict[str, Any]]) -> None:
    """Put records into ``manifest.json``, replacing those of the same targets and keeping the others."""
    path = folder / "manifest.json"
    content = json.loads(path.read_text()) if path.is_file() else {"files": {}, "entries": []}
    targets = {record["target"] for record in files.values()}
    kept_files = {name: record for name, record in content["files"].items() if record["target"] not in targets}
    kept = [entry for entry in content["entries"] if entry["target"] not in targets]
    manifest = {"artifact_abi": ARTIFACT_ABI, "files": {**kept_files, **files}, "entries": [*kept, *entries]}
    path.write_text(json.dumps(manifest, indent=1) + "\n")


def mark_verified(folder: Path, target: str, verified: str) -> dict[str, Any]:
    """Note in ``manifest.json`` how the files of a target, as they are, have been verified; returns their records.

    Raises
    ------
    ArtifactError
        A file is not the one that the manifest describes.
    """
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    files = {name: record for name, record in content["files"].items() if name.startswith(f"{target}/")}
    for name, record in files.items():
        loader.load(loader.manifest(folder), name)
        record["verified"] = verified
    path.write_text(json.dumps(content, indent=1) + "\n")
    return files


def part_of(target: CudaTarget, tiles: str | None, formats: str | None) -> CudaTarget:
    """Some tile heights and weight formats of a target, without fp8 accumulation: what a comparison needs, in half a minute.

    Raises
    ------
    ArgumentError
        The target has no such.
    """
    known_tiles = {str(variant.tile_m): variant.tile_m for variant in target.build.variants(WeightFormat.mxfp4)}

    def chosen(option: str, text: str, known: Mapping[str, Any]) -> tuple[Any, ...]:
        names = text.split(",")
        if any(name not in known for name in names):
            raise ArgumentError(f"{option}: got {text}, expected some of {', '.join(known)}")
        return tuple(known[name] for name in names)

    return replace(
        target,
        has_fp8=False,
        tiles=chosen("--tiles", tiles, known_tiles) if tiles else target.tiles,
        formats=chosen("--weights", formats, WeightFormat.__members__) if formats else target.formats,
    )


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m tvmmoe.build", description=__doc__)
    parser.add_argument("--target", required=True, choices=TARGETS)
    parser.add_argument("--out", type=Path, default=loader.artifacts_dir(), help="folder of manifest.json and the files")
    parser.add_argument("--verified", choices=VERIFIED, help="compile nothing: note how the files there were verified")
    parser.add_argument("--tiles", help="of a CUDA target, several with commas; with --out")
    parser.add_argument("--weights", help="formats; the same")
    parser.add_argument("--records", type=Path, help="folder that tvmmoe.tune --out named, instead of schedules/")
    options = parser.parse_args(argv)
    cuda_target = CUDA_TARGETS.get(options.target)
    if options.tiles or options.weights:
        if cuda_target is None or options.verified or options.out == loader.artifacts_dir():
            parser.error("--tiles, --weights: got a part of a target, expected a CUDA target and another folder by --out")
        try:
            cuda_target = part_of(cuda_target, options.tiles, options.weights)
        except ArgumentError as error:
            parser.error(str(error))
    if options.records and (options.verified or options.target == "host"):
        parser.error("--records: got a folder, expected none: nothing is chosen from records")
    if cuda_target is not None:
        cuda_target = replace(cuda_target, records=options.records)
    if options.verified:
        files = mark_verified(options.out, options.target, options.verified)
    else:
        makers = {"cpu": functools.partial(build_cpu, records=options.records), "host": build_host}
        make = makers.get(options.target) or functools.partial(build_cuda, cuda_target)
        files, entries = make(options.out)
        write_manifest(options.out, files, entries)
    for name, record in files.items():
        size, digest = f"{record['bytes'] / 2**20:.1f} MiB", record["tir_sha256"][:12]
        print(f"{name}  {size}  tir {digest}  {record['verified']}")


if __name__ == "__main__":
    main()
