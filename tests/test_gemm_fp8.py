# SPDX-License-Identifier: Apache-2.0
"""mxfp8 x mxfp4 on fp8 wgmma: its arithmetic and the whole operator simulated on a CPU, then the artifact on a Hopper GPU.

Hard inputs change scales of a random call. Those outside of the window must be as near to the reference as others are: they
show whether rows and tokens outside are found, and what is then done with them.
"""

import functools
import importlib.util
import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch

import tvmmoe
from tvmmoe import loader, relaunch, select, torch_op
from tvmmoe.config import ActivationFormat, ActivationType
from tvmmoe.kernels.sm90a import layout
from tvmmoe.reference import moe_ref
from tvmmoe.testing import Case, make_case, rel_l2, skip_unless_arch

HAS_TVM = importlib.util.find_spec("tvm") is not None
if HAS_TVM:
    import tvm_ffi

    from tvmmoe.kernels.sm90a import build, operator, operator_fp8, simulate, tile_scheduler
    from tvmmoe.kernels.sm90a import intrinsics_fp8 as fp8
    from tvmmoe.kernels.sm90a.trace import (
        Smem,
        address,
        cast,
        cuda,
        kernel,
        let,
        load,
        load_vec4,
        regs,
        store,
        store_to,
        store_vec4,
        u32,
    )
    from tvmmoe.kernels.sm120a.simulate import compile_so

needs_tvm = pytest.mark.skipif(not HAS_TVM, reason="needs tvm to build kernels")
on_hopper = [pytest.mark.gpu, skip_unless_arch("sm90a")]
TILE_M = 128
SCALES = ("hidden_states_scale", "gemm1_weights_scale", "gemm2_weights_scale")
MAGNITUDES = (0, 0.5, 1, 1.5, 2, 3, 4, 6)
# A sum whose error moves z across a midpoint of e4m3 changes it by a sixteenth; of a few thousand z some do. Over many tokens
# and columns that averages out: 1e-3 ... 4.6e-3 on the H100. A small call has few z, of which one more or less counts: 7e-3.
SMALL_TOLERANCE = 1.5e-2
TOLERANCE = 6e-3


# --------------------------------------------------------------------------------------------------------- hard inputs


def shifted(kwargs: dict, name: str, low: int, high: int, generator: torch.Generator) -> None:
    """Add a random number of octaves from ``low`` to ``high`` - 1 to every scale."""
    scale = kwargs[name].int()
    step = torch.randint(low, high, scale.shape, generator=generator, device=scale.device)
    kwargs[name] = (scale + step).clamp(0, 254).to(torch.uint8)


def spread_weights(kwargs, generator):
    for name in SCALES[1:]:
        shifted(kwargs, name, -10, 11, generator)


def widest_weights(kwargs, generator):
    for name in SCALES[1:]:
        kwargs[name] = torch.full_like(kwargs[name], int(kwargs[name].max()))
        shifted(kwargs, name, -14, 1, generator)


def two_rows_outside(kwargs, generator):
    for name in SCALES[1:]:
        kwargs[name][0, 3, 0] -= 30
        kwargs[name][1, 20, 1] += 13


def zero_blocks(kwargs, generator):
    """Byte 0 and codes +0 or -0, as encoders leave them; whole rows, too."""
    for name in ("gemm1_weights", "gemm2_weights"):
        weights, scale = kwargs[name], kwargs[f"{name}_scale"]
        is_zero = torch.rand(scale.shape, generator=generator, device=scale.device) < 0.3
        is_zero[:, 5] = True
        scale[is_zero] = 0
        blocks = weights.view(*scale.shape, 16)
        blocks[is_zero] = 0
        blocks[:, 7, 0], scale[:, 7, 0] = 0x88, 0


def byte_zero_is_a_scale(kwargs, generator):
    for name in SCALES[1:]:
        kwargs[name][:, 2, 0] = 0


def spread_tokens(kwargs, generator):
    shifted(kwargs, "hidden_states_scale", -10, 11, generator)


def widest_tokens(kwargs, generator):
    scale = kwargs["hidden_states_scale"]
    kwargs["hidden_states_scale"] = torch.full_like(scale, int(scale.max()))
    shifted(kwargs, "hidden_states_scale", -8, 1, generator)


def outlier_channels(kwargs, generator):
    kwargs["hidden_states_scale"][:, 1] += 14


