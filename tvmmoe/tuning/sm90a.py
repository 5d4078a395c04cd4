# SPDX-License-Identifier: Apache-2.0
"""Hopper: the choices of kernels.sm90a.gemm_config.GemmConfig as decisions; tvmmoe.tuning.cuda compiles and times them."""

import functools
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import tvm
from tvm.script import tirx as T

from tvmmoe.config import Problem, WeightFormat
from tvmmoe.kernels.sm90a import build as sm90a_build
from tvmmoe.kernels.sm90a import gemm_config as kernel
from tvmmoe.kernels.sm90a.by_scale_block import constant_bytes
from tvmmoe.kernels.sm90a.call import Arguments, host_function
from tvmmoe.kernels.sm90a.gemm1 import Gemm1, gemm1
from tvmmoe.kernels.sm90a.gemm2 import Gemm2, gemm2
from tvmmoe.kernels.sm90a.layout import FEW_TOKENS, THIN_TILE_M, slices
from tvmmoe.kernels.sm90a.operator import LAUNCH_PARAMS, SHORT_K, SHORT_TILES, TILES, hand_chosen
from tvmmoe.kernels.sm90a.thin_tiles import has_thin_tiles
from tvmmoe.kernels.sm90a.tile_scheduler import clear_claims
from tvmmoe.kernels.sm90a.trace import if_, ptx
from tvmmoe.kernels.sm90a.trace import kernel as kernel_of
from tvmmoe.tuning import cuda, records
from tvmmoe.tuning.tasks import Task
from tvmmoe.workspace import Slice

TARGET = "sm90a"
SOURCES = ("abi.py", "config.py", "workspace.py", "kernels/host.py", "kernels/nvcc.py")
SOURCES += ("kernels/sm80/*.py", "kernels/sm90a/*.py")
KNOBS = {
    "tile_m": tuple(TILES),
    "mi": (1, 2),
    "ks": (1, 2, 4),
    "warpgroups": (2, 4),
    "k_blocks": (1, 2, 4),
    "cluster": (1, 2),
    "max_stages": (kernel.MAX_STAGES,),
}
MIN_SHARED_TILE = 64  # columns from which a cluster is tried: below, tokens are few beside the weights

device_name = cuda.device_name
tvm_target = functools.partial(cuda.tvm_target, "sm_90a", kernel.SMEM_BYTES)
(tasks, knobs, space, _, _, _, chosen, configs, precompile, build, Bench) = cuda.of(sys.modules[__name__])


def mode(weight_format: str) -> tuple[str, str]:
    """Activations and weights of the calls that are timed."""
    return "bf16", weight_format


def gemm_config(task: Task, config: dict[str, int]) -> kernel.GemmConfig:
    """The kernel's configuration of decisions."""
    return kernel.GemmConfig(WeightFormat[task.weight_format], **config)


def default_of_tile(tile_m: int, is_short: bool = False) -> dict[str, int]:
    """Hand-chosen decisions for a tile height, the same for both weight formats."""
    c = hand_chosen(WeightFormat.mxfp4, tile_m, is_short)
    return {name: getattr(c, name) for name in KNOBS}


def _is_short(task: Task) -> bool:
    return task.stage == "gemm2" and task.k <= SHORT_K


def default(task: Task) -> dict[str, int]:
    """Hand-chosen decisions for the task's rows an expert."""
    return default_of_tile(cuda.default_tile(TILES, task), _is_short(task))


def seeds(task: Task) -> list[dict[str, int]]:
    """Hand-chosen decisions of every tile height that the task may take, for few columns before those for more."""
    tiles = knobs(task)["tile_m"]
    short = [tile_m for tile_m in tiles if tile_m in SHORT_TILES] if _is_short(task) else []
    by_hand = [*(default_of_tile(tile_m, True) for tile_m in short), *map(default_of_tile, tiles)]
    return [config for config in by_hand if is_legal(task, config)]


def by_tile_height(
    stage: str, weight_format: str, measurements: list[records.Measurement]
) -> list[records.Candidates]:
    """Hand-chosen decisions of every tile height and the measurements that may replace them; short K apart.

    Of up to four tokens gemm_pair computes nearly all calls in the operator, with decisions of its own.
    """
    measurements = [m for m in measurements if m.task.num_tokens > FEW_TOKENS]
    tiles = SHORT_TILES if stage == "gemm2" else {}
    of_short = [m for m in measurements if _is_short(m.task)]
    rest = [m for m in measurements if not _is_short(m.task)]
    return [
        *(records.Candidates(stage, m, default_of_tile(m), rest if m in tiles else measurements) for m in TILES),
        *(records.Candidates("gemm2_short", m, default_of_tile(m, True), of_short) for m in tiles),
    ]


