# SPDX-License-Identifier: Apache-2.0
"""A tracing front end over TVM's TIRx builder: Python loops unroll, Python lists hold registers.

A heavily parametrised kernel is easier to trace than to parse: tile shapes, unrolled register fragments and optional
code are plain Python here, and only what must be decided on the device becomes TIRx (``if_``, ``for_``, ``while_``).
"""

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import tvm
from tvm.backend.cuda.lang.alloc_pool import SMEMPool
from tvm.script import tirx as T
from tvm.tirx.script.builder import ir as I  # noqa: E741

# Space of loads before griddepcontrol.wait: a line of L1 may be older than what the kernels before the last one wrote.
PAST_L1 = "relaxed.gpu.global"
_SUFFIX = {
    "float32": "f32", "int32": "b32", "uint32": "b32", "uint16": "b16", "int16": "b16", "uint64": "b64", "int64": "b64",
}  # fmt: skip


class _Emit:
    """Proxy of an intrinsic namespace: a call that yields a void expression is emitted as a statement."""

    def __init__(self, target):
        self._target = target

    def __getattr__(self, name):
        return _Emit(getattr(self._target, name))

    def __getitem__(self, key):
        return _Emit(self._target[key])

    def __call__(self, *args, **kwargs):
        result = self._target(*args, **kwargs)
        is_expr = isinstance(result, tvm.ir.Expr) and isinstance(result.ty, tvm.ir.PrimType)
        if is_expr and str(result.ty.dtype) == "":
            I.evaluate(result)
            return None
        return result


ptx = _Emit(T.ptx)  # ptx["wgmma.fence.sync.aligned"]()
cuda = _Emit(T.cuda)  # cuda.mbarrier_wait(pointer, phase)


class Thread(NamedTuple):
    """Where a thread of a kernel is."""

    cta: object
    warp: object
    lane: object
    tid: object


_names: list[str] = []  # of the kernels traced since the last call of kernel_names


def kernel_names() -> list[str]:
    """Names of the kernels traced since the last call, in launch order; TIRx itself only numbers them."""
    names = _names.copy()
    _names.clear()
    return names


