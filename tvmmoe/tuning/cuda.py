# SPDX-License-Identifier: Apache-2.0
"""What the CUDA targets' tuning shares: candidates compiled by nvcc, timed beside the shipped operator.

A candidate's sizes are run-time values, so one compiled kernel serves every shape and number of tokens: it is compiled once
and measured in each task. What a task needs is made on the GPU and kept as long as the next one needs it too: the weights
for a shape and format, results of the shipped operator for a number of tokens and a tile height.

A target's module (tvmmoe.tuning.sm90a, ...) has the space, takes the rest from :func:`of`, and is ``target`` below:

    TARGET, TILES, KNOBS, SOURCES   name; hand-chosen choices by tile height; candidates of every decision; files, of the
                                    package, that a candidate's code follows from
    tvm_target()                    TVM's name of the GPU
    mode(weight_format)             (activations, weights) of the calls that are timed
    gemm_config(task, config)       the kernel's configuration of decisions
    default_of_tile(tile_m)         hand-chosen decisions
    is_legal(task, config)          what can be built
    features(task, config)          what the cost model sees
    symbol(stage, c)                name of a candidate's packed function
    stage_function(stage, c)        that function: one stage alone, by the operator's calling convention
    compile_stage(makers, path)     nvcc over such functions
    z_slice(problem, tile_m)        where gemm1's result is in the workspace
"""

import functools
import importlib
import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import tvm
import tvm_ffi

from tvmmoe import abi, bench, loader, torch_op
from tvmmoe.arguments import validate
from tvmmoe.errors import UnsupportedError
from tvmmoe.testing import Case
from tvmmoe.tuning import records
from tvmmoe.tuning.compiled import Folder, sources_digest, strip
from tvmmoe.tuning.tasks import STAGES, Task, decide, points

MAX_ERROR = 1e-3  # against the shipped kernel: another order of the same float32 sums
DEVICE = "cuda"
TIMED_MS = 15.0  # of graph replays a candidate
ROUNDS = (5, 20)
ROUTINGS = (2, 16)
LAYER_TOKENS = 8192  # of a layer's hidden states, shared by all tasks up to it


def of(target: ModuleType) -> list[Callable[..., Any]]:
    """For the target's module, in the order in which it names them."""
    shared = (tasks, knobs, space, default, seeds, by_tile_height, chosen, configs, precompile, build, Bench)
    return [functools.partial(function, target) for function in shared]


def device_name() -> str:
    """What the records hold for."""
    return torch.cuda.get_device_name()


def tvm_target(arch: str, smem_bytes: int) -> tvm.target.Target:
    """TVM's name of a GPU, for MetaSchedule."""
    limits = {"max_threads_per_block": 1024, "max_shared_memory_per_block": smem_bytes, "thread_warp_size": 32}
    return tvm.target.Target({"kind": "cuda", "arch": arch, **limits}, host={"kind": "llvm"})


def tasks(target: ModuleType, stage: str, weight_format: str, shape: str, num_tokens: int) -> list[Task]:
    """The one task of a call."""
    return [Task(target.TARGET, stage, weight_format, shape, num_tokens)]


def knobs(target: ModuleType, task: Task) -> dict[str, tuple[int, ...]]:
    """Candidates of every decision, without tiles far from the task's rows."""
    rows = task.rows_per_expert
    return target.KNOBS | {"tile_m": tuple(m for m in target.TILES if rows / 6 <= m <= max(8 * rows, 16))}


def space(target: ModuleType, task: Task, sch: tvm.s_tir.Schedule) -> None:
    """Sample a configuration; the workload itself is not transformed: the kernel is written in TIRx."""
    decide(sch, knobs(target, task))


def default(target: ModuleType, task: Task) -> dict[str, int]:
    """Hand-chosen decisions for the task's rows an expert."""
    return target.default_of_tile(default_tile(target.TILES, task))


def default_tile(tiles: Iterable[int], task: Task) -> int:
    """The lowest of ascending tile heights that holds the task's rows an expert, or else the highest."""
    return next((m for m in tiles if m >= task.rows_per_expert), max(tiles))


