# SPDX-License-Identifier: Apache-2.0
"""What ``python -m tvmmoe.info`` prints: the report, selections for this and other machines, one-line errors."""

import json
import re
from pathlib import Path

import pytest
import torch

import tvmmoe
from tvmmoe import info, shapes
from tvmmoe.errors import ArgumentError, DtypeError, ShapeError, UnsupportedError
from tvmmoe.loader import Manifest, manifest
from tvmmoe.select import targets_of
from tvmmoe.testing import Case, make_case

GPT_OSS_20B = ["--hidden-size", "2880", "--intermediate-size", "2880", "--num-experts", "32", "--top-k", "4"]


@pytest.fixture(autouse=True)
def rebuilt_files_serve(monkeypatch):
    """What is asked here does not depend on whether a file has been measured since it was built."""
    monkeypatch.setenv("TVMMOE_ALLOW_UNVERIFIED", "1")


def printed(capsys, *argv):
    info.main(list(argv))
    return capsys.readouterr().out


def error(capsys, *argv):
    with pytest.raises(SystemExit, match="2"):
        info.main(list(argv))
    usage, message = capsys.readouterr().err.rsplit("python -m tvmmoe.info: error: ", 1)
    assert usage.startswith("usage: ") and message.count("\n") == 1
    return message.strip()


def test_report_names_every_artifact(capsys):
    text = printed(capsys, "--device", "cpu")
    content = json.loads(printed(capsys, "--device", "cpu", "--json"))
    assert content["tvmmoe"] == tvmmoe.__version__
    assert content["targets"] == list(targets_of(torch.device("cpu")))
    assert set(content["artifacts"]) == set(manifest().files)
    assert len(content["entries"]) == len(manifest().entries)
    assert all(file in text for file in manifest().files)
    assert content["verified"] == info.states(manifest())
    assert content["verified"].keys() >= {"sm90a", *content["targets"]}


def test_state_of_a_target_is_its_least_verified_file(monkeypatch):
    files = {x: dict(target="sm120a", verified=x) for x in ("measured", "emulated")}
    files["c"] = dict(target="sm100a", verified="compiled")
    source = Manifest(Path("made_up"), files, ())
    monkeypatch.delenv("TVMMOE_ALLOW_UNVERIFIED", raising=False)
    needs = "compiled; serves only where TVMMOE_ALLOW_UNVERIFIED=1 is set"
    assert info.states(source) == {"sm120a": "emulated", "sm100a": needs}
    monkeypatch.setenv("TVMMOE_ALLOW_UNVERIFIED", "1")
    assert info.states(source) == {"sm120a": "emulated", "sm100a": "compiled"}


def test_selection_on_this_cpu_is_what_the_operator_takes(capsys):
    rows = json.loads(printed(capsys, "--device", "cpu", "--json", "--tokens", "0,1,64,4096", *GPT_OSS_20B))
    assert [row["num_tokens"] for row in rows] == [0, 1, 64, 4096]
    assert [row["rows_per_expert"] for row in rows] == [0, 0.125, 8, 512]
    for row in rows:
        assert row["target"] == targets_of(torch.device("cpu"))[0]
        assert row["workspace_bytes"] == tvmmoe.workspace_bytes(row["num_tokens"], 2880, 2880, 32, 4)


@pytest.mark.parametrize("change, error, message", [
    (dict(activation_format="fp8"), ArgumentError, "activation_format: got 'fp8', expected bf16 or mxfp8 or nvfp4"),
    (dict(weight_format="nvfp8"), ArgumentError, "weight_format: got 'nvfp8', expected mxfp4 or nvfp4"),
    (dict(activation_format="mxfp8", weight_format="nvfp4"), UnsupportedError, "weight_format: got nvfp4 with mxfp8"),
    (dict(num_tokens=-4), ArgumentError, "num_tokens: got -4, expected 0 or more"),
    (dict(num_tokens=4.0), DtypeError, "num_tokens: got float 4.0, expected int"),
    (dict(num_tokens=65537), ArgumentError, "hidden_states: got bfloat16 [65537, 2880], expected at most 65536 tokens"),
    (dict(hidden_size=2049), ShapeError, "hidden_size=2049, expected a positive multiple of 32"),
    (dict(intermediate_size=100), ArgumentError, "intermediate_size: got 100, expected a multiple of 32"),
    (dict(num_experts=0), ArgumentError, "num_experts: got 0, expected 1 ... 1024"),
    (dict(top_k=33), ArgumentError, "top_k: got 33, expected 1 ... min(32, num_experts)=32"),
    (dict(local_num_experts=33), ArgumentError, "local_num_experts: got 33, expected 1 ... num_experts=32"),
])  # fmt: skip
def test_workspace_of_a_call_that_is_refused(change, error, message):
    sizes = dict(num_tokens=4, hidden_size=2880, intermediate_size=2880, num_experts=32, top_k=4)
    with pytest.raises(error, match=re.escape(message)):
        tvmmoe.workspace_bytes(**sizes | change)


