# SPDX-License-Identifier: Apache-2.0
"""The demo on small layers, with transformers' modules and without, and what it does about a wrong result."""

import builtins
import dataclasses

import pytest
import torch

from tvmmoe import demo
from tvmmoe.baseline import dequantize_matmul
from tvmmoe.testing import Case

GPT_OSS = Case(
    hidden_size=96, intermediate_size=160, num_experts=8, top_k=4, has_gemm1_bias=True, has_gemm2_bias=True,
    alpha=1.702, beta=1.0, clamp_limit=7.0,
)  # fmt: skip
QWEN3 = Case(hidden_size=160, intermediate_size=96, num_experts=16, top_k=4)
LAYERS = {"gpt-oss": GPT_OSS, "qwen3": QWEN3}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
MODES = [("bf16", "mxfp4"), ("bf16", "nvfp4"), ("mxfp8", "mxfp4")]


@pytest.fixture(params=["transformers", "own layer"])
def source(request, monkeypatch):
    """Where the demo finds its layers."""
    if request.param == "transformers":
        pytest.importorskip("transformers")
    else:
        without_transformers(monkeypatch)
    return request.param


def without_transformers(monkeypatch):
    original = builtins.__import__

    def no_transformers(name, *args, **kwargs):
        if name.split(".")[0] == "transformers":
            raise ModuleNotFoundError("No module named 'transformers'")
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_transformers)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("activation, weights", MODES)
def test_small_layers_are_within_the_bound(source, activation, weights, device, capsys):
    argv = ["--layer", "all", "--tokens", "1,37", "--activation", activation, "--format", weights, "--device", device]
    assert demo.main(argv, LAYERS) == 0
    captured = capsys.readouterr()
    assert captured.out.count(source) == 2 and not captured.err
    rows = [line.split() for line in captured.out.splitlines() if f" {activation}-{weights} " in line]
    assert [row[:2] for row in rows] == [[name, count] for name in LAYERS for count in ("1", "37")]
    for row in rows:
        assert 0 < float(row[3]) <= demo.BOUND[demo.ActivationFormat[activation]]
        assert row[-2].endswith(".so") and row[-1].startswith(f"fp4_block_scale_moe_{weights}_m")


@pytest.mark.parametrize("activation, weights", MODES)
@pytest.mark.parametrize("case", LAYERS.values(), ids=LAYERS)
def test_module_computes_with_the_quantised_weights(case, activation, weights):
    """What stands in the module's bfloat16 parameters is what the operator's bytes stand for, bit by bit."""
    formats = dict(activation_format=demo.ActivationFormat[activation], weight_format=demo.WeightFormat[weights])
    layer = demo.make_layer(dataclasses.replace(case, **formats))
    kwargs, factors = demo.quantize(layer)
    for e in range(case.num_experts):
        for i, expected in enumerate((layer.to_up_gate(layer.gate_up[e], 0), layer.down[e])):
            values, scale = kwargs[f"gemm{i + 1}_weights"][e], kwargs[f"gemm{i + 1}_weights_scale"][e]
            assert torch.equal(demo.dequantize(values, scale, factors[i, e]), expected.float())


@pytest.mark.parametrize("case", LAYERS.values(), ids=LAYERS)
def test_plain_torch_is_the_module(case):
    """The own layer and the timed baseline compute what transformers' module does."""
    pytest.importorskip("transformers")
    layer = demo.make_layer(case)
    kwargs, _ = demo.quantize(layer)
    tokens, x = demo.draw_tokens(layer, 37)
    plain = dequantize_matmul(**kwargs | tokens)
    assert demo.rel_l2(plain, layer.forward(x)) < demo.BOUND[case.activation_format]


def test_tokens_have_no_tie_at_the_border():
    layer = demo.make_layer(QWEN3)
    tokens, x = demo.draw_tokens(layer, 2000)
    top = tokens["routing_logits"].topk(QWEN3.top_k + 1).values
    assert (top[:, -2] > top[:, -1]).all()
    assert torch.equal(tokens["routing_logits"], layer.logits(x))


@pytest.mark.parametrize("wrong", [1.02, float("nan")])
def test_wrong_result_fails(monkeypatch, capsys, wrong):
    operator = demo.tvmmoe.trtllm_fp4_block_scale_moe
    monkeypatch.setattr(demo.tvmmoe, "trtllm_fp4_block_scale_moe", lambda **kwargs: [operator(**kwargs)[0] * wrong])
    assert demo.main(["--layer", "qwen3", "--tokens", "3"], LAYERS) == 1
    assert "qwen3, 3 tokens: relative L2 error " in capsys.readouterr().err


def test_fewer_experts_where_memory_is_short(monkeypatch, capsys):
    monkeypatch.setattr(demo, "free_bytes", lambda device: 1_500_000)
    assert demo.main(["--layer", "qwen3", "--tokens", "3"], LAYERS) == 0
    assert "6 experts instead of 16 (0.0 GB of memory free)" in capsys.readouterr().out
    monkeypatch.setattr(demo, "free_bytes", lambda device: 1000)
    assert demo.main(["--layer", "qwen3", "--tokens", "3"], LAYERS) == 1
    assert "qwen3: 0.0 GB of free memory hold 0 experts, top_k is 4" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--tokens", "0"], "--tokens: got '0', expected numbers from 1 on"),
        (["--tokens", "1,a"], "--tokens: got '1,a', expected numbers from 1 on"),
        (["--device", "meta"], "--device: got meta, expected cpu"),
        (["--layer", "gpt-2"], "invalid choice: 'gpt-2'"),
    ],
)
def test_bad_command_line_is_one_line(argv, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        demo.main(argv)
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_mode_without_artifact_fails(capsys):
    assert demo.main(["--layer", "qwen3", "--activation", "mxfp8", "--format", "nvfp4"], LAYERS) == 1
    assert "qwen3: weight_format: got nvfp4 with mxfp8 hidden_states, expected nvfp4 x nvfp4" in capsys.readouterr().err
