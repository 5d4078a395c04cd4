# SPDX-License-Identifier: Apache-2.0
"""What is tuned: a GEMM stage at a model's shape and number of tokens, and its TensorIR definition as the workload."""

import functools
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import tvm
from tvm import tirx

from tvmmoe.config import ActivationType, WeightFormat
from tvmmoe.errors import ArgumentError
from tvmmoe.kernels import gemm1, gemm2
from tvmmoe.shapes import shape_case

STAGES = ("gemm1", "gemm2")
PREFIX = "tvmmoe."  # of annotations: a space leaves its decisions on the block EPILOGUE of the workload
EPILOGUE = "epilogue"
LABEL = "tvmmoe.task"  # attribute of the workload


@dataclass(frozen=True)
class Task:
    """One workload. ``tile_m`` is 0 where the tile height is a decision (CUDA), else the definition's."""

    target: str
    stage: str
    weight_format: str
    shape: str
    num_tokens: int
    tile_m: int = 0

    def __post_init__(self) -> None:
        if self.stage not in STAGES:
            raise ArgumentError(f"stage: got {self.stage!r}, expected one of {', '.join(STAGES)}")
        if self.num_tokens < 1:
            raise ArgumentError(f"num_tokens: got {self.num_tokens}, expected at least 1")

    @property
    def label(self) -> str:
        """Written into the workload."""
        return f"{self.shape}_{self.weight_format}_t{self.num_tokens}_m{self.tile_m}"

    @classmethod
    def of_label(cls, target: str, stage: str, label: str) -> "Task":
        """The task with this :attr:`label`."""
        shape, weight_format, tokens, tile = label.rsplit("_", 3)
        return cls(target, stage, weight_format, shape, int(tokens[1:]), int(tile[1:]))

    @property
    def case(self):
        """The layer's call, on the CPU."""
        return shape_case(self.shape, self.num_tokens, "bf16", self.weight_format)

    @property
    def num_active_experts(self) -> int:
        """Experts that have a row when rows spread as evenly as they can."""
        case = self.case
        return min(case.num_experts, self.num_tokens * case.top_k)

    @property
    def rows_per_expert(self) -> float:
        """Mean rows of an active expert."""
        return self.num_tokens * self.case.top_k / self.num_active_experts

    @property
    def num_tiles(self) -> int:
        """Tiles of ``tile_m`` rows, or one row each."""
        tile_m = max(self.tile_m, 1)
        return self.num_active_experts * -(-round(self.rows_per_expert) // tile_m)

    @property
    def weight_rows(self) -> int:
        """Weight rows of an expert."""
        case = self.case
        return 2 * case.intermediate_size if self.stage == "gemm1" else case.hidden_size

    @property
    def k(self) -> int:
        """Columns that are summed over."""
        case = self.case
        return case.hidden_size if self.stage == "gemm1" else case.intermediate_size

    def workload(self) -> tvm.IRModule:
        """The stage's definition with this task's sizes; its structural hash is the key of the records."""
        weight_format, case = WeightFormat[self.weight_format], self.case
        columns, k_blocks = case.intermediate_size // 32, self.k // 32
        sizes = {"nt": self.num_tiles, "experts": case.num_experts, "ib": columns, "hb": k_blocks}
        sizes |= {"nb_": case.hidden_size // 32, "kb_": k_blocks}
        graph, names = _definition(self.stage, weight_format, max(self.tile_m, 1))
        func = specialized(graph, {name: sizes.get(name, 1) for name in names}).with_attr("global_symbol", "main")
        return tvm.IRModule({"main": func.with_attr(LABEL, self.label)})


@functools.cache
def _definition(stage: str, weight_format: WeightFormat, tile_m: int) -> tuple[str, frozenset[str]]:
    """The stage's definition, saved, and the names of its symbolic sizes; parsing it takes a tenth of a second."""
    if stage == "gemm1":
        func = gemm1.gemm1(weight_format, ActivationType.Swiglu, tile_m)
    else:
        func = gemm2.gemm2(weight_format, tile_m)
    names = frozenset(d.name for param in func.params for d in param.shape if isinstance(d, tvm.ir.Var))
    return tvm.ir.save_json(func), names


def specialized(saved: str, sizes: dict[str, int]) -> tirx.PrimFunc:
    """A saved definition with symbolic sizes set by name, without the places in source files that it came from.

    On the saved graph: PrimFunc.specialize copies every use of a shared expression, which made a record of gemm1 27 times
    as long.
    """
    graph = json.loads(saved)
    nodes = graph["nodes"]
    spans = {i for i, node in enumerate(nodes) if node["type"] == "ir.Span"}
    nowhere = next(i for i, node in enumerate(nodes) if node["type"] == "None")
    for node in list(nodes):
        data = node.get("data")
        if isinstance(data, dict) and data.get("span") in spans:
            data["span"] = nowhere
        # Symbolic sizes are the only variables of the definition that no loop and no parameter binds.
        if node["type"] == "ir.Var" and (name := nodes[data["name"]]["data"]) in sizes:
            nodes.append({"type": "int", "data": sizes[name]})
            node.update(type="ir.IntImm", data={"span": nowhere, "ty": data["ty"], "value": len(nodes) - 1})
    return tvm.ir.load_json(json.dumps(graph))


def decisions(sch: tvm.s_tir.Schedule) -> dict[str, int]:
    """What a space decided, by name."""
    annotations = sch.get(sch.get_sblock(EPILOGUE, "main")).annotations
    return {name[len(PREFIX) :]: int(value) for name, value in annotations.items() if name.startswith(PREFIX)}


def traced_decisions(trace: tvm.s_tir.schedule.Trace) -> dict[str, int]:
    """:func:`decisions` of a trace without applying it."""
    values, result = {}, {}
    for inst in trace.insts:
        if inst.kind.name == "SampleCategorical":
            values[inst.outputs[0]] = int(inst.attrs[0][int(trace.decisions[inst])])
        elif inst.kind.name == "Annotate" and str(inst.attrs[0]).startswith(PREFIX):
            result[str(inst.attrs[0])[len(PREFIX) :]] = values[inst.inputs[1]]
    return result


def points(knobs: Mapping[str, Sequence[int]], is_legal: Callable[[dict[str, int]], bool]) -> list[dict[str, int]]:
    """Every legal point of a space."""
    every = (dict(zip(knobs, values, strict=True)) for values in itertools.product(*knobs.values()))
    return [point for point in every if is_legal(point)]


def key_of(config: dict[str, int]) -> tuple[tuple[str, int], ...]:
    """Decisions as a key, in whatever order they come."""
    return tuple(sorted(config.items()))


def decide(sch: tvm.s_tir.Schedule, knobs: dict[str, tuple[int, ...]]) -> dict[str, object]:
    """Sample every knob uniformly and leave the decisions on the workload."""
    block, sampled = sch.get_sblock(EPILOGUE, "main"), {}
    for name, values in knobs.items():
        sampled[name] = sch.sample_categorical(list(values), [1.0 / len(values)] * len(values))
        sch.annotate(block, PREFIX + name, sampled[name])
    return sampled
