# SPDX-License-Identifier: Apache-2.0
"""From how many rows an expert on each tile height is the fastest: ``python -m tvmmoe.crossovers``.

Times every tile of this machine's artifacts over a range of rows per expert, checked and with cold weights as in the
benchmark, and keeps the table in schedules/<target>/crossovers.json, or that of another GPU of the target in
crossovers_<name>.json beside it. ``python -m tvmmoe.build`` makes the ranges of the manifest from them, and
``python -m tvmmoe.crossovers --apply`` does without compiling anything: for a GPU of a model that has no table yet.
"""

import argparse
import itertools
import json
import math
import re
import statistics
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tvmmoe import loader, torch_op
from tvmmoe.arguments import validate
from tvmmoe.bench import MODES, check, modes_of, of_tokens, rested_us, rotating, routings, shape_call
from tvmmoe.errors import ArgumentError, TvmMoeError, UnsupportedError
from tvmmoe.loader import Entry
from tvmmoe.select import cpu_name, gpu_name, targets_of
from tvmmoe.shapes import shape_case

ROWS = {
    "cuda": (0.25, 0.5, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 40, 48, 64, 80, 96, 128, 192, 256),
    "cpu": (0.0625, 0.25, 0.5, 1, 2, 4, 8, 16),
}
SHAPES = {
    "cuda": ("Qwen3-235B-A22B", "gpt-oss-120b", "DeepSeek-V3-32of256", "Qwen3-30B-A3B", "gpt-oss-20b", "MiniMax-M2"),
    "cpu": ("Qwen3-30B-A3B",),
}
ROUNDS = {"cuda": 5, "cpu": 3}

Record = dict[str, Any]  # shape, mode, rows_per_expert, num_tokens, us by tile height


def path_of(target: str, gpu: str = "") -> Path:
    """Where a target's table is kept: crossovers.json, or crossovers_<gpu>.json if that was measured on another GPU."""
    path = loader.data_dir("schedules") / target / "crossovers.json"
    if not gpu or not path.is_file() or json.loads(path.read_text())["device"] == gpu:
        return path
    return path.with_name(f"crossovers_{re.sub(r'[^a-z0-9]+', '_', gpu.lower())}.json")


def min_rows_per_expert(records: Iterable[Record], tiles: Sequence[int]) -> dict[int, float]:
    """Rows per expert from which each tile serves, ascending; tiles that are best nowhere are left out.

    At every measured number of rows a tile costs the mean over shapes of its time over the best tile's. Tiles are given to
    rows so that heights ascend and the costs sum to the least; a limit lies at the geometric mean of its neighbours. The
    smallest tile also serves below the first measured number of rows.
    """
    costs: dict[float, dict[int, list[float]]] = {}
    for record in records:
        best = min(record["us"].values())
        for tile, us in record["us"].items():
            costs.setdefault(record["rows_per_expert"], {}).setdefault(int(tile), []).append(us / best)
    if not costs:
        raise ArgumentError("records: got none, expected at least one")
    grid = sorted(costs)
    # total[tile]: least cost of the rows so far with ``tile`` at the last of them, and the tiles that were given
    total: dict[int, tuple[float, list[int]]] = {tile: (0.0, []) for tile in tiles}
    for rows in grid:
        step = {}
        for tile in tiles:
            cost, given = min((total[lower] for lower in tiles if lower <= tile), key=lambda item: item[0])
            here = costs[rows].get(tile)
            step[tile] = (cost + (statistics.mean(here) if here else math.inf), [*given, tile])
        total = step
    _, given = min(total.values(), key=lambda item: item[0])
    limits = {tiles[0]: 0.0}
    for (low, before), (high, tile) in itertools.pairwise(zip(grid, given, strict=True)):
        if tile != before:
            limits[tile] = round(math.sqrt(low * high), 3)
    if given[0] != tiles[0]:
        limits[given[0]] = float(grid[0])
    return dict(sorted(limits.items()))


def of_format(records: Sequence[Record], weight_format: str) -> Sequence[Record]:
    """Those of a weight format, or all where they end before the others do: tall tiles would be best nowhere."""
    mine = [r for r in records if r["mode"].endswith(weight_format)]
    most = max((r["rows_per_expert"] for r in records), default=0)
    return mine if any(r["rows_per_expert"] == most for r in mine) else records