def is_legal(task: Task, config: dict[str, int]) -> bool:
    """What the kernel can be built for, and tiles that fit the task's rows at all."""
    c = gemm_config(task, config)
    registers = c.mi * c.tile_m <= (256 if c.warpgroups == 2 else 96)
    if c.is_overlapped and not c.has_one_width and c.width_step == 8:  # a second set of fragments: ptxas gives up (C7512)
        registers = c.mi * c.tile_m < (128 if c.warpgroups == 2 else 32)
    fits = c.tile_m in knobs(task)["tile_m"] and c.ks <= c.warpgroups and c.k_blocks % c.ks == 0
    shares = c.cluster == 1 or c.tile_m >= MIN_SHARED_TILE
    # What one GEMM of a variant multiplies so, the other stores.
    is_thin = (c.weight_format, c.tile_m) != (WeightFormat.mxfp4, THIN_TILE_M) or has_thin_tiles(c)
    return fits and registers and shares and is_thin and _num_stages(task, c) >= 2


def _num_stages(task: Task, c: kernel.GemmConfig) -> int:
    """Pipeline stages, or 0 where the kernel has no such tile."""
    problem = Gemm1 if task.stage == "gemm1" else Gemm2
    matrices = 1 if problem is Gemm1 else 2
    if c.rows > 256 or (problem is Gemm1 and 128 % (c.rows // 2)):
        return 0
    return kernel.shared_memory(c, matrices, reserved=constant_bytes(c.weight_format) if has_thin_tiles(c) else 0).stages


def features(task: Task, config: dict[str, int]) -> list[float]:
    """Decisions, then tiles, waves, padding, stages and bytes a stage."""
    c = gemm_config(task, config)
    row_blocks = math.ceil(task.weight_rows / c.rows / c.cluster) * c.cluster
    tiles = task.num_active_experts * math.ceil(task.rows_per_expert / c.tile_m) * row_blocks
    waves = math.ceil(tiles / kernel.NUM_CTAS)
    padding = math.ceil(task.rows_per_expert / c.tile_m) * c.tile_m / task.rows_per_expert
    stage_bytes = c.k_blocks * (c.tile_m * 256 + c.rows * 64)
    return [
        *(math.log2(value) for value in config.values()),
        math.log2(c.rows), tiles / kernel.NUM_CTAS, float(waves), waves * kernel.NUM_CTAS / tiles, padding,
        float(_num_stages(task, c)), stage_bytes / 1024, task.k / (128 * c.k_blocks),
    ]  # fmt: skip


def symbol(stage: str, c: kernel.GemmConfig) -> str:
    """Name of a candidate's packed function."""
    choices = f"m{c.tile_m}_mi{c.mi}_ks{c.ks}_wg{c.warpgroups}_kb{c.k_blocks}_cl{c.cluster}_st{c.max_stages}"
    return f"{stage}_{c.weight_format.name}_moe_{choices}"


def stage_function(stage: str, c: kernel.GemmConfig) -> tvm.tirx.PrimFunc:
    """Host function of one stage alone, by the operator's calling convention."""

    def launch(a: Arguments) -> None:
        _clear_claims(a)
        if stage == "gemm1":
            gemm1(a, c, True)
        else:
            gemm2(a, c)

    arguments = functools.partial(Arguments, c.tile_m, slices, has_thin_tiles(c))
    return host_function(symbol(stage, c), LAUNCH_PARAMS, arguments, launch)


def _clear_claims(a: Arguments) -> None:
    """Before each run of a stage alone; in the operator the kernel that writes the tile list does it."""
    with kernel_of("clear_claims", T.int32(1), 32) as thread:
        ptx.griddepcontrol.wait()
        with if_(thread.tid == 0):
            clear_claims(a)


def compile_stage(makers: Mapping[str, Callable[[], tvm.tirx.PrimFunc]], path: Path) -> None:
    """A library of packed functions."""
    sm90a_build.compile_so(sm90a_build.packed_source(makers), path, sm90a_build.NATIVE)


def z_slice(problem: Problem, tile_m: int) -> Slice:
    """gemm1's result in the workspace."""
    sizes = (problem.num_tokens, problem.top_k, problem.hidden_size, problem.intermediate_size)
    return slices(*sizes, problem.local_num_experts, tile_m)[0]["z"]
