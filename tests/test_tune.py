# SPDX-License-Identifier: Apache-2.0
"""Tuning: spaces, the search with real measurements on the CPU, the worker that survives its candidates, records."""

import ctypes
import itertools
import json
import math
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

tvm = pytest.importorskip("tvm")
pytest.importorskip("xgboost")

import tvm_ffi  # noqa: E402
from tvm.s_tir import Schedule  # noqa: E402

import tvmmoe  # noqa: E402
from tvmmoe import abi, torch_op, tune  # noqa: E402
from tvmmoe.config import WeightFormat  # noqa: E402
from tvmmoe.kernels.sm90a.layout import slices  # noqa: E402
from tvmmoe.testing import skip_unless_arch  # noqa: E402
from tvmmoe.tuning import compiled, cpu, cuda, records, report, sm90a  # noqa: E402
from tvmmoe.tuning.search import Mutate, Run  # noqa: E402
from tvmmoe.tuning.tasks import Task, decisions, key_of, traced_decisions  # noqa: E402
from tvmmoe.tuning.worker import Worker  # noqa: E402
from tvmmoe.workspace import max_num_tiles  # noqa: E402

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


def run_of(tmp_path, worker, task=CPU_TASK, target=cpu, **options):
    folder = tmp_path / "compiled"
    folder.mkdir(exist_ok=True)
    database = records.Database(records.folder_of(target.TARGET, task.stage, tmp_path))
    return Run(task, target, database, folder, worker, **options)


# ------------------------------------------------------------------------------------------------------------ spaces


@pytest.mark.parametrize("stage", ["gemm1", "gemm2"])
def test_workload_has_the_sizes_of_the_task(stage):
    task = Task(cpu.TARGET, stage, "mxfp4", "Qwen3-30B-A3B", 16, 4)
    sch = Schedule(task.workload())
    extents = [int(sch.get(loop).extent) for loop in sch.get_loops(sch.get_sblock("gemm", "main"))]
    assert task.num_tiles == 128 and task.rows_per_expert == 1  # 16 tokens, 8 slots, 128 experts
    assert math.prod(extents) == 128 * 4 * task.weight_rows * task.k
    assert Task.of_label(task.target, stage, task.label) == task


@pytest.mark.parametrize("num_tokens", [1, 16, 64, 256, 1024, 8192])
@pytest.mark.parametrize("stage", ["gemm1", "gemm2"])
def test_hopper_space_holds_the_default_and_has_finite_features(stage, num_tokens):
    task = Task(sm90a.TARGET, stage, "mxfp4", "Qwen3-235B-A22B", num_tokens)
    configs = sm90a.configs(task)
    assert sm90a.default(task) in sm90a.seeds(task) and len(configs) >= 8
    assert all(config in configs for config in sm90a.seeds(task))
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
    run = run_of(tmp_path, Clock(), task, target)
    sch = Schedule(run.mod)
    target.space(task, sch)
    assert traced_decisions(sch.trace) == decisions(sch)
    run.record(decisions(sch), 1e3)
    assert run_of(tmp_path, Clock(), task, target).us == {key_of(decisions(sch)): pytest.approx(1e3)}
    mutate, seen = Mutate(0), {key_of(decisions(sch))}
    trace = sch.trace
    for _ in range(30):
        trace = mutate.apply(trace)
        mutated = Schedule(run.mod)
        trace.apply_to_schedule(mutated, remove_postproc=True)
        seen.add(key_of(decisions(mutated)))
    assert len(seen) > 8


@pytest.mark.parametrize(
    "tile_m, multiplication", [(8, "mma.sync.aligned.m16n8k16"), (16, "wgmma.mma_async.sync.aligned.m64n16k16")]
)
def test_hopper_candidate_is_cuda_source(tile_m, multiplication):
    from functools import partial

    from tvmmoe.kernels.sm90a.build import packed_source

    config = sm90a.gemm_config(HOPPER_TASK, sm90a.default_of_tile(tile_m))
    name = sm90a.symbol("gemm1", config)
    source = packed_source({name: partial(sm90a.stage_function, "gemm1", config)})
    assert f"{name}_gemm1_gated" in source
    assert set(re.findall(r"(?:wgmma\.mma_async|mma)\.sync\.aligned\.m\d+n\d+k\d+", source)) == {multiplication}


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


