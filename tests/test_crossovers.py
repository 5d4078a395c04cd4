# SPDX-License-Identifier: Apache-2.0
"""Tile limits from measured times: the arithmetic, the recorded tables against the manifest, and a small measurement."""

import itertools
import json

import pytest

import tvmmoe
from tvmmoe import crossovers, loader, shapes
from tvmmoe.crossovers import min_rows_per_expert


def record(rows, shape="a", **us):
    """``m8=100`` is tile height 8 in 100 us."""
    times = {name[1:]: float(value) for name, value in us.items()}
    return dict(shape=shape, mode="bf16-mxfp4", rows_per_expert=rows, num_tokens=int(16 * rows), us=times)


def test_limit_is_between_the_rows_where_the_best_changes():
    records = [record(1, m8=10, m16=12), record(4, m8=20, m16=22), record(16, m8=60, m16=40)]
    assert min_rows_per_expert(records, [8, 16]) == {8: 0, 16: 8}


def test_shapes_weigh_by_relative_not_absolute_time():
    records = [record(4, "small", m8=10, m16=15), record(4, "large", m8=1100, m16=1000), record(8, m8=2, m16=1)]
    assert min_rows_per_expert(records, [8, 16]) == {8: 0, 16: pytest.approx(32**0.5, abs=1e-3)}


def test_heights_ascend_even_where_noise_says_otherwise():
    records = [record(1, m8=10, m16=20), record(2, m8=21, m16=20), record(3, m8=20, m16=21), record(9, m8=90, m16=30)]
    limits = min_rows_per_expert(records, [8, 16])
    assert list(limits) == [8, 16] and limits[16] in (pytest.approx(2**0.5, abs=1e-3), pytest.approx(27**0.5, abs=1e-3))


def test_tile_that_is_best_nowhere_is_left_out():
    records = [record(1, m8=10, m16=11, m32=20), record(32, m8=50, m16=41, m32=40)]
    assert list(min_rows_per_expert(records, [8, 16, 32])) == [8, 32]


def test_smallest_tile_serves_below_the_table():
    assert min_rows_per_expert([record(2, m8=12, m16=10)], [8, 16]) == {8: 0, 16: 2}


def test_least_cost_over_all_assignments():
    """The dynamic programme against trying every ascending assignment."""
    records = [
        record(r, s, m8=10 + 3 * r * (1 + i), m16=20 + r * (2 + i), m32=45 - i + r)
        for r in (1, 2, 5, 9, 20, 40)
        for i, s in enumerate("ab")
    ]
    tiles, grid = [8, 16, 32], [1, 2, 5, 9, 20, 40]

    def cost(given):
        of = dict(zip(grid, given, strict=True))
        return sum(r["us"][str(of[r["rows_per_expert"]])] / min(r["us"].values()) for r in records)

    def given_by(limits):
        return [max(tile for tile, limit in limits.items() if limit <= rows) for rows in grid]

    ascending = itertools.combinations_with_replacement(tiles, len(grid))
    assert cost(given_by(min_rows_per_expert(records, tiles))) == pytest.approx(min(map(cost, ascending)))


def test_no_records_is_an_error():
    with pytest.raises(tvmmoe.ArgumentError, match="records: got none"):
        min_rows_per_expert([], [8])


@pytest.mark.parametrize("target", ["sm90a", "x86-64-v3"])
def test_manifest_has_the_recorded_limits(target):
    by_format = {}
    for entry in loader.manifest().entries:
        if entry.target == target and entry.max_rows_per_expert != 0 and entry.accumulation != "fp8":
            by_format.setdefault(entry.weight_format, {})[entry.tile_m] = entry.min_rows_per_expert
    tiles = json.loads(crossovers.path_of(target).read_text())["rows"][0]["us"]
    assert set(by_format) == {"mxfp4", "nvfp4"} and tiles
    for weight_format, limits in by_format.items():
        assert limits == crossovers.recorded_limits(target, sorted(limits), weight_format)


