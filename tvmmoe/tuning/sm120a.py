# SPDX-License-Identifier: Apache-2.0
"""Consumer Blackwell: the choices of kernels.sm120a.gemm.GemmConfig as decisions; tvmmoe.tuning.cuda compiles and times them.

The tile height is a decision in place of the fragments along tokens, which follow from it: what ships is chosen by height.
Only the weight format's own activations (mxfp8, nvfp4) are timed.
"""

import functools
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import tvm

from tvmmoe.config import ActivationFormat, Problem, WeightFormat
from tvmmoe.kernels.sm80.pipeline import SMEM_BYTES
from tvmmoe.kernels.sm120a import build as sm120a_build
from tvmmoe.kernels.sm120a import gemm as kernel
from tvmmoe.kernels.sm120a.gemm1 import gemm1
from tvmmoe.kernels.sm120a.gemm2 import gemm2
from tvmmoe.kernels.sm120a.layout import slices
from tvmmoe.kernels.sm120a.operator import TILES, function_of
from tvmmoe.tuning import cuda
from tvmmoe.tuning.tasks import Task
from tvmmoe.workspace import Slice

TARGET = "sm120a"
SOURCES = ("abi.py", "config.py", "workspace.py", "kernels/host.py", "kernels/nvcc.py")
SOURCES += tuple(f"kernels/{name}/*.py" for name in ("sm80", "sm90a", TARGET))
NUM_SMS = 170  # RTX 5090
SM_SMEM_BYTES, SM_REGISTERS, SM_THREADS = 100 * 1024, 65536, 1536
KNOBS = {
    "tile_m": tuple(TILES),
    "warps_r": (1, 2, 4, 8),
    "warps_t": (1, 2, 4),
    "mi": (1, 2, 4),
    "k_step": (128, 256),
    "num_stages": (2, 3, 4, 5, 6),
}

device_name = cuda.device_name
tvm_target = functools.partial(cuda.tvm_target, "sm_120a", SMEM_BYTES)
(tasks, knobs, space, default, seeds, by_tile_height, chosen, configs, precompile, build, Bench) = cuda.of(
    sys.modules[__name__]
)


def mode(weight_format: str) -> tuple[str, str]:
    """Activations and weights of the calls that are timed."""
    activation = ActivationFormat.mxfp8 if weight_format == WeightFormat.mxfp4.name else ActivationFormat.nvfp4
    return activation.name, weight_format


def gemm_config(task: Task, config: dict[str, int]) -> kernel.GemmConfig:
    """The kernel's configuration of decisions. Raises AssertionError where it has none."""
    rest = dict(config)
    ni, remainder = divmod(rest.pop("tile_m"), 8 * config["warps_t"])
    assert ni and not remainder, config
    return kernel.GemmConfig(WeightFormat[task.weight_format], ni=ni, **rest)


def default_of_tile(tile_m: int) -> dict[str, int]:
    """Hand-chosen decisions for a tile height."""
    warps_r, warps_t, mi, _, k_step, num_stages = TILES[tile_m]
    return dict(tile_m=tile_m, warps_r=warps_r, warps_t=warps_t, mi=mi, k_step=k_step, num_stages=num_stages)


def is_legal(task: Task, config: dict[str, int]) -> bool:
    """Tiles that fit the task's rows, whole fragments a warp, and what a CTA has of shared memory and registers."""
    try:
        c = gemm_config(task, config)
    except AssertionError:
        return False
    has_registers = registers(c) <= min(255, SM_REGISTERS // c.threads) + 16  # near the limit ptxas manages with less
    return c.tile_m in knobs(task)["tile_m"] and has_registers and 64 <= c.threads <= 512 and c.rows <= 256


def registers(c: kernel.GemmConfig) -> int:
    """Estimate for a thread, within 10 of what ptxas takes up to 200: accumulators, fragments, scales, copied pieces."""
    scales = (c.mi + c.ni) * (c.scale_bytes // 4 - 1)
    pieces = (c.rows * c.weight_bytes + c.tile_m * c.token_bytes) / (16 * c.threads)
    return round(38 + 4 * c.mi * c.ni + 8 * c.mi + 3 * c.ni + scales + 4 * pieces)


def features(task: Task, config: dict[str, int]) -> list[float]:
    """Decisions, then tiles, waves, CTAs an SM, padding, stages' bytes, and multiplications a byte of shared memory."""
    c = gemm_config(task, config)
    ctas = min(SM_SMEM_BYTES // (c.smem_bytes + 1024), SM_THREADS // c.threads, SM_REGISTERS // (registers(c) * c.threads))
    slots = NUM_SMS * max(ctas, 1)
    row_tiles = math.ceil(task.rows_per_expert / c.tile_m)
    tiles = task.num_active_experts * row_tiles * math.ceil(task.weight_rows / c.rows)
    waves = math.ceil(tiles / slots)
    bytes_read = c.warps_t * c.rows * c.weight_bytes + c.warps_r * c.tile_m * c.token_bytes
    return [
        *(math.log2(value) for value in config.values()),
        math.log2(c.rows), math.log2(c.ni), tiles / slots, float(waves), waves * slots / tiles, float(ctas),
        row_tiles * c.tile_m / task.rows_per_expert, c.stage_bytes / 1024, ctas * (c.num_stages - 1) * c.stage_bytes / 1024,
        c.rows * c.tile_m * c.k_step / bytes_read, float(registers(c)), task.k / c.k_step,
    ]  # fmt: skip


def symbol(stage: str, c: kernel.GemmConfig) -> str:
    """Name of a candidate's packed function."""
    choices = f"m{c.tile_m}_wr{c.warps_r}_wt{c.warps_t}_mi{c.mi}_ks{c.k_step}_st{c.num_stages}"
    return f"{stage}_{c.weight_format.name}_moe_{choices}"


def stage_function(stage: str, c: kernel.GemmConfig) -> tvm.tirx.PrimFunc:
    """Host function of one stage alone, by the operator's calling convention."""
    launch = (lambda a: gemm1(a, c, True)) if stage == "gemm1" else (lambda a: gemm2(a, c))
    return function_of(symbol(stage, c), c, launch)


def compile_stage(makers: Mapping[str, Callable[[], tvm.tirx.PrimFunc]], path: Path) -> None:
    """A library of packed functions for the GPU at hand; where that is another one or none, for the whole family."""
    gencodes = {(12, 0): sm120a_build.NATIVE, (12, 1): sm120a_build.GB10}
    here = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    mine = [gencodes[here]] if here in gencodes else gencodes.values()
    sm120a_build.compile_so(sm120a_build.packed_source(makers), path, *mine)


def z_slice(problem: Problem, tile_m: int) -> Slice:
    """gemm1's result in the workspace."""
    sizes = (problem.num_tokens, problem.top_k, problem.hidden_size, problem.intermediate_size)
    return slices(*sizes, problem.local_num_experts, tile_m, problem.weight_format)[0]["z"]
