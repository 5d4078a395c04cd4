# SPDX-License-Identifier: Apache-2.0
"""Tuning space of datacenter Blackwell without its GPU: what is legal, what is compiled, how choices become artifacts."""

import math
import re

import pytest
import torch

pytest.importorskip("tvm")
pytest.importorskip("xgboost")

from tvm.s_tir import Schedule  # noqa: E402

from tvmmoe import tune  # noqa: E402
from tvmmoe.build import CUDA_TARGETS, shipped_variants  # noqa: E402
from tvmmoe.config import ActivationFormat, WeightFormat  # noqa: E402
from tvmmoe.kernels import nvcc  # noqa: E402
from tvmmoe.kernels.sm100a import build, gemm  # noqa: E402
from tvmmoe.select import targets_of  # noqa: E402
from tvmmoe.testing import skip_unless_arch  # noqa: E402
from tvmmoe.tuning import cuda, records, sm100a  # noqa: E402
from tvmmoe.tuning.search import Run  # noqa: E402
from tvmmoe.tuning.tasks import STAGES, Task, decisions, key_of, traced_decisions  # noqa: E402

SHAPE = "Qwen3-235B-A22B"
TASK = Task(sm100a.TARGET, "gemm1", "nvfp4", SHAPE, 256)


@pytest.mark.parametrize("num_tokens", [1, 64, 256, 1024, 8192])
@pytest.mark.parametrize("stage, weight_format", [("gemm1", "nvfp4"), ("gemm2", "mxfp4")])
def test_space_holds_the_default_and_has_finite_features(stage, weight_format, num_tokens):
    task = Task(sm100a.TARGET, stage, weight_format, SHAPE, num_tokens)
    configs = sm100a.configs(task)
    assert sm100a.default(task) in sm100a.seeds(task) and len(configs) > len(sm100a.seeds(task))
    assert all(config in configs for config in sm100a.seeds(task))
    assert Task.of_label(task.target, stage, task.label) == task
    rows = [sm100a.features(task, config) for config in configs]
    assert len({len(row) for row in rows}) == 1 and all(math.isfinite(x) for row in rows for x in row)
    assert len(set(map(tuple, rows))) == len(configs), "candidates that the cost model cannot tell apart"
    kernels = [sm100a.gemm_config(task, config) for config in configs]
    assert len({sm100a.symbol(stage, c) for c in kernels}) == len(configs)
    assert all(c.smem_bytes <= 227 * 1024 and c.tmem_columns <= 512 for c in kernels)


@pytest.mark.parametrize(
    "change",
    [
        dict(num_stages=16),  # shared memory
        dict(tile_m=128, num_stages=3, accumulators=4),  # tensor memory: no column is left for scales
        dict(num_stages=2),  # not in the space
        dict(tile_m=64),  # no such variant
    ],
)
def test_what_cannot_be_built_is_illegal(change):
    assert sm100a.is_legal(TASK, sm100a.default(TASK))
    assert not sm100a.is_legal(TASK, sm100a.default(TASK) | change)


def test_tiles_far_from_the_rows_are_illegal():
    few, many = (Task(sm100a.TARGET, "gemm1", "nvfp4", SHAPE, n) for n in (1, 8192))
    tall, short = sm100a.default(many), sm100a.default(few)
    assert sm100a.is_legal(many, tall) and not sm100a.is_legal(few, tall)
    assert sm100a.is_legal(few, short) and not sm100a.is_legal(many, short)


def test_candidates_multiply_the_timed_formats():
    for weight_format, activation in (("nvfp4", "nvfp4"), ("mxfp4", "mxfp8")):
        task = Task(sm100a.TARGET, "gemm2", weight_format, SHAPE, 64)
        c = sm100a.gemm_config(task, sm100a.default(task))
        assert sm100a.mode(weight_format) == (activation, weight_format)
        assert (c.activation_format, c.weight_format) == (ActivationFormat[activation], WeightFormat[weight_format])
        assert gemm.is_legal(c)


def test_trace_survives_the_database(tmp_path):
    run = Run(TASK, sm100a, records.Database(tmp_path), tmp_path, None)
    sch = Schedule(run.mod)
    sm100a.space(TASK, sch)
    run.record(decisions(sch), 1e3)
    again = Run(TASK, sm100a, records.Database(tmp_path), tmp_path, None)
    assert again.us == {key_of(decisions(sch)): pytest.approx(1e3)}
    assert traced_decisions(again.trace_of(sm100a.default(TASK))) == sm100a.default(TASK)


