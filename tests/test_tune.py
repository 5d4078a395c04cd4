# SPDX-License-Identifier: Apache-2.0
"""Tuning: spaces, the search with real measurements on the CPU, the worker that survives its candidates, records."""

import itertools
import math
import statistics
import sys
import time

import pytest
import torch

tvm = pytest.importorskip("tvm")
pytest.importorskip("xgboost")

from tvm.s_tir import Schedule  # noqa: E402

import tvmmoe  # noqa: E402
from tvmmoe import tune  # noqa: E402
from tvmmoe.config import WeightFormat  # noqa: E402
from tvmmoe.testing import skip_unless_arch  # noqa: E402
from tvmmoe.tuning import cpu, records, sm90a  # noqa: E402
from tvmmoe.tuning.search import Mutate, Run  # noqa: E402
from tvmmoe.tuning.tasks import Task, decisions, key_of  # noqa: E402
from tvmmoe.tuning.worker import Worker  # noqa: E402

CPU_TASK = Task(cpu.TARGET, "gemm2", "mxfp4", "Qwen3-30B-A3B", 1, 4)
HOPPER_TASK = Task(sm90a.TARGET, "gemm1", "nvfp4", "gpt-oss-120b", 64)


class Clock:
    """Stands in for the worker: time from the decisions, no process."""

    def __init__(self, fails=()):
        self.fails, self.num_starts = fails, 0

    def measure(self, task, artifact, config):
        self.num_starts += 1
        if config in self.fails:
            return {"error": "AssertionError: relative L2 error 5.0e-01 exceeds 4e-03"}
        return {"us": 100.0 + 10 * abs(math.log2(config["panel_n"]) - 4) + 5 * config["micro_m"] + config["micro_n"]}

    def stop(self):
        pass


def run_of(tmp_path, worker, task=CPU_TASK, **options):
    folder = tmp_path / "compiled"
    folder.mkdir(exist_ok=True)
    return Run(task, cpu, records.folder_of(cpu.TARGET, task.stage, tmp_path), folder, worker, **options)


# ------------------------------------------------------------------------------------------------------------ spaces


@pytest.mark.parametrize("stage", ["gemm1", "gemm2"])
def test_workload_has_the_sizes_of_the_task(stage):
    task = Task(cpu.TARGET, stage, "mxfp4", "Qwen3-30B-A3B", 16, 4)
    sch = Schedule(task.workload())
    extents = [int(sch.get(loop).extent) for loop in sch.get_loops(sch.get_sblock("gemm", "main"))]
    assert task.num_tiles == 128 and task.rows_per_expert == 1  # 16 tokens, 8 slots, 128 experts
    assert math.prod(extents) == 128 * 4 * task.weight_rows * task.k
    assert Task.of_label(task.target, stage, task.label) == task


def hopper_configs(task):
    every = (dict(zip(sm90a.KNOBS, v, strict=True)) for v in itertools.product(*sm90a.KNOBS.values()))
    return [config for config in every if sm90a.is_legal(task, config)]


@pytest.mark.parametrize("num_tokens", [1, 16, 64, 256, 1024, 8192])
@pytest.mark.parametrize("stage", ["gemm1", "gemm2"])
def test_hopper_space_holds_the_default_and_has_finite_features(stage, num_tokens):
    task = Task(sm90a.TARGET, stage, "mxfp4", "Qwen3-235B-A22B", num_tokens)
    configs = hopper_configs(task)
    assert sm90a.default(task) in configs and len(configs) >= 8
    features = [sm90a.features(task, config) for config in configs]
    assert len({len(row) for row in features}) == 1 and all(math.isfinite(x) for row in features for x in row)
    assert len(set(map(tuple, features))) == len(configs), "candidates that the cost model cannot tell apart"


def test_illegal_hopper_configs_are_refused():
    good = sm90a.default(HOPPER_TASK)
    assert sm90a.is_legal(HOPPER_TASK, good)
    for change in (
        dict(tile_m=256, mi=2),
        dict(ks=4, warpgroups=2),
        dict(ks=4, k_blocks=2),
        dict(tile_m=8, mi=2, ks=1),
    ):
        assert not sm90a.is_legal(HOPPER_TASK, good | dict(warpgroups=4) | change), change


@pytest.mark.parametrize("target, task", [(cpu, CPU_TASK), (sm90a, HOPPER_TASK)], ids=["cpu", "sm90a"])
def test_traces_survive_the_database_and_mutation(target, task, tmp_path):
    run = Run(task, target, tmp_path / "records", tmp_path, Clock())
    sch = Schedule(run.mod)
    target.space(task, sch)
    run.record(sch.trace, [1e-3])
    loaded = Run(task, target, tmp_path / "records", tmp_path, Clock())
    assert loaded.us == {key_of(decisions(sch)): pytest.approx(1e3)}
    mutate, seen = Mutate(0), {key_of(decisions(sch))}
    trace = sch.trace
    for _ in range(30):
        trace = mutate.apply(trace)
        mutated = Schedule(run.mod)
        trace.apply_to_schedule(mutated, remove_postproc=True)
        seen.add(key_of(decisions(mutated)))
    assert len(seen) > 8


