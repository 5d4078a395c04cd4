# SPDX-License-Identifier: Apache-2.0
"""Which artifact entry serves a call: a look-up in the manifest's table, never a timing at run time.

The first target of the device that has an entry for the call serves it, unless its file is not verified well enough:

    measured    the gpu suite has passed on a chip of the target
    emulated    it has passed on another chip, in a build where a function of the same registers stands for the tensor
                core's instruction; serves with a warning (torch_op)
    compiled    nothing of it has run; serves only where TVMMOE_ALLOW_UNVERIFIED=1 is set

A GPU whose tiles were measured apart from the target's first one has ranges of its own, by its name.
Entries of fp8 accumulation come before those whose calls they take, and serve only where TVMMOE_FP8=1 is set. Both
variables are read when a problem is first selected for: its plan is remembered (torch_op.selected_plan, relaunch).
"""

import functools
import os
import platform
from pathlib import Path

import torch

from tvmmoe.config import Problem
from tvmmoe.errors import UnsupportedError
from tvmmoe.loader import Entry, Manifest

CPU_TARGETS = ("x86-64-v3", "x86-64")  # best first
# Compute capability -> the target with machine code for it. sm80 carries PTX, which drivers compile for any later GPU.
CUDA_TARGETS = {
    (9, 0): "sm90a",
    (10, 0): "sm100a",
    (10, 3): "sm100a",
    (12, 0): "sm120a",
    (12, 1): "sm120a",
}
PORTABLE = "sm80"
VERIFIED = ("measured", "emulated", "compiled")
ALLOW_UNVERIFIED = "TVMMOE_ALLOW_UNVERIFIED"
FP8 = "TVMMOE_FP8"


def cpu_name() -> str:
    """This machine's processor, as Linux calls it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


@functools.cache
def targets_of(device: torch.device) -> tuple[str, ...]:
    """Artifact targets that run on ``device``, best first; empty if none can."""
    if device.type == "cuda":
        return cuda_targets(*torch.cuda.get_device_capability(device))
    if device.type != "cpu" or platform.machine() not in ("x86_64", "AMD64"):
        return ()
    # torch names AVX2 only together with FMA3; every such processor has the rest of x86-64-v3 (BMI, F16C, MOVBE).
    has_v3 = torch.backends.cpu.get_cpu_capability().startswith("AVX")
    return CPU_TARGETS if has_v3 else CPU_TARGETS[1:]


def cuda_targets(major: int, minor: int) -> tuple[str, ...]:
    """Targets of a compute capability, best first."""
    own = CUDA_TARGETS.get((major, minor))
    return (*([own] if own else []), *([PORTABLE] if major >= 8 else []))


def rows_per_expert(problem: Problem) -> float:
    """Mean rows of an expert's GEMM under balanced routing: what the table's ranges are over."""
    return problem.num_tokens * problem.top_k / problem.num_experts


def is_allowed(verified: str) -> bool:
    """Whether a file in this state serves calls."""
    return verified != "compiled" or os.environ.get(ALLOW_UNVERIFIED) == "1"


def is_asked_for(entry: Entry) -> bool:
    """Whether an entry is as exact as promised, or the user has asked for less."""
    return entry.accumulation != "fp8" or os.environ.get(FP8) == "1"


@functools.cache
def gpu_name(device: torch.device) -> str:
    """A GPU's name, which its own ranges are kept by; nothing for another device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else ""


def select(source: Manifest, targets: tuple[str, ...], problem: Problem, gpu: str = "") -> Entry:
    """The entry for this call on the first of ``targets`` that has an allowed one, by the ranges of ``gpu`` (gpu_name).

    Raises
    ------
    UnsupportedError
        Nothing in the manifest runs there; names the device, what is shipped, and the command that builds it. Or what
        runs there has never been run: names the file, and what allows it.
    """
    rows = rows_per_expert(problem)
    mode = f"{problem.activation_format.name} x {problem.weight_format.name}"
    skipped = None
    for target in targets:
        for entry in source.entries:
            if (
                entry.target == target
                and entry.serves(problem.activation_format.name, problem.weight_format.name)
                and entry.covers(rows, gpu)
                and is_asked_for(entry)
            ):
                if is_allowed(source.files[entry.file]["verified"]):
                    return entry
                skipped = skipped or entry
    if skipped is not None:
        raise UnsupportedError(
            f"{mode} on {skipped.target}: {skipped.file} has been compiled but never run; set {ALLOW_UNVERIFIED}=1 to use "
            "it all the same, and verify it with python -m pytest -m gpu"
        )
    shipped = ", ".join(sorted({entry.target for entry in source.entries}))
    wanted = targets[0] if targets else _unsupported_name(problem.device)
    build = f"; build one with python -m tvmmoe.build --target {targets[0]}" if targets else ""
    raise UnsupportedError(f"no {mode} artifact for {wanted}; shipped: {shipped} (python -m tvmmoe.info{build})")


def _unsupported_name(device: torch.device) -> str:
    """A device that no target is for."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return f"sm{major}{minor}, expected {PORTABLE} or newer"
    return f"{device.type} on {platform.machine()}"