def test_manifest_has_the_limits_of_other_gpus():
    entries = [e for e in loader.manifest().entries if e.target == "sm90a" and e.accumulation != "fp8"]
    for weight_format in ("mxfp4", "nvfp4"):
        mine = [e for e in entries if e.weight_format == weight_format]
        written = {}
        for entry in mine:
            for name, low, high in entry.device_ranges:
                if high != 0:
                    written.setdefault(name, {})[entry.tile_m] = low
        assert "NVIDIA H200" in written
        assert written == crossovers.limits_of_others("sm90a", sorted(e.tile_m for e in mine), weight_format)


@pytest.mark.parametrize("target", ["sm90a", "x86-64-v3"])
def test_tables_are_applied_to_a_manifest(target, monkeypatch, tmp_path):
    """What the build has written comes out again; entries of other targets, and fp8's, are left alone."""
    committed = json.loads((loader.artifacts_dir() / "manifest.json").read_text())
    for entry in committed["entries"]:
        entry.setdefault("device_ranges", [])
    changed = json.loads(json.dumps(committed))
    for entry in changed["entries"]:
        if entry["target"] == target and entry.get("accumulation") != "fp8":
            entry |= dict(min_rows_per_expert=7, max_rows_per_expert=None, device_ranges=[])
    assert changed != committed
    (tmp_path / "manifest.json").write_text(json.dumps(changed))
    monkeypatch.setattr(loader, "artifacts_dir", lambda: tmp_path)
    monkeypatch.setattr(crossovers, "target_of", lambda device: target)
    assert crossovers.main(["--apply", "--device", "cpu"]) == 0
    assert json.loads((tmp_path / "manifest.json").read_text()) == committed


