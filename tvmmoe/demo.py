# SPDX-License-Identifier: Apache-2.0
"""One Mixture-of-Experts layer of a real model, quantised and run: ``python -m tvmmoe.demo --layer gpt-oss-20b``.

The layer is transformers' own module where that is installed, else one of the same shape in plain torch; its weights are
random. They are quantised, and what the FP4 numbers stand for is written back: bfloat16 holds it exactly, so module and
operator compute with the same weights, and the error is the module's rounding to bfloat16 and, with mxfp8, that of
activations. Tokens with equal logits at the border of top_k are redrawn: there either expert would be right.

    ms               median of eager calls on the same tokens (caches warm; python -m tvmmoe.bench measures cold ones)
    dequant+matmul   torch on the same FP4 weights: dequantise each active expert, two matmuls, weighted sum
"""

import argparse
import dataclasses
import functools
import inspect
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import tvmmoe
from tvmmoe import layouts, numerics, torch_op
from tvmmoe.arguments import validate
from tvmmoe.baseline import dequantize_matmul
from tvmmoe.bench import device_of, median_us, tokens_of
from tvmmoe.config import ActivationFormat, WeightFormat
from tvmmoe.errors import TvmMoeError, UnsupportedError
from tvmmoe.select import gpu_name, targets_of
from tvmmoe.shapes import shape_case
from tvmmoe.testing import Case, rel_l2

LAYERS = ("gpt-oss-20b", "Qwen3-30B-A3B", "gpt-oss-120b")  # of schedules/shapes.json; the first two by default
# Relative L2 error. The module rounds to bfloat16 after every step, 6e-3 together; z in mxfp8 adds 3e-2.
BOUND = {ActivationFormat.bf16: 1e-2, ActivationFormat.mxfp8: 5e-2}
ROUNDS = {"cpu": (7, 2), "cuda": (30, 6)}  # timed calls of the operator, of dequant+matmul
COLUMNS = "{:14s} {:>6} {:11s} {:>7} {:>12} {:>18} {:>7}  {}"
HEADER = ("layer", "tokens", "format", "rel L2", "operator ms", "dequant+matmul ms", "ratio", "artifact")
ARGUMENTS = inspect.signature(tvmmoe.trtllm_fp4_block_scale_moe).parameters.values()


@dataclasses.dataclass(frozen=True)
class Layer:
    """Parameters of a layer in bfloat16: views of those of ``module``, where there is one."""

    source: str
    case: Case
    router: torch.Tensor  # [E, H]
    gate_up: torch.Tensor  # [E, 2I, H]
    down: torch.Tensor  # [E, H, I]
    biases: tuple[torch.Tensor, ...]  # of these three, [E], [E, 2I], [E, H], or none
    to_up_gate: Callable[[torch.Tensor, int], torch.Tensor]  # rows of gate_up in the operator's order
    module: torch.nn.Module | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The module's, or in plain torch: [T, H] to [T, H]."""
        if self.module is None:
            return plain_moe(self, x)
        out = self.module(x[None])
        return (out[0] if isinstance(out, tuple) else out)[0]

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """bfloat16 [T, E], as the module computes them."""
        return F.linear(x, self.router, *self.biases[:1])


def plain_moe(layer: Layer, x: torch.Tensor) -> torch.Tensor:
    """The layer in torch; rows of gate_up are [up; gate]."""
    case, (values, ids) = layer.case, layer.logits(x).float().topk(layer.case.top_k)
    weights = values.softmax(dim=1).bfloat16()
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for e in ids.unique().tolist():
        token, slot = (ids == e).nonzero(as_tuple=True)
        b1, b2 = (bias[e] for bias in layer.biases[1:]) if layer.biases else (None, None)
        up, gate = F.linear(x[token], layer.gate_up[e], b1).chunk(2, dim=1)
        if case.clamp_limit is not None:
            up, gate = up.clamp(-case.clamp_limit, case.clamp_limit), gate.clamp(max=case.clamp_limit)
        z = (up + (case.beta or 0.0)) * gate * torch.sigmoid(gate * (case.alpha or 1.0))
        out.index_add_(0, token, F.linear(z, layer.down[e], b2).float() * weights[token, slot, None])
    return out.bfloat16()


