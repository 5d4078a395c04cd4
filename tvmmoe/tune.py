# SPDX-License-Identifier: Apache-2.0
"""Tune the GEMM stages: ``python -m tvmmoe.tune --target native --shape gpt-oss-120b --tokens 1,64,1024``. Needs ``tune``.

Records are appended to schedules/<target>/<stage>/ as they come, so an interrupted run continues where it stopped.
``python -m tvmmoe.build`` then takes its choices from them. ``--report`` prints what the records hold.
"""

import argparse
import importlib
import logging
import sys
import tempfile
import time
from pathlib import Path
from types import ModuleType

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tvmmoe.config import WeightFormat
from tvmmoe.errors import TvmMoeError, UnsupportedError
from tvmmoe.select import targets_of
from tvmmoe.shapes import shape_case
from tvmmoe.tuning import records
from tvmmoe.tuning.search import Run
from tvmmoe.tuning.tasks import STAGES, Task, key_of
from tvmmoe.tuning.worker import Worker

MODULES = {name: f"tvmmoe.tuning.{name}" for name in ("cpu", "sm90a", "sm120a")}


def native_target() -> str:
    """Name in MODULES of what this machine has."""
    if not torch.cuda.is_available():
        return "cpu"
    targets = targets_of(torch.device("cuda", torch.cuda.current_device()))
    if not (known := [name for name in targets if name in MODULES]):
        name = targets[0] if targets else torch.cuda.get_device_name()
        raise UnsupportedError(f"--target native: got {name}, expected one of {', '.join(MODULES)}")
    return known[0]


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m tvmmoe.tune", description=__doc__.splitlines()[0])
    parser.add_argument("--target", default="native", choices=("native", *MODULES))
    parser.add_argument("--shape", default="Qwen3-30B-A3B", help="of schedules/shapes.json, several with commas")
    parser.add_argument("--tokens", default="1,16,64", help="numbers of tokens, several with commas")
    parser.add_argument("--stage", default=",".join(STAGES), help="several with commas")
    parser.add_argument("--weights", default="mxfp4", choices=[f.name for f in WeightFormat], help="weight format")
    parser.add_argument("--trials", type=int, default=32, help="records a task shall have")
    parser.add_argument("--time-limit", type=float, metavar="S", help="seconds for the whole run")
    parser.add_argument("--timeout", type=float, default=60.0, metavar="S", help="seconds for one candidate")
    parser.add_argument("--out", type=Path, help="instead of schedules/")
    parser.add_argument("--cache", type=Path, help="folder of compiled candidates; default: a temporary one")
    parser.add_argument("--report", action="store_true", help="print what the records hold and stop")
    options = parser.parse_args(argv)
    try:
        options.tokens = [int(n) for n in options.tokens.split(",")]
    except ValueError:
        parser.error(f"--tokens: got {options.tokens!r}, expected integers separated by commas")
    options.stage = options.stage.split(",")
    for stage in options.stage:
        if stage not in STAGES:
            parser.error(f"--stage: got {stage!r}, expected some of {', '.join(STAGES)}")
    if options.trials < 1:
        parser.error(f"--trials: got {options.trials}, expected at least 1")
    options.shape = options.shape.split(",")
    return options


def tasks_of(target: ModuleType, options: argparse.Namespace) -> list[Task]:
    """Everything that the options ask for; shapes outermost, so that weights are made once."""
    for shape in options.shape:
        shape_case(shape, 1)
    return [
        task
        for shape in options.shape
        for num_tokens in options.tokens
        for stage in options.stage
        for task in target.tasks(stage, options.weights, shape, num_tokens)
    ]


def tune(target: ModuleType, tasks: list[Task], options: argparse.Namespace, console: Console) -> None:
    """Search every task, with a progress bar over all trials."""
    deadline = None if options.time_limit is None else time.monotonic() + options.time_limit
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    worker = Worker(target.__name__, options.timeout)
    with tempfile.TemporaryDirectory() as temporary, Progress(*columns, console=console) as progress:
        folder = options.cache or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        bar = progress.add_task("", total=len(tasks) * options.trials)
        try:
            for index, task in enumerate(tasks):
                if deadline is not None and time.monotonic() > deadline:
                    console.print(f"time limit: {len(tasks) - index} of {len(tasks)} tasks are left")
                    break

                def show(run: Run, first: int = index * options.trials) -> None:
                    best = f"best {run.best[1]:.1f} us" if run.best else "nothing correct yet"
                    done = min(len(run.us) + len(run.errors), options.trials)
                    progress.update(
                        bar, completed=first + done, description=f"{run.task.stage} {run.task.label} {best}"
                    )

                database_dir = records.folder_of(target.TARGET, task.stage, options.out)
                begin = time.monotonic()
                run = Run(task, target, database_dir, folder, worker, deadline, show)
                run.search(options.trials)
                console.print(summary(run, target, time.monotonic() - begin), highlight=False, soft_wrap=True)
        finally:
            worker.stop()


def summary(run: Run, target: ModuleType, seconds: float) -> str:
    """One line on a finished task."""
    measured = len(run.us) - run.num_resumed
    head = (
        f"{run.task.stage} {run.task.label}: {measured} measured, {run.num_resumed} known, {len(run.errors)} failed in "
    )
    if run.best is None:
        return f"{head}{seconds:.0f} s; {run.errors[0][1] if run.errors else 'nothing to measure'}"
    config, us = run.best
    hand = run.us.get(key_of(target.default(run.task)))
    against = f", hand-chosen {hand:.1f} us" if hand else ""
    choices = " ".join(f"{name}={value}" for name, value in config.items())
    return f"{head}{seconds:.0f} s; best {us:.1f} us ({choices}){against}"


def report(target: ModuleType, root: Path | None, console: Console) -> None:
    """Best and hand-chosen times of every recorded task; stale records by name."""
    for stage in records.stages_of(target.TARGET, root):
        measurements, stale = records.load(target.TARGET, stage, root)
        hand = records.defaults_of(target, measurements)
        for task, best in records.best_of(measurements).items():
            count = sum(m.task == task for m in measurements)
            against = f"{hand[task]:9.1f} us by hand ({hand[task] / best.us:.2f}x)" if task in hand else ""
            choices = " ".join(f"{name}={value}" for name, value in best.config.items())
            line = f"{stage} {task.label:36s} {count:4d} records {best.us:9.1f} us {against}  {choices}"
            console.print(line, highlight=False, soft_wrap=True)
        for label in stale:
            console.print(f"stale, the definition has changed: {label}", highlight=False)


def main(argv: list[str] | None = None) -> int:
    """Command line; exit status 1 if nothing could be tuned, 130 after Ctrl-C (records are kept)."""
    options = parse(argv)
    console = Console(width=None if sys.stdout.isatty() else 200)
    for name in ("tvm", "tvm.s_tir.meta_schedule"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        target = importlib.import_module(MODULES[native_target() if options.target == "native" else options.target])
        if options.report:
            report(target, options.out, console)
            return 0
        if target.TARGET.startswith("sm") and not torch.cuda.is_available():
            raise UnsupportedError(f"--target: got {options.target}, expected cpu: torch sees no CUDA device")
        tasks = tasks_of(target, options)
        records.claim_device(target.TARGET, target.device_name(), options.out)
        tune(target, tasks, options, console)
    except TvmMoeError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; what was measured is recorded", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
