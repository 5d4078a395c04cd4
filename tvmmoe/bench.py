# SPDX-License-Identifier: Apache-2.0
"""Time the whole operator, logits to output: ``python -m tvmmoe.bench --shape gpt-oss-120b --tokens 1,64,1024``.

Several routings rotate, so that an expert's weights have left the cache when it is used again; the median of several
rounds counts. The result is checked against the float32 reference first. On CUDA the calls are captured in a graph.

    GB/s    FP4 bytes (weights and block scales) of the distinct active experts, each read once
    floor   max(those bytes / measured copy bandwidth, FLOPs / measured bf16 matmul rate); share = floor / us
    cold    share of those bytes that were not touched within the last L2 size of traffic (CUDA)
    extra   peak memory of one call beyond its inputs and outputs
    host    time of an eager call until it returns, its kernels still running (CUDA); --host measures its parts
"""

import argparse
import ctypes
import dataclasses
import importlib.util
import itertools
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import tvmmoe
from tvmmoe import loader, reference, torch_op
from tvmmoe.arguments import validate
from tvmmoe.baseline import dequantize_matmul, route
from tvmmoe.errors import TvmMoeError
from tvmmoe.shapes import shape_case, shapes
from tvmmoe.testing import Case, make_case, rel_l2

NUM_ROUTINGS = 8
ROUNDS = 7
REST_S = 0.3  # before a cell is timed: 100 ms of load may take a card to its power limit
CHECKED_TOKENS = 64
MODES = {"-".join(mode): mode for mode in [("bf16", "mxfp4"), ("bf16", "nvfp4"), ("mxfp8", "mxfp4"), ("nvfp4", "nvfp4")]}
PER_TOKEN = ("routing_logits", "hidden_states", "hidden_states_scale", "per_token_scale")


@dataclasses.dataclass(frozen=True)
class Machine:
    """Measured limits of a device."""

    name: str
    copy_gb_per_s: float  # read + write
    bf16_tflop_per_s: float
    l2_bytes: int


@dataclasses.dataclass(frozen=True)
class Row:
    """One measured cell."""

    shape: str
    mode: str
    num_tokens: int
    entry: str
    us: float
    gb_per_s: float
    tflop_per_s: float
    floor_us: float
    share: float
    cold: float
    extra_mib: float
    rel_l2: float
    host_us: float | None = None
    public_us: float | None = None
    dequantize_matmul_us: float | None = None
    stages_us: dict[str, float] | None = None
    host_parts_us: dict[str, float] | None = None


# --------------------------------------------------------------------------------------------------------- machine


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median_us(call: Callable[[], Any], device: torch.device, rounds: int = ROUNDS) -> float:
    """Median duration of ``call``, after one warm-up."""
    call()
    times = []
    for _ in range(rounds):
        synchronize(device)
        if device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            call()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1e3)
        else:
            begin = time.perf_counter()
            call()
            times.append((time.perf_counter() - begin) * 1e6)
    return statistics.median(times)


def rested_us(call: Callable[[], Any], device: torch.device, rounds: int = ROUNDS) -> float:
    """:func:`median_us` of a device that has had a rest."""
    synchronize(device)
    if device.type == "cuda":
        time.sleep(REST_S)
    return median_us(call, device, rounds)


