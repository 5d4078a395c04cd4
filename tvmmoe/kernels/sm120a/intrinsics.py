# SPDX-License-Identifier: Apache-2.0
"""Block-scaled FP4 mma.sync of sm_120a: d[16, 8] += (a[16, k] * scale_a) (b[k, 8] * scale_b), and what feeds it.

    form    instruction                                    a        b        scale  scales of k
    nvfp4   m16n8k64 kind::mxf4nvf4  scale_vec::4X         e2m1     e2m1     ue4m3  4
    mxfp4   m16n8k64 kind::mxf4nvf4  scale_vec::2X         e2m1     e2m1     ue8m0  2
    mxfp8   m16n8k32 kind::mxf8f6f4  scale_vec::1X         e2m1     e4m3     ue8m0  1

Weights are a and tokens b, so that a tile may have as few as 8 tokens. Fragments and scale registers: emulation.py.

One seam, ``emulate``, decides whether a call becomes the instruction or a function of the same name that computes it
with warp shuffles; nothing else of a kernel knows. The kernels only use thread id 0: there the ISA and what people
measured on RTX 50 cards agree (for thread-id-b above 0 one published measurement does not).
"""

from dataclasses import dataclass

from tvm.script import tirx as T

from tvmmoe.kernels.sm90a.trace import cuda, ptx, scalar, u32
from tvmmoe.kernels.sm120a import emulation


@dataclass(frozen=True)
class Form:
    """One block-scaled instruction."""

    name: str
    k: int
    num_scales: int  # of a row in one instruction
    qualifiers: str  # shape, kind and types of the instruction
    model: str  # C++ struct of the emulation

    @property
    def function(self) -> str:
        return f"tvmmoe_mma_{self.name}"

    @property
    def block_size(self) -> int:
        """Elements that share a scale."""
        return self.k // self.num_scales


_LAYOUT = "{}.row.col.kind::{}.block_scale.scale_vec::{}X.f32.{}.{}.f32.{}"
NVFP4 = Form("nvfp4", 64, 4, _LAYOUT.format("m16n8k64", "mxf4nvf4", 4, "e2m1", "e2m1", "ue4m3"), "TvmmoeNvfp4")
MXFP4 = Form("mxfp4", 64, 2, _LAYOUT.format("m16n8k64", "mxf4nvf4", 2, "e2m1", "e2m1", "ue8m0"), "TvmmoeMxfp4")
MXFP8 = Form("mxfp8", 32, 1, _LAYOUT.format("m16n8k32", "mxf8f6f4", 1, "e2m1", "e4m3", "ue8m0"), "TvmmoeMxfp8")
FORMS = (NVFP4, MXFP4, MXFP8)

_INSTRUCTION = r"""
__device__ __forceinline__ void {name}(float* d, unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0,
                                       unsigned b1, unsigned sa, unsigned sb, int byte_a, int thread_a, int byte_b,
                                       int thread_b) {{
  asm volatile("mma.sync.aligned.{qualifiers} "
      "{{%0, %1, %2, %3}}, {{%4, %5, %6, %7}}, {{%8, %9}}, {{%0, %1, %2, %3}}, %10, {{%12, %13}}, %11, {{%14, %15}};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "r"(sa), "r"(sb),
        "h"((short)byte_a), "h"((short)thread_a), "h"((short)byte_b), "h"((short)thread_b));
}}
"""


def source(emulate: bool) -> str:
    """CUDA C++ that defines the functions of all forms."""
    if emulate:
        return emulation.device_source({form.function: form.model for form in FORMS})
    return "".join(_INSTRUCTION.format(name=form.function, qualifiers=form.qualifiers) for form in FORMS)


def mma(form: Form, d, first: int, a, b, scale_a, scale_b, *, byte_id: int = 0, emulate: bool) -> None:
    """d[first : first + 4] += a * b; a and b are lists of 4 and 2 uint32 registers, ``byte_id`` is that of both scales."""
    selectors = (T.int32(byte_id), T.int32(0), T.int32(byte_id), T.int32(0))
    cuda.func_call(
        form.function, T.address_of(d[first]), *a, *b, scale_a, scale_b, *selectors,
        source_code=source(emulate), return_type="void",
    )  # fmt: skip


def widen_e2m1(word):
    """Eight e2m1 of a word as the bytes that kind::mxf8f6f4 wants: those of even k, then those of odd k."""
    return (word << u32(2)) & u32(0x3C3C3C3C), (word >> u32(2)) & u32(0x3C3C3C3C)


def split_bytes(low, high):
    """Eight e4m3 in two words as the even ones, then the odd ones: the order of :func:`widen_e2m1`."""
    even, odd = scalar("uint32"), scalar("uint32")
    ptx["prmt.b32"](even, low, high, u32(0x6420))
    ptx["prmt.b32"](odd, low, high, u32(0x7531))
    return even, odd


def funnel(low, high, shift):
    """32 bits of the pair from bit ``shift`` (0, 8, 16 or 24) on."""
    out = scalar("uint32")
    ptx["shf.r.wrap.b32"](out, low, high, shift)
    return out
