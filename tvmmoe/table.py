# SPDX-License-Identifier: Apache-2.0
"""Markdown table of saved results: ``python -m tvmmoe.table schedules/results/h200.json``. README's tables are its output.

Of one mode: us, in brackets the best public kernel's, and the share of the floor; where the public one is faster, the cell is
marked with ``-``. Of several modes: us.
"""

import argparse
import json
from pathlib import Path
from typing import Any


def cell(row: dict[str, Any], has_share: bool) -> str:
    """Of a row as ``tvmmoe.bench --save`` writes it."""
    text = f"{row['us']:.0f}"
    if not has_share:
        return text
    if public := row["public_us"]:
        text = f"{'- ' if public < row['us'] else ''}{text} ({public:.0f})"
    return f"{text} {row['share']:.2f}"


def markdown(rows: list[dict[str, Any]]) -> list[str]:
    """Lines of the table: shapes (and modes) down, numbers of tokens across, in the order of ``rows``."""
    tokens = sorted({row["num_tokens"] for row in rows})
    has_share = len({row["mode"] for row in rows}) == 1
    cells: dict[tuple[str, ...], dict[int, str]] = {}
    for row in rows:
        head = (row["shape"],) if has_share else (row["mode"].replace("-", " x "), row["shape"])
        cells.setdefault(head, {})[row["num_tokens"]] = cell(row, has_share)
    titles = ["shape"] if has_share else ["mode", "shape"]
    lines = [[*titles, f"T={tokens[0]}", *map(str, tokens[1:])], ["---"] * (len(titles) + len(tokens))]
    lines += [[*head, *(of_head.get(n, "") for n in tokens)] for head, of_head in cells.items()]
    return [f"| {' | '.join(line)} |" for line in lines]


def rows_of(paths: list[Path], shapes: list[str] | None = None) -> list[dict[str, Any]]:
    """Rows of saved results, of some shapes if any are given."""
    rows = [row for path in paths for row in json.loads(path.read_text())["rows"]]
    return [row for row in rows if not shapes or row["shape"] in shapes]


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m tvmmoe.table", description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE.json")
    parser.add_argument("--shape", type=lambda names: names.split(","), help="some, with commas")
    options = parser.parse_args(argv)
    rows = rows_of(options.files, options.shape)
    if not rows:
        parser.error(f"--shape: got {','.join(options.shape or [])}, of which the files have no row")
    print(*markdown(rows), sep="\n")


if __name__ == "__main__":
    main()
