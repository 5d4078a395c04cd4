# SPDX-License-Identifier: Apache-2.0
"""What records hold: best and hand-chosen times, what choices cost, how fast the search found its best, stale records."""

import base64
import itertools
import json
import re
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from tvmmoe.config import WeightFormat
from tvmmoe.tuning import records
from tvmmoe.tuning.search import Run
from tvmmoe.tuning.tasks import Task, key_of

REPLAYED_TRIALS = (16, 32, 64)


def table(target: ModuleType, stage: str, root: Path | None) -> Iterator[str]:
    """One line a task; then stale records by name."""
    measurements, stale = records.load(target.TARGET, stage, root)
    hand = records.defaults_of(target, measurements)
    counts = records.by_task(measurements)
    for task, best in sorted(records.best_of(measurements).items(), key=lambda item: _order(item[0])):
        against = f"{hand[task]:9.1f} us by hand ({hand[task] / best.us:.2f}x)" if task in hand else ""
        line = f"{stage} {task.label:36s} {len(counts[task]):4d} records {best.us:9.1f} us {against}"
        yield f"{line}  {text_of(best.config)}"
    for label in stale:
        yield f"stale, the definition has changed: {label}"


def _order(task: Task) -> tuple[Any, ...]:
    return task.shape, task.weight_format, task.num_tokens, task.tile_m


def text_of(config: dict[str, int]) -> str:
    """Decisions on one line."""
    return " ".join(f"{name}={value}" for name, value in config.items())


def choices(target: ModuleType, stage: str, root: Path | None) -> Iterator[str]:
    """For each weight format and tile height: the choice, its times over the hand-chosen one's, and what a configuration of
    its own would bring every task on top: whether more variants would pay."""
    measurements = records.load(target.TARGET, stage, root)[0]
    for weight_format in (f.name for f in WeightFormat):
        mine = [m for m in measurements if m.task.weight_format == weight_format]
        for field, tile_m, default, part in target.by_tile_height(stage, weight_format, mine):
            times = records.relevant(part, default)
            if not times:
                continue
            chosen = records.choose(part, default)
            ratios = [t[key_of(chosen)] / t[key_of(default)] for t in times.values() if key_of(chosen) in t]
            own = [min(t.values()) / t[key_of(default)] for t in times.values()]
            yield (
                f"{field} {weight_format} m{tile_m}: {text_of(chosen)}; {len(times)} tasks, times over the hand-chosen: "
                f"mean {statistics.geometric_mean(ratios):.3f}, worst {max(ratios):.3f}; "
                f"a choice of its own for every task {statistics.geometric_mean(own):.3f}"
            )


# ----------------------------------------------------------------------------------------------------------- progress


def in_order(folder: Path) -> dict[str, list[float]]:
    """Times in us by task label in order of measurement, which the loaded database forgets."""
    workloads, lines = records.contents_of(folder)
    labels = []
    for line in workloads.splitlines():
        workload = base64.b64decode(json.loads(line)[1]).decode(errors="replace")
        labels.append(re.search(r'"([^"]+_(?:mxfp4|nvfp4)_t\d+_m\d+)"', workload)[1])
    times: dict[str, list[float]] = {}
    for line in lines.splitlines():
        workload, (_, run_secs, *_) = json.loads(line)
        times.setdefault(labels[workload], []).append(1e6 * statistics.mean(run_secs))
    return times


class Recorded:
    """Stands in for a target and its worker: candidates are not built, their times are looked up."""

    def __init__(self, target: ModuleType, times: dict[tuple, float]) -> None:
        self.target, self.times = target, times

    def __getattr__(self, name: str) -> Any:
        return getattr(self.target, name)

    def build(self, task: Task, candidates: Sequence[Any], folder: Path) -> list[tuple[str, str]]:
        return [("recorded", "")] * len(candidates)

    def measure(self, task: Task, artifact: str, config: dict[str, int]) -> dict[str, float]:
        return {"us": self.times[key_of(config)]}


def replay(target: ModuleType, task: Task, times: dict[tuple, float]) -> list[float]:
    """Times in us in the order in which the search meets them, where ``times`` has every candidate of a task."""
    stand_in = Recorded(target, times)
    with tempfile.TemporaryDirectory() as temporary:
        run = Run(task, stand_in, records.Database(Path(temporary)), Path(temporary), stand_in)
        run.search(min(REPLAYED_TRIALS[-1], len(target.configs(task)) - 1))
    return list(run.us.values())


def curves(target: ModuleType, stage: str, root: Path | None, shapes: Sequence[str]) -> dict[Task, tuple[list[float], float]]:
    """Best time so far by trials, and the best of all: of the recorded search, or, where every candidate is recorded and the
    task's shape is one of ``shapes``, of a search that is made up for."""
    recorded, result = in_order(records.folder_of(target.TARGET, stage, root)), {}
    for task, part in records.by_task(records.load(target.TARGET, stage, root)[0]).items():
        times = {key_of(m.config): m.us for m in part}
        is_complete = all(key_of(config) in times for config in target.configs(task))
        if is_complete and task.shape in shapes:
            trials = replay(target, task, times)
        elif is_complete:
            continue  # a sweep in the order of the space says nothing about the search
        else:
            trials = recorded[task.label]
        result[task] = list(itertools.accumulate(trials, min)), min(times.values())
    return result


def distances(found: dict[Task, tuple[list[float], float]]) -> Iterator[str]:
    """How far from the best of all the search was after some trials."""
    for task, (best, optimum) in found.items():
        counts = [n for n in REPLAYED_TRIALS if n < len(best)] + [len(best)]
        after = ", ".join(f"{100 * (best[n - 1] / optimum - 1):.1f} % after {n}" for n in counts)
        yield f"{task.stage} {task.label}: search over the best known, {optimum:.1f} us: {after}"


def plot(target: ModuleType, found: dict[str, dict[Task, tuple[list[float], float]]], path: Path) -> None:
    """Curves of every stage, a panel each."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(found), figsize=(6 * len(found), 4), squeeze=False)
    for (stage, tasks), axes in zip(found.items(), panels[0], strict=True):
        for task, (best, optimum) in tasks.items():
            axes.plot(range(1, len(best) + 1), [us / optimum for us in best], label=task.label, linewidth=1)
        axes.set(xlabel="trials", ylabel="best so far / best known", title=f"{target.TARGET} {stage}", ylim=(0.98, None))
        axes.grid(True, alpha=0.3)
        if 0 < len(axes.lines) <= 12:
            axes.legend(fontsize=6)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def lines(target: ModuleType, root: Path | None, shapes: Sequence[str], png: Path | None = None) -> Iterator[str]:
    """The whole report; curves go to ``png``."""
    found = {}
    for stage in records.stages_of(target.TARGET, root):
        yield from table(target, stage, root)
        yield from choices(target, stage, root)
        found[stage] = curves(target, stage, root, shapes)
        yield from distances(found[stage])
    if not found:
        yield f"no records of {target.TARGET}"
    elif png:
        plot(target, found, png)
