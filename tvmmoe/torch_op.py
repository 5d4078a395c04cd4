# SPDX-License-Identifier: Apache-2.0
"""The launch: results and workspace from torch's allocator, then one packed call; the op that torch.compile sees.

Eager calls go straight to :func:`launch`, known ones past it (:mod:`tvmmoe.relaunch`). What is traced calls the registered
``tvmmoe::fp4_block_scale_moe``, whose fake implementation runs the same validation on fake tensors.
"""

import functools
import importlib
import inspect
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from tvmmoe import abi, loader, refusals
from tvmmoe.arguments import NAMES, validate
from tvmmoe.config import ActivationType, Problem, RoutingMethodType
from tvmmoe.errors import DtypeError, UnverifiedWarning
from tvmmoe.loader import Entry, Manifest
from tvmmoe.select import gpu_name, select, targets_of
from tvmmoe.workspace import cpu_slices, max_num_tiles


def num_padded_tokens(problem: Problem, tile_m: int) -> int:
    """Rows of ``gemm2_output``: what the worst routing needs, every expert's segment padded to ``tile_m``."""
    return tile_m * max_num_tiles(problem.num_tokens * problem.top_k, problem.local_num_experts, tile_m)


def entry_workspace_bytes(problem: Problem, entry: Entry) -> int:
    """Bytes of workspace that ``entry`` needs for ``problem``."""
    sizes = (problem.num_tokens, problem.top_k, problem.hidden_size, problem.intermediate_size)
    sizes = (*sizes, problem.local_num_experts, entry.tile_m)
    if not entry.target.startswith("sm"):
        return cpu_slices(*sizes)[1]
    layout = importlib.import_module(f"tvmmoe.kernels.{entry.target}.layout")
    return layout.workspace_bytes(*sizes, problem.weight_format)


class Plan(NamedTuple):
    """Everything of a launch that follows from the problem alone."""

    entry: Entry
    function: Callable[..., None]
    set_num_threads: Callable[[int], None] | None  # CPU
    workspace_bytes: int
    ints: tuple[int, ...]  # abi.INTS with the dtypes of logits and bias to be filled in


@functools.lru_cache(maxsize=4096)
def plan(problem: Problem, entry: Entry, source: Manifest | None = None) -> Plan:
    """How ``entry``, of the manifest ``source`` or the default one, runs ``problem``; loads its artifact."""
    module = loader.load(source or loader.manifest(), entry.file)
    set_num_threads = module["set_num_threads"] if entry.target.startswith("x86") else None
    return Plan(entry, module[entry.symbol], set_num_threads, entry_workspace_bytes(problem, entry), _ints(problem))


def selected_entry(problem: Problem) -> Entry:
    """The manifest entry that serves ``problem`` on its device."""
    source = loader.manifest()
    gpu = gpu_name(problem.device)
    entry = select(source, targets_of(problem.device), problem, gpu)
    if (verified := source.files[entry.file]["verified"]) != "measured":
        _warn_once(entry.target, entry.file, verified)
    if os.environ.get("TVMMOE_VERBOSE"):
        print(f"tvmmoe: {problem!r} on {gpu or problem.device} -> {entry!r}", file=sys.stderr)
    return entry


@functools.cache
def _warn_once(target: str, file: str, verified: str) -> None:
    proof = {
        "emulated": "passed the tests on another GPU, with a function in place of the tensor core's instruction",
        "compiled": "has been compiled, and nothing of it has ever run",
    }
    warnings.warn(
        f"{file} has not run on a GPU of its target {target} yet: it {proof[verified]}; "
        "verify it with python -m pytest -m gpu",
        UnverifiedWarning,
        stacklevel=2,
    )


@functools.lru_cache(maxsize=4096)
def selected_plan(problem: Problem) -> Plan:
    """How ``problem`` runs on its device."""
    return plan(problem, selected_entry(problem))


