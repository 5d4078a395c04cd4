# SPDX-License-Identifier: Apache-2.0
"""tcgen05 of sm_100a: descriptors against the documented bit fields, operand and scale images against a scalar product, the
generated kernels on the CPU against the reference, and the compiled ones by their SASS. Nothing here has run on the chip.
"""

import dataclasses
import functools
import importlib.util
import itertools
import re
import subprocess
import sys
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from test_sm120a import (
    EMULATED_IDS,
    FORMAT,
    MX,
    PER_TOKEN,
    SIMULATED,
    SMALL,
    call_arguments,
    check_operator,
    workspace_with_tiles,
)

from tvmmoe.config import ActivationFormat as A
from tvmmoe.config import WeightFormat
from tvmmoe.kernels.sm100a import descriptors as desc
from tvmmoe.reference import moe_ref
from tvmmoe.testing import Case, make_case, rel_l2, skip_unless_arch
from tvmmoe.workspace import max_num_tiles

HAS_TVM = importlib.util.find_spec("tvm") is not None
if HAS_TVM:
    import tvm_ffi

    from tvmmoe.kernels.nvcc import sass_by_kernel
    from tvmmoe.kernels.sm90a import trace
    from tvmmoe.kernels.sm100a import build, gemm, load, operator, simulate
needs_tvm = pytest.mark.skipif(not HAS_TVM, reason="needs tvm to build kernels")
FORMS = {"nvfp4": desc.NVFP4, "mxfp8": desc.MXFP8, "bf16": desc.BF16}
SCALED = ("nvfp4", "mxfp8")
TILES = (8, 32, 128, 256)

# PTX ISA 9: (first bit, last bit, field) of "Shared memory descriptor layout" ...
MATRIX_FIELDS = [(0, 13, "start"), (16, 29, "leading"), (32, 45, "stride"), (46, 48, "one"), (49, 51, "base_offset"),
                 (52, 52, "leading_mode"), (53, 60, "zero"), (61, 63, "swizzle")]  # fmt: skip
# ... and of "Instruction descriptor format" for block-scaled kinds; b_type has bits 10-11 in .kind::mxf4nvf4, 12 being 0
INSTRUCTION_FIELDS = [(0, 1, "zero0"), (2, 2, "is_sparse"), (3, 3, "zero3"), (4, 5, "scale_id_b"), (6, 6, "zero6"),
                      (7, 9, "a_type"), (10, 12, "b_type"), (13, 14, "negate"), (15, 16, "transpose"), (17, 22, "n"),
                      (23, 23, "scale_type"), (24, 26, "zero24"), (27, 28, "m"), (29, 30, "scale_id_a"),
                      (31, 31, "k")]  # fmt: skip
TYPES = {"nvfp4": (1, 1, 0), "mxfp8": (5, 0, 1)}  # e2m1, e2m1 or e4m3, ue4m3 = 0 or ue8m0 = 1
# ... and for .kind::f16, whose d_type is float32 = 1 and whose types are bf16 = 1
F16_FIELDS = [(0, 1, "selector"), (2, 2, "is_sparse"), (3, 3, "saturate"), (4, 5, "d_type"), (6, 6, "zero6"),
              (7, 9, "a_type"), (10, 12, "b_type"), (13, 14, "negate"), (15, 16, "transpose"), (17, 22, "n"),
              (23, 23, "zero23"), (24, 28, "m"), (29, 29, "zero29"), (30, 31, "max_shift")]  # fmt: skip


def fields(value: int, layout) -> dict[str, int]:
    """A descriptor taken apart; bits of no field must be zero."""
    parts = {name: value >> low & (1 << (high - low + 1)) - 1 for low, high, name in layout}
    assert value == sum(parts[name] << low for low, _, name in layout)
    return parts


@pytest.mark.parametrize("address, stride, swizzle", [(0, 1024, 2), (0x1F400, 128, 0), (0x38000 - 16, 512, 4)])
def test_matrix_descriptor_fields(address, stride, swizzle):
    parts = fields(desc.matrix_descriptor(address, 32, stride, swizzle), MATRIX_FIELDS)
    expected = dict(start=address >> 4, leading=2, stride=stride >> 4, one=1, swizzle=swizzle)
    assert parts == dict.fromkeys(parts, 0) | expected


