# SPDX-License-Identifier: Apache-2.0
"""CPU schedules: how each stage is tiled, vectorised and made parallel. One function per kind of stage."""

from dataclasses import dataclass

import tvm
from tvm import s_tir, tirx


@dataclass(frozen=True)
class GemmConfig:
    """Choices of a CPU GEMM stage.

    ``panel_n`` weight rows (of each half) are decoded to float32 at a time, over the whole of K, into a buffer that stays
    in the L2 cache; ``micro_m`` x ``micro_n`` outputs accumulate in registers, 16 lanes of k each: two AVX2 registers an
    output, so 4 x 1 fill half of the sixteen and leave room for the operands.
    """

    panel_n: int = 8
    micro_m: int = 4
    micro_n: int = 1


def _schedule(func: tirx.PrimFunc) -> s_tir.Schedule:
    return s_tir.Schedule(tvm.IRModule({"main": func}), error_render_level="fast")


def parallel_outermost(func: tirx.PrimFunc) -> tirx.PrimFunc:
    """Make the single outermost loop parallel by hand: ``Schedule.parallel`` wants affine block bindings, and a loop fused
    over symbolic extents has none (its tasks write disjoint rows and columns all the same)."""
    realize = func.body
    root, loop = realize.block, realize.block.body
    parallel = tirx.For(loop.loop_var, loop.min, loop.extent, tirx.ForKind.PARALLEL, loop.body)
    root = s_tir.SBlock(
        root.iter_vars, root.reads, root.writes, root.name_hint, parallel, root.init, root.alloc_buffers
    )
    return func.with_body(s_tir.SBlockRealize(realize.iter_values, realize.predicate, root))


def schedule_gemm(func: tirx.PrimFunc, config: GemmConfig) -> tirx.PrimFunc:
    """gemm1 or gemm2: a task is (tile, ``panel_n`` rows): decode the panel, multiply in register tiles, epilogue."""
    sch = _schedule(func)
    tile_m = int(sch.get(sch.get_loops(sch.get_sblock("gemm", "main"))[1]).extent)
    tile_gemm(sch, config.panel_n, min(config.micro_m, tile_m), config.micro_n)
    return parallel_outermost(sch.mod["main"])


def tile_gemm(sch: s_tir.Schedule, panel_n, micro_m, micro_n) -> None:
    """Schedule a GEMM but for :func:`parallel_outermost`; sizes are integers or sampled."""
    dequantize, gemm, epilogue = (sch.get_sblock(name, "main") for name in ("dequantize", "gemm", "epilogue"))
    # 16 lanes: one byte row of a 32-block, its even or its odd columns. They are summed once per output.
    lanes = sch.rfactor(sch.get_loops(gemm)[-1], factor_axis=-1)
    sch.set_scope(lanes, 0, "local")

    t, m, nb, n = sch.get_loops(epilogue)
    n0, n1 = sch.split(n, [None, panel_n])
    sch.reorder(t, nb, n0, m, n1)
    sch.vectorize(n1)
    sch.compute_at(gemm, n0, preserve_unit_loops=True)
    j, unit, m, *half, nb1, n = sch.get_loops(gemm)[3:]
    m0, m1 = sch.split(m, [None, micro_m])
    n2, n3 = sch.split(n, [None, micro_n])
    sch.reorder(unit, nb1, m0, *half, n2, j, m1, n3)
    sch.compute_at(lanes, n2, preserve_unit_loops=True)
    j, *outputs, kb, p = sch.get_loops(lanes)[len(sch.get_loops(gemm)) - 3 :]
    sch.reorder(kb, p, *outputs, j)
    sch.compute_at(dequantize, n0)
    for loops in (sch.get_loops(dequantize)[-2:], [p, *outputs, j]):
        *unrolled, vector = loops
        sch.vectorize(vector)
        for loop in unrolled:
            sch.unroll(loop)
    sch.decompose_reduction(lanes, kb)
    sch.fuse(t, nb, n0)


def schedule_gather(func: tirx.PrimFunc) -> tirx.PrimFunc:
    """One row a task, 16 columns a vector."""
    sch = _schedule(func)
    t, m, _, p, j = sch.get_loops(sch.get_sblock("gather", "main"))
    sch.parallel(sch.fuse(t, m))
    sch.unroll(p)
    sch.vectorize(j)
    return sch.mod["main"]


def schedule_requantize(func: tirx.PrimFunc) -> tirx.PrimFunc:
    """One row a task: its maximum where the mode wants it, then block by block maximum, scale and values."""
    sch = _schedule(func)
    blocks = {sch.get(block).name_hint: block for block in sch.get_child_blocks(sch.get_sblock("root", "main"))}
    t, m, kb, p, _, j = sch.get_loops(blocks["encode"])
    sch.parallel(sch.fuse(t, m))
    sch.unroll(p)
    sch.vectorize(j)
    for name in ("scale", "amax"):
        if name in blocks:
            sch.compute_at(blocks[name], kb)
    if "row_amax" in blocks:
        sch.parallel(sch.fuse(*sch.get_loops(blocks["row_amax"])[:2]))
    return sch.mod["main"]


def schedule_finalize(func: tirx.PrimFunc) -> tirx.PrimFunc:
    """One token a task; rows of y are added whole, slot after slot, so that the inner loop is contiguous."""
    sch = _schedule(func)
    total, rounded = sch.get_sblock("sum", "main"), sch.get_sblock("round", "main")
    t, h, k = sch.get_loops(total)
    sch.reorder(t, k, h)
    sch.parallel(t)
    sch.reverse_compute_at(rounded, t)
    sch.decompose_reduction(total, k)
    return sch.mod["main"]


def schedule_route(func: tirx.PrimFunc) -> tirx.PrimFunc:
    """One token a task."""
    sch = _schedule(func)
    sch.parallel(sch.get_loops(sch.get_sblock("token", "main"))[0])
    return sch.mod["main"]
