# SPDX-License-Identifier: Apache-2.0
"""Compiled candidates in a folder: several a library, each with a note of what it holds and of the sources it came from.

Candidates take their sizes at run time, so a folder that was filled once, on a machine without the GPU even, serves every
task. Nothing in it depends on Python: the libraries are found by the names of their functions.
"""

import concurrent.futures
import functools
import hashlib
import json
import multiprocessing
import os
import shutil
import subprocess
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

PER_UNIT = 12  # candidates of a library: an nvcc run costs 3.5 s and 1.5 to 5 s a candidate, a library 0.7 MB and 0.07 MB

Compile = Callable[[Sequence[Any], str], None]  # candidates and the library's path; runs in a process of its own


def sources_digest(paths: Iterable[Path]) -> str:
    """Hash of source files: another one makes every compiled candidate stale."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


@functools.lru_cache(maxsize=1)
def _pool(jobs: int) -> concurrent.futures.ProcessPoolExecutor:
    """Compiling processes. They stay: importing torch and TVM takes each of them ten seconds."""
    return concurrent.futures.ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"))


class Folder:
    """Libraries of candidates that were compiled from the sources with ``digest``; others are ignored."""

    def __init__(self, path: Path, digest: str) -> None:
        self.path, self.digest = path, digest
        self.known: dict[str, tuple[str, str]] = {}  # symbol: (library, "") or ("", error)
        path.mkdir(parents=True, exist_ok=True)
        for note in path.glob("*.json"):
            content = json.loads(note.read_text())
            if content["sources"] == digest:
                library = "" if content["error"] else str(note.with_suffix(".so"))
                self.known |= {symbol: (library, content["error"]) for symbol in content["symbols"]}

    def compile(
        self,
        candidates: dict[str, Any],
        compile_unit: Compile,
        jobs: int | None = None,
        progress: Callable[[int], None] = lambda count: None,
    ) -> dict[str, tuple[str, str]]:
        """(library, error) of every candidate by its symbol; what is known already is not compiled.

        A candidate that spoils its library is found by compiling each of them alone, and its error is kept.
        """
        todo = [symbol for symbol in candidates if symbol not in self.known]
        jobs = jobs or os.cpu_count() or 1
        # Neighbours cost alike, so a library takes every so manyth: all are ready at about the same time.
        count = jobs * -(-len(todo) // (PER_UNIT * jobs))
        units = [todo[i::count] for i in range(min(count, len(todo)))]
        while units:
            futures = {}
            for unit in units:
                library = self._library_of(unit)
                futures[_pool(jobs).submit(_try, compile_unit, [candidates[s] for s in unit], str(library))] = unit
            units = []
            for future in concurrent.futures.as_completed(futures):
                unit, error = futures[future], future.result()
                if error and len(unit) > 1:
                    units += [[symbol] for symbol in unit]
                    continue
                self._note(unit, error)
                progress(len(unit))
        return {symbol: self.known[symbol] for symbol in candidates}

    def _library_of(self, symbols: Sequence[str]) -> Path:
        name = hashlib.sha256("\n".join([self.digest, *symbols]).encode()).hexdigest()[:16]
        return self.path / f"{name}.so"

    def _note(self, symbols: Sequence[str], error: str) -> None:
        """Note what a library holds, once it is complete."""
        library = self._library_of(symbols)
        content = dict(sources=self.digest, symbols=list(symbols), error=error)
        library.with_suffix(".json").write_text(json.dumps(content) + "\n")
        self.known |= {symbol: ("" if error else str(library), error) for symbol in symbols}

    def remove_stale(self) -> int:
        """Delete what other sources left, and what is not complete; the number of files."""
        keep = {Path(library).name for library, _ in self.known.values() if library}
        keep |= {note.name for note in self.path.glob("*.json") if json.loads(note.read_text())["sources"] == self.digest}
        stale = [path for path in self.path.iterdir() if path.suffix in (".so", ".json") and path.name not in keep]
        for path in stale:
            path.unlink()
        return len(stale)


def _try(compile_unit: Compile, candidates: Sequence[Any], library: str) -> str:
    """Compile one library; "" or what went wrong."""
    try:
        compile_unit(candidates, library)
    except Exception as error:  # whatever the compiler raises belongs to these candidates alone
        return f"{type(error).__name__}: {error}"[:500]
    return ""


def strip(library: Path) -> None:
    """Leave out symbol names, a fifth of the file, where binutils are at hand."""
    if shutil.which("strip"):
        subprocess.run(["strip", "--strip-unneeded", str(library)], check=True)
