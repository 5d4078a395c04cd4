# SPDX-License-Identifier: Apache-2.0
"""Manifest and artifact files: the only code that reads the disk at run time."""

import functools
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tvm_ffi

from tvmmoe.abi import ARTIFACT_ABI
from tvmmoe.errors import ArtifactError

PACKAGE = Path(__file__).resolve().parent


def data_dir(name: str) -> Path:
    """Folder ``artifacts`` or ``schedules``: inside an installed package, beside it in a checkout."""
    installed = PACKAGE / name
    return installed if installed.is_dir() else PACKAGE.parent / name


def artifacts_dir() -> Path:
    """``$TVMMOE_ARTIFACTS`` if set, else the folder that ships with the package."""
    override = os.environ.get("TVMMOE_ARTIFACTS")
    return Path(override).resolve() if override else data_dir("artifacts")


@dataclass(frozen=True)
class Entry:
    """One row of the manifest's selection table: which symbol of which file serves which calls."""

    target: str
    weight_format: str
    activation_formats: tuple[str, ...]
    tile_m: int
    min_rows_per_expert: float
    max_rows_per_expert: float | None
    symbol: str
    file: str
    accumulation: str = "float32"  # or fp8: sums of about 13 bits in the tensor core, only where select.FP8 is set
    device_ranges: tuple[tuple[str, float, float | None], ...] = ()  # of GPUs, by name, that were measured apart

    def serves(self, activation_format: str, weight_format: str) -> bool:
        """Whether the entry runs this mode, by the formats' names."""
        return activation_format in self.activation_formats and weight_format == self.weight_format

    def covers(self, rows_per_expert: float, gpu: str = "") -> bool:
        """Whether the entry's range holds this many rows per expert; ranges are half-open and None is no limit."""
        own = {name: limits for name, *limits in self.device_ranges}
        low, high = own.get(gpu, (self.min_rows_per_expert, self.max_rows_per_expert))
        return low <= rows_per_expert and (high is None or rows_per_expert < high)


@dataclass(frozen=True, eq=False)
class Manifest:
    """``artifacts/manifest.json``."""

    folder: Path
    files: dict[str, dict[str, Any]]
    entries: tuple[Entry, ...]


@functools.cache
def manifest(folder: Path | None = None) -> Manifest:
    """Read the manifest of ``folder`` (default: :func:`artifacts_dir`)."""
    folder = artifacts_dir() if folder is None else folder
    path = folder / "manifest.json"
    if not path.is_file():
        raise ArtifactError(f"{path} does not exist; reinstall tvmmoe, or build artifacts with python -m tvmmoe.build")
    content = json.loads(path.read_text())
    if content.get("artifact_abi") != ARTIFACT_ABI:
        raise ArtifactError(
            f"{path}: artifact_abi is {content.get('artifact_abi')}, expected {ARTIFACT_ABI}; "
            "rebuild the artifacts with python -m tvmmoe.build"
        )
    return Manifest(folder, content["files"], tuple(map(entry_of, content["entries"])))


def entry_of(row: dict[str, Any]) -> Entry:
    """A row of the manifest as it is written."""
    formats, ranges = tuple(row["activation_formats"]), tuple(map(tuple, row.get("device_ranges", ())))
    return Entry(**row | dict(activation_formats=formats, device_ranges=ranges))


@functools.cache
def load(source: Manifest, file: str) -> tvm_ffi.Module:
    """Load an artifact after checking that it is the file that the manifest describes."""
    path = source.folder / file
    if not path.is_file():
        raise ArtifactError(f"{path} is missing; reinstall tvmmoe, or rebuild with python -m tvmmoe.build")
    actual = hashlib.sha256(path.read_bytes()).hexdigest()
    if actual != source.files[file]["sha256"]:
        raise ArtifactError(
            f"{file}: sha256 differs from manifest.json (got {actual[:12]}..., expected "
            f"{source.files[file]['sha256'][:12]}...); reinstall, or rebuild with python -m tvmmoe.build"
        )
    return tvm_ffi.load_module(str(path))
