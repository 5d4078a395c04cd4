# SPDX-License-Identifier: Apache-2.0
"""Tune the GEMM stages: ``python -m tvmmoe.tune --target native --shape gpt-oss-120b --tokens 1,64,1024``. Needs ``tune``.

Records are appended to schedules/<target>/<stage>/ as they come, so an interrupted run continues where it stopped.
``python -m tvmmoe.build`` then takes its choices from them. ``--report`` prints what the records hold.

On CUDA one compiled candidate serves every task. ``--compile-only --cache DIR`` compiles all of them ahead, without a GPU.
"""

import argparse
import contextlib
import importlib
import logging
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tvmmoe.config import WeightFormat
from tvmmoe.errors import TvmMoeError, UnsupportedError
from tvmmoe.select import targets_of
from tvmmoe.shapes import shape_case, shapes
from tvmmoe.tuning import records, report
from tvmmoe.tuning.rpc import RemoteWorker
from tvmmoe.tuning.search import Run
from tvmmoe.tuning.tasks import STAGES, Task, key_of
from tvmmoe.tuning.worker import Worker

COLUMNS = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
MODULES = {name: f"tvmmoe.tuning.{name}" for name in ("cpu", "sm90a", "sm100a", "sm120a", "sm80")}


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
    parser.add_argument("--shape", default="Qwen3-30B-A3B", help="of schedules/shapes.json, several with commas, or all")
    parser.add_argument("--tokens", default="1,16,64", help="numbers of tokens, several with commas")
    parser.add_argument("--stage", default=",".join(STAGES), help="several with commas")
    parser.add_argument("--weights", default="mxfp4", help="weight formats, several with commas")
    parser.add_argument("--trials", type=int, default=32, help="records a task shall have")
    parser.add_argument("--exhaustive", action="store_true", help="measure every legal candidate")
    parser.add_argument("--time-limit", type=float, metavar="S", help="seconds for the whole run")
    parser.add_argument("--timeout", type=float, default=60.0, metavar="S", help="seconds for one candidate")
    parser.add_argument("--out", type=Path, help="instead of schedules/")
    parser.add_argument("--cache", type=Path, help="folder of compiled candidates; default: a temporary one")
    parser.add_argument("--rpc", metavar="HOST:PORT:KEY", help="measure there, see tvmmoe.tuning.rpc")
    parser.add_argument("--compile-only", action="store_true", help="fill --cache and stop (CUDA)")
    parser.add_argument("--jobs", type=int, help="compiling processes; default: one a core")
    parser.add_argument("--report", action="store_true", help="print what the records hold and stop")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="best over trials, with --report")
    options = parser.parse_args(argv)
    if options.plot and not options.report:
        parser.error("--plot: got it alone, expected --report beside it, whose search it draws")
    try:
        options.tokens = [int(n) for n in options.tokens.split(",")]
    except ValueError:
        parser.error(f"--tokens: got {options.tokens!r}, expected integers separated by commas")
    for name, known in (("stage", STAGES), ("weights", [f.name for f in WeightFormat])):
        setattr(options, name, getattr(options, name).split(","))
        for value in getattr(options, name):
            if value not in known:
                parser.error(f"--{name}: got {value!r}, expected some of {', '.join(known)}")
    if options.rpc and options.target == "native":
        parser.error("--rpc: got --target native, expected the target's name")
    if options.compile_only and options.cache is None:
        parser.error("--compile-only: got no --cache, expected the folder to fill")
    if options.trials < 1:
        parser.error(f"--trials: got {options.trials}, expected at least 1")
    options.shape = list(shapes()) if options.shape == "all" else options.shape.split(",")
    return options


def tasks_of(target: ModuleType, options: argparse.Namespace) -> list[Task]:
    """Everything that the options ask for; weights are made once a shape and format, routings once a number of tokens."""
    for shape in options.shape:
        shape_case(shape, 1)
    return [
        task
        for shape in options.shape
        for weight_format in options.weights
        for num_tokens in options.tokens
        for stage in options.stage
        for task in target.tasks(stage, weight_format, shape, num_tokens)
    ]


