# SPDX-License-Identifier: Apache-2.0
"""Shared memory of the Hopper kernels: no two accesses that nothing orders, by vector clocks on the CPU (sm90a/races.py); and
what is broken on purpose is found."""

import ctypes
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import test_gemm_fp8
from test_sm90a import MX, NV, SMALL, call, source_of

from tvmmoe.config import ActivationFormat
from tvmmoe.reference import moe_ref
from tvmmoe.testing import Case, make_case, rel_l2

tvm_ffi = pytest.importorskip("tvm_ffi")
pytest.importorskip("tvm")
from tvmmoe.kernels.sm90a import gemm, gemm_pair, simulate  # noqa: E402
from tvmmoe.kernels.sm90a.by_scale_block import ByScaleBlock  # noqa: E402
from tvmmoe.kernels.sm90a.operator import hand_chosen  # noqa: E402
from tvmmoe.kernels.sm90a.trace import I, cuda, if_, ptx, u32  # noqa: E402
from tvmmoe.kernels.sm120a.simulate import compile_so  # noqa: E402

# (weight format, tile, tokens, intermediate size): some tiles a CTA; K blocks of gemm1 (5, or 12 where rows of scales are
# aligned) and gemm2 (5 or 9) are no multiple of a stage's, where a stage has several and rows are not aligned.
KERNELS = {
    "m8": (MX, 8, 24, 1056), "m8_nvfp4": (NV, 8, 24, 1056), "m8_short": (MX, 8, 40, 544),
    "m8_short_nvfp4": (NV, 8, 24, 544), "m16": (NV, 16, 30, 1056),
    "m16_short": (MX, 16, 40, 544), "m32": (MX, 32, 60, 544), "m64": (MX, 64, 100, 544), "m96": (NV, 96, 150, 544),
    "m64_aligned": (MX, 64, 100, 544), "m96_aligned": (MX, 96, 150, 544),
    "m8_nvfp4_aligned": (NV, 8, 24, 1280), "m32_nvfp4_aligned": (NV, 32, 60, 768),
    "m8_thin": (MX, 8, 7, 1056), "m8_thin_short": (MX, 8, 7, 544),
    "m256_cluster": (MX, 256, 300, 544), "pair": (MX, 8, 2, 544), "pair_nvfp4": (NV, 8, 1, 544),
    "pair_mxfp8": (MX, 8, 2, 544), "pair_nvfp4_tokens": (NV, 8, 2, 544),
}  # fmt: skip
# Of activations that are not bf16:
FORMATS = {"pair_mxfp8": ActivationFormat.mxfp8, "pair_nvfp4_tokens": ActivationFormat.nvfp4}
SIZES = dict(hidden_size=544, has_gemm1_bias=True)
ALIGNED = dict(hidden_size=1536)  # rows of scales are whole pieces of 16 bytes: passed through registers, or loaded by TMA
THIN = dict(num_experts=12)  # most have one or two rows
# Run with each consumer warpgroup as late as it can be, too:
LATE = {"m8", "m8_thin", "m16_short", "pair", "m96", "m96_aligned", "m32_nvfp4_aligned", "m256_cluster"}


class Watched:
    """A function on this CPU that counts its races."""

    def __init__(self, symbol: str, source: str, path: Path):
        compile_so(simulate.host_source(source, early=True, is_watched=True), path)
        self.library, self.function = ctypes.CDLL(str(path)), tvm_ffi.load_module(str(path))[symbol]
        self.library.tvmmoe_races.restype = self.library.tvmmoe_checks.restype = ctypes.c_long

    def count(self) -> int:
        assert self.library.tvmmoe_checks() > 100_000
        return self.library.tvmmoe_races()