def test_changed_definition_is_reported_by_name(tmp_path, monkeypatch, capsys):
    run = run_of(tmp_path, Clock())
    run.search(2)
    original = Task.workload
    changed = Task("x86-64-v3", "gemm2", "nvfp4", "Qwen3-30B-A3B", 1, 4)
    monkeypatch.setattr(Task, "workload", lambda self: original(changed))
    records._load.cache_clear()
    measurements, stale = records.load(cpu.TARGET, "gemm2", tmp_path)
    assert not measurements and stale == ["x86-64-v3/gemm2/Qwen3-30B-A3B_mxfp4_t1_m4"]
    assert tune.main(["--target", "cpu", "--report", "--out", str(tmp_path)]) == 0
    assert f"stale, the definition has changed: {stale[0]}" in capsys.readouterr().out


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



# ------------------------------------------------------------------------------------------- measuring on CUDA, faked


def stand_in(stage, offset=0.0, extra=False):
    """A kernel in Python: writes bf16 numbers to z and gemm2_output through their addresses, as the operator would."""

    def function(workspace, *arguments):
        task, tile_m = HOPPER_SMALL, 8
        case = task.case
        pairs = case.num_tokens * case.top_k
        sizes = (case.num_tokens, case.top_k, case.hidden_size, case.intermediate_size, case.num_experts, tile_m)
        piece = slices(*sizes)[0]["z"]
        z = workspace[piece.offset : piece.offset + piece.num_bytes].view(torch.bfloat16)
        address = arguments[abi.POINTERS.index("gemm2_output")]
        count = tile_m * max_num_tiles(pairs, case.num_experts, tile_m) * case.hidden_size
        y = torch.frombuffer((ctypes.c_uint16 * count).from_address(address), dtype=torch.bfloat16)
        for name, tensor in (("gemm1", z), ("gemm2", y)):
            if stage in (name, "both"):
                live = len(tensor) // 2 + extra
                tensor[:live] = torch.arange(live) % 7 + 1 + offset

    return function


HOPPER_SMALL = Task(sm90a.TARGET, "gemm1", "mxfp4", "small", 4)


@pytest.fixture
def hopper_bench(monkeypatch):
    """A Bench of each stage without a GPU: the shipped operator and the candidates are stand-ins."""
    small = {"small": {"hidden_size": 64, "intermediate_size": 64, "num_experts": 8, "top_k": 2}}
    small["small"]["routing_method"] = "Renormalize"
    plan = SimpleNamespace(workspace_bytes=1 << 16, ints=(0,) * len(abi.INTS), function=stand_in("both"))
    monkeypatch.setattr("tvmmoe.shapes.shapes", lambda: small)
    monkeypatch.setattr(torch_op, "plan", lambda problem, entry: plan)
    monkeypatch.setattr(cuda, "DEVICE", "cpu")
    monkeypatch.setattr(cuda, "LAYER_TOKENS", 16)
    monkeypatch.setattr(cuda, "_l2_bytes", lambda: 10_000)
    monkeypatch.setattr(cuda, "_is_memory_short", lambda: False)
    monkeypatch.setattr(cuda, "_graph_us", lambda launch: (launch(), 60.0)[1])
    functions = {}
    monkeypatch.setattr(cuda, "_function", lambda artifact, name: functions[name.split("_")[0]])
    cuda.State.clear()
    yield functions
    cuda.State.clear()


