# SPDX-License-Identifier: Apache-2.0
"""The manifest describes what ships: checksums, selection ranges, freshness against the sources, refusals."""

import functools
import hashlib
import itertools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tvmmoe
from tvmmoe import loader, op, relaunch, torch_op
from tvmmoe.config import WeightFormat
from tvmmoe.select import CUDA_TARGETS, select, targets_of

MANIFEST = loader.manifest()


@pytest.mark.parametrize("file", MANIFEST.files)
def test_file_is_what_the_manifest_says(file):
    content = (MANIFEST.folder / file).read_bytes()
    record = MANIFEST.files[file]
    assert record["bytes"] == len(content)
    assert record["sha256"] == hashlib.sha256(content).hexdigest()


def test_cpu_artifact_is_fresh():
    cpu = pytest.importorskip("tvmmoe.kernels.cpu")
    from tvmmoe.build import cpu_functions

    digest = cpu.tir_sha256(cpu_functions())
    for level in cpu.LEVELS:
        assert MANIFEST.files[f"cpu/fp4_block_scale_moe_{level}.so"]["tir_sha256"] == digest


def test_host_artifact_is_fresh():
    build = pytest.importorskip("tvmmoe.build")
    assert MANIFEST.files[relaunch.FILE]["tir_sha256"] == hashlib.sha256(build.HOST_SOURCE.read_bytes()).hexdigest()


CUDA_FILES: dict[str, set[str]] = {}  # by target
for one in MANIFEST.entries:
    if one.target.startswith("sm"):
        CUDA_FILES.setdefault(one.target, set()).add(one.file)


@pytest.mark.parametrize("weight_format", WeightFormat)
@pytest.mark.parametrize("target", CUDA_FILES)
def test_cuda_artifact_is_fresh(target, weight_format):
    pytest.importorskip("tvm")
    from tvmmoe import build

    source = build.cuda_source(build.CUDA_TARGETS[target], weight_format)
    record = MANIFEST.files[f"{target}/{build.CUDA_TARGETS[target].build.file_name(weight_format)}"]
    assert record["tir_sha256"] == hashlib.sha256(source.encode()).hexdigest()


def test_fp8_artifact_is_fresh():
    build = pytest.importorskip("tvmmoe.kernels.sm90a.build")
    digest = hashlib.sha256(build.fp8_source().encode()).hexdigest()
    assert MANIFEST.files[f"sm90a/{build.FP8_FILE}"]["tir_sha256"] == digest


def kernels_that_hurry(source: str) -> list[str]:
    """Kernels that let the next one start (griddepcontrol.launch_dependents) on a path without griddepcontrol.wait before.

    A wait counts for what follows it in its own block and in blocks inside of that.
    """
    found, kernel, blocks, waits, count = [], "", [], set(), 0
    for line in source.splitlines():
        if "__global__" in line and line.rstrip().endswith("{"):
            kernel, blocks, waits = re.search(r"(\w+_moe_\w+)\(", line)[1], [], set()
        if kernel and "griddepcontrol_wait()" in line:
            waits.add(blocks[-1])
        if kernel and "griddepcontrol_launch_dependents()" in line and waits.isdisjoint(blocks):
            found.append(kernel)
        for brace in re.findall("[{}]", line):
            if brace == "{":
                blocks.append(count := count + 1)
            elif blocks:
                blocks.pop()
                kernel = kernel if blocks else ""
    return found


@pytest.mark.parametrize("file", ["mxfp4", "nvfp4", "fp8"])
def test_only_requantise_starts_the_next_kernel_before_it_has_waited(file):
    """What gemm2 and finalize read before they wait (lists, slots) is there because of this: requantise begins once gemm1 has
    waited for them, and as all its threads wait, its end is that of gemm1, too."""
    pytest.importorskip("tvm")
    from tvmmoe import build
    from tvmmoe.kernels.sm90a import build as sm90a

    source = sm90a.fp8_source() if file == "fp8" else build.cuda_source(build.CUDA_TARGETS["sm90a"], WeightFormat[file])
    wait, launch = (f"tvm_builtin_ptx_griddepcontrol_{name}();" for name in ("wait", "launch_dependents"))
    hurried = kernels_that_hurry(source)
    assert hurried and all("_requantize_" in name for name in hurried)
    assert len(re.findall(re.escape(launch) + r"\s+" + re.escape(wait), source)) == len(hurried)
    launched = re.findall(r"tvmmoe_launch<::(\w+)>", source)
    for i, name in enumerate(launched):
        if name in hurried:  # behind gemm1, but for other formats' requantise
            assert "_gemm1" in next(other for other in reversed(launched[:i]) if other not in hurried), name
    swapped = source.replace(wait, "?").replace(launch, wait).replace("?", launch)
    assert any("finalize" in name for name in kernels_that_hurry(swapped))


