# SPDX-License-Identifier: Apache-2.0
"""The portable operator: simulated on the CPU thread by thread, and on a GPU, where the driver compiles its PTX.

Both go through the artifact ABI, poisoned memory, and a second run whose results must be the same bits.
"""

import dataclasses
import functools
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_sm90a import call  # the workspace is Hopper's

from tvmmoe import loader
from tvmmoe.config import ActivationFormat as A
from tvmmoe.config import ActivationType, WeightFormat
from tvmmoe.config import RoutingMethodType as Method
from tvmmoe.kernels.sm90a import layout
from tvmmoe.reference import moe_ref
from tvmmoe.testing import Case, make_case, rel_l2

HAS_TVM = importlib.util.find_spec("tvm") is not None
if HAS_TVM:
    from tvmmoe.build import CUDA_TARGETS
    from tvmmoe.kernels import nvcc
    from tvmmoe.kernels.sm80 import build, gemm1, operator
    from tvmmoe.kernels.sm120a import simulate

TILES = (8, 16, 32, 64, 128)
MX, NV = WeightFormat.mxfp4, WeightFormat.nvfp4
needs_tvm = pytest.mark.skipif(not HAS_TVM, reason="needs tvm to build kernels")
NVFP4 = dict(activation_format=A.nvfp4, weight_format=NV)
OPTIONS = dict(alpha=1.702, beta=1.0, clamp_limit=7.0, has_gemm1_bias=True, has_gemm2_bias=True)


def file_name(weight_format: WeightFormat) -> str:
    """As build.file_name, for a machine without tvm."""
    return f"moe_{weight_format.name}_sm80.so"


def symbol_of(weight_format: WeightFormat, tile_m: int) -> str:
    return f"fp4_block_scale_moe_{weight_format.name}_m{tile_m}"


def run_twice(function, case: Case, kwargs: dict, tile_m: int, do_finalize: bool, device: str) -> list[torch.Tensor]:
    """Results on the CPU, the same in two runs."""
    there = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in kwargs.items()}
    runs = [[t.cpu() for t in call(case, there, tile_m, do_finalize, function)] for _ in range(2)]
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first.view(torch.uint8), second.view(torch.uint8))
    return runs[0]


def check(function, case: Case, tile_m: int, do_finalize: bool, device: str) -> None:
    """One case against the reference."""
    kwargs = make_case(case)
    replay = torch.empty(case.num_tokens, case.top_k, dtype=torch.int16)
    expected = moe_ref(**kwargs | dict(do_finalize=do_finalize, routing_replay_out=replay), tile_m=tile_m)
    *results, ids = run_twice(function, case, kwargs, tile_m, do_finalize, device)
    assert torch.equal(ids, replay)
    if do_finalize:
        assert rel_l2(results[0], expected[0]) < case.tolerance
        return
    assert torch.equal(results[1], expected[1])
    is_local = expected[2] >= 0
    assert torch.equal(results[2] >= 0, is_local)
    rows = results[2][is_local].long()
    assert len(rows.unique()) == len(rows)
    assert rel_l2(results[0][rows], expected[0][expected[2][is_local].long()]) < case.tolerance
    padding = torch.ones(len(results[0]), dtype=torch.bool)
    padding[rows] = False
    assert not results[0][padding].any()