def test_hopper_bench_times_right_candidates_and_keeps_its_inputs(hopper_bench):
    config = sm90a.default_of_tile(8)
    layers = []
    for stage in ("gemm1", "gemm2", "gemm1"):
        measured = sm90a.Bench(replace(HOPPER_SMALL, stage=stage))
        hopper_bench[stage] = stand_in(stage)
        calls = measured.inputs.of_tile(8).calls
        assert 2 <= len(calls) <= 16 and measured.measure("", config) == 60.0 / len(calls)
        layers.append(measured.inputs)
    assert layers[0] is layers[1] is layers[2]
    assert sm90a.Bench(replace(HOPPER_SMALL, num_tokens=2)).inputs.calls[0]["gemm1_weights"] is (
        layers[0].calls[0]["gemm1_weights"]
    )


@pytest.mark.parametrize(
    "kernel, message",
    [
        (stand_in("gemm1", offset=0.1), "relative L2 error"),
        (stand_in("gemm1", extra=True), "other rows"),
        (stand_in("neither"), "other rows"),
    ],
)
def test_hopper_bench_refuses_wrong_candidates(kernel, message, hopper_bench):
    measured = sm90a.Bench(HOPPER_SMALL)
    hopper_bench["gemm1"] = kernel
    with pytest.raises(AssertionError, match=message):
        measured.measure("", sm90a.default_of_tile(8))
    hopper_bench["gemm1"] = stand_in("gemm1")
    assert measured.measure("", sm90a.default_of_tile(8)) > 0  # on fresh inputs


def test_hopper_bench_refuses_a_candidate_whose_runs_differ(hopper_bench):
    runs = itertools.count()

    def racy(*arguments):
        stand_in("gemm1", offset=0.0625 if next(runs) else 0.0)(*arguments)

    hopper_bench["gemm1"] = racy
    with pytest.raises(AssertionError, match="two runs differ"):
        sm90a.Bench(HOPPER_SMALL).measure("", sm90a.default_of_tile(8))


# ---------------------------------------------------------------------------------------------------- compile cache


def compile_text(candidates, library):
    """Stands in for nvcc: 3 does not compile."""
    if 3 in candidates:
        raise RuntimeError("nvcc failed: 3")
    Path(library).write_text(" ".join(map(str, candidates)))


def test_compiled_candidates_are_found_again_and_stale_ones_are_not(tmp_path, monkeypatch):
    monkeypatch.setattr(compiled, "_pool", lambda jobs: ThreadPoolExecutor(jobs))
    candidates = {f"kernel_{i}": i for i in range(6)}
    counts = []
    first = compiled.Folder(tmp_path, "a").compile(candidates, compile_text, 1, counts.append)
    assert sum(counts) == 6 and [symbol for symbol, (_, error) in first.items() if error] == ["kernel_3"]
    assert "nvcc failed: 3" in first["kernel_3"][1] and Path(first["kernel_4"][0]).read_text() == "4"

    def must_not(*_):
        raise AssertionError("compiled again")

    assert compiled.Folder(tmp_path, "a").compile(candidates, must_not, 1) == first
    other = compiled.Folder(tmp_path, "b")
    assert not other.known and other.remove_stale() > 0 and not list(tmp_path.glob("*.so"))


def test_command_compiles_ahead(tmp_path, capsys, monkeypatch):
    seen = []
    monkeypatch.setattr(compiled, "_pool", lambda jobs: ThreadPoolExecutor(jobs))
    monkeypatch.setattr(cuda, "compile_unit", lambda module, key, path: (seen.extend(key), Path(path).write_text("so")))
    options = ["--target", "sm90a", "--tokens", "1,16", "--weights", "mxfp4,nvfp4", "--compile-only", "--jobs", "2"]
    assert tune.main([*options, "--cache", str(tmp_path / "c")]) == 0
    tasks = [Task(sm90a.TARGET, "gemm1", w, "Qwen3-30B-A3B", t) for w in ("mxfp4", "nvfp4") for t in (1, 16)]
    expected = {sm90a.symbol("gemm1", sm90a.gemm_config(t, c)) for t in tasks for c in sm90a.configs(t)}
    assert {sm90a.symbol(*key) for key in seen if key[0] == "gemm1"} == expected
    assert "0 failed" in capsys.readouterr().out
    again = len(seen)
    assert tune.main([*options, "--cache", str(tmp_path / "c")]) == 0 and len(seen) == again
    assert tune.main(["--target", "cpu", "--compile-only", "--cache", str(tmp_path)]) == 1
    assert "expected a CUDA target" in capsys.readouterr().err