def races(
    name: str, folder: Path, change: Callable[[str], str] = lambda source: source, late: Sequence[int] = (-1,)
) -> tuple[int, float]:
    """Races of one call of a kernel for each of the warpgroups that are ``late`` (-1 none), and how wrong results are."""
    weight_format, tile_m, num_tokens, intermediate_size = KERNELS[name]
    symbol, source = source_of(weight_format, tile_m)
    watched = Watched(symbol, change(source), folder / "watched.so")
    changes = dict(weight_format=weight_format, num_tokens=num_tokens, intermediate_size=intermediate_size) | SIZES
    changes |= ALIGNED if name.endswith("_aligned") else {}
    changes |= THIN if "_thin" in name else {}
    changes["activation_format"] = FORMATS.get(name, ActivationFormat.bf16)
    case = Case(**vars(SMALL) | changes)
    kwargs = make_case(case)
    expected, errors = moe_ref(**kwargs)[0], []
    for warpgroup in late:
        watched.library.tvmmoe_starve(warpgroup)
        output, _ = call(case, kwargs, tile_m, do_finalize=True, function=watched.function)
        errors.append(rel_l2(output, expected))
    return watched.count(), max(errors)


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_have_no_races(name, tmp_path):
    num_late = hand_chosen(*KERNELS[name][:2]).warpgroups if name in LATE else 0
    count, error = races(name, tmp_path, late=range(-1, num_late))
    assert count == 0 and error < 1e-3


def test_fp8_kernels_have_no_races(tmp_path):
    watched = Watched(test_gemm_fp8.operator_fp8.SYMBOL, test_gemm_fp8.source_of(), tmp_path / "watched.so")
    for name in ("plain", "longer_than_the_pipeline", "two_rows_outside"):
        test_gemm_fp8.check(
            lambda case, kwargs: call(case, kwargs, test_gemm_fp8.TILE_M, do_finalize=True, function=watched.function)[0],
            Case(**vars(test_gemm_fp8.BASE) | test_gemm_fp8.CASES.get(name, {})), name, test_gemm_fp8.SMALL_TOLERANCE,
        )  # fmt: skip
    assert watched.count() == 0


def replaced(pattern: str, by: str = "") -> Callable[[str], str]:
    """Source in which what matches is something else, or nothing."""

    def change(source: str) -> str:
        source, count = re.subn(pattern, by, source)
        assert count
        return source

    return change


SUMS_AT_ONCE = replaced(r"\n\s*tvm_builtin_ptx_barrier_sync_count_sync_aligned\([^;{]*\);")
# A stage is released while the tensor core may still read its tokens.
RELEASED_EARLY = replaced(r"(wgmma\.wait_group\.sync\.aligned) 1;", r"\1 3;")
WARP_SYNC = r"\n\s*tvm_builtin_cuda_warp_sync\(\);"
BEFORE_RELEASE = r"\n\s*if \([^\n]*% 32\) == 0\) \{\n\s*tvm_builtin_ptx_mbarrier_arrive"
SCALES_AFTER_ARRIVAL = replaced(
    r"((?:\n\s*if \([^\n]*\{\n\s*tvm_builtin_ptx_st_shared[^\n]*\n\s*\})+)"
    r"(\n\s*tvm_builtin_ptx_mbarrier_arrive[^\n]*)", r"\2\1",
)  # fmt: skip
BROKEN = {
    "held_scales_are_stored_after_their_arrival": ("m96_aligned", SCALES_AFTER_ARRIVAL),
    "sums_are_read_at_once": ("m8", SUMS_AT_ONCE),
    "sums_of_two_warpgroups": ("m16", SUMS_AT_ONCE),
    "stages_are_released_early": ("m16", RELEASED_EARLY),
    "stages_are_released_before_all_lanes_have_read": ("m8", replaced(f"{WARP_SYNC}(?={BEFORE_RELEASE})")),
    "sums_of_rows_are_read_at_once": ("pair", SUMS_AT_ONCE),
    "choices_are_read_at_once": ("pair", replaced(f"{WARP_SYNC}(?!{BEFORE_RELEASE})")),
}