@pytest.mark.parametrize("stage, kernel", [("gemm1", "gemm1_gated_nvfp4"), ("gemm2", "gemm2_nvfp4")])
def test_candidate_becomes_a_library_of_the_instruction(stage, kernel, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (10, 0))
    c = sm100a.gemm_config(TASK, sm100a.default(TASK) | dict(num_stages=4))
    path = tmp_path / "unit.so"
    cuda.compile_unit(sm100a.__name__, [(stage, c)], str(path))
    sass = nvcc.sass_by_kernel(path)
    assert set(sass) == {f"{sm100a.symbol(stage, c)}_{kernel}"} and nvcc.chips_of(path) == {"sm_100a"}
    assert all(re.findall(r"\bUTC[A-Z]MMA\b", text) and "UTCOMMA" in text for text in sass.values())


@pytest.mark.parametrize(
    "capability, gencodes",
    [
        ((10, 0), [build.DATACENTER]),
        ((10, 3), [build.ULTRA]),
        ((9, 0), [build.DATACENTER, build.ULTRA]),
        (None, [build.DATACENTER, build.ULTRA]),
    ],
)
def test_candidates_are_for_the_gpu_at_hand(capability, gencodes, monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(sm100a, "packed_source", lambda makers, arch: "")
    monkeypatch.setattr(build, "compile_so", lambda source, path, *codes: seen.extend(codes))
    sm100a.compile_stage({}, tmp_path / "unit.so")
    assert seen == gencodes


def test_without_records_the_choices_are_the_hand_chosen_ones(tmp_path):
    for weight_format in WeightFormat:
        chosen = sm100a.chosen(weight_format.name, tmp_path)
        assert {v.tile_m: {"quantized": v.quantized, "bf16": v.bf16} for v in build.variants(weight_format)} == chosen


@pytest.mark.parametrize("us_of_gemm2, num_stages", [(90.0, 3), (120.0, 5)])
def test_recorded_choice_is_one_of_both_stages(us_of_gemm2, num_stages, monkeypatch, tmp_path):
    """What gemm1 gains decides unless gemm2 loses."""
    default = sm100a.default_of_tile(128, "nvfp4")
    better = default | dict(num_stages=3)
    for stage, us in zip(STAGES, (90.0, us_of_gemm2), strict=True):
        database = records.Database(records.folder_of(sm100a.TARGET, stage, tmp_path))
        for num_tokens in (1024, 2048):
            run = Run(Task(sm100a.TARGET, stage, "nvfp4", SHAPE, num_tokens), sm100a, database, tmp_path, None)
            run.record(default, 100.0)
            run.record(better, us)
    chosen = sm100a.chosen("nvfp4", tmp_path)
    assert chosen[128]["quantized"].num_stages == num_stages
    assert chosen[128]["bf16"] == build.variant(WeightFormat.nvfp4, 128).bf16
    assert sm100a.chosen("mxfp4", tmp_path)[128]["quantized"] == build.variant(WeightFormat.mxfp4, 128).quantized
    monkeypatch.setattr(sm100a, "chosen", lambda weight_format, root=None: chosen)
    shipped = {v.tile_m: v for v in shipped_variants(CUDA_TARGETS["sm100a"], WeightFormat.nvfp4)}
    assert shipped[128].quantized.num_stages == num_stages and list(shipped) == list(sm100a.TILES)


@pytest.mark.parametrize("capability", [(10, 0), (10, 3)])
def test_native_target(capability, monkeypatch):
    targets_of.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    assert tune.native_target() == "sm100a"
    targets_of.cache_clear()


@pytest.mark.gpu
@skip_unless_arch("sm100a")
@pytest.mark.parametrize("stage", STAGES)
def test_tuning_on_the_gpu(stage, tmp_path):
    options = ["--target", "native", "--shape", "Qwen3-30B-A3B", "--tokens", "16", "--stage", stage, "--trials", "4"]
    assert tune.main([*options, "--out", str(tmp_path)]) == 0
    task = Task(sm100a.TARGET, stage, "mxfp4", "Qwen3-30B-A3B", 16)
    measurements, stale = records.load(sm100a.TARGET, stage, tmp_path)
    assert not stale and len(measurements) >= 3 and task in records.defaults_of(sm100a, measurements)