def outliers_without_weights(kwargs, generator):
    """What remains is all below half a subnormal step of the token's largest value."""
    outlier_channels(kwargs, generator)
    kwargs["gemm1_weights"][..., 16:32] = 0


def one_huge_token(kwargs, generator):
    kwargs["hidden_states_scale"][1] += 40


def far_exponents(kwargs, generator):
    kwargs["hidden_states_scale"] += 90
    kwargs["gemm1_weights_scale"] -= 90


HARD = {
    f.__name__: f
    for f in (
        spread_weights, widest_weights, two_rows_outside, zero_blocks, byte_zero_is_a_scale, spread_tokens, widest_tokens,
        outlier_channels, outliers_without_weights, one_huge_token, far_exponents,
    )
}  # fmt: skip
BASE = Case(num_tokens=24, hidden_size=256, intermediate_size=256, num_experts=4, activation_format=ActivationFormat.mxfp8)
CASES = {
    "plain": {},
    "one_token": dict(num_tokens=1),
    "odd_scale_rows": dict(hidden_size=416, intermediate_size=352),
    "longer_than_the_pipeline": dict(hidden_size=1184, intermediate_size=608),
    "smallest": dict(hidden_size=32, intermediate_size=32),
    "bias": dict(hidden_size=288, has_gemm1_bias=True, has_gemm2_bias=True, alpha=1.702, beta=1.0, clamp_limit=7.0),
    "relu2": dict(activation=ActivationType.Relu2, intermediate_size=416, has_gemm1_bias=True),
    "identity": dict(activation=ActivationType.Identity, intermediate_size=224),
    "experts_1_to_2": dict(local_expert_offset=1, local_num_experts=2),
}  # fmt: skip
ON_GPU = {
    "gpt_oss": dict(hidden_size=2880, intermediate_size=2880, alpha=1.702, beta=1.0, clamp_limit=7.0, has_gemm1_bias=True,
                    has_gemm2_bias=True),
    "geglu": dict(activation=ActivationType.Geglu, has_gemm1_bias=True),
    "one_expert": dict(num_tokens=300, routing="one_expert"),
    "all_widths": dict(num_tokens=777, num_experts=8),
    "chunks_of_pairs": dict(num_tokens=1100, num_experts=32, top_k=8, hidden_size=64, intermediate_size=64),
}  # fmt: skip
LARGE = dict(num_tokens=512, hidden_size=4096, intermediate_size=1024, num_experts=8)


def arguments_of(case: Case, name: str) -> dict:
    """Arguments of a call, made hard in the way of that name."""
    kwargs = make_case(case)
    for scale in SCALES:
        kwargs[scale] = kwargs[scale].view(torch.uint8).clone()
    if name in HARD:
        HARD[name](kwargs, torch.Generator(case.device).manual_seed(1))
    return kwargs


def check(run: Callable[[Case, dict], torch.Tensor], case: Case, name: str, tolerance: float) -> None:
    kwargs = arguments_of(case, name)
    outputs = [run(case, kwargs).cpu() for _ in range(2)]
    assert torch.equal(*(output.view(torch.int16) for output in outputs))
    on_cpu = {key: value.cpu() if isinstance(value, torch.Tensor) else value for key, value in kwargs.items()}
    (expected,) = moe_ref(**on_cpu)
    if name == "one_huge_token":  # nothing else would be seen beside it
        outputs[0][1] = expected[1] = 0
    assert rel_l2(outputs[0], expected) < tolerance


# ---------------------------------------------------------------------------------------------------------- arithmetic


def test_k_order_covers_a_block_once():
    assert sorted(map(fp8.k_of_position, range(layout.K_BLOCK))) == list(range(layout.K_BLOCK))


def e4m3(codes: np.ndarray) -> np.ndarray:
    return torch.from_numpy(codes.astype(np.uint8)).view(torch.float8_e4m3fn).double().numpy()


def probe_source(emit: Callable, threads: int) -> str:
    """Host C++ of one kernel: ``emit(thread, out)`` with the int64 addresses of an input and of an output buffer."""
    import tvm
    from tvm.script.ir_builder import IRBuilder
    from tvm.tirx.script.builder import ir as I  # noqa: E741

    def make():
        with IRBuilder() as builder:
            with I.prim_func():
                I.func_name("probe_moe_fp8")
                I.func_attr({"global_symbol": "probe_moe_fp8", "tirx.kernel_launch_params": operator.LAUNCH_PARAMS})
                I.arg("anchor", I.buffer([tvm.tirx.Var("size", "int64")], "uint8"))
                source, out = I.arg("source", I.int64()), I.arg("out", I.int64())
                I.arg("enable_pdl", I.int64())
                with kernel("probe", 1, threads) as thread:
                    emit(thread, source, out)
        return builder.get()

    return simulate.host_source(build.packed_source({"probe_moe_fp8": make}))


