# SPDX-License-Identifier: Apache-2.0
"""Tuning records: schedules/<target>/<stage>/database_*.json.gz, as MetaSchedule writes them, and what follows from them.

A workload is 150 KB of JSON that repeats the one before it, so the files are packed where nothing is being tuned.
"""

import contextlib
import functools
import gzip
import json
import math
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import tvm
import tvm_ffi
from tvm.s_tir import meta_schedule as ms

from tvmmoe.errors import ArgumentError
from tvmmoe.loader import data_dir
from tvmmoe.tuning.tasks import LABEL, STAGES, Task, key_of, traced_decisions

FILES = ("workload", "tuning_record")
MIN_GAIN = 0.01  # a choice replaces the hand-chosen one if it is this much faster on average
MIN_SHARE = 0.75
MAX_LOSS = 0.01  # and nowhere slower by more than noise
MAX_GAP = 0.1  # a tile height further behind the best one is not selected


def folder_of(target: str, stage: str, root: Path | None = None) -> Path:
    """Where the records of a stage are kept."""
    return (root or data_dir("schedules")) / target / stage


def files_of(folder: Path) -> list[Path]:
    """The plain files of a folder, whether they exist or are packed."""
    return [folder / f"database_{name}.json" for name in FILES]


def packed(path: Path) -> Path:
    """Where a plain file goes when it is packed."""
    return path.with_name(path.name + ".gz")


def has_records(folder: Path) -> bool:
    """Whether a folder holds records, plain or packed."""
    return any(path.is_file() or packed(path).is_file() for path in files_of(folder)[-1:])


@contextlib.contextmanager
def plain(folder: Path) -> Iterator[None]:
    """Unpack a folder's records while something appends to them. After a crash plain files are left, which then count."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in files_of(folder):
        if packed(path).is_file():
            if not path.is_file():
                path.write_bytes(gzip.decompress(packed(path).read_bytes()))
            packed(path).unlink()
    try:
        yield
    finally:
        for path in files_of(folder):
            if path.is_file():
                packed(path).write_bytes(gzip.compress(path.read_bytes(), mtime=0))
                path.unlink()


def contents_of(folder: Path) -> list[bytes]:
    """What the plain files of a folder hold, packed or not: workloads and records, a line each."""
    return [path.read_bytes() if path.is_file() else gzip.decompress(packed(path).read_bytes()) for path in files_of(folder)]


def read(folder: Path) -> "Database":
    """The database of a folder as it is now, packed or not."""
    with tempfile.TemporaryDirectory() as copy:
        for path, content in zip(files_of(Path(copy)), contents_of(folder), strict=True):
            path.write_bytes(content)
        return Database(Path(copy))


def claim_device(target: str, name: str, root: Path | None = None) -> None:
    """Note whose records these are.

    Raises
    ------
    ArgumentError
        There are records of another device: times of two devices cannot be compared.
    """
    path = (root or data_dir("schedules")) / target / "device.json"
    known = json.loads(path.read_text())["name"] if path.is_file() else name
    if known != name:
        others = f"{path.parent}: records of {known}, this is {name}"
        raise ArgumentError(f"{others}; name another folder with --out, and tvmmoe.build takes it by --records")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"name": name}) + "\n")


class Database:
    """MetaSchedule's database of a folder with plain files, opened once, with its records by the label of their task."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.database = ms.database.JSONDatabase(*map(str, files_of(folder)), allow_missing=True)
        self.by_label: dict[str, list[ms.database.TuningRecord]] = {}
        for record in self.database.get_all_tuning_records():
            self.by_label.setdefault(str(record.workload.mod["main"].attrs[LABEL]), []).append(record)

    def of(self, task: Task, mod: tvm.IRModule) -> list[ms.database.TuningRecord]:
        """Records of a task whose definition is still ``mod``."""
        same: dict[ms.database.Workload, bool] = {}
        for record in self.by_label.get(task.label, ()):
            if record.workload not in same:
                same[record.workload] = tvm_ffi.structural_equal(record.workload.mod, mod)
        return [record for record in self.by_label.get(task.label, ()) if same[record.workload]]