def test_hopper_candidate_is_cuda_source():
    from functools import partial

    from tvmmoe.kernels.sm90a.build import packed_source

    config = sm90a.gemm_config(HOPPER_TASK, sm90a.default(HOPPER_TASK))
    name = sm90a.symbol("gemm1", config)
    source = packed_source({name: partial(sm90a.stage_function, "gemm1", config)})
    assert f"{name}_gemm1_gated" in source and f"wgmma.mma_async.sync.aligned.m64n{config.tile_m}k16" in source


# ------------------------------------------------------------------------------------------------------------ search


def test_search_measures_trains_records_and_resumes(tmp_path):
    worker = Worker(cpu.__name__)
    try:
        run = run_of(tmp_path, worker)
        run.search(20)
    finally:
        worker.stop()
    assert len(run.us) >= 18 and not run.errors, run.errors
    assert run.cost_model.booster is not None  # XGBModel was trained on what was measured
    assert run.best[1] <= statistics.median(run.us.values())
    measurements, stale = records.load(cpu.TARGET, "gemm2", tmp_path)
    assert not stale and {key_of(m.config) for m in measurements} == set(run.us)
    assert records.best_of(measurements)[CPU_TASK].us == pytest.approx(run.best[1])
    assert CPU_TASK in records.defaults_of(cpu, measurements)
    clock = Clock()
    again = run_of(tmp_path, clock)
    again.search(len(run.us))
    assert again.num_resumed == len(run.us) and clock.num_starts == 0


def test_wrong_results_are_not_recorded(tmp_path):
    wrong = dict(panel_n=16, micro_m=1, micro_n=1)  # the fastest, were it right
    run = run_of(tmp_path, Clock(fails=[cpu.default(CPU_TASK), wrong]))
    run.search(16)
    recorded = [m.config for m in records.load(cpu.TARGET, "gemm2", tmp_path)[0]]
    assert recorded and wrong not in recorded and cpu.default(CPU_TASK) not in recorded
    assert any("relative L2" in error for _, error in run.errors)


def test_changed_definition_is_reported_by_name(tmp_path, monkeypatch):
    run = run_of(tmp_path, Clock())
    run.search(2)
    original = Task.workload
    changed = Task("x86-64-v3", "gemm2", "nvfp4", "Qwen3-30B-A3B", 1, 4)
    monkeypatch.setattr(Task, "workload", lambda self: original(changed))
    measurements, stale = records.load(cpu.TARGET, "gemm2", tmp_path)
    assert not measurements and stale == ["x86-64-v3/gemm2/Qwen3-30B-A3B_mxfp4_t1_m4"]


def test_time_limit_keeps_what_there_is(tmp_path):
    run = run_of(tmp_path, Clock(), deadline=time.monotonic() - 1)
    run.search(16)
    assert len(run.us) == 1  # the hand-chosen one, which comes first


# ------------------------------------------------------------------------------------------------------------ worker

FAULTS = """
import os, time
class Bench:
    def __init__(self, task): pass
    def measure(self, artifact, config):
        kind = config["kind"]
        if kind == 1: raise AssertionError("relative L2 error 1")
        if kind == 2: time.sleep(60)
        if kind == 3: os._exit(3)
        if kind == 4 and not os.path.exists(artifact):
            open(artifact, "w").close()
            os._exit(4)
        if kind == 5: raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return 5.0
"""


def test_worker_survives_its_candidates(tmp_path, monkeypatch):
    (tmp_path / "faults_of_tuning.py").write_text(FAULTS)
    monkeypatch.setenv("PYTHONPATH", ":".join([str(tmp_path), *filter(None, sys.path)]))
    worker = Worker("faults_of_tuning", timeout_s=20)

    def measure(kind):
        return worker.measure(CPU_TASK, str(tmp_path / "marker"), dict(kind=kind))

    try:
        assert measure(0) == {"us": 5.0}
        assert "relative L2" in measure(1)["error"] and worker.num_starts == 1
        assert measure(4) == {"us": 5.0} and worker.num_starts == 2  # crashed once, tried again
        assert "the process ended" in measure(3)["error"] and worker.num_starts == 3
        assert measure(0) == {"us": 5.0} and worker.num_starts == 4
        assert "illegal memory access" in measure(5)["error"]
        worker.timeout_s = 3
        assert "no answer within 3 s" in measure(2)["error"]
        worker.timeout_s = 20
        assert measure(0) == {"us": 5.0}
    finally:
        worker.stop()


# ----------------------------------------------------------------------------------------------------------- records


