# SPDX-License-Identifier: Apache-2.0
"""Any GPU since Ampere: the choices of kernels.sm80.gemm.GemmConfig as decisions; tvmmoe.tuning.cuda compiles and times them.

The tile height is a decision in place of the fragments along tokens, which follow from it: what ships is chosen by height.
A candidate fits every GPU that the artifact serves; records are of the one that measured them.
"""

import functools
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import tvm

from tvmmoe.config import WeightFormat
from tvmmoe.kernels.sm80 import build as sm80_build
from tvmmoe.kernels.sm80 import gemm as kernel
from tvmmoe.kernels.sm80.gemm1 import gemm1
from tvmmoe.kernels.sm80.gemm2 import gemm2
from tvmmoe.kernels.sm80.operator import LAUNCH_PARAMS, TILES
from tvmmoe.kernels.sm80.pipeline import SMEM_BYTES
from tvmmoe.kernels.sm90a.call import Arguments, host_function
from tvmmoe.kernels.sm90a.layout import slices
from tvmmoe.tuning import cuda
from tvmmoe.tuning.sm90a import mode, z_slice
from tvmmoe.tuning.tasks import Task

__all__ = ["mode", "z_slice"]  # of the workspace and the calls that are Hopper's

TARGET = "sm80"
SOURCES = ("abi.py", "config.py", "workspace.py", "kernels/host.py", "kernels/nvcc.py")
SOURCES += ("kernels/sm80/*.py", "kernels/sm90a/*.py")
NUM_SMS, SM_SMEM_BYTES, SM_REGISTERS, SM_THREADS = 108, 164 * 1024, 65536, 2048  # A100
KNOBS = {
    "tile_m": tuple(TILES),
    "warps_r": (1, 2, 4, 8),
    "warps_t": (1, 2, 4),
    "mi": (1, 2, 4),
    "k_step": (128, 256),
    "num_stages": (2, 3, 4, 5, 6),
    "warps_k": (1, 2),
}

device_name = cuda.device_name
tvm_target = functools.partial(cuda.tvm_target, "sm_80", SMEM_BYTES)
(tasks, knobs, space, default, seeds, by_tile_height, chosen, configs, precompile, build, Bench) = cuda.of(
    sys.modules[__name__]
)


def gemm_config(task: Task, config: dict[str, int]) -> kernel.GemmConfig:
    """The kernel's configuration of decisions. Raises AssertionError where it has none."""
    rest = dict(config)
    ni, remainder = divmod(rest.pop("tile_m"), 8 * config["warps_t"])
    assert ni and not remainder, config
    return kernel.GemmConfig(WeightFormat[task.weight_format], ni=ni, **rest)


def default_of_tile(tile_m: int) -> dict[str, int]:
    """Hand-chosen decisions for a tile height."""
    warps_r, warps_t, mi, _, k_step, num_stages, warps_k = TILES[tile_m]
    choices = dict(warps_r=warps_r, warps_t=warps_t, mi=mi, k_step=k_step, num_stages=num_stages, warps_k=warps_k)
    return dict(tile_m=tile_m, **choices)


def is_legal(task: Task, config: dict[str, int]) -> bool:
    """Tiles that fit the task's rows, whole fragments a warp, and what a CTA has of shared memory and registers."""
    try:
        c = gemm_config(task, config)
    except AssertionError:
        return False
    has_registers = registers(c) <= register_limit(c) + 30  # near the limit ptxas manages with less
    return c.tile_m in knobs(task)["tile_m"] and has_registers and 64 <= c.threads <= 512 and 32 <= c.rows <= 256


def register_limit(c: kernel.GemmConfig) -> int:
    """What ptxas gives a thread."""
    return min(255, SM_REGISTERS // (c.ctas_per_sm * c.threads))


def registers(c: kernel.GemmConfig) -> int:
    """Estimate of what a thread takes where it may; within 15 for 95 of 103 candidates."""
    pieces = (c.rows * c.weight_bytes + c.tile_m * c.token_bytes) / (16 * c.threads)
    return round(45 + 3 * c.mi * c.ni + 17 * c.mi + 6 * c.ni + 2 * pieces + 7 * c.rows / c.threads)


def features(task: Task, config: dict[str, int]) -> list[float]:
    """Decisions, then tiles, waves, CTAs an SM, padding, stages' bytes, and multiplications a byte of shared memory."""
    c = gemm_config(task, config)
    used = min(registers(c), register_limit(c))
    ctas = min(SM_SMEM_BYTES // (c.smem_bytes + 1024), SM_THREADS // c.threads, SM_REGISTERS // (used * c.threads))
    slots = NUM_SMS * max(ctas, 1)
    row_tiles = math.ceil(task.rows_per_expert / c.tile_m)
    tiles = task.num_active_experts * row_tiles * math.ceil(task.weight_rows / c.rows)
    waves = math.ceil(tiles / slots)
    bytes_read = c.warps_t * c.rows * c.weight_bytes + c.warps_r * c.tile_m * c.token_bytes
    return [
        *(math.log2(value) for value in config.values()),
        math.log2(c.rows), math.log2(c.ni), math.log2(c.threads), tiles / slots, float(waves), waves * slots / tiles,
        float(ctas), row_tiles * c.tile_m / task.rows_per_expert, c.stage_bytes / 1024,
        ctas * (c.num_stages - 1) * c.stage_bytes / 1024, c.rows * c.tile_m * c.k_step / bytes_read, float(registers(c)),
        task.k / c.k_step,
    ]  # fmt: skip


def symbol(stage: str, c: kernel.GemmConfig) -> str:
    """Name of a candidate's packed function."""
    choices = f"m{c.tile_m}_wr{c.warps_r}_wt{c.warps_t}_mi{c.mi}_ks{c.k_step}_st{c.num_stages}_wk{c.warps_k}"
    return f"{stage}_{c.weight_format.name}_moe_{choices}"


def stage_function(stage: str, c: kernel.GemmConfig) -> tvm.tirx.PrimFunc:
    """Host function of one stage alone, by the operator's calling convention."""
    launch = (lambda a: gemm1(a, c, True)) if stage == "gemm1" else (lambda a: gemm2(a, c))
    return host_function(symbol(stage, c), LAUNCH_PARAMS, lambda: Arguments(c.tile_m, slices), launch)


def compile_stage(makers: Mapping[str, Callable[[], tvm.tirx.PrimFunc]], path: Path) -> None:
    """A library of packed functions for the GPU at hand; where there is none, for all of sm_8x and Hopper."""
    here = [torch.cuda.get_device_capability()] if torch.cuda.is_available() else [(8, 0), (9, 0)]
    chips = ",".join(f"sm_{major}{minor}" for major, minor in here)
    sm80_build.compile_so(sm80_build.packed_source(makers), path, f"arch=compute_80,code=[{chips}]")
