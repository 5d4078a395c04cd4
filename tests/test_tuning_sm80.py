# SPDX-License-Identifier: Apache-2.0
"""Tuning space of the portable target without a GPU: what is legal, what is compiled, how choices become artifacts."""

import functools
import math
import random

import pytest
import torch

pytest.importorskip("tvm")
pytest.importorskip("xgboost")

from tvm.s_tir import Schedule  # noqa: E402

from tvmmoe import torch_op, tune  # noqa: E402
from tvmmoe.arguments import validate  # noqa: E402
from tvmmoe.build import CUDA_TARGETS, shipped_variants  # noqa: E402
from tvmmoe.config import WeightFormat  # noqa: E402
from tvmmoe.kernels import nvcc  # noqa: E402
from tvmmoe.kernels.sm80 import build  # noqa: E402
from tvmmoe.select import targets_of  # noqa: E402
from tvmmoe.testing import Case, make_case, skip_unless_arch  # noqa: E402
from tvmmoe.tuning import cuda, records, sm80  # noqa: E402
from tvmmoe.tuning.search import Mutate, Run  # noqa: E402
from tvmmoe.tuning.tasks import STAGES, Task, decisions, key_of, traced_decisions  # noqa: E402

SHAPE = "Qwen3-235B-A22B"
TASK = Task(sm80.TARGET, "gemm1", "nvfp4", SHAPE, 256)


@pytest.mark.parametrize("num_tokens", [1, 64, 256, 1024, 8192])
@pytest.mark.parametrize("stage, weight_format", [("gemm1", "nvfp4"), ("gemm2", "mxfp4")])
def test_space_holds_the_default_and_has_finite_features(stage, weight_format, num_tokens):
    task = Task(sm80.TARGET, stage, weight_format, SHAPE, num_tokens)
    configs = sm80.configs(task)
    assert sm80.default(task) in sm80.seeds(task) and len(configs) >= 8
    assert {config["tile_m"] for config in sm80.seeds(task)} == set(sm80.knobs(task)["tile_m"])
    assert all(config in configs for config in sm80.seeds(task))
    assert Task.of_label(task.target, stage, task.label) == task
    rows = [sm80.features(task, config) for config in configs]
    assert len({len(row) for row in rows}) == 1 and all(math.isfinite(x) for row in rows for x in row)
    assert len(set(map(tuple, rows))) == len(configs), "candidates that the cost model cannot tell apart"
    kernels = [sm80.gemm_config(task, config) for config in configs]
    assert len({sm80.symbol(stage, c) for c in kernels}) == len(configs)
    assert all(c.smem_bytes <= 99 * 1024 and c.threads <= 512 for c in kernels)
    assert [c.tile_m for c in kernels] == [config["tile_m"] for config in configs]


@pytest.mark.parametrize(
    "change",
    [
        dict(tile_m=8, warps_t=2),  # less than a fragment a warp
        dict(tile_m=128, num_stages=3),  # shared memory
        dict(k_step=128, warps_k=2),  # less than a K block a warp
        dict(warps_r=2, warps_t=1, mi=4, num_stages=2),  # 128 accumulators a thread, and what feeds them
        dict(warps_r=8, warps_t=2, mi=2, num_stages=2),  # 512 threads twice an SM leave each 64 registers
        dict(warps_r=1, warps_t=1),  # one warp hides no latency
        dict(num_stages=7),  # not in the space, and shared memory
    ],
)
def test_what_cannot_be_built_is_illegal(change):
    good = sm80.default_of_tile(64)
    assert sm80.is_legal(TASK, good) and not sm80.is_legal(TASK, good | change)


def test_tiles_far_from_the_rows_are_illegal():
    few, many = (Task(sm80.TARGET, "gemm1", "nvfp4", SHAPE, n) for n in (1, 8192))
    tall, short = sm80.default(many), sm80.default(few)
    assert sm80.is_legal(many, tall) and not sm80.is_legal(few, tall)
    assert sm80.is_legal(few, short) and not sm80.is_legal(many, short)


def test_timed_calls_have_bf16_tokens_and_hoppers_workspace():
    assert all(sm80.mode(weight_format.name) == ("bf16", weight_format.name) for weight_format in WeightFormat)
    problem = validate(**torch_op.with_defaults(**make_case(Case(num_tokens=37))))
    piece = sm80.z_slice(problem, 32)
    rows = torch_op.num_padded_tokens(problem, 32)
    assert piece.num_bytes >= rows * problem.intermediate_size * 2 and piece.offset % 128 == 0


def test_traces_survive_the_database_and_mutation(tmp_path):
    run = Run(TASK, sm80, records.Database(tmp_path), tmp_path, None)
    sch = Schedule(run.mod)
    sm80.space(TASK, sch)
    run.record(decisions(sch), 1e3)
    again = Run(TASK, sm80, records.Database(tmp_path), tmp_path, None)
    assert again.us == {key_of(decisions(sch)): pytest.approx(1e3)}
    mutate, trace, seen = Mutate(0), sch.trace, set()
    for _ in range(30):
        trace = mutate.apply(trace)
        mutated = Schedule(run.mod)
        trace.apply_to_schedule(mutated, remove_postproc=True)
        assert decisions(mutated) == traced_decisions(trace)
        seen.add(key_of(decisions(mutated)))
    assert len(seen) > 8