def new_results(problem: Problem, tile_m: int, has_output: bool) -> list[torch.Tensor]:
    """Uninitialised results that the caller did not pass: the output, or the three of ``do_finalize=False``."""
    make = functools.partial(torch.empty, device=problem.device)
    if problem.do_finalize:
        return [] if has_output else [make(problem.num_tokens, problem.output_hidden_size, dtype=torch.bfloat16)]
    pairs = problem.num_tokens * problem.top_k
    return [
        # Zeros: tiles beyond the live ones are never computed, and padding is promised to be zero.
        make(num_padded_tokens(problem, tile_m), problem.hidden_size, dtype=torch.bfloat16).zero_(),
        make(problem.num_tokens, problem.top_k, dtype=torch.bfloat16),
        make(pairs, dtype=torch.int32),
    ]


def launch(
    problem: Problem, tensors: dict[str, torch.Tensor | None], entry: Entry | None = None, source: Manifest | None = None
) -> list[torch.Tensor]:
    """Run a validated call by ``entry`` of ``source``, or the selected one; ``tensors`` are the tensor arguments by name."""
    output = tensors["output"] if problem.do_finalize else None
    if problem.num_tokens == 0:
        results = new_results(problem, (entry or selected_entry(problem)).tile_m, output is not None)
        return results if output is None else [output]
    p = selected_plan(problem) if entry is None else plan(problem, entry, source)
    results = new_results(problem, p.entry.tile_m, output is not None)
    if problem.do_finalize:
        written = {"output": results[0] if output is None else output}
    else:
        written = dict(zip(_PIECES, results, strict=True))
    workspace = torch.empty(p.workspace_bytes, dtype=torch.uint8, device=problem.device)
    if p.set_num_threads is not None:
        p.set_num_threads(torch.get_num_threads())
    # A CUDA entry makes the workspace's device current while it launches.
    p.function(workspace, *entry_arguments(p, problem, tensors, written))
    return results if output is None else [output]


def entry_arguments(
    p: Plan, problem: Problem, tensors: dict[str, torch.Tensor | None], written: dict[str, torch.Tensor]
) -> tuple[int | float, ...]:
    """What an entry is called with after its workspace; ``written`` are the results by name."""
    addresses = [0] * len(abi.POINTERS)
    for name, index in _INPUTS:
        if (tensor := tensors[name]) is not None:
            addresses[index] = tensor.data_ptr()
    for name, tensor in written.items():
        addresses[_RESULTS[name]] = tensor.data_ptr()
    return (*addresses, *_with_dtypes(p.ints, tensors), problem.routed_scaling_factor)


_PIECES = ("gemm2_output", "expert_weights", "expanded_idx_to_permuted_idx")  # of do_finalize=False
_RESULTS = {name: abi.POINTERS.index(name) for name in ("output", *_PIECES)}
_INPUTS = tuple((name, i) for i, name in enumerate(abi.POINTERS) if name not in _RESULTS)


def _ints(problem: Problem) -> tuple[int, ...]:
    """Values of ``abi.INTS``, in order, with 0 for the dtypes that only tensors tell."""
    values = {name: int(getattr(problem, name)) for name in abi.INTS if hasattr(problem, name)}
    return tuple(values.get(name, 0) for name in abi.INTS)


_LOGITS_IS_BF16 = abi.INTS.index("logits_is_bf16")
assert abi.INTS[_LOGITS_IS_BF16 + 1] == "bias_is_bf16"


def _with_dtypes(ints: tuple[int, ...], tensors: dict[str, torch.Tensor | None]) -> tuple[int, ...]:
    logits, bias = tensors["routing_logits"], tensors["routing_bias"]
    bias_is_bf16 = bias is not None and bias.dtype is torch.bfloat16
    i = _LOGITS_IS_BF16
    return (*ints[:i], int(logits.dtype is torch.bfloat16), int(bias_is_bf16), *ints[i + 2 :])


_ARGUMENTS = inspect.signature(validate)


def with_defaults(**arguments: Any) -> dict[str, Any]:
    """All arguments of a call that leaves some to their defaults."""
    bound = _ARGUMENTS.bind(**arguments)
    bound.apply_defaults()
    return bound.arguments


