# SPDX-License-Identifier: Apache-2.0
"""Tuning spaces of CUDA targets without their GPUs: what is legal, what is compiled, how choices become artifacts."""

import math

import pytest
import torch

tvm = pytest.importorskip("tvm")
pytest.importorskip("xgboost")

from tvm.s_tir import Schedule  # noqa: E402

import tvmmoe  # noqa: E402
from tvmmoe import torch_op, tune  # noqa: E402
from tvmmoe.arguments import validate  # noqa: E402
from tvmmoe.config import ActivationFormat, WeightFormat  # noqa: E402
from tvmmoe.kernels import nvcc  # noqa: E402
from tvmmoe.kernels.sm80.pipeline import SMEM_BYTES  # noqa: E402
from tvmmoe.kernels.sm120a import build  # noqa: E402
from tvmmoe.select import targets_of  # noqa: E402
from tvmmoe.testing import Case, make_case, skip_unless_arch  # noqa: E402
from tvmmoe.tuning import cuda, records, sm120a  # noqa: E402
from tvmmoe.tuning.search import Run  # noqa: E402
from tvmmoe.tuning.tasks import Task, decisions, key_of, traced_decisions  # noqa: E402

TASK = Task(sm120a.TARGET, "gemm1", "nvfp4", "Qwen3-235B-A22B", 256)


@pytest.mark.parametrize("num_tokens", [1, 64, 256, 1024, 8192])
@pytest.mark.parametrize("stage, weight_format", [("gemm1", "nvfp4"), ("gemm2", "mxfp4")])
def test_space_holds_the_default_and_has_finite_features(stage, weight_format, num_tokens):
    task = Task(sm120a.TARGET, stage, weight_format, "Qwen3-235B-A22B", num_tokens)
    configs = sm120a.configs(task)
    assert sm120a.default(task) in sm120a.seeds(task) and len(configs) >= 32
    assert all(config in configs for config in sm120a.seeds(task))
    assert Task.of_label(task.target, stage, task.label) == task
    rows = [sm120a.features(task, config) for config in configs]
    assert len({len(row) for row in rows}) == 1 and all(math.isfinite(x) for row in rows for x in row)
    assert len(set(map(tuple, rows))) == len(configs), "candidates that the cost model cannot tell apart"
    for config in configs:
        c = sm120a.gemm_config(task, config)
        assert c.smem_bytes <= SMEM_BYTES and c.tile_m == config["tile_m"] and c.threads <= 512


@pytest.mark.parametrize(
    "change",
    [
        dict(tile_m=8, warps_t=2),  # less than a fragment a warp
        dict(tile_m=128, k_step=256, num_stages=6),  # shared memory
        dict(tile_m=128, warps_r=2, warps_t=1, mi=4),  # 256 accumulators a thread
        dict(warps_r=1, warps_t=1),  # one warp hides no latency
    ],
)
def test_what_cannot_be_built_is_illegal(change):
    assert sm120a.is_legal(TASK, sm120a.default(TASK))
    assert not sm120a.is_legal(TASK, sm120a.default(TASK) | change)


def test_tiles_far_from_the_rows_are_illegal():
    few, many = (Task(sm120a.TARGET, "gemm1", "nvfp4", "Qwen3-235B-A22B", n) for n in (1, 8192))
    tall, short = sm120a.default(many), sm120a.default(few)
    assert sm120a.is_legal(many, tall) and not sm120a.is_legal(few, tall)
    assert sm120a.is_legal(few, short) and not sm120a.is_legal(many, short)


def test_timed_calls_are_of_the_formats_that_it_multiplies():
    assert sm120a.mode("nvfp4") == ("nvfp4", "nvfp4") and sm120a.mode("mxfp4") == ("mxfp8", "mxfp4")


def test_gemm1_result_is_found_in_the_workspace():
    case = Case(num_tokens=37, activation_format=ActivationFormat.nvfp4, weight_format=WeightFormat.nvfp4)
    problem = validate(**torch_op.with_defaults(**make_case(case)))
    piece = sm120a.z_slice(problem, 32)
    rows = torch_op.num_padded_tokens(problem, 32)
    assert piece.num_bytes >= rows * problem.intermediate_size * 2 and piece.offset % 128 == 0


def test_trace_survives_the_database(tmp_path):
    run = Run(TASK, sm120a, records.Database(tmp_path), tmp_path, None)
    sch = Schedule(run.mod)
    sm120a.space(TASK, sch)
    run.record(decisions(sch), 1e3)
    again = Run(TASK, sm120a, records.Database(tmp_path), tmp_path, None)
    assert again.us == {key_of(decisions(sch)): pytest.approx(1e3)}
    assert traced_decisions(again.trace_of(sm120a.default(TASK))) == sm120a.default(TASK)