@pytest.mark.parametrize("n", [8, 64, 128, 256])
@pytest.mark.parametrize("name", SCALED)
def test_instruction_descriptor_fields(name, n):
    a_type, b_type, scale_type = TYPES[name]
    form = FORMS[name]
    for scale_id in range(0, 4, form.num_scales):
        parts = fields(desc.instruction_descriptor(form, 128, n, scale_id), INSTRUCTION_FIELDS)
        expected = dict(a_type=a_type, b_type=b_type, scale_type=scale_type, n=n // 8, m=1)
        assert parts == dict.fromkeys(parts, 0) | expected | dict(scale_id_a=scale_id, scale_id_b=scale_id)


@pytest.mark.parametrize("n", [8, 256])
def test_f16_instruction_descriptor_fields(n):
    parts = fields(desc.instruction_descriptor(desc.BF16, 128, n), F16_FIELDS)
    assert parts == dict.fromkeys(parts, 0) | dict(d_type=1, a_type=1, b_type=1, n=n // 8, m=8)


def test_copy_brings_every_scale_to_its_cell():
    for row, scale in itertools.product(range(128), range(4)):
        assert desc.copied_cell(desc.scale_offset(row, scale)) == desc.scale_cell(row, scale)
    offsets = {desc.scale_offset(row, scale) for row, scale in itertools.product(range(128), range(4))}
    assert offsets == set(range(desc.SCALE_TILE_BYTES))


@pytest.mark.parametrize("name", SCALED)
def test_steps_along_k_use_every_scale_once(name):
    form, used = FORMS[name], []
    for step in range(512 // form.k):
        tile, scale_id = desc.scale_place(form, step)
        assert scale_id % form.num_scales == 0
        used += [tile * 4 + scale_id + i for i in range(form.num_scales)]
    assert used == list(range(512 // form.k * form.num_scales))


def test_chunks_lie_where_a_tma_of_128_byte_swizzle_puts_them():
    """The swizzle as the ISA draws it: bits 4-6 of an address exclusive-or bits 7-9."""
    for row, chunk in itertools.product(range(256), range(8)):
        plain = row * 128 + chunk * 16
        assert desc.chunk_offset(row, chunk) == plain ^ (plain >> 7 & 7) << 4


@pytest.mark.parametrize("needed, columns", [(1, 32), (32, 32), (33, 64), (256, 256), (384, 512)])
def test_columns_are_powers_of_two(needed, columns):
    assert desc.num_columns(needed) == columns


# ------------------------------------------------------------------ images of memory, and what an instruction makes of them

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double().numpy()


class Operand:
    """Random codes and scales of some rows, and what the load path makes of them in shared memory."""

    def __init__(self, form: desc.Form, is_weight: bool, rows: int, k: int, rng):
        self.form, self.rows, self.k = form, rows, k
        self.is_padded = is_weight and form is desc.MXFP8  # 16 e2m1 in 8 of 16 bytes
        self.is_e2m1 = is_weight or form is desc.NVFP4
        self.codes = rng.integers(0, 16 if self.is_e2m1 else 127, (rows, k))
        self.size = form.k // form.num_scales  # of a scale block
        self.scales = rng.integers(*((120, 135) if form.is_ue8m0 else (0, 127)), (rows, k // self.size))

    def values(self) -> np.ndarray:
        """float64 [rows, k], block scales applied."""
        values = E2M1[self.codes] if self.is_e2m1 else E4M3[self.codes]
        return values * self.scale_values(self.scales).repeat(self.size, 1)

    def scale_values(self, codes) -> np.ndarray:
        return 2.0 ** (codes - 127.0) if self.form.is_ue8m0 else E4M3[codes]

    def blocks(self) -> np.ndarray:
        """uint8 [K blocks, rows * 128]: chunks at their places, zeros past the end of K; gaps are 0xff."""
        form = self.form
        blocks = np.full((-(-self.k // form.k_block), self.rows * 128), 0xFF, np.uint8)
        padded = np.zeros((self.rows, len(blocks) * form.k_block), np.int64)
        padded[:, : self.k] = self.codes
        data = padded[:, ::2] | padded[:, 1::2] << 4 if self.is_e2m1 else padded
        per_chunk = 8 if self.is_padded else 16
        for block, row, chunk in itertools.product(range(len(blocks)), range(self.rows), range(8)):
            first = (block * 8 + chunk) * per_chunk
            at = desc.chunk_offset(row, chunk)
            blocks[block, at : at + per_chunk] = data[row, first : first + per_chunk]
        return blocks

    def tensor_memory(self) -> np.ndarray:
        """uint8 [32 lanes, columns, 4] after tcgen05.cp of the scale tiles of all K blocks; zeros past the end of K."""
        chunks = -(-self.rows // 128)
        per_block = self.form.k_block // self.size
        groups = -(-self.k // self.form.k_block) * per_block // 4
        tiles = np.zeros((groups * chunks, 512), np.uint8)
        for row, i in itertools.product(range(self.rows), range(self.scales.shape[1])):
            tiles[i // 4 * chunks + row // 128, desc.scale_offset(row % 128, i % 4)] = self.scales[row, i]
        memory = np.zeros((32, len(tiles) * 4, 4), np.uint8)
        for tile, offset in itertools.product(range(len(tiles)), range(512)):
            lane, column, byte = desc.copied_cell(offset)
            memory[lane, tile * 4 + column, byte] = tiles[tile, offset]
        return memory


def taken(operand: Operand, image: np.ndarray, scales: np.ndarray, step: int) -> np.ndarray:
    """float64 [rows, form.k]: what one instruction reads, by its descriptors' fields and the documented layouts."""
    form, chunks = operand.form, -(-operand.rows // 128)
    matrix = fields(desc.matrix_descriptor(step % 4 * 32, 0, 1024, desc.SWIZZLE_128B), MATRIX_FIELDS)
    tile, scale_id = desc.scale_place(form, step)
    out = np.empty((operand.rows, form.k))
    for row in range(operand.rows):
        start = (matrix["start"] << 4) + row // 8 * (matrix["stride"] << 4) + row % 8 * 128
        places = [at ^ (at >> 7 & 7) << 4 for at in range(start, start + 32)]
        data = image[step // 4, places].astype(int)
        if operand.is_padded:
            data = np.concatenate([data[:8], data[16:24]])
        codes = np.stack([data & 15, data >> 4], 1).reshape(-1) if operand.is_e2m1 else data
        cell = scales[row % 32, tile * 4 * chunks + row // 32]
        factors = operand.scale_values(cell[scale_id : scale_id + form.num_scales].astype(int))
        out[row] = (E2M1[codes] if operand.is_e2m1 else E4M3[codes]) * factors.repeat(operand.size)
    return out


@pytest.mark.parametrize("k", [32, 288, 512])
@pytest.mark.parametrize("tokens", [8, 136])
@pytest.mark.parametrize("name", SCALED)
def test_images_give_the_product(name, tokens, k):
    form, rng = FORMS[name], np.random.default_rng(k)
    operands = [Operand(form, True, 128, k, rng), Operand(form, False, tokens, k, rng)]
    images = [(operand, operand.blocks(), operand.tensor_memory()) for operand in operands]
    product = np.zeros((128, tokens))
    for step in range(len(images[0][1]) * 4):
        weights, columns = (taken(*image, step) for image in images)
        product += weights @ columns.T
    expected = operands[0].values() @ operands[1].values().T
    np.testing.assert_allclose(product, expected, rtol=1e-12, atol=1e-12 * abs(expected).max())


# ------------------------------------------------------------------------------------------------ the kernels, simulated

NAMES = [(f, form, name) for f in FORMAT for form in ("quantized", "bf16") for name in SIMULATED] + [
    (WeightFormat.nvfp4, "quantized", name) for name in PER_TOKEN
]
LARGER = dict(num_tokens=83, hidden_size=672, intermediate_size=352, num_experts=2, top_k=1)


def simulated_case(weight_format: WeightFormat, form: str, name: str, **more) -> Case:
    fields = SMALL | FORMAT[weight_format] | (SIMULATED | PER_TOKEN)[name] | more
    return Case(**fields | (dict(activation_format=A.bf16) if form == "bf16" else {}))


def source(weight_format: WeightFormat, tile_m: int) -> str:
    """CUDA C++ of row_token, gemm1, requantize and gemm2 for three CTAs, so that each has several tiles."""
    before, gemm.NUM_CTAS = gemm.NUM_CTAS, 3
    try:
        return build.cuda_source([operator.variant(weight_format, tile_m)], operator.gemms)
    finally:
        gemm.NUM_CTAS = before


@functools.cache
def simulated(weight_format: WeightFormat, tile_m: int, early: bool, folder: Path) -> Path:
    """The same compiled for this CPU."""
    path = folder / f"{weight_format.name}_m{tile_m}_{early}.so"
    simulate.compile_so(simulate.host_source(source(weight_format, tile_m), early), path)
    return path


def run(case: Case, kwargs: dict, tile_m: int, path: Path) -> tuple[torch.Tensor, ...]:
    """gemm2_output, the reference's, and the live rows of both."""
    replay = torch.empty(case.num_tokens, case.top_k, dtype=torch.int16)
    expected, _, rows = moe_ref(**kwargs | dict(do_finalize=False, routing_replay_out=replay), tile_m=tile_m)
    max_rows = tile_m * max_num_tiles(len(rows), case.num_local_experts, tile_m)
    out = torch.zeros(max_rows, case.hidden_size, dtype=torch.bfloat16)
    workspace = workspace_with_tiles(case, tile_m, rows, replay.flatten().int())
    function = tvm_ffi.load_module(str(path))[f"fp4_block_scale_moe_{case.weight_format.name}_m{tile_m}"]
    function(workspace, *call_arguments(case, kwargs, {"gemm2_output": out}))
    return out, expected, rows[rows >= 0].long()


def check(case: Case, tile_m: int, path: Path) -> None:
    out, expected, live = run(case, make_case(case), tile_m, path)
    assert rel_l2(out[live], expected[live]) < case.tolerance
    padding = torch.ones(len(out), dtype=torch.bool)
    padding[live] = False
    assert not out[padding].any()


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("simulated_sm100a")


class WithoutFence:
    """The instructions of load.py, but for fences."""

    def __getattr__(self, name):
        return MagicMock() if name == "fence" else getattr(trace.ptx, name)

    def __getitem__(self, name):
        return trace.ptx[name]


BREAKS = {  # how a kernel is broken, and what the simulation says
    "transaction_bytes": (
        lambda m: m.setattr(gemm.GemmConfig, "weight_tma_bytes", property(lambda c: 2 * c.weight_stage)), "deadlock"),
    "no_fence": (lambda m: m.setattr(load, "ptx", WithoutFence()), "no fence has made visible"),
    "no_swizzle": (lambda m: m.setattr(desc, "chunk_offset", lambda row, chunk: row * 128 + chunk * 16), "rel_l2"),
    "no_wait_for_a_free_stage": (lambda m: m.setattr(load, "cuda", MagicMock()), "deadlock"),
    "arrival_instead_of_commit": (
        lambda m: m.setattr(gemm, "_commit", lambda bar: trace.ptx.mbarrier.arrive.shared.b64(bar, trace.u32(1))),
        "tcgen05.dealloc"),
}  # fmt: skip


@needs_tvm
class TestSimulatedKernels:
    """The generated kernels on the CPU with models of TMA, mbarrier and tcgen05 (simulate.py)."""

    @pytest.mark.parametrize("weight_format, form, name", NAMES)
    def test_small_tile_matches_reference(self, weight_format, form, name, folder):
        check(simulated_case(weight_format, form, name), 8, simulated(weight_format, 8, False, folder))

    @pytest.mark.parametrize("name", ["bias_clamp", "relu2"])
    @pytest.mark.parametrize("form", ["quantized", "bf16"])
    @pytest.mark.parametrize("tile_m", TILES[1:])
    @pytest.mark.parametrize("weight_format", FORMAT)
    def test_other_tiles_match_reference(self, weight_format, tile_m, form, name, folder):
        case = simulated_case(weight_format, form, name, **LARGER)
        check(case, tile_m, simulated(weight_format, tile_m, False, folder))

    @pytest.mark.parametrize("weight_format", FORMAT)
    def test_other_knobs_match_reference(self, weight_format, folder, monkeypatch):
        choices = {"nvfp4": (2, 3, 1), "mxfp8": (2, 4, 4), "bf16": (2, 3, 1)}  # k_blocks, num_stages, accumulators
        monkeypatch.setitem(operator.TILES, 16, choices)
        path = simulated(weight_format, 16, False, folder)
        for form in ("quantized", "bf16"):
            check(simulated_case(weight_format, form, "bias_clamp", **LARGER), 16, path)

    @pytest.mark.parametrize("form", ["quantized", "bf16"])
    @pytest.mark.parametrize("early", [False, True])
    @pytest.mark.parametrize("weight_format", FORMAT)
    def test_stages_are_used_again(self, weight_format, early, form, folder):
        """More K steps than stages; copies and products as late as possible, or at once."""
        case = simulated_case(weight_format, form, "plain", hidden_size=3104, intermediate_size=1056, num_tokens=9)
        check(case, 8, simulated(weight_format, 8, early, folder))

    @pytest.mark.parametrize("form", ["quantized", "bf16"])
    @pytest.mark.parametrize("weight_format", FORMAT)
    def test_nan_scales_spoil_their_own_row_only(self, weight_format, form, folder):
        """The scales of a row end inside a word that the next row continues: what is loaded past the end must be zero."""
        case = simulated_case(weight_format, form, "plain", intermediate_size=160)
        kwargs = make_case(case)
        kwargs["gemm2_weights_scale"].view(torch.uint8)[:, 1::2] = 0xFF if weight_format is MX else 0x7F
        out, expected, live = run(case, kwargs, 8, simulated(weight_format, 8, False, folder))
        assert out[live][:, 1::2].isnan().all()
        assert rel_l2(out[live][:, ::2], expected[live][:, ::2]) < case.tolerance

    @pytest.mark.parametrize("breaks, message", BREAKS.values(), ids=BREAKS)
    def test_a_broken_kernel_is_noticed(self, breaks, message, folder, monkeypatch):
        breaks(monkeypatch)
        cuda = source(WeightFormat.nvfp4, 8)
        path = folder / "broken.so"
        simulate.compile_so(simulate.host_source(cuda), path)
        done = subprocess.run([sys.executable, __file__, str(path)], capture_output=True, text=True)
        assert message in done.stdout + done.stderr


# ------------------------------------------------------------------------------------------------------------ on the chip


@pytest.mark.parametrize("tile_m", TILES)
@pytest.mark.parametrize("weight_format, name", EMULATED_IDS)
class TestShippedOperator:
    pytestmark = [pytest.mark.gpu, skip_unless_arch("sm100a")]

    def test_shipped_operator_matches_reference(self, weight_format, name, tile_m, folder):
        check_operator(f"moe_{weight_format.name}_sm100a", weight_format, name, tile_m, folder)


# -------------------------------------------------------------------------------------------------------------- compiled


@needs_tvm
@pytest.mark.parametrize("gencode", ["DATACENTER", "ULTRA"])
@pytest.mark.parametrize("tile_m", [8, 256])
@pytest.mark.parametrize("weight_format", FORMAT)
def test_kernels_are_tcgen05_without_spills(weight_format, tile_m, gencode, tmp_path):
    v = operator.variant(weight_format, tile_m)
    cuda = build.cuda_source([v], operator.gemms)
    log = build.compile_so(cuda, tmp_path / "moe.so", getattr(build, gencode))
    assert re.search(r"\b0 bytes spill stores", log) and not re.search(r"[1-9]\d* bytes spill", log)
    functions = sass_by_kernel(tmp_path / "moe.so")
    opcode = "UTCQMMA" if weight_format is MX else "UTCOMMA"
    for name, form in itertools.product(("gemm1", "gemm1_gated", "gemm2"), (v.quantized.activation_format, A.bf16)):
        sass = functions[f"{v.symbol}_{name}_{form.name}"]
        is_quantized = form is not A.bf16
        assert set(re.findall(r"\bUTC[A-Z]MMA\b", sass)) == {opcode if is_quantized else "UTCHMMA"}
        assert "LDTM.16dp256bit" in sass and "STSM.16.MT88" in sass and "LDGSTS" in sass
        assert ("UTCCP.T.S.4x32dp128bit" in sass) == is_quantized
        assert ("UTMALDG" in sass) == (name == "gemm2" or (is_quantized and weight_format is not MX))
        assert not re.search(r"\b(LDL|STL)\b", sass)


@needs_tvm
def test_accumulators_are_used_after_the_wait(tmp_path):
    """tcgen05.ld delivers in tcgen05.wait::ld, but nothing tells the compiler: no instruction of the PTX may come between."""
    cuda = build.cuda_source([operator.variant(MX, 8)], operator.gemms)
    command = ["nvcc", "-ptx", "-std=c++17", "-O3", "-arch=compute_100a", "-diag-suppress=174,177", "-x", "cu", "-"]
    includes = [tvm_ffi.libinfo.find_include_path(), tvm_ffi.libinfo.find_dlpack_include_path()]
    command += [*(f"-I{path}" for path in includes), "-o", str(tmp_path / "moe.ptx")]
    subprocess.run(command, input=cuda, text=True, check=True, capture_output=True)
    loaded, count = set(), 0
    for line in (tmp_path / "moe.ptx").read_text().splitlines():
        if "tcgen05.ld" in line:
            loaded |= set(re.findall(r"%r\d+", line.split("}")[0]))
            count += 1
        elif "tcgen05.wait::ld" in line:
            loaded = set()
        assert "tcgen05.ld" in line or not loaded & set(re.findall(r"%r\d+", line)), line
    assert count >= 12  # two in each of six kernels


@needs_tvm
def test_whole_operator_compiles(tmp_path):
    v = operator.variant(MX, 32)
    log = build.compile_so(build.cuda_source([v]), tmp_path / build.file_name(MX), build.DATACENTER)
    assert {"route", "scatter", "finalize"} <= set(re.findall(rf"{v.symbol}_([a-z0-9]+)", log))
    assert tvm_ffi.load_module(str(tmp_path / build.file_name(MX)))[v.symbol]  # without a driver


@needs_tvm
def test_configurations_are_legal_or_refused():
    for weight_format, tile_m in itertools.product(WeightFormat, TILES):
        v = operator.variant(weight_format, tile_m)
        for c in (v.quantized, v.bf16):
            assert gemm.is_legal(c)
            assert c.smem_bytes <= 227 * 1024 and c.tmem_columns <= 512
            assert not gemm.is_legal(dataclasses.replace(c, num_stages=2))
    assert not gemm.is_legal(gemm.GemmConfig(WeightFormat.nvfp4, A.nvfp4, 256, 1, 3, 2))  # 2 x 256 columns, and scales
    assert not gemm.is_legal(gemm.GemmConfig(WeightFormat.mxfp4, A.mxfp8, 128, 4, 3, 1))  # shared memory


if __name__ == "__main__":  # one case of a broken kernel, which may end this process
    broken = simulated_case(WeightFormat.nvfp4, "quantized", "bias_clamp", num_tokens=61, hidden_size=416)
    result, reference, live_rows = run(broken, make_case(broken), 8, Path(sys.argv[1]))
    if not rel_l2(result[live_rows], reference[live_rows]) < broken.tolerance:
        print("rel_l2")
