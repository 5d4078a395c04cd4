# SPDX-License-Identifier: Apache-2.0
"""Known calls skip validation, do what validated ones do, and are known only if nothing that validation looks at differs."""

import concurrent.futures
import enum

import numpy
import pytest
import torch
import tvm_ffi
from test_arguments import BF16, E_LOC, MODES, OVERLAPS, PER_TOKEN, REFUSED, U8, H, changed, valid, zeros
from torch.utils._python_dispatch import TorchDispatchMode

import tvmmoe
from tvmmoe import arguments, op, relaunch, torch_op
from tvmmoe.arguments import validate
from tvmmoe.config import ActivationType, RoutingMethodType
from tvmmoe.errors import ArgumentError, DtypeError, ShapeError, UnsupportedError
from tvmmoe.testing import make_case

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
moe = tvmmoe.trtllm_fp4_block_scale_moe
pytestmark = pytest.mark.skipif(relaunch._functions() is None, reason="needs torch 2.10 and the host artifact")


@pytest.fixture(autouse=True)
def nothing_known():
    relaunch.forget()
    yield
    relaunch.forget()


@pytest.fixture
def num_validated(monkeypatch):
    """A list that grows with every call that is validated."""
    calls = []
    monkeypatch.setattr(op, "validate", lambda *call: calls.append(call) or validate(*call))
    return calls


@pytest.fixture
def entry_calls(monkeypatch):
    """What entries are called with, from the second argument on (the first is the workspace); they do nothing."""
    calls = []
    selected = torch_op.selected_plan

    def plan(problem):
        entry = tvm_ffi.convert(lambda workspace, *rest: calls.append((tuple(workspace.shape), *rest)))
        return selected(problem)._replace(function=entry)

    monkeypatch.setattr(torch_op, "selected_plan", plan)
    return calls


def warm(call):
    """Make a call known."""
    moe(**call)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode", [{}, dict(activation_format="mxfp8"), dict(activation_format="nvfp4")], ids=str)
@pytest.mark.parametrize("is_given", [False, True], ids=["new_output", "given_output"])
def test_known_call_gives_the_same_on_other_data(is_given, mode, device, num_validated):
    if mode:
        form = arguments.ActivationFormat[mode["activation_format"]]
        mode = dict(activation_format=form, weight_format=arguments.WeightFormat(form == form.nvfp4))
    cases = [make_case(num_tokens=9, seed=seed, device=device, **mode) for seed in range(3)]
    expected = []
    for case in cases:
        relaunch.forget()
        expected += moe(**case)
    num_validated.clear()
    outputs = []
    for case in cases:
        given = dict(output=torch.empty(9, 128, dtype=BF16, device=device)) if is_given else {}
        outputs += moe(**case, **given)
        assert not is_given or outputs[-1] is given["output"]
    assert len(num_validated) == is_given  # without, the last of those above was like them
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))
    assert len({output.data_ptr() for output in outputs}) == 3


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode", MODES)
def test_entry_is_called_with_the_same(mode, device, entry_calls, num_validated):
    for activation in ActivationType:
        call = valid(mode, activation, device=device)
        for change in ({}, dict(routing_replay_out=None, enable_pdl=False), dict(routing_bias=None, n_group=1)):
            for _ in range(2):
                moe(**call | change)
            first, second = entry_calls[-2:]
            assert first == second
    assert len(num_validated) * 2 == len(entry_calls) == len(ActivationType) * 6


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize("mode, argument, change, error, text", REFUSED)
def test_refused_as_if_nothing_were_known(mode, argument, change, error, text, num_validated):
    call = valid(activation=mode) if isinstance(mode, ActivationType) else valid(mode)
    for output in (call["output"], None) if argument != "output" else (call["output"],):
        warm(call | dict(output=output))
        num_validated.clear()
        moe(**call | dict(output=output))
        assert not num_validated
        wrong = changed(call | dict(output=output), argument, change)
        with pytest.raises(error) as cold:
            validate(**wrong)
        with pytest.raises(error) as refusal:
            moe(**wrong)
        assert str(refusal.value) == str(cold.value)