def recorded_limits(target: str, tiles: Sequence[int], weight_format: str) -> dict[int, float]:
    """:func:`min_rows_per_expert` of the table that ships for ``target``, over all shapes of a weight format."""
    return min_rows_per_expert(of_format(json.loads(path_of(target).read_text())["rows"], weight_format), tiles)


def limits_of_others(target: str, tiles: Sequence[int], weight_format: str) -> dict[str, dict[int, float]]:
    """The same by name of every GPU that has a table of its own.

    Raises
    ------
    ArgumentError
        A table is empty, or of a GPU that has another one.
    """
    first = path_of(target)
    seen, limits = {json.loads(first.read_text())["device"]} if first.is_file() else set(), {}
    for path in sorted(first.parent.glob("crossovers_*.json")):
        table = json.loads(path.read_text())
        if not table["rows"] or table["device"] in seen:
            got = f"{len(table['rows'])} rows of {table['device']}"
            raise ArgumentError(f"{path}: got {got}, expected at least one, and no second table of a GPU")
        seen.add(table["device"])
        limits[table["device"]] = min_rows_per_expert(of_format(table["rows"], weight_format), tiles)
    return limits


def ranges_of(min_rows_per_expert: Mapping[int, float], tiles: Iterable[int]) -> dict[int, tuple[float, float | None]]:
    """Range of every tile height: they touch and end in a catch-all.

    A tile without a limit serves nothing: its range is [0, 0), so that it can still be found and measured.
    """
    used = sorted(tile_m for tile_m in tiles if tile_m in min_rows_per_expert)
    limits = [*(min_rows_per_expert[tile_m] for tile_m in used), None]
    return dict.fromkeys(tiles, (0, 0)) | dict(zip(used, itertools.pairwise(limits), strict=True))


def manifest_ranges(
    limits: Mapping[int, float], others: Mapping[str, Mapping[int, float]], tiles: Iterable[int]
) -> dict[int, dict[str, Any]]:
    """Fields of a manifest's entry that say which loads each tile height serves; ``others`` are limits by a GPU's name."""
    own = ranges_of(limits, tiles)
    of_others = {name: ranges_of(limits, tiles) for name, limits in others.items()}
    return {
        tile_m: {
            "min_rows_per_expert": own[tile_m][0],
            "max_rows_per_expert": own[tile_m][1],
            "device_ranges": [[name, *ranges[tile_m]] for name, ranges in of_others.items()],
        }
        for tile_m in tiles
    }


def apply(target: str, folder: Path) -> None:
    """Write the limits of ``target``'s tables into the manifest in ``folder``; that of fp8 accumulation is its own.

    Raises
    ------
    ArgumentError
        The target has no table.
    """
    if not path_of(target).is_file():
        raise ArgumentError(f"--apply: got no {path_of(target)}, expected what python -m tvmmoe.crossovers writes")
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    entries = [e for e in content["entries"] if e["target"] == target and e.get("accumulation") != "fp8"]
    for weight_format in {entry["weight_format"] for entry in entries}:
        mine = [entry for entry in entries if entry["weight_format"] == weight_format]
        tiles = sorted(entry["tile_m"] for entry in mine)
        limits = recorded_limits(target, tiles, weight_format)
        ranges = manifest_ranges(limits, limits_of_others(target, tiles, weight_format), tiles)
        for entry in mine:
            entry |= ranges[entry["tile_m"]]
    path.write_text(json.dumps(content, indent=1) + "\n")


def target_of(device: torch.device) -> str:
    """The best target of a device that has artifacts: the one whose tiles are measured."""
    targets = targets_of(device)
    shipped = {entry.target for entry in loader.manifest().entries}
    return next((target for target in targets if target in shipped), targets[0])


def candidates(entries: Iterable[Entry], rows: float) -> list[Entry]:
    """Entries worth timing: neither far too short nor far too tall for the rows."""
    heights = sorted(entry.tile_m for entry in entries)
    return [e for e in entries if e.tile_m >= rows / 6 and (e.tile_m <= 8 * rows or e.tile_m in heights[:2])]


