# SPDX-License-Identifier: Apache-2.0
"""The build command beside its compilers: what it writes into a manifest, and how files come to be called verified."""

import json
import shutil

import pytest

import tvmmoe
from tvmmoe import loader
from tvmmoe.config import WeightFormat

build = pytest.importorskip("tvmmoe.build")
SM120A = build.CUDA_TARGETS["sm120a"]


@pytest.fixture
def folder(tmp_path):
    """The sm120a artifacts and the whole manifest."""
    shutil.copytree(loader.artifacts_dir() / "sm120a", tmp_path / "sm120a")
    shutil.copy(loader.artifacts_dir() / "manifest.json", tmp_path)
    return tmp_path


def test_verified_files_are_noted_and_nothing_else(folder, capsys):
    before = json.loads((folder / "manifest.json").read_text())
    build.main(["--target", "sm120a", "--out", str(folder), "--verified", "measured"])
    assert capsys.readouterr().out.count("measured\n") == 2
    after = json.loads((folder / "manifest.json").read_text())
    for file, record in after["files"].items():
        assert record["verified"] == ("measured" if record["target"] == "sm120a" else before["files"][file]["verified"])
        record["verified"] = before["files"][file]["verified"]
    assert after == before and list(after["files"]) == list(before["files"])


def test_files_that_are_not_the_manifests_are_not_verified(folder):
    file = next((folder / "sm120a").glob("*.so"))
    file.write_bytes(file.read_bytes() + b"x")
    with pytest.raises(tvmmoe.ArtifactError, match="sha256 differs"):
        build.main(["--target", "sm120a", "--out", str(folder), "--verified", "measured"])
    assert (folder / "manifest.json").read_text() == (loader.artifacts_dir() / "manifest.json").read_text()


def test_rebuilt_target_replaces_its_own_records(folder, monkeypatch):
    """A build with a compiler that is made up: what was verified before is so no longer."""

    def compile_so(source, path, *gencodes):
        assert source == "source" and gencodes == SM120A.gencodes and len(gencodes) == 2
        path.write_bytes(b"built")

    monkeypatch.setattr(SM120A.build, "compile_so", compile_so)
    monkeypatch.setattr(build, "cuda_source", lambda target, weight_format: "source")
    before = loader.manifest(folder)
    build.main(["--target", "sm120a", "--out", str(folder)])
    loader.manifest.cache_clear()
    after = loader.manifest(folder)
    mine = [record for record in after.files.values() if record["target"] == "sm120a"]
    assert [(record["verified"], record["bytes"]) for record in mine] == [("compiled", 5)] * 2
    assert set(after.files) == set(before.files) and set(after.entries) == set(before.entries)
    others = {file: record for file, record in before.files.items() if record["target"] != "sm120a"}
    assert {file: after.files[file] for file in others} == others


def test_fp8_entry_takes_calls_before_the_exact_ones(tmp_path, monkeypatch):
    """Of sm90a's files with a compiler that is made up."""
    sm90a = build.CUDA_TARGETS["sm90a"]

    def compile_so(source, path, *gencodes):
        path.parent.mkdir(exist_ok=True)
        path.write_text(source)

    monkeypatch.setattr(sm90a.build, "compile_so", compile_so)
    monkeypatch.setattr(sm90a.build, "fp8_source", lambda: "fp8")
    monkeypatch.setattr(build, "cuda_source", lambda target, weight_format: weight_format.name)
    files, entries = build.build_cuda(sm90a, tmp_path)
    names = ["moe_mxfp4_mxfp8_sm90a.so", "moe_mxfp4_sm90a.so", "moe_nvfp4_sm90a.so"]
    assert list(files) == [f"sm90a/{name}" for name in names]
    assert [(tmp_path / file).read_text() for file in files] == ["fp8", "mxfp4", "nvfp4"]
    first, *others = entries
    assert (first["accumulation"], first["activation_formats"], first["file"]) == ("fp8", ["mxfp8"], f"sm90a/{names[0]}")
    assert (first["min_rows_per_expert"], first["max_rows_per_expert"]) == (48, None)
    assert others and not any("accumulation" in entry for entry in others)


