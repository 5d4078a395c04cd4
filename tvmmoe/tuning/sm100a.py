# SPDX-License-Identifier: Apache-2.0
"""Datacenter Blackwell: the choices of kernels.sm100a.gemm.GemmConfig as decisions, for tvmmoe.tuning.cuda to time.

Only the weight format's own activations (mxfp8, nvfp4) are timed; hand-chosen decisions differ between them. A variant has
one configuration for both of its GEMMs, so what ships is chosen from the records of both stages together, while a report
names the best of each.
"""

import functools
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import tvm

from tvmmoe.config import ActivationFormat, WeightFormat
from tvmmoe.kernels.sm90a.build import packed_source
from tvmmoe.kernels.sm100a import build as sm100a_build
from tvmmoe.kernels.sm100a import gemm as kernel
from tvmmoe.kernels.sm100a.gemm1 import gemm1
from tvmmoe.kernels.sm100a.gemm2 import gemm2
from tvmmoe.kernels.sm100a.operator import TILES, variant
from tvmmoe.kernels.sm120a.operator import function_of
from tvmmoe.tuning import cuda, records
from tvmmoe.tuning.sm120a import mode, z_slice
from tvmmoe.tuning.tasks import STAGES, Task

__all__ = ["mode", "z_slice"]  # of the workspace and the calls that both Blackwells have

TARGET = "sm100a"
SOURCES = ("abi.py", "config.py", "workspace.py", "kernels/host.py", "kernels/nvcc.py")
SOURCES += tuple(f"kernels/{name}/*.py" for name in ("sm80", "sm90a", "sm120a", TARGET))
KNOBS = kernel.KNOBS | {"tile_m": tuple(TILES)}

device_name = cuda.device_name
tvm_target = functools.partial(cuda.tvm_target, "sm_100a", kernel.SMEM_BYTES)
(tasks, knobs, space, _, _, _, _, configs, precompile, build, Bench) = cuda.of(sys.modules[__name__])


def gemm_config(task: Task, config: dict[str, int]) -> kernel.GemmConfig:
    """The kernel's configuration of decisions."""
    return kernel.GemmConfig(WeightFormat[task.weight_format], ActivationFormat[mode(task.weight_format)[0]], **config)


def default_of_tile(tile_m: int, weight_format: str) -> dict[str, int]:
    """Hand-chosen decisions for a tile height."""
    c = variant(WeightFormat[weight_format], tile_m).quantized
    return {name: getattr(c, name) for name in KNOBS}


def default(task: Task) -> dict[str, int]:
    """Hand-chosen decisions for the task's rows an expert."""
    return default_of_tile(cuda.default_tile(TILES, task), task.weight_format)


def seeds(task: Task) -> list[dict[str, int]]:
    """Hand-chosen decisions of every tile height that the task may take."""
    return [default_of_tile(tile_m, task.weight_format) for tile_m in knobs(task)["tile_m"]]


def by_tile_height(
    stage: str, weight_format: str, measurements: list[records.Measurement]
) -> list[records.Candidates]:
    """Hand-chosen decisions of every tile height and the measurements that may replace them."""
    return [records.Candidates(stage, m, default_of_tile(m, weight_format), measurements) for m in TILES]


def chosen(weight_format: str, root: Path | None = None) -> dict[int, dict[str, kernel.GemmConfig]]:
    """Configurations of operator.Variant by tile height: the choice by the records of both stages, or the hand-chosen one.

    That of bf16 tokens, which are not timed, stays hand-chosen.
    """
    task = Task(TARGET, STAGES[0], weight_format, "", 1)  # for its formats
    every = (m for stage in STAGES for m in records.load(TARGET, stage, root)[0])
    mine = [m for m in every if m.task.weight_format == weight_format]
    return {
        tile_m: {
            "quantized": gemm_config(task, records.choose(mine, default_of_tile(tile_m, weight_format))),
            "bf16": variant(WeightFormat[weight_format], tile_m).bf16,
        }
        for tile_m in TILES
    }


def is_legal(task: Task, config: dict[str, int]) -> bool:
    """Tiles that fit the task's rows, and what a CTA has of shared and tensor memory."""
    return config["tile_m"] in knobs(task)["tile_m"] and kernel.is_legal(gemm_config(task, config))


def features(task: Task, config: dict[str, int]) -> list[float]:
    """Decisions, then tiles, waves, padding, stages' bytes, tensor memory, multiplications a byte, and stages along K."""
    c = gemm_config(task, config)
    row_tiles = math.ceil(task.rows_per_expert / c.tile_m)
    tiles = task.num_active_experts * row_tiles * math.ceil(task.weight_rows / c.rows)
    waves = math.ceil(tiles / kernel.NUM_CTAS)
    return [
        *(math.log2(value) for value in config.values()),
        tiles / kernel.NUM_CTAS, float(waves), waves * kernel.NUM_CTAS / tiles,
        row_tiles * c.tile_m / task.rows_per_expert, c.stage_bytes / 1024, (c.num_stages - 1) * c.stage_bytes / 1024,
        float(c.tmem_columns), c.rows * c.tile_m * c.k_stage / c.stage_bytes, task.k / c.k_stage,
    ]  # fmt: skip


def symbol(stage: str, c: kernel.GemmConfig) -> str:
    """Name of a candidate's packed function."""
    return f"{stage}_{c.weight_format.name}_moe_m{c.tile_m}_kb{c.k_blocks}_st{c.num_stages}_ac{c.accumulators}"


def stage_function(stage: str, c: kernel.GemmConfig) -> tvm.tirx.PrimFunc:
    """Host function of one stage alone, by the operator's calling convention."""
    launch = (lambda a: gemm1(a, c, True)) if stage == "gemm1" else (lambda a: gemm2(a, c))
    return function_of(symbol(stage, c), c, launch)


def compile_stage(makers: Mapping[str, Callable[[], tvm.tirx.PrimFunc]], path: Path) -> None:
    """A library of packed functions for the GPU at hand; where that is another one or none, for the whole family."""
    gencodes = {(10, 0): sm100a_build.DATACENTER, (10, 3): sm100a_build.ULTRA}
    here = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    mine = [gencodes[here]] if here in gencodes else gencodes.values()
    sm100a_build.compile_so(packed_source(makers, "sm_100a"), path, *mine)