THEIRS = enum.IntEnum("THEIRS", dict(SwigluStep=7, Llama4=3, Custom=6, eight=8))
LLAMA4 = dict(routing_method_type=RoutingMethodType.Llama4, top_k=1, routing_replay_out=None)
LOOK_ALIKES = {  # what is known, what is passed then
    "numpy_int": ({}, dict(num_experts=numpy.int64(8)), DtypeError),
    "int_enum": ({}, dict(num_experts=THEIRS.eight), DtypeError),
    "bool_for_int": (LLAMA4, dict(top_k=True), DtypeError),
    "int_for_bool": ({}, dict(do_finalize=1), DtypeError),
    "float_for_int": ({}, dict(top_k=2.0), DtypeError),
    "numpy_float": ({}, dict(routed_scaling_factor=numpy.float64(2.5)), DtypeError),
    "activation_for_method": (LLAMA4, dict(routing_method_type=ActivationType.Swiglu), UnsupportedError),
    "foreign_activation": (dict(activation_type=7), dict(activation_type=THEIRS.SwigluStep), UnsupportedError),
    "foreign_method": (dict(routing_method_type=6), dict(routing_method_type=THEIRS.Custom), UnsupportedError),
}


@pytest.mark.parametrize("label", LOOK_ALIKES)
def test_look_alikes_are_refused(label):
    known, change, error = LOOK_ALIKES[label]
    call = valid(activation=ActivationType(known.get("activation_type", 3))) | known
    warm(call)
    with pytest.raises(error, match=next(iter(change))):
        moe(**call | change)


@pytest.mark.parametrize(
    "known, change",
    [
        (dict(routed_scaling_factor=2.5), dict(routed_scaling_factor=0x4004000000000000)),  # the bits of 2.5
        (dict(routed_scaling_factor=-1), dict(routed_scaling_factor=2**64)),
        (dict(routed_scaling_factor=0.0), dict(routed_scaling_factor=-0.0)),
        (dict(enable_pdl=None), dict(enable_pdl=False)),
        (dict(n_group=None), dict(n_group=0)),
    ],
)
def test_other_values_are_another_call(known, change, num_validated):
    for call in (known, change):
        moe(**valid() | call)
    assert len(num_validated) == 2


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["routing_logits", "gemm1_weights", "gemm2_bias", "output"])
def test_another_device_is_seen(name):
    call = valid(device="cuda")
    warm(call)
    with pytest.raises(ArgumentError, match=f"{name}: got a tensor on cpu, expected cuda"):
        moe(**call | {name: call[name].cpu()})


def test_foreign_enum_that_is_right_is_validated(num_validated):
    call = valid() | LLAMA4
    warm(call)
    moe(**call | dict(routing_method_type=THEIRS.Llama4))
    assert len(num_validated) == 2


def as_int8(t):
    t.data = t.data.view(torch.int8)


IN_PLACE = {
    "transposed": ("gemm1_weights", lambda t: t.transpose_(1, 2), ArgumentError, "strides"),
    "strided": ("gemm2_weights", lambda t: t.as_strided_(t.shape, (16 * 128, 1, 128)), ArgumentError, "strides"),
    "dtype": ("gemm1_weights", as_int8, DtypeError, "got int8"),
    "rank": ("gemm1_weights_scale", lambda t: t.unsqueeze_(0), ShapeError, "got float8_e4m3fn [1, 4"),
    "smaller": ("gemm2_bias", lambda t: t.resize_(E_LOC, 64), ShapeError, "got float32 [4, 64]"),
    "other": ("gemm1_bias", lambda t: t.set_(zeros(3)), ShapeError, "got float32 [3]"),
}


@pytest.mark.parametrize("label", IN_PLACE)
def test_tensors_changed_in_place_are_seen(label, num_validated):
    name, change, error, text = IN_PLACE[label]
    call = valid(h=128, i=32)  # gemm1_weights [4, 64, 64]
    warm(call)
    moe(**call)
    assert len(num_validated) == 1
    change(call[name])
    with pytest.raises(error) as refusal:
        moe(**call)
    assert text in str(refusal.value) and str(refusal.value).startswith(name)


@pytest.mark.parametrize("name, written", [*OVERLAPS, ("output", "routing_replay_out")])
def test_overlap_is_seen(name, written, num_validated):
    call = valid(PER_TOKEN)
    warm(call)
    a, b = call[name], call[written]
    buffer = zeros(a.nbytes + b.nbytes, dtype=U8)
    last = (a.nbytes - 1) // b.element_size() * b.element_size()
    call[name] = buffer[: a.nbytes].view(a.dtype).view(a.shape)
    call[written] = buffer[last : last + b.nbytes].view(b.dtype).view(b.shape)
    with pytest.raises(ArgumentError, match="memory that .* shares"):
        moe(**call)
    call[written] = buffer[a.nbytes :].clone().view(b.dtype).view(b.shape)
    num_validated.clear()
    moe(**call)
    assert not num_validated


