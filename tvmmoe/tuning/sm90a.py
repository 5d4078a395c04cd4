# SPDX-License-Identifier: Apache-2.0
"""Hopper: the choices of kernels.sm90a.gemm.GemmConfig as decisions, compiled by nvcc, timed beside the shipped operator.

A candidate's sizes are run-time values, so one compiled kernel serves every shape and number of tokens: it is compiled once
and measured in each task. What a task needs is made on the GPU and kept as long as the next one needs it too: the weights
for a shape and format, results of the shipped operator for a number of tokens and a tile height.
"""

import functools
import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import tvm
import tvm_ffi
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as I  # noqa: E741

from tvmmoe import abi, bench, loader, torch_op
from tvmmoe.arguments import validate
from tvmmoe.config import WeightFormat
from tvmmoe.errors import UnsupportedError
from tvmmoe.kernels.sm90a import build as sm90a_build
from tvmmoe.kernels.sm90a import gemm as kernel
from tvmmoe.kernels.sm90a.gemm1 import Gemm1, gemm1
from tvmmoe.kernels.sm90a.gemm2 import Gemm2, gemm2
from tvmmoe.kernels.sm90a.layout import slices
from tvmmoe.kernels.sm90a.operator import LAUNCH_PARAMS, TILES, Arguments
from tvmmoe.testing import Case
from tvmmoe.tuning import records
from tvmmoe.tuning.compiled import Folder, sources_digest, strip
from tvmmoe.tuning.tasks import STAGES, Task, decide, points

TARGET = "sm90a"
MAX_ERROR = 1e-3  # against the shipped kernel: another order of the same float32 sums
DEVICE = "cuda"
TIMED_MS = 15.0  # of graph replays a candidate
ROUNDS = (5, 20)
ROUTINGS = (2, 16)
LAYER_TOKENS = 8192  # of a layer's hidden states, shared by all tasks up to it
SOURCES = ("abi.py", "config.py", "workspace.py", "kernels/sm90a/*.py")  # what a candidate's code follows from
KNOBS = {
    "tile_m": tuple(TILES),
    "mi": (1, 2),
    "ks": (1, 2, 4),
    "warpgroups": (2, 4),
    "k_blocks": (1, 2, 4),
    "max_stages": (kernel.MAX_STAGES,),
}


def device_name() -> str:
    """What the records hold for."""
    return torch.cuda.get_device_name()


def tvm_target() -> tvm.target.Target:
    limits = {"max_threads_per_block": 1024, "max_shared_memory_per_block": kernel.SMEM_BYTES, "thread_warp_size": 32}
    return tvm.target.Target({"kind": "cuda", "arch": "sm_90a", **limits}, host={"kind": "llvm"})


def tasks(stage: str, weight_format: str, shape: str, num_tokens: int) -> list[Task]:
    """The one task of a call."""
    return [Task(TARGET, stage, weight_format, shape, num_tokens)]


def knobs(task: Task) -> dict[str, tuple[int, ...]]:
    """Candidates of every decision, without tiles far from the task's rows."""
    rows = task.rows_per_expert
    return KNOBS | {"tile_m": tuple(m for m in TILES if rows / 6 <= m <= max(8 * rows, 16))}


def space(task: Task, sch: tvm.s_tir.Schedule) -> None:
    """Sample a configuration; the workload itself is not transformed: the kernel is written in TIRx."""
    decide(sch, knobs(task))


def gemm_config(task: Task, config: dict[str, int]) -> kernel.GemmConfig:
    """The kernel's configuration of decisions."""
    return kernel.GemmConfig(WeightFormat[task.weight_format], **config)


def default(task: Task) -> dict[str, int]:
    """Hand-chosen decisions for the task's rows an expert."""
    return default_of_tile(next((m for m in TILES if m >= task.rows_per_expert), max(TILES)))


def seeds(task: Task) -> list[dict[str, int]]:
    """Hand-chosen decisions of every tile height that the task may take: what a choice for that height is compared with."""
    return [c for c in map(default_of_tile, knobs(task)["tile_m"]) if is_legal(task, c)]


def default_of_tile(tile_m: int) -> dict[str, int]:
    """Hand-chosen decisions for a tile height."""
    mi, ks, warpgroups, k_blocks = TILES[tile_m]
    return dict(tile_m=tile_m, mi=mi, ks=ks, warpgroups=warpgroups, k_blocks=k_blocks, max_stages=kernel.MAX_STAGES)


def by_tile_height(
    stage: str, weight_format: str, measurements: list[records.Measurement]
) -> dict[int, tuple[dict[str, int], list[records.Measurement]]]:
    """Hand-chosen decisions of every tile height and the measurements that may replace them."""
    return {tile_m: (default_of_tile(tile_m), measurements) for tile_m in TILES}