def distinct(measurements):
    """What was measured, some of it twice."""
    return {(m.task, key_of(m.config)) for m in measurements}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_tuning_farm_on_localhost(tmp_path, capsys):
    port, processes = free_port(), []

    def start(*command):
        processes.append(subprocess.Popen([sys.executable, "-m", *command], start_new_session=True))

    try:
        start("tvm.exec.rpc_tracker", "--host", "127.0.0.1", "--port", str(port), "--port-end", str(port + 1))
        server = ("--host", "127.0.0.1", "--port", str(free_port()))
        start("tvmmoe.tuning.rpc", "--tracker", f"127.0.0.1:{port}", "--key", "here", *server)
        wait_until(lambda: socket.create_connection(("127.0.0.1", port), 1).close() is None)
        options = ["--target", "cpu", "--rpc", f"127.0.0.1:{port}:here", "--tokens", "1", "--stage", "gemm2"]
        assert tune.main([*options, "--trials", "2", "--out", str(tmp_path)]) == 0, capsys.readouterr().err
    finally:
        for process in processes:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert "gemm2 Qwen3-30B-A3B_mxfp4_t1_m1: 2 measured, 0 known, 0 failed" in capsys.readouterr().out
    assert len(distinct(records.load(cpu.TARGET, "gemm2", tmp_path)[0])) == 2
    assert json.loads((tmp_path / cpu.TARGET / "device.json").read_text())["name"] == cpu.device_name()


def wait_until(is_ready, seconds=60):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if is_ready():
                return
        except OSError:
            time.sleep(0.2)
    raise TimeoutError


@pytest.mark.parametrize("address, message", [("host:key", "expected host:port:key"), ("127.0.0.1:1:k", "no tracker")])
def test_wrong_rpc_address_is_one_line(address, message, tmp_path, capsys):
    assert tune.main(["--target", "cpu", "--rpc", address, "--out", str(tmp_path)]) == 1
    err = capsys.readouterr().err
    assert message in err and len(err.splitlines()) == 1

# ----------------------------------------------------------------------------------------------------------- records


def test_records_of_another_device_are_refused(tmp_path):
    records.claim_device("sm90a", "NVIDIA H100 80GB HBM3", tmp_path)
    records.claim_device("sm90a", "NVIDIA H100 80GB HBM3", tmp_path)
    with pytest.raises(
        tvmmoe.ArgumentError, match="records of NVIDIA H100 80GB HBM3, this is NVIDIA H200; name another"
    ):
        records.claim_device("sm90a", "NVIDIA H200", tmp_path)


def committed():
    return [(target, stage) for target in (cpu, sm90a) for stage in records.stages_of(target.TARGET)]


@pytest.mark.parametrize("target, stage", [pytest.param(*p, id=f"{p[0].TARGET}-{p[1]}") for p in committed()])
def test_committed_records_hold_for_todays_definitions(target, stage):
    """Record -> decisions -> TIR: the stored hash is that of today's definition, and every trace applies to it."""
    folder = records.folder_of(target.TARGET, stage)
    hashes = {json.loads(line)[0] for line in records.contents_of(folder)[0].splitlines()}
    database = records.read(folder)
    assert records.load(target.TARGET, stage)[1] == [] and database.by_label
    for label, known in database.by_label.items():
        task = Task.of_label(target.TARGET, stage, label)
        mod = task.workload()
        assert str(tvm_ffi.structural_hash(mod) % 2**64) in hashes, label
        for record in known:
            sch = Schedule(mod)
            record.trace.apply_to_schedule(sch, remove_postproc=True)
            config = decisions(sch)
            assert config == traced_decisions(record.trace) and target.is_legal(task, config), (label, config)


