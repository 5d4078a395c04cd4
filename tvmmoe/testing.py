# SPDX-License-Identifier: Apache-2.0
"""Random calls of the operator and error measures, shared by tests, benchmarks and the demo."""

import dataclasses
import math
from typing import Any

import torch

from tvmmoe import numerics, reference
from tvmmoe.config import ActivationFormat, ActivationType, WeightFormat
from tvmmoe.config import RoutingMethodType as Method
from tvmmoe.select import cuda_targets

# Relative L2 error against the reference. nvfp4 is looser: a float32 sum in another order moves z across a midpoint of
# e2m1 or of its bfloat16 rounding, and one such flip is a quarter of a value.
TOLERANCE = {ActivationFormat.bf16: 4e-3, ActivationFormat.mxfp8: 4e-3, ActivationFormat.nvfp4: 2e-2}

# Arguments with one row per local expert.
EXPERT_TENSORS = (
    "gemm1_weights",
    "gemm1_weights_scale",
    "gemm1_bias",
    "gemm1_alpha",
    "gemm1_beta",
    "gemm1_clamp_limit",
    "gemm2_weights",
    "gemm2_weights_scale",
    "gemm2_bias",
    "output1_scale_scalar",
    "output1_scale_gate_scalar",
    "output2_scale_scalar",
)