def own_layer(case: Case, reason: str) -> Layer:
    """A layer in plain torch, parameters uninitialised; rows of gate_up are [up; gate]."""
    e, h, i = case.num_experts, case.hidden_size, case.intermediate_size
    shapes = [(e, h), (e, 2 * i, h), (e, h, i), *([(e,), (e, 2 * i), (e, h)] if case.has_gemm1_bias else [])]
    weights = [torch.empty(shape, dtype=torch.bfloat16, device=case.device) for shape in shapes]
    return Layer(f"own layer in plain torch ({reason})", case, *weights[:3], tuple(weights[3:]), lambda x, dim: x)


def transformers_layer(case: Case) -> Layer:
    """transformers' module of these sizes, parameters uninitialised. Raises ImportError where there is none."""
    import transformers
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssConfig, GptOssMLP
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeConfig, Qwen3MoeSparseMoeBlock

    sizes = dict(hidden_size=case.hidden_size, num_experts_per_tok=case.top_k, experts_implementation="eager")
    if case.has_gemm1_bias:
        sizes |= dict(intermediate_size=case.intermediate_size, num_local_experts=case.num_experts)
        make, config = GptOssMLP, GptOssConfig(**sizes, swiglu_alpha=case.alpha, swiglu_limit=case.clamp_limit)
    else:
        sizes |= dict(moe_intermediate_size=case.intermediate_size, num_experts=case.num_experts)
        make, config = Qwen3MoeSparseMoeBlock, Qwen3MoeConfig(**sizes, norm_topk_prob=True)
    with torch.device("meta"):  # spares the time of the module's own initialisation
        module = make(config)
    source, experts = f"transformers {transformers.__version__} {make.__name__}", module.experts
    if not hasattr(experts, "gate_up_proj"):
        raise ImportError(f"{source} keeps every expert in a module of its own")
    module = module.bfloat16().to_empty(device=case.device).requires_grad_(False)
    gate_up, down = experts.gate_up_proj, experts.down_proj
    if not case.has_gemm1_bias:
        return Layer(source, case, module.gate.weight, gate_up, down, (), layouts.swap_gate_up, module)
    biases = module.router.bias, experts.gate_up_proj_bias, experts.down_proj_bias
    weights = module.router.weight, gate_up.transpose(1, 2), down.transpose(1, 2)
    return Layer(source, case, *weights, biases, layouts.deinterleave_gate_up, module)


def make_layer(case: Case) -> Layer:
    """transformers' module if it can be had, else the own layer, with random parameters."""
    try:
        layer = transformers_layer(case)
    except ImportError as error:
        layer = own_layer(case, str(error))
    # Every tensor is another part of one pool: to draw all of them would take longer than the rest of the demo.
    period = layer.gate_up[0].numel()
    pool = torch.randn(2 * period, generator=torch.Generator(case.device).manual_seed(case.seed), device=case.device)
    gain = 1.0 if case.clamp_limit is None else 3.0  # a few values reach the limit of 7
    tensors = [(layer.router, case.hidden_size**-0.5), *((bias, 0.5) for bias in layer.biases)]
    tensors += [(weight, gain * case.hidden_size**-0.5) for weight in layer.gate_up]
    tensors += [(weight, case.intermediate_size**-0.5) for weight in layer.down]
    for i, (tensor, size) in enumerate(tensors):
        start = 7919 * i % period  # a prime: no row of two experts is the same
        tensor.copy_(pool[start : start + tensor.numel()].view(tensor.shape) * size)
    return layer


def dequantize(values: torch.Tensor, scale: torch.Tensor, factor: torch.Tensor | float) -> torch.Tensor:
    """Float32 values of mxfp4, or of nvfp4 with its global factor."""
    is_mxfp4 = values.shape[-1] == 16 * scale.shape[-1]
    return numerics.dequantize_mxfp4(values, scale) if is_mxfp4 else numerics.dequantize_nvfp4(values, scale, factor)