def chosen(weight_format: str, root: Path | None = None) -> dict[int, dict[str, kernel.GemmConfig]]:
    """Configuration of both stages by tile height: the recorded choice, or the hand-chosen one."""
    choices: dict[int, dict[str, kernel.GemmConfig]] = {tile_m: {} for tile_m in TILES}
    for stage in STAGES:
        mine = [m for m in records.load(TARGET, stage, root)[0] if m.task.weight_format == weight_format]
        for tile_m, (default, part) in by_tile_height(stage, weight_format, mine).items():
            choices[tile_m][stage] = kernel.GemmConfig(WeightFormat[weight_format], **records.choose(part, default))
    return choices


def is_legal(task: Task, config: dict[str, int]) -> bool:
    """What the kernel can be built for, and tiles that fit the task's rows at all."""
    c = gemm_config(task, config)
    registers = c.mi * c.tile_m <= (256 if c.warpgroups == 2 else 96)
    fits = c.tile_m in knobs(task)["tile_m"] and c.ks <= c.warpgroups and c.k_blocks % c.ks == 0
    return fits and registers and _num_stages(task, c) >= 2


def _num_stages(task: Task, c: kernel.GemmConfig) -> int:
    """Pipeline stages, or 0 where the kernel has no such tile."""
    problem = Gemm1 if task.stage == "gemm1" else Gemm2
    matrices = 1 if problem is Gemm1 else 2
    if c.rows > 256 or (problem is Gemm1 and 128 % (c.rows // 2)):
        return 0
    return kernel.shared_memory(c, matrices).stages


def configs(task: Task) -> list[dict[str, int]]:
    """Every legal candidate."""
    return points(knobs(task), functools.partial(is_legal, task))


def features(task: Task, config: dict[str, int]) -> list[float]:
    """Decisions, then tiles, waves, padding, stages and bytes a stage."""
    c = gemm_config(task, config)
    tiles = task.num_active_experts * math.ceil(task.rows_per_expert / c.tile_m) * (task.weight_rows / c.rows)
    waves = math.ceil(tiles / kernel.NUM_CTAS)
    padding = math.ceil(task.rows_per_expert / c.tile_m) * c.tile_m / task.rows_per_expert
    stage_bytes = c.k_blocks * (c.tile_m * 256 + c.rows * 64)
    return [
        *(math.log2(value) for value in config.values()),
        math.log2(c.rows), tiles / kernel.NUM_CTAS, float(waves), waves * kernel.NUM_CTAS / tiles, padding,
        float(_num_stages(task, c)), stage_bytes / 1024, task.k / (128 * c.k_blocks),
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- build


def symbol(stage: str, c: kernel.GemmConfig) -> str:
    """Name of a candidate's packed function."""
    choices = f"m{c.tile_m}_mi{c.mi}_ks{c.ks}_wg{c.warpgroups}_kb{c.k_blocks}_st{c.max_stages}"
    return f"{stage}_{c.weight_format.name}_moe_{choices}"


def stage_function(stage: str, c: kernel.GemmConfig) -> tvm.tirx.PrimFunc:
    """Host function of one stage alone, by the operator's calling convention."""
    name = symbol(stage, c)
    with IRBuilder() as builder:
        with I.prim_func():
            I.func_name(name)
            I.func_attr({"global_symbol": name, "tirx.kernel_launch_params": LAUNCH_PARAMS})
            a = Arguments(c.tile_m)
            if stage == "gemm1":
                gemm1(a, c, True)
            else:
                gemm2(a, c)
    return builder.get()


def _compile(key: tuple[str, Sequence[kernel.GemmConfig]], path: str) -> None:
    """One library of candidates (stage, configuration)."""
    makers = {symbol(stage, c): functools.partial(stage_function, stage, c) for stage, c in key}
    sm90a_build.compile_so(sm90a_build.packed_source(makers), Path(path))
    strip(Path(path))


@functools.cache
def compiled(folder: Path) -> Folder:
    """What ``folder`` holds of candidates of today's kernels."""
    package = Path(loader.PACKAGE)
    return Folder(folder, sources_digest(path for pattern in SOURCES for path in package.glob(pattern)))


def precompile(tasks: Iterable[Task], folder: Path, jobs: int | None, progress: Callable[[int, int], None]) -> list[str]:
    """Compile every legal candidate of ``tasks`` that is not in ``folder`` yet; calls ``progress(done, of)``.

    Returns
    -------
    list of str
        What could not be compiled and why.
    """
    candidates = {}
    for task in tasks:
        for config in configs(task):
            c = gemm_config(task, config)
            candidates[symbol(task.stage, c)] = (task.stage, c)
    where, done = compiled(folder), 0
    where.remove_stale()
    done = sum(name in where.known for name in candidates)
    progress(done, len(candidates))

    def count(more: int) -> None:
        nonlocal done
        done += more
        progress(done, len(candidates))

    results = where.compile(candidates, _compile, jobs, count)
    return [f"{name}: {error}" for name, (_, error) in results.items() if error]


def build(task: Task, candidates: Sequence[tuple[dict[str, int], tvm.IRModule]], folder: Path) -> list[tuple[str, str]]:
    """(library, error message) of each candidate."""
    symbols = {}
    for config, _ in candidates:
        c = gemm_config(task, config)
        symbols[symbol(task.stage, c)] = (task.stage, c)
    results = compiled(folder).compile(symbols, _compile)
    return [results[symbol(task.stage, gemm_config(task, config))] for config, _ in candidates]


# ----------------------------------------------------------------------------------------------------------- measure


class Inputs:
    """Calls of one shape, format and number of tokens, and the shipped operator's results for them by tile height."""

    def __init__(self, layer: dict[str, Any], task: Task) -> None:
        self.task = task
        case = bench.shape_case(task.shape, task.num_tokens, "bf16", task.weight_format, device=DEVICE)
        part = bench.of_tokens(layer, slice(task.num_tokens))
        self.calls = [torch_op.with_defaults(**part | dict(routing_logits=x)) for x in _logits(case, task)]
        self.prepared: dict[int, Prepared] = {}

    def of_tile(self, tile_m: int) -> "Prepared":
        """Workspaces and results for a tile height."""
        if tile_m not in self.prepared:
            if _is_memory_short():
                self.prepared.clear()
                torch.cuda.empty_cache()
            self.prepared[tile_m] = Prepared(self.calls, _entry(self.task.weight_format, tile_m))
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

    def __init__(self, calls: Sequence[dict[str, Any]], entry: loader.Entry) -> None:
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
                sizes = (problem.num_tokens, problem.top_k, problem.hidden_size, problem.intermediate_size)
                piece = slices(*sizes, problem.local_num_experts, entry.tile_m)[0]["z"]
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
    def of(cls, task: Task) -> Inputs:
        """Inputs of a task, made unless the last task had the same."""
        key = (task.shape, task.weight_format, max(task.num_tokens, LAYER_TOKENS))
        if key != cls.layer_key:
            cls.clear()  # before the next shape's weights
            cls.layer, cls.layer_key = bench.shape_call(task.shape, key[2], ("bf16", task.weight_format), DEVICE), key
        if cls.inputs is None or cls.inputs.task.num_tokens != task.num_tokens:
            cls.inputs = None
            cls.inputs = Inputs(cls.layer, task)
        return cls.inputs

    @classmethod
    def clear(cls) -> None:
        cls.layer_key = cls.layer = cls.inputs = None
        torch.cuda.empty_cache()


@functools.cache
def _function(artifact: str, name: str) -> Callable[..., None]:
    return tvm_ffi.load_module(artifact)[name]


class Bench:
    """Measures candidates of one task; lives in the worker process."""

    def __init__(self, task: Task) -> None:
        self.task, self.inputs = task, State.of(task)

    def measure(self, artifact: str, config: dict[str, int]) -> float:
        """Median time in us of a correct candidate; raises AssertionError for a wrong one."""
        stage, c = self.task.stage, gemm_config(self.task, config)
        prepared = self.inputs.of_tile(c.tile_m)
        expected, live = prepared.expected(stage)
        function, result = _function(artifact, symbol(stage, c)), prepared.results[stage]
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
            self.inputs = State.of(self.task)
            raise
        return us


def _rel_l2(actual: torch.Tensor, expected: torch.Tensor, live: torch.Tensor, step: int = 1 << 27) -> float:
    """||actual - expected|| / ||expected|| over ``live``, a part at a time: in float32 a large result would not fit."""
    error = norm = 0.0
    for i in range(0, len(actual), step):
        a, b, mask = (x[i : i + step] for x in (actual, expected, live))
        b = torch.where(mask, b.float(), 0)
        error += (torch.where(mask, a.float(), 0) - b).square_().sum(dtype=torch.float64).item()
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


def _entry(weight_format: str, tile_m: int) -> loader.Entry:
    for entry in loader.manifest().entries:
        if (entry.target, entry.weight_format, entry.tile_m) == (TARGET, weight_format, tile_m):
            return entry
    raise UnsupportedError(f"no {weight_format} artifact with tiles of {tile_m} for {TARGET} to compare with")
