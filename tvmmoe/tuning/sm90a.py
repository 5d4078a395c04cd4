# SPDX-License-Identifier: Apache-2.0
"""Hopper: the choices of kernels.sm90a.gemm.GemmConfig as decisions, compiled by nvcc, timed beside the shipped operator.

A candidate's sizes are run-time values, so one compiled kernel serves every shape and number of tokens: it is compiled once
and measured in each task.
"""

import concurrent.futures
import functools
import hashlib
import math
import multiprocessing
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

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
from tvmmoe.testing import rel_l2
from tvmmoe.tuning import records
from tvmmoe.tuning.tasks import STAGES, Task, decide

TARGET = "sm90a"
MAX_ERROR = 1e-3  # against the shipped kernel: another order of the same float32 sums
PER_UNIT = 3  # candidates that one nvcc compiles
ROUTINGS = 4
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


def space(task: Task, sch: tvm.s_tir.Schedule) -> None:
    """Sample a configuration; the workload itself is not transformed: the kernel is written in TIRx."""
    decide(sch, KNOBS)


def gemm_config(task: Task, config: dict[str, int]) -> kernel.GemmConfig:
    """The kernel's configuration of decisions."""
    return kernel.GemmConfig(WeightFormat[task.weight_format], **config)


def default(task: Task) -> dict[str, int]:
    """Hand-chosen decisions for the task's rows an expert."""
    return default_of_tile(next((m for m in TILES if m >= task.rows_per_expert), max(TILES)))


def default_of_tile(tile_m: int) -> dict[str, int]:
    """Hand-chosen decisions for a tile height."""
    mi, ks, warpgroups, k_blocks = TILES[tile_m]
    return dict(tile_m=tile_m, mi=mi, ks=ks, warpgroups=warpgroups, k_blocks=k_blocks, max_stages=kernel.MAX_STAGES)


def chosen(weight_format: str, root: Path | None = None) -> dict[int, dict[str, kernel.GemmConfig]]:
    """Configuration of both stages by tile height: the recorded choice, or the hand-chosen one."""
    choices: dict[int, dict[str, kernel.GemmConfig]] = {tile_m: {} for tile_m in TILES}
    for stage in STAGES:
        measurements = [m for m in records.load(TARGET, stage, root)[0] if m.task.weight_format == weight_format]
        for tile_m, configs in choices.items():
            config = records.choose(measurements, default_of_tile(tile_m))
            configs[stage] = kernel.GemmConfig(WeightFormat[weight_format], **config)
    return choices


def is_legal(task: Task, config: dict[str, int]) -> bool:
    """What the kernel can be built for, and tiles that fit the task's rows at all."""
    c = gemm_config(task, config)
    fits = c.tile_m <= max(8 * task.rows_per_expert, 16) and c.tile_m >= task.rows_per_expert / 6
    registers = c.mi * c.tile_m <= (256 if c.warpgroups == 2 else 96)
    return fits and registers and c.ks <= c.warpgroups and c.k_blocks % c.ks == 0 and _num_stages(task, c) >= 2


