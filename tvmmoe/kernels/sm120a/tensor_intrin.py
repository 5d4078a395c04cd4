# SPDX-License-Identifier: Apache-2.0
"""The block-scaled instructions as TensorIntrins: for schedules of TensorIR blocks, where primitives carry them.

    tvmmoe.sm120a.mma_<form>   C[32, 4] (warp) += tiles in shared memory, as they lie in memory: weights A[16, k/2] e2m1,
                               SA[16, scales]; tokens B[8, k/2] e2m1 or B[8, k] e4m3 (mxfp8), SB[8, scales]
    tvmmoe.sm120a.fill         C[32, 4] = 0
    tvmmoe.sm120a.store        out[16, 8] = C[32, 4]

C[lane, register] is the accumulator fragment: row lane / 4 + 8 (register / 2), column 2 (lane % 4) + register % 2
(``fragment``); a schedule brings a block into it with transform_layout. TVM 0.27 lowers warp scope after common
subexpressions are merged, which hides the lane: build with ``PASS_CONFIG``.
"""

import tvm
from tvm import s_tir
from tvm.s_tir import TensorIntrin
from tvm.script import tirx as T

from tvmmoe.kernels import numerics
from tvmmoe.kernels.sm120a import build, intrinsics
from tvmmoe.kernels.sm120a.intrinsics import FORMS, MXFP8, Form

PREFIX = "tvmmoe.sm120a."
PASS_CONFIG = {"tirx.disable_cse_tir": True}
_SHARED = "shared.dyn"
_LANES = 32

_TILE = r"""
__device__ __forceinline__ unsigned tvmmoe_word(const void* tile, int offset) {
  return *(const unsigned*)((const char*)tile + offset);
}
__device__ __forceinline__ unsigned tvmmoe_bytes(const void* tile, int offset, int count) {
  unsigned word = 0;
  for (int i = 0; i < count; ++i) word |= unsigned(((const unsigned char*)tile)[offset + i]) << 8 * i;
  return word;
}
__device__ __forceinline__ void tvmmoe_tile_mma_k64(float* d, const void* a, const void* sa, const void* b,
                                                    const void* sb, int lda, int ldsa, int ldb, int ldsb, int scales) {
  const int g = (threadIdx.x & 31) >> 2, t = threadIdx.x & 3;
  const unsigned scale_a = tvmmoe_bytes(sa, (g + 8 * (t & 1)) * ldsa, scales);
  const unsigned scale_b = tvmmoe_bytes(sb, g * ldsb, scales);
  auto mma = scales == 4 ? tvmmoe_mma_nvfp4 : tvmmoe_mma_mxfp4;
  mma(d, tvmmoe_word(a, g * lda + 4 * t), tvmmoe_word(a, (g + 8) * lda + 4 * t),
      tvmmoe_word(a, g * lda + 16 + 4 * t), tvmmoe_word(a, (g + 8) * lda + 16 + 4 * t),
      tvmmoe_word(b, g * ldb + 4 * t), tvmmoe_word(b, g * ldb + 16 + 4 * t), scale_a, scale_b, 0, 0, 0, 0);
}
__device__ __forceinline__ void tvmmoe_tile_mma_k32(float* d, const void* a, const void* sa, const void* b,
                                                    const void* sb, int lda, int ldsa, int ldb, int ldsb, int scales) {
  const int g = (threadIdx.x & 31) >> 2, t = threadIdx.x & 3;
  // Even and odd columns of eight neighbours: the order in which bytes hold e2m1.
  const unsigned low = tvmmoe_word(a, g * lda + 4 * t), high = tvmmoe_word(a, (g + 8) * lda + 4 * t);
  const unsigned b0 = tvmmoe_word(b, g * ldb + 8 * t), b1 = tvmmoe_word(b, g * ldb + 8 * t + 4);
  tvmmoe_mma_mxfp8(d, low << 2 & 0x3c3c3c3c, high << 2 & 0x3c3c3c3c, low >> 2 & 0x3c3c3c3c, high >> 2 & 0x3c3c3c3c,
                   __byte_perm(b0, b1, 0x6420), __byte_perm(b0, b1, 0x7531),
                   tvmmoe_bytes(sa, (g + 8 * (t & 1)) * ldsa, 1), tvmmoe_bytes(sb, g * ldsb, 1), 0, 0, 0, 0);
}
"""


def fragment(row, column):
    """(lane, register) of an accumulator."""
    return 4 * (row % 8) + column // 2, row // 8 * 2 + column % 2


