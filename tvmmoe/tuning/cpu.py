# SPDX-License-Identifier: Apache-2.0
"""CPU target: the schedule primitives of tvmmoe.spaces.cpu with sampled sizes, compiled by llvm, timed on all threads."""

import functools
import hashlib
import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import tvm

from tvmmoe import numerics
from tvmmoe.kernels.cpu import TILE_M
from tvmmoe.spaces.cpu import GemmConfig, parallel_outermost, tile_gemm
from tvmmoe.testing import rel_l2
from tvmmoe.tuning import records
from tvmmoe.tuning.tasks import Task, decide

TARGET = "x86-64-v3"
MAX_ERROR = 4e-3  # bfloat16 results against float32
CHECKED_TILES = 4
ROUNDS = 5


def device_name() -> str:
    """What the records hold for."""
    model = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name"))
    return f"{model.split(':')[1].strip()}, {torch.get_num_threads()} threads"


def tvm_target() -> tvm.target.Target:
    return tvm.target.Target({"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": TARGET, "num-cores": 2})


def tasks(stage: str, weight_format: str, shape: str, num_tokens: int) -> list[Task]:
    """One task a tile height that such a call may take: not more than eight times its rows."""
    rows = Task(TARGET, stage, weight_format, shape, num_tokens, 1).rows_per_expert
    return [Task(TARGET, stage, weight_format, shape, num_tokens, m) for m in TILE_M if m <= 8 * rows and rows <= 4 * m]


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


def chosen(stage: str, weight_format: str, tile_m: int, root: Path | None = None) -> GemmConfig:
    """The recorded choice for a tile height, or the hand-chosen one."""
    measurements = records.load(TARGET, stage, root)[0]
    task = Task(TARGET, stage, weight_format, "", 1, tile_m)
    mine = [m for m in measurements if (m.task.weight_format, m.task.tile_m) == (weight_format, tile_m)]
    return GemmConfig(**records.choose(mine, default(task)))


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
    """(path of the library, or "", error message) of each candidate."""
    results = []
    for config, mod in candidates:
        key = hashlib.sha256(repr((task, sorted(config.items()))).encode()).hexdigest()[:16]
        path = folder / f"{task.stage}_{key}.so"
        try:
            mod = tvm.IRModule({"main": parallel_outermost(mod["main"])})
            tvm.compile(mod, target=tvm_target()).export_library(str(path))
            results.append((str(path), ""))
        except Exception as error:  # whatever the compiler raises belongs to this candidate alone
            results.append(("", f"{type(error).__name__}: {error}"[:300]))
    return results


class Bench:
    """Measures candidates of one task; lives in the worker process."""

    def __init__(self, task: Task) -> None:
        self.task = task
        generator, random = torch.Generator().manual_seed(0), np.random.default_rng(0)
        experts, tiles, m = task.case.num_experts, task.num_tiles, task.tile_m
        block_size = 32 if task.weight_format == "mxfp4" else 16
        halves = 2 if task.stage == "gemm1" else 1
        n, k = task.weight_rows // halves, task.k
        shape = (experts, halves, n // 32, 32, k // 32)
        self.weights = torch.from_numpy(random.integers(0, 256, (*shape, 16), dtype=np.uint8))
        low, high = (121, 126) if block_size == 32 else (40, 56)  # 2^-6 ... 2^-2
        self.scales = torch.from_numpy(random.integers(low, high, (*shape, 32 // block_size), dtype=np.uint8))
        self.x = torch.randn(tiles, m, k // 32, 2, 16, generator=generator)
        self.out = torch.empty(tiles, m, n // 32, 32, dtype=torch.uint16)
        if halves == 1:
            self.weights, self.scales = self.weights[:, 0], self.scales[:, 0]
        self.experts = torch.arange(tiles, dtype=torch.int32) % experts
        self.rows = torch.zeros(tiles, m, dtype=torch.int32)

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
        """Median time in us of a correct candidate; raises AssertionError for a wrong one."""
        function = tvm.runtime.load_module(artifact)["main"]
        self.out.fill_(0x7FC0)  # NaN
        function(*self._arguments(0))
        actual = self.out.view(torch.bfloat16)[: len(self.expected)].flatten(2).float()
        error = rel_l2(actual, self.expected)
        assert error <= MAX_ERROR, f"relative L2 error {error:.2e} exceeds {MAX_ERROR:.0e}"
        times = []
        for i in range(ROUNDS):
            arguments = self._arguments(i)  # other experts, where not all are active
            begin = time.perf_counter()
            function(*arguments)
            times.append((time.perf_counter() - begin) * 1e6)
        return statistics.median(times)