def _num_stages(task: Task, c: kernel.GemmConfig) -> int:
    """Pipeline stages, or 0 where the kernel has no such tile."""
    problem = Gemm1 if task.stage == "gemm1" else Gemm2
    matrices = 1 if problem is Gemm1 else 2
    if c.rows > 256 or (problem is Gemm1 and 128 % (c.rows // 2)):
        return 0
    return kernel.shared_memory(c, matrices).stages


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


def _compile(stage: str, configs: Sequence[kernel.GemmConfig], path: str) -> str:
    """One library of several candidates; "" or what went wrong. Runs in a process of its own."""
    try:
        makers = {symbol(stage, c): functools.partial(stage_function, stage, c) for c in configs}
        sm90a_build.compile_so(sm90a_build.packed_source(makers), Path(path))
        return ""
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:500]


@functools.lru_cache(maxsize=1)
def _pool() -> concurrent.futures.ProcessPoolExecutor:
    """Compiling processes, one a core. They stay: importing torch and TVM takes each of them ten seconds."""
    return concurrent.futures.ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn"))


def compile_all(
    stage: str, configs: Iterable[kernel.GemmConfig], folder: Path
) -> dict[kernel.GemmConfig, tuple[str, str]]:
    """(library, error) of each configuration, several in one nvcc run; what is in ``folder`` already is not compiled."""
    todo = list(dict.fromkeys(configs))
    done: dict[kernel.GemmConfig, tuple[str, str]] = {}
    index = {p.stem: p for p in folder.glob("*.so")}
    for c in todo:
        for stem, path in index.items():
            if symbol(stage, c) in (folder / f"{stem}.txt").read_text().split():
                done[c] = (str(path), "")
    todo = [c for c in todo if c not in done]
    size = max(1, min(PER_UNIT, len(todo) // (os.cpu_count() or 1)))
    units = [todo[i : i + size] for i in range(0, len(todo), size)]
    while units:
        jobs = [(unit, folder / f"{_digest(stage, unit)}.so") for unit in units]
        futures = [_pool().submit(_compile, stage, unit, str(path)) for unit, path in jobs]
        units = []
        for (unit, path), future in zip(jobs, futures, strict=True):
            error = future.result()
            if error and len(unit) > 1:
                units += [[c] for c in unit]  # one of them spoils the others
                continue
            done |= {c: ("" if error else str(path), error) for c in unit}
            if not error:
                path.with_suffix(".txt").write_text("\n".join(symbol(stage, c) for c in unit))
    return done


def _digest(stage: str, unit: Sequence[kernel.GemmConfig]) -> str:
    return hashlib.sha256(repr((stage, unit)).encode()).hexdigest()[:16]


def build(task: Task, candidates: Sequence[tuple[dict[str, int], tvm.IRModule]], folder: Path) -> list[tuple[str, str]]:
    """(library, error message) of each candidate."""
    configs = [gemm_config(task, config) for config, _ in candidates]
    done = compile_all(task.stage, configs, folder)
    return [done[c] for c in configs]


# ----------------------------------------------------------------------------------------------------------- measure


@functools.lru_cache(maxsize=1)
def _layer(shape: str, weight_format: str, num_tokens: int):
    """A layer's call; its weights are what takes time to make."""
    return bench.shape_call(shape, num_tokens, ("bf16", weight_format), "cuda")


class Bench:
    """Measures candidates of one task; lives in the worker process."""

    def __init__(self, task: Task) -> None:
        self.task, mode = task, ("bf16", task.weight_format)
        kwargs = _layer(task.shape, task.weight_format, max(task.num_tokens, 8192))  # one layer for most tasks
        case = bench.shape_case(task.shape, task.num_tokens, *mode, device="cuda")
        part = bench.of_tokens(kwargs, slice(task.num_tokens))
        logits = bench.routings(case, part)[0][:ROUTINGS]
        self.calls = [torch_op.with_defaults(**part | dict(routing_logits=x)) for x in logits]
        self.prepared: dict[int, list[tuple]] = {}

    def _prepare(self, tile_m: int) -> list[tuple]:
        """Workspace and arguments of every routing after the shipped operator ran; results of the first as expected."""
        if tile_m in self.prepared:
            return self.prepared[tile_m]
        self.prepared.clear()  # a workspace may take a gigabyte
        prepared = []
        for arguments in self.calls:
            problem = validate(**arguments)
            entry = _entry(self.task.weight_format, tile_m)
            plan = torch_op.plan(problem, entry)
            size = (torch_op.num_padded_tokens(problem, tile_m), problem.hidden_size)
            y = torch.empty(size, dtype=torch.bfloat16, device="cuda")
            out = torch.empty(problem.num_tokens, problem.hidden_size, dtype=torch.bfloat16, device="cuda")
            workspace = torch.empty(plan.workspace_bytes, dtype=torch.uint8, device="cuda")
            for tensor in (workspace, y.view(torch.uint8)):
                tensor.fill_(0xFF)  # NaN
            tensors = {name: t for name, t in arguments.items() if isinstance(t, torch.Tensor)}
            tensors |= {"output": out, "gemm2_output": y}
            addresses = [tensors[name].data_ptr() if name in tensors else 0 for name in abi.POINTERS]
            ints = list(torch_op._with_dtypes(plan.ints, arguments))
            ints[abi.INTS.index("enable_pdl")] = 0  # a stage by itself
            call = (workspace, *addresses, *ints, problem.routed_scaling_factor)
            plan.function(*call)
            sizes = (problem.num_tokens, problem.top_k, problem.hidden_size, problem.intermediate_size)
            piece = slices(*sizes, problem.local_num_experts, tile_m)[0]["z"]
            z = workspace[piece.offset : piece.offset + piece.num_bytes].view(torch.bfloat16)
            prepared.append((call, z if self.task.stage == "gemm1" else y.view(-1), (y, out)))
        torch.cuda.synchronize()
        self.expected = prepared[0][1].clone()
        self.prepared[tile_m] = prepared
        return prepared

    def measure(self, artifact: str, config: dict[str, int]) -> float:
        """Median time in us of a correct candidate; raises AssertionError for a wrong one."""
        c = gemm_config(self.task, config)
        prepared = self._prepare(c.tile_m)
        function = tvm_ffi.load_module(artifact)[symbol(self.task.stage, c)]
        call, result, _ = prepared[0]
        result.view(torch.uint8).fill_(0xFF)
        function(*call)
        live = ~self.expected.isnan()
        assert torch.equal(live, ~result.isnan()), "other rows than the shipped kernel's are written"
        error = rel_l2(result[live], self.expected[live])
        assert error <= MAX_ERROR, f"relative L2 error {error:.2e} exceeds {MAX_ERROR:.0e}"
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call, *_ in prepared:
                function(*call)
        return bench.median_us(graph.replay, torch.device("cuda", 0), 7) / len(prepared)


def _entry(weight_format: str, tile_m: int) -> loader.Entry:
    for entry in loader.manifest().entries:
        if (entry.target, entry.weight_format, entry.tile_m) == (TARGET, weight_format, tile_m):
            return entry
    raise UnsupportedError(f"no {weight_format} artifact with tiles of {tile_m} for {TARGET} to compare with")