def quantize_expert(weight: torch.Tensor, weight_format: WeightFormat) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Packed values, block scales and global factor of [rows, columns], which becomes what they stand for."""
    if weight_format == WeightFormat.mxfp4:
        quantized = *numerics.quantize_mxfp4(weight), 1.0
    else:  # the factor is a power of two: with another one bfloat16 would not hold the values
        factor = 2.0 ** math.floor(math.log2(numerics.nvfp4_global_scale(weight).item()))
        quantized = *numerics.quantize_nvfp4(weight, factor), factor
    weight.copy_(dequantize(*quantized))
    return quantized


def quantize(layer: Layer) -> tuple[dict[str, Any], torch.Tensor]:
    """The operator's arguments that are the same for all tokens, and the global factors [2, E] of both weights.

    The weights of ``layer`` become exactly the quantised ones.
    """
    case, factors = layer.case, torch.ones(2, layer.case.num_experts)
    kwargs = {argument.name: None for argument in ARGUMENTS if argument.default is argument.empty} | dict(
        num_experts=case.num_experts, top_k=case.top_k, intermediate_size=case.intermediate_size,
        local_expert_offset=0, local_num_experts=case.num_experts, routing_method_type=case.routing_method,
    )  # fmt: skip
    for i, weights, order in ((0, layer.gate_up, layer.to_up_gate), (1, layer.down, lambda x, dim: x)):
        experts, rows, columns = weights.shape
        packed = weights.new_empty(experts, rows, columns // 2, dtype=torch.uint8)
        scales = weights.new_empty(experts, rows, columns // case.weight_format.block_size, dtype=torch.uint8)
        for e in range(experts):  # one by one: float32 copies of all would be the largest thing in memory
            values, scale, factors[i, e] = quantize_expert(weights[e], case.weight_format)
            packed[e], scales[e] = order(values, 0), order(scale.view(torch.uint8), 0)
        kwargs |= {f"gemm{i + 1}_weights": packed, f"gemm{i + 1}_weights_scale": scales}
    unit1, unit2 = factors = factors.to(case.device)  # raw accumulators per real unit: biases, beta and limit are raw
    if case.weight_format == WeightFormat.nvfp4:
        kwargs |= dict(output1_scale_scalar=1 / unit1, output1_scale_gate_scalar=1 / unit1, output2_scale_scalar=1 / unit2)
    if layer.biases:
        kwargs["gemm1_bias"] = layer.to_up_gate(layer.biases[1], 1) * unit1[:, None]
        kwargs["gemm2_bias"] = layer.biases[2] * unit2[:, None]
    if case.clamp_limit is not None:
        kwargs |= dict(gemm1_alpha=torch.full_like(unit1, case.alpha), gemm1_beta=case.beta * unit1)
        kwargs["gemm1_clamp_limit"] = case.clamp_limit * unit1
    return kwargs, factors


def draw_tokens(layer: Layer, num_tokens: int) -> tuple[dict[str, torch.Tensor | None], torch.Tensor]:
    """What the operator takes of random tokens, and the same numbers in bfloat16 for the module."""
    case, generator = layer.case, torch.Generator(layer.case.device).manual_seed(layer.case.seed + num_tokens)
    x = torch.empty(num_tokens, case.hidden_size, device=case.device)
    redraw = torch.ones(num_tokens, dtype=torch.bool, device=case.device)
    while redraw.any():
        x[redraw] = torch.randn(int(redraw.sum()), case.hidden_size, generator=generator, device=case.device)
        values, scale, exact = x.bfloat16(), None, x.bfloat16()
        if case.activation_format == ActivationFormat.mxfp8:
            values, scale = numerics.quantize_mxfp8(x)
            exact = numerics.dequantize_mxfp8(values, scale).bfloat16()
        logits = layer.logits(exact)
        best = logits.topk(min(case.top_k + 1, case.num_experts)).values
        redraw = (best[:, case.top_k - 1 : -1] == best[:, case.top_k :]).any(dim=1)
    return dict(hidden_states=values, hidden_states_scale=scale, routing_logits=logits), exact


def fastest_dtype(device: torch.device) -> torch.dtype:
    """What torch multiplies faster there: float32 on CPUs without bfloat16 arithmetic."""
    a = {dtype: torch.ones(1024, 1024, dtype=dtype, device=device) for dtype in (torch.bfloat16, torch.float32)}
    return min(a, key=lambda dtype: median_us(lambda: a[dtype][:16] @ a[dtype], device))


def free_bytes(device: torch.device) -> int:
    """Memory that can still be allocated there."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return 1024 * int(fields["MemAvailable"].split()[0])


def fitted(case: Case) -> tuple[Case, str]:
    """The case with as many experts as fit into free memory, and what to say about it."""
    free = free_bytes(torch.device(case.device))
    matrix = case.hidden_size * case.intermediate_size
    per_expert = 3 * matrix * (2 + 0.5 + 1 / case.weight_format.block_size)  # bfloat16, FP4 and its scales
    rest = 4 * 4 * 2 * matrix  # float32: the random numbers and copies of one gate_up
    count = min(case.num_experts, int((0.8 * free - rest) / per_expert))
    if count < case.top_k:
        raise UnsupportedError(f"{free / 1e9:.1f} GB of free memory hold {max(count, 0)} experts, top_k is {case.top_k}")
    note = f" instead of {case.num_experts} ({free / 1e9:.1f} GB of memory free)" if count < case.num_experts else ""
    return dataclasses.replace(case, num_experts=count), f"{count} experts{note}"