def measure_machine(device: torch.device) -> Machine:
    """Copy bandwidth and bf16 matmul rate, as torch reaches them here."""
    is_cuda = device.type == "cuda"
    source = torch.ones((1 << 30) if is_cuda else (1 << 27), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = median_us(lambda: target.copy_(source), device)
    m, n, k = (8192, 4096, 4096) if is_cuda else (512, 2048, 2048)
    a, b = torch.randn(m, k, device=device).bfloat16(), torch.randn(n, k, device=device).bfloat16()
    matmul = median_us(lambda: a @ b.T, device)
    properties = torch.cuda.get_device_properties(device) if is_cuda else None
    cpu_name = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    return Machine(
        name=properties.name if is_cuda else cpu_name,
        copy_gb_per_s=2e-3 * source.numel() / copy,
        bf16_tflop_per_s=2e-6 * m * n * k / matmul,
        l2_bytes=properties.L2_cache_size if is_cuda else 0,
    )


def environment(device: torch.device) -> dict[str, Any]:
    """What a saved result must carry to be compared with another."""
    result = {
        "tvmmoe": tvmmoe.__version__,
        "torch": torch.__version__,
        "platform": platform.platform(),
        "date": time.strftime("%Y-%m-%d"),
        "artifacts": {file: record["sha256"] for file, record in loader.manifest().files.items()},
    }
    if device.type == "cuda":
        query = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit"
        command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", f"--id={device.index or 0}"]
        answer = subprocess.run(command, capture_output=True, text=True)
        result["gpu"] = dict(zip(query.split(","), answer.stdout.strip().split(", "), strict=False))
    return result


# ------------------------------------------------------------------------------------------------------------ calls


def weight_bytes_per_expert(case: Case) -> int:
    """FP4 bytes of one expert: both projections with their block scales."""
    block_size = case.weight_format.block_size
    return weights_per_expert(case) * (block_size + 2) // (2 * block_size)


def weights_per_expert(case: Case) -> int:
    """Elements of both projections of one expert."""
    matrices = (2 if case.activation.is_gated else 1) + 1
    return matrices * case.intermediate_size * case.hidden_size


def shape_call(name: str, num_tokens: int, mode: tuple[str, str], device: str) -> dict[str, Any]:
    """Arguments of a shape's call on random data."""
    kwargs = make_case(shape_case(name, num_tokens, *mode, device=device))
    if kwargs["routing_bias"] is not None:
        kwargs["routing_bias"] *= 0.01  # a trained bias balances the experts; a random one would starve some
    return kwargs


def of_tokens(kwargs: dict[str, Any], index: slice | torch.Tensor) -> dict[str, Any]:
    """The same call on some of its tokens."""
    return kwargs | {name: kwargs[name][index] for name in PER_TOKEN if kwargs[name] is not None}


def routings(case: Case, kwargs: dict[str, Any]) -> tuple[list[torch.Tensor], list[set[int]], float]:
    """Random logits, the local experts that each activates, and the mean number of local (token, slot) pairs."""
    generator = torch.Generator(case.device).manual_seed(1234)
    logits, active, pairs = [], [], 0
    for _ in range(NUM_ROUTINGS):
        x = torch.randn(case.num_tokens, case.num_experts, generator=generator, device=case.device)
        logits.append(x.to(case.logits_dtype))
        ids, _ = route(kwargs, logits[-1])
        local = ids[(ids >= case.local_expert_offset) & (ids < case.local_expert_offset + case.num_local_experts)]
        active.append(set(local.unique().tolist()))
        pairs += local.numel()
    return logits, active, pairs / NUM_ROUTINGS


def cold_share(active: list[set[int]], expert_bytes: int, l2_bytes: int) -> float:
    """Share of the active experts' bytes that at least ``l2_bytes`` of other traffic separate from their last use."""
    if not l2_bytes or not any(active):
        return 1.0
    age, cold = {}, 0
    for experts in itertools.chain(active, active):  # the second round is the one that counts: rounds follow each other
        cold = 0 if experts is active[0] and age else cold
        for expert in sorted(experts):
            cold += age.get(expert, l2_bytes) >= l2_bytes
            age = {other: value + expert_bytes for other, value in age.items()} | {expert: 0}
    return cold / sum(len(experts) for experts in active)


def check(case: Case, kwargs: dict[str, Any]) -> float:
    """:func:`errors_of` the operator alone."""
    return errors_of([tvmmoe.trtllm_fp4_block_scale_moe], case, kwargs)[0]


def errors_of(calls: list[Callable[..., list[torch.Tensor]]], case: Case, kwargs: dict[str, Any]) -> list[float]:
    """Relative L2 errors of sampled tokens against the reference; raises AssertionError beyond the case's tolerance."""
    results = [call(**kwargs)[0] for call in calls]
    sample = torch.arange(case.num_tokens, device=case.device)
    if case.num_tokens > CHECKED_TOKENS:
        sample = torch.linspace(0, case.num_tokens - 1, CHECKED_TOKENS, device=case.device).long()
    (expected,) = reference.moe_ref(**of_tokens(kwargs, sample))
    errors = [rel_l2(actual[sample], expected) for actual in results]
    for error in errors:
        assert error <= case.tolerance, f"{case.label}: relative L2 error {error:.2e} exceeds {case.tolerance:.0e}"
    return errors


def rotating(
    case: Case, kwargs: dict[str, Any], logits: list[torch.Tensor], call: Callable[..., Any] | None = None
) -> Callable[[], None]:
    """One round over all routings of ``call``, by default the operator; a graph replay on CUDA."""
    call = call or tvmmoe.trtllm_fp4_block_scale_moe
    output = torch.empty(case.num_tokens, case.hidden_size, dtype=torch.bfloat16, device=case.device)
    calls = [kwargs | dict(routing_logits=x, output=output) for x in logits]

    def round_() -> None:
        for arguments in calls:
            call(**arguments)

    if torch.device(case.device).type != "cuda":
        return round_
    round_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        round_()
    return graph.replay


def extra_bytes(kwargs: dict[str, Any], device: torch.device) -> int:
    """Peak memory of one call above what was allocated before it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        tvmmoe.trtllm_fp4_block_scale_moe(**kwargs)
        return torch.cuda.max_memory_allocated(device) - before
    ctypes.CDLL(None).malloc_trim(0)  # freed memory that the call would reuse is not free of charge
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to VmRSS
    before = _status_bytes("VmRSS")
    tvmmoe.trtllm_fp4_block_scale_moe(**kwargs)
    return _status_bytes("VmHWM") - before


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def host_us(call: Callable[[], Any], device: torch.device, num_calls: int = 50) -> float:
    """Time that the caller of ``call`` waits for it to return: median over rounds of calls without synchronisation.

    The launch queue must not fill up in a round.
    """
    times = []
    for _ in range(2 * ROUNDS):
        synchronize(device)
        begin = time.perf_counter()
        for _ in range(num_calls):
            call()
        times.append((time.perf_counter() - begin) / num_calls * 1e6)
    synchronize(device)
    return statistics.median(times)


def host_parts(kwargs: dict[str, Any], device: torch.device) -> dict[str, float]:
    """Host time of an eager call in its forms and of the parts that a validated one consists of.

    On the CPU the calls and the entry compute before they return.
    """
    call = torch_op.with_defaults(**kwargs)
    problem = validate(**call)
    plan = torch_op.selected_plan(problem)

    def allocate() -> tuple[torch.Tensor, torch.Tensor]:
        (output,) = torch_op.new_results(problem, plan.entry.tile_m, False)
        return output, torch.empty(plan.workspace_bytes, dtype=torch.uint8, device=device)

    output, workspace = allocate()
    arguments = torch_op.entry_arguments(plan, problem, call, {"output": output})
    parts = {
        "call": lambda: tvmmoe.trtllm_fp4_block_scale_moe(**kwargs),
        "call with output": lambda: tvmmoe.trtllm_fp4_block_scale_moe(**kwargs, output=output),
        "validated call": lambda: torch_op.launch(validate(**call), call),
        "validate": lambda: validate(**call),
        "allocate": allocate,
        "entry": lambda: plan.function(workspace, *arguments),
    }
    return {name: host_us(part, device) for name, part in parts.items()}


def stage_times(
    kwargs: dict[str, Any], logits: list[torch.Tensor], call: Callable[..., Any] | None = None
) -> dict[str, float]:
    """Median time of each kernel of ``call``, in launch order, without programmatic dependent launch so that none overlap."""
    from torch.profiler import ProfilerActivity, profile

    names: dict[str, list[float]] = {}
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        for x in logits:
            (call or tvmmoe.trtllm_fp4_block_scale_moe)(**kwargs | dict(routing_logits=x, enable_pdl=False))
        torch.cuda.synchronize()
    for event in sorted(trace.events(), key=lambda event: event.time_range.start):
        if "fp4_block_scale_moe" in event.name:
            names.setdefault(_stage_of(event.name), []).append(event.device_time)
    return {name: statistics.median(times) for name, times in names.items()}


def _stage_of(kernel_name: str) -> str:
    return kernel_name.rsplit("_moe_", 1)[1].split("_", 2)[2]


# ------------------------------------------------------------------------------------------------------------ table


def measure(machine: Machine, name: str, case: Case, kwargs: dict[str, Any], options: argparse.Namespace) -> Row:
    """Check and time one cell; ``kwargs`` may hold more tokens than the case."""
    device = torch.device(case.device)
    kwargs = of_tokens(kwargs, slice(case.num_tokens))
    logits, active, pairs = routings(case, kwargs)
    kwargs["routing_logits"] = logits[0]
    extra = extra_bytes(kwargs, device)
    error = check(case, kwargs)
    us = rested_us(rotating(case, kwargs, logits), device, options.rounds) / NUM_ROUTINGS
    expert_bytes = weight_bytes_per_expert(case)
    num_bytes = expert_bytes * statistics.mean(len(experts) for experts in active)
    flops = 2.0 * pairs * weights_per_expert(case)
    floor = max(num_bytes / machine.copy_gb_per_s * 1e-3, flops / machine.bf16_tflop_per_s * 1e-6)
    entry = torch_op.selected_entry(validate(**kwargs))
    mode = (case.activation_format.name, case.weight_format.name)
    public = _public_times().get(name, {}) if mode == ("bf16", "mxfp4") and "H100" in machine.name else {}
    return Row(
        shape=name,
        mode="-".join(mode),
        num_tokens=case.num_tokens,
        entry=entry.symbol,
        us=us,
        gb_per_s=num_bytes / us * 1e-3,
        tflop_per_s=flops / us * 1e-6,
        floor_us=floor,
        share=floor / us,
        cold=cold_share(active, expert_bytes, machine.l2_bytes),
        extra_mib=extra / 2**20,
        rel_l2=error,
        host_us=host_us(lambda: tvmmoe.trtllm_fp4_block_scale_moe(**kwargs), device) if device.type == "cuda" else None,
        public_us=public.get(str(case.num_tokens)),
        dequantize_matmul_us=median_us(lambda: dequantize_matmul(**kwargs), device, 3) if options.baseline else None,
        stages_us=stage_times(kwargs, logits) if options.stages else None,
        host_parts_us=host_parts(kwargs, device) if options.host else None,
    )


def _public_times() -> dict[str, dict[str, float]]:
    return json.loads((loader.data_dir("schedules") / "results" / "public_h100.json").read_text())["shapes"]


HEADER = (
    f"{'shape':20s} {'mode':13s} {'T':>6s} {'us':>10s} {'GB/s':>6s} {'TFLOP/s':>8s} {'floor us':>9s} {'share':>6s} "
    f"{'cold':>5s} {'extra MiB':>9s} {'rel L2':>8s}"
)


def line(row: Row) -> str:
    """A row of the printed table."""
    text = (
        f"{row.shape:20s} {row.mode:13s} {row.num_tokens:6d} {row.us:10.1f} {row.gb_per_s:6.0f} {row.tflop_per_s:8.1f} "
        f"{row.floor_us:9.1f} {row.share:6.2f} {row.cold:5.2f} {row.extra_mib:9.1f} {row.rel_l2:8.1e}"
    )
    if row.host_us:
        text += f"  host {row.host_us:.0f} us"
    if row.public_us:
        text += f"  best public {row.public_us:.0f} us ({row.public_us / row.us:.2f}x)"
    if row.dequantize_matmul_us:
        text += f"  dequantise + matmul {row.dequantize_matmul_us:.0f} us ({row.dequantize_matmul_us / row.us:.1f}x)"
    for title, parts in (("", row.stages_us), ("host: ", row.host_parts_us)):
        if parts:
            text += "\n" + " " * 22 + title + "  ".join(f"{name} {us:.1f}" for name, us in parts.items())
    return text


def plot(rows: list[Row], machine: Machine, path: Path) -> None:
    """Roofline: TFLOP/s over FLOPs per FP4 byte."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5))
    intensity = [row.tflop_per_s / row.gb_per_s * 1e3 for row in rows]
    xs = [min(intensity) / 2, machine.bf16_tflop_per_s / machine.copy_gb_per_s * 1e3, 2 * max(intensity)]
    limits = [min(x * machine.copy_gb_per_s * 1e-3, machine.bf16_tflop_per_s) for x in xs]
    axes.plot(xs, limits, "k-", label="measured limits")
    for name, mode in dict.fromkeys((row.shape, row.mode) for row in rows):
        cells = zip(intensity, rows, strict=True)
        points = [(x, row.tflop_per_s) for x, row in cells if (row.shape, row.mode) == (name, mode)]
        axes.plot(*zip(*points, strict=True), "o-", label=f"{name} {mode}")
    axes.set(xscale="log", yscale="log", xlabel="FLOPs per FP4 weight byte", ylabel="TFLOP/s", title=machine.name)
    axes.legend()
    axes.grid(True, which="both", alpha=0.3)
    figure.savefig(path, dpi=120)


def save(head: dict[str, Any], rows: list[Row], path: Path) -> None:
    """What has been measured so far."""
    path.write_text(json.dumps(head | dict(rows=[dataclasses.asdict(row) for row in rows]), indent=1) + "\n")


def modes_of(names: str) -> list[str]:
    """Type of an option: keys of MODES."""
    modes = list(MODES) if names == "all" else names.split(",")
    if unknown := [mode for mode in modes if mode not in MODES]:
        raise argparse.ArgumentTypeError(f"got {unknown[0]}, expected all or some of {', '.join(MODES)}")
    return modes


def tokens_of(text: str) -> list[int]:
    """Type of an option."""
    numbers = text.split(",")
    if not all(number.isdecimal() and int(number) for number in numbers):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected numbers from 1 on, several with commas")
    return list(map(int, numbers))


def device_of(text: str) -> str:
    """Type of an option: one that is here."""
    kinds = ("cpu", "cuda")[: 1 + torch.cuda.is_available()]
    if text.split(":")[0] not in kinds:
        raise argparse.ArgumentTypeError(f"got {text}, expected {' or '.join(kinds)}")
    return text


def parser_of(prog: str, description: str) -> argparse.ArgumentParser:
    """Which cells are timed, on what, and how often."""
    parser = argparse.ArgumentParser(prog=prog, description=description, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shape", default="Qwen3-30B-A3B", help=f"all, or several of {', '.join(shapes())}")
    parser.add_argument("--tokens", type=tokens_of, default="1,16,128")
    mode_help = f"activations-weights: all, or several of {', '.join(MODES)}"
    parser.add_argument("--mode", type=modes_of, default="bf16-mxfp4", help=mode_help)
    parser.add_argument("--device", type=device_of, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--stages", action="store_true", help="per-kernel times (CUDA)")
    return parser


def options_of(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """Its options, with a list of shapes."""
    options = parser.parse_args(argv)
    options.shape = list(shapes()) if options.shape == "all" else options.shape.split(",")
    try:
        for name in options.shape:
            shape_case(name, 1)
    except ValueError as error:
        parser.error(str(error))
    if options.rounds < 1:
        parser.error(f"--rounds: got {options.rounds}, expected 1 or more")
    if options.stages and not options.device.startswith("cuda"):
        parser.error("--stages needs a CUDA device: the CPU operator is one function")
    return options


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = parser_of("python -m tvmmoe.bench", __doc__)
    parser.add_argument("--host", action="store_true", help="host time of an eager call and of its parts")
    parser.add_argument("--baseline", action="store_true", help="time dequantise + torch matmul too")
    parser.add_argument("--save", type=Path, metavar="FILE.json", help="written anew after every row")
    parser.add_argument("--plot", type=Path, metavar="FILE.png")
    options = options_of(parser, argv)
    for name, path in (("--save", options.save), ("--plot", options.plot)):
        if path is not None and not path.parent.is_dir():
            parser.error(f"{name}: got {path}, expected a file in a folder that there is")
    if options.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib: pip install '.[bench]'")
    return options


def main(argv: list[str] | None = None) -> int:
    """Command line; exit status 1 if a result was wrong or a mode is not served."""
    options = parse(argv)
    machine = measure_machine(torch.device(options.device))
    print(f"{machine.name}: copy {machine.copy_gb_per_s:.0f} GB/s, bf16 matmul {machine.bf16_tflop_per_s:.2f} TFLOP/s")
    print(HEADER, flush=True)
    rows, status = [], 0
    if options.save:
        head = dict(environment=environment(torch.device(options.device)), machine=dataclasses.asdict(machine))
        save(head, rows, options.save)
    for mode, name in itertools.product(options.mode, options.shape):
        try:
            kwargs = shape_call(name, max(options.tokens), MODES[mode], options.device)
            for num_tokens in options.tokens:
                case = shape_case(name, num_tokens, *MODES[mode], device=options.device)
                rows.append(measure(machine, name, case, kwargs, options))
                print(line(rows[-1]), flush=True)
                if options.save:
                    save(head, rows, options.save)
        except (AssertionError, TvmMoeError) as error:
            print(f"{name} {mode}: {error}", file=sys.stderr)
            status = 1
        kwargs = None  # before the next shape's weights
    if options.plot and rows:
        plot(rows, machine, options.plot)
    return status


if __name__ == "__main__":
    sys.exit(main())
