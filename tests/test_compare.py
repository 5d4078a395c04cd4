# SPDX-License-Identifier: Apache-2.0
"""Builds timed in turns: which entry of which folder runs, in which order, and that a wrong result is not timed."""

import argparse
import json
import shutil

import pytest
import torch
from test_bench import tiny  # noqa: F401

from tvmmoe import bench, compare, loader
from tvmmoe.arguments import validate
from tvmmoe.errors import UnsupportedError
from tvmmoe.select import targets_of
from tvmmoe.shapes import shape_case
from tvmmoe.testing import make_case

pytestmark = pytest.mark.usefixtures("tiny")
ARTIFACTS = loader.artifacts_dir()
OPTIONS = "--shape tiny --rounds 1 --device cpu"


@pytest.fixture
def other(tmp_path):
    """A second build: the same CPU artifact in another folder, where one tile height serves everything."""
    content = json.loads((ARTIFACTS / "manifest.json").read_text())
    entries = [e for e in content["entries"] if e["target"] == "x86-64" and e["tile_m"] == 4]
    for entry in entries:
        entry.update(min_rows_per_expert=0.0, max_rows_per_expert=None)
    file = entries[0]["file"]
    (tmp_path / file).parent.mkdir()
    shutil.copy(ARTIFACTS / file, tmp_path / file)
    manifest = content | dict(files={file: content["files"][file]}, entries=entries)
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    return tmp_path


@pytest.fixture
def problem():
    return validate(**make_case(shape_case("tiny", 1)))


def test_a_folders_manifest_chooses_the_entry_or_the_tile_does(other, problem):
    selected = [compare.build_of(str(folder)).entry(problem) for folder in (ARTIFACTS, other)]
    assert [entry.tile_m for entry in selected] == [1, 4]
    build = compare.build_of(f"{ARTIFACTS}:16")
    entry = build.entry(problem)
    assert (entry.target, entry.tile_m) == (targets_of(problem.device)[0], 16)  # the manifest lists x86-64 first
    assert build.source is loader.manifest(ARTIFACTS)
    with pytest.raises(UnsupportedError, match=r"artifacts:256: no such tile for bf16 x mxfp4 on x86-64"):
        compare.build_of(f"{ARTIFACTS}:256").entry(problem)


def test_the_other_folders_file_runs(other, monkeypatch):
    loaded, load = [], loader.load
    monkeypatch.setattr(loader, "load", lambda source, file: loaded.append(source.folder) or load(source, file))
    kwargs = make_case(shape_case("tiny", 3))
    (output,) = compare.build_of(str(other)).call(**kwargs)
    (expected,) = compare.build_of(str(ARTIFACTS)).call(**kwargs)
    assert loaded == [other, ARTIFACTS] and torch.equal(output, expected)


@pytest.mark.parametrize("text", ["artifacts:m8", "nowhere", "nowhere:8"])
def test_what_is_no_build_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match=r"got artifacts:m8, expected FOLDER|nowhere/manifest.json does not"):
        compare.build_of(text)


def test_builds_take_turns_and_the_median_round_counts(monkeypatch):
    order, times = [], iter([5.0, 50.0, 1.0, 70.0, 3.0, 60.0])

    def timed(call, device):
        call()
        return next(times)

    monkeypatch.setattr(bench, "rested_us", timed)
    calls = [lambda: order.append("first"), lambda: order.append("second")]
    assert compare.in_turns(calls, torch.device("cpu"), 3) == [3.0, 60.0]
    assert order == ["first", "second"] * 3


def test_every_cell_has_a_line_a_build(other, capsys):
    argv = [str(ARTIFACTS), str(other), *OPTIONS.split(), "--tokens", "1,9", "--mode", "bf16-mxfp4,nvfp4-nvfp4"]
    assert compare.main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    cells = [f"tiny {mode} T={n}" for mode in ("bf16-mxfp4", "nvfp4-nvfp4") for n in (1, 9)]
    assert lines[::3] == cells
    for line in lines[1::3]:
        assert line.startswith(str(ARTIFACTS)) and " 1.000  rel L2 " in line
    assert all(line.startswith(str(other)) for line in lines[2::3])


def test_a_wrong_result_is_not_timed(other, monkeypatch, capsys):
    call = compare.Build.call

    def broken(self, **arguments):
        results = call(self, **arguments)
        return [result + 1 for result in results] if self.source.folder == other else results

    monkeypatch.setattr(compare.Build, "call", broken)
    assert compare.main([str(ARTIFACTS), str(other), *OPTIONS.split(), "--tokens", "2"]) == 1
    captured = capsys.readouterr()
    assert "exceeds" in captured.err and " us " not in captured.out


def test_rounds_and_stages_are_checked(capsys):
    for options, message in (("--rounds 0", "--rounds: got 0, expected 1 or more"), ("--stages", "needs a CUDA device")):
        with pytest.raises(SystemExit):
            compare.main([str(ARTIFACTS), "--shape", "tiny", "--device", "cpu", *options.split()])
        assert message in capsys.readouterr().err
