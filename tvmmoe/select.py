# SPDX-License-Identifier: Apache-2.0
"""Which artifact entry serves a call: a look-up in the manifest's table, never a timing at run time."""

import functools
import platform

import torch

from tvmmoe.config import Problem
from tvmmoe.errors import UnsupportedError
from tvmmoe.loader import Entry, Manifest

CPU_TARGETS = ("x86-64-v3", "x86-64")  # best first


@functools.cache
def targets_of(device: torch.device) -> tuple[str, ...]:
    """Artifact targets that run on ``device``, best first; empty if none can."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return (f"sm{major}{minor}a",)
    if device.type != "cpu" or platform.machine() not in ("x86_64", "AMD64"):
        return ()
    # torch names AVX2 only together with FMA3; every such processor has the rest of x86-64-v3 (BMI, F16C, MOVBE).
    has_v3 = torch.backends.cpu.get_cpu_capability().startswith("AVX")
    return CPU_TARGETS if has_v3 else CPU_TARGETS[1:]


def rows_per_expert(problem: Problem) -> float:
    """Mean rows of an expert's GEMM under balanced routing: what the table's ranges are over."""
    return problem.num_tokens * problem.top_k / problem.num_experts


def select(source: Manifest, targets: tuple[str, ...], problem: Problem) -> Entry:
    """The entry for this call on the first of ``targets`` that has one.

    Raises
    ------
    UnsupportedError
        Nothing in the manifest runs there; names the device, what is shipped, and the command that builds it.
    """
    rows = rows_per_expert(problem)
    for target in targets:
        for entry in source.entries:
            if (
                entry.target == target
                and entry.weight_format == problem.weight_format.name
                and problem.activation_format.name in entry.activation_formats
                and entry.covers(rows)
            ):
                return entry
    shipped = ", ".join(sorted({entry.target for entry in source.entries}))
    wanted = targets[0] if targets else f"{problem.device.type} on {platform.machine()}"
    mode = f"{problem.activation_format.name} x {problem.weight_format.name}"
    raise UnsupportedError(
        f"no {mode} artifact for {wanted}; shipped: {shipped} "
        f"(python -m tvmmoe.info; build one with python -m tvmmoe.build --target {targets[0] if targets else 'cpu'})"
    )
