# SPDX-License-Identifier: Apache-2.0
"""Environment and artifacts: ``python -m tvmmoe.info``; paste it into a bug report.

With a shape, what would serve a call, here or on another machine: ``python -m tvmmoe.info --shape gpt-oss-20b
--tokens 1,64 --target sm90a``; nothing is run, and no CUDA device is needed.
"""

import argparse
import dataclasses
import json
import platform
from typing import Any

import torch
import tvm_ffi

import tvmmoe
from tvmmoe import loader, torch_op
from tvmmoe.arguments import validate
from tvmmoe.config import ActivationFormat, Problem, WeightFormat
from tvmmoe.errors import TvmMoeError
from tvmmoe.select import ALLOW_UNVERIFIED, FP8, VERIFIED, gpu_name, is_allowed, rows_per_expert, select, targets_of
from tvmmoe.shapes import shape_case
from tvmmoe.testing import Case

SIZES = ("hidden_size", "intermediate_size", "num_experts", "top_k")


def report(device: torch.device) -> dict[str, object]:
    """Versions, the device's targets, and every artifact with whether its checksum holds."""
    source = loader.manifest()
    processor = platform.processor() or platform.machine()
    artifacts = {}
    for file, record in source.files.items():
        loader.load(source, file)
        artifacts[file] = {key: record[key] for key in ("target", "bytes", "verified", "tvm", "compiler")}
    return {
        "tvmmoe": tvmmoe.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "tvm_ffi": tvm_ffi.__version__,
        "device": str(device),
        "device_name": gpu_name(device) or processor,
        "targets": list(targets_of(device)),
        "verified": states(source),
        "artifacts_dir": str(source.folder),
        "artifacts": artifacts,
        "entries": [
            f"{e.target} {'/'.join(e.activation_formats)} x {e.weight_format}: rows per expert "
            f"[{e.min_rows_per_expert}, {e.max_rows_per_expert}){_on_others(e)} -> {e.symbol}{_condition(e)}"
            for e in source.entries
        ],
    }


def _on_others(entry: loader.Entry) -> str:
    return "".join(f", on {name} [{low}, {high})" for name, low, high in entry.device_ranges)


def _condition(entry: loader.Entry) -> str:
    return f", only where {FP8}=1 is set" if entry.accumulation == "fp8" else ""


def states(source: loader.Manifest) -> dict[str, str]:
    """The least verified state of each target's files, and whether they serve calls here (select.py explains them)."""
    worst: dict[str, str] = {}
    for record in source.files.values():
        worst[record["target"]] = max(worst.get(record["target"], ""), record["verified"], key=(("", *VERIFIED).index))
    needs = f"; serves only where {ALLOW_UNVERIFIED}=1 is set"
    return {target: state if is_allowed(state) else state + needs for target, state in worst.items()}