@pytest.mark.parametrize("mode", [("bf16", "mxfp4"), ("mxfp8", "mxfp4"), ("bf16", "nvfp4"), ("nvfp4", "nvfp4")])
def test_selection_for_a_hopper_needs_none(mode, capsys):
    argv = ["--tokens", "1,1024", *GPT_OSS_20B, "--target", "sm90a", "--activation", mode[0], "--weights", mode[1]]
    header, one, many = printed(capsys, *argv).splitlines()
    assert header.split() == list(json.loads(printed(capsys, *argv, "--json"))[0])
    assert one.split()[:5] == ["1", "0.125", "sm90a", f"sm90a/moe_{mode[1]}_sm90a.so", f"fp4_block_scale_moe_{mode[1]}_m8"]
    assert many.split()[1] == "128" and many.split()[5] == "256"
    assert len({len(line) for line in (header, one, many)}) == 1


def test_shape_is_its_sizes(capsys):
    common = ["--device", "cpu", "--tokens", "1,64"]
    assert printed(capsys, *common, "--shape", "gpt-oss-20b") == printed(capsys, *common, *GPT_OSS_20B)


def test_every_shape_is_served_on_both_targets(capsys):
    for name in shapes.shapes():
        for target in ("x86-64-v3", "sm90a"):
            rows = json.loads(printed(capsys, "--shape", name, "--target", target, "--json"))
            assert [row["target"] for row in rows] == [target] * 4


def test_fewer_local_experts_take_less_workspace(capsys):
    argv = ["--device", "cpu", "--json", "--tokens", "64", *GPT_OSS_20B]
    (whole,), (part,) = (json.loads(printed(capsys, *argv, *more)) for more in ([], ["--local-num-experts", "4"]))
    assert part["rows_per_expert"] == whole["rows_per_expert"] and part["workspace_bytes"] < whole["workspace_bytes"]


@pytest.mark.parametrize("formats", [dict(), dict(activation_format=2, weight_format=1), dict(activation_format=1)])
def test_problem_is_that_of_a_real_call(formats):
    kinds = dict(activation_format=info.ActivationFormat, weight_format=info.WeightFormat)
    case = Case(**{name: kinds[name](value) for name, value in formats.items()})
    kwargs = make_case(case)
    problem, real = info.problem_of(case), info.validate(**kwargs)
    assert repr(problem) == repr(real).replace("'cpu'", "'meta'")


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--shape", "nope"], "shape is 'nope', expected one of gpt-oss-20b, "),
        (["--shape", "gpt-oss-20b", "--top-k", "2"], "--shape gpt-oss-20b has its own "),
        (["--tokens", "1", "--top-k", "2"], "--hidden-size, --intermediate-size, --num-experts missing; "),
        ([*GPT_OSS_20B, "--top-k", "33"], "top_k: got 33, expected 1 ... "),
        ([*GPT_OSS_20B, "--hidden-size", "2890"], "hidden_states: got bfloat16 [1, 2890], hidden_size=2890, "),
        ([*GPT_OSS_20B, "--hidden-size", "-64"], "--hidden-size: expected at least 1"),
        ([*GPT_OSS_20B, "--local-num-experts", "33"], "local_num_experts: got 33, expected 1 ... "),
        ([*GPT_OSS_20B, "--tokens", "-1"], "--tokens: got -1, expected numbers from 0 on"),
        ([*GPT_OSS_20B, "--tokens", "x"], "--tokens: got x, expected numbers from 0 on, several with commas"),
        ([*GPT_OSS_20B, "--target", "sm75"], "--target: got sm75, expected one of sm"),
        ([*GPT_OSS_20B, "--activation", "mxfp8", "--weights", "nvfp4"], "gemm1_weights_scale: got uint8 "),
        ([*GPT_OSS_20B, "--device", "meta"], "no bf16 x mxfp4 artifact for meta on "),
        (["--device", "nope"], "Expected one of cpu, cuda, "),
    ],
)
def test_error_is_one_line(argv, message, capsys):
    assert error(capsys, *argv).startswith(message)


def test_shape_with_missing_fields_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(shapes, "shapes", lambda: {"half": {"hidden_size": 64}})
    assert error(capsys, "--shape", "half").startswith("--shape half: its fields in schedules/shapes.json ")
    monkeypatch.setattr(shapes, "shapes", lambda: {"more": {"routing_method": "TopK", "colour": 1}})
    assert error(capsys, "--shape", "more").startswith("--shape more: its fields in schedules/shapes.json ")


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_missing_cuda_device_is_one_line(capsys):
    assert error(capsys, "--device", "cuda", "--shape", "gpt-oss-20b").startswith("--device: got cuda, but torch sees no ")


def test_selection_is_by_the_gpus_own_ranges(monkeypatch, capsys):
    """README: what a call would select, here or elsewhere."""
    monkeypatch.setattr(info, "targets_of", lambda device: ("sm90a",))
    shown = {}
    for gpu in ("NVIDIA H100 80GB HBM3", "NVIDIA H200"):
        monkeypatch.setattr(info, "gpu_name", lambda device, gpu=gpu: gpu)
        (row,) = json.loads(printed(capsys, "--device", "cpu", "--shape", "Qwen3-235B-A22B", "--tokens", "192", "--json"))
        shown[gpu] = row["tile_m"]
    (row,) = json.loads(printed(capsys, "--target", "sm90a", "--shape", "Qwen3-235B-A22B", "--tokens", "192", "--json"))
    assert shown == {"NVIDIA H100 80GB HBM3": row["tile_m"], "NVIDIA H200": 32} and row["tile_m"] != 32