def test_tables_that_are_not_there_are_not_applied(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(loader, "data_dir", lambda name: tmp_path)
    assert crossovers.main(["--apply", "--device", "cpu"]) == 1
    assert "--apply: got no " in capsys.readouterr().err


def test_another_gpu_has_a_table_of_its_own(monkeypatch, tmp_path):
    monkeypatch.setattr(loader, "data_dir", lambda name: tmp_path)
    table = tmp_path / "sm90a" / "crossovers.json"
    assert crossovers.path_of("sm90a", "NVIDIA H200") == table and crossovers.limits_of_others("sm90a", [8], "mxfp4") == {}
    for gpu, rows in (("NVIDIA H100 80GB HBM3", 1), ("NVIDIA H200", 2)):
        crossovers.write("sm90a", gpu, [record(1, m8=1, m16=2), record(rows * 4, m8=2, m16=1)],
                         crossovers.path_of("sm90a", gpu))  # fmt: skip
    assert crossovers.path_of("sm90a", "NVIDIA H100 80GB HBM3") == table
    assert crossovers.path_of("sm90a", "NVIDIA H200") == table.with_name("crossovers_nvidia_h200.json")
    assert crossovers.recorded_limits("sm90a", [8, 16], "mxfp4") == {8: 0, 16: 2}
    h200 = {"NVIDIA H200": {8: 0, 16: pytest.approx(8**0.5, abs=1e-3)}}
    assert crossovers.limits_of_others("sm90a", [8, 16], "mxfp4") == h200
    one = [record(1, m8=1)]
    for device, rows in (("NVIDIA H200", one), ("NVIDIA H100 80GB HBM3", one), ("NVIDIA GH200", [])):
        other = table.with_name("crossovers_other.json")
        other.write_text(json.dumps(dict(device=device, rows=rows)))
        with pytest.raises(tvmmoe.ArgumentError, match=f"crossovers_other.json: got {len(rows)} rows of {device}, exp"):
            crossovers.limits_of_others("sm90a", [8], "mxfp4")


def test_each_weight_format_has_limits_of_its_own(monkeypatch, tmp_path):
    """As far as a table has any."""
    monkeypatch.setattr(loader, "data_dir", lambda name: tmp_path)
    rows = [record(1, m8=1, m16=2), record(4, m8=2, m16=1), record(16, m8=2, m16=1)]
    path = tmp_path / "sm90a" / "crossovers.json"
    crossovers.write("sm90a", "NVIDIA H200", rows, path)
    for weight_format in ("mxfp4", "nvfp4"):
        assert crossovers.recorded_limits("sm90a", [8, 16], weight_format) == {8: 0, 16: 2}
    nvfp4 = [record(1, m8=1, m16=2), record(4, m8=1, m16=2), record(16, m8=2, m16=1)]
    few = [nvfp4[0] | dict(mode="bf16-nvfp4")]  # by which 8 would serve every load
    crossovers.write("sm90a", "NVIDIA H200", few, path)
    assert crossovers.recorded_limits("sm90a", [8, 16], "nvfp4") == {8: 0, 16: 2}
    crossovers.write("sm90a", "NVIDIA H200", [r | dict(mode="bf16-nvfp4") for r in nvfp4], path)
    assert crossovers.recorded_limits("sm90a", [8, 16], "mxfp4") == {8: 0, 16: 2}
    assert crossovers.recorded_limits("sm90a", [8, 16], "nvfp4") == {8: 0, 16: 8}


def test_measures_and_keeps_other_shapes(monkeypatch, tmp_path, capsys):
    tiny = dict(hidden_size=64, intermediate_size=64, num_experts=8, top_k=2, routing_method="Renormalize")
    monkeypatch.setattr(shapes, "shapes", lambda: dict(tiny=tiny, other=tiny))
    path = tmp_path / "crossovers.json"
    bf16, mxfp8 = "bf16-mxfp4", "mxfp8-mxfp4"
    for shape, modes in (("tiny", bf16), ("other", f"{bf16},{mxfp8}"), ("tiny", bf16)):
        options = ["--shape", shape, "--mode", modes, "--rows", "0.01,0.25,4", "--device", "cpu", "--out", str(path)]
        assert crossovers.main(options) == 0
    rows = json.loads(path.read_text())["rows"]
    # 0.01 rows an expert are no whole token
    cells = [(shape, mode, n) for shape, mode in (("other", bf16), ("other", mxfp8), ("tiny", bf16)) for n in (1, 16)]
    assert [(r["shape"], r["mode"], r["num_tokens"]) for r in rows] == cells
    assert all(us > 0 for r in rows for us in r["us"].values())
    # Cells that are measured again are replaced, others stay.
    old = {r["num_tokens"]: r["us"] for r in rows if r["shape"] == "tiny"}
    monkeypatch.setattr(crossovers, "rested_us", lambda *_: 1.0)
    crossovers.main(["--shape", "tiny", "--rows", "4", "--device", "cpu", "--out", str(path)])
    new = {r["num_tokens"]: r["us"] for r in json.loads(path.read_text())["rows"] if r["shape"] == "tiny"}
    assert new[1] == old[1] and new[16] != old[16]
    assert "tiny bf16-mxfp4 4 rows, 16 tokens: " in capsys.readouterr().out


def test_records_of_another_device_are_not_overwritten(tmp_path, capsys):
    path = tmp_path / "crossovers.json"
    path.write_text(json.dumps(dict(device="NVIDIA H100 80GB HBM3", rows=[record(1, m8=1)])))
    before = path.read_text()
    assert crossovers.main(["--device", "cpu", "--out", str(path)]) == 1
    assert "holds records of NVIDIA H100" in capsys.readouterr().err
    assert path.read_text() == before


@pytest.mark.parametrize(
    "options, message",
    [
        (["--rows", "1,many"], "--rows: got '1,many', expected numbers"),
        (["--device", "cuda"], "--device: got cuda, expected cpu"),
        (["--mode", "bf16-mxfp4,bf16-fp8"], "--mode: got bf16-fp8, expected all or some of bf16-mxfp4"),
    ],
)
def test_wrong_options_are_one_line(options, message, monkeypatch, capsys):
    monkeypatch.setattr(crossovers.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        crossovers.main(options)
    assert message in capsys.readouterr().err


def test_a_wrong_result_is_not_timed(monkeypatch, tmp_path, capsys):
    def wrong(case, kwargs):
        raise AssertionError("relative L2 is 0.5")

    monkeypatch.setattr(crossovers, "check", wrong)
    path = tmp_path / "crossovers.json"
    options = ["--shape", "Qwen3-30B-A3B", "--rows", "0.0625", "--device", "cpu", "--out", str(path)]
    monkeypatch.setattr(shapes, "shapes", lambda: {"Qwen3-30B-A3B": dict(
        hidden_size=64, intermediate_size=64, num_experts=32, top_k=2, routing_method="Renormalize")})  # fmt: skip
    assert crossovers.main(options) == 1
    assert "relative L2 is 0.5" in capsys.readouterr().err and not path.exists()
