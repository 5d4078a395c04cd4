# SPDX-License-Identifier: Apache-2.0
"""The registered op under torch.library's own checks, torch.compile, streams, devices and CUDA graphs."""

import contextlib
import dataclasses
import enum
import inspect
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import tvmmoe
from tvmmoe import torch_op
from tvmmoe.config import ActivationFormat as A
from tvmmoe.config import ActivationType
from tvmmoe.config import WeightFormat as W
from tvmmoe.errors import DtypeError, UnsupportedError
from tvmmoe.testing import make_case, poison

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DEFAULTS = {
    name: parameter.default
    for name, parameter in inspect.signature(tvmmoe.trtllm_fp4_block_scale_moe).parameters.items()
    if parameter.default is not inspect.Parameter.empty
}


def op_arguments(**kwargs):
    """Positional arguments of the registered op."""
    names = inspect.signature(tvmmoe.trtllm_fp4_block_scale_moe).parameters
    arguments = {**DEFAULTS, **kwargs}
    for name in ("routing_method_type", "activation_type"):
        arguments[name] = int(arguments[name])
    return tuple(arguments[name] for name in names)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode", [{}, dict(activation_format=A.nvfp4, weight_format=W.nvfp4)], ids=["bf16", "nvfp4"])
@pytest.mark.parametrize("result", ["new", "in_place", "pieces"])
def test_opcheck(result, mode, device):
    kwargs = make_case(num_tokens=5, **mode, device=device)
    if result == "in_place":
        kwargs["output"] = torch.empty(5, 128, dtype=torch.bfloat16, device=device)
        kwargs["routing_replay_out"] = torch.zeros(5, 2, dtype=torch.int16, device=device)
    kwargs["do_finalize"] = result != "pieces"
    for name in ("hidden_states_scale", "gemm1_weights_scale", "gemm2_weights_scale"):
        if kwargs[name] is not None:
            kwargs[name] = kwargs[name].view(torch.uint8)  # test_schema compares by arithmetic, which float8 lacks
    op = torch.ops.tvmmoe.fp4_block_scale_moe.default
    # No autograd: the operator is for inference. Backends differ in nothing else.
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(op, op_arguments(**kwargs), test_utils=checks)


@pytest.mark.parametrize("device", DEVICES)
def test_compiled_in_place_output_is_the_callers(device):
    kwargs = make_case(num_tokens=6, device=device)
    output = poison(torch.empty(6, 128, dtype=torch.bfloat16, device=device))

    @torch.compile(fullgraph=True, backend="aot_eager")
    def layer(output):
        (result,) = tvmmoe.trtllm_fp4_block_scale_moe(**kwargs, output=output)
        return result + 1

    (expected,) = tvmmoe.trtllm_fp4_block_scale_moe(**kwargs)
    assert torch.equal(layer(output), expected + 1)
    assert torch.equal(output, expected)


@pytest.mark.parametrize("device", DEVICES)
def test_compiled_once_for_two_sizes(device):
    """The second size marks tokens as dynamic; the op's fake takes symbols."""
    layer = torch.compile(
        lambda **kwargs: tvmmoe.trtllm_fp4_block_scale_moe(**kwargs)[0], fullgraph=True, backend="aot_eager", dynamic=True
    )
    for num_tokens in (5, 9, 17):
        kwargs = make_case(num_tokens=num_tokens, device=device)
        assert torch.equal(layer(**kwargs), tvmmoe.trtllm_fp4_block_scale_moe(**kwargs)[0])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("is_known", [False, True], ids=["first", "known"])
def test_what_traces_without_dynamo_sees_the_op(is_known, device):
    """make_fx and torch.jit.trace record what the dispatcher sees: of an eager call that would be uninitialised memory."""
    kwargs = make_case(num_tokens=5 + is_known, hidden_size=160, device=device)
    if is_known:
        tvmmoe.trtllm_fp4_block_scale_moe(**kwargs)

    def layer(hidden_states):
        return tvmmoe.trtllm_fp4_block_scale_moe(**kwargs | dict(hidden_states=hidden_states))[0]

    graphs = make_fx(layer)(kwargs["hidden_states"]), torch.jit.trace(layer, (kwargs["hidden_states"],), check_trace=False)
    other = kwargs["hidden_states"].flip(0)
    expected = layer(other)
    assert all(torch.equal(graph(other), expected) for graph in graphs)


@pytest.mark.parametrize("is_inside", [True, False], ids=["in_its_mode", "outside"])
def test_fake_tensors_give_fake_results(is_inside):
    kwargs, mode = make_case(num_tokens=5), FakeTensorMode(allow_non_fake_inputs=True)
    kwargs["hidden_states"] = mode.from_tensor(kwargs["hidden_states"])
    with mode if is_inside else contextlib.nullcontext():
        (result,) = tvmmoe.trtllm_fp4_block_scale_moe(**kwargs)
    assert isinstance(result, FakeTensor) and result.shape == (5, 128) and result.dtype == torch.bfloat16


