# SPDX-License-Identifier: Apache-2.0
"""Every variant of the Hopper artifacts, called through the artifact ABI, against the reference.

The public operator only reaches the variant that the selection table names; here each one meets every mode, tails in K
and in rows, all routing methods, poisoned memory, and a second run. Some of them are also simulated on the CPU.
"""

import functools
import importlib.util
import itertools

import pytest
import torch

from tvmmoe import abi, loader
from tvmmoe.config import ActivationFormat as A
from tvmmoe.config import ActivationType, WeightFormat
from tvmmoe.config import RoutingMethodType as Method
from tvmmoe.kernels.sm90a import layout
from tvmmoe.reference import moe_ref, permute_ref, route_ref
from tvmmoe.testing import Case, make_case, poison, rel_l2, skip_unless_arch
from tvmmoe.workspace import Slice, max_num_tiles

HAS_TVM = importlib.util.find_spec("tvm") is not None
if HAS_TVM:
    import tvm_ffi
    from tvm.script import tirx as T

    from tvmmoe.kernels.sm90a import build, simulate, tile_scheduler
    from tvmmoe.kernels.sm90a.operator import hand_chosen
    from tvmmoe.kernels.sm90a.trace import let
    from tvmmoe.kernels.sm120a.simulate import compile_so

TILES = (8, 16, 32, 64, 96, 256)
BASE = Case(num_tokens=37, hidden_size=256, intermediate_size=256, num_experts=16, top_k=4)
MX, NV = WeightFormat.mxfp4, WeightFormat.nvfp4
CASES = {
    "bf16": {},
    "one_token": dict(num_tokens=1),
    "last_of_prologue": dict(num_tokens=16),
    "last_of_arrange": dict(num_tokens=512, hidden_size=64, intermediate_size=64),
    "odd_scale_rows": dict(hidden_size=416, intermediate_size=352, num_experts=4),
    "gpt_oss": dict(hidden_size=2880, intermediate_size=2880, num_experts=4, alpha=1.702, beta=1.0, clamp_limit=7.0,
                    has_gemm1_bias=True, has_gemm2_bias=True),
    # So many sums that two runs would hardly round all of them alike if their order differed
    "many_sums": dict(num_tokens=16, hidden_size=1024, intermediate_size=1536, num_experts=32, top_k=8),
    "smallest": dict(hidden_size=32, intermediate_size=32),
    "top_11": dict(num_experts=12, top_k=11),
    # Rows of scales are whole pieces of 16 bytes, three of mxfp4
    "held_scales": dict(num_tokens=300, hidden_size=1536, num_experts=4, top_k=2),
    "held_scales_ungated": dict(num_tokens=200, hidden_size=1536, num_experts=4, top_k=2, activation=ActivationType.Relu2),
    "geglu": dict(activation=ActivationType.Geglu, has_gemm1_bias=True, alpha=1.702),
    "relu2": dict(activation=ActivationType.Relu2, intermediate_size=416, has_gemm1_bias=True),
    "identity": dict(activation=ActivationType.Identity, intermediate_size=224),
    "ungated_odd_scale_rows": dict(activation=ActivationType.Relu2, hidden_size=1056, num_experts=4),
    "experts_5_to_11": dict(local_expert_offset=5, local_num_experts=7),
    "one_expert": dict(num_tokens=300, routing="one_expert"),
    "empty_expert": dict(routing="empty_expert"),
    "empty_expert_of_a_rank": dict(routing="empty_expert", local_expert_offset=2, local_num_experts=6),
    "chunks_of_pairs": dict(num_tokens=1100, num_experts=32, top_k=8, hidden_size=64, intermediate_size=64),
    # More than 1024 columns are for the other gemm2 of 8 and 16 tokens.
    "mxfp8": dict(activation_format=A.mxfp8, hidden_size=288, intermediate_size=1056),
    "bf16_nvfp4": dict(weight_format=NV, hidden_size=96, intermediate_size=352),
    "bf16_nvfp4_long": dict(weight_format=NV, hidden_size=96, intermediate_size=1120),
    "nvfp4": dict(activation_format=A.nvfp4, weight_format=NV, hidden_size=288, intermediate_size=160),
    "nvfp4_per_token": dict(activation_format=A.nvfp4, weight_format=NV, has_per_token_scale=True, intermediate_size=1056),
    # Rows of scales are whole pieces of 16 bytes, and end inside of a stage of 32
    "nvfp4_aligned": dict(weight_format=NV, num_tokens=150, hidden_size=768, intermediate_size=1280, num_experts=4),
    # (gemm1 at 8 columns alone: others have 8 bytes a stage without a gate)
    "nvfp4_aligned_ungated": dict(weight_format=NV, activation=ActivationType.Relu2, hidden_size=1280, num_experts=4),
}  # fmt: skip
# Up to four tokens: at 8 columns, gated and without per-token scales, routing and both GEMMs are one kernel, of up to 256
# experts, 32 pairs and 24 that are to be expected of ours.
FEW_TOKENS = {
    "two_tokens": dict(num_tokens=2, hidden_size=416, intermediate_size=352, has_gemm1_bias=True, has_gemm2_bias=True),
    "gpt_oss": dict(CASES["gpt_oss"], num_tokens=2, num_experts=16),
    "many_items": dict(num_tokens=1, hidden_size=4128, intermediate_size=2080, num_experts=32, top_k=8),
    "geglu": dict(num_tokens=2, activation=ActivationType.Geglu, hidden_size=160, intermediate_size=1056),
    "relu2": dict(num_tokens=2, activation=ActivationType.Relu2),
    "top_32": dict(num_tokens=1, num_experts=64, top_k=32, hidden_size=96, local_num_experts=48),
    "most_pairs": dict(num_tokens=4, num_experts=24, top_k=8, hidden_size=96, local_expert_offset=3, local_num_experts=18),
    "more_of_ours": dict(num_tokens=4, num_experts=24, top_k=8, hidden_size=96, local_num_experts=19),
    "one_expert": dict(num_tokens=2, num_experts=1, top_k=1, hidden_size=160),
    "more_pairs": dict(num_tokens=3, num_experts=64, top_k=11, hidden_size=96, local_num_experts=8),
    "most_experts": dict(num_tokens=4, num_experts=256, top_k=6, hidden_size=96, routing_method=Method.DeepSeekV3,
                         n_group=8, topk_group=4, routed_scaling_factor=2.5, routing_bias_dtype=torch.float32),
    "more_experts": dict(num_tokens=1, num_experts=264, top_k=8, hidden_size=96, routing_method=Method.Default),
    "experts_5_to_11": dict(num_tokens=2, local_expert_offset=5, local_num_experts=7),
    "none_ours": dict(num_tokens=2, top_k=1, local_expert_offset=15, local_num_experts=1, hidden_size=1056),
    "hardly_ours": dict(num_tokens=1, local_expert_offset=14, local_num_experts=1, hidden_size=96),
    "three_tokens": dict(num_tokens=3, hidden_size=416, intermediate_size=352, routing="one_expert"),
    "four_tokens": dict(num_tokens=4, hidden_size=1056, intermediate_size=1120, has_gemm1_bias=True, clamp_limit=1.5),
    "five_tokens": dict(num_tokens=5, hidden_size=416, intermediate_size=352),
    "nvfp4_weights": dict(num_tokens=1, weight_format=NV, hidden_size=288, intermediate_size=1120),
    "mxfp8": dict(num_tokens=1, activation_format=A.mxfp8, hidden_size=288),
    "mxfp8_odd": dict(num_tokens=2, activation_format=A.mxfp8, intermediate_size=352, has_gemm1_bias=True, clamp_limit=2.0),
    "mxfp8_relu2": dict(num_tokens=2, activation_format=A.mxfp8, activation=ActivationType.Relu2),
    "nvfp4": dict(num_tokens=2, activation_format=A.nvfp4, weight_format=NV, hidden_size=288, intermediate_size=160),
    "nvfp4_per_token": dict(num_tokens=2, activation_format=A.nvfp4, weight_format=NV, has_per_token_scale=True),
}  # fmt: skip
ROUTES = {
    **{method.name: dict(routing_method=method, top_k=1 if method == Method.Llama4 else 8) for method in Method},
    "groups": dict(routing_method=Method.DeepSeekV3, top_k=8, n_group=8, topk_group=4, routed_scaling_factor=2.5,
                   routing_bias_dtype=torch.float32),
    "groups_of_two": dict(routing_method=Method.DeepSeekV3, top_k=8, n_group=64, topk_group=5, routed_scaling_factor=2.5,
                          routing_bias_dtype=torch.bfloat16),
    "experts_512": dict(top_k=8, num_experts=512),
    "experts_1024": dict(top_k=8, num_experts=1024),
}  # fmt: skip
on_hopper = [pytest.mark.gpu, skip_unless_arch("sm90a")]


