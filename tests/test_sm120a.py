# SPDX-License-Identifier: Apache-2.0
"""Block-scaled mma.sync of sm_120a: the emulation against a scalar model of the ISA's text, kernels against references."""

import ctypes
import functools
import importlib.util
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from isa_model import B_VALUE, FORMS, SCALE, a_index, b_index, c_index, e2m1, make_operands, pack, scalar_model, unpack

from tvmmoe import abi, loader
from tvmmoe.config import ActivationFormat as A
from tvmmoe.config import ActivationType, WeightFormat
from tvmmoe.kernels.sm120a import emulation, layout
from tvmmoe.reference import moe_ref
from tvmmoe.testing import Case, make_case, poison, rel_l2, skip_unless_arch
from tvmmoe.workspace import max_num_tiles

HAS_TVM = importlib.util.find_spec("tvm") is not None
if HAS_TVM:
    from tvmmoe.kernels.nvcc import sass_by_kernel, sass_of
    from tvmmoe.kernels.sm120a import build, intrinsics, operator, simulate
    from tvmmoe.kernels.sm120a.tensor_intrin import matmul_source

SELECTORS = {
    "nvfp4": [(0, 0, 0, 0), (0, 1, 0, 3)],
    "mxfp4": [(0, 0, 0, 0), (2, 0, 0, 1), (0, 1, 2, 2)],
    "mxfp8": [(0, 0, 0, 0), (1, 0, 1, 0), (3, 1, 2, 3)],
}
ALL_SELECTORS = [(name, selectors) for name, several in SELECTORS.items() for selectors in several]
TILES = (8, 32, 64, 128)
needs_tvm = pytest.mark.skipif(not HAS_TVM, reason="needs tvm to build kernels")
on_hopper = [pytest.mark.gpu, skip_unless_arch("sm90a")]


# --------------------------------------------------------------------------------------- the emulation, run on the host

_HOST = r"""
struct AllLanes {
  const unsigned* words;
  unsigned operator()(int lane, int index) const { return words[8 * lane + index]; }
};
template <class Form> void warp(float* d, const unsigned* words, const int* s) {
  for (int lane = 0; lane < 32; ++lane)
    tvmmoe_emulate<Form>(AllLanes{words}, lane, d + 4 * lane, s[0], s[1], s[2], s[3]);
}
"""


@pytest.fixture(scope="session")
def host_emulation(tmp_path_factory):
    """Functions (d, words, selectors) by form: the emulation's text compiled by the host compiler for 32 lanes at once."""
    folder = tmp_path_factory.mktemp("emulation")
    text = emulation.MODEL + _HOST
    for name, form in FORMS.items():
        call = f"warp<{form.model}>(d, words, s);"
        text += f'extern "C" void {name}(float* d, const unsigned* words, const int* s) {{ {call} }}\n'
    (folder / "emulation.cpp").write_text(text)
    library = folder / "emulation.so"
    subprocess.run(
        ["g++", "-O1", "-shared", "-fPIC", "-std=c++17", "-o", library, folder / "emulation.cpp"], check=True
    )
    loaded = ctypes.CDLL(str(library))

    def call(name: str, words: np.ndarray, d: np.ndarray, selectors) -> np.ndarray:
        words, d, s = np.ascontiguousarray(words), d.copy(), np.array(selectors, np.int32)
        getattr(loaded, name)(*(array.ctypes.data_as(ctypes.c_void_p) for array in (d, words, s)))
        return d

    return call