def test_fp8_entry_comes_before_those_whose_calls_it_takes():
    operator = pytest.importorskip("tvmmoe.kernels.sm90a.operator_fp8")
    (entry,) = (entry for entry in MANIFEST.entries if entry.accumulation == "fp8")
    assert entry == next(e for e in MANIFEST.entries if e.target == "sm90a" and "mxfp8" in e.activation_formats)
    assert (entry.weight_format, entry.activation_formats, entry.tile_m) == ("mxfp4", ("mxfp8",), operator.TILE_M)
    assert (entry.symbol, entry.min_rows_per_expert, entry.max_rows_per_expert) == (operator.SYMBOL, operator.MIN_ROWS, None)


@pytest.mark.parametrize("target", CUDA_FILES)
def test_cuda_entries_are_what_the_build_writes(target):
    pytest.importorskip("tvm")
    from tvmmoe import build

    _, rows = build.cuda_records(build.CUDA_TARGETS[target], MANIFEST.folder, "measured")
    assert [loader.entry_of(row) for row in rows] == [entry for entry in MANIFEST.entries if entry.target == target]


@pytest.mark.parametrize("target", CUDA_FILES)
def test_cuda_artifact_loads_without_a_gpu_and_has_every_symbol(target):
    for entry in (entry for entry in MANIFEST.entries if entry.target == target):
        assert loader.load(MANIFEST, entry.file)[entry.symbol] is not None


@pytest.mark.parametrize("target", CUDA_FILES)
def test_cuda_artifact_has_machine_code_for_its_chips(target):
    """In CUDA's own words, not in the build's: the names of the cubins that the file holds."""
    nvcc = pytest.importorskip("tvmmoe.kernels.nvcc")
    chips = {f"sm_{major}{minor}a" for (major, minor), name in CUDA_TARGETS.items() if name == target}
    for file in CUDA_FILES[target]:
        assert nvcc.chips_of(MANIFEST.folder / file) == (chips or {"sm_80"})


def fatbin(library, folder):
    """The CUDA code of a library; the rest of it holds names of nvcc's temporary files."""
    code = folder / "fatbin"
    subprocess.run(["objcopy", "-O", "binary", "--only-section=.nv_fatbin", str(library), str(code)], check=True)
    return code.read_bytes()


# What ptxas did this to all the same. It serves no load on an H200; on an H100 13.9 to 19.6 rows, until nvfp4 is measured
# there.
MANY_MOVES = {"fp4_block_scale_moe_nvfp4_m32_gemm2"}


@functools.cache  # disassembling takes seconds
def hoppers_gemms(weight_format) -> list[tuple]:
    """Name, configuration and disassembly of the GEMMs that ship."""
    pytest.importorskip("tvm")
    from tvmmoe import build
    from tvmmoe.kernels import nvcc

    target, gemms = build.CUDA_TARGETS["sm90a"], []
    kernels = nvcc.sass_by_kernel(MANIFEST.folder / target.name / target.build.file_name(weight_format))
    for variant in build.shipped_variants(target, weight_format):
        stages = {"gemm1": variant.ungated_gemm1, "gemm1_gated": variant.gemm1, "gemm2": variant.gemm2}
        stages |= {"gemm2_short": variant.gemm2_short, "gemm_pair": variant.gemm_pair if variant.meets_few_tokens else None}
        names = {f"{variant.symbol}_{stage}": config for stage, config in stages.items() if config is not None}
        gemms += [(name, config, kernels[name]) for name, config in names.items()]
    return gemms


@pytest.mark.parametrize("weight_format", WeightFormat)
def test_hoppers_tma_warp_keeps_its_state_in_uniform_registers(weight_format):
    """A branch more where tiles are looked up, and ptxas moves every operand of a TMA from a register of each lane (R2UR)
    before it: six moves a TMA, not one, which took 4 to 6 % more time on the H100, and nothing but time."""
    checked = 0
    for name, config, sass in hoppers_gemms(weight_format):
        if config.is_issued_by_warp and config.cluster == 1:
            moves, loads = (len(re.findall(rf"\b{opcode}\b", sass)) for opcode in ("R2UR", "UTMALDG"))
            assert 0 < loads and (moves <= 2 * loads) == (name not in MANY_MOVES), (name, moves, loads)
            checked += 1
    assert checked >= 10


def uniform_moves_of_loads(sass: str) -> list[str]:
    """Instructions that move what the one before them that wrote the register had loaded into a uniform register."""
    writers, moves = {}, []
    for text in re.findall(r"/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\w+\s+)?(\S.*?)\s*;", sass):
        opcode, _, operands = text.partition(" ")
        if opcode == "R2UR" and writers.get(operands.split(", ")[-1], "").startswith("LDG"):
            moves.append(text)
        if target := re.match(r"\s*(R\d+)\b", operands):
            writers[target[1]] = opcode
    return moves