def test_k_order_covers_a_block_once():
    assert sorted(map(layout.k_of_position, range(layout.K_BLOCK))) == list(range(layout.K_BLOCK))


@pytest.mark.parametrize("num_tokens", [1, 2, 37])
@pytest.mark.parametrize("tile_m", TILES)
def test_workspace_slices_are_aligned_and_disjoint(tile_m, num_tokens):
    pieces, total = layout.slices(num_tokens, 4, 2880, 352, 16, tile_m)
    shared = pieces.pop("gemm2_output")
    assert shared == pieces["x"] and shared.num_bytes >= tile_m * max_num_tiles(4 * num_tokens, 16, tile_m) * 2880 * 2
    few = min(num_tokens, layout.FEW_TOKENS)
    assert pieces["few_x"].num_bytes == few * 2944 * 2 * 2 and pieces["few_z"].num_bytes == few * 4 * 384 * 2 * 2
    ends = [0]
    for piece in sorted(pieces.values(), key=lambda piece: piece.offset):
        assert piece.offset % 128 == 0 and piece.offset >= ends[-1]
        ends.append(piece.offset + piece.num_bytes)
    assert ends[-1] <= total == layout.workspace_bytes(num_tokens, 4, 2880, 352, 16, tile_m)


def test_manifest_ranges_touch_and_end_in_a_catch_all():
    build = pytest.importorskip("tvmmoe.build")
    from tvmmoe.kernels.sm90a.build import variants
    for weight_format in WeightFormat:
        symbols = {variant.tile_m: variant.symbol for variant in variants(weight_format)}
        limits = build.recorded_limits("sm90a", TILES, weight_format.name)
        rows = build.selection_rows("sm90a", weight_format, ["bf16"], limits, symbols, "file")
        assert tuple(row["tile_m"] for row in rows) == TILES
        limits = [(row["min_rows_per_expert"], row["max_rows_per_expert"]) for row in rows]
        assert limits[0][0] == 0 and limits[-1][1] is None
        assert all(low[1] == high[0] for low, high in zip(limits, limits[1:], strict=False))