def check_every_scale(function, weight_format: WeightFormat, tile_m: int, device: str) -> None:
    """One expert, one token, 256 rows a GEMM, each row with a scale byte of its own."""
    size, is_mx = 256, weight_format is MX
    activation_format = A.bf16
    case = Case(1, size, size, 1, 1, activation_format, weight_format, activation=ActivationType.Identity)
    last = 255 if is_mx else 127  # its NaN
    bytes_of_rows = torch.arange(size).remainder(256 if is_mx else 128).to(torch.uint8)
    bytes_of_rows[bytes_of_rows == last] = 0
    one = 127 if is_mx else 0x38
    for gemm in (1, 2):
        kwargs = make_case(case)
        for n in (1, 2):
            # The tested GEMM has 0.5 in column n of row n, or in all where no sum can overflow; the other is the identity.
            codes = torch.zeros(size, size, dtype=torch.uint8)
            codes.fill_diagonal_(1 if n == gemm else 2)
            kwargs[f"gemm{n}_weights"].copy_((codes[:, ::2] | codes[:, 1::2] << 4)[None])
            scale = kwargs[f"gemm{n}_weights_scale"].view(torch.uint8)
            scale.copy_(bytes_of_rows[None, :, None].expand_as(scale) if n == gemm else torch.full_like(scale, one))
        kwargs["hidden_states"].fill_(1)
        for name in ("output1_scale_scalar", "output1_scale_gate_scalar", "output2_scale_scalar"):
            if kwargs[name] is not None:
                kwargs[name].fill_(1)
        kwargs["routing_logits"].zero_()
        expected = moe_ref(**kwargs)[0]
        (actual, _) = run_twice(function, case, kwargs, tile_m, True, device)
        assert expected.isfinite().all() and expected.abs().gt(0).sum() >= (255 if is_mx else 126)
        assert torch.equal(actual, expected)


def check_nan_rows(function, weight_format: WeightFormat, tile_m: int, device: str) -> None:
    """A NaN scale spoils its own row only; scale rows of 5 or 10 bytes share words with the next."""
    case = Case(11, 64, 160, 4, 2, A.bf16, weight_format)
    kwargs = make_case(case)
    kwargs["gemm2_weights_scale"].view(torch.uint8)[:, 1::2] = 0xFF if weight_format is MX else 0x7F
    expected = moe_ref(**kwargs)[0]
    (actual, _) = run_twice(function, case, kwargs, tile_m, True, device)
    assert actual[:, 1::2].isnan().all()
    assert rel_l2(actual[:, ::2], expected[:, ::2]) < case.tolerance


# ------------------------------------------------------------------------------------------------------- plain functions