def test_choice_needs_a_gain_over_many_tasks():
    tasks = [Task(cpu.TARGET, "gemm1", "mxfp4", "Qwen3-30B-A3B", n, 4) for n in (1, 2, 4, 8)]
    default, other, lucky = (dict(panel_n=n, micro_m=4, micro_n=1) for n in (8, 16, 32))
    times = [records.Measurement(task, default, 100.0) for task in tasks]
    assert records.choose(times, default) == default
    assert records.choose([*times, records.Measurement(tasks[0], lucky, 10.0)], default) == default  # one task of four
    slightly = [records.Measurement(task, other, 99.5) for task in tasks]
    assert records.choose(times + slightly, default) == default
    mostly = [records.Measurement(task, other, us) for task, us in zip(tasks, (80, 80, 110, 80), strict=True)]
    assert records.choose(times + mostly, default) == default  # slower than by hand in one task
    clearly = [records.Measurement(task, other, us) for task, us in zip(tasks, (80, 80, 100.5, 80), strict=True)]
    assert records.choose(times + clearly, default) == other


def test_tile_heights_that_are_not_selected_have_no_say():
    tasks = [Task(sm90a.TARGET, "gemm1", "mxfp4", "Qwen3-235B-A22B", n) for n in (256, 1024)]
    default, taller = sm90a.default_of_tile(32), sm90a.default_of_tile(64)
    other = default | dict(k_blocks=4)
    times = [records.Measurement(tasks[0], default, 100.0), records.Measurement(tasks[0], other, 105.0)]
    times += [records.Measurement(tasks[1], default, 200.0), records.Measurement(tasks[1], other, 150.0)]
    assert set(records.relevant(times, default)) == set(tasks)
    times += [records.Measurement(tasks[1], taller, 130.0)]
    assert set(records.relevant(times, default)) == {tasks[0]}
    assert records.choose(times, default) == default


def test_recorded_choice_becomes_the_configuration(tmp_path):
    better = sm90a.default_of_tile(64) | dict(k_blocks=1)
    for num_tokens in (512, 1024):
        task = Task(sm90a.TARGET, "gemm2", "mxfp4", "gpt-oss-120b", num_tokens)
        run = run_of(tmp_path, Clock(), task, sm90a)
        for config, us in ((sm90a.default_of_tile(64), 100.0), (better, 90.0)):
            run.record(config, us)
    chosen = sm90a.chosen("mxfp4", tmp_path)
    assert chosen[64]["gemm2"].k_blocks == 1 and chosen[64]["gemm1"].k_blocks == sm90a.TILES[64][3]
    assert sm90a.chosen("nvfp4", tmp_path)[64]["gemm2"].k_blocks == sm90a.TILES[64][3]


def test_few_columns_of_gemm2_have_a_choice_of_their_own(tmp_path):
    task = Task(sm90a.TARGET, "gemm2", "mxfp4", "Qwen3-30B-A3B", 64)
    by_hand, for_longer = (sm90a.default_of_tile(8, is_short) for is_short in (True, False))
    assert task.k <= sm90a.SHORT_K and sm90a.default(task) == by_hand != for_longer
    assert by_hand in sm90a.seeds(task) and for_longer in sm90a.seeds(task)
    assert by_hand not in sm90a.seeds(HOPPER_TASK) and for_longer in sm90a.seeds(HOPPER_TASK)
    better = by_hand | dict(k_blocks=4)
    run = run_of(tmp_path, Clock(), task, sm90a)
    for config, us in ((by_hand, 100.0), (for_longer, 120.0), (better, 90.0)):
        run.record(config, us)
    chosen = sm90a.chosen("mxfp4", tmp_path)
    assert chosen[8]["gemm2_short"].k_blocks == 4 and chosen[8]["gemm2"].ks == for_longer["ks"]
    assert "gemm2_short" not in chosen[32]