@pytest.mark.parametrize("weight_format", WeightFormat)
def test_hoppers_consumers_do_not_wait_for_what_their_epilogue_needs(weight_format):
    """What they load in front of the main loop arrives under it, unless ptxas takes it for uniform: each tile of gpt-oss
    then waited for a clamp limit (7 % of a GEMM at 16 columns)."""
    load, move = ("        /*0010*/   @P0 LDG.E R25, desc[UR38][R24.64] ;\n", "        /*0020*/   @P0 R2UR UR16, R25 ;\n")
    assert len(uniform_moves_of_loads(load + move)) == 1
    assert not uniform_moves_of_loads(load + "        /*0018*/   IADD3 R25, R24, 0x1, RZ ;\n" + move)
    checked = 0
    for name, config, sass in hoppers_gemms(weight_format):
        if config.loads_state_early:
            _, consumers = sass.split("USETMAXREG.TRY_ALLOC")
            assert "LDG" in consumers and not uniform_moves_of_loads(consumers), name
            checked += 1
    assert checked >= 14


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_the_same_decisions_give_the_same_cubin(tmp_path):
    """Of one small kernel: two runs of nvcc, ten seconds."""
    pytest.importorskip("xgboost")
    from tvmmoe.tuning import cuda, sm90a

    config = sm90a.kernel.GemmConfig(WeightFormat.mxfp4, **sm90a.default_of_tile(8))
    built = []
    for name in ("first.so", "second.so"):
        cuda.compile_unit(sm90a.__name__, [("gemm2", config)], str(tmp_path / name))
        built.append(fatbin(tmp_path / name, tmp_path))
    assert len(built[0]) > 5_000 and built[0] == built[1]


def test_wheel_has_every_folder_of_artifacts_and_kernels():
    root = Path(__file__).parents[1]
    packages = (root / "pyproject.toml").read_text()
    folders = {f"tvmmoe.artifacts.{file.split('/')[0]}" for file in MANIFEST.files}
    assert all(f'"{folder}" = ["*.so"]' in packages for folder in folders)
    folders |= {f"tvmmoe.kernels.{path.parent.name}" for path in (root / "tvmmoe" / "kernels").glob("*/__init__.py")}
    assert [folder for folder in sorted(folders) if f'    "{folder}",\n' not in packages] == []


def test_selection_ranges_touch_and_end_in_a_catch_all():
    groups = {}
    for entry in MANIFEST.entries:
        if entry.accumulation == "fp8":  # for its own loads alone
            continue
        ranges = [("", entry.min_rows_per_expert, entry.max_rows_per_expert), *entry.device_ranges]
        for gpu, low, high in ranges:
            groups.setdefault((entry.target, entry.weight_format, gpu), []).append((low, high))
    assert {target for target, *_ in groups} >= {"x86-64", "x86-64-v3", "sm90a", "sm120a"}
    assert ("sm90a", "mxfp4", "NVIDIA H200") in groups
    for (target, weight_format, _), ranges in groups.items():
        assert len(ranges) == len(groups[target, weight_format, ""])
        used = [(low, high) for low, high in ranges if high != 0]
        assert used[0][0] == 0 and used[-1][1] is None
        assert all(left[1] == right[0] for left, right in itertools.pairwise(used))


@pytest.mark.parametrize("target", targets_of(torch.device("cpu")))
def test_both_cpu_levels_agree(target, monkeypatch):
    from tvmmoe.testing import make_case, rel_l2

    kwargs = make_case(num_tokens=21)
    (expected,) = tvmmoe.trtllm_fp4_block_scale_moe(**kwargs)
    torch_op.selected_plan.cache_clear()
    relaunch.forget()
    monkeypatch.setattr(torch_op, "targets_of", lambda device: (target,))
    (actual,) = tvmmoe.trtllm_fp4_block_scale_moe(**kwargs)
    torch_op.selected_plan.cache_clear()
    relaunch.forget()
    assert rel_l2(actual, expected) < 4e-3


def test_damaged_file_is_refused(tmp_path):
    shutil.copytree(MANIFEST.folder / "cpu", tmp_path / "cpu")
    shutil.copy(MANIFEST.folder / "manifest.json", tmp_path)
    file = next(file for file in MANIFEST.files if file.startswith("cpu/"))
    with (tmp_path / file).open("ab") as stream:
        stream.write(b"x")
    with pytest.raises(tvmmoe.ArtifactError, match="sha256 differs"):
        loader.load(loader.manifest(tmp_path), file)


def test_other_abi_is_refused(tmp_path):
    (tmp_path / "manifest.json").write_text(json.dumps({"artifact_abi": 999, "files": {}, "entries": []}))
    with pytest.raises(tvmmoe.ArtifactError, match="artifact_abi is 999"):
        loader.manifest(tmp_path)


def test_device_without_artifact_is_named(monkeypatch):
    monkeypatch.setattr(torch_op, "select", lambda source, targets, problem, gpu: select(source, ("sm75a",), problem))
    torch_op.selected_plan.cache_clear()
    with pytest.raises(tvmmoe.UnsupportedError, match="no bf16 x mxfp4 artifact for sm75a; shipped: .*--target sm75a"):
        op.workspace_bytes(1, 64, 64, 4, 2)
    torch_op.selected_plan.cache_clear()


def test_import_starts_neither_tvm_nor_cuda():
    code = "import sys, tvmmoe, torch; assert 'tvm' not in sys.modules; assert not torch.cuda.is_initialized()"
    subprocess.run([sys.executable, "-c", code], check=True)