def seeds(target: ModuleType, task: Task) -> list[dict[str, int]]:
    """Hand-chosen decisions of every tile height that the task may take: what a choice for that height is compared with."""
    by_hand = map(target.default_of_tile, knobs(target, task)["tile_m"])
    return [config for config in by_hand if target.is_legal(task, config)]


def by_tile_height(
    target: ModuleType, stage: str, weight_format: str, measurements: list[records.Measurement]
) -> list[records.Candidates]:
    """Hand-chosen decisions of every tile height and the measurements that may replace them."""
    return [records.Candidates(stage, m, target.default_of_tile(m), measurements) for m in target.TILES]


def chosen(target: ModuleType, weight_format: str, root: Path | None = None) -> dict[int, dict[str, Any]]:
    """Fields of the operator's variant by tile height: the recorded choices, or the hand-chosen ones."""
    choices: dict[int, dict[str, Any]] = {tile_m: {} for tile_m in target.TILES}
    for stage in STAGES:
        task = Task(target.TARGET, stage, weight_format, "", 1)
        mine = [m for m in records.load(target.TARGET, stage, root)[0] if m.task.weight_format == weight_format]
        for field, tile_m, by_hand, part in target.by_tile_height(stage, weight_format, mine):
            choices[tile_m][field] = target.gemm_config(task, records.choose(part, by_hand))
    return choices


def configs(target: ModuleType, task: Task) -> list[dict[str, int]]:
    """Every legal candidate."""
    return points(knobs(target, task), functools.partial(target.is_legal, task))


# ------------------------------------------------------------------------------------------------------------- build


def compile_unit(module: str, candidates: Sequence[tuple[str, Any]], path: str) -> None:
    """One library of candidates (stage, configuration) of a target, by the name of its module."""
    target = importlib.import_module(module)
    makers = {target.symbol(stage, c): functools.partial(target.stage_function, stage, c) for stage, c in candidates}
    target.compile_stage(makers, Path(path))
    strip(Path(path))


@functools.cache
def compiled(target: ModuleType, folder: Path) -> Folder:
    """What ``folder`` holds of candidates of today's kernels."""
    package = Path(loader.PACKAGE)
    return Folder(folder, sources_digest(path for pattern in target.SOURCES for path in package.glob(pattern)))


def precompile(
    target: ModuleType, tasks: Iterable[Task], folder: Path, jobs: int | None, progress: Callable[[int, int], None]
) -> list[str]:
    """Compile every legal candidate of ``tasks`` that is not in ``folder`` yet; calls ``progress(done, of)``.

    Returns
    -------
    list of str
        What could not be compiled and why.
    """
    candidates = {}
    for task in tasks:
        for config in configs(target, task):
            c = target.gemm_config(task, config)
            candidates[target.symbol(task.stage, c)] = (task.stage, c)
    where, done = compiled(target, folder), 0
    where.remove_stale()
    done = sum(name in where.known for name in candidates)
    progress(done, len(candidates))

    def count(more: int) -> None:
        nonlocal done
        done += more
        progress(done, len(candidates))

    results = where.compile(candidates, functools.partial(compile_unit, target.__name__), jobs, count)
    return [f"{name}: {error}" for name, (_, error) in results.items() if error]


def build(
    target: ModuleType, task: Task, candidates: Sequence[tuple[dict[str, int], tvm.IRModule]], folder: Path
) -> list[tuple[str, str]]:
    """(library, error message) of each candidate."""
    kernels = [target.gemm_config(task, config) for config, _ in candidates]
    symbols = {target.symbol(task.stage, c): (task.stage, c) for c in kernels}
    results = compiled(target, folder).compile(symbols, functools.partial(compile_unit, target.__name__))
    return [results[target.symbol(task.stage, c)] for c in kernels]


# ----------------------------------------------------------------------------------------------------------- measure


class Inputs:
    """Calls of one shape, format and number of tokens, and the shipped operator's results for them by tile height."""

    def __init__(self, target: ModuleType, layer: dict[str, Any], task: Task) -> None:
        self.target, self.task = target, task
        case = bench.shape_case(task.shape, task.num_tokens, *target.mode(task.weight_format), device=DEVICE)
        part = bench.of_tokens(layer, slice(task.num_tokens))
        self.calls = [torch_op.with_defaults(**part | dict(routing_logits=x)) for x in _logits(case, task)]
        self.prepared: dict[int, Prepared] = {}

    def of_tile(self, tile_m: int) -> "Prepared":
        """Workspaces and results for a tile height."""
        if tile_m not in self.prepared:
            if _is_memory_short():
                self.prepared.clear()
                torch.cuda.empty_cache()
            entry = _entry(self.target.TARGET, self.task.weight_format, tile_m)
            self.prepared[tile_m] = Prepared(self.target, self.calls, entry)
        return self.prepared[tile_m]