def problem_of(case: Case) -> Problem:
    """What the operator makes of such a call; raises what the operator would."""
    block = case.weight_format.block_size
    rows = (2 if case.activation.is_gated else 1) * case.intermediate_size
    is_nvfp4 = case.activation_format == ActivationFormat.nvfp4
    columns = case.hidden_size // 2 if is_nvfp4 else case.hidden_size
    dtypes = {ActivationFormat.bf16: torch.bfloat16, ActivationFormat.mxfp8: torch.float8_e4m3fn}

    def meta(*shape: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    per_expert = meta(case.num_local_experts, dtype=torch.float32) if is_nvfp4 else None
    has_scale = case.activation_format != ActivationFormat.bf16
    return validate(
        routing_logits=meta(case.num_tokens, case.num_experts, dtype=torch.bfloat16),
        routing_bias=None,
        hidden_states=meta(case.num_tokens, columns, dtype=dtypes.get(case.activation_format, torch.uint8)),
        hidden_states_scale=meta(case.num_tokens, case.hidden_size // (16 if is_nvfp4 else 32)) if has_scale else None,
        gemm1_weights=meta(case.num_local_experts, rows, case.hidden_size // 2),
        gemm1_weights_scale=meta(case.num_local_experts, rows, case.hidden_size // block),
        gemm1_bias=None,
        gemm1_alpha=None,
        gemm1_beta=None,
        gemm1_clamp_limit=None,
        gemm2_weights=meta(case.num_local_experts, case.hidden_size, case.intermediate_size // 2),
        gemm2_weights_scale=meta(case.num_local_experts, case.hidden_size, case.intermediate_size // block),
        gemm2_bias=None,
        output1_scale_scalar=per_expert,
        output1_scale_gate_scalar=per_expert,
        output2_scale_scalar=per_expert,
        num_experts=case.num_experts,
        top_k=case.top_k,
        n_group=case.n_group,
        topk_group=case.topk_group,
        intermediate_size=case.intermediate_size,
        local_expert_offset=0,
        local_num_experts=case.num_local_experts,
        routed_scaling_factor=None,
        routing_method_type=case.routing_method,
        activation_type=case.activation,
    )


def selection(case: Case, targets: tuple[str, ...], gpu: str = "") -> dict[str, Any]:
    """The artifact that serves a call on the first of ``targets`` that has one, and what the call takes; ``gpu`` is the
    device's name (select.gpu_name)."""
    problem = problem_of(case)
    entry = select(loader.manifest(), targets, problem, gpu)
    return {
        "num_tokens": case.num_tokens,
        "rows_per_expert": rows_per_expert(problem),
        "target": entry.target,
        "file": entry.file,
        "symbol": entry.symbol,
        "tile_m": entry.tile_m,
        "verified": loader.manifest().files[entry.file]["verified"],
        "workspace_bytes": torch_op.entry_workspace_bytes(problem, entry),
    }


def selections(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One for every number of tokens. Raises ValueError where the command line says too little or too much."""
    sizes = {name: value for name in (*SIZES, "local_num_experts") if (value := getattr(options, name)) is not None}
    formats = dict(
        activation_format=ActivationFormat[options.activation], weight_format=WeightFormat[options.weights]
    )
    if options.shape is not None:
        if set(sizes) & set(SIZES):
            raise ValueError(f"--shape {options.shape} has its own {', '.join(SIZES)}: give either")
        try:
            case = dataclasses.replace(shape_case(options.shape, 1), **formats, **sizes)
        except (KeyError, TypeError) as error:
            raise ValueError(f"--shape {options.shape}: its fields in schedules/shapes.json do not fit: {error}") from None
    else:
        if missing := [f"--{name.replace('_', '-')}" for name in SIZES if name not in sizes]:
            raise ValueError(f"{', '.join(missing)} missing; or give --shape with a name of schedules/shapes.json")
        if negative := [f"--{name.replace('_', '-')}" for name, value in sizes.items() if value < 1]:
            raise ValueError(f"{', '.join(negative)}: expected at least 1")
        case = Case(**formats, **sizes)
    device = torch.device(options.device)
    targets, gpu = ((options.target,), "") if options.target else (targets_of(device), gpu_name(device))
    if options.target is not None and options.target not in (shipped := {e.target for e in loader.manifest().entries}):
        raise ValueError(f"--target: got {options.target}, expected one of {', '.join(sorted(shipped))}")
    counts = (options.tokens or "1,16,128,1024").split(",")
    if not all(map(str.isdecimal, counts)):
        raise ValueError(f"--tokens: got {options.tokens}, expected numbers from 0 on, several with commas")
    tokens = list(map(int, counts))
    return [selection(dataclasses.replace(case, num_tokens=count), targets, gpu) for count in tokens]


def table(rows: list[dict[str, Any]]) -> str:
    """Aligned columns, one line a call."""
    cells = [list(rows[0])] + [[f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    numbers = [not isinstance(value, str) for value in rows[0].values()]
    align = [f"{{:{'>' if is_number else '<'}{width}}}" for is_number, width in zip(numbers, widths, strict=True)]
    return "\n".join("  ".join(align).format(*line).rstrip() for line in cells)


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, list[dict[str, Any]] | None]:
    """Command line, and the selections if it asks for them."""
    form = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m tvmmoe.info", description=__doc__, formatter_class=form)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", action="store_true", help="for machines")
    group = parser.add_argument_group("what would serve a call")
    group.add_argument("--shape", help="a name of schedules/shapes.json, instead of the four sizes")
    for name in (*SIZES, "local_num_experts"):
        group.add_argument(f"--{name.replace('_', '-')}", type=int, metavar="N")
    group.add_argument("--tokens", metavar="N,N,..", help="default: 1,16,128,1024")
    group.add_argument("--activation", default="bf16", choices=[form.name for form in ActivationFormat])
    group.add_argument("--weights", default="mxfp4", choices=[form.name for form in WeightFormat])
    group.add_argument("--target", help="another machine's, like sm90a; default: this device's")
    options = parser.parse_args(argv)
    asked = [getattr(options, name) for name in (*SIZES, "local_num_experts", "shape", "tokens", "target")]
    try:
        if torch.device(options.device).type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"--device: got {options.device}, but torch sees no CUDA device; try --target sm90a")
        return options, None if all(value is None for value in asked) else selections(options)
    except (ValueError, RuntimeError, TvmMoeError) as error:
        parser.error(str(error).splitlines()[0])


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    options, rows = parse(argv)
    content = report(torch.device(options.device)) if rows is None else rows
    if options.json:
        print(json.dumps(content, indent=1))
    elif rows is not None:
        print(table(rows))
    else:
        for key, value in content.items():
            if isinstance(value, (dict, list)):
                print(f"{key}:")
                for item in value.items() if isinstance(value, dict) else value:
                    print(f"  {item if isinstance(item, str) else f'{item[0]}  {item[1]}'}")
            else:
                print(f"{key}: {value}")


if __name__ == "__main__":
    main()
