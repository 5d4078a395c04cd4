# SPDX-License-Identifier: Apache-2.0
"""The benchmark command: its arithmetic, what it saves, and that it refuses to time a wrong result."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

from tvmmoe import baseline, bench, reference, shapes, table
from tvmmoe.config import ActivationFormat as A
from tvmmoe.config import ActivationType
from tvmmoe.config import WeightFormat as W
from tvmmoe.testing import Case, make_case, rel_l2, skip_unless_arch

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
TINY = {
    "tiny": dict(hidden_size=128, intermediate_size=96, num_experts=8, top_k=2, routing_method="Renormalize"),
    "tiny-gpt-oss": dict(
        hidden_size=96, intermediate_size=64, num_experts=4, top_k=2, routing_method="Renormalize", biases=True,
        alpha=1.702, beta=1.0, clamp_limit=7.0,
    ),
}  # fmt: skip
MACHINE = bench.Machine("a test machine", copy_gb_per_s=1000.0, bf16_tflop_per_s=100.0, l2_bytes=0)


@pytest.fixture
def tiny(monkeypatch):
    for module in (shapes, bench):
        monkeypatch.setattr(module, "shapes", lambda: TINY)
    monkeypatch.setattr(bench, "measure_machine", lambda device: MACHINE)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode", bench.MODES)
def test_every_mode_prints_a_row_a_cell(mode, device, tiny, capsys, tmp_path):
    path = tmp_path / "result.json"
    options = f"--shape all --tokens 1,9 --rounds 1 --baseline --mode {mode} --device {device} --save {path}"
    assert bench.main(options.split()) == 0
    rows = json.loads(path.read_text())["rows"]
    assert [(row["shape"], row["num_tokens"]) for row in rows] == [(name, n) for name in TINY for n in (1, 9)]
    printed = capsys.readouterr().out.splitlines()
    for row, line in zip(rows, printed[2:], strict=True):
        assert row["shape"] in line and "dequantise + matmul" in line
        assert row["us"] > 0 and row["extra_mib"] >= 0


def test_several_modes_are_saved_row_by_row(tiny, monkeypatch, tmp_path):
    path, seen, measure = tmp_path / "result.json", [], bench.measure

    def watched(*args):
        seen.append(len(json.loads(path.read_text())["rows"]))
        return measure(*args)

    monkeypatch.setattr(bench, "measure", watched)
    options = f"--shape tiny --tokens 1,9 --rounds 1 --mode mxfp8-mxfp4,bf16-nvfp4 --device cpu --save {path}"
    assert bench.main(options.split()) == 0
    assert seen == [0, 1, 2, 3]
    cells = [(row["mode"], row["num_tokens"]) for row in json.loads(path.read_text())["rows"]]
    assert cells == [(mode, n) for mode in ("mxfp8-mxfp4", "bf16-nvfp4") for n in (1, 9)]


def test_floor_and_rates_follow_from_the_active_experts(tiny):
    case = shapes.shape_case("tiny", 1)
    kwargs = make_case(case)
    options = bench.parse(["--shape", "tiny", "--tokens", "1", "--rounds", "1", "--device", "cpu"])
    row = bench.measure(MACHINE, "tiny", case, kwargs, options)
    num_bytes = 2 * 3 * 128 * 96 * (0.5 + 1 / 32)  # one token activates top_k = 2 experts
    assert row.gb_per_s * row.us == pytest.approx(num_bytes * 1e-3)
    assert row.tflop_per_s * row.us == pytest.approx(2 * 2 * 3 * 128 * 96 * 1e-6)
    assert row.floor_us == pytest.approx(num_bytes / 1000e9 * 1e6)
    assert row.share == pytest.approx(row.floor_us / row.us)


@pytest.mark.parametrize(
    "active, l2_bytes, expected",
    [
        ([{0}, {1}, {2}], 20, 1.0),  # 20 bytes of others lie between two uses
        ([{0}, {1}, {2}], 21, 0.0),
        ([{0, 1}, {0, 2}], 15, 0.5),
        ([set(), set()], 10, 1.0),
    ],
)
def test_cold_share(active, l2_bytes, expected):
    assert bench.cold_share(active, 10, l2_bytes) == expected


def test_wrong_result_is_not_timed(tiny, monkeypatch, capsys):
    call = bench.tvmmoe.trtllm_fp4_block_scale_moe
    monkeypatch.setattr(bench.tvmmoe, "trtllm_fp4_block_scale_moe", lambda **kwargs: [1.1 * call(**kwargs)[0]])
    assert bench.main("--shape tiny --tokens 4 --rounds 1 --device cpu".split()) == 1
    captured = capsys.readouterr()
    assert "relative L2 error 1" in captured.err and "tiny " not in captured.out


@pytest.mark.parametrize(
    "options, message",
    [
        ("--shape gpt-5", "gpt-5.*expected one of.*gpt-oss-120b"),
        ("--tokens many", "--tokens: got 'many', expected numbers from 1 on, several with commas"),
        ("--device meta", "--device: got meta, expected cpu"),
        ("--plot /no/such/x.png", "--plot: got /no/such/x.png, expected a file in a folder that there is"),
        ("--save /no/such/x.json", "--save: got /no/such/x.json, expected a file in a folder"),
        ("--stages --device cpu", "--stages needs a CUDA device"),
        ("--mode bf16-mxfp4,int8-int4", "--mode: got int8-int4, expected all or some of bf16-mxfp4"),
    ],
)
def test_wrong_options_are_one_line(options, message, capsys):
    with pytest.raises(SystemExit) as refused:
        bench.main(options.split())
    assert refused.value.code == 2
    assert re.search(message, capsys.readouterr().err)


def test_plot_is_written(tiny, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "roofline.png"
    assert bench.main(f"--shape tiny --tokens 1,8 --rounds 1 --device cpu --plot {path}".split()) == 0
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", shapes.shapes())
def test_shapes_make_valid_calls(name):
    case = shapes.shape_case(name, 1)
    assert case.hidden_size % 32 == case.intermediate_size % 32 == 0
    small = dict(hidden_size=32, intermediate_size=32, num_tokens=3)
    kwargs = make_case(dataclasses.replace(case, **small))
    assert len(reference.moe_ref(**kwargs)[0]) == 3


@pytest.mark.gpu
@skip_unless_arch("sm90a")  # others have other kernels
def test_stages_are_named(tiny, capsys):
    assert bench.main("--shape tiny --tokens 1,5,40,2100 --rounds 1 --stages --device cuda".split()) == 0
    printed = capsys.readouterr().out
    few, more = "prepare_bf16 gemm_pair prologue_bf16 gemm1_gated", "route arrange_bf16 count scatter gather_bf16"
    for stage in f"{few} {more} gemm2 finalize".split():
        assert f"{stage} " in printed


@pytest.mark.parametrize("device", DEVICES)
def test_host_parts(device, tiny, tmp_path):
    path = tmp_path / "result.json"
    assert bench.main(f"--shape tiny --tokens 1 --rounds 1 --host --device {device} --save {path}".split()) == 0
    (row,) = json.loads(path.read_text())["rows"]
    parts = row["host_parts_us"]
    assert list(parts) == ["call", "call with output", "validated call", "validate", "allocate", "entry"]
    assert parts["validate"] + parts["allocate"] < parts["validated call"]


@pytest.mark.parametrize("activation", ActivationType)
@pytest.mark.parametrize("mode", [{}, dict(weight_format=W.nvfp4), dict(activation_format=A.mxfp8)], ids=str)
def test_baseline_is_the_operator(mode, activation):
    kwargs = make_case(Case(num_tokens=12, activation=activation, has_gemm1_bias=True, has_gemm2_bias=True, **mode))
    (expected,) = reference.moe_ref(**kwargs)
    # bfloat16 accumulators; in mxfp8 mode z is not requantised either.
    assert rel_l2(baseline.dequantize_matmul(**kwargs), expected) < (0.06 if mode.get("activation_format") else 0.012)


# ------------------------------------------------------------------------------------------------------- tables of results

RESULTS = Path(__file__).resolve().parents[1] / "schedules" / "results"
README = RESULTS.parents[1] / "README.md"
README_SHAPES = ["Qwen3-235B-A22B", "gpt-oss-120b", "DeepSeek-V3-32of256"]  # of its tables of modes


@pytest.mark.parametrize(
    "names, shapes",
    [
        (["h100"], None),
        (["h200"], None),
        (["h100_mxfp8-mxfp4", "h100_nvfp4-nvfp4", "h100_bf16-nvfp4"], README_SHAPES),
        (["h200_modes"], None),
    ],
    ids=["h100", "h200", "h100_modes", "h200_modes"],
)
def test_readme_has_the_table_of_the_results(names, shapes):
    rows = table.rows_of([RESULTS / f"{name}.json" for name in names], shapes)
    assert "\n".join(table.markdown(rows)) in README.read_text()


def test_table_marks_what_a_public_kernel_does_faster():
    row = dict(shape="s", mode="bf16-mxfp4", num_tokens=1, us=40.4, share=0.5, public_us=50.0)
    slower = row | dict(num_tokens=16, us=60.0, share=0.251)
    other = row | dict(shape="t", num_tokens=16, public_us=None)
    assert table.markdown([row, slower, other])[2:] == ["| s | 40 (50) 0.50 | - 60 (50) 0.25 |", "| t |  | 40 0.50 |"]
    of_two_modes = table.markdown([row, row | dict(mode="bf16-nvfp4")])
    assert of_two_modes[2:] == ["| bf16 x mxfp4 | s | 40 |", "| bf16 x nvfp4 | s | 40 |"]


def test_table_of_a_shape_without_rows_is_refused(capsys):
    with pytest.raises(SystemExit):
        table.main([str(RESULTS / "h200_modes.json"), "--shape", "GLM-4.5"])
    assert "--shape: got GLM-4.5, of which the files have no row" in capsys.readouterr().err
    table.main([str(RESULTS / "h200_modes.json"), "--shape", "gpt-oss-120b"])
    assert len(capsys.readouterr().out.splitlines()) == 5