@needs_tvm
def test_z_is_in_k_order():
    columns = [int(gemm1.column_of(position)) for position in range(256)]
    assert columns == [position // 128 * 128 + layout.k_of_position(position % 128) for position in range(256)]


@needs_tvm
@pytest.mark.parametrize("weight_format", WeightFormat)
def test_stages_fit_the_smallest_shared_memory(weight_format):
    for tile_m in TILES:
        config = operator.config(weight_format, tile_m)
        assert config.tile_m == tile_m and config.smem_bytes <= 99 * 1024
    assert TILES == tuple(operator.TILES)


# ------------------------------------------------------------------------------------------------------ compiled for sm_80


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """(path, nvcc's log) of a weight format's artifact."""

    @functools.cache
    def make(weight_format: WeightFormat) -> tuple[Path, str]:
        path = tmp_path_factory.mktemp("sm80") / build.file_name(weight_format)
        return path, compile_artifact(weight_format, path)

    return make


def compile_artifact(weight_format: WeightFormat, path: Path) -> str:
    """Build the file that ships; returns nvcc's log."""
    return build.compile_so(build.cuda_source(build.variants(weight_format)), path, *CUDA_TARGETS["sm80"].gencodes)


@needs_tvm
@pytest.mark.parametrize("weight_format", WeightFormat)
class TestArtifact:
    def test_gemms_are_bf16_mma_without_spills(self, weight_format, compiled):
        path, log = compiled(weight_format)
        assert path.name == file_name(weight_format)
        assert re.search(r"\b0 bytes spill stores", log) and not re.search(r"[1-9]\d* bytes spill", log)
        functions = nvcc.sass_by_kernel(path)
        for tile_m in TILES:
            for name in ("gemm1", "gemm1_gated", "gemm2"):
                sass = functions[f"{symbol_of(weight_format, tile_m)}_{name}"]
                assert set(re.findall(r"\b[A-Z]*MMA\.[.\w]*", sass)) == {"HMMA.16816.F32.BF16"}
                assert "LDSM.16.M88.4" in sass and "LDGSTS" in sass and not re.search(r"\b(LDL|STL)\b", sass)

    def test_ptx_asks_for_nothing_newer_than_sm80(self, weight_format, compiled):
        ptx = nvcc.ptx_of(compiled(weight_format)[0])
        assert re.findall(r"^\.target (.*)$", ptx, re.M) == ["sm_80"]
        assert "mma.sync.aligned.m16n8k16" in ptx and "griddepcontrol" not in ptx

    def test_file_needs_no_driver_to_load(self, weight_format, compiled):
        import tvm_ffi

        path, _ = compiled(weight_format)
        needed = subprocess.run(["readelf", "-d", path], capture_output=True, text=True, check=True).stdout
        assert "libcuda" not in needed and "libtvm_ffi" in needed
        module = tvm_ffi.load_module(str(path))
        assert all(module[symbol_of(weight_format, tile_m)] for tile_m in TILES)


# -------------------------------------------------------------------------------------------------------------- simulated

SMALL = Case(num_tokens=11, hidden_size=64, intermediate_size=64, num_experts=4, top_k=2)
SIMULATED = {  # tails in K and in rows, scale rows that start anywhere, every epilogue and every format
    "bf16": {},
    "one_token": dict(num_tokens=1),
    "k_tails": dict(hidden_size=288, intermediate_size=160),
    "smallest": dict(hidden_size=32, intermediate_size=32),
    "options": OPTIONS,
    "geglu": dict(activation=ActivationType.Geglu, has_gemm1_bias=True, hidden_size=96, alpha=1.702),
    "relu2": dict(activation=ActivationType.Relu2, intermediate_size=96, has_gemm1_bias=True),
    "identity": dict(activation=ActivationType.Identity, intermediate_size=224),
    "experts_1_to_2": dict(local_expert_offset=1, local_num_experts=2),
    "one_expert": dict(num_tokens=37, routing="one_expert"),
    "mxfp8": dict(activation_format=A.mxfp8, hidden_size=288),
    "bf16_nvfp4": dict(weight_format=NV, hidden_size=96, intermediate_size=352),
    "options_nvfp4": dict(weight_format=NV, **OPTIONS),
    "relu2_nvfp4": dict(weight_format=NV, activation=ActivationType.Relu2, intermediate_size=96, has_gemm1_bias=True),
    "nvfp4": dict(**NVFP4, hidden_size=288, intermediate_size=160),
    "nvfp4_per_token": dict(**NVFP4, has_per_token_scale=True),
}  # fmt: skip


@functools.cache
def simulated(weight_format: WeightFormat, tile_m: int, early: bool, folder: Path):
    """The packed function compiled for this CPU."""
    import tvm_ffi

    config = operator.config(weight_format, tile_m)
    source = build.cuda_source([operator.Variant(config, config)])
    path = folder / f"{config.symbol}_{early}.so"
    simulate.compile_so(simulate.host_source(source, early), path)
    return tvm_ffi.load_module(str(path))[config.symbol]


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("sm80")


@needs_tvm
class TestSimulatedOperator:
    """All kernels on the CPU; the mma is computed from the ISA's fragment layout."""

    @pytest.mark.parametrize("name", SIMULATED)
    def test_smallest_tile_matches_reference(self, name, folder):
        case = dataclasses.replace(SMALL, **SIMULATED[name])
        check(simulated(case.weight_format, 8, False, folder), case, 8, name in ("bf16", "one_token"), "cpu")

    @pytest.mark.parametrize("tile_m", [16, 32, 64, 128])
    @pytest.mark.parametrize("weight_format", WeightFormat)
    def test_other_tiles_match_reference(self, weight_format, tile_m, folder):
        sizes = dict(num_tokens=83, hidden_size=160, intermediate_size=96, num_experts=2, top_k=1)
        for options in (OPTIONS, dict(activation=ActivationType.Relu2)):
            case = Case(**sizes, **options, weight_format=weight_format)
            check(simulated(weight_format, tile_m, False, folder), case, tile_m, False, "cpu")

    @pytest.mark.parametrize("weight_format", WeightFormat)
    def test_copies_may_arrive_at_once(self, weight_format, folder):
        case = Case(1, 64, 1056, 1, 1, weight_format=weight_format)  # gemm2: more steps than stages
        for early in (False, True):
            check(simulated(weight_format, 8, early, folder), case, 8, True, "cpu")

    @pytest.mark.parametrize("weight_format", WeightFormat)
    def test_every_scale_byte(self, weight_format, folder):
        check_every_scale(simulated(weight_format, 8, False, folder), weight_format, 8, "cpu")

    @pytest.mark.parametrize("weight_format", WeightFormat)
    def test_nan_scales_spoil_their_own_row_only(self, weight_format, folder):
        check_nan_rows(simulated(weight_format, 8, False, folder), weight_format, 8, "cpu")


# --------------------------------------------------------------------------------------------------------------- on a GPU

BASE = Case(num_tokens=37, hidden_size=256, intermediate_size=256, num_experts=16, top_k=4)
CASES = {
    **SIMULATED,
    "odd_scale_rows": dict(hidden_size=416, intermediate_size=352, num_experts=4),
    "gpt_oss": dict(hidden_size=2880, intermediate_size=2880, num_experts=4, **OPTIONS),
    "gpt_oss_nvfp4": dict(hidden_size=2880, intermediate_size=2880, num_experts=4, weight_format=NV),
    "experts_5_to_11": dict(local_expert_offset=5, local_num_experts=7),
    "one_expert": dict(num_tokens=300, routing="one_expert"),
    "empty_expert": dict(routing="empty_expert"),
    "chunks_of_pairs": dict(num_tokens=1100, num_experts=32, top_k=8, hidden_size=64, intermediate_size=64),
}  # fmt: skip
ROUTES = {
    **{method.name: dict(routing_method=method, top_k=1 if method == Method.Llama4 else 8) for method in Method},
    "groups": dict(routing_method=Method.DeepSeekV3, top_k=8, n_group=8, topk_group=4, routed_scaling_factor=2.5,
                   routing_bias_dtype=torch.float32),
}  # fmt: skip


@functools.cache
def gpu_function(weight_format: WeightFormat, tile_m: int, folder: Path):
    """A variant of the file among the artifacts, or of one built now."""
    import tvm_ffi

    name = file_name(weight_format)
    built = sorted(loader.artifacts_dir().rglob(name))
    path = built[0] if built else folder / name
    if not path.is_file():
        compile_artifact(weight_format, path)
    return tvm_ffi.load_module(str(path))[symbol_of(weight_format, tile_m)]


@pytest.mark.gpu
class TestOperator:
    @pytest.mark.parametrize("do_finalize", [True, False], ids=["finalize", "pieces"])
    @pytest.mark.parametrize("tile_m", TILES)
    @pytest.mark.parametrize("name", CASES)
    def test_variant_matches_reference(self, name, tile_m, do_finalize, folder):
        case = dataclasses.replace(BASE, **CASES[name])
        check(gpu_function(case.weight_format, tile_m, folder), case, tile_m, do_finalize, "cuda")

    @pytest.mark.parametrize("logits_dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
    @pytest.mark.parametrize("name", ROUTES)
    def test_route_matches_reference(self, name, logits_dtype, folder):
        sizes = dict(num_tokens=65, hidden_size=64, intermediate_size=64, num_experts=128, logits_dtype=logits_dtype)
        case = dataclasses.replace(BASE, **sizes, **ROUTES[name])
        check(gpu_function(MX, 8, folder), case, 8, False, "cuda")

    @pytest.mark.parametrize("tile_m", TILES)
    @pytest.mark.parametrize("weight_format", WeightFormat)
    def test_every_scale_byte(self, weight_format, tile_m, folder):
        check_every_scale(gpu_function(weight_format, tile_m, folder), weight_format, tile_m, "cuda")

    @pytest.mark.parametrize("tile_m", TILES)
    @pytest.mark.parametrize("weight_format", WeightFormat)
    def test_nan_scales_spoil_their_own_row_only(self, weight_format, tile_m, folder):
        check_nan_rows(gpu_function(weight_format, tile_m, folder), weight_format, tile_m, "cuda")


if __name__ == "__main__":  # build what the gpu tests load, for a machine without tvm: python tests/test_sm80.py FOLDER
    for form in WeightFormat:
        compile_artifact(form, Path(sys.argv[1]) / build.file_name(form))