def _logits(case: Case, task: Task) -> list[torch.Tensor]:
    """Logits of so many routings that weights have left the L2 cache when they are used again.

    Where a call needs a part of the experts, each routing prefers another part: random ones would meet in the cache.
    """
    parts = case.num_experts // task.num_active_experts
    stage_bytes = bench.weight_bytes_per_expert(case) * task.num_active_experts / 3  # of gemm2, the smaller one
    least = 3 * _l2_bytes() / stage_bytes
    count = min(max(math.ceil(least), ROUTINGS[0]), ROUTINGS[1])
    generator = torch.Generator(DEVICE).manual_seed(1234)
    logits, experts = [], torch.arange(case.num_experts, device=DEVICE)
    for i in range(count):
        x = torch.randn(case.num_tokens, case.num_experts, generator=generator, device=DEVICE)
        if parts > 1:
            x[:, experts % parts == i % parts] += 4
        logits.append(x.to(case.logits_dtype))
    return logits


def _is_memory_short() -> bool:
    """Whether another tile height's workspaces might not fit."""
    free, total = torch.cuda.mem_get_info(DEVICE)
    return free < 0.4 * total


def _l2_bytes() -> int:
    return torch.cuda.get_device_properties(DEVICE).L2_cache_size


class Prepared:
    """Arguments of every routing with their workspaces, by one entry of the shipped artifact."""

    def __init__(self, target: ModuleType, calls: Sequence[dict[str, Any]], entry: loader.Entry) -> None:
        self.calls, self.kept, self.results = [], [], {}
        for arguments in calls:
            problem = validate(**arguments)
            plan = torch_op.plan(problem, entry)
            size = (torch_op.num_padded_tokens(problem, entry.tile_m), problem.hidden_size)
            y = torch.empty(size, dtype=torch.bfloat16, device=DEVICE)
            out = torch.empty(problem.num_tokens, problem.hidden_size, dtype=torch.bfloat16, device=DEVICE)
            workspace = torch.empty(plan.workspace_bytes, dtype=torch.uint8, device=DEVICE)
            workspace.fill_(0xFF)  # NaN
            tensors = {name: t for name, t in arguments.items() if isinstance(t, torch.Tensor)}
            tensors |= {"output": out, "gemm2_output": y}
            addresses = [tensors[name].data_ptr() if name in tensors else 0 for name in abi.POINTERS]
            ints = list(torch_op._with_dtypes(plan.ints, arguments))
            ints[abi.INTS.index("enable_pdl")] = 0  # a stage by itself
            self.calls.append((workspace, *addresses, *ints, problem.routed_scaling_factor))
            self.kept.append((y, out))
            if not self.results:
                piece = target.z_slice(problem, entry.tile_m)
                z = workspace[piece.offset : piece.offset + piece.num_bytes].view(torch.bfloat16)
                self.results = {"gemm1": z, "gemm2": y.view(-1)}
        self.operator, self.stage = plan.function, ""

    def expected(self, stage: str) -> tuple[torch.Tensor, torch.Tensor]:
        """The shipped operator's result of the first routing and where it is written; run anew when the stage changes,
        whose candidates may have left other roundings in what this stage reads."""
        if stage != self.stage:
            for result in self.results.values():
                result.view(torch.uint8).fill_(0xFF)
            for call in self.calls:
                self.operator(*call)
            self.stage, result = stage, self.results[stage]
            self.value, self.live = result.clone(), ~result.isnan()
        return self.value, self.live