_SCHEMA = """(
    Tensor routing_logits, Tensor? routing_bias, Tensor hidden_states, Tensor? hidden_states_scale,
    Tensor gemm1_weights, Tensor gemm1_weights_scale, Tensor? gemm1_bias, Tensor? gemm1_alpha, Tensor? gemm1_beta,
    Tensor? gemm1_clamp_limit, Tensor gemm2_weights, Tensor gemm2_weights_scale, Tensor? gemm2_bias,
    Tensor? output1_scale_scalar, Tensor? output1_scale_gate_scalar, Tensor? output2_scale_scalar,
    int num_experts, int top_k, int? n_group, int? topk_group, int intermediate_size, int local_expert_offset,
    int local_num_experts, float? routed_scaling_factor, int routing_method_type, bool do_finalize, bool? enable_pdl,
    int activation_type, Tensor? per_token_scale, Tensor(a!)? output, int tune_max_num_tokens, bool norm_topk_prob,
    Tensor(b!)? routing_replay_out) -> (Tensor, Tensor, Tensor)"""


@torch.library.custom_op("tvmmoe::fp4_block_scale_moe", mutates_args=("output", "routing_replay_out"), schema=_SCHEMA)
def _registered(*args: Any) -> tuple[torch.Tensor, ...]:
    """The op as dispatched: a fixed number of results, those that the call does not have (or wrote in place) empty."""
    arguments = dict(zip(NAMES, args, strict=True))
    problem = validate(**arguments)
    results = launch(problem, arguments)
    return _three(problem, [] if problem.do_finalize and arguments["output"] is not None else results)


@_registered.register_fake
def _fake(*args: Any) -> tuple[torch.Tensor, ...]:
    arguments = dict(zip(NAMES, args, strict=True))
    problem = validate(**arguments)
    # Sizes may be symbols, which have no hash; asking the table guards on the range of tokens that it answers for.
    tile_m = 1 if problem.do_finalize else selected_entry(problem).tile_m
    return _three(problem, new_results(problem, tile_m, arguments["output"] is not None))


def _three(problem: Problem, results: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """``results`` filled up to three with empty tensors."""
    return (*results, *(torch.empty(0, device=problem.device) for _ in range(3 - len(results))))


_TRACING_MODES = tuple(getattr(torch._C._TorchDispatchModeKey, name) for name in ("PROXY", "FAKE", "FUNCTIONAL"))


def _has_tracing_mode() -> bool:
    """Whether a mode of torch's own is active whose tensors stand for others; a user's, which only looks on, is none."""
    return torch._C._len_torch_dispatch_stack() > 0 and any(map(torch._C._get_dispatch_mode, _TRACING_MODES))


def is_traced() -> bool:
    """Whether a call must go through torch's dispatcher, for tensors only stand for others: torch.compile, torch.jit.trace,
    make_fx, FakeTensorMode or a functorch transform."""
    return (
        torch.compiler.is_compiling()
        or _has_tracing_mode()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
    )


_ENUMS = {
    "routing_method_type": (RoutingMethodType, refusals.routing_method),
    "activation_type": (ActivationType, refusals.activation_type),
}
_BOOLS = frozenset(("do_finalize", "enable_pdl", "norm_topk_prob"))


def traced(**arguments: Any) -> list[torch.Tensor]:
    """What is traced: the registered op, with ``output`` handed back as the eager call does, and without gradients."""
    for name, (kind, member_of) in _ENUMS.items():
        value = arguments[name]
        if type(value) is not int and type(value) is not kind:  # an int of another enum may have another meaning
            value = member_of(value)
        arguments[name] = int(value)
    for name, value in arguments.items():
        if type(value) is bool and name not in _BOOLS:  # which the op's schema takes for an int
            raise DtypeError(f"{name}: got bool {value}, expected int")
        if isinstance(value, torch.Tensor) and value.requires_grad:
            arguments[name] = value.detach()
    results = torch.ops.tvmmoe.fp4_block_scale_moe(*arguments.values())
    if not arguments["do_finalize"]:
        return list(results)
    return [results[0] if arguments["output"] is None else arguments["output"]]