FULL_RANGE = reference.E4M3_MAX * reference.E2M1_MAX  # amax that an nvfp4 tensor is scaled to
E2M1_RMS = 2.926  # of uniformly random codes
E4M3_CODES = (0x58, 0x7F)  # random nvfp4 block scales: every code of 16 ... 448
EXPONENTS = (-2, 2)  # block factors 2^-2 ... 2^1: rms 1.15


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of the operator by its sizes and options; :func:`make_case` fills it with random tensors.

    ``alpha``, ``beta``, ``clamp_limit`` are in real units; every expert gets its own value within 10 %. ``routing`` is
    random, balanced (expert loads differ by at most one), one_expert (every token picks the same experts, a local one
    first) or empty_expert (nobody picks the first local expert). Groups bend the last three.
    """

    num_tokens: int = 8
    hidden_size: int = 128
    intermediate_size: int = 96
    num_experts: int = 8
    top_k: int = 2
    activation_format: ActivationFormat = ActivationFormat.bf16
    weight_format: WeightFormat = WeightFormat.mxfp4
    routing_method: Method = Method.Renormalize
    activation: ActivationType = ActivationType.Swiglu
    local_expert_offset: int = 0
    local_num_experts: int | None = None  # None: all from the offset on
    n_group: int | None = None
    topk_group: int | None = None
    routed_scaling_factor: float | None = None
    norm_topk_prob: bool = True
    routing: str = "random"
    logits_dtype: torch.dtype = torch.float32
    routing_bias_dtype: torch.dtype | None = None
    has_gemm1_bias: bool = False
    has_gemm2_bias: bool = False
    alpha: float | None = None
    beta: float | None = None
    clamp_limit: float | None = None
    has_per_token_scale: bool = False
    has_output_scales: bool = False  # in MX modes, where None means 1
    has_distinct_exponents: bool = True  # block factors are random powers of two, so that a misread scale layout shows
    from_float: bool = False  # quantise normal weights instead of drawing codes and scale bytes
    seed: int = 0
    device: str = "cpu"

    @property
    def num_local_experts(self) -> int:
        """``local_num_experts`` with its default."""
        return self.num_experts - self.local_expert_offset if self.local_num_experts is None else self.local_num_experts

    @property
    def label(self) -> str:
        """Short name for test ids and tables: formats, activation, routing, sizes, options that are on."""
        sizes = f"t{self.num_tokens}_h{self.hidden_size}_i{self.intermediate_size}_e{self.num_experts}_k{self.top_k}"
        options = {
            "groups": self.n_group,
            "ep": self.num_local_experts < self.num_experts,
            self.routing: self.routing != "random",
            "bf16logits": self.logits_dtype == torch.bfloat16,
            "routingbias": self.routing_bias_dtype is not None,
            "bias": self.has_gemm1_bias or self.has_gemm2_bias,
            "alpha": self.alpha is not None,
            "beta": self.beta is not None,
            "clamp": self.clamp_limit is not None,
            "pertoken": self.has_per_token_scale,
        }
        parts = [
            f"{self.activation_format.name}x{self.weight_format.name}",
            self.activation.name.lower(),
            self.routing_method.name.lower(),
            sizes,
            *(name for name, is_on in options.items() if is_on),
        ]
        return "-".join(parts)

    @property
    def tolerance(self) -> float:
        """Largest relative L2 error of a correct result."""
        return TOLERANCE[self.activation_format]


def make_case(case: Case | None = None, **fields: Any) -> dict[str, Any]:
    """Arguments of one call, for ``op(**kwargs)`` and ``moe_ref(**kwargs)``.

    In real units x = 2 * randn, W1 ~ 1 / sqrt(H) and W2 ~ 1 / sqrt(I), blocks times random powers of two; biases, beta
    and clamp are converted to the operator's units. Weights are random codes under random scales unless ``from_float``.
    The output scales of static nvfp4 carry a factor calibrated on a few tokens.

    Parameters
    ----------
    case : Case, optional
    fields
        Replacements of fields of ``case``, or of the default case.

    Returns
    -------
    dict
        Keyed by argument name, all arguments up to ``norm_topk_prob``; reproducible for a given seed and device type.
    """
    case = dataclasses.replace(case or Case(), **fields)
    generator = torch.Generator(case.device).manual_seed(case.seed)
    rows = (2 if case.activation.is_gated else 1) * case.intermediate_size
    kwargs = _routing_arguments(case, generator)
    kwargs |= dict(
        intermediate_size=case.intermediate_size,
        local_expert_offset=case.local_expert_offset,
        local_num_experts=case.num_local_experts,
        activation_type=case.activation,
    )
    hidden, global_x = _hidden_states(case, generator)
    weights1, global_1 = _weights(case, rows, case.hidden_size, generator)
    weights2, global_2 = _weights(case, case.hidden_size, case.intermediate_size, generator)
    kwargs |= hidden
    kwargs |= {f"gemm1_{name}": tensor for name, tensor in weights1.items()}
    kwargs |= {f"gemm2_{name}": tensor for name, tensor in weights2.items()}
    kwargs |= _epilogue_arguments(case, rows, generator, kwargs, global_x * global_1, global_2)
    return kwargs


def expert_slice(kwargs: dict[str, Any], offset: int, count: int) -> dict[str, Any]:
    """The same call on the rank that holds local experts [offset, offset + count) of this one."""
    part = {
        name: kwargs[name][offset : offset + count] if kwargs[name] is not None else None for name in EXPERT_TENSORS
    }
    return kwargs | part | dict(local_expert_offset=kwargs["local_expert_offset"] + offset, local_num_experts=count)


def _randn(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator, device=generator.device)


def _rand(generator: torch.Generator, low: float, high: float, *shape: int) -> torch.Tensor:
    return low + (high - low) * torch.rand(*shape, generator=generator, device=generator.device)


def _randint(
    generator: torch.Generator, low: int, high: int, shape: tuple[int, ...], dtype: torch.dtype
) -> torch.Tensor:
    return torch.randint(low, high, shape, generator=generator, device=generator.device, dtype=dtype)


def _random_bytes(generator: torch.Generator, *shape: int) -> torch.Tensor:
    """uint8, drawn eight at a time."""
    count = math.prod(shape)
    words = _randint(generator, -(2**63), 2**63 - 1, ((count + 7) // 8,), torch.int64)
    return words.view(torch.uint8)[:count].view(shape)


def _scale_blocks(x: torch.Tensor, block_size: int, generator: torch.Generator) -> torch.Tensor:
    """``x`` with every block multiplied by a random power of two."""
    blocks = x.unflatten(-1, (-1, block_size))
    exponents = _randint(generator, *EXPONENTS, (*blocks.shape[:-1], 1), torch.int32)
    powers = ((exponents + 127) << 23).view(torch.float32)  # torch.ldexp 2.11 runs on the current device, wherever x is
    return (blocks * powers).flatten(-2)


def _routing_arguments(case: Case, generator: torch.Generator) -> dict[str, Any]:
    logits = _randn(generator, case.num_tokens, case.num_experts)
    favoured = _favoured_experts(case)
    if favoured is not None:
        # Above every other expert and in slot order, also after bfloat16 rounding and a saturating sigmoid.
        steps = 8.0 + 0.25 * torch.arange(case.top_k - 1, -1, -1, device=case.device)
        logits = (logits * 0.25).scatter_add(1, favoured.to(case.device), steps.expand(favoured.shape))
    bias = None
    if case.routing_bias_dtype is not None:
        bias = 0.1 * _randn(generator, case.num_experts)
    if case.routing == "empty_expert":
        logits[:, case.local_expert_offset] = -100.0
        if bias is not None:
            bias[case.local_expert_offset] = -1.0
    return dict(
        routing_logits=logits.to(case.logits_dtype),
        routing_bias=None if bias is None else bias.to(case.routing_bias_dtype),
        num_experts=case.num_experts,
        top_k=case.top_k,
        n_group=case.n_group,
        topk_group=case.topk_group,
        routed_scaling_factor=case.routed_scaling_factor,
        routing_method_type=case.routing_method,
        norm_topk_prob=case.norm_topk_prob,
    )


def _favoured_experts(case: Case) -> torch.Tensor | None:
    """int64 [T, top_k] expert ids that ``routing`` asks for; None: no wish."""
    slots = torch.arange(case.num_tokens * case.top_k).view(case.num_tokens, case.top_k)
    if case.routing == "balanced":
        return slots % case.num_experts
    if case.routing == "one_expert":
        return (slots % case.top_k + case.local_expert_offset) % case.num_experts
    if case.routing not in ("random", "empty_expert"):
        raise ValueError(f"routing is {case.routing!r}, expected random, balanced, one_expert or empty_expert")
    return None


def _hidden_states(case: Case, generator: torch.Generator) -> tuple[dict[str, torch.Tensor | None], float]:
    """hidden_states, its scale and per_token_scale; the global factor of nvfp4, else 1."""
    x = 2 * _randn(generator, case.num_tokens, case.hidden_size)
    if case.has_distinct_exponents:
        x = _scale_blocks(x, 16 if case.activation_format == ActivationFormat.nvfp4 else 32, generator)
    values, scale, per_token_scale, global_scale = x.bfloat16(), None, None, 1.0
    if case.activation_format == ActivationFormat.mxfp8:
        values, scale = numerics.quantize_mxfp8(x)
    elif case.has_per_token_scale:
        values, scale, per_token_scale = numerics.quantize_nvfp4_per_token(x * _rand(generator, 0.5, 2, len(x), 1))
    elif case.activation_format == ActivationFormat.nvfp4:
        global_scale = FULL_RANGE / x.abs().amax().item() if x.numel() else 1.0
        values, scale = numerics.quantize_nvfp4(x, torch.tensor([global_scale], device=x.device))
    return dict(hidden_states=values, hidden_states_scale=scale, per_token_scale=per_token_scale), global_scale


def _weights(
    case: Case, rows: int, columns: int, generator: torch.Generator
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Packed weights and scales of the local experts, about 1 / sqrt(columns) large; global factors [E_loc]."""
    if case.from_float:
        return _quantized_weights(case, rows, columns, generator)
    experts, block_size = case.num_local_experts, case.weight_format.block_size
    scale_shape = (experts, rows, columns // block_size)
    values = _random_bytes(generator, experts, rows, columns // 2)
    if case.weight_format == WeightFormat.mxfp4:
        base = 127 - round(math.log2(E2M1_RMS * math.sqrt(columns)))
        span = EXPONENTS if case.has_distinct_exponents else (0, 1)
        scale = _randint(generator, base + span[0], base + span[1], scale_shape, torch.uint8)
        return dict(weights=values, weights_scale=scale), torch.ones(experts, device=case.device)
    codes = E4M3_CODES if case.has_distinct_exponents else (E4M3_CODES[0], E4M3_CODES[0] + 1)
    scale = _randint(generator, *codes, scale_shape, torch.uint8).view(torch.float8_e4m3fn)
    scale_rms = torch.arange(*codes, dtype=torch.uint8).view(torch.float8_e4m3fn).float().square().mean().sqrt().item()
    global_scale = E2M1_RMS * scale_rms * math.sqrt(columns) * _rand(generator, 0.7, 1.4, experts)
    return dict(weights=values, weights_scale=scale), global_scale


def _quantized_weights(
    case: Case, rows: int, columns: int, generator: torch.Generator
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The same from normal floats, expert by expert."""
    values, scales, global_scales = [], [], []
    for _ in range(case.num_local_experts):
        weight = _randn(generator, rows, columns) / math.sqrt(columns)
        if case.has_distinct_exponents:
            weight = _scale_blocks(weight, case.weight_format.block_size, generator)
        global_scale = torch.ones(1, device=weight.device)
        if case.weight_format == WeightFormat.mxfp4:
            value, scale = numerics.quantize_mxfp4(weight)
        else:
            global_scale = FULL_RANGE / weight.abs().amax().view(1)
            value, scale = numerics.quantize_nvfp4(weight, global_scale)
        values.append(value)
        scales.append(scale)
        global_scales.append(global_scale)
    return dict(weights=torch.stack(values), weights_scale=torch.stack(scales)), torch.cat(global_scales)


def _epilogue_arguments(
    case: Case,
    rows: int,
    generator: torch.Generator,
    kwargs: dict[str, Any],
    global_1: torch.Tensor,
    global_2: torch.Tensor,
) -> dict[str, torch.Tensor | None]:
    """Biases, activation parameters, output scales in the operator's units; global_1 is x's factor times W1's."""
    is_nvfp4_weight = case.weight_format == WeightFormat.nvfp4
    experts = case.num_local_experts
    if not is_nvfp4_weight and case.has_output_scales:
        global_1, global_2 = _rand(generator, 0.5, 2, experts), _rand(generator, 0.5, 2, experts)

    def per_expert(value: float | None, unit: torch.Tensor | float = 1.0) -> torch.Tensor | None:
        return None if value is None else value * _rand(generator, 0.9, 1.1, experts) * unit

    arguments = dict(
        gemm1_bias=0.5 * _randn(generator, experts, rows) * global_1[:, None] if case.has_gemm1_bias else None,
        gemm1_alpha=per_expert(case.alpha),
        gemm1_beta=per_expert(case.beta, global_1),
        gemm1_clamp_limit=per_expert(case.clamp_limit, global_1),
        output1_scale_scalar=1 / global_1 if case.activation != ActivationType.Relu2 else torch.ones_like(global_1),
        output1_scale_gate_scalar=1 / global_1,
        output2_scale_scalar=None,
    )
    c = _calibration(case, kwargs | arguments)
    arguments["output1_scale_scalar"] = arguments["output1_scale_scalar"] * c
    arguments["output2_scale_scalar"] = 1 / (c * global_2)
    bias = 0.5 * _randn(generator, experts, case.hidden_size) if case.has_gemm2_bias else None
    arguments["gemm2_bias"] = None if bias is None else bias / arguments["output2_scale_scalar"][:, None]
    if not is_nvfp4_weight and not case.has_output_scales:
        arguments |= dict(output1_scale_scalar=None, output1_scale_gate_scalar=None, output2_scale_scalar=None)
    return arguments


def _calibration(case: Case, kwargs: dict[str, Any]) -> float:
    """c: what brings the largest z of a few tokens to a quarter of the range of static nvfp4; 1 in other modes."""
    if case.activation_format != ActivationFormat.nvfp4 or case.has_per_token_scale or case.num_tokens == 0:
        return 1.0
    e = 0
    z = reference.gemm1_ref(
        reference.dequantize_hidden_ref(kwargs["hidden_states"][:16], kwargs["hidden_states_scale"][:16]),
        kwargs["gemm1_weights"][e],
        kwargs["gemm1_weights_scale"][e],
        case.activation,
        bias=None if kwargs["gemm1_bias"] is None else kwargs["gemm1_bias"][e],
        scale=kwargs["output1_scale_scalar"][e],
        scale_gate=kwargs["output1_scale_gate_scalar"][e],
        alpha=None if kwargs["gemm1_alpha"] is None else kwargs["gemm1_alpha"][e],
        beta=None if kwargs["gemm1_beta"] is None else kwargs["gemm1_beta"][e],
        clamp_limit=None if kwargs["gemm1_clamp_limit"] is None else kwargs["gemm1_clamp_limit"][e],
    )
    return FULL_RANGE / (4 * z.abs().amax().item())


def rel_l2(actual: torch.Tensor, ref: torch.Tensor) -> float:
    """||actual - ref|| / ||ref||, in float64; 0 if both are zero, inf if only ``ref`` is."""
    error = (actual.double() - ref.double()).norm().item()
    size = ref.double().norm().item()
    if size == 0:
        return 0.0 if error == 0 else math.inf
    return error / size


def assert_close_rms(actual: torch.Tensor, ref: torch.Tensor, max_rel: float, rms_rel: float) -> None:
    """Bound the largest and the root-mean-square error, both relative to the root mean square of ``ref``.

    Raises
    ------
    AssertionError
        Another shape or dtype, a value that is not finite, or an error beyond a bound; says where and how much.
    """
    assert actual.shape == ref.shape, f"shape {tuple(actual.shape)}, expected {tuple(ref.shape)}"
    assert actual.dtype == ref.dtype, f"dtype {actual.dtype}, expected {ref.dtype}"
    if ref.numel() == 0:
        return
    bad = (~actual.double().isfinite()).nonzero()
    assert len(bad) == 0, f"{len(bad)} of {actual.numel()} values are not finite, the first at {bad[0].tolist()}"
    error = (actual.double() - ref.double()).abs()
    rms = ref.double().square().mean().sqrt().item()
    largest, mean = error.max().item(), error.square().mean().sqrt().item()
    where = [int(i) for i in torch.unravel_index(error.argmax(), error.shape)]
    assert largest <= max_rel * rms and mean <= rms_rel * rms, (
        f"error max {largest:.3g} at {where}, rms {mean:.3g}; reference rms {rms:.3g} allows "
        f"{max_rel * rms:.3g} (max_rel {max_rel}) and {rms_rel * rms:.3g} (rms_rel {rms_rel})"
    )


def poison(tensor: torch.Tensor) -> torch.Tensor:
    """Fill with 0xFF bytes (NaN in every float format, -1 in signed integers) and return the tensor."""
    tensor.view(torch.uint8).fill_(0xFF)
    return tensor


def skip_unless_arch(arch: str) -> Any:
    """Pytest mark that skips a test at collection unless the current GPU runs artifacts of the target ``arch``."""
    import pytest

    here = cuda_targets(*torch.cuda.get_device_capability()) if torch.cuda.is_available() else ()
    return pytest.mark.skipif(arch not in here, reason=f"needs {arch}, this machine has {', '.join(here) or 'no GPU'}")
