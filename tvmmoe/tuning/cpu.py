# SPDX-License-Identifier: Apache-2.0
"""CPU target: the schedule primitives of tvmmoe.spaces.cpu with sampled sizes, compiled by llvm.

What is compiled and timed is what ships: the definition with symbolic sizes, so one library serves every shape and number
of tokens. It is timed by the CPU time of one thread: tasks are many and equal, so more threads share them evenly, and what
else the machine does hardly shows.
"""

import functools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import tvm
import tvm_ffi

from tvmmoe import numerics
from tvmmoe.config import ActivationType, WeightFormat
from tvmmoe.kernels import gemm1, gemm2
from tvmmoe.kernels.cpu import TILE_M
from tvmmoe.select import cpu_name
from tvmmoe.spaces.cpu import GemmConfig, schedule_gemm, tile_gemm
from tvmmoe.testing import rel_l2
from tvmmoe.tuning import records
from tvmmoe.tuning.tasks import Task, decide, points

TARGET = "x86-64-v3"
MAX_ERROR = 4e-3  # bfloat16 results against float32
CHECKED_TILES = 4
TIMED_S = 0.3  # a candidate and the one that it is compared with
ROUNDS = (3, 41)


def device_name() -> str:
    """What the records hold for."""
    return f"{cpu_name()}, one thread"


def tvm_target() -> tvm.target.Target:
    return tvm.target.Target({"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": TARGET, "num-cores": 2})


def tasks(stage: str, weight_format: str, shape: str, num_tokens: int) -> list[Task]:
    """One task a tile height that such a call may take: not more than twice its rows, nor less than a quarter."""
    rows = Task(TARGET, stage, weight_format, shape, num_tokens, 1).rows_per_expert
    return [Task(TARGET, stage, weight_format, shape, num_tokens, m) for m in TILE_M if m <= 2 * rows and rows <= 4 * m]


def knobs(task: Task) -> dict[str, tuple[int, ...]]:
    """Candidates of every decision (spaces.cpu.GemmConfig)."""
    return {
        "panel_n": (4, 8, 16, 32),
        "micro_m": tuple(m for m in (1, 2, 4, 8) if m <= task.tile_m),
        "micro_n": (1, 2, 4),
    }


def space(task: Task, sch: tvm.s_tir.Schedule) -> None:
    """Sample a schedule."""
    sampled = decide(sch, knobs(task))
    tile_gemm(sch, sampled["panel_n"], sampled["micro_m"], sampled["micro_n"])


def default(task: Task) -> dict[str, int]:
    """The hand-chosen decisions."""
    return {"panel_n": 8, "micro_m": min(4, task.tile_m), "micro_n": 1}


def seeds(task: Task) -> list[dict[str, int]]:
    """What is measured first."""
    return [default(task)]


def configs(task: Task) -> list[dict[str, int]]:
    """Every legal candidate."""
    return points(knobs(task), functools.partial(is_legal, task))


def by_tile_height(
    stage: str, weight_format: str, measurements: list[records.Measurement]
) -> list[records.Candidates]:
    """Hand-chosen decisions of every tile height and the measurements that may replace them: those of its own tasks."""
    return [
        records.Candidates(
            stage,
            tile_m,
            default(Task(TARGET, stage, weight_format, "", 1, tile_m)),
            [m for m in measurements if m.task.tile_m == tile_m],
        )
        for tile_m in TILE_M
    ]


def chosen(stage: str, weight_format: str, tile_m: int, root: Path | None = None) -> GemmConfig:
    """The recorded choice for a tile height, or the hand-chosen one."""
    mine = [m for m in records.load(TARGET, stage, root)[0] if m.task.weight_format == weight_format]
    (own,) = (c for c in by_tile_height(stage, weight_format, mine) if c.tile_m == tile_m)
    return GemmConfig(**records.choose(own.measurements, own.by_hand))


def is_legal(task: Task, config: dict[str, int]) -> bool:
    """More accumulators than registers hold spill in the innermost loop."""
    return config["micro_n"] <= config["panel_n"] and config["micro_m"] * config["micro_n"] <= 8


def features(task: Task, config: dict[str, int]) -> list[float]:
    """Decisions; panel bytes over L2; register tile; tasks."""
    panel_bytes = config["panel_n"] * task.k * 4 * (2 if task.stage == "gemm1" else 1)
    outputs = config["micro_m"] * config["micro_n"]
    return [
        *(math.log2(config[name]) for name in ("panel_n", "micro_m", "micro_n")),
        panel_bytes / 2**20,
        float(outputs),
        outputs / (config["micro_m"] + config["micro_n"]),
        math.log2(task.num_tiles * 32 / config["panel_n"]),
        float(task.tile_m),
    ]