def test_a_token_or_two_have_no_say_where_one_kernel_computes_both_gemms(tmp_path):
    by_hand = sm90a.default_of_tile(8)
    better = by_hand | dict(k_blocks=2)
    for num_tokens, us in ((1, 110.0), (2, 110.0), (16, 90.0), (64, 90.0)):
        task = Task(sm90a.TARGET, "gemm1", "mxfp4", "Qwen3-235B-A22B", num_tokens)
        run = run_of(tmp_path, Clock(), task, sm90a)
        run.record(by_hand, 100.0)
        run.record(better, us)
    assert sm90a.chosen("mxfp4", tmp_path)[8]["gemm1"].k_blocks == 2


def test_without_records_the_choices_are_the_shipped_ones(tmp_path):
    from tvmmoe.kernels.sm90a.build import Variant, variants

    for weight_format in WeightFormat:
        chosen = sm90a.chosen(weight_format.name, tmp_path)
        assert variants(weight_format) == [Variant(**configs) for configs in chosen.values()]
        assert [v.tile_m for v in variants(weight_format)] == list(chosen)
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
    assert "gemm2 Qwen3-30B-A3B_mxfp4_t1_m1: 2 measured, 0 known, 0 failed" in out and "hand-chosen" in out
    assert tune.main([*options, "--report"]) == 0
    assert "gemm2 Qwen3-30B-A3B_mxfp4_t1_m1" in capsys.readouterr().out


def test_report_of_an_exhaustive_sweep(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tune, "Worker", lambda *_: Clock())
    monkeypatch.setattr(cpu, "build", lambda task, candidates, folder: [("library", "")] * len(candidates))
    options = ["--target", "cpu", "--tokens", "32", "--stage", "gemm2", "--out", str(tmp_path)]
    assert tune.main([*options, "--exhaustive"]) == 0
    tasks = cpu.tasks("gemm2", "mxfp4", "Qwen3-30B-A3B", 32)
    assert len(distinct(records.load(cpu.TARGET, "gemm2", tmp_path)[0])) == sum(len(cpu.configs(task)) for task in tasks)
    capsys.readouterr()
    assert tune.main([*options, "--report", "--plot", str(tmp_path / "curves.png")]) == 0
    out = capsys.readouterr().out
    distance = re.search(r"search over the best known, 106\.0 us: [\d.]+ % after 16", out)
    assert distance and (tmp_path / "curves.png").stat().st_size > 5000
    assert "gemm2 mxfp4 m1: micro_m=1 micro_n=1 panel_n=16; 1 tasks, times over the hand-chosen: mean 0.9" in out
    assert report.in_order(tmp_path / cpu.TARGET / "gemm2")[tasks[0].label][0] == pytest.approx(116.0)  # hand-chosen


@pytest.mark.parametrize("calls", [1, 3])
def test_ctrl_c_keeps_the_records(calls, tmp_path, capsys, monkeypatch):
    class Interrupted(Clock):
        def measure(self, *request):
            if self.num_starts == calls:  # 1: among the hand-chosen, 3: under MetaSchedule's search
                signal.raise_signal(signal.SIGINT)
            return super().measure(*request)

    monkeypatch.setattr(tune, "Worker", lambda *_: Interrupted())
    options = ["--target", "cpu", "--tokens", "1", "--stage", "gemm2", "--trials", "8", "--out", str(tmp_path)]
    assert tune.main(options) == 130
    assert "stopped; what was measured is recorded" in capsys.readouterr().err
    assert len(records.load(cpu.TARGET, "gemm2", tmp_path)[0]) == calls


@pytest.mark.gpu
@skip_unless_arch("sm90a")
def test_hopper_task_on_the_gpu(tmp_path, capsys):
    options = ["--target", "sm90a", "--shape", "Qwen3-30B-A3B", "--tokens", "16", "--stage", "gemm2", "--trials", "4"]
    assert tune.main([*options, "--out", str(tmp_path)]) == 0
    task = Task(sm90a.TARGET, "gemm2", "mxfp4", "Qwen3-30B-A3B", 16)
    measurements, stale = records.load(sm90a.TARGET, "gemm2", tmp_path)
    assert not stale and len(measurements) >= 3 and task in records.defaults_of(sm90a, measurements)