def run_probe(emit: Callable, threads: int, source: np.ndarray, out: np.ndarray, folder) -> np.ndarray:
    path = folder / f"{emit.__name__}.so"
    compile_so(probe_source(emit, threads), path)
    anchor = torch.empty(1, dtype=torch.uint8)
    tvm_ffi.load_module(str(path))["probe_moe_fp8"](anchor, source.ctypes.data, out.ctypes.data, 0)
    return out


@needs_tvm
class TestArithmetic:
    def test_decode_is_exact_inside_of_the_window(self, tmp_path):
        def decode(thread, source, out):
            smem = Smem()
            table = smem.alloc(fp8.TABLE_BYTES, "uint8", 128)
            smem.commit()
            fp8.write_table_entry(table, thread.tid)
            cuda.cta_sync()
            entry, registers = regs(2, "uint32"), regs(4, "uint32")
            for i in range(2):
                store(entry, load("uint32", table.ptr_to([thread.tid * 8 + 4 * i]), "shared"), i)
            for i, word in enumerate((0x76543210, 0xFEDCBA98)):
                fp8.decode_word(u32(word), entry, registers, 0, u32(fp8.SIGN_TEST))
                for h in range(2):
                    at = cast(thread.tid * 16 + i * 8 + h * 4, "int64")
                    store_to("uint32", address(out, at), let(registers[2 * h]))

        out = run_probe(decode, fp8.TABLE_ENTRIES, np.zeros(1), np.zeros((fp8.TABLE_ENTRIES, 16), np.uint8), tmp_path)
        values = np.array([*MAGNITUDES, *(-m for m in MAGNITUDES)])
        for entry in range(fp8.TABLE_ENTRIES):
            exact = values * 2.0 ** (entry - 255 + fp8.TOP_EXPONENT)
            if entry >= 255 - fp8.MAX_SPREAD:
                assert np.array_equal(e4m3(out[entry]), exact)
            assert np.abs(e4m3(out[entry]) - exact).max() <= 2.0**-10

    def test_fold_rounds_to_the_nearest(self, tmp_path):
        def fold(thread, source, out):
            words = load_vec4(address(source, cast(thread.tid % 16 * 16, "int64")))
            fp8.fold(words, let(thread.tid // 16))
            store_vec4(address(out, cast(thread.tid * 16, "int64")), words)

        codes = np.arange(256, dtype=np.uint8)
        out = run_probe(fold, 256, codes, np.zeros((16, 256), np.uint8), tmp_path)
        for shift in range(16):
            exact = torch.from_numpy(e4m3(codes) * 2.0**-shift).to(torch.float8_e4m3fn).double().numpy()
            assert np.array_equal(e4m3(out[shift]), exact, equal_nan=True)

    def test_extremes_of_bytes_that_start_anywhere(self, tmp_path):
        lengths = (1, 3, 8, 16, 45, 48, 64, 90, 224)

        def extremes(thread, source, out):
            for i, length in enumerate(lengths):
                start = let(source + cast(thread.tid * 337 + 256 * i * 64, "int64"))
                top, bottom = fp8.byte_extremes(start, let(cast(u32(length), "int32")))
                at = cast((thread.tid * len(lengths) + i) * 8, "int64")
                store_to("int32", address(out, at), top)
                store_to("int32", address(out, at + 4), bottom)

        rng = np.random.default_rng(0)
        source = rng.integers(0, 256, 337 * 64 + 256 * 64 * len(lengths) + 256, dtype=np.uint8)
        out = run_probe(extremes, 64, source, np.zeros((64, len(lengths), 2), np.int32), tmp_path)
        for row, (i, length) in itertools.product(range(64), enumerate(lengths)):
            part = source[row * 337 + 256 * i * 64 :][:length]
            assert out[row, i].tolist() == [part.max(), part.min()]

    def test_half_powers_multiply_to_the_scale(self, tmp_path):
        def powers(thread, source, out):
            for i, half in enumerate(fp8.half_powers(let(cast(thread.tid, "uint32")))):
                store_to("float32", address(out, cast(thread.tid * 8 + 4 * i, "int64")), half)

        out = run_probe(powers, 256, np.zeros(1), np.zeros((256, 2), np.float32), tmp_path).astype(np.float64)
        assert np.array_equal(out[:255].prod(1), 2.0 ** (np.arange(255) - 127.0))
        assert np.isnan(out[255].prod())
        assert np.abs(np.log2(out[:255])).max() <= 64


# ----------------------------------------------------------------------------------------------- the operator, simulated


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("simulated_fp8")


def source_of() -> str:
    """CUDA C++ of the operator on two clusters."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tile_scheduler, "NUM_CTAS", 2 * operator_fp8.GEMM.cluster)
        return build.fp8_source.__wrapped__()


@functools.cache
def simulated(early: bool, folder):
    """The packed function, compiled for this CPU."""
    path = folder / f"fp8_{early}.so"
    compile_so(simulate.host_source(source_of(), early), path)
    return tvm_ffi.load_module(str(path))[operator_fp8.SYMBOL]


def run_function(function) -> Callable[[Case, dict], torch.Tensor]:
    from test_sm90a import call

    return lambda case, kwargs: call(case, kwargs, TILE_M, do_finalize=True, function=function)[0]


@needs_tvm
class TestSimulatedOperator:
    @pytest.mark.parametrize("name", [*CASES, *HARD])
    def test_late_copies(self, name, folder):
        case = Case(**vars(BASE) | CASES.get(name, {}))
        check(run_function(simulated(False, folder)), case, name, SMALL_TOLERANCE)

    @pytest.mark.parametrize("name", ["plain", "longer_than_the_pipeline", "two_rows_outside"])
    def test_early_copies(self, name, folder):
        case = Case(**vars(BASE) | CASES.get(name, {}))
        check(run_function(simulated(True, folder)), case, name, SMALL_TOLERANCE)


# ------------------------------------------------------------------------------------------------------------ on the GPU


@functools.cache
def fp8_entry():
    (entry,) = (entry for entry in loader.manifest().entries if entry.accumulation == "fp8")
    return entry


def shipped():
    return loader.load(loader.manifest(), fp8_entry().file)[fp8_entry().symbol]


class TestOnHopper:
    pytestmark = on_hopper

    @pytest.mark.parametrize("name", [*CASES, *ON_GPU, *HARD])
    def test_small(self, name):
        case = Case(**vars(BASE) | (CASES | ON_GPU).get(name, {}) | dict(device="cuda"))
        check(run_function(shipped()), case, name, SMALL_TOLERANCE)

    @pytest.mark.parametrize("from_float", [False, True], ids=["random_codes", "from_float"])
    def test_large(self, from_float):
        case = Case(**vars(BASE) | LARGE | dict(device="cuda", from_float=from_float))
        check(run_function(shipped()), case, "plain", TOLERANCE)

    @pytest.mark.parametrize("name", HARD)
    def test_large_and_hard(self, name):
        check(run_function(shipped()), Case(**vars(BASE) | LARGE | dict(device="cuda")), name, TOLERANCE)


@pytest.fixture
def asked_for(monkeypatch):
    """The variable set, and nothing remembered of calls without it; also for a file that has only been compiled."""

    def forget():
        torch_op.selected_plan.cache_clear()
        relaunch.forget()

    monkeypatch.setenv(select.FP8, "1")
    monkeypatch.setenv(select.ALLOW_UNVERIFIED, "1")
    forget()
    yield
    forget()


@pytest.mark.filterwarnings("ignore::tvmmoe.UnverifiedWarning")
@pytest.mark.usefixtures("asked_for")
class TestPublicOperatorOnHopper:
    pytestmark = on_hopper

    @pytest.mark.parametrize("name", ["plain", *HARD])
    def test_fp8_serves_the_call(self, name):
        case = Case(**vars(BASE) | LARGE | dict(device="cuda"))

        def run(case: Case, kwargs: dict) -> torch.Tensor:
            problem = tvmmoe.arguments.validate(**torch_op.with_defaults(**kwargs))
            assert torch_op.selected_plan(problem).entry == fp8_entry()
            return tvmmoe.trtllm_fp4_block_scale_moe(**kwargs)[0].clone()

        check(run, case, name, TOLERANCE)