class State:
    """What the worker process keeps from one task to the next."""

    layer_key: tuple[str, str, int] | None = None
    layer: dict[str, Any] | None = None
    inputs: Inputs | None = None

    @classmethod
    def of(cls, target: ModuleType, task: Task) -> Inputs:
        """Inputs of a task, made unless the last task had the same."""
        key = (task.shape, task.weight_format, max(task.num_tokens, LAYER_TOKENS))
        if key != cls.layer_key:
            cls.clear()  # before the next shape's weights
            cls.layer, cls.layer_key = bench.shape_call(task.shape, key[2], target.mode(task.weight_format), DEVICE), key
        if cls.inputs is None or cls.inputs.task.num_tokens != task.num_tokens:
            cls.inputs = None
            cls.inputs = Inputs(target, cls.layer, task)
        return cls.inputs

    @classmethod
    def clear(cls) -> None:
        cls.layer_key = cls.layer = cls.inputs = None
        torch.cuda.empty_cache()


@functools.cache
def _function(artifact: str, name: str) -> Callable[..., None]:
    return tvm_ffi.load_module(artifact)[name]


class Bench:
    """Measures candidates of one task; lives in the worker process, which has one target."""

    def __init__(self, target: ModuleType, task: Task) -> None:
        self.target, self.task, self.inputs = target, task, State.of(target, task)

    def measure(self, artifact: str, config: dict[str, int]) -> float:
        """Median time in us of a correct candidate; raises AssertionError for a wrong one."""
        stage, c = self.task.stage, self.target.gemm_config(self.task, config)
        prepared = self.inputs.of_tile(c.tile_m)
        expected, live = prepared.expected(stage)
        function, result = _function(artifact, self.target.symbol(stage, c)), prepared.results[stage]
        try:
            result.view(torch.uint8).fill_(0xFF)
            function(*prepared.calls[0])
            assert torch.equal(live, ~result.isnan()), "other rows than the shipped kernel's are written"
            error = _rel_l2(result, expected, live)
            assert error <= MAX_ERROR, f"relative L2 error {error:.2e} exceeds {MAX_ERROR:.0e}"
            first = result.clone()
            us = _graph_us(lambda: [function(*call) for call in prepared.calls]) / len(prepared.calls)
            assert torch.equal(first.view(torch.int16), result.view(torch.int16)), "two runs differ"
        except AssertionError:
            State.clear()  # a wrong kernel may have written anywhere
            self.inputs = State.of(self.target, self.task)
            raise
        return us


def _rel_l2(actual: torch.Tensor, expected: torch.Tensor, live: torch.Tensor, step: int = 1 << 27) -> float:
    """||actual - expected|| / ||expected|| over ``live``, a part at a time: in float32 a large result would not fit.

    Hopper's z of thin tiles is there a second time, times 2^94 (kernels/sm90a/thin_rows.py), by whole blocks of 128.
    """
    error = norm = 0.0
    for i in range(0, len(actual), step):
        a, b = (torch.where(live[i : i + step], x[i : i + step].float(), 0).view(-1, 128) for x in (actual, expected))
        unit = torch.where(b.abs().amax(1, keepdim=True) >= 2.0**47, 2.0**-94, 1.0)
        a, b = a * unit, b * unit
        error += (a - b).square_().sum(dtype=torch.float64).item()
        norm += b.square_().sum(dtype=torch.float64).item()
    return math.sqrt(error / norm) if norm else math.inf if error else 0.0


def _graph_us(launch: Callable[[], Any]) -> float:
    """Median duration of a captured round of launches; as many replays as fit into TIMED_MS, back to back."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):  # not torch.cuda.graph, which also collects garbage: longer than most kernels take
        graph.capture_begin()
        launch()
        graph.capture_end()

    def times(count: int) -> list[float]:
        events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
        events[0].record()
        for event in events[1:]:
            graph.replay()
            event.record()
        events[-1].synchronize()
        return [1e3 * begin.elapsed_time(end) for begin, end in itertools.pairwise(events)]

    slowest = max(times(2)[-1], 1.0)
    return statistics.median(times(min(max(round(1e3 * TIMED_MS / slowest), ROUNDS[0]), ROUNDS[1])))


def _entry(target: str, weight_format: str, tile_m: int) -> loader.Entry:
    for entry in loader.manifest().entries:
        if (entry.target, entry.weight_format, entry.tile_m) == (target, weight_format, tile_m):
            return entry
    raise UnsupportedError(f"no {weight_format} artifact with tiles of {tile_m} for {target} to compare with")