def compile_ahead(target: ModuleType, tasks: list[Task], options: argparse.Namespace, console: Console) -> None:
    """Fill the cache with every candidate of the tasks."""
    if not hasattr(target, "precompile"):
        raise UnsupportedError(f"--compile-only: got {target.TARGET}, expected a CUDA target")
    begin = time.monotonic()
    with Progress(*COLUMNS, console=console) as progress:
        bar = progress.add_task("compiling", total=None)
        failed = target.precompile(
            tasks, options.cache, options.jobs, lambda done, of: progress.update(bar, completed=done, total=of)
        )
    for line in failed:
        console.print(line, highlight=False, soft_wrap=True)
    files = list(options.cache.glob("*.so"))
    size = sum(path.stat().st_size for path in files) / 2**20
    seconds = time.monotonic() - begin
    console.print(f"{options.cache}: {len(files)} libraries, {size:.1f} MiB, {seconds:.0f} s, {len(failed)} failed")


def tune(
    target: ModuleType, tasks: list[Task], worker: Worker | RemoteWorker, options: argparse.Namespace, console: Console
) -> None:
    """Search every task, with a progress bar over all trials."""
    deadline = None if options.time_limit is None else time.monotonic() + options.time_limit
    trials = [len(target.configs(task)) if options.exhaustive else options.trials for task in tasks]
    folders = {stage: records.folder_of(target.TARGET, stage, options.out) for stage in options.stage}
    with contextlib.ExitStack() as stack:
        for place in folders.values():
            stack.enter_context(records.plain(place))
        databases = {stage: records.Database(place) for stage, place in folders.items()}
        temporary = stack.enter_context(tempfile.TemporaryDirectory())
        progress = stack.enter_context(Progress(*COLUMNS, console=console))
        folder = options.cache or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        bar = progress.add_task("", total=sum(trials))
        try:
            for index, (task, count) in enumerate(zip(tasks, trials, strict=True)):
                if deadline is not None and time.monotonic() > deadline:
                    console.print(f"time limit: {len(tasks) - index} of {len(tasks)} tasks are left")
                    break

                def show(run: Run, first: int = sum(trials[:index]), count: int = count) -> None:
                    best = f"best {run.best[1]:.1f} us" if run.best else "nothing correct yet"
                    done = min(len(run.us) + len(run.errors), count)
                    progress.update(
                        bar, completed=first + done, description=f"{run.task.stage} {run.task.label} {best}"
                    )

                begin = time.monotonic()
                run = Run(task, target, databases[task.stage], folder, worker, deadline, show)
                run.search(count)
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
        return f"{head}{seconds:.1f} s; {run.errors[0][1] if run.errors else 'nothing to measure'}"
    config, us = run.best
    by_hand = [run.us[key] for key in map(key_of, target.seeds(run.task)) if key in run.us]
    against = f", hand-chosen {min(by_hand):.1f} us" if by_hand else ""
    return f"{head}{seconds:.1f} s; best {us:.1f} us ({report.text_of(config)}){against}"


@contextlib.contextmanager
def interruptible(stopped: list[int]) -> Iterator[None]:
    """Note Ctrl-C in ``stopped``: passing through TVM's C++ it arrives as another exception."""

    def note(number: int, _frame: object) -> None:
        stopped.append(number)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def main(argv: list[str] | None = None) -> int:
    """Command line; exit status 1 if nothing could be tuned, 130 after Ctrl-C (records are kept)."""
    options = parse(argv)
    console = Console(width=None if sys.stdout.isatty() else 200)
    for name in ("tvm", "tvm.s_tir.meta_schedule"):
        logging.getLogger(name).setLevel(logging.ERROR)
    stopped: list[int] = []
    try:
        target = importlib.import_module(MODULES[native_target() if options.target == "native" else options.target])
        if options.report:
            for line in report.lines(target, options.out, options.shape, options.plot):
                console.print(line, highlight=False, soft_wrap=True)
            return 0
        tasks = tasks_of(target, options)
        if options.compile_only:
            compile_ahead(target, tasks, options, console)
            return 0
        if options.rpc:
            worker = RemoteWorker(target.__name__, options.rpc, options.timeout)
            name = worker.device_name()
        elif target.TARGET.startswith("sm") and not torch.cuda.is_available():
            raise UnsupportedError(f"--target: got {options.target}, expected cpu: torch sees no CUDA device")
        else:
            worker, name = Worker(target.__name__, options.timeout), target.device_name()
        records.claim_device(target.TARGET, name, options.out)
        with interruptible(stopped):
            tune(target, tasks, worker, options, console)
    except TvmMoeError as error:
        print(error, file=sys.stderr)
        return 1
    except BaseException:
        if not stopped:
            raise
        print("stopped; what was measured is recorded", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