@pytest.mark.parametrize("name", arguments.refusals.ALIGNMENT)
def test_misaligned_data_is_seen(name, monkeypatch, num_validated):
    alignment = arguments.refusals.ALIGNMENT[name]

    def at(tensor, offset):
        buffer = zeros(tensor.nbytes + 64, dtype=U8)
        start = -buffer.data_ptr() % 32 + offset
        return buffer[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)

    call = valid("nvfp4")
    for other in arguments.refusals.ALIGNMENT:
        call[other] = at(call[other], 0)
    monkeypatch.setattr(arguments, "_ALIGNED_DEVICES", frozenset(("cpu",)))
    warm(call)
    moe(**call | {name: at(call[name], alignment)})
    assert len(num_validated) == 1
    with pytest.raises(ArgumentError, match=f"{name}: got data at 0x.*expected a multiple of {alignment}"):
        moe(**call | {name: at(call[name], alignment // 2)})


def test_pieces_and_no_tokens_are_never_known(num_validated):
    for _ in range(2):
        assert len(moe(**valid() | dict(do_finalize=False))) == 3
        assert moe(**valid(t=0) | dict(output=None))[0].shape == (0, H)
    assert len(num_validated) == 4


def test_subclasses_are_validated_every_time(num_validated):
    call = valid()
    call["gemm1_weights"] = call["gemm1_weights"].as_subclass(type("Mine", (torch.Tensor,), {}))
    for _ in range(2):
        moe(**call)
    assert len(num_validated) == 2


def test_parameters_are_known(num_validated):
    call = valid()
    call["gemm2_bias"] = torch.nn.Parameter(call["gemm2_bias"])
    for _ in range(2):
        moe(**call)
    assert len(num_validated) == 1


class Watched(TorchDispatchMode):
    """Sees what is allocated; may refuse the workspace."""

    def __init__(self, is_refused):
        super().__init__()
        self.is_refused, self.num_allocated = is_refused, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.empty.memory_format:
            self.num_allocated += 1
            if self.is_refused:
                raise torch.OutOfMemoryError("no memory left")
        return function(*args, **(kwargs or {}))


def test_workspace_is_torchs(num_validated):
    call = valid()
    warm(call)
    with Watched(False) as mode:
        moe(**call)
    assert mode.num_allocated == 1 == len(num_validated)


def test_no_memory_is_torchs_error():
    call = valid()
    warm(call)
    with Watched(True), pytest.raises(torch.OutOfMemoryError, match="no memory left"):
        moe(**call)
    moe(**call)


def test_error_of_the_entry_is_raised(monkeypatch):
    selected, is_broken = torch_op.selected_plan, []

    def entry(*args):
        if is_broken:
            raise RuntimeError("launch failed")

    functions = {}

    def plan(problem):
        return selected(problem)._replace(function=functions.setdefault(problem, tvm_ffi.convert(entry)))

    monkeypatch.setattr(torch_op, "selected_plan", plan)
    call = valid()
    warm(call)
    is_broken.append(True)
    with pytest.raises(RuntimeError, match="launch failed"):
        moe(**call)


def test_transformed_tensors_are_not_known():
    """Under vmap a tensor has the plain class but no memory."""
    call = valid()
    warm(call)
    batch = torch.stack([call["hidden_states"]] * 2)
    with pytest.raises(RuntimeError):
        torch.vmap(lambda hidden_states: moe(**call | dict(hidden_states=hidden_states))[0])(batch)


def test_every_number_of_tokens_has_its_own_plan(entry_calls, num_validated):
    """More signatures than are kept."""
    calls = [valid() | dict(tune_max_num_tokens=n) for n in (1, 2)]
    for call in calls * 2:
        moe(**call)
    assert len(num_validated) == 2
    call = calls[0]
    for n in range(3, 4100):
        moe(**call | dict(tune_max_num_tokens=n))
    num_validated.clear()
    for _ in range(2):
        moe(**call)
    assert len(num_validated) == 1


def test_threads():
    cases = [make_case(num_tokens=n, seed=n) for n in (1, 3, 8, 20)]
    expected = [moe(**case)[0] for case in cases]

    def work(i):
        return all(torch.equal(moe(**cases[j % 4])[0], expected[j % 4]) for j in range(i, i + 50))

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))


def test_forgetting_selects_anew(num_validated):
    call = valid()
    warm(call)
    relaunch.forget()
    moe(**call)
    assert len(num_validated) == 2
