# SPDX-License-Identifier: Apache-2.0
"""Every stage of the CPU artifact against its reference: the TensorIR definition as written, and as scheduled."""

import functools
import math

import pytest
import torch

tvm = pytest.importorskip("tvm")

from tvmmoe import reference  # noqa: E402
from tvmmoe.config import ActivationFormat, ActivationType, WeightFormat  # noqa: E402
from tvmmoe.config import RoutingMethodType as Method  # noqa: E402
from tvmmoe.kernels import cpu, requantize  # noqa: E402
from tvmmoe.kernels.cpu_operator import stage_symbol  # noqa: E402
from tvmmoe.workspace import max_num_tiles  # noqa: E402

BF16, E4M3, U8 = torch.bfloat16, torch.float8_e4m3fn, torch.uint8
BF16_UNIT = 2.0**-8  # largest relative error of a rounding to bfloat16
SUM_UNIT = 1e-5  # error of float32 sums and activation polynomials, relative to the largest result
# gemm1 by activation, gemm2 (None). Compiling is what takes time: activations differ in the epilogue alone.
GEMMS = [(kind, m) for kind in (ActivationType.Swiglu, None) for m in cpu.TILE_M]
GEMMS += [(kind, cpu.TILE_M[-1]) for kind in ActivationType if kind != ActivationType.Swiglu]
VARIANTS = ["definition", "scheduled"]
VECTORS = ["alpha", "beta", "clamp_limit", "scale", "scale_gate"]  # per-expert arguments of gemm1, in its order
TILE_EXPERT = torch.tensor([0, 2, 2, 4], dtype=torch.int32)  # of the gemms' four tiles; five experts


@functools.cache
def stages(variant):
    """Every stage of the artifact by symbol."""
    with pytest.MonkeyPatch.context() as patch:
        for name in list(vars(cpu.space)) if variant == "definition" else ():
            if name.startswith("schedule_"):
                patch.setattr(cpu.space, name, lambda func, *config: func)
        return dict(cpu.stages())


@functools.cache
def compiled(variant, symbol):
    """For the baseline x86-64: it has no fused multiply-add, so bits can be compared."""
    func = stages(variant)[symbol].with_attr("global_symbol", symbol)
    return tvm.compile(tvm.IRModule({symbol: func}), target=tvm.target.Target("llvm"))[symbol]


def runner(variant):
    """Calls a stage by its symbol; bfloat16 and fp8 tensors go in as the integers that the definitions declare."""
    storage = {BF16: torch.uint16, E4M3: U8}

    def stored(arg):
        return arg.view(storage.get(arg.dtype, arg.dtype)) if isinstance(arg, torch.Tensor) else arg

    return lambda symbol, *args: compiled(variant, symbol)(*map(stored, args))


@pytest.fixture(params=VARIANTS)
def stage(request):
    return runner(request.param)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def same(a, b):
    """Equal bytes, any NaN equal to any other."""
    a_bytes, b_bytes = (torch.where(x.isnan(), math.nan, x).view(U8) for x in (a, b))
    return a.dtype == b.dtype and torch.equal(a_bytes, b_bytes)


