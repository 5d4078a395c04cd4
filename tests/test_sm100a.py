# SPDX-License-Identifier: Apache-2.0
"""tcgen05 of sm_100a: descriptors against the documented bit fields, the kernel's SASS."""

import importlib.util
import itertools
import re

import pytest

from tvmmoe.kernels.sm100a import descriptors as desc

HAS_TVM = importlib.util.find_spec("tvm") is not None
needs_tvm = pytest.mark.skipif(not HAS_TVM, reason="needs tvm to build kernels")
FORMS = {"nvfp4": desc.NVFP4, "mxfp4": desc.MXFP4, "mxfp8": desc.MXFP8}

# PTX ISA 9: (first bit, last bit, field) of "Shared memory descriptor layout" ...
MATRIX_FIELDS = [(0, 13, "start"), (16, 29, "leading"), (32, 45, "stride"), (46, 48, "one"), (49, 51, "base_offset"),
                 (52, 52, "leading_mode"), (53, 60, "zero"), (61, 63, "swizzle")]  # fmt: skip
# ... and of "Instruction descriptor format" for block-scaled kinds; b_type has bits 10-11 in .kind::mxf4nvf4, 12 being 0
INSTRUCTION_FIELDS = [(0, 1, "zero0"), (2, 2, "is_sparse"), (3, 3, "zero3"), (4, 5, "scale_id_b"), (6, 6, "zero6"),
                      (7, 9, "a_type"), (10, 12, "b_type"), (13, 14, "negate"), (15, 16, "transpose"), (17, 22, "n"),
                      (23, 23, "scale_type"), (24, 26, "zero24"), (27, 28, "m"), (29, 30, "scale_id_a"),
                      (31, 31, "k")]  # fmt: skip
TYPES = {"nvfp4": (1, 1, 0), "mxfp4": (1, 1, 1), "mxfp8": (5, 0, 1)}  # e2m1, e2m1 or e4m3, ue4m3 = 0 or ue8m0 = 1


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
@pytest.mark.parametrize("name", FORMS)
def test_instruction_descriptor_fields(name, n):
    a_type, b_type, scale_type = TYPES[name]
    form = FORMS[name]
    for scale_id in range(0, 4, form.num_scales):
        parts = fields(desc.instruction_descriptor(form, 128, n, scale_id), INSTRUCTION_FIELDS)
        expected = dict(a_type=a_type, b_type=b_type, scale_type=scale_type, n=n // 8, m=1)
        assert parts == dict.fromkeys(parts, 0) | expected | dict(scale_id_a=scale_id, scale_id_b=scale_id)


def test_copy_brings_every_scale_to_its_cell():
    for row, scale in itertools.product(range(128), range(4)):
        assert desc.copied_cell(desc.scale_offset(row, scale)) == desc.scale_cell(row, scale)
    offsets = {desc.scale_offset(row, scale) for row, scale in itertools.product(range(128), range(4))}
    assert offsets == set(range(desc.SCALE_TILE_BYTES))


@pytest.mark.parametrize("name", FORMS)
def test_steps_along_k_use_every_scale_once(name):
    form, used = FORMS[name], []
    for step in range(256 // form.k):
        column, scale_id = desc.scale_place(form, step)
        assert scale_id % form.num_scales == 0 and column % desc.SCALE_TILE_COLUMNS == 0
        used += [column // desc.SCALE_TILE_COLUMNS * 4 + scale_id + i for i in range(form.num_scales)]
    assert used == list(range(256 // form.block_size))


@pytest.mark.parametrize("needed, columns", [(1, 32), (32, 32), (33, 64), (256, 256), (384, 512)])
def test_columns_are_powers_of_two(needed, columns):
    assert desc.num_columns(needed) == columns


@needs_tvm
@pytest.mark.parametrize("gencode", ["DATACENTER", "ULTRA"])
@pytest.mark.parametrize("tile_n", [8, 128])
@pytest.mark.parametrize("name", ["nvfp4", "mxfp4"])
def test_matmul_is_tcgen05(name, tile_n, gencode, tmp_path):
    from tvmmoe.kernels.nvcc import sass_of
    from tvmmoe.kernels.sm100a import build
    from tvmmoe.kernels.sm100a.matmul import MatmulConfig, matmul

    config = MatmulConfig(FORMS[name], tile_n)
    source = build.cuda_source(config.symbol, matmul(config))
    log = build.compile_cubin(source, tmp_path / "matmul.cubin", getattr(build, gencode))
    assert not re.search(r"[1-9]\d* bytes spill", log)
    sass = sass_of(tmp_path / "matmul.cubin")
    assert {"UTCOMMA", "UTCCP", "UTMALDG", "LDTM"} <= set(re.findall(r"\b(UTC[A-Z]+|UTMALDG|LDTM)\b", sass))
    if gencode == "DATACENTER":  # cuobjdump does not show it for sm_103a
        assert ("UTCOMMA.4X" in sass) == (name == "nvfp4")
