# SPDX-License-Identifier: Apache-2.0
"""The manifest describes what ships: checksums, selection ranges, freshness against the sources, refusals."""

import hashlib
import json
import shutil
import subprocess
import sys

import pytest
import torch

import tvmmoe
from tvmmoe import loader, op, torch_op
from tvmmoe.config import WeightFormat
from tvmmoe.select import select, targets_of

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


@pytest.mark.parametrize("weight_format", WeightFormat)
def test_sm90a_artifact_is_fresh(weight_format):
    pytest.importorskip("tvm")
    from tvmmoe.build import sm90a_variants
    from tvmmoe.kernels.sm90a import build

    source = build.cuda_source(sm90a_variants(weight_format))
    record = MANIFEST.files[f"sm90a/{build.file_name(weight_format)}"]
    assert record["tir_sha256"] == hashlib.sha256(source.encode()).hexdigest()


def fatbin(library, folder):
    """The CUDA code of a library; the rest of it holds names of nvcc's temporary files."""
    code = folder / "fatbin"
    subprocess.run(["objcopy", "-O", "binary", "--only-section=.nv_fatbin", str(library), str(code)], check=True)
    return code.read_bytes()


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_the_same_decisions_give_the_same_cubin(tmp_path):
    """Of one small kernel: two runs of nvcc, ten seconds."""
    pytest.importorskip("xgboost")
    from tvmmoe.tuning import sm90a

    config = sm90a.kernel.GemmConfig(WeightFormat.mxfp4, **sm90a.default_of_tile(8))
    built = []
    for name in ("first.so", "second.so"):
        sm90a._compile([("gemm2", config)], str(tmp_path / name))
        built.append(fatbin(tmp_path / name, tmp_path))
    assert len(built[0]) > 10_000 and built[0] == built[1]


def test_selection_ranges_touch_and_end_in_a_catch_all():
    groups = {}
    for entry in (entry for entry in MANIFEST.entries if entry.max_rows_per_expert != 0):  # else it serves nothing
        groups.setdefault((entry.target, entry.weight_format), []).append(entry)
    assert {target for target, _ in groups} == {"x86-64", "x86-64-v3", "sm90a"}
    for entries in groups.values():
        assert entries[0].min_rows_per_expert == 0 and entries[-1].max_rows_per_expert is None
        for left, right in zip(entries, entries[1:], strict=False):
            assert left.max_rows_per_expert == right.min_rows_per_expert


@pytest.mark.parametrize("target", targets_of(torch.device("cpu")))
def test_both_cpu_levels_agree(target, monkeypatch):
    from tvmmoe.testing import make_case, rel_l2

    kwargs = make_case(num_tokens=21)
    (expected,) = tvmmoe.trtllm_fp4_block_scale_moe(**kwargs)
    torch_op.selected_plan.cache_clear()
    monkeypatch.setattr(torch_op, "targets_of", lambda device: (target,))
    (actual,) = tvmmoe.trtllm_fp4_block_scale_moe(**kwargs)
    torch_op.selected_plan.cache_clear()
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
    monkeypatch.setattr(torch_op, "select", lambda source, targets, problem: select(source, ("sm75a",), problem))
    torch_op.selected_plan.cache_clear()
    with pytest.raises(tvmmoe.UnsupportedError, match="no bf16 x mxfp4 artifact for sm75a; shipped: .*--target sm75a"):
        op.workspace_bytes(1, 64, 64, 4, 2)
    torch_op.selected_plan.cache_clear()


def test_import_starts_neither_tvm_nor_cuda():
    code = "import sys, tvmmoe, torch; assert 'tvm' not in sys.modules; assert not torch.cuda.is_initialized()"
    subprocess.run([sys.executable, "-c", code], check=True)