def run(name: str, case: Case, num_tokens: list[int]) -> bool:
    """Print one layer's part of the table; whether every error is within its bound."""
    mode = dict(activation_format=case.activation_format.name, weight_format=case.weight_format.name)
    sizes = case.hidden_size, case.intermediate_size, case.num_experts, case.top_k
    tvmmoe.workspace_bytes(1, *sizes, **mode, device=case.device)  # no artifact: says so before the work
    case, experts = fitted(case)
    sizes = f"hidden size {case.hidden_size}, intermediate size {case.intermediate_size}, {experts}, top {case.top_k}"
    print(f"\n{name}: {sizes}; drawing weights and rounding them to {case.weight_format.name} ...", flush=True)
    layer = make_layer(case)
    kwargs, _ = quantize(layer)
    print(f"{layer.source}, random weights")
    print(COLUMNS.format(*HEADER), flush=True)
    is_right, bound, dtype = True, BOUND[case.activation_format], fastest_dtype(torch.device(case.device))
    for count in num_tokens:
        tokens, x = draw_tokens(layer, count)
        call = functools.partial(tvmmoe.trtllm_fp4_block_scale_moe, **kwargs | tokens)
        error = rel_l2(call()[0], layer.forward(x))
        plain = functools.partial(dequantize_matmul, dtype, **call.keywords)
        ms, plain_ms = (1e-3 * median_us(f, x.device, n) for f, n in zip((call, plain), ROUNDS[x.device.type], strict=True))
        entry = torch_op.selected_entry(validate(**call.keywords))
        numbers = f"{error:.1e}", f"{ms:.3f}", f"{plain_ms:.3f}", f"{plain_ms / ms:.1f}x"
        print(COLUMNS.format(name, count, "-".join(mode.values()), *numbers, f"{entry.file} {entry.symbol}"), flush=True)
        if not error <= bound:  # also where it is NaN
            is_right = False
            print(f"{name}, {count} tokens: relative L2 error {error:.1e} exceeds {bound:.0e}", file=sys.stderr)
    return is_right


def parse(argv: list[str] | None, layers: dict[str, Case]) -> argparse.Namespace:
    """Command line, with the chosen ``layers`` in the wanted formats."""
    form = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m tvmmoe.demo", description=__doc__, formatter_class=form)
    names = list(layers)
    parser.add_argument("--layer", choices=(*names, "all"), help=f"default: {' and '.join(names[:2])}, on a CPU {names[0]}")
    parser.add_argument("--tokens", type=tokens_of, default="1,16,128")
    parser.add_argument("--activation", default="bf16", choices=[form.name for form in BOUND])
    parser.add_argument("--format", default="mxfp4", choices=[form.name for form in WeightFormat], help="of the weights")
    parser.add_argument("--device", type=device_of, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    few = names[: 1 if options.device == "cpu" else 2]
    chosen = {None: few, "all": names}.get(options.layer, [options.layer])
    fields = dict(activation_format=ActivationFormat[options.activation], weight_format=WeightFormat[options.format])
    fields |= dict(device=options.device, seed=options.seed)
    options.layers = {name: dataclasses.replace(layers[name], **fields) for name in chosen}
    return options


def main(argv: list[str] | None = None, layers: dict[str, Case] | None = None) -> int:
    """Command line, for ``layers`` instead of the real ones if given; exit status 1 if a result was wrong."""
    options = parse(argv, layers or {name: shape_case(name, 1) for name in LAYERS})
    device, is_right = torch.device(options.device), True
    machine = gpu_name(device) or f"{torch.get_num_threads()} threads"
    print(f"tvmmoe {tvmmoe.__version__}, torch {torch.__version__}, {device}, {machine}; targets", *targets_of(device))
    for name, case in options.layers.items():
        try:
            is_right &= run(name, case, options.tokens)
        except TvmMoeError as error:
            is_right = False
            print(f"{name}: {error}", file=sys.stderr)
    return 0 if is_right else 1


if __name__ == "__main__":
    sys.exit(main())
