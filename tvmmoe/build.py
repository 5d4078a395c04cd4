# SPDX-License-Identifier: Apache-2.0
"""Build artifacts and their manifest entries: ``python -m tvmmoe.build --target cpu|sm90a``. Needs the extra ``tune``."""

import argparse
import functools
import hashlib
import json
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tvm

from tvmmoe.abi import ARTIFACT_ABI
from tvmmoe.config import ActivationFormat, WeightFormat
from tvmmoe.crossovers import recorded_limits
from tvmmoe.kernels import cpu
from tvmmoe.kernels.cpu_operator import entry_symbol
from tvmmoe.loader import artifacts_dir

CPU_CROSSOVERS = "x86-64-v3"  # whose measured limits both levels take
TARGETS = ("cpu", "sm90a")
BF16_OPERAND_MODES = ("bf16-mxfp4", "bf16-nvfp4", "nvfp4-nvfp4")
FP8_MIN_ROWS = {64: 27.713, 128: 55.426, 192: 110.851}  # rows an expert: the limits of the bf16 tiles beside them


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
    min_rows_per_expert: dict[int, float],
    symbols: dict[int, str],
    file: str,
    activation_formats: Sequence[ActivationFormat] | None = None,
) -> list[dict[str, Any]]:
    """Manifest entries (loader.Entry) of a weight format, by tile height: ranges touch and end in a catch-all.

    A tile without a limit serves nothing: its range is [0, 0), so that it can still be found and measured.
    """
    quantized = ActivationFormat.mxfp8 if weight_format == WeightFormat.mxfp4 else ActivationFormat.nvfp4
    formats = activation_formats or (ActivationFormat.bf16, quantized)
    used = sorted(tile_m for tile_m in symbols if tile_m in min_rows_per_expert)
    limits = [*(min_rows_per_expert[tile_m] for tile_m in used), None]
    ranges = dict(zip(used, zip(limits, limits[1:], strict=False), strict=True))
    return [
        {
            "target": target,
            "weight_format": weight_format.name,
            "activation_formats": [form.name for form in formats],
            "tile_m": tile_m,
            "min_rows_per_expert": ranges.get(tile_m, (0, 0))[0],
            "max_rows_per_expert": ranges.get(tile_m, (0, 0))[1],
            "symbol": symbol,
            "file": file,
        }
        for tile_m, symbol in symbols.items()
    ]


def cpu_functions() -> dict[str, Any]:
    """What the CPU artifacts are compiled from, with the sizes that the tuning records choose."""
    from tvmmoe.tuning.cpu import chosen

    return cpu.functions(functools.cache(chosen))


def build_cpu(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Both x86-64 levels: file records and selection entries."""
    compiled = cpu_functions()
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
    limits, entries = recorded_limits(CPU_CROSSOVERS, cpu.TILE_M), []
    for level in cpu.LEVELS:
        for weight_format in WeightFormat:
            symbols = {tile_m: entry_symbol(weight_format, tile_m) for tile_m in cpu.TILE_M}
            entries += selection_rows(level, weight_format, limits, symbols, f"cpu/fp4_block_scale_moe_{level}.so")
    return entries


def build_sm90a(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """One file per weight format. ``verified`` stays ``compiled`` until the gpu suite has run on the rebuilt file."""
    from tvmmoe.kernels.sm90a import build

    build.build_sm90a(folder / "sm90a", sm90a_variants)
    return sm90a_records(folder, "compiled")


def sm90a_variants(weight_format: WeightFormat) -> list[Any]:
    """The variants that ship: what the tuning records choose, by hand where there are none."""
    from tvmmoe.kernels.sm90a.operator import Variant
    from tvmmoe.tuning.sm90a import chosen

    return [Variant(**configs) for configs in chosen(weight_format.name).values()]


def sm90a_records(folder: Path, verified: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """File records and selection entries of what lies in ``folder/sm90a``; the TIR hash is that of the CUDA source."""
    from tvmmoe.kernels.sm90a import build

    files, entries = {}, []
    for weight_format in WeightFormat:
        variants = sm90a_variants(weight_format)
        file = f"sm90a/{build.file_name(weight_format)}"
        digest = hashlib.sha256(build.cuda_source(variants).encode()).hexdigest()
        files[file] = file_record(folder / file, "sm90a", digest, _version_of("nvcc", -2), verified)
        limits = recorded_limits("sm90a", [variant.tile_m for variant in variants], BF16_OPERAND_MODES)
        symbols = {variant.tile_m: variant.symbol for variant in variants}
        is_mx = weight_format == WeightFormat.mxfp4
        formats = [ActivationFormat.bf16] if is_mx else None
        entries += selection_rows("sm90a", weight_format, limits, symbols, file, formats)
        if is_mx:
            entries += sm90a_mxfp8_entries(limits, symbols, file)
    variants = build.fp8_variants()
    file = f"sm90a/{build.FP8_FILE}"
    digest = hashlib.sha256(build.cuda_source(variants).encode()).hexdigest()
    files[file] = file_record(folder / file, "sm90a", digest, _version_of("nvcc", -2), verified)
    return files, entries


def sm90a_mxfp8_entries(limits: dict[int, float], symbols: dict[int, str], file: str) -> list[dict[str, Any]]:
    """mxfp8 x mxfp4: the bf16 kernels' small tiles, then those on fp8 wgmma."""
    from tvmmoe.kernels.sm90a import build

    first = min(FP8_MIN_ROWS)
    small = {tile_m: symbol for tile_m, symbol in symbols.items() if tile_m < first}
    tall = {variant.tile_m: variant.symbol for variant in build.fp8_variants()}
    limits = {tile_m: rows for tile_m, rows in limits.items() if tile_m < first} | FP8_MIN_ROWS
    entries = selection_rows("sm90a", WeightFormat.mxfp4, limits, small | tall, file, [ActivationFormat.mxfp8])
    return [entry | {"file": f"sm90a/{build.FP8_FILE}"} if entry["tile_m"] in tall else entry for entry in entries]


def write_manifest(folder: Path, files: dict[str, Any], entries: Iterable[dict[str, Any]]) -> None:
    """Put records into ``manifest.json``, replacing those of the same targets and keeping the others."""
    path = folder / "manifest.json"
    content = json.loads(path.read_text()) if path.is_file() else {"files": {}, "entries": []}
    targets = {record["target"] for record in files.values()}
    kept_files = {name: record for name, record in content["files"].items() if record["target"] not in targets}
    kept = [entry for entry in content["entries"] if entry["target"] not in targets]
    manifest = {"artifact_abi": ARTIFACT_ABI, "files": {**kept_files, **files}, "entries": [*kept, *entries]}
    path.write_text(json.dumps(manifest, indent=1) + "\n")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m tvmmoe.build", description=__doc__)
    parser.add_argument("--target", required=True, choices=TARGETS)
    parser.add_argument("--out", type=Path, default=artifacts_dir(), help="folder of manifest.json and the files")
    arguments = parser.parse_args()
    files, entries = (build_cpu if arguments.target == "cpu" else build_sm90a)(arguments.out)
    write_manifest(arguments.out, files, entries)
    for name, record in files.items():
        print(f"{name}  {record['bytes'] / 2**20:.1f} MiB  tir {record['tir_sha256'][:12]}")


if __name__ == "__main__":
    main()