def test_a_part_of_a_target_is_built_into_another_folder(tmp_path, monkeypatch, capsys):
    """For a comparison: of some tiles and formats, without fp8 accumulation."""
    sm90a, compiled = build.CUDA_TARGETS["sm90a"], []

    def compile_so(source, path, *gencodes):
        path.parent.mkdir(exist_ok=True)
        path.write_text(source)
        compiled.append(path.name)

    monkeypatch.setattr(sm90a.build, "compile_so", compile_so)
    monkeypatch.setattr(sm90a.build, "cuda_source", lambda variants: " ".join(variant.symbol for variant in variants))
    options = ["--target", "sm90a", "--tiles", "16,64", "--weights", "nvfp4"]
    build.main([*options, "--out", str(tmp_path)])
    assert compiled == ["moe_nvfp4_sm90a.so"]
    symbols = [f"fp4_block_scale_moe_nvfp4_m{tile_m}" for tile_m in (16, 64)]
    assert (tmp_path / "sm90a" / compiled[0]).read_text() == " ".join(symbols)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert list(manifest["files"]) == ["sm90a/moe_nvfp4_sm90a.so"]
    assert [entry["symbol"] for entry in manifest["entries"]] == symbols
    for wrong, message in (
        (options, "got a part of a target, expected a CUDA target and another folder by --out"),
        (["--target", "cpu", "--weights", "nvfp4", "--out", str(tmp_path)], "got a part of a target"),
        ([*options, "--tiles", "24", "--out", str(tmp_path)], "--tiles: got 24, expected some of 8, 16, 32, 64, 96, 256"),
        ([*options, "--tiles", "tall", "--out", str(tmp_path)], "--tiles: got tall, expected some of 8, 16, 32, 64, 96, 256"),
        ([*options, "--weights", "fp4", "--out", str(tmp_path)], "--weights: got fp4, expected some of mxfp4, nvfp4"),
    ):
        with pytest.raises(SystemExit):
            build.main(wrong)
        assert message in capsys.readouterr().err
    assert compiled == ["moe_nvfp4_sm90a.so"]


def test_records_of_another_folder_are_chosen_from(tmp_path, monkeypatch, capsys):
    """--records: an empty folder leaves the hand-chosen configurations, where schedules/ have changed one."""
    sm90a, seen = build.CUDA_TARGETS["sm90a"], []
    monkeypatch.setattr(build, "build_cuda", lambda target, folder: seen.append(target) or ({}, []))
    for options in ([], ["--records", str(tmp_path / "records")]):
        build.main(["--target", "sm90a", "--out", str(tmp_path), *options])
    shipped, by_hand = (build.shipped_variants(target, WeightFormat.nvfp4) for target in seen)
    assert shipped != by_hand == sm90a.build.variants(WeightFormat.nvfp4)
    for wrong in (["--target", "host"], ["--target", "sm90a", "--verified", "measured"]):
        with pytest.raises(SystemExit):
            build.main([*wrong, "--records", str(tmp_path), "--out", str(tmp_path)])
        assert "--records: got a folder, expected none" in capsys.readouterr().err


@pytest.mark.parametrize("weight_format", WeightFormat)
def test_limits_are_the_targets_own_until_they_are_measured(weight_format, tmp_path, monkeypatch):
    tiles = [variant.tile_m for variant in build.shipped_variants(SM120A, weight_format)]
    assert build.limits_of(SM120A, tiles, weight_format) == SM120A.default_limits and list(SM120A.default_limits) == tiles
    path = tmp_path / "crossovers.json"
    rows = [dict(shape="a", mode="bf16-mxfp4", rows_per_expert=r, us={"8": 10.0 * r, "32": 20.0}) for r in (1, 4)]
    path.write_text(json.dumps(dict(rows=rows)))
    monkeypatch.setattr("tvmmoe.crossovers.path_of", lambda target: path)
    monkeypatch.setattr(build, "path_of", lambda target: path)
    assert build.limits_of(SM120A, [8, 32], weight_format) == {8: 0.0, 32: 2.0}


def test_activation_formats_of_a_target():
    assert SM120A.activation_formats(WeightFormat.mxfp4)[-1] == "mxfp8"
    assert build.CUDA_TARGETS["sm90a"].activation_formats(WeightFormat.nvfp4) == ["bf16", "nvfp4"]


def test_unknown_target_is_one_line(capsys):
    with pytest.raises(SystemExit):
        build.main(["--target", "sm75"])
    assert "argument --target: invalid choice: 'sm75'" in capsys.readouterr().err
