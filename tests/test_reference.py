# SPDX-License-Identifier: Apache-2.0
"""The reference against independent implementations: scalar Python loops, and the formulas in real units."""

import ctypes
import itertools
import math
import struct

import pytest
import torch

from tvmmoe import numerics, reference
from tvmmoe.config import ActivationFormat, ActivationType, WeightFormat
from tvmmoe.config import RoutingMethodType as Method
from tvmmoe.testing import Case, assert_close_rms, expert_slice, make_case, poison, rel_l2

NAN, INF = math.nan, math.inf
MODES = [
    (ActivationFormat.bf16, WeightFormat.mxfp4, False),
    (ActivationFormat.bf16, WeightFormat.nvfp4, False),
    (ActivationFormat.mxfp8, WeightFormat.mxfp4, False),
    (ActivationFormat.nvfp4, WeightFormat.nvfp4, False),
    (ActivationFormat.nvfp4, WeightFormat.nvfp4, True),
]


def mode_id(mode):
    return f"{mode[0].name}x{mode[1].name}" + ("-pertoken" if mode[2] else "")


# Scalar routing.


def f32(x: float) -> float:
    return ctypes.c_float(x).value


def key(x: float) -> int:
    (bits,) = struct.unpack("<i", struct.pack("<f", x))
    return bits if bits >= 0 else bits ^ 0x7FFFFFFF


def bf16(x: float) -> float:
    (bits,) = struct.unpack("<I", struct.pack("<f", x))
    if math.isnan(x):
        return x
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return struct.unpack("<f", struct.pack("<I", bits))[0]


def sigmoid(x: float) -> float:
    return f32(0.5 * f32(math.tanh(0.5 * x)) + 0.5)


def softmax(values: list[float], maximum: float) -> list[float]:
    powers = [math.exp(v - maximum) for v in values]
    return [f32(p / sum(powers)) for p in powers]


def ranked(scores: list[float], ids: list[int]) -> list[int]:
    return sorted(ids, key=lambda i: (-key(scores[i]), i))


def scalar_route(x, bias, method, top_k, n_group=None, topk_group=None, scale=1.0, norm_topk_prob=True):
    """Ids and weights of one token, by the table of the specification."""
    experts = list(range(len(x)))
    if method == Method.Llama4:
        x = [-INF if math.isnan(v) else v for v in x]
    is_grouped = method == Method.DeepSeekV3 and n_group is not None and n_group > 1
    if method == Method.Default:
        score = softmax(x, NAN if any(map(math.isnan, x)) else max(x))
    elif method in (Method.DeepSeekV3, Method.MiniMax2):
        b = [0.0] * len(x) if bias is None else [bf16(v) for v in bias] if is_grouped else bias
        score = [f32(sigmoid(v) + w) for v, w in zip(x, b, strict=True)]
    elif method in (Method.SigmoidRenorm, Method.Sigmoid):
        score = [sigmoid(v) for v in x]
    else:
        score = x
    if is_grouped:
        size = len(x) // n_group
        groups = [experts[g * size : (g + 1) * size] for g in range(n_group)]
        best_two = [[score[i] for i in ranked(score, group)[:2]] for group in groups]
        kept = ranked([f32(a + b) for a, b in best_two], list(range(n_group)))[:topk_group]
        experts = [i for g in kept for i in groups[g]]
    ids = ranked(score, experts)[:top_k]
    chosen = [x[i] for i in ids]
    sigmoids = [sigmoid(v) for v in chosen]
    if method == Method.Default:
        weights = [score[i] for i in ids]
    elif method in (Method.Renormalize, Method.RenormalizeNaive):
        weights = softmax(chosen, chosen[0])
    elif method == Method.TopK:
        weights = chosen
    elif method in (Method.DeepSeekV3, Method.MiniMax2):
        weights = [f32(s * scale / (sum(sigmoids) + 1e-20)) for s in sigmoids]
    elif method == Method.SigmoidRenorm and norm_topk_prob:
        total = sum(sigmoids)
        weights = [f32(s / (total if math.isnan(total) else max(total, 1e-20))) for s in sigmoids]
    else:
        weights = sigmoids
    return ids, [bf16(w) for w in weights]