def measure(name: str, mode: tuple[str, str], grid: Sequence[float], device: torch.device) -> Iterable[Record]:
    """One record for each number of rows at which the shape has a whole token."""
    target = target_of(device)
    exact = [e for e in loader.manifest().entries if e.accumulation != "fp8"]  # its limit is its own (operator_fp8.py)
    of_target = [e for e in exact if e.target == target]
    entries = [e for e in of_target if e.serves(*mode)]
    if not entries:
        raise UnsupportedError(f"--mode: got {'-'.join(mode)}, which {target} has no tiles for")
    case = shape_case(name, 1, *mode, device=str(device))
    tokens = {rows: round(rows * case.num_experts / case.top_k) for rows in grid}
    kwargs = shape_call(name, max(tokens.values()), mode, str(device))
    for rows, num_tokens in tokens.items():
        if num_tokens == 0:
            continue
        case = shape_case(name, num_tokens, *mode, device=str(device))
        part = of_tokens(kwargs, slice(num_tokens))
        check(case, part)
        logits, _, _ = routings(case, part)
        us = {}
        for entry in candidates(entries, rows):

            def call(entry: Entry = entry, **arguments: Any) -> None:
                arguments = torch_op.with_defaults(**arguments)
                torch_op.launch(validate(**arguments), arguments, entry)

            round_us = rested_us(rotating(case, part, logits, call), device, ROUNDS[device.type])
            us[str(entry.tile_m)] = round(round_us / len(logits), 1)
        yield dict(shape=name, mode="-".join(mode), rows_per_expert=rows, num_tokens=num_tokens, us=us)


def recorded(path: Path, device_name: str) -> list[Record]:
    """What a table holds so far; raises ArgumentError if it was measured on another device."""
    if not path.is_file():
        return []
    table = json.loads(path.read_text())
    if table["device"] != device_name:
        raise ArgumentError(f"{path} holds records of {table['device']}, this is {device_name}; name another file with --out")
    return table["rows"]


def _cell(record: Record) -> tuple[str, str, float]:
    return record["shape"], record["mode"], record["rows_per_expert"]


def write(target: str, device_name: str, records: list[Record], path: Path) -> None:
    """Replace the records of the measured cells; those of another device are not touched, but refused.

    Raises
    ------
    ArgumentError
        The table was measured on another device.
    """
    old = recorded(path, device_name)
    cells = {_cell(r): r for r in [*old, *records]}
    rows = sorted(cells.values(), key=_cell)
    head = dict(target=target, device=device_name, date=time.strftime("%Y-%m-%d"))
    lines = ",\n ".join(json.dumps(row) for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(head)[:-1] + f', "rows": [\n {lines}\n]}}\n')


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m tvmmoe.crossovers", description=__doc__.splitlines()[0])
    parser.add_argument("--shape", help="of schedules/shapes.json, several with commas")
    parser.add_argument("--mode", type=modes_of, default="bf16-mxfp4", help=f"all, or several of {', '.join(MODES)}")
    parser.add_argument("--rows", help="rows per expert, several with commas")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="default: schedules/<target>/crossovers.json, or with the GPU's name")
    apply_help = "measure nothing: write the limits of the target's tables into the manifest of the artifacts"
    parser.add_argument("--apply", action="store_true", help=apply_help)
    options = parser.parse_args(argv)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device: got {options.device}, expected cpu: torch sees no CUDA device")
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    target = target_of(device)
    gpu = gpu_name(device)
    name = gpu or f"{cpu_name()}, {torch.get_num_threads()} threads, {target}"
    shapes = options.shape.split(",") if options.shape else SHAPES[device.type]
    try:
        grid = [float(rows) for rows in options.rows.split(",")] if options.rows else ROWS[device.type]
    except ValueError:
        parser.error(f"--rows: got {options.rows!r}, expected numbers separated by commas")
    records: list[Record] = []
    try:
        if options.apply:
            apply(target, loader.artifacts_dir())
            return 0
        path = options.out or path_of(target, gpu)
        recorded(path, name)  # refuses before the work, not after it
        for mode, shape in itertools.product(options.mode, shapes):
            for record in measure(shape, MODES[mode], grid, device):
                records.append(record)
                best = min(record["us"], key=record["us"].get)
                times = "  ".join(f"m{tile} {us:.0f}{'*' if tile == best else ''}" for tile, us in record["us"].items())
                sizes = f"{record['rows_per_expert']:g} rows, {record['num_tokens']} tokens"
                print(f"{shape} {record['mode']} {sizes}: {times}", flush=True)
                write(target, name, records, path)
    except (TvmMoeError, AssertionError) as error:  # the second: a result was wrong
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