@pytest.mark.parametrize("name", BROKEN)
def test_races_are_found(name, tmp_path):
    kernel, change = BROKEN[name]
    assert races(kernel, tmp_path, change)[0] > 0


def test_stages_are_released_after_their_last_matrices(monkeypatch, tmp_path):
    load, release = gemm.GroupedGemm._load_columns, gemm.GroupedGemm._release
    multiply, left = gemm.GroupedGemm._multiply_stage_by_warp, []

    def multiply_stage(self, blocks):
        left[:] = blocks
        multiply(self, blocks)

    def load_columns(self, places):
        left.pop()
        if not left:  # the last K block of a stage
            cuda.warp_sync()
            release(self, self.stage)
        return load(self, places)

    monkeypatch.setattr(gemm.GroupedGemm, "_multiply_stage_by_warp", multiply_stage)
    monkeypatch.setattr(gemm.GroupedGemm, "_load_columns", load_columns)
    monkeypatch.setattr(gemm.GroupedGemm, "_release", lambda self, stage: None)
    assert races("m8", tmp_path)[0] > 0


@pytest.mark.parametrize("name", ["pair", "m8_thin"])
def test_stages_of_columns_are_released_once_they_are_read(name, monkeypatch, tmp_path):
    multiply, release = ByScaleBlock._multiply_stage_by_scale_block, gemm.GroupedGemm._release

    def multiply_stage(self, blocks):
        cuda.warp_sync()
        release(self, self.stage)
        self._release = lambda stage: None
        multiply(self, blocks)
        del self._release

    monkeypatch.setattr(ByScaleBlock, "_multiply_stage_by_scale_block", multiply_stage)
    assert races(name, tmp_path)[0] > 0


def test_columns_are_read_once_results_are_stored(monkeypatch, tmp_path):
    """gemm1 stores z of a thin tile a second time, from the same place in shared memory."""
    monkeypatch.setattr(gemm.GroupedGemm, "_copy_rows", lambda self, tile, first: None)  # leaves _copy_columns
    monkeypatch.setattr(gemm.GroupedGemm, "_warpgroup_sync", lambda self: None)
    assert races("m8_thin", tmp_path)[0] > 0


def test_parts_are_reported_before_the_listener_is_woken(monkeypatch, tmp_path):
    def send(self, turn, token_tile, thread):
        place, parity = self.place(turn)
        cuda.mbarrier_wait(self._taken.ptr_to([place]), parity ^ u32(1))
        cuda.warp_sync()
        with if_(thread.lane == 0):
            ptx.mbarrier.arrive.shared.b64(self._sent.ptr_to([place]), u32(1))
            I.buffer_store(self._tiles, token_tile, [place])

    monkeypatch.setattr(gemm_pair.Report, "send", send)
    assert races("pair", tmp_path)[0] > 0


def test_scales_by_tma_go_where_nobody_reads(monkeypatch, tmp_path):
    """Into the stage after the one that is free."""
    load = gemm.GroupedGemm._load_weights

    class Later:
        def __init__(self, scales, s_stage: int, stages: int):
            self.scales, self.s_stage, self.size = scales, s_stage, stages * s_stage

        def ptr_to(self, indices):
            return self.scales.ptr_to([(indices[0] + self.s_stage) % self.size])

    def load_weights(self, *args):
        scales, self.ss = self.ss, Later(self.ss, self.s_stage, self.stages)
        load(self, *args)
        self.ss = scales

    monkeypatch.setattr(gemm.GroupedGemm, "_load_weights", load_weights)
    assert races("m32_nvfp4_aligned", tmp_path)[0] > 0


def test_results_are_stored_before_others_take_their_place(monkeypatch, tmp_path):
    monkeypatch.setattr(gemm.GroupedGemm, "_warpgroup_sync", lambda self: None)
    assert races("m8", tmp_path)[0] > 0