def logits_with_ties(num_tokens: int, num_experts: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Rows of normal values, of few distinct values, of saturating values, of signed zeros, of infinities."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_tokens, num_experts, generator=generator)
    x[1::4] = x[1::4].mul(2).round().div(2)
    x[2::4] *= 15
    x[3::8] = torch.where(x[3::8] > 0, 0.0, -0.0)
    x[7::8, : num_experts // 2] = -INF
    return x.to(dtype)


def check_routing(x, bias, **kwargs):
    method = kwargs.pop("method")
    scale = kwargs.pop("scale", None)
    ids, weights = reference.route_ref(x, bias, routing_method_type=method, routed_scaling_factor=scale, **kwargs)
    assert ids.dtype == torch.int32 and weights.dtype == torch.bfloat16
    bias = None if bias is None else bias.float().tolist()
    for row, got_ids, got_weights in zip(x.float().tolist(), ids.tolist(), weights.float().tolist(), strict=True):
        want_ids, want_weights = scalar_route(row, bias, method, scale=1.0 if scale is None else scale, **kwargs)
        assert got_ids == want_ids
        assert got_weights == pytest.approx(want_weights, rel=0, abs=0, nan_ok=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("method", Method, ids=lambda m: m.name.lower())
def test_route_matches_scalar_loops(method, dtype):
    x = logits_with_ties(48, 20, dtype)
    bias = 0.1 * torch.randn(20, generator=torch.Generator().manual_seed(1))
    for top_k in [1] if method == Method.Llama4 else [1, 5, 20]:
        check_routing(x, None, method=method, top_k=top_k)
        check_routing(x, bias, method=method, top_k=top_k, scale=2.5, norm_topk_prob=False)
        check_routing(x, bias.to(dtype), method=method, top_k=top_k, scale=2.5, n_group=1, topk_group=1)


@pytest.mark.parametrize("groups", [(8, 4), (4, 1), (2, 2), (8, 1)], ids=lambda g: f"{g[0]}of{g[1]}")
@pytest.mark.parametrize("bias_dtype", [None, torch.float32, torch.bfloat16], ids=["nobias", "f32", "bf16"])
def test_route_deepseek_groups(groups, bias_dtype):
    x = logits_with_ties(48, 32, torch.float32)
    bias = None if bias_dtype is None else torch.randn(32, generator=torch.Generator().manual_seed(1)).to(bias_dtype)
    n_group, topk_group = groups
    for top_k in (1, 3, min(8, 32 // n_group * topk_group)):
        check_routing(x, bias, method=Method.DeepSeekV3, top_k=top_k, n_group=n_group, topk_group=topk_group, scale=2.5)


def test_route_group_bias_is_rounded_to_bf16():
    x = torch.zeros(1, 8)
    bias = torch.zeros(8)
    bias[6] = 1.0
    bias[7] = 1.001  # bfloat16: 1.0, a tie that expert 6 wins
    grouped = dict(top_k=1, routing_method_type=Method.DeepSeekV3, topk_group=1)
    assert reference.route_ref(x, bias, n_group=2, **grouped)[0].item() == 6
    assert reference.route_ref(x, bias, n_group=1, **grouped)[0].item() == 7


@pytest.mark.parametrize("method", Method, ids=lambda m: m.name.lower())
def test_route_non_finite_rows(method):
    x = torch.randn(6, 37, generator=torch.Generator().manual_seed(0))
    x[0, [5, 20]] = NAN  # ranks above +inf
    x[1, 7] = NAN
    x[1, 3] = INF
    x[2] = -INF
    x[3] = -1000.0  # every sigmoid is 0
    x[4] = NAN
    x[5, [9, 11]] = INF
    top_k = 1 if method == Method.Llama4 else 4
    check_routing(x, None, method=method, top_k=top_k)
    if method in (Method.Renormalize, Method.TopK, Method.Sigmoid):
        ids, _ = reference.route_ref(x, None, top_k=2, routing_method_type=method)
        assert ids[:2].tolist() == [[5, 20], [7, 3]]


def test_route_llama4_ignores_nan():
    x = torch.tensor([[NAN, -2.0, 1.0], [NAN, NAN, -INF]])
    ids, weights = reference.route_ref(x, None, top_k=1, routing_method_type=Method.Llama4)
    assert ids.flatten().tolist() == [2, 0]
    assert weights.flatten().tolist() == [bf16(sigmoid(1.0)), 0.0]


@pytest.mark.parametrize("method", Method, ids=lambda m: m.name.lower())
def test_route_zero_tokens(method):
    groups = dict(n_group=2, topk_group=1) if method == Method.DeepSeekV3 else {}
    ids, weights = reference.route_ref(torch.zeros(0, 8), None, top_k=1, routing_method_type=method, **groups)
    assert ids.shape == weights.shape == (0, 1)


# Permutation.


@pytest.mark.parametrize("tile_m", [1, 4, 8, 64])
@pytest.mark.parametrize("local", [(0, 12), (3, 5), (11, 1)], ids=lambda x: f"ep{x[0]}+{x[1]}")
@pytest.mark.parametrize("num_tokens", [0, 1, 33])
def test_permute_invariants(num_tokens, local, tile_m):
    offset, count = local
    generator = torch.Generator().manual_seed(num_tokens)
    topk_ids = torch.rand(num_tokens, 12, generator=generator)[:, :11].argsort(-1)[:, :3].int()  # expert 11 is empty
    maps = reference.permute_ref(topk_ids, local_expert_offset=offset, local_num_experts=count, tile_m=tile_m)
    to_permuted, to_token = maps.expanded_idx_to_permuted_idx.tolist(), maps.permuted_idx_to_token_idx.tolist()
    assert len(to_token) == maps.max_num_padded_tokens == len(maps.tile_expert) * tile_m
    for tensor in maps[:3]:
        assert tensor.dtype == torch.int32
    rows = {}
    for expanded_idx, expert in enumerate(topk_ids.flatten().tolist()):
        row = to_permuted[expanded_idx]
        if not offset <= expert < offset + count:
            assert row == -1
            continue
        assert row not in rows
        rows[row] = (expert, expanded_idx)
        assert to_token[row] == expanded_idx // 3
        assert maps.tile_expert[row // tile_m] == expert - offset
    assert [row for row, token in enumerate(to_token) if token >= 0] == sorted(rows)
    # Expert order, then expanded_idx; segments start at a tile and have no holes.
    assert [rows[row] for row in sorted(rows)] == sorted(rows.values())
    assert maps.num_tiles == len({row // tile_m for row in rows})
    for expert, segment in itertools.groupby(sorted(rows), key=lambda row: rows[row][0]):
        segment = list(segment)
        assert segment[0] % tile_m == 0, expert
        assert segment == list(range(segment[0], segment[0] + len(segment)))
    in_use = maps.tile_expert[: maps.num_tiles].tolist()
    assert in_use == sorted(in_use) and -1 not in in_use
    assert (maps.tile_expert[maps.num_tiles :] == -1).all()


# Requantisation.

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
E4M3 = [c * 2.0**-9 if c < 8 else (8 + c % 8) * 2.0 ** (c // 8 - 10) for c in range(127)]


def nearest(x: float, values: list[float]) -> float:
    """Nearest value by magnitude, ties to the even code, saturating; keeps the sign."""
    magnitude = min(abs(x), values[-1])
    code = min(range(len(values)), key=lambda c: (abs(magnitude - values[c]), c % 2))
    return math.copysign(values[code], x)


def scalar_requantize(row: list[float], mode: str) -> tuple[list[float], float]:
    row = [bf16(v) for v in row]
    size = 32 if mode == "mxfp8" else 16
    p = f32(max(map(abs, row)) / 2688) if mode == "pertoken" else 1.0
    values = []
    for start in range(0, len(row), size):
        block = row[start : start + size]
        amax = max(map(abs, block))
        if mode == "mxfp8":
            exponent = -127
            while 448 * 2.0**exponent < amax:
                exponent += 1
            values += [nearest(v / 2.0**exponent, E4M3) * 2.0**exponent for v in block]
            continue
        s = nearest(f32(f32(amax / 6) / p), E4M3) if p else 0.0
        values += [nearest(f32(v / f32(s * p)), E2M1) * s if s else 0.0 for v in block]
    return values, p


@pytest.mark.parametrize("mode", ["bf16", "mxfp8", "nvfp4", "pertoken"])
def test_requantize_matches_scalar_loops(mode):
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(12, 96, generator=generator)
    z *= torch.exp2(torch.randint(-30, 20, (12, 1), generator=generator))
    z.view(12, 6, 16).mul_(torch.exp2(torch.randint(-6, 6, (12, 6, 1), generator=generator)))
    z[0] = 0
    z[1, 16:64] = 0
    z[2] = 0.0137 * torch.arange(96)
    z[2, ::32] = 448.0  # a power of two times 448: must not get the next larger scale, which small values would show
    z[3] = 0.25 * torch.arange(-48, 48)  # midpoints of e2m1
    z[4] = 1e-39  # below float32's normal range
    z[5, :32] = 3e38
    activation_format = ActivationFormat.nvfp4 if mode == "pertoken" else ActivationFormat[mode]
    value, row_scale = reference.requantize_ref(z, activation_format, is_per_token=mode == "pertoken")
    assert value.dtype == row_scale.dtype == torch.float32
    for i, row in enumerate(z.tolist()):
        if mode == "bf16":
            want, p = [bf16(v) for v in row], 1.0
        else:
            want, p = scalar_requantize(row, mode)
        assert value[i].tolist() == want, i
        assert row_scale[i].item() == p


def test_requantize_mxfp8_extreme_scales():
    amax = torch.tensor([448.0, 450.0, 2.0**-118 * 7, 2.0**-120 * 7, 2.0**-140, 0.0, 2.0**127 * 1.5])
    value, _ = reference.requantize_ref(amax[:, None].repeat(1, 32), ActivationFormat.mxfp8)
    assert value[:, 0].tolist() == [scalar_requantize([a] * 32, "mxfp8")[0][0] for a in amax.tolist()]
    value, _ = reference.requantize_ref(torch.full((1, 32), INF), ActivationFormat.mxfp8)
    assert value.isinf().all()


def test_requantize_does_not_hide_nan():
    z = torch.ones(1, 64)
    z[0, 40] = NAN
    for activation_format in ActivationFormat:
        value, _ = reference.requantize_ref(z, activation_format)
        assert value[0, 40].isnan() and value[0, :32].isfinite().all(), activation_format


# The whole operator against the real-unit formulas.


def real_forward(real, ids, weights, mode, activation):
    """Dense float64 evaluation in real units: every expert for every token, then the chosen ones."""
    up_gate = torch.einsum("th,enh->ten", real["x"], real["w1"]) + real["b1"]
    if activation.is_gated:
        up, gate = up_gate.chunk(2, dim=-1)
        limit, alpha, beta = (real[name][:, None] for name in ("limit", "alpha", "beta"))
        up, gate = up.clamp(-limit, limit), torch.minimum(gate, limit)
        if activation == ActivationType.Swiglu:
            z = (up + beta) * gate * torch.sigmoid(alpha * gate)
        else:  # gate * PHI(alpha * gate) is gelu(alpha * gate) / alpha
            z = (up + beta) * torch.nn.functional.gelu(alpha * gate) / alpha
    else:
        z = torch.relu(up_gate) ** 2 if activation == ActivationType.Relu2 else up_gate
    activation_format, _, is_per_token = mode
    z = (z * real["c"]).bfloat16().float()
    flat = z.flatten(0, 1)
    if is_per_token:
        flat = numerics.dequantize_nvfp4(*numerics.quantize_nvfp4_per_token(flat)[:2]) * (
            flat.abs().amax(-1, keepdim=True) / 2688
        )
    elif activation_format == ActivationFormat.nvfp4:
        flat = numerics.dequantize_nvfp4(*numerics.quantize_nvfp4(flat, torch.ones(1)))
    elif activation_format == ActivationFormat.mxfp8:
        flat = numerics.dequantize_mxfp8(*numerics.quantize_mxfp8(flat))
    z = flat.view(z.shape).double() / real["c"]
    y = torch.einsum("tei,ehi->teh", z, real["w2"]) + real["b2"]
    picked = y.gather(1, ids.long()[..., None].expand(-1, -1, y.shape[-1]))
    return (picked * weights.double()[..., None]).sum(1)


def real_case(mode, activation):
    """Arguments of the operator, unit conversions spelled out as in the specification, and the real-unit tensors."""
    activation_format, weight_format, is_per_token = mode
    generator = torch.Generator().manual_seed(0)
    num_tokens, hidden_size, intermediate_size, experts = 9, 96, 64, 6
    rows = (2 if activation.is_gated else 1) * intermediate_size

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    def quantize_weight(w):
        if weight_format == WeightFormat.mxfp4:
            values, scale = numerics.quantize_mxfp4(w)
            return values, scale, numerics.dequantize_mxfp4(values, scale).double(), torch.ones(experts)
        g = 448 * 6 / w.abs().amax((1, 2))
        pieces = [numerics.quantize_nvfp4(w[e], g[e].view(1)) for e in range(experts)]
        values, scale = (torch.stack(tensors) for tensors in zip(*pieces, strict=True))
        return values, scale, numerics.dequantize_nvfp4(values, scale).double() / g.double()[:, None, None], g

    x = 2 * randn(num_tokens, hidden_size) * torch.exp2(torch.arange(num_tokens) % 3)[:, None]
    hidden, hidden_scale, per_token_scale, g_x = x.bfloat16(), None, None, 1.0
    real_x = hidden.double()
    if activation_format == ActivationFormat.mxfp8:
        hidden, hidden_scale = numerics.quantize_mxfp8(x)
        real_x = numerics.dequantize_mxfp8(hidden, hidden_scale).double()
    elif is_per_token:
        hidden, hidden_scale, per_token_scale = numerics.quantize_nvfp4_per_token(x)
        real_x = numerics.dequantize_nvfp4(hidden, hidden_scale).double() * per_token_scale.double()[:, None]
    elif activation_format == ActivationFormat.nvfp4:
        g_x = (448 * 6 / x.abs().amax()).item()
        hidden, hidden_scale = numerics.quantize_nvfp4(x, torch.tensor([g_x]))
        real_x = numerics.dequantize_nvfp4(hidden, hidden_scale).double() / g_x

    w1, w1_scale, real_w1, g_w1 = quantize_weight(randn(experts, rows, hidden_size) * hidden_size**-0.5)
    w2, w2_scale, real_w2, g_w2 = quantize_weight(randn(experts, hidden_size, intermediate_size) * 0.125)
    c = 20.0 if activation_format == ActivationFormat.nvfp4 and not is_per_token else 1.0
    real = dict(
        x=real_x,
        w1=real_w1,
        w2=real_w2,
        c=c,
        b1=0.5 * randn(experts, rows),
        b2=0.5 * randn(experts, hidden_size),
        alpha=1 + 0.2 * randn(experts),
        beta=1 + 0.2 * randn(experts),
        limit=2 + randn(experts).abs(),
    )
    s_g = 1 / (g_w1 * g_x)
    s_c = torch.full_like(s_g, c) if activation == ActivationType.Relu2 else c / (g_w1 * g_x)
    s_2 = 1 / (c * g_w2)
    is_mx = weight_format == WeightFormat.mxfp4
    kwargs = dict(
        routing_logits=randn(num_tokens, experts),
        routing_bias=None,
        hidden_states=hidden,
        hidden_states_scale=hidden_scale,
        gemm1_weights=w1,
        gemm1_weights_scale=w1_scale,
        gemm1_bias=real["b1"] / s_g[:, None],
        gemm1_alpha=real["alpha"] if activation.is_gated else None,
        gemm1_beta=real["beta"] / s_g if activation.is_gated else None,
        gemm1_clamp_limit=real["limit"] / s_g if activation.is_gated else None,
        gemm2_weights=w2,
        gemm2_weights_scale=w2_scale,
        gemm2_bias=real["b2"] / s_2[:, None],
        output1_scale_scalar=None if is_mx else s_c,
        output1_scale_gate_scalar=None if is_mx else s_g,
        output2_scale_scalar=None if is_mx else s_2,
        num_experts=experts,
        top_k=3,
        n_group=None,
        topk_group=None,
        intermediate_size=intermediate_size,
        local_expert_offset=0,
        local_num_experts=experts,
        routed_scaling_factor=None,
        routing_method_type=Method.Renormalize,
        activation_type=activation,
        per_token_scale=per_token_scale,
    )
    return kwargs, {name: value.double() if torch.is_tensor(value) else value for name, value in real.items()}


@pytest.mark.parametrize("activation", ActivationType, ids=lambda a: a.name.lower())
@pytest.mark.parametrize("mode", MODES, ids=mode_id)
def test_moe_ref_matches_real_units(mode, activation):
    kwargs, real = real_case(mode, activation)
    ids, weights = reference.route_ref(kwargs["routing_logits"], None, top_k=3, routing_method_type=Method.Renormalize)
    expected = real_forward(real, ids, weights, mode, activation)
    for dtype in (torch.float32, torch.float64):
        (output,) = reference.moe_ref(**kwargs, dtype=dtype)
        # Two roundings to bfloat16, and a flip or two where float32 units move z across a midpoint.
        assert_close_rms(output.double(), expected, max_rel=5e-2, rms_rel=5e-3)


@pytest.mark.parametrize("mode", MODES, ids=mode_id)
def test_moe_ref_defaults_are_neutral(mode):
    case = Case(activation_format=mode[0], weight_format=mode[1], has_per_token_scale=mode[2])
    kwargs = make_case(case)
    experts = case.num_experts
    neutral = dict(
        gemm1_bias=torch.zeros(experts, 2 * case.intermediate_size),
        gemm1_alpha=torch.ones(experts),
        gemm1_beta=torch.zeros(experts),
        gemm1_clamp_limit=torch.full((experts,), INF),
        gemm2_bias=torch.zeros(experts, case.hidden_size),
    )
    if mode[1] == WeightFormat.mxfp4:
        scales = ("output1_scale_scalar", "output1_scale_gate_scalar", "output2_scale_scalar")
        neutral |= {name: torch.ones(experts) for name in scales}
    assert torch.equal(reference.moe_ref(**kwargs)[0], reference.moe_ref(**(kwargs | neutral))[0])


@pytest.mark.parametrize("mode", MODES, ids=mode_id)
def test_moe_ref_accepts_any_scale_dtype(mode):
    kwargs = make_case(activation_format=mode[0], weight_format=mode[1], has_per_token_scale=mode[2])
    expected = reference.moe_ref(**kwargs)[0]
    names = ["gemm1_weights_scale", "gemm2_weights_scale", "hidden_states_scale"]
    for dtype in (torch.uint8, torch.float8_e4m3fn, torch.float8_e8m0fnu):
        views = {name: kwargs[name].view(dtype) for name in names if kwargs[name] is not None}
        assert torch.equal(reference.moe_ref(**(kwargs | views))[0], expected)


# Expert parallelism, results, edges.


@pytest.mark.parametrize("mode", MODES, ids=mode_id)
def test_moe_ref_slices_sum_to_whole(mode):
    kwargs = make_case(
        num_tokens=7,
        activation_format=mode[0],
        weight_format=mode[1],
        has_per_token_scale=mode[2],
        routing_method=Method.DeepSeekV3,
        routing_bias_dtype=torch.float32,
        has_gemm1_bias=True,
        has_gemm2_bias=True,
        alpha=1.7,
        beta=1.0,
        clamp_limit=3.0,
    )
    (whole,) = reference.moe_ref(**kwargs)
    rows, weights, to_permuted = reference.moe_ref(**kwargs, do_finalize=False)
    total, num_rows = torch.zeros_like(whole, dtype=torch.float32), 0
    for offset, count in ((0, 3), (3, 1), (4, 4)):
        part = expert_slice(kwargs, offset, count)
        total += reference.moe_ref(**part)[0].float()
        part_rows, part_weights, part_map = reference.moe_ref(**part, do_finalize=False, tile_m=4)
        assert torch.equal(part_weights, weights)
        is_local = part_map >= 0
        num_rows += is_local.sum().item()
        assert rel_l2(part_rows[part_map[is_local].long()], rows[to_permuted[is_local].long()]) < 1e-3
    assert num_rows == to_permuted.numel() == 14
    assert_close_rms(total, whole.float(), max_rel=3e-2, rms_rel=4e-3)


def test_moe_ref_results_are_consistent():
    kwargs = make_case(num_tokens=5, local_expert_offset=2, local_num_experts=4)
    replay = poison(torch.empty(7, 2, dtype=torch.int16))
    (output,) = reference.moe_ref(**kwargs, routing_replay_out=replay)
    rows, weights, to_permuted = reference.moe_ref(**kwargs, do_finalize=False, tile_m=16)
    assert rows.dtype == weights.dtype == output.dtype == torch.bfloat16 and to_permuted.dtype == torch.int32
    assert weights.shape == (5, 2) and to_permuted.shape == (10,)
    assert torch.equal(reference.finalize_ref(rows, weights, to_permuted), output)
    is_padding = torch.ones(len(rows), dtype=torch.bool)
    is_padding[to_permuted[to_permuted >= 0].long()] = False
    assert (rows[is_padding] == 0).all()
    is_local = ((replay[:5] >= 2) & (replay[:5] < 6)).flatten()
    assert torch.equal(is_local, to_permuted >= 0)
    assert (replay[5:] == -1).all()

    given = poison(torch.empty(5, 40, dtype=torch.bfloat16))
    result = reference.moe_ref(**kwargs, output=given)
    assert result[0] is given and torch.equal(given, output[:, :40])


def test_finalize_matches_scalar_loops():
    rows = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)).bfloat16()
    weights = torch.tensor([[0.5, 0.25], [1.5, -2.0], [3.0, 1.0]]).bfloat16()
    to_permuted = torch.tensor([4, 1, -1, 0, -1, -1], dtype=torch.int32)
    expected = [
        [bf16(0.5 * a + 0.25 * b) for a, b in zip(rows[4].tolist(), rows[1].tolist(), strict=True)],
        [bf16(-2.0 * a) for a in rows[0].tolist()],
        [0.0, 0.0, 0.0],
    ]
    assert reference.finalize_ref(rows, weights, to_permuted).tolist() == expected
    assert reference.finalize_ref(rows, weights, to_permuted, 2).tolist() == [row[:2] for row in expected]


@pytest.mark.parametrize("mode", MODES, ids=mode_id)
def test_moe_ref_zero_tokens(mode):
    kwargs = make_case(num_tokens=0, activation_format=mode[0], weight_format=mode[1], has_per_token_scale=mode[2])
    (output,) = reference.moe_ref(**kwargs)
    assert output.shape == (0, 128) and output.dtype == torch.bfloat16
    rows, weights, to_permuted = reference.moe_ref(**kwargs, do_finalize=False)
    assert rows.shape == (0, 128) and weights.shape == (0, 2) and to_permuted.shape == (0,)


@pytest.mark.parametrize("routing", ["random", "balanced", "one_expert", "empty_expert"])
@pytest.mark.parametrize("method", Method, ids=lambda m: m.name.lower())
def test_make_case_routing(method, routing):
    top_k = 1 if method == Method.Llama4 else 3
    sizes = dict(num_tokens=16, num_experts=16, top_k=top_k, local_expert_offset=5, local_num_experts=8)
    dtypes = dict(logits_dtype=torch.bfloat16, routing_bias_dtype=torch.bfloat16)
    kwargs = make_case(routing_method=method, routing=routing, **sizes, **dtypes)
    names = ("routing_logits", "routing_bias", "top_k", "routing_method_type")
    ids, _ = reference.route_ref(**{name: kwargs[name] for name in names})
    load = torch.bincount(ids.flatten(), minlength=16)
    if routing == "balanced":
        assert load.max() == top_k and load.min() == top_k
    if routing == "one_expert":
        assert load[5] == 16 and (load > 0).sum() == top_k
    if routing == "empty_expert":
        assert load[5] == 0


@pytest.mark.parametrize("from_float", [False, True], ids=["codes", "floats"])
@pytest.mark.parametrize("activation", ActivationType, ids=lambda a: a.name.lower())
@pytest.mark.parametrize("mode", MODES, ids=mode_id)
def test_make_case_has_usual_magnitudes(mode, activation, from_float):
    """Outputs of order one, in every mode on the same scale; static nvfp4 does not saturate."""
    case = Case(
        num_tokens=32,
        hidden_size=160,
        activation_format=mode[0],
        weight_format=mode[1],
        has_per_token_scale=mode[2],
        activation=activation,
        has_gemm1_bias=True,
        has_gemm2_bias=True,
        from_float=from_float,
    )
    kwargs = make_case(case)
    (output,) = reference.moe_ref(**kwargs)
    assert 0.3 < output.float().square().mean().sqrt() < 30, case.label
    rows = case.intermediate_size * (2 if activation.is_gated else 1)
    assert kwargs["gemm1_weights"].shape == (8, rows, 80)
    assert kwargs["gemm1_weights_scale"].shape == (8, rows, 160 // case.weight_format.block_size)
    assert len(kwargs["gemm1_weights_scale"].view(torch.uint8).unique()) > 3
    if mode[0] == ActivationFormat.nvfp4 and not mode[2]:
        # Twice the range of the block scales changes nothing: no block was at its limit.
        half = kwargs | dict(
            output1_scale_scalar=kwargs["output1_scale_scalar"] / 2,
            output2_scale_scalar=kwargs["output2_scale_scalar"] * 2,
            gemm2_bias=kwargs["gemm2_bias"] / 2,
        )
        assert rel_l2(reference.moe_ref(**half)[0], output) < 1e-2


def test_make_case_is_reproducible_and_seeded():
    first, again, other = make_case(seed=3), make_case(seed=3), make_case(seed=4)
    for name, value in first.items():
        if torch.is_tensor(value):
            assert torch.equal(value.view(torch.uint8), again[name].view(torch.uint8)), name
            assert not torch.equal(value.view(torch.uint8), other[name].view(torch.uint8)), name


def test_error_measures():
    ref = torch.tensor([3.0, -4.0])
    assert rel_l2(ref * 1.01, ref) == pytest.approx(0.01, rel=1e-4)
    assert rel_l2(torch.zeros(2), torch.zeros(2)) == 0 and rel_l2(ref, torch.zeros(2)) == INF
    assert_close_rms(ref * 1.01, ref, max_rel=0.02, rms_rel=0.011)
    for actual in (ref * 1.1, torch.tensor([3.0, NAN]), ref.double(), ref[:1]):
        with pytest.raises(AssertionError):
            assert_close_rms(actual, ref, max_rel=0.02, rms_rel=0.01)
    assert poison(torch.zeros(3, dtype=torch.bfloat16)).isnan().all()
