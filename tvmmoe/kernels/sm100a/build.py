# SPDX-License-Identifier: Apache-2.0
"""The datacenter Blackwell artifacts: one file a weight format."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import tvm

from tvmmoe.config import WeightFormat
from tvmmoe.kernels import nvcc
from tvmmoe.kernels.sm90a import build as sm90a
from tvmmoe.kernels.sm100a.operator import TILES, Variant, operator, variant

DATACENTER = "arch=compute_100a,code=sm_100a"  # B200, GB200
ULTRA = "arch=compute_103a,code=sm_103a"  # B300, GB300: the same instructions, another chip


def variants(weight_format: WeightFormat) -> list[Variant]:
    """The hand-chosen variants of one weight format."""
    return [variant(weight_format, tile_m) for tile_m in TILES]


def file_name(weight_format: WeightFormat) -> str:
    """Artifact of one weight format."""
    return f"moe_{weight_format.name}_sm100a.so"


def cuda_source(functions: Sequence[Variant], emit: Callable[[Variant], tvm.tirx.PrimFunc] = operator) -> str:
    """CUDA C++ of the operators, host code included."""
    return sm90a.packed_source({v.symbol: functools.partial(emit, v) for v in functions}, "sm_100a")


def compile_so(source: str, path: Path, *gencodes: str) -> str:
    """Run nvcc; returns its log. Raises RuntimeError with nvcc's message, AssertionError for a kernel that spills."""
    log = nvcc.compile_so(source, path, *gencodes)
    assert not (problems := nvcc.report(log)), problems
    return log