@functools.cache
def entry(weight_format: WeightFormat, tile_m: int):
    """The packed function of one variant."""
    import tvm_ffi

    folder = loader.artifacts_dir()
    (path,) = sorted(folder.rglob(f"moe_{weight_format.name}_sm90a.so"))
    return tvm_ffi.load_module(str(path))[f"fp4_block_scale_moe_{weight_format.name}_m{tile_m}"]


def workspace_slices(case: Case, tile_m: int) -> tuple[dict[str, Slice], int]:
    """Slices of a call's workspace, and its bytes."""
    sizes = case.num_tokens, case.top_k, case.hidden_size, case.intermediate_size, case.num_local_experts
    return layout.slices(*sizes, tile_m)


def call(
    case: Case, kwargs: dict, tile_m: int, do_finalize: bool, function=None, output_width: int | None = None, workspace=None
) -> list[torch.Tensor]:
    """Run one variant (``function``, or that of the artifacts) on poisoned workspace and results; the ids are the last.

    ``output_width`` are the columns of the output, if they are fewer than the hidden size; ``workspace`` is one that another
    call has left.
    """
    tokens, hidden_size, pairs = case.num_tokens, case.hidden_size, case.num_tokens * case.top_k
    output_width = output_width or hidden_size
    make = functools.partial(torch.empty, device=kwargs["hidden_states"].device)
    ids = poison(make(tokens, case.top_k, dtype=torch.int16))
    if do_finalize:
        results = {"output": poison(make(tokens, output_width, dtype=torch.bfloat16))}
    else:
        rows = tile_m * max_num_tiles(pairs, case.num_local_experts, tile_m)
        results = {
            "gemm2_output": make(rows, hidden_size, dtype=torch.bfloat16).zero_(),
            "expert_weights": poison(make(tokens, case.top_k, dtype=torch.bfloat16)),
            "expanded_idx_to_permuted_idx": poison(make(pairs, dtype=torch.int32)),
        }
    pointers = {name: value.data_ptr() for name, value in kwargs.items() if isinstance(value, torch.Tensor)}
    pointers |= {name: tensor.data_ptr() for name, tensor in results.items()} | {"routing_replay_out": ids.data_ptr()}
    bias = kwargs["routing_bias"]
    ints = kwargs | dict(
        num_tokens=tokens,
        hidden_size=hidden_size,
        output_hidden_size=output_width,
        n_group=kwargs["n_group"] or 0,
        topk_group=kwargs["topk_group"] or 0,
        routing_method=kwargs["routing_method_type"],
        activation=case.activation,
        activation_format=case.activation_format,
        logits_is_bf16=kwargs["routing_logits"].dtype == torch.bfloat16,
        bias_is_bf16=bias is not None and bias.dtype == torch.bfloat16,
        do_finalize=do_finalize,
        enable_pdl=True,
    )
    if workspace is None:
        pieces, size = workspace_slices(case, tile_m)
        workspace = poison(make(size, dtype=torch.uint8))
        workspace[pieces["num_tiles"].offset :][:4] = 0  # poison is what tells finalize to wait
    scale = kwargs["routed_scaling_factor"]
    (function or entry(case.weight_format, tile_m))(
        workspace,
        *(pointers.get(name, 0) for name in abi.POINTERS),
        *(int(ints[name]) for name in abi.INTS),
        1.0 if scale is None else float(scale),
    )
    return [*results.values(), ids]