def weight_value(weights, scales, row, k, form: Form):
    """Element of a packed e2m1 tile times its block scale."""
    code = T.shift_right(T.Cast("uint32", weights[row, k // 2]), T.Cast("uint32", k % 2 * 4))
    return numerics.e2m1_to_float32(code) * _scale(scales, row, k, form)


def token_value(tokens, scales, row, k, form: Form):
    """Element of a tile of tokens times its block scale."""
    if form is MXFP8:
        return numerics.e4m3_to_float32(tokens[row, k]) * _scale(scales, row, k, form)
    return weight_value(tokens, scales, row, k, form)


def _scale(scales, row, k, form: Form):
    byte = scales[row, k // form.block_size]
    return numerics.e4m3_to_float32(byte) if form.num_scales == 4 else numerics.ue8m0_to_float32(byte)


def token_width(form: Form) -> int:
    """Bytes of a token in one instruction."""
    return form.k if form is MXFP8 else form.k // 2


def _mma(form: Form, emulate: bool):
    k, half, width, scales = form.k, form.k // 2, token_width(form), form.num_scales
    name, source = f"tvmmoe_tile_mma_k{k}", intrinsics.source(emulate) + _TILE

    # fmt: off
    @T.prim_func(s_tir=True)
    def desc(a: T.handle, sa: T.handle, b: T.handle, sb: T.handle, c: T.handle):
        A = T.match_buffer(a, (16, half), "uint8", offset_factor=4, scope=_SHARED)
        SA = T.match_buffer(sa, (16, scales), "uint8", offset_factor=1, scope=_SHARED)
        B = T.match_buffer(b, (8, width), "uint8", offset_factor=4, scope=_SHARED)
        SB = T.match_buffer(sb, (8, scales), "uint8", offset_factor=1, scope=_SHARED)
        C = T.match_buffer(c, (_LANES, 4), "float32", offset_factor=4, scope="warp")
        with T.sblock("root"):
            T.reads(C[0:_LANES, 0:4], A[0:16, 0:half], SA[0:16, 0:scales], B[0:8, 0:width], SB[0:8, 0:scales])
            T.writes(C[0:_LANES, 0:4])
            for i, j, n in T.grid(16, 8, k):
                with T.sblock("mma"):
                    vi, vj, vk = T.axis.remap("SSR", [i, j, n])
                    lane, register = T.meta_var(fragment(vi, vj))
                    C[lane, register] += weight_value(A, SA, vi, vk, form) * token_value(B, SB, vj, vk, form)

    @T.prim_func(s_tir=True)
    def impl(a: T.handle, sa: T.handle, b: T.handle, sb: T.handle, c: T.handle):
        lda, ldsa, ldb, ldsb = T.int32(), T.int32(), T.int32(), T.int32()
        A = T.match_buffer(a, (16, half), "uint8", offset_factor=4, scope=_SHARED, strides=[lda, 1])
        SA = T.match_buffer(sa, (16, scales), "uint8", offset_factor=1, scope=_SHARED, strides=[ldsa, 1])
        B = T.match_buffer(b, (8, width), "uint8", offset_factor=4, scope=_SHARED, strides=[ldb, 1])
        SB = T.match_buffer(sb, (8, scales), "uint8", offset_factor=1, scope=_SHARED, strides=[ldsb, 1])
        C = T.match_buffer(c, (_LANES, 4), "float32", offset_factor=4, scope="warp")
        with T.sblock("root"):
            T.reads(C[0:_LANES, 0:4], A[0:16, 0:half], SA[0:16, 0:scales], B[0:8, 0:width], SB[0:8, 0:scales])
            T.writes(C[0:_LANES, 0:4])
            for lane in T.thread_binding(0, _LANES, "threadIdx.x"):
                T.evaluate(T.cuda.func_call(
                    name, T.address_of(C[lane, 0]), A.access_ptr("r"), SA.access_ptr("r"), B.access_ptr("r"),
                    SB.access_ptr("r"), lda, ldsa, ldb, ldsb, scales, source_code=source))
    # fmt: on
    return desc, impl


def _fill():
    @T.prim_func(s_tir=True)
    def desc(c: T.handle):
        C = T.match_buffer(c, (_LANES, 4), "float32", scope="warp")
        with T.sblock("root"):
            T.reads()
            T.writes(C[0:_LANES, 0:4])
            for i, j in T.grid(16, 8):
                with T.sblock("fill"):
                    vi, vj = T.axis.remap("SS", [i, j])
                    lane, register = T.meta_var(fragment(vi, vj))
                    T.reads()
                    T.writes(C[lane, register])
                    C[lane, register] = T.float32(0)

    @T.prim_func(s_tir=True)
    def impl(c: T.handle):
        C = T.match_buffer(c, (_LANES, 4), "float32", scope="warp", offset_factor=1)
        with T.sblock("root"):
            T.reads()
            T.writes(C[0:_LANES, 0:4])
            for lane in T.thread_binding(0, _LANES, "threadIdx.x"):
                for i in T.unroll(4):
                    C[lane, i] = T.float32(0)

    return desc, impl


def _store():
    @T.prim_func(s_tir=True)
    def desc(c: T.handle, out: T.handle):
        C = T.match_buffer(c, (_LANES, 4), "float32", scope="warp")
        O = T.match_buffer(out, (16, 8), "float32", scope="global")  # noqa: E741
        with T.sblock("root"):
            T.reads(C[0:_LANES, 0:4])
            T.writes(O[0:16, 0:8])
            for i, j in T.grid(16, 8):
                with T.sblock("store"):
                    vi, vj = T.axis.remap("SS", [i, j])
                    lane, register = T.meta_var(fragment(vi, vj))
                    T.reads(C[lane, register])
                    T.writes(O[vi, vj])
                    O[vi, vj] = C[lane, register]

    @T.prim_func(s_tir=True)
    def impl(c: T.handle, out: T.handle):
        rows, columns = T.int32(), T.int32()
        C = T.match_buffer(c, (_LANES, 4), "float32", scope="warp", offset_factor=4)
        O = T.match_buffer(out, (16, 8), "float32", scope="global", offset_factor=2, strides=[rows, columns])  # noqa: E741
        with T.sblock("root"):
            T.reads(C[0:_LANES, 0:4])
            T.writes(O[0:16, 0:8])
            for lane in T.thread_binding(0, _LANES, "threadIdx.x"):
                for i in T.unroll(4):
                    O[i // 2 * 8 + lane // 4, lane % 4 * 2 + i % 2] = C[lane, i]

    return desc, impl


def register(emulate: bool = False) -> None:
    """Register all of them, with the instructions or with their emulation; a later call replaces the earlier one."""
    for form in FORMS:
        TensorIntrin.register(f"{PREFIX}mma_{form.name}", *_mma(form, emulate), override=True)
    TensorIntrin.register(f"{PREFIX}fill", *_fill(), override=True)
    TensorIntrin.register(f"{PREFIX}store", *_store(), override=True)


def _matmul(form: Form, m: int, n: int, k: int):
    """A block-scaled product, weights [m, k] and tokens [n, k]."""
    width, scales = token_width(form) * k // form.k, k // form.block_size

    # fmt: off
    @T.prim_func(s_tir=True)
    def matmul(a: T.handle, sa: T.handle, b: T.handle, sb: T.handle, c: T.handle):
        T.func_attr({"tirx.noalias": True, "global_symbol": "matmul"})
        A = T.match_buffer(a, (m, k // 2), "uint8")
        SA = T.match_buffer(sa, (m, scales), "uint8")
        B = T.match_buffer(b, (n, width), "uint8")
        SB = T.match_buffer(sb, (n, scales), "uint8")
        C = T.match_buffer(c, (m, n), "float32")
        ACC = T.sblock_alloc_buffer((m, n), "float32")
        for i, j, l in T.grid(m, n, k):  # noqa: E741
            with T.sblock("matmul"):
                vi, vj, vk = T.axis.remap("SSR", [i, j, l])
                with T.init():
                    ACC[vi, vj] = T.float32(0)
                ACC[vi, vj] += weight_value(A, SA, vi, vk, form) * token_value(B, SB, vj, vk, form)
        for i, j in T.grid(m, n):
            with T.sblock("store"):
                vi, vj = T.axis.remap("SS", [i, j])
                C[vi, vj] = ACC[vi, vj]
    # fmt: on
    return matmul


def matmul_source(form: Form, m: int, n: int, k: int, emulate: bool = False) -> str:
    """CUDA C++ of ``matmul(A, SA, B, SB, C)``: the smallest schedule that carries an intrinsic, one warp a fragment."""
    register(emulate)
    sch = s_tir.Schedule(tvm.IRModule({"matmul": _matmul(form, m, n, k)}), error_render_level="fast")
    product, store = sch.get_sblock("matmul", "matmul"), sch.get_sblock("store", "matmul")
    i, j, l = sch.get_loops(product)  # noqa: E741
    (i0, i1), (j0, j1), (k0, k1) = (sch.split(loop, [None, size]) for loop, size in ((i, 16), (j, 8), (l, form.k)))
    sch.reorder(i0, j0, k0, i1, j1, k1)
    outer = sch.blockize(i1)
    sch.bind(i0, "blockIdx.y")
    sch.bind(j0, "blockIdx.x")
    for operand in range(4):
        tile = sch.cache_read(outer, operand, "shared.dyn")
        sch.compute_at(tile, k0)
        sch.bind(sch.split(sch.fuse(*sch.get_loops(tile)[3:]), [None, 32])[1], "threadIdx.x")
    sch.set_scope(outer, 0, "warp")
    sch.reverse_compute_at(store, j0)
    fill = sch.decompose_reduction(outer, k0)
    sch.transform_layout(store, ("read", 0), lambda r, c: (r // 16, c // 8, *fragment(r % 16, c % 8)))
    sch.tensorize(sch.get_loops(sch.get_child_blocks(fill)[0])[-2], PREFIX + "fill")
    sch.tensorize(sch.get_loops(store)[-2], PREFIX + "store")
    sch.tensorize(outer, f"{PREFIX}mma_{form.name}")
    with tvm.transform.PassContext(config=PASS_CONFIG):
        return build.packed_source({"matmul": lambda: sch.mod["matmul"]}, pipeline="s_tir")