# --------------------------------------------------------------------------------------------------------- candidates


def test_candidates_become_libraries_of_the_instruction(tmp_path):
    other = sm120a.default(TASK) | dict(warps_t=2, num_stages=2)
    configs = [sm120a.gemm_config(TASK, config) for config in (sm120a.default(TASK), other)]
    path = tmp_path / "unit.so"
    cuda.compile_unit(sm120a.__name__, [("gemm1", c) for c in configs], str(path))
    sass = {part.split()[0]: part for part in nvcc.sass_of(path).split("Function : ")[1:]}
    assert set(sass) == {f"{sm120a.symbol('gemm1', c)}_gemm1_gated" for c in configs}
    assert all("OMMA" in text for text in sass.values())


@pytest.mark.parametrize(
    "capability, gencodes",
    [
        ((12, 0), [build.NATIVE]),
        ((12, 1), [build.GB10]),
        ((9, 0), [build.NATIVE, build.GB10]),
        (None, [build.NATIVE, build.GB10]),
    ],
)
def test_candidates_are_for_the_gpu_at_hand(capability, gencodes, monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(build, "packed_source", lambda makers: "")
    monkeypatch.setattr(build, "compile_so", lambda source, path, *codes: seen.extend(codes))
    sm120a.compile_stage({}, tmp_path / "unit.so")
    assert seen == gencodes


# ------------------------------------------------------------------------------------------------------------ choices


def test_without_records_the_choices_are_the_hand_chosen_ones(tmp_path):
    for weight_format in WeightFormat:
        chosen = sm120a.chosen(weight_format.name, tmp_path)
        assert {v.tile_m: {"gemm1": v.gemm1, "gemm2": v.gemm2} for v in build.variants(weight_format)} == chosen


def test_recorded_choice_becomes_the_configuration(tmp_path):
    default = sm120a.default_of_tile(64)
    better = default | dict(num_stages=3)
    for num_tokens in (512, 1024):
        task = Task(sm120a.TARGET, "gemm2", "nvfp4", "Qwen3-235B-A22B", num_tokens)
        database = records.Database(records.folder_of(sm120a.TARGET, "gemm2", tmp_path))
        run = Run(task, sm120a, database, tmp_path, None)
        for config, us in ((default, 100.0), (better, 90.0)):
            run.record(config, us)
    chosen = sm120a.chosen("nvfp4", tmp_path)
    assert chosen[64]["gemm2"].num_stages == 3 and chosen[64]["gemm1"].num_stages == default["num_stages"]
    assert sm120a.chosen("mxfp4", tmp_path)[64]["gemm2"].num_stages == default["num_stages"]


@pytest.mark.parametrize("wrong", [1, 5])
def test_error_of_z_is_that_of_rows_and_of_columns(wrong):
    """Of thin tiles z is there a second time, times 2^94, which hides neither an error of its own nor one of the rows."""
    rows = torch.randn(4, 128, generator=torch.Generator().manual_seed(1)).bfloat16()
    expected = torch.cat([rows, rows * 2.0**94, torch.full_like(rows, float("nan"))])
    actual, live = expected.clone(), ~expected.isnan()
    assert cuda._rel_l2(actual.flatten(), expected.flatten(), live.flatten(), 512) == 0
    actual[wrong, 7] *= 1.5
    assert cuda._rel_l2(actual.flatten(), expected.flatten(), live.flatten(), 512) > 1e-3


@pytest.mark.parametrize("capability, name", [((9, 0), "sm90a"), ((12, 0), "sm120a"), ((12, 1), "sm120a")])
def test_native_target(capability, name, monkeypatch):
    targets_of.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    assert tune.native_target() == name
    targets_of.cache_clear()


def test_native_target_without_a_space_is_named(monkeypatch):
    targets_of.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA T4")
    with pytest.raises(tvmmoe.UnsupportedError, match="--target native: got NVIDIA T4, expected one of cpu, sm90a"):
        tune.native_target()
    targets_of.cache_clear()


@pytest.mark.gpu
@skip_unless_arch("sm120a")
@pytest.mark.parametrize("stage", ["gemm1", "gemm2"])
def test_tuning_on_the_gpu(stage, tmp_path):
    options = ["--target", "native", "--shape", "Qwen3-30B-A3B", "--tokens", "16", "--stage", stage, "--trials", "4"]
    assert tune.main([*options, "--out", str(tmp_path)]) == 0
    task = Task(sm120a.TARGET, stage, "mxfp4", "Qwen3-30B-A3B", 16)
    measurements, stale = records.load(sm120a.TARGET, stage, tmp_path)
    assert not stale and len(measurements) >= 3 and task in records.defaults_of(sm120a, measurements)