def build(task: Task, candidates: Sequence[tuple[dict[str, int], tvm.IRModule]], folder: Path) -> list[tuple[str, str]]:
    """(path of the library, or "", error message) of each candidate; what lies in ``folder`` already is not compiled."""
    weight_format, results = WeightFormat[task.weight_format], []
    for config, _ in candidates:
        try:
            if task.stage == "gemm1":
                definition = gemm1.gemm1(weight_format, ActivationType.Swiglu, task.tile_m)
            else:
                definition = gemm2.gemm2(weight_format, task.tile_m)
            func = schedule_gemm(definition, GemmConfig(**config)).with_attr("global_symbol", "main")
            path = folder / f"{task.stage}_{tvm_ffi.structural_hash(func, map_free_vars=True):x}.so"
            if not path.is_file():
                tvm.compile(tvm.IRModule({"main": func}), target=tvm_target()).export_library(str(path))
            results.append((str(path), ""))
        except Exception as error:  # whatever the compiler raises belongs to this candidate alone
            results.append(("", f"{type(error).__name__}: {error}"[:300]))
    return results


@functools.lru_cache(maxsize=1)
def _weights(stage: str, weight_format: str, shape: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Random weights and scales of a stage; of gemm1, both halves."""
    task, random = Task(TARGET, stage, weight_format, shape, 1), np.random.default_rng(0)
    block_size, halves = WeightFormat[weight_format].block_size, 2 if stage == "gemm1" else 1
    sizes = (task.case.num_experts, halves, task.weight_rows // halves // 32, 32, task.k // 32)
    weights = torch.from_numpy(random.integers(0, 256, (*sizes, 16), dtype=np.uint8))
    low, high = (121, 126) if block_size == 32 else (40, 56)  # 2^-6 ... 2^-2
    scales = torch.from_numpy(random.integers(low, high, (*sizes, 32 // block_size), dtype=np.uint8))
    return (weights, scales) if halves == 2 else (weights[:, 0], scales[:, 0])


class Bench:
    """Measures candidates of one task; lives in the worker process."""

    def __init__(self, task: Task) -> None:
        tvm_ffi.get_global_func("runtime.config_threadpool")(1, 1)  # the calling thread alone
        self.task, tiles, m = task, task.num_tiles, task.tile_m
        self.weights, self.scales = _weights(task.stage, task.weight_format, task.shape)
        self.x = torch.randn(tiles, m, task.k // 32, 2, 16, generator=torch.Generator().manual_seed(0))
        n = task.weight_rows // (2 if task.stage == "gemm1" else 1)
        self.out = torch.empty(tiles, m, n // 32, 32, dtype=torch.uint16)
        self.experts = torch.arange(tiles, dtype=torch.int32) % task.case.num_experts
        self.rows = torch.zeros(tiles, m, dtype=torch.int32)
        self.reference: tuple[Callable[..., None], float] | None = None

    def _arguments(self, shift: int) -> list[torch.Tensor]:
        one, zero = torch.ones(1), torch.zeros(1)
        experts = (self.experts + shift * self.task.num_active_experts) % self.task.case.num_experts
        bias = torch.zeros(1, *self.weights.shape[1:-2])
        head = [self.x, self.weights, self.scales, experts, self.rows]
        if self.task.stage == "gemm1":
            tail = [one, bias, one, zero, torch.full((1,), math.inf), one, one, self.out]
        else:
            tail = [torch.ones(self.rows.shape), bias, one, self.out]
        return head + tail

    @functools.cached_property
    def expected(self) -> torch.Tensor:
        """float32 results of the first tiles."""
        dequantize = numerics.dequantize_mxfp4 if self.task.weight_format == "mxfp4" else numerics.dequantize_nvfp4
        results = []
        for tile in range(min(CHECKED_TILES, self.task.num_tiles)):
            expert = int(self.experts[tile])
            values, scales = self.weights[expert].flatten(-2), self.scales[expert].flatten(-2)
            w = dequantize(values.flatten(0, -2).contiguous(), scales.flatten(0, -2).contiguous()).float()
            x = self.x[tile].transpose(-1, -2).flatten(1)
            y = x @ w.T
            if self.task.stage == "gemm1":
                up, gate = y.chunk(2, -1)
                y = up * torch.nn.functional.silu(gate)
            results.append(y)
        return torch.stack(results)

    def measure(self, artifact: str, config: dict[str, int]) -> float:
        """Time in us of a correct candidate; raises AssertionError for a wrong one.

        The first one, hand-chosen, is timed by itself, every other in turns with it: what slows the machine slows both.
        """
        function = tvm.runtime.load_module(artifact)["main"]
        self.out.fill_(0x7FC0)  # NaN
        us = self._time(function, 0)
        actual = self.out.view(torch.bfloat16)[: len(self.expected)].flatten(2).float()
        error = rel_l2(actual, self.expected)
        assert error <= MAX_ERROR, f"relative L2 error {error:.2e} exceeds {MAX_ERROR:.0e}"
        rounds = min(max(round(TIMED_S * 1e6 / us), ROUNDS[0]), ROUNDS[1])
        if self.reference is None:
            us = statistics.median(self._time(function, i) for i in range(rounds))
            self.reference = function, us
            return us
        other, other_us = self.reference
        ratios = []
        for i in range(rounds):
            before = self._time(other, 2 * i)
            ratios.append(self._time(function, 2 * i + 1) / before)
        return other_us * statistics.median(ratios)

    def _time(self, function: Callable[..., None], shift: int) -> float:
        """us of one call, on other experts at another ``shift`` where not all are active."""
        arguments = self._arguments(shift)
        begin = time.thread_time()
        function(*arguments)
        return (time.thread_time() - begin) * 1e6