class TestEmulation:
    @pytest.mark.parametrize("name", FORMS)
    def test_fragments_cover_matrices_once(self, name):
        k = FORMS[name].k
        elements = [(lane, i) for lane in range(32) for i in range(16 * k // 32)]
        assert len({a_index(k, *element) for element in elements}) == 16 * k
        assert len({b_index(k, *element) for element in elements if element[1] < 8 * k // 32}) == 8 * k
        assert len({c_index(lane, i) for lane in range(32) for i in range(4)}) == 128

    @pytest.mark.parametrize("name, selectors", ALL_SELECTORS)
    @pytest.mark.parametrize("seed", range(8))
    def test_emulation_matches_scalar_model(self, host_emulation, name, selectors, seed):
        x = make_operands(name, seed)
        words, d = pack(name, x, selectors, seed)
        actual = unpack(host_emulation(name, words, d, selectors))
        # Both are exact in float64 at these scales, so both round the same number.
        np.testing.assert_array_equal(actual, scalar_model(name, x).astype(np.float32))

    @pytest.mark.parametrize("name", ["mxfp4", "mxfp8"])
    @pytest.mark.parametrize("seed", range(8))
    def test_every_exponent_of_a_scale(self, host_emulation, name, seed):
        x = make_operands(name, seed, extreme=True)
        words, d = pack(name, x, (0, 0, 0, 0), seed)
        with np.errstate(over="ignore"):
            expected = scalar_model(name, x).astype(np.float32)
        np.testing.assert_allclose(unpack(host_emulation(name, words, d, (0, 0, 0, 0))), expected, rtol=1e-6)

    @pytest.mark.parametrize("name", FORMS)
    def test_nan_scale_spoils_its_row_or_column_only(self, host_emulation, name):
        x = make_operands(name, 0)
        x["scale_a"][5, -1] = x["scale_b"][3, 0] = 127 if name == "nvfp4" else 255
        words, d = pack(name, x, (0, 0, 0, 0), 0)
        is_nan = np.isnan(unpack(host_emulation(name, words, d, (0, 0, 0, 0))))
        expected = np.zeros((16, 8), bool)
        expected[5], expected[:, 3] = True, True
        np.testing.assert_array_equal(is_nan, expected)

    def test_sign_bit_of_ue4m3_is_ignored(self, host_emulation):
        x = make_operands("nvfp4", 1)
        words, d = pack("nvfp4", x, (0, 0, 0, 0), 1)
        signed = words.copy()
        signed[:, 6:] |= np.uint32(0x80808080)
        results = [host_emulation("nvfp4", w, d, (0, 0, 0, 0)) for w in (words, signed)]
        np.testing.assert_array_equal(*results)


# ------------------------------------------------------------------------------------------- one instruction in a kernel


def instruction(name: str):
    """The package's form of this name."""
    (form,) = (form for form in intrinsics.FORMS if form.name == name)
    return form


def single_mma(name: str, byte_id: int, emulate: bool) -> str:
    """CUDA C++ of ``mma(words, d)``: one warp, one instruction on registers [32, 8] and accumulators [32, 4]."""
    from tvm.script import tirx as T
    from tvm.script.ir_builder import IRBuilder

    from tvmmoe.kernels.sm90a.trace import I, cast, kernel, ptx, regs

    with IRBuilder() as builder, I.prim_func():
        I.func_name("mma")
        I.func_attr({"global_symbol": "mma"})
        words = I.arg("words", I.buffer([256], "uint32"))
        d = I.arg("d", I.buffer([128], "float32"))
        with kernel("mma", T.int32(1), 32) as thread:
            lane, r, acc = cast(thread.lane, "int64"), regs(8, "uint32"), regs(4, "float32")
            for i in range(8):
                ptx["ld.global.b32"](r[i], words.ptr_to([lane * 8 + i]))
            for i in range(4):
                ptx["ld.global.f32"](acc[i], d.ptr_to([lane * 4 + i]))
            registers = [r[i] for i in range(8)]
            intrinsics.mma(instruction(name), acc, 0, registers[:4], registers[4:6], registers[6], registers[7],
                           byte_id=byte_id, emulate=emulate)  # fmt: skip
            for i in range(4):
                ptx["st.global.f32"](d.ptr_to([lane * 4 + i]), acc[i])
    return build.packed_source({"mma": builder.get})


@needs_tvm
@pytest.mark.parametrize("name", FORMS)
def test_mma_becomes_one_instruction(name, tmp_path):
    build.compile_so(single_mma(name, 0, emulate=False), tmp_path / "mma.so", build.NATIVE)
    found = re.findall(r"\b[A-Z]*MMA[.\w]*", sass_of(tmp_path / "mma.so"))
    assert found == [FORMS[name].opcode]


# ----------------------------------------------------------------------------------------------------- TensorIntrins


@needs_tvm
@pytest.mark.parametrize("name", FORMS)
class TestTensorIntrin:
    def test_schedule_becomes_the_instruction(self, name, tmp_path):
        build.compile_so(matmul_source(instruction(name), 32, 16, 256), tmp_path / "mma.so", build.NATIVE)
        assert set(re.findall(r"\b[A-Z]*MMA[.\w]*", sass_of(tmp_path / "mma.so"))) == {FORMS[name].opcode}

    def test_schedule_computes_the_product(self, name, tmp_path):
        import tvm_ffi

        form, m, n, k = instruction(name), 32, 16, 256
        simulate.compile_so(simulate.host_source(matmul_source(form, m, n, k)), tmp_path / "mma.so")
        rng, low = np.random.default_rng(0), 0 if name == "nvfp4" else 120
        a, b = (rng.integers(0, 16, (rows, k)) for rows in (m, n))
        if name == "mxfp8":
            b = rng.integers(0, 127, (n, k))
        scales = [rng.integers(low, low + 15, (rows, k // form.block_size)).astype(np.uint8) for rows in (m, n)]
        packed = [(codes[:, ::2] | codes[:, 1::2] << 4).astype(np.uint8) for codes in (a, b)]
        tokens = b.astype(np.uint8) if name == "mxfp8" else packed[1]
        out = torch.empty(m, n)
        operands = [torch.from_numpy(x) for x in (packed[0], scales[0], tokens, scales[1])]
        tvm_ffi.load_module(str(tmp_path / "mma.so"))["matmul"](*operands, out)
        values = [np.vectorize(e2m1)(a), np.vectorize(B_VALUE[name])(b)]
        values = [
            v * np.vectorize(SCALE[name])(s).repeat(form.block_size, 1) for v, s in zip(values, scales, strict=True)
        ]
        np.testing.assert_allclose(out.numpy(), values[0] @ values[1].T, rtol=1e-5, atol=1e-5 * abs(out.numpy()).max())


# ------------------------------------------------------------------------------------------------ the kernels, simulated

MX, NV = WeightFormat.mxfp4, WeightFormat.nvfp4
SMALL = dict(num_tokens=11, hidden_size=64, intermediate_size=64, num_experts=4, top_k=2)
FORMAT = {MX: dict(weight_format=MX, activation_format=A.mxfp8), NV: dict(weight_format=NV, activation_format=A.nvfp4)}
SIMULATED = {  # tails in K and in rows, scale rows that start anywhere, every epilogue
    "plain": {},
    "k_tails": dict(hidden_size=288, intermediate_size=160),
    "smallest": dict(hidden_size=32, intermediate_size=32),
    "bias_clamp": dict(alpha=1.7, beta=1.0, clamp_limit=7.0, has_gemm1_bias=True, has_gemm2_bias=True),
    "geglu": dict(activation=ActivationType.Geglu, has_gemm1_bias=True, hidden_size=96, alpha=1.702),
    "relu2": dict(activation=ActivationType.Relu2, intermediate_size=96, has_gemm1_bias=True),
    "identity": dict(activation=ActivationType.Identity, intermediate_size=96),
    "experts_1_to_2": dict(local_expert_offset=1, local_num_experts=2),
    "one_expert": dict(num_tokens=37, routing="one_expert"),
    "bf16": dict(activation_format=A.bf16, hidden_size=288, intermediate_size=160),
    "bf16_relu2": dict(activation_format=A.bf16, activation=ActivationType.Relu2, intermediate_size=96),
    "bf16_options": dict(activation_format=A.bf16, alpha=1.7, beta=1.0, clamp_limit=7.0, has_gemm1_bias=True,
                         has_gemm2_bias=True),
}  # fmt: skip
PER_TOKEN = {"per_token": dict(has_per_token_scale=True), "per_token_relu2": dict(
    has_per_token_scale=True, activation=ActivationType.Relu2)}  # fmt: skip
SIMULATED_IDS = [(f, name) for f in FORMAT for name in (*SIMULATED, *(PER_TOKEN if f is NV else ()))]


def simulated_case(weight_format: WeightFormat, name: str) -> Case:
    return Case(**SMALL | FORMAT[weight_format] | (SIMULATED | PER_TOKEN)[name])


@functools.cache
def shipped(weight_format: WeightFormat) -> dict:
    """The variants that ship, by tile height."""
    from tvmmoe.build import CUDA_TARGETS, shipped_variants

    return {variant.tile_m: variant for variant in shipped_variants(CUDA_TARGETS["sm120a"], weight_format)}


def gemms_source(variant) -> str:
    """CUDA C++ of what lies between permute and finalize."""
    return build.packed_source({variant.symbol: functools.partial(operator.gemms, variant)})


@functools.cache
def simulated(weight_format: WeightFormat, tile_m: int, early: bool, folder: Path):
    """The packed function of what lies between permute and finalize, compiled for this CPU."""
    import tvm_ffi

    variant = shipped(weight_format)[tile_m]
    path = folder / f"{variant.symbol}_{early}.so"
    simulate.compile_so(simulate.host_source(gemms_source(variant), early), path)
    return tvm_ffi.load_module(str(path))[variant.symbol]


def call_arguments(case: Case, kwargs: dict, results: dict[str, torch.Tensor]) -> tuple:
    """Pointers, ints and factor of the artifact ABI."""
    pointers = {name: value.data_ptr() for name, value in (kwargs | results).items() if isinstance(value, torch.Tensor)}
    bias = kwargs["routing_bias"]
    ints = kwargs | dict(
        num_tokens=case.num_tokens,
        hidden_size=case.hidden_size,
        output_hidden_size=case.hidden_size,
        n_group=kwargs["n_group"] or 0,
        topk_group=kwargs["topk_group"] or 0,
        routing_method=kwargs["routing_method_type"],
        activation=case.activation,
        activation_format=case.activation_format,
        logits_is_bf16=kwargs["routing_logits"].dtype == torch.bfloat16,
        bias_is_bf16=bias is not None and bias.dtype == torch.bfloat16,
        do_finalize="output" in results,
        enable_pdl=True,
    )
    scale = kwargs["routed_scaling_factor"]
    return (
        *(pointers.get(name, 0) for name in abi.POINTERS),
        *(int(ints[name]) for name in abi.INTS),
        1.0 if scale is None else float(scale),
    )


def workspace_with_tiles(case: Case, tile_m: int, rows_of_pairs: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
    """Poisoned workspace that holds what route and permute leave behind."""
    sizes = (case.num_tokens, case.top_k, case.hidden_size, case.intermediate_size, case.num_local_experts, tile_m)
    pieces, size = layout.slices(*sizes, case.weight_format)
    workspace = poison(torch.empty(size, dtype=torch.uint8))
    live = rows_of_pairs >= 0
    tile_of_pair = rows_of_pairs[live] // tile_m
    num_tiles = int(tile_of_pair.max()) + 1 if live.any() else 0
    tile_expert = torch.zeros(num_tiles, dtype=torch.int32)
    tile_expert[tile_of_pair] = experts[live] - case.local_expert_offset
    values = {
        "tile_expert": tile_expert,
        "tile_rows": tile_of_pair.bincount(minlength=num_tiles),
        "num_tiles": torch.tensor([num_tiles]),
        "expanded_idx_to_permuted_idx": rows_of_pairs,
    }
    for name, value in values.items():
        data = value.int().view(torch.uint8)
        workspace[pieces[name].offset :][: len(data)] = data
    return workspace


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("simulated")


@needs_tvm
class TestSimulatedKernels:
    """The generated kernels on the CPU, data movement and epilogues included; the instruction is the emulation's text."""

    def run(self, case: Case, kwargs: dict, tile_m: int, folder: Path, early: bool) -> tuple[torch.Tensor, ...]:
        """gemm2_output, the reference's, and the live rows of both."""
        replay = torch.empty(case.num_tokens, case.top_k, dtype=torch.int16)
        expected, _, rows = moe_ref(**kwargs | dict(do_finalize=False, routing_replay_out=replay), tile_m=tile_m)
        max_rows = tile_m * max_num_tiles(len(rows), case.num_local_experts, tile_m)
        out = torch.zeros(max_rows, case.hidden_size, dtype=torch.bfloat16)
        workspace = workspace_with_tiles(case, tile_m, rows, replay.flatten().int())
        function = simulated(case.weight_format, tile_m, early, folder)
        function(workspace, *call_arguments(case, kwargs, {"gemm2_output": out}))
        return out, expected, rows[rows >= 0].long()

    def check(self, case: Case, tile_m: int, folder: Path, early: bool) -> None:
        out, expected, live = self.run(case, make_case(case), tile_m, folder, early)
        assert rel_l2(out[live], expected[live]) < case.tolerance
        padding = torch.ones(len(out), dtype=torch.bool)
        padding[live] = False
        assert not out[padding].any()

    @pytest.mark.parametrize("weight_format, name", SIMULATED_IDS)
    def test_small_tile_matches_reference(self, weight_format, name, folder):
        self.check(simulated_case(weight_format, name), 8, folder, early=False)

    @pytest.mark.parametrize("tile_m", [32, 64, 128])
    @pytest.mark.parametrize("weight_format", FORMAT)
    def test_other_tiles_match_reference(self, weight_format, tile_m, folder):
        sizes = dict(num_tokens=83, hidden_size=160, intermediate_size=96, num_experts=2, top_k=1)
        for name in ("bias_clamp", "relu2", "bf16_options", "bf16_relu2"):
            case = Case(**vars(simulated_case(weight_format, name)) | sizes)
            self.check(case, tile_m, folder, early=False)

    @pytest.mark.parametrize("weight_format", FORMAT)
    def test_copies_may_arrive_at_once(self, weight_format, folder):
        case = Case(**vars(simulated_case(weight_format, "plain")) | dict(hidden_size=1056, intermediate_size=1056))
        for early in (False, True):
            self.check(Case(**vars(case) | dict(num_tokens=3, num_experts=2, top_k=1)), 8, folder, early)

    @pytest.mark.parametrize("weight_format", FORMAT)
    def test_nan_scales_spoil_their_own_row_only(self, weight_format, folder):
        """The scales of a row end inside a word that the next row continues: what is loaded past the end must be zero."""
        case = Case(**vars(simulated_case(weight_format, "plain")) | dict(intermediate_size=160))
        kwargs = make_case(case)
        kwargs["gemm2_weights_scale"].view(torch.uint8)[:, 1::2] = 0xFF if weight_format is MX else 0x7F
        out, expected, live = self.run(case, kwargs, 8, folder, early=False)
        assert out[live][:, 1::2].isnan().all()
        assert rel_l2(out[live][:, ::2], expected[live][:, ::2]) < case.tolerance


@needs_tvm
@pytest.mark.parametrize("tile_m", TILES)
@pytest.mark.parametrize("weight_format", FORMAT)
def test_kernels_are_instructions_without_spills(weight_format, tile_m, tmp_path):
    variant = shipped(weight_format)[tile_m]
    log = build.compile_so(gemms_source(variant), tmp_path / "moe.so", build.NATIVE)
    assert re.search(r"\b0 bytes spill stores", log) and not re.search(r"[1-9]\d* bytes spill", log)
    functions = sass_by_kernel(tmp_path / "moe.so")
    for name in ("gemm1", "gemm1_gated", "gemm2"):
        sass = functions[f"{variant.symbol}_{name}"]
        assert set(re.findall(r"\b[A-Z]*MMA[.\w]*", sass)) == {FORMS[variant.gemm1.form.name].opcode}
        assert "LDSM.16.M88.4" in sass and "LDGSTS" in sass and not re.search(r"\b(LDL|STL)\b", sass)
        sass = functions[f"{variant.symbol}_{name}_bf16"]
        assert set(re.findall(r"\b[A-Z]*MMA\.[.\w]*", sass)) == {"HMMA.16816.F32.BF16"}


@needs_tvm
@pytest.mark.parametrize("weight_format", FORMAT)
def test_emulated_kernels_compile_for_sm90(weight_format, tmp_path):
    source = gemms_source(shipped(weight_format)[8].emulated)
    build.compile_so(source, tmp_path / "moe.so", build.EMULATED_SM90)
    assert not re.search(r"\b[OQ]MMA", sass_of(tmp_path / "moe.so"))


# --------------------------------------------------------------------------------------------------- emulated on Hopper

EMULATED_MMAS = [("nvfp4", 0), ("mxfp4", 0), ("mxfp4", 2), ("mxfp8", 0), ("mxfp8", 3)]


def emulated_source(weight_format: WeightFormat) -> str:
    """CUDA C++ of every variant that ships, the instruction emulated."""
    return build.cuda_source([variant.emulated for variant in shipped(weight_format).values()])


def gpu_modules() -> dict[str, Callable[[], tuple[str, str]]]:
    """What the tests below load, by file name: CUDA C++ and the target to compile it for."""
    mmas = {
        f"mma_{name}_{byte}_emulated": lambda name=name, byte=byte: (single_mma(name, byte, True), build.EMULATED)
        for name, byte in EMULATED_MMAS
    }
    return mmas | {emulated_file(f): lambda f=f: (emulated_source(f), build.EMULATED_SM90) for f in WeightFormat}


def emulated_file(weight_format: WeightFormat) -> str:
    return f"moe_{weight_format.name}_sm120a_emulated"


@functools.cache
def gpu_function(name: str, symbol: str, folder: Path):
    """A packed function of ``gpu_modules``: the file among the artifacts, if it was built before, or built now."""
    import tvm_ffi

    built = sorted(loader.artifacts_dir().rglob(f"{name}.so"))
    path = built[0] if built else folder / f"{name}.so"
    if not built:
        if not HAS_TVM:
            pytest.skip(f"needs tvm, or {name}.so built before")
        source, gencode = gpu_modules()[name]()
        build.compile_so(source, path, gencode)
    return tvm_ffi.load_module(str(path))[symbol]


@pytest.mark.parametrize("name, byte_id", EMULATED_MMAS)
class TestEmulatedInstruction:
    pytestmark = on_hopper

    def test_shuffles_match_scalar_model(self, name, byte_id, folder):
        function = gpu_function(f"mma_{name}_{byte_id}_emulated", "mma", folder)
        for seed in range(4):
            x = make_operands(name, seed)
            words, d = pack(name, x, (byte_id, 0, byte_id, 0), seed)
            words, d = torch.from_numpy(words.reshape(-1)).cuda(), torch.from_numpy(d.reshape(-1)).cuda()
            function(words, d)
            expected = scalar_model(name, x).astype(np.float32)
            np.testing.assert_array_equal(unpack(d.cpu().numpy().reshape(32, 4)), expected)


BASE = dict(num_tokens=37, hidden_size=256, intermediate_size=256, num_experts=16, top_k=4)
EMULATED = {
    "one_token": dict(num_tokens=1),
    "odd_scale_rows": dict(hidden_size=416, intermediate_size=352, num_experts=4),
    "gpt_oss": dict(hidden_size=2880, intermediate_size=2880, num_experts=4, alpha=1.702, beta=1.0, clamp_limit=7.0,
                    has_gemm1_bias=True, has_gemm2_bias=True),
    "experts_5_to_11": dict(local_expert_offset=5, local_num_experts=7),
    "one_expert": dict(num_tokens=300, routing="one_expert"),
    "empty_expert": dict(routing="empty_expert"),
    "chunks_of_pairs": dict(num_tokens=1100, num_experts=32, top_k=8, hidden_size=64, intermediate_size=64),
    **SIMULATED,
}  # fmt: skip
EMULATED_IDS = [(f, name) for f in FORMAT for name in (*EMULATED, *(PER_TOKEN if f is NV else ()))]


def check_operator(file: str, weight_format: WeightFormat, name: str, tile_m: int, folder: Path) -> None:
    """One variant of ``file`` on poisoned memory against the reference, twice."""
    case = Case(**BASE | FORMAT[weight_format] | (EMULATED | PER_TOKEN)[name])
    kwargs = make_case(case)
    (expected,) = moe_ref(**kwargs)
    kwargs = {key: value.cuda() if isinstance(value, torch.Tensor) else value for key, value in kwargs.items()}
    sizes = (case.num_tokens, case.top_k, case.hidden_size, case.intermediate_size, case.num_local_experts, tile_m)
    function, runs = gpu_function(file, f"fp4_block_scale_moe_{weight_format.name}_m{tile_m}", folder), []
    for _ in range(2):
        workspace = torch.empty(layout.workspace_bytes(*sizes, weight_format), dtype=torch.uint8, device="cuda")
        output = torch.empty(case.num_tokens, case.hidden_size, dtype=torch.bfloat16, device="cuda")
        arguments = call_arguments(case, kwargs, {"output": poison(output)})
        function(poison(workspace), *arguments)
        runs.append(output.cpu())
    assert torch.equal(*runs)
    assert rel_l2(runs[0], expected) < case.tolerance


@pytest.mark.parametrize("tile_m", TILES)
@pytest.mark.parametrize("weight_format, name", EMULATED_IDS)
class TestEmulatedOperator:
    pytestmark = on_hopper

    def test_emulated_operator_matches_reference(self, weight_format, name, tile_m, folder):
        check_operator(emulated_file(weight_format), weight_format, name, tile_m, folder)


@pytest.mark.parametrize("tile_m", TILES)
@pytest.mark.parametrize("weight_format, name", EMULATED_IDS)
class TestShippedOperator:
    pytestmark = [pytest.mark.gpu, skip_unless_arch("sm120a")]

    def test_shipped_operator_matches_reference(self, weight_format, name, tile_m, folder):
        check_operator(f"moe_{weight_format.name}_sm120a", weight_format, name, tile_m, folder)


# Build what the gpu tests load, for a machine without tvm: python tests/test_sm120a.py FOLDER, there TVMMOE_ARTIFACTS=FOLDER
if __name__ == "__main__":
    target = Path(sys.argv[1])
    for file_name, make in gpu_modules().items():
        cuda, gencode = make()
        build.compile_so(cuda, target / f"{file_name}.so", gencode)
    shutil.copy(loader.artifacts_dir() / "manifest.json", target)