@contextlib.contextmanager
def kernel(name: str, num_ctas, num_threads: int, ctas_per_sm: int = 1, cluster: int = 1) -> Iterator[Thread]:
    """One device region, launched as a grid of ``num_ctas`` (host int32 expression) CTAs.

    Registers are limited so that ``ctas_per_sm`` fit. ``cluster`` neighbouring CTAs run at the same time and reach each
    other's shared memory.
    """
    _names.append(name)
    with I.attr({"tirx.device_entry": T.bool(True)}), I.attr({"tirx.launch_bounds_min_blocks_per_sm": ctas_per_sm}):
        if cluster > 1:
            I.cta_id_in_cluster([cluster])
        cta = I.cta_id([num_ctas], dtype="int32")
        warp = I.warp_id([num_threads // 32])
        lane = I.lane_id([32])
        tid = I.thread_id([num_threads])
        yield Thread(cta, warp, lane, tid)


def regs(count: int, dtype: str):
    """A register array; index it with Python ints only."""
    return I.alloc_buffer([count], dtype, scope="local")


def scalar(dtype: str, value=None):
    """A mutable register."""
    buffer = regs(1, dtype)
    if value is not None:
        I.buffer_store(buffer, value, [0])
    return buffer[0]


def let(value, dtype: str | None = None):
    """An expression evaluated once, into a register."""
    return scalar(dtype or str(value.ty.dtype), value)


def assign(register, value) -> None:
    """Store to a register made by :func:`scalar` or :func:`let`."""
    I.buffer_store(register.source, value, list(register.indices))


def store(buffer, value, index: int) -> None:
    """Store to one register of an array."""
    I.buffer_store(buffer, value, [index])


@contextlib.contextmanager
def if_(condition) -> Iterator[None]:
    with I.If(condition), I.Then():
        yield


def if_else(condition, then, otherwise) -> None:
    """Both branches as callables that emit them."""
    with I.If(condition):
        with I.Then():
            then()
        with I.Else():
            otherwise()


@contextlib.contextmanager
def while_(condition) -> Iterator[None]:
    with I.While(condition):
        yield


@contextlib.contextmanager
def for_(extent) -> Iterator[object]:
    with I.serial(extent) as index:
        yield index


def u32(value):
    return T.uint32(value)


def cast(value, dtype: str):
    return T.Cast(dtype, value)


def bits(value, dtype: str = "uint32"):
    """Reinterpret a register of the same width."""
    return T.reinterpret(dtype, value)


def address(base, byte_offset=0):
    """Pointer from an int64 address."""
    return T.reinterpret("handle", base + byte_offset)


def load(dtype: str, pointer, space: str = "global"):
    """One element into a new register; bytes arrive as uint32."""
    if dtype == "uint8":
        register = scalar("uint32")
        ptx[f"ld.{space}.u8"](register, pointer)
        return register
    register = scalar(dtype)
    ptx[f"ld.{space}.{_SUFFIX[dtype]}"](register, pointer)
    return register


def load_vec4(pointer, space: str = "global", into=None):
    """16 bytes into four uint32 registers."""
    words = regs(4, "uint32") if into is None else into
    ptx[f"ld.{space}.v4.b32"](*[words[i] for i in range(4)], pointer)
    return words


def store_to(dtype: str, pointer, value, space: str = "global") -> None:
    """One element from a register."""
    ptx[f"st.{space}.{_SUFFIX[dtype]}"](pointer, value)


def store_vec4(pointer, words, space: str = "global") -> None:
    """16 bytes from four uint32 registers."""
    ptx[f"st.{space}.v4.b32"](pointer, *[words[i] for i in range(4)])


def shuffle_xor(value, mask: int):
    """Value of the lane whose number differs in ``mask``; a 32-bit register of any type."""
    out = scalar("uint32")
    ptx["shfl_sync.bfly.b32"](out, bits(value), u32(mask), u32(31), u32(0xFFFFFFFF))
    return bits(out, str(value.ty.dtype))


def shuffle(value, lane):
    """Value of lane ``lane``."""
    out = scalar("uint32")
    ptx["shfl_sync.idx.b32"](out, bits(value), cast(lane, "uint32"), u32(31), u32(0xFFFFFFFF))
    return bits(out, str(value.ty.dtype))


def warp_max_s32(value):
    out = scalar("int32")
    ptx["redux_sync.max.s32"](out, value, u32(0xFFFFFFFF))
    return out


def warp_min_s32(value):
    out = scalar("int32")
    ptx["redux_sync.min.s32"](out, value, u32(0xFFFFFFFF))
    return out


def warp_add_s32(value):
    out = scalar("int32")
    ptx["redux_sync.add.s32"](out, value, u32(0xFFFFFFFF))
    return out


def func_call(name: str, *args, ret: str, src: str):
    """Call a CUDA C++ device function whose source rides in the IR."""
    return T.cuda.func_call(name, *args, source_code=src, return_type=ret)


class Smem:
    """Bump allocator over a kernel's dynamic shared memory."""

    def __init__(self):
        self._pool = SMEMPool()

    def alloc(self, count: int, dtype: str, align: int = 16):
        return self._pool.alloc((count,), dtype, align=align)

    @contextlib.contextmanager
    def from_start(self) -> Iterator[None]:
        """Allocate from the first byte on, over what lies there."""
        offset = self._pool.offset
        self._pool.move_base_to(0)
        yield
        assert self._pool.offset <= offset, "more than lies there"
        self._pool.move_base_to(offset)

    def commit(self) -> int:
        """Fix the size; returns it in bytes."""
        self._pool.commit()
        assert self._pool.max_offset <= 227 * 1024, self._pool.max_offset
        return self._pool.max_offset


def tensor_map(data, dims, strides_bytes, box, dtype: str, swizzle: int, l2_promotion: int = 2):
    """Host side cuTensorMapEncodeTiled; innermost dimension first. Returns the descriptor's handle."""
    descriptor = I.Bind(T.tvm_stack_alloca("tensormap", 1))
    I.evaluate(
        T.tensormap_encode_tiled(
            descriptor, data, *dims, *strides_bytes, *box, *([1] * len(dims)),
            descriptor_dtype=dtype, rank=len(dims), swizzle=swizzle, l2_promotion=l2_promotion,
        )
    )  # fmt: skip
    return descriptor