def test_every_candidate_replays(tmp_path):
    run = Run(TASK, sm80, records.Database(tmp_path), tmp_path, None)
    assert all(traced_decisions(run.trace_of(config)) == config for config in sm80.configs(TASK))


# --------------------------------------------------------------------------------------------------------- candidates


@pytest.mark.parametrize("stage, weight_format", [("gemm1", "nvfp4"), ("gemm2", "mxfp4")])
def test_candidates_are_cuda_source(stage, weight_format):
    task = Task(sm80.TARGET, stage, weight_format, SHAPE, 256)
    kernels = [sm80.gemm_config(task, config) for config in random.Random(0).sample(sm80.configs(task), 3)]
    makers = {sm80.symbol(stage, c): functools.partial(sm80.stage_function, stage, c) for c in kernels}
    source = build.packed_source(makers)
    assert all(f"{symbol}_gemm" in source for symbol in makers) and len(makers) == 3
    assert "mma.sync.aligned.m16n8k16" in source
    assert "programmaticStreamSerialization" not in source  # the attribute, which sm_80 has not


@pytest.mark.parametrize(
    "capability, gencode",
    [
        ((8, 0), "arch=compute_80,code=[sm_80]"),
        ((8, 9), "arch=compute_80,code=[sm_89]"),
        ((9, 0), "arch=compute_80,code=[sm_90]"),
        ((12, 0), "arch=compute_80,code=[sm_120]"),
        (None, "arch=compute_80,code=[sm_80,sm_90]"),
    ],
)
def test_candidates_are_for_the_gpu_at_hand(capability, gencode, monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(build, "packed_source", lambda makers: "")
    monkeypatch.setattr(build, "compile_so", lambda source, path, *codes: seen.extend(codes))
    sm80.compile_stage({}, tmp_path / "unit.so")
    assert seen == [gencode]


def test_candidate_becomes_a_library(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    c = sm80.gemm_config(TASK, sm80.default_of_tile(16) | dict(num_stages=2))
    path = tmp_path / "unit.so"
    cuda.compile_unit(sm80.__name__, [("gemm1", c)], str(path))
    sass = nvcc.sass_by_kernel(path)
    assert set(sass) == {f"{sm80.symbol('gemm1', c)}_gemm1_gated"} and nvcc.chips_of(path) == {"sm_80", "sm_90"}
    assert all("HMMA.16816.F32.BF16" in text for text in sass.values())


# ------------------------------------------------------------------------------------------------------------ choices


def test_without_records_the_choices_are_the_hand_chosen_ones(tmp_path):
    for weight_format in WeightFormat:
        chosen = sm80.chosen(weight_format.name, tmp_path)
        assert {v.tile_m: {"gemm1": v.gemm1, "gemm2": v.gemm2} for v in build.variants(weight_format)} == chosen


def test_recorded_choice_becomes_the_variant(monkeypatch, tmp_path):
    default = sm80.default_of_tile(64)
    better = default | dict(num_stages=2)
    database = records.Database(records.folder_of(sm80.TARGET, "gemm2", tmp_path))
    for num_tokens in (512, 1024):
        run = Run(Task(sm80.TARGET, "gemm2", "nvfp4", SHAPE, num_tokens), sm80, database, tmp_path, None)
        for config, us in ((default, 100.0), (better, 90.0)):
            run.record(config, us)
    chosen = sm80.chosen
    monkeypatch.setattr(sm80, "chosen", lambda weight_format, root=None: chosen(weight_format, tmp_path))
    for weight_format, num_stages in ((WeightFormat.nvfp4, 2), (WeightFormat.mxfp4, default["num_stages"])):
        shipped = {v.tile_m: v for v in shipped_variants(CUDA_TARGETS["sm80"], weight_format)}
        assert shipped[64].gemm2.num_stages == num_stages and shipped[64].gemm1.num_stages == default["num_stages"]
        assert list(shipped) == list(sm80.TILES)


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (11, 0)])
def test_native_target(capability, monkeypatch):
    targets_of.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    assert tune.native_target() == "sm80"
    targets_of.cache_clear()


@pytest.mark.gpu
@skip_unless_arch("sm80")
@pytest.mark.parametrize("stage", STAGES)
def test_tuning_on_the_gpu(stage, tmp_path):
    options = ["--target", "sm80", "--shape", "Qwen3-30B-A3B", "--tokens", "16", "--stage", stage, "--trials", "4"]
    assert tune.main([*options, "--out", str(tmp_path)]) == 0
    task = Task(sm80.TARGET, stage, "mxfp4", "Qwen3-30B-A3B", 16)
    measurements, stale = records.load(sm80.TARGET, stage, tmp_path)
    assert not stale and len(measurements) >= 3 and task in records.defaults_of(sm80, measurements)