def check(case: Case, tile_m: int, do_finalize: bool) -> None:
    kwargs = make_case(case)
    replay = torch.empty(case.num_tokens, case.top_k, dtype=torch.int16)
    expected = moe_ref(**kwargs | dict(do_finalize=do_finalize, routing_replay_out=replay), tile_m=tile_m)
    on_device = {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in kwargs.items()}
    runs = [call(case, on_device, tile_m, do_finalize) for _ in range(2)]
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)
    *results, ids = (tensor.cpu() for tensor in runs[0])
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


@pytest.mark.parametrize("do_finalize", [True, False], ids=["finalize", "pieces"])
@pytest.mark.parametrize("tile_m", TILES)
@pytest.mark.parametrize("name", CASES)
class TestVariants:
    pytestmark = on_hopper

    def test_variant_matches_reference(self, name, tile_m, do_finalize):
        case = Case(**vars(BASE) | CASES[name])
        check(case, tile_m, do_finalize)


@pytest.mark.parametrize("do_finalize", [True, False], ids=["finalize", "pieces"])
@pytest.mark.parametrize("name", FEW_TOKENS)
class TestFewTokens:
    pytestmark = on_hopper

    def test_few_tokens_match_reference(self, name, do_finalize):
        check(Case(**vars(BASE) | FEW_TOKENS[name]), 8, do_finalize)


