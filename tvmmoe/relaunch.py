# SPDX-License-Identifier: Apache-2.0
"""Launch a call like one that passed validation before, without validating it again: what eager calls try first.

The host artifact (``kernels/relaunch.cc``) compares the call's signature (every type, value, dtype, shape and device) with
those that were learned, looks at the addresses, and calls the entry. What is not known in every respect is left to
validation, which also says what is wrong with it.
"""

import functools
import platform
from collections.abc import Callable
from typing import Any

import torch

from tvmmoe import abi, arguments, loader, torch_op
from tvmmoe.config import ActivationType, Problem, RoutingMethodType
from tvmmoe.refusals import ALIGNMENT

FILE = "host/relaunch_x86-64.so"

# Types whose values, or identity, say everything: no subclasses.
_TYPES = frozenset((torch.Tensor, torch.nn.Parameter, type(None), int, float, bool, RoutingMethodType, ActivationType))
_KEPT, _OF_THIS_CALL, _WRITTEN = range(3)  # roles, as in relaunch.cc
_ROLES = dict.fromkeys(arguments.PER_CALL, _OF_THIS_CALL) | {"output": _WRITTEN, "routing_replay_out": _WRITTEN}
_HIDDEN_STATES = arguments.NAMES.index("hidden_states")
_OUTPUT = arguments.NAMES.index("output")

_launch: Callable[[int, int, int], bool] | None = None  # of the host artifact, once there is something to relaunch


@functools.cache
def _functions() -> dict[str, Callable[..., Any]] | None:
    """The host artifact's functions; None where it is not shipped or torch (before 2.10) has no C interface to tensors."""
    manifest = loader.manifest()
    torch_api = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    if FILE not in manifest.files or platform.machine() not in ("x86_64", "AMD64") or torch_api is None:
        return None
    module = loader.load(manifest, FILE)
    functions = {name: module[name] for name in ("setup", "describe", "learn", "launch", "forget")}
    for function in functions.values():
        function.release_gil = False  # they read Python objects; launch lets go of it while it launches
    if not functions["setup"](*map(id, (torch_api, torch.Tensor, torch.nn.Parameter, int, float))):
        return None
    for i, name in enumerate(arguments.NAMES):
        slot = abi.POINTERS.index(name) if name in abi.POINTERS else -1
        functions["describe"](i, slot, ALIGNMENT.get(name, 1), _ROLES.get(name, _KEPT))
    functions["describe"](len(arguments.NAMES), abi.POINTERS.index("output"), 1, _KEPT)  # made by relaunch
    return functions


def relaunch(call: tuple[Any, ...]) -> torch.Tensor | None:
    """The output of a known call; None if it is not known. ``call`` has all arguments in their order."""
    hidden_states = call[_HIDDEN_STATES]
    if _launch is None or type(hidden_states) is not torch.Tensor:
        return None
    output, made = call[_OUTPUT], None
    try:
        if output is None and hidden_states.dtype is torch.bfloat16:  # the usual case, in the fastest way
            output = made = torch.empty_like(hidden_states, memory_format=torch.contiguous_format)
        elif output is None:
            num_tokens, columns = hidden_states.shape
            hidden_size = 2 * columns if hidden_states.dtype is torch.uint8 else columns
            output = made = torch.empty(num_tokens, hidden_size, dtype=torch.bfloat16, device=hidden_states.device)
        return output if _launch(id(call), id(made), torch.get_num_threads()) else None
    except Exception:  # whatever it is, the validated call meets it too
        return None


def learn(call: tuple[Any, ...], problem: Problem, results: list[torch.Tensor]) -> None:
    """Remember a call that was validated as ``problem`` and launched with these results."""
    global _launch
    if not problem.do_finalize or problem.num_tokens == 0 or not _TYPES.issuperset(map(type, call)):
        return
    if (functions := _functions()) is None:
        return
    plan = torch_op.selected_plan(problem)
    ints = torch_op._with_dtypes(plan.ints, dict(zip(arguments.NAMES, call, strict=True)))
    made = results[0] if call[_OUTPUT] is None else None
    functions["learn"](
        id(call), id(made), plan.function, plan.set_num_threads, plan.workspace_bytes,
        arguments.is_alignment_checked(problem.device), len(abi.POINTERS), *ints, problem.routed_scaling_factor,
    )  # fmt: skip
    _launch = functions["launch"]


def forget() -> None:
    """Validate and select anew from now on."""
    if _launch is not None:
        _functions()["forget"]()