def test_records_of_another_device_are_refused(tmp_path):
    records.claim_device("sm90a", "NVIDIA H100 80GB HBM3", tmp_path)
    records.claim_device("sm90a", "NVIDIA H100 80GB HBM3", tmp_path)
    with pytest.raises(
        tvmmoe.ArgumentError, match="records of NVIDIA H100 80GB HBM3, this is NVIDIA H200; name another"
    ):
        records.claim_device("sm90a", "NVIDIA H200", tmp_path)


def test_choice_needs_a_gain_over_many_tasks():
    tasks = [Task(cpu.TARGET, "gemm1", "mxfp4", "Qwen3-30B-A3B", n, 4) for n in (1, 2, 4, 8)]
    default, other, lucky = (dict(panel_n=n, micro_m=4, micro_n=1) for n in (8, 16, 32))
    times = [records.Measurement(task, default, 100.0) for task in tasks]
    assert records.choose(times, default) == default
    assert records.choose([*times, records.Measurement(tasks[0], lucky, 10.0)], default) == default  # one task of four
    slightly = [records.Measurement(task, other, 99.5) for task in tasks]
    assert records.choose(times + slightly, default) == default
    clearly = [records.Measurement(task, other, us) for task, us in zip(tasks, (80, 80, 110, 80), strict=True)]
    assert records.choose(times + clearly, default) == other


def test_recorded_choice_becomes_the_configuration(tmp_path):
    better = sm90a.default_of_tile(64) | dict(k_blocks=2)
    for num_tokens in (512, 1024):
        task = Task(sm90a.TARGET, "gemm2", "mxfp4", "gpt-oss-120b", num_tokens)
        run = Run(task, sm90a, records.folder_of(sm90a.TARGET, "gemm2", tmp_path), tmp_path, Clock())
        for config, us in ((sm90a.default_of_tile(64), 100.0), (better, 90.0)):
            run.record(run.trace_of(config), [us * 1e-6])
    chosen = sm90a.chosen("mxfp4", tmp_path)
    assert chosen[64]["gemm2"].k_blocks == 2 and chosen[64]["gemm1"].k_blocks == sm90a.TILES[64][3]
    assert sm90a.chosen("nvfp4", tmp_path)[64]["gemm2"].k_blocks == sm90a.TILES[64][3]


def test_without_records_the_choices_are_the_shipped_ones(tmp_path):
    from tvmmoe.kernels.sm90a.build import variants

    for weight_format in WeightFormat:
        chosen = sm90a.chosen(weight_format.name, tmp_path)
        assert {v.tile_m: {"gemm1": v.gemm1, "gemm2": v.gemm2} for v in variants(weight_format)} == chosen
        for stage in ("gemm1", "gemm2"):
            assert cpu.chosen(stage, weight_format.name, 8, tmp_path) == cpu.GemmConfig()


# ------------------------------------------------------------------------------------------------------ command line


@pytest.mark.parametrize(
    "options, message",
    [
        (["--tokens", "1,many"], "--tokens: got '1,many', expected integers"),
        (["--stage", "gemm3"], "--stage: got 'gemm3', expected some of gemm1, gemm2"),
        (["--trials", "0"], "--trials: got 0, expected at least 1"),
    ],
)
def test_wrong_options(options, message, capsys):
    with pytest.raises(SystemExit):
        tune.main(options)
    assert message in capsys.readouterr().err


def test_unknown_shape_and_missing_gpu_are_one_line(tmp_path, capsys, monkeypatch):
    assert tune.main(["--target", "cpu", "--shape", "Qwen4", "--out", str(tmp_path)]) == 1
    assert "shape is 'Qwen4', expected one of" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main(["--target", "sm90a", "--out", str(tmp_path)]) == 1
    assert "--target: got sm90a, expected cpu" in capsys.readouterr().err


def test_command_prints_what_it_found(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tune, "Worker", lambda *_: Clock())
    options = ["--target", "cpu", "--tokens", "1", "--stage", "gemm2", "--out", str(tmp_path)]
    assert tune.main([*options, "--trials", "2"]) == 0
    out = capsys.readouterr().out
    assert "gemm2 Qwen3-30B-A3B_mxfp4_t1_m4: 2 measured, 0 known, 0 failed" in out and "hand-chosen" in out
    assert tune.main([*options, "--report"]) == 0
    assert "gemm2 Qwen3-30B-A3B_mxfp4_t1_m4" in capsys.readouterr().out


@pytest.mark.gpu
@skip_unless_arch("sm90a")
def test_hopper_task_on_the_gpu(tmp_path, capsys):
    options = ["--target", "sm90a", "--shape", "Qwen3-30B-A3B", "--tokens", "16", "--stage", "gemm2", "--trials", "4"]
    assert tune.main([*options, "--out", str(tmp_path)]) == 0
    task = Task(sm90a.TARGET, "gemm2", "mxfp4", "Qwen3-30B-A3B", 16)
    measurements, stale = records.load(sm90a.TARGET, "gemm2", tmp_path)
    assert not stale and len(measurements) >= 3 and task in records.defaults_of(sm90a, measurements)