def test_results_have_no_gradients_whatever_requires_them():
    """Eager and compiled: a layer whose router is trained elsewhere runs forward, without torch.no_grad."""
    kwargs = make_case(num_tokens=5)
    router = torch.nn.Linear(128, 8)

    def layer(x):
        logits = router(x.float())
        return tvmmoe.trtllm_fp4_block_scale_moe(**kwargs | dict(hidden_states=x, routing_logits=logits))[0]

    eager, compiled = layer(kwargs["hidden_states"]), torch.compile(layer, backend="aot_eager")(kwargs["hidden_states"])
    assert torch.equal(eager, compiled) and not eager.requires_grad and not compiled.requires_grad


class ForeignActivation(enum.IntEnum):
    SwigluStep = 7  # Identity is this number here


class ForeignMethod(enum.IntEnum):
    Custom = 6


@pytest.mark.parametrize("argument, value, message", [
    ("activation_type", ForeignActivation.SwigluStep, "activation_type: got 7 (SwigluStep)"),
    ("routing_method_type", ForeignMethod.Custom, "routing_method_type: got 6 (Custom)"),
    ("top_k", True, "top_k: got bool"),
])  # fmt: skip
def test_traced_calls_refuse_what_eager_ones_refuse(argument, value, message):
    kwargs = make_case(num_tokens=5, activation=ActivationType.Identity) | {argument: value}
    for call in (tvmmoe.trtllm_fp4_block_scale_moe, torch_op.traced):
        with pytest.raises((UnsupportedError, DtypeError), match=re.escape(message)):
            call(**DEFAULTS | kwargs)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(lambda: tvmmoe.trtllm_fp4_block_scale_moe(**kwargs)[0], fullgraph=True, backend="aot_eager")()


def check_on_streams(cases, rounds: int) -> None:
    """Each case on a stream of its own, all at once: results as if it were alone."""
    expected = [tvmmoe.trtllm_fp4_block_scale_moe(**case)[0] for case in cases]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in cases]
    outputs = [[] for _ in cases]
    for _ in range(rounds):
        for case, stream, mine in zip(cases, streams, outputs, strict=True):
            with torch.cuda.stream(stream):
                mine.append(tvmmoe.trtllm_fp4_block_scale_moe(**case)[0])
    torch.cuda.synchronize()
    for mine, wanted in zip(outputs, expected, strict=True):
        assert all(torch.equal(output, wanted) for output in mine)


@pytest.mark.gpu
def test_streams_do_not_disturb_each_other():
    sizes = dict(hidden_size=512, intermediate_size=512)
    check_on_streams([make_case(num_tokens=n, **sizes, seed=n, device="cuda") for n in (3, 70, 200)], rounds=10)


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 2, 3])
def test_kernels_that_wait_for_each_others_tiles_share_the_gpu(num_tokens):
    """Both GEMMs of few tokens are one kernel. Of several at once none has all SMs, and none may wait for ever."""
    sizes = dict(num_tokens=num_tokens, hidden_size=2080, intermediate_size=2016, num_experts=32, top_k=8)
    check_on_streams([make_case(**sizes, seed=seed, device="cuda") for seed in range(6)], rounds=40)


@pytest.mark.gpu
def test_first_call_of_a_thread():
    """It has no CUDA context yet: everything was allocated elsewhere."""
    case = make_case(num_tokens=4, device="cuda")
    expected = tvmmoe.trtllm_fp4_block_scale_moe(**case)[0]
    with ThreadPoolExecutor(1) as pool:
        output = pool.submit(lambda: tvmmoe.trtllm_fp4_block_scale_moe(**case)[0]).result()
    torch.cuda.synchronize()
    assert torch.equal(output, expected)


@pytest.mark.gpu
def test_work_is_on_the_current_stream():
    """A call behind a long kernel on a side stream has not run when the host comes back; the default stream is idle."""
    case = make_case(num_tokens=4, device="cuda")
    tvmmoe.trtllm_fp4_block_scale_moe(**case)
    output = torch.zeros(4, 128, dtype=torch.bfloat16, device="cuda")
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        tvmmoe.trtllm_fp4_block_scale_moe(**case, output=output)
        done = stream.record_event()
    assert not done.query()
    assert torch.cuda.current_stream().query()
    done.synchronize()
    assert output.any()


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_of_another_device_than_the_current():
    cases = [make_case(num_tokens=20, device=f"cuda:{i}") for i in range(2)]
    with torch.cuda.device(0):
        outputs = [tvmmoe.trtllm_fp4_block_scale_moe(**case)[0] for case in cases]
    assert [output.device.index for output in outputs] == [0, 1]
    for i, case in enumerate(cases):
        with torch.cuda.device(i):
            assert torch.equal(tvmmoe.trtllm_fp4_block_scale_moe(**case)[0], outputs[i])
    with pytest.raises(tvmmoe.ArgumentError, match="cuda:1"):
        mixed = cases[0] | {"routing_logits": cases[1]["routing_logits"]}
        tvmmoe.trtllm_fp4_block_scale_moe(**mixed)


def test_gpu_without_artifact_names_itself_and_the_command(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))  # older than anything compiled
    monkeypatch.setattr(torch_op, "gpu_name", lambda device: "NVIDIA T4")
    problem = torch_op.validate(**{**DEFAULTS, **make_case(num_tokens=2)})
    with pytest.raises(tvmmoe.UnsupportedError, match=r"for sm75, expected sm80 or newer; shipped: .*sm90a"):
        torch_op.selected_entry(dataclasses.replace(problem, device=torch.device("cuda:7")))