def blocked(x, tile_m):
    """float32 [rows, columns] as [tiles, tile_m, columns / 32, 2, 16]: even columns of a 32-block, then the odd ones."""
    return x.view(-1, tile_m, x.shape[-1] // 32, 16, 2).transpose(-1, -2).contiguous()


def plain(x):
    """The inverse of :func:`blocked`, rows flat."""
    return x.transpose(-1, -2).reshape(x.shape[0] * x.shape[1], -1)


def is_rounded(actual, ref):
    """Whether bfloat16 values are the reference's but for float32 sums, which move a few to the next bfloat16."""
    error, size = (actual.double() - ref.double()).abs(), ref.double().abs()
    noise = SUM_UNIT * size.amax()
    return bool((error <= noise + 2 * BF16_UNIT * size).all() and (error > noise).double().mean() < 0.02)


def test_neutral(stage):
    values = torch.full((9,), math.nan)
    stage("neutral", values)
    assert values.tolist() == [1.0, math.inf] + [0.0] * 7


ROUTES = {method.name: dict(routing_method_type=method, top_k=1 if method == Method.Llama4 else 6) for method in Method}
ROUTES |= {
    "groups": dict(routing_method_type=Method.DeepSeekV3, top_k=6, n_group=8, topk_group=3, routed_scaling_factor=2.5),
    "groups_of_two": dict(routing_method_type=Method.DeepSeekV3, top_k=2, n_group=24, topk_group=1),
    "not_normalised": dict(routing_method_type=Method.SigmoidRenorm, top_k=6, norm_topk_prob=False),
    "scaled": dict(routing_method_type=Method.MiniMax2, top_k=32, routed_scaling_factor=0.3),
    "every_expert": dict(routing_method_type=Method.Renormalize, top_k=48),
    "one_expert": dict(routing_method_type=Method.Default, top_k=1),
    "most_experts": dict(routing_method_type=Method.Default, top_k=32),
}
NUM_EXPERTS = {"one_expert": 1, "most_experts": 1024}  # of a route, else 48


def hard_logits(num_experts):
    """Normal rows; rows of ties, of saturated sigmoids, of signed zeros, of one value; infinities."""
    x = torch.randn(30, num_experts, generator=generator())
    x[1::6] = x[1::6].round()
    x[2::6] *= 30
    x[3::6] = torch.where(x[3::6] > 0, 0.0, -0.0)
    x[4], x[10, 1::3], x[16, -1] = -20.0, -math.inf, math.inf
    return x


def check_route(stage, logits, bias, options):
    ids = torch.full((len(logits), options["top_k"]), -7, dtype=torch.int32)
    weights, replay = ids.to(BF16), ids.short()
    given = torch.zeros(1, dtype=logits.dtype) if bias is None else bias
    names = ("n_group", "topk_group", "routed_scaling_factor", "norm_topk_prob")
    rest = [options.get(name, default) for name, default in zip(names, (0, 0, 1.0, True), strict=True)]
    symbol = stage_symbol("route", *("bfloat16" if t.dtype == BF16 else "float32" for t in (logits, given)))
    switches = (int(options["routing_method_type"]), int(bias is not None), *rest)
    stage(symbol, logits, given, ids, weights, replay[:12], *switches)
    expected_ids, expected_weights = reference.route_ref(logits, bias, **options)
    assert torch.equal(ids, expected_ids)
    assert same(weights, expected_weights)
    assert torch.equal(replay[:12].int(), ids[:12]) and (replay[12:] == -7).all()


@pytest.mark.parametrize("bias_dtype", [None, torch.float32, BF16])
@pytest.mark.parametrize("logits_dtype", [torch.float32, BF16])
@pytest.mark.parametrize("route", ROUTES)
def test_route(stage, route, logits_dtype, bias_dtype):
    logits = hard_logits(NUM_EXPERTS.get(route, 48)).to(logits_dtype)
    bias = None if bias_dtype is None else (0.1 * torch.randn(logits.shape[1], generator=generator(1))).to(bias_dtype)
    check_route(stage, logits, bias, ROUTES[route])


@pytest.mark.parametrize("method", Method)
def test_route_of_nan(stage, method):
    logits = hard_logits(48)
    logits[::5, 3] = logits[20] = math.nan
    logits[5, 7] = math.inf
    check_route(stage, logits, None, ROUTES[method.name])


@pytest.mark.parametrize("tile_m", cpu.TILE_M)
@pytest.mark.parametrize("first, count", [(0, 8), (3, 4), (7, 1)])
@pytest.mark.parametrize("num_tokens", [1, 37])
def test_permute(stage, num_tokens, first, count, tile_m):
    ids = torch.rand(num_tokens, 8, generator=generator()).argsort(-1)[:, :3].int()
    ids[ids == 4] = 9  # nobody's expert 4; 9 belongs to another rank
    bound = max_num_tiles(ids.numel(), count, tile_m)
    to_permuted, to_token = torch.full_like(ids, 99), torch.full((bound, tile_m), 99, dtype=torch.int32)
    tile_expert, num_tiles = torch.full((bound,), 99, dtype=torch.int32), torch.full((1,), 99, dtype=torch.int32)
    stage("permute", ids, to_permuted, to_token, tile_expert, num_tiles, first, count)

    expected = reference.permute_ref(ids, local_expert_offset=first, local_num_experts=count, tile_m=tile_m)
    assert num_tiles == (live := expected.num_tiles)
    assert torch.equal(to_permuted.flatten(), expected.expanded_idx_to_permuted_idx)
    assert torch.equal(to_token[:live].flatten(), expected.permuted_idx_to_token_idx[: live * tile_m])
    assert torch.equal(tile_expert[:live], expected.tile_expert[:live])
    # The same without the reference: every local slot has a row of its own, in a tile of its expert.
    is_local = (ids >= first) & (ids < first + count)
    rows = to_permuted[is_local].long()
    assert torch.equal(to_token.flatten()[rows].long(), is_local.nonzero()[:, 0])
    assert torch.equal(tile_expert[rows // tile_m], ids[is_local] - first)
    assert len(rows.unique()) == len(rows) == (to_token[:live] >= 0).sum()


@pytest.mark.parametrize("form", ActivationFormat)
def test_gather_decodes_every_byte(stage, form):
    dtype, num_bytes, per_32 = {"bf16": (BF16, 512, 1), "mxfp8": (E4M3, 256, 1), "nvfp4": (U8, 128, 2)}[form.name]
    values = torch.randint(0, 256, (256, num_bytes), dtype=U8, generator=generator()).view(dtype)
    scale = (torch.arange(256 * 8 * per_32) % 256).to(U8).view(256, 8, per_32)
    tokens = torch.cat((torch.arange(256).flip(0), torch.tensor([-1, 0, 0, -1])))
    x = torch.full((65, 4, 8, 2, 16), 7.0)
    shape = (256, 8, 16) if form == ActivationFormat.nvfp4 else (256, 8, 16, 2)
    stage(stage_symbol("gather", form.name), values.view(shape), scale, tokens.int().view(65, 4), x)
    decoded = reference.dequantize_hidden_ref(values, scale.flatten(1))
    assert same(plain(x), torch.where(tokens[:, None] < 0, 0.0, decoded[tokens]))


def gemm_inputs(weight_format, tile_m, *, count=5, is_exact=False):
    """x [4 * tile_m, 96], weights [5, 128, 96], other arguments; ``count`` 1: one row for all experts and tokens.

    ``is_exact``: small multiples of powers of two, whose float32 sums are exact in any order.
    """
    g, is_nvfp4 = generator(), weight_format == WeightFormat.nvfp4
    codes = ((0x38 if is_exact else 0), 0x40) if is_nvfp4 else (125, 127)
    x = torch.randn(4 * tile_m, 96, generator=g) / 8
    row_token = torch.randint(0, 40, (4, tile_m), dtype=torch.int32, generator=g)
    row_token[:, 1:][:, -1:] = -1  # padding
    return dict(zip(VECTORS, 0.5 + torch.rand(len(VECTORS), count, generator=g), strict=True)) | dict(
        x=(x * 32).round() if is_exact else x,
        weights=torch.randint(0, 256, (5, 128, 48), dtype=U8, generator=g),
        weights_scale=torch.randint(*codes, (5, 128, 6 if is_nvfp4 else 3), dtype=U8, generator=g),
        row_token=row_token,
        per_token_scale=0.5 + torch.rand(40 if count > 1 else 1, generator=g),
        row_scale=0.5 + torch.rand(4, tile_m, generator=g),
        bias=0.5 * torch.randn(count, 128, generator=g),
    )


def run_gemm(stage, weight_format, activation, inputs):
    """bfloat16 [4 * tile_m, z or y] of gemm1, or of gemm2 where ``activation`` is None."""
    tile_m = inputs["row_token"].shape[1]
    if activation is None:
        halves, parts, names = (), ("gemm2", weight_format.name), ("row_scale", "bias", "scale")
    else:
        halves, parts = (1 + activation.is_gated,), ("gemm1", weight_format.name, activation.name)
        names = ("per_token_scale", "bias", *VECTORS)
    blocks = (*halves, 128 // math.prod(halves) // 32, 32)
    shapes = dict(weights=(5, *blocks, 3, 16), weights_scale=(5, *blocks, 3, -1), bias=(-1, *blocks))
    views = inputs | {name: inputs[name].view(shape) for name, shape in shapes.items()}
    args = [views[name] for name in ("weights", "weights_scale")] + [TILE_EXPERT, inputs["row_token"]]
    result = torch.full((4, tile_m, *blocks[-2:]), math.nan, dtype=BF16)
    stage(stage_symbol(*parts, f"m{tile_m}"), blocked(inputs["x"], tile_m), *args, *map(views.get, names), result)
    return result.view(4 * tile_m, -1)


def expected_gemm(activation, inputs):
    """The reference, tile after tile, accumulated in float64."""
    tiles = []
    for t, e in enumerate(TILE_EXPERT.tolist()):
        given = {name: inputs[name][e % len(inputs[name])] for name in ("bias", *VECTORS)}
        args = (inputs["x"].view(4, -1, 96)[t], inputs["weights"][e], inputs["weights_scale"][e])
        if activation is None:
            given = dict(row_scale=inputs["row_scale"][t], bias=given["bias"], scale=given["scale"])
            tiles.append(reference.gemm2_ref(*args, **given, dtype=torch.float64))
        else:
            tokens = inputs["row_token"][t].long() % len(inputs["per_token_scale"])
            given["per_token_scale"] = inputs["per_token_scale"][tokens]
            tiles.append(reference.gemm1_ref(*args, activation, **given, dtype=torch.float64).to(BF16))
    return torch.cat(tiles)


@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("activation, tile_m", GEMMS)
@pytest.mark.parametrize("weight_format", WeightFormat)
def test_gemm(stage, weight_format, activation, tile_m, count):
    inputs = gemm_inputs(weight_format, tile_m, count=count)
    actual, is_live = run_gemm(stage, weight_format, activation, inputs), inputs["row_token"].flatten() >= 0
    assert is_rounded(actual[is_live], expected_gemm(activation, inputs)[is_live])
    assert activation is not None or not actual[~is_live].view(torch.int16).any()  # gemm2 writes zeros in the padding


@pytest.mark.parametrize("activation, tile_m", GEMMS)
@pytest.mark.parametrize("weight_format", WeightFormat)
def test_gemm_schedule_keeps_every_bit(weight_format, activation, tile_m):
    inputs = gemm_inputs(weight_format, tile_m, is_exact=True)
    assert same(*(run_gemm(runner(variant), weight_format, activation, inputs) for variant in VARIANTS))


@pytest.mark.parametrize("activation", [ActivationType.Swiglu, ActivationType.Geglu, ActivationType.Relu2])
def test_gemm1_of_nan(stage, activation):
    inputs = gemm_inputs(WeightFormat.mxfp4, cpu.TILE_M[-1])
    inputs["x"][0, 0] = inputs["scale_gate"][4] = math.nan
    z = run_gemm(stage, WeightFormat.mxfp4, activation, inputs)
    is_nan = torch.zeros(len(z), 1, dtype=torch.bool)
    is_nan[0] = is_nan[-cpu.TILE_M[-1] :] = True  # the last tile is expert 4's
    assert torch.equal(z.isnan(), is_nan.expand_as(z))


def hard_rows():
    """bfloat16 z [16, 64]: normal blocks of many sizes, midpoints and powers of two, zeros, extremes, NaN."""
    exponents = torch.randint(-12, 13, (16, 4, 1), generator=generator(1))
    z = torch.ldexp(torch.randn(16, 4, 16, generator=generator()), exponents).flatten(1)
    z[1] = torch.arange(64) * 0.25 - 8
    z[2], z[3, :16], z[4, 32:] = 0.0, 0.0, -0.0
    z[5] = torch.exp2(torch.arange(64) - 32.0)
    z[6, ::7], z[7] = 3e38, torch.arange(64) * 1e-40
    z[8, ::16] = torch.tensor([448.0, 449.0, 450.0, 6.0])
    z[11, 5], z[12, 31], z[13, 40], z[14, :32] = math.nan, -math.nan, math.inf, math.nan
    z[9:11] = (0.75 * (torch.arange(8) + 8.5)).repeat_interleave(16).view(2, 64)  # amax / 6 between two e4m3 scales
    return z.to(BF16)


@pytest.mark.parametrize("mode", requantize.MODES)
def test_requantize(stage, mode):
    z, blocks = hard_rows(), 2 if mode.startswith("nvfp4") else 1
    x, row_scale = torch.full((4, 4, 2, 2, blocks, 16 // blocks), math.nan), torch.full((4, 4), math.nan)
    stage(stage_symbol("requantize", mode), z.view(4, 4, 2, blocks, 16 // blocks, 2), x, row_scale)
    form = ActivationFormat[mode.removesuffix("_per_token")]
    value, expected_scale = reference.requantize_ref(z.float(), form, is_per_token=mode.endswith("per_token"))
    assert same(plain(x.flatten(4)), value) and same(row_scale.flatten(), expected_scale)


@pytest.mark.parametrize("width", [1, 40, 64])
def test_finalize(stage, width):
    rows = torch.randperm(40, generator=generator())[:28].view(7, 4).int()
    rows[torch.rand(7, 4, generator=generator(1)) < 0.3] = -1
    rows[5], rows[6, 3] = -1, 0  # a token without local experts; the first row
    y = torch.full((40, 64), math.nan, dtype=BF16)  # padding rows are not to be read
    y[rows[rows >= 0].long()] = torch.randn(int((rows >= 0).sum()), 64, generator=generator(2)).to(BF16)
    weights, output = torch.randn(7, 4, generator=generator(3)).to(BF16), torch.full((7, width), math.nan, dtype=BF16)
    stage("finalize", y, weights, rows, output)
    assert same(output, reference.finalize_ref(y, weights, rows.flatten(), width))
    assert not output[5].view(torch.int16).any()
