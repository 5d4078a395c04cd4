# SPDX-License-Identifier: Apache-2.0
"""What the CUDA targets' tuning shares: candidates compiled by nvcc in a pool, timed beside the shipped operator.

A candidate's sizes are run-time values, so one compiled kernel serves every shape and number of tokens: it is compiled once
and measured in each task. A target's module (tvmmoe.tuning.sm90a, ...) has the space and its arithmetic, and

    TARGET, TILES                  name; hand-chosen choices by tile height
    mode(weight_format)            (activations, weights) of the calls that are timed
    gemm_config(task, config)      the kernel's configuration of decisions
    default_of_tile(tile_m)        hand-chosen decisions
    symbol(stage, c)               name of a candidate's packed function
    stage_function(stage, c)       that function: one stage alone, by the operator's calling convention
    compile_stage(makers, path)    nvcc over such functions
    z_slice(problem, tile_m)       where gemm1's result is in the workspace
"""

import concurrent.futures
import functools
import hashlib
import importlib
import multiprocessing
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import tvm
import tvm_ffi

from tvmmoe import abi, bench, loader, torch_op
from tvmmoe.arguments import validate
from tvmmoe.errors import UnsupportedError
from tvmmoe.testing import rel_l2
from tvmmoe.tuning import records
from tvmmoe.tuning.tasks import STAGES, Task

MAX_ERROR = 1e-3  # against the shipped kernel: another order of the same float32 sums
PER_UNIT = 3  # candidates that one nvcc compiles
ROUTINGS = 4


def device_name() -> str:
    """What the records hold for."""
    return torch.cuda.get_device_name()


def tvm_target(arch: str, smem_bytes: int) -> tvm.target.Target:
    """TVM's name of the GPU, for MetaSchedule."""
    limits = {"max_threads_per_block": 1024, "max_shared_memory_per_block": smem_bytes, "thread_warp_size": 32}
    return tvm.target.Target({"kind": "cuda", "arch": arch, **limits}, host={"kind": "llvm"})


def fits(task: Task, tile_m: int) -> bool:
    """Whether tiles of this height suit the task's rows at all."""
    return task.rows_per_expert / 6 <= tile_m <= max(8 * task.rows_per_expert, 16)


def chosen(module: str, weight_format: str, root: Path | None = None) -> dict[int, dict[str, Any]]:
    """Configuration of both stages by tile height: the recorded choice, or the hand-chosen one."""
    target = importlib.import_module(module)
    choices: dict[int, dict[str, Any]] = {tile_m: {} for tile_m in target.TILES}
    for stage in STAGES:
        measurements = [m for m in records.load(target.TARGET, stage, root)[0] if m.task.weight_format == weight_format]
        task = Task(target.TARGET, stage, weight_format, "", 1)
        for tile_m, configs in choices.items():
            config = records.choose(measurements, target.default_of_tile(tile_m))
            configs[stage] = target.gemm_config(task, config)
    return choices


# ------------------------------------------------------------------------------------------------------------- build


def _compile(module: str, stage: str, configs: Sequence[Any], path: str) -> str:
    """One library of several candidates; "" or what went wrong. Runs in a process of its own."""
    try:
        target = importlib.import_module(module)
        makers = {target.symbol(stage, c): functools.partial(target.stage_function, stage, c) for c in configs}
        target.compile_stage(makers, Path(path))
        return ""
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:500]


@functools.lru_cache(maxsize=1)
def _pool() -> concurrent.futures.ProcessPoolExecutor:
    """Compiling processes, one a core. They stay: importing torch and TVM takes each of them ten seconds."""
    return concurrent.futures.ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn"))


def compile_all(module: str, stage: str, configs: Iterable[Any], folder: Path) -> dict[Any, tuple[str, str]]:
    """(library, error) of each configuration, several in one nvcc run; what is in ``folder`` already is not compiled."""
    target = importlib.import_module(module)
    todo = list(dict.fromkeys(configs))
    done: dict[Any, tuple[str, str]] = {}
    index = {p.stem: p for p in folder.glob("*.so")}
    for c in todo:
        for stem, path in index.items():
            if target.symbol(stage, c) in (folder / f"{stem}.txt").read_text().split():
                done[c] = (str(path), "")
    todo = [c for c in todo if c not in done]
    size = max(1, min(PER_UNIT, len(todo) // (os.cpu_count() or 1)))
    units = [todo[i : i + size] for i in range(0, len(todo), size)]
    while units:
        jobs = [(unit, folder / f"{_digest(stage, unit)}.so") for unit in units]
        futures = [_pool().submit(_compile, module, stage, unit, str(path)) for unit, path in jobs]
        units = []
        for (unit, path), future in zip(jobs, futures, strict=True):
            error = future.result()
            if error and len(unit) > 1:
                units += [[c] for c in unit]  # one of them spoils the others
                continue
            done |= {c: ("" if error else str(path), error) for c in unit}
            if not error:
                path.with_suffix(".txt").write_text("\n".join(target.symbol(stage, c) for c in unit))
    return done


def _digest(stage: str, unit: Sequence[Any]) -> str:
    return hashlib.sha256(repr((stage, unit)).encode()).hexdigest()[:16]


def build(
    module: str, task: Task, candidates: Sequence[tuple[dict[str, int], tvm.IRModule]], folder: Path
) -> list[tuple[str, str]]:
    """(library, error message) of each candidate."""
    target = importlib.import_module(module)
    configs = [target.gemm_config(task, config) for config, _ in candidates]
    done = compile_all(module, task.stage, configs, folder)
    return [done[c] for c in configs]


# ----------------------------------------------------------------------------------------------------------- measure


@functools.lru_cache(maxsize=1)
def _layer(shape: str, mode: tuple[str, str], num_tokens: int):
    """A layer's call; its weights are what takes time to make."""
    return bench.shape_call(shape, num_tokens, mode, "cuda")


class Bench:
    """Measures candidates of one task of the target in ``module``; lives in the worker process."""

    def __init__(self, module: str, task: Task) -> None:
        self.task, self.target = task, importlib.import_module(module)
        mode = self.target.mode(task.weight_format)
        kwargs = _layer(task.shape, mode, max(task.num_tokens, 8192))  # one layer for most tasks
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
            plan = torch_op.plan(problem, _entry(self.target.TARGET, self.task.weight_format, tile_m))
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
            piece = self.target.z_slice(problem, tile_m)
            z = workspace[piece.offset : piece.offset + piece.num_bytes].view(torch.bfloat16)
            prepared.append((call, z if self.task.stage == "gemm1" else y.view(-1), (y, out)))
        torch.cuda.synchronize()
        self.expected = prepared[0][1].clone()
        self.prepared[tile_m] = prepared
        return prepared

    def measure(self, artifact: str, config: dict[str, int]) -> float:
        """Median time in us of a correct candidate; raises AssertionError for a wrong one."""
        c = self.target.gemm_config(self.task, config)
        prepared = self._prepare(c.tile_m)
        function = tvm_ffi.load_module(artifact)[self.target.symbol(self.task.stage, c)]
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


def _entry(target: str, weight_format: str, tile_m: int) -> loader.Entry:
    for entry in loader.manifest().entries:
        if (entry.target, entry.weight_format, entry.tile_m) == (target, weight_format, tile_m):
            return entry
    raise UnsupportedError(f"no {weight_format} artifact with tiles of {tile_m} for {target} to compare with")
