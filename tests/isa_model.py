# SPDX-License-Identifier: Apache-2.0
"""Scalar model of block-scaled mma.sync: the PTX ISA restated formula by formula (sections "Matrix Fragments for
mma.m16n8k64", "... for mma.m16n8k32" and "Block Scaling for mma.sync"); nothing of it comes from the package."""

from typing import NamedTuple

import numpy as np
import torch


class Form(NamedTuple):
    """An instruction: columns, scales of a row in them, and what it is called in the emulation and in SASS."""

    k: int
    num_scales: int
    model: str
    opcode: str


FORMS = {
    "nvfp4": Form(64, 4, "TvmmoeNvfp4", "OMMA.SF.16864.F32.E2M1.E2M1.UE4M3.4X"),
    "mxfp4": Form(64, 2, "TvmmoeMxfp4", "OMMA.SF.16864.F32.E2M1.E2M1.E8"),
    "mxfp8": Form(32, 1, "TvmmoeMxfp8", "QMMA.SF.16832.F32.E2M1.E4M3.E8"),
}


def a_index(k: int, lane: int, i: int) -> tuple[int, int]:
    """(row, k) of element a_i of a lane; 8 elements a register for k = 64, 4 for k = 32."""
    group, thread = lane >> 2, lane % 4
    if k == 64:
        row = group if 0 <= i < 8 or 16 <= i < 24 else group + 8
        return row, thread * 8 + (i & 7) + (32 if i >= 16 else 0)
    row = group if 0 <= i < 4 or 8 <= i < 12 else group + 8
    return row, thread * 4 + (i & 3) + (16 if i >= 8 else 0)


def b_index(k: int, lane: int, i: int) -> tuple[int, int]:
    """(k, column) of element b_i of a lane."""
    group, thread = lane >> 2, lane % 4
    if k == 64:
        return thread * 8 + (i & 7) + (32 if i >= 8 else 0), group
    return thread * 4 + (i & 3) + (16 if i >= 4 else 0), group


def c_index(lane: int, i: int) -> tuple[int, int]:
    """(row, column) of element c_i of a lane."""
    return (lane >> 2) + (8 if i >= 2 else 0), (lane % 4) * 2 + (i & 1)


def e2m1(code: int) -> float:
    return (-1.0 if code & 8 else 1.0) * (0, 0.5, 1, 1.5, 2, 3, 4, 6)[code & 7]


def e4m3(code: int) -> float:
    return float(torch.tensor([code], dtype=torch.uint8).view(torch.float8_e4m3fn).double())


def ue8m0(code: int) -> float:
    return float("nan") if code == 255 else 2.0 ** (int(code) - 127)


B_VALUE = {"nvfp4": e2m1, "mxfp4": e2m1, "mxfp8": e4m3}
SCALE = {"nvfp4": lambda byte: e4m3(byte & 0x7F), "mxfp4": ue8m0, "mxfp8": ue8m0}


def make_operands(name: str, seed: int, extreme: bool = False) -> dict[str, np.ndarray]:
    """Codes of a, b, both scales and c."""
    form, rng = FORMS[name], np.random.default_rng(seed)
    b = rng.integers(0, 16, (form.k, 8))
    if name == "mxfp8":
        b = rng.integers(0, 256, (form.k, 8))
        b[(b & 127) == 127] = 0x7E  # NaN has its own test
    low, high = {"nvfp4": (0, 127), "mxfp4": (120, 135), "mxfp8": (120, 135)}[name]
    if extreme and name != "nvfp4":
        low, high = 0, 255
    scales = [rng.integers(low, high, (count, form.num_scales)) for count in (16, 8)]
    c = rng.normal(size=(16, 8)).astype(np.float32)
    return {"a": rng.integers(0, 16, (16, form.k)), "b": b, "scale_a": scales[0], "scale_b": scales[1], "c": c}


def scalar_model(name: str, x: dict[str, np.ndarray]) -> np.ndarray:
    """D = (A scale_A) (B scale_B) + C in float64."""
    form = FORMS[name]
    part = form.k // form.num_scales
    a, b = np.vectorize(e2m1)(x["a"]), np.vectorize(B_VALUE[name])(x["b"])
    scale_a, scale_b = (np.vectorize(SCALE[name])(x[key]).repeat(part, 1) for key in ("scale_a", "scale_b"))
    return (a * scale_a) @ (b * scale_b.T) + x["c"]


def pack(name: str, x: dict[str, np.ndarray], selectors, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Registers [32, 8] (a, b, scale a, scale b) and accumulators [32, 4]; what no rule names is noise."""
    k, rng = FORMS[name].k, np.random.default_rng(seed)
    byte_a, thread_a, byte_b, thread_b = selectors
    width = 4 if k == 64 else 8
    words, d = np.zeros((32, 8), np.uint32), np.zeros((32, 4), np.float32)
    words[:, 6:] = rng.integers(0, 2**32, (32, 2))
    for lane in range(32):
        for first, count, index, codes in ((0, 4, a_index, x["a"]), (4, 2, b_index, x["b"])):
            for i in range(count * 32 // width):
                code = int(codes[index(k, lane, i)])
                if width == 8 and first == 0:
                    code <<= 2  # an e2m1 is in the middle of its byte
                words[lane, first + i * width // 32] |= np.uint32(code << (i * width % 32))
        for i in range(4):
            d[lane, i] = x["c"][c_index(lane, i)]

    def put(lane: int, register: int, byte: int, values) -> None:
        for s, value in enumerate(values):
            shift = 8 * (byte + s)
            words[lane, register] = (int(words[lane, register]) & ~(0xFF << shift)) | (int(value) << shift)

    for row in range(16):  # the pair of lanes that thread-id-a selects: the lower one has rows 0-7
        put(4 * (row % 8) + 2 * thread_a + row // 8, 6, byte_a, x["scale_a"][row])
    for column in range(8):
        put(4 * column + thread_b, 7, byte_b, x["scale_b"][column])
    return words, d


def unpack(d: np.ndarray) -> np.ndarray:
    result = np.zeros((16, 8), np.float32)
    for lane in range(32):
        for i in range(4):
            result[c_index(lane, i)] = d[lane, i]
    return result
