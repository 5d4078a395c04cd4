# SPDX-License-Identifier: Apache-2.0
"""Time builds of the operator in turns: ``python -m tvmmoe.compare artifacts /tmp/new --shape gpt-oss-120b --tokens 64``.

A card's clock drifts by more than most changes of a kernel bring, so one run of the benchmark after the other proves little.
Here each round times every build once, all of them in one process, each after a rest, with the benchmark's calls: routings
that rotate, weights cold, a CUDA graph. Every result is checked against the reference first.

A build is a folder with a manifest, whose limits choose a tile height; FOLDER:16 asks for that of 16 tokens, FOLDER:fp8 for
sums in fp8. Printed are medians over the rounds, each build's share of the first one's, and with --stages kernels apart.
"""

import argparse
import itertools
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tvmmoe import bench, loader, torch_op
from tvmmoe.arguments import validate
from tvmmoe.config import Problem
from tvmmoe.errors import ArgumentError, TvmMoeError, UnsupportedError
from tvmmoe.loader import Entry, Manifest
from tvmmoe.select import gpu_name, select, targets_of
from tvmmoe.shapes import shape_case
from tvmmoe.testing import Case


class Build(NamedTuple):
    """What takes part."""

    label: str  # as on the command line
    source: Manifest
    tile: str  # a number of tokens, fp8, or empty: as the manifest selects

    def entry(self, problem: Problem) -> Entry:
        """The one that runs ``problem``; raises UnsupportedError if the build has none."""
        targets = targets_of(problem.device)
        if not self.tile:
            return select(self.source, targets, problem, gpu_name(problem.device))
        mode = problem.activation_format.name, problem.weight_format.name
        for target, entry in itertools.product(targets, self.source.entries):
            tile = "fp8" if entry.accumulation == "fp8" else str(entry.tile_m)
            if entry.target == target and entry.serves(*mode) and tile == self.tile:
                return entry
        raise UnsupportedError(f"{self.label}: no such tile for {' x '.join(mode)} on {', '.join(targets)}")

    def call(self, **arguments: Any) -> list[torch.Tensor]:
        """The operator by this build."""
        arguments = torch_op.with_defaults(**arguments)
        problem = validate(**arguments)
        return torch_op.launch(problem, arguments, self.entry(problem), self.source)


def build_of(text: str) -> Build:
    """Type of an option."""
    folder, _, tile = text.rpartition(":") if ":" in text else (text, "", "")
    if tile not in ("", "fp8") and not tile.isdigit():
        raise argparse.ArgumentTypeError(f"got {text}, expected FOLDER, FOLDER:fp8 or FOLDER:TILE with a number of tokens")
    try:
        return Build(text, loader.manifest(Path(folder).resolve()), tile)
    except TvmMoeError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def in_turns(calls: list[Callable[[], Any]], device: torch.device, rounds: int) -> list[float]:
    """Median of each call's times, us, over rounds that make all of them."""
    times = [[bench.rested_us(call, device) for call in calls] for _ in range(rounds)]
    return [statistics.median(mine) for mine in zip(*times, strict=True)]


def compare(builds: list[Build], case: Case, kwargs: dict[str, Any], rounds: int, has_stages: bool) -> list[str]:
    """One cell of the table: a line a build."""
    errors = bench.errors_of([build.call for build in builds], case, kwargs)
    logits, _, _ = bench.routings(case, kwargs)
    calls = [bench.rotating(case, kwargs, logits, build.call) for build in builds]
    times = [us / len(logits) for us in in_turns(calls, torch.device(case.device), rounds)]
    lines = []
    for build, us, error in zip(builds, times, errors, strict=True):
        stages = bench.stage_times(kwargs, logits, build.call) if has_stages else {}
        apart = "".join(f"  {stage} {stage_us:.1f}" for stage, stage_us in stages.items())
        lines.append(f"{build.label:30} {us:9.1f} us  {us / times[0]:.3f}  rel L2 {error:.1e}{apart}")
    return lines


def main(argv: list[str] | None = None) -> int:
    """Command line; exit status 1 if a build's result was wrong or it does not serve a mode."""
    parser = bench.parser_of("python -m tvmmoe.compare", __doc__)
    parser.add_argument("builds", nargs="+", type=build_of, metavar="FOLDER[:TILE]")
    options = bench.options_of(parser, argv)
    status = 0
    for name, mode in itertools.product(options.shape, options.mode):
        all_tokens = bench.shape_call(name, max(options.tokens), bench.MODES[mode], options.device)
        for num_tokens in options.tokens:
            print(f"{name} {mode} T={num_tokens}", flush=True)
            case = shape_case(name, num_tokens, *bench.MODES[mode], device=options.device)
            kwargs = bench.of_tokens(all_tokens, slice(num_tokens))
            try:
                print(*compare(options.builds, case, kwargs, options.rounds, options.stages), sep="\n", flush=True)
            except (AssertionError, ArgumentError, UnsupportedError) as error:
                print(error, file=sys.stderr)
                status = 1
        all_tokens = kwargs = None  # before the next shape's weights
    return status


if __name__ == "__main__":
    sys.exit(main())