@pytest.mark.parametrize("logits_dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("num_tokens", [2, 9, 65, 600], ids=["few", "prologue", "route", "several_a_cta"])
@pytest.mark.parametrize("name", ROUTES)
class TestRoutes:
    pytestmark = on_hopper

    def test_route_matches_reference(self, name, num_tokens, logits_dtype):
        sizes = dict(num_tokens=num_tokens, hidden_size=64, intermediate_size=64, num_experts=128)
        case = Case(**vars(BASE) | sizes | dict(logits_dtype=logits_dtype) | ROUTES[name])
        check(case, 8, do_finalize=False)


# ----------------------------------------------------------------------------------------------- the operator, simulated

SMALL = Case(num_tokens=24, hidden_size=256, intermediate_size=160, num_experts=3, top_k=2)
# (weight format, tile, copies at once): mma.sync, with K split over two warpgroups or (gemm_pair) four; wgmma with K split
# over two, with several widths, with scales held in registers for two or four stages, in clusters of two CTAs.
SIMULATED = {
    "m8": (MX, 8, False), "m8_early": (MX, 8, True), "m8_nvfp4": (NV, 8, False), "ks_2": (NV, 16, False),
    "widths": (NV, 32, False), "widths_early": (NV, 32, True), "held_2": (MX, 64, False), "held_4": (MX, 96, False),
    "cluster": (MX, 256, False), "cluster_early": (MX, 256, True),
}  # fmt: skip
SIMULATED_CASES = {
    "plain": {},
    "odd_row_blocks": dict(hidden_size=352, intermediate_size=96, activation=ActivationType.Geglu, has_gemm1_bias=True),
    "ungated": dict(activation=ActivationType.Relu2, hidden_size=1056, intermediate_size=288, has_gemm2_bias=True),
    "many_stages": dict(num_tokens=150, hidden_size=1024),
    # Of 8 rows: more than experts, whose counts and lists of tiles are neighbours in the workspace
    "many_tiles": dict(num_tokens=130, hidden_size=64, intermediate_size=64, num_experts=6, top_k=3),
    "long": dict(hidden_size=64, intermediate_size=1056),
    "aligned": dict(num_tokens=60, hidden_size=768, intermediate_size=1280),
    "aligned_ungated": dict(activation=ActivationType.Relu2, hidden_size=768, intermediate_size=512),
    "two_tokens": FEW_TOKENS["two_tokens"],
    "one_token": dict(num_tokens=1, top_k=3, hidden_size=1056, intermediate_size=1120),
}


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("simulated_sm90a")


def source_of(weight_format: WeightFormat, tile_m: int) -> tuple[str, str]:
    """Symbol and CUDA C++ of one of the shipped variants, on four CTAs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tile_scheduler, "NUM_CTAS", 4)
        (variant,) = (v for v in build.variants(weight_format) if v.tile_m == tile_m)
        source = build.cuda_source([variant])
    for form in ("gemm_pair", "gemm_pair_mxfp8" if weight_format == MX else "gemm_pair_nvfp4"):
        assert (f"{variant.symbol}_{form}(" in source) == (tile_m == 8)
    return variant.symbol, source


@functools.cache
def simulated(weight_format: WeightFormat, tile_m: int, early: bool, folder):
    """The packed function, compiled for this CPU."""
    symbol, source = source_of(weight_format, tile_m)
    path = folder / f"{symbol}_{early}.so"
    compile_so(simulate.host_source(source, early), path)
    return tvm_ffi.load_module(str(path))[symbol]


@pytest.mark.skipif(not HAS_TVM, reason="needs tvm to build kernels")
@pytest.mark.parametrize("case_name", SIMULATED_CASES)
@pytest.mark.parametrize("name", SIMULATED)
def test_simulated_variant_matches_reference(name, case_name, folder):
    check_simulated(name, SMALL, SIMULATED_CASES[case_name], folder)


@pytest.mark.skipif(not HAS_TVM, reason="needs tvm to build kernels")
@pytest.mark.parametrize(
    "name, case_name",
    [
        *itertools.product(["m8", "m8_early"], [
            "gpt_oss", "geglu", "relu2", "top_32", "most_pairs", "more_of_ours", "one_expert", "more_pairs", "most_experts",
            "more_experts", "experts_5_to_11", "hardly_ours", "none_ours", "three_tokens", "four_tokens", "five_tokens",
            "mxfp8", "mxfp8_odd", "mxfp8_relu2"]),
        *itertools.product(["m8_nvfp4"], ["nvfp4_weights", "nvfp4", "nvfp4_per_token"]),
    ],
)  # fmt: skip
def test_simulated_pair_matches_reference(name, case_name, folder):
    """CTA after CTA, so what one waits for must not be left to another."""
    check_simulated(name, BASE, FEW_TOKENS[case_name], folder, is_zero=case_name == "none_ours")


@pytest.mark.skipif(not HAS_TVM, reason="needs tvm to build kernels")
@pytest.mark.parametrize("name", ["m8", "m8_nvfp4", "ks_2", "widths", "held_2", "held_4", "cluster"])
def test_simulated_every_scale(name, folder):
    from test_sm80 import check_every_scale

    weight_format, tile_m, early = SIMULATED[name]
    check_every_scale(simulated(weight_format, tile_m, early, folder), weight_format, tile_m, "cpu")


@pytest.mark.parametrize("tile_m", TILES)
@pytest.mark.parametrize("weight_format", WeightFormat)
class TestScales:
    pytestmark = on_hopper

    def test_every_scale(self, weight_format, tile_m):
        from test_sm80 import check_every_scale

        check_every_scale(entry(weight_format, tile_m), weight_format, tile_m, "cuda")


# Of up to four tokens gemm_pair routes, of up to 16 prologue, of more route: rows of hard_logits that fit each.
HARD_ROWS = {"pair": [1, 3, 4, 10], "prologue": [0, 1, 2, 3, 4, 5, 7, 8, 9, 10, 15, 16], "route": list(range(30))}


def hard_routes() -> list:
    """Parameters: names of a route of the CPU's stages and of the rows it routes."""
    stages = pytest.importorskip("test_cpu_stages")
    return [(route, rows) for route in stages.ROUTES if stages.ROUTES[route]["top_k"] <= 32 for rows in HARD_ROWS]


@pytest.mark.skipif(not HAS_TVM, reason="needs tvm to build kernels")
@pytest.mark.parametrize("bias_dtype", [None, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("logits_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("route, rows", hard_routes() if HAS_TVM else [])
def test_simulated_hard_logits(route, rows, logits_dtype, bias_dtype, folder):
    """Ids and weights of 8 columns' kernels are those of the reference, bit for bit, any NaN like any other."""
    import test_cpu_stages as stages

    logits, options = stages.hard_logits(stages.NUM_EXPERTS.get(route, 48))[HARD_ROWS[rows]], stages.ROUTES[route]
    bias = 0.1 * torch.randn(logits.shape[1], generator=torch.Generator().manual_seed(1))
    logits, bias = logits.to(logits_dtype), None if bias_dtype is None else bias.to(bias_dtype)
    sizes = dict(num_tokens=len(logits), num_experts=logits.shape[1], top_k=options["top_k"], local_num_experts=1)
    case = Case(**vars(BASE) | sizes | dict(hidden_size=32, intermediate_size=32))
    kwargs = make_case(case) | dict(n_group=None, topk_group=None, routed_scaling_factor=None, norm_topk_prob=True)
    kwargs |= dict(routing_logits=logits, routing_bias=bias) | options
    _, weights, _, ids = call(case, kwargs, 8, do_finalize=False, function=simulated(MX, 8, False, folder))
    expected_ids, expected_weights = route_ref(logits, bias, **options)
    assert torch.equal(ids.int(), expected_ids) and stages.same(weights, expected_weights)


@pytest.mark.skipif(not HAS_TVM, reason="needs tvm to build kernels")
@pytest.mark.parametrize("logits_dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("name", ROUTES)
def test_simulated_pair_routes_as_the_reference(name, logits_dtype, folder):
    sizes = dict(num_tokens=3, hidden_size=64, intermediate_size=64, num_experts=128, logits_dtype=logits_dtype)
    case = Case(**vars(BASE) | sizes | ROUTES[name])
    kwargs, replay = make_case(case), torch.empty(3, case.top_k, dtype=torch.int16)
    expected = moe_ref(**kwargs | dict(do_finalize=False, routing_replay_out=replay), tile_m=8)
    _, weights, rows, ids = call(case, kwargs, 8, do_finalize=False, function=simulated(MX, 8, False, folder))
    assert torch.equal(ids, replay) and torch.equal(weights, expected[1]) and torch.equal(rows, expected[2])


FOLLOWING = [dict(num_tokens=1), dict(num_tokens=4), dict(num_tokens=2, activation=ActivationType.Relu2),
             dict(num_tokens=5), dict(num_tokens=1)]  # fmt: skip


def calls_that_follow(device: str, **options) -> None:
    """Calls by one kernel or by many find the workspace as the one before left it, and compute what they do in a new one."""
    cases = [Case(**vars(BASE) | changes | dict(seed=seed, device=device)) for seed, changes in enumerate(FOLLOWING)]
    given = [(case, make_case(case)) for case in cases]
    alone = [call(*each, 8, do_finalize=True, **options)[0] for each in given]
    size = max(workspace_slices(case, 8)[1] for case in cases)
    options["workspace"] = poison(torch.empty(size, dtype=torch.uint8, device=device))
    after = [call(*each, 8, do_finalize=True, **options)[0] for each in given]
    for first, second in zip(alone, after, strict=True):
        assert torch.equal(first, second)


@pytest.mark.skipif(not HAS_TVM, reason="needs tvm to build kernels")
def test_simulated_calls_follow_each_other(folder):
    calls_that_follow("cpu", function=simulated(MX, 8, False, folder))


@pytest.mark.gpu
@skip_unless_arch("sm90a")
def test_calls_follow_each_other():
    for _ in range(8):
        calls_that_follow("cuda")


@pytest.mark.skipif(not HAS_TVM, reason="needs tvm to build kernels")
@pytest.mark.parametrize("num_tokens, top_k", [(1, 24), (2, 12)])
def test_simulated_pair_computes_an_expert_that_is_chosen_often(num_tokens, top_k, folder):
    """Keys of NaNs with all bits set are those of closed experts: who wants more than the others gets the last one again and
    again, in rows of several tiles, of one token or of both."""
    num_others = 4
    sizes = dict(num_tokens=num_tokens, num_experts=32, hidden_size=96, intermediate_size=160)
    often, once = (Case(**vars(BASE) | sizes | dict(top_k=k)) for k in (top_k, num_others + 1))
    kwargs, function = make_case(once), simulated(MX, 8, False, folder)
    logits = kwargs["routing_logits"] = kwargs["routing_logits"].float()
    logits[:, num_others:] = -1e3
    logits[:, -1] = -1e2
    run = functools.partial(call, tile_m=8, do_finalize=False, function=function)
    expected, _, expected_rows, expected_ids = run(once, kwargs)
    logits[:, num_others:].view(torch.int32).fill_(-1)
    actual, _, rows, ids = run(often, kwargs | dict(top_k=top_k))
    assert torch.equal(ids[:, : num_others + 1], expected_ids) and (ids[:, num_others:] == 31).all()
    segments = permute_ref(ids.int(), local_num_experts=32, tile_m=8)[0]
    assert torch.equal(rows, segments.flatten())
    same = expected_rows.view(num_tokens, -1)[:, torch.arange(top_k).clamp(max=num_others)]
    assert torch.equal(actual[rows.view(num_tokens, -1).long()], expected[same.long()])


@pytest.mark.skipif(not HAS_TVM, reason="needs tvm to build kernels")
@pytest.mark.parametrize("hidden_size, width", [(224, 64), (224, 72), (224, 197), (1120, 1061)])
def test_simulated_pair_writes_a_narrow_output(hidden_size, width, folder):
    case = Case(**vars(BASE) | dict(num_tokens=2, hidden_size=hidden_size))
    kwargs = make_case(case)
    function = simulated(MX, 8, False, folder)
    output, _ = call(case, kwargs, 8, do_finalize=True, function=function, output_width=width)
    assert rel_l2(output, moe_ref(**kwargs)[0][:, :width]) < 1e-3


@pytest.mark.skipif(not HAS_TVM, reason="needs tvm to build kernels")
@pytest.mark.parametrize("name", ["widths", "held_2", "held_4"])
def test_simulated_tile_multiplies_as_many_columns_as_it_has_rows(name, folder):
    config = hand_chosen(*SIMULATED[name][:2])
    one_expert = dict(num_experts=2, top_k=1, routing="one_expert", hidden_size=64, intermediate_size=64)
    for width in config.widths:
        for num_tokens in (width - config.width_step + 1, width):
            check_simulated(name, SMALL, one_expert | dict(num_tokens=num_tokens), folder)


@pytest.mark.skipif(not HAS_TVM, reason="needs tvm to build kernels")
@pytest.mark.parametrize("num_experts, top_k", [(8, 3), (512, 8), (1024, 11)])
def test_simulated_route_with_several_tokens_a_cta(num_experts, top_k, folder):
    """The last CTA has one of its tokens; slots that finalize adds are more than it asks for at once."""
    sizes = dict(num_tokens=529, hidden_size=64, intermediate_size=32, num_experts=num_experts, top_k=top_k)
    check_simulated("widths", SMALL, sizes, folder)


@pytest.mark.skipif(not HAS_TVM, reason="needs tvm to build kernels")
@pytest.mark.parametrize("name", ["held_2", "held_4", "m8_nvfp4", "widths"])
def test_simulated_scales_need_not_be_aligned(name, folder):
    """Base of both GEMMs' scales 8 bytes past a multiple of 16: cp.async copies them, not TMA."""
    weight_format, tile_m, early = SIMULATED[name]
    sizes = dict(num_tokens=60, hidden_size=1536, intermediate_size=512)
    case = Case(**vars(SMALL) | dict(weight_format=weight_format) | sizes)
    kwargs, moved = make_case(case), {}
    for key in ("gemm1_weights_scale", "gemm2_weights_scale"):
        scales = kwargs[key]
        shifted = torch.empty(scales.numel() + 24, dtype=torch.uint8)
        start = (8 - shifted.data_ptr()) % 16
        shifted[start : start + scales.numel()] = scales.reshape(-1).view(torch.uint8)
        moved[key] = shifted[start : start + scales.numel()].view(scales.dtype).view(scales.shape)
        assert moved[key].data_ptr() % 16 == 8
    function = simulated(weight_format, tile_m, early, folder)
    output, _ = call(case, kwargs | moved, tile_m, do_finalize=True, function=function)
    assert rel_l2(output, moe_ref(**kwargs)[0]) < 1e-3


def check_simulated(name: str, base: Case, changes: dict, folder, is_zero: bool = False) -> None:
    weight_format, tile_m, early = SIMULATED[name]
    case = Case(**vars(base) | dict(weight_format=weight_format) | changes)
    kwargs = make_case(case)
    function = simulated(weight_format, tile_m, early, folder)
    output, _ = call(case, kwargs, tile_m, do_finalize=True, function=function)
    expected = moe_ref(**kwargs)[0]
    assert bool(expected.any()) != is_zero
    assert rel_l2(output, expected) < 1e-3


@pytest.mark.skipif(not HAS_TVM, reason="needs tvm to build kernels")
def test_results_do_not_depend_on_who_computes_a_tile(folder):
    """gemm_pair's warps take turns in adding up sums of all: another one's turn if tiles come in another order.

    Sums of K blocks 0 and 1, and of 2 and 3, all but cancel: the order of adding them shows in many results.
    """
    item = tile_scheduler.PairScheduler._item

    def last_first(self, index):
        last = self.num_of_first - 1
        return item(self, let(T.Select(index <= last, last - index, index)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tile_scheduler.PairScheduler, "_item", last_first)
        symbol, source = source_of(MX, 8)
    compile_so(simulate.host_source(source), folder / "last_first.so")
    functions = simulated(MX, 8, False, folder), tvm_ffi.load_module(str(folder / "last_first.so"))[symbol]
    case = Case(**vars(SMALL) | dict(num_tokens=2, hidden_size=512, intermediate_size=512, num_experts=8, top_k=4))
    kwargs = make_case(case)
    tokens, weights, scales = (kwargs[name] for name in ("hidden_states", "gemm1_weights", "gemm1_weights_scale"))
    for first in (0, 256):
        tokens[:, first + 128 : first + 256] = tokens[:, first : first + 128] * -(1 + 2.0**-7)
    tokens[:, 256:] *= 8
    for block in (1, 2, 3):
        weights[..., 64 * block : 64 * (block + 1)] = weights[..., :64]
        scales[..., 4 * block : 4 * (block + 1)] = scales[..., :4]
    first, second = (call(case, kwargs, 8, do_finalize=False, function=function)[0] for function in functions)
    assert torch.equal(first, second)
    output, _ = call(case, kwargs, 8, do_finalize=True, function=functions[1])
    assert rel_l2(output, moe_ref(**kwargs)[0]) < 1e-2