@dataclass(frozen=True)
class Measurement:
    """A record that holds for today's definition."""

    task: Task
    config: dict[str, int]
    us: float


def load(target: str, stage: str, root: Path | None = None) -> tuple[list[Measurement], list[str]]:
    """Measurements of a stage, and the labels of stale workloads, whose definition has changed since."""
    folder = folder_of(target, stage, root)
    if not has_records(folder):
        return [], []
    path = files_of(folder)[-1]
    return _load(target, stage, folder, (path if path.is_file() else packed(path)).stat().st_mtime_ns)


@functools.lru_cache(maxsize=8)
def _load(target: str, stage: str, folder: Path, _mtime_ns: int) -> tuple[list[Measurement], list[str]]:
    """Reading thousands of records takes seconds."""
    database, measurements, stale = read(folder), [], []
    for label, records in database.by_label.items():
        task = Task.of_label(target, stage, label)
        current = database.of(task, task.workload())
        if len(current) < len(records):
            stale.append(f"{target}/{stage}/{label}")
        for record in current:
            us = 1e6 * statistics.mean(float(s) for s in record.run_secs)
            measurements.append(Measurement(task, traced_decisions(record.trace), us))
    return measurements, sorted(stale)


def stages_of(target: str, root: Path | None = None) -> Iterator[str]:
    """Stages that have records."""
    return (s for s in STAGES if has_records(folder_of(target, s, root)))


Times = dict[tuple, float]  # us by decisions (tasks.key_of)


class Candidates(NamedTuple):
    """What a configuration of an artifact is chosen from."""

    field: str  # of the operator's variant that it fills: the stage, or a part of its tasks
    tile_m: int
    by_hand: dict[str, int]
    measurements: list[Measurement]


def by_task(measurements: list[Measurement]) -> dict[Task, list[Measurement]]:
    """Measurements of every task."""
    result: dict[Task, list[Measurement]] = {}
    for m in measurements:
        result.setdefault(m.task, []).append(m)
    return result


def relevant(measurements: list[Measurement], default: dict[str, int], fixed: str = "tile_m") -> dict[Task, Times]:
    """Times with the tile height of ``default`` in the tasks where that height may be selected and ``default`` is measured.

    Where another height is faster by more than MAX_GAP, it serves.
    """
    result = {}
    for task, part in by_task(measurements).items():
        times: Times = {}
        for m in part:
            if m.config.get(fixed) == default.get(fixed):
                times[key_of(m.config)] = min(m.us, times.get(key_of(m.config), math.inf))
        if key_of(default) in times and min(times.values()) <= (1 + MAX_GAP) * min(m.us for m in part):
            result[task] = times
    return result


def choose(measurements: list[Measurement], default: dict[str, int], fixed: str = "tile_m") -> dict[str, int]:
    """The configuration for the tile height of ``default``: the least mean time relative to it over the relevant tasks.

    ``default`` stays unless another, measured in at least MIN_SHARE of these tasks, is at least MIN_GAIN faster on average
    and nowhere slower by more than MAX_LOSS.
    """
    ratios: dict[tuple, list[float]] = {}
    tasks = relevant(measurements, default, fixed)
    for times in tasks.values():
        for config, us in times.items():
            ratios.setdefault(config, []).append(us / times[key_of(default)])
    means = {
        config: statistics.geometric_mean(r)
        for config, r in ratios.items()
        if len(r) >= MIN_SHARE * len(tasks) and max(r) <= 1 + MAX_LOSS
    }
    if not means:
        return default
    best = min(means, key=means.__getitem__)
    return dict(best) if means[best] < 1 - MIN_GAIN else default


def best_of(measurements: list[Measurement]) -> dict[Task, Measurement]:
    """The fastest measurement of every task."""
    best: dict[Task, Measurement] = {}
    for m in measurements:
        if m.task not in best or m.us < best[m.task].us:
            best[m.task] = m
    return best


def defaults_of(target: ModuleType, measurements: list[Measurement]) -> dict[Task, float]:
    """Time of the fastest hand-chosen decisions, of whatever tile height, in every task that measured some."""
    best = best_of([m for m in measurements if m.config in target.seeds(m.task)])
    return {task: m.us for task, m in best.items()}
