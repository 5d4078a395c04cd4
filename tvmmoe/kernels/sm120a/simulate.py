# SPDX-License-Identifier: Apache-2.0
"""Generated CUDA C++ compiled by the host compiler: the kernels run on a CPU, thread by thread, host function included.

For machines without any GPU. Threads of a CTA are fibers that switch where a real thread may wait: at a CTA barrier, at a
shuffle, at the mma. Shared memory starts as 0xff bytes (NaN as scales). An asynchronous copy is made as late as the code
allows, in its own cp.async.wait_group, or with ``early`` at once: a missing wait shows in the one, a buffer that is
overwritten too soon in the other. A CTA that no fiber can continue is reported and ends the process.

The inline PTX of TVM's helpers is translated by instruction name; one that is not known here is a compile error.
"""

import re
import subprocess
from pathlib import Path

import tvm_ffi

from tvmmoe.kernels.host import ALLOW_SHARED_MEMORY
from tvmmoe.kernels.sm120a import emulation
from tvmmoe.kernels.sm120a.intrinsics import FORMS

_RUNTIME = r"""
#include <ucontext.h>
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define CUDART_INF_F INFINITY
struct dim3 { unsigned x, y, z; dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {} };

namespace sim {
struct Copy { char* to; const void* from; int size, bytes; };
struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  dim3 thread, block;
  int rank, first;  // of its CTA in the cluster; number of that CTA's first fiber
  uint32_t words[8];  // what a warp instruction shows to the other lanes
  std::vector<std::vector<Copy>> groups{1};
  bool done = false;
};
struct Barrier { int arrived = 0, generation = 0; };
constexpr int kStack = 256 * 1024;
inline std::vector<Fiber> fibers;
inline std::vector<Barrier> warps, ctas;  // of the cluster that runs
inline Barrier cluster;
inline int num_threads, num_ctas;  // of a CTA, of a cluster
inline std::vector<char> smem;
inline size_t smem_stride;  // from one CTA's shared memory to the next one's
inline ucontext_t scheduler;
inline Fiber* self;
inline dim3 block;
inline long progress;
inline int starved = -1;  // warpgroup whose threads run only when no other can
inline void (*entry)(void*);
inline void* arguments;
// What another chip than sm_120 has besides (kernels/sm100a/simulate.py):
inline void (*on_begin)() = [] {};                // before a CTA
inline void (*on_end)() = [] {};                  // after it
inline bool (*on_idle)() = [] { return false; };  // no fiber can go on: do something that is still due
inline void (*on_copy)(const char*, int) = [](const char*, int) {};  // cp.async has written shared memory

inline void yield() { swapcontext(&self->context, &scheduler); }
inline void wait(Barrier& barrier, int count) {
  ++progress;
  const int mine = barrier.generation;
  if (++barrier.arrived == count) {
    barrier.arrived = 0;
    ++barrier.generation;
  }
  while (barrier.generation == mine) yield();
}
inline void warp_sync() { wait(warps[(self->first + self->thread.x) / 32], 32); }
inline Fiber& lane(int index) { return fibers[self->first + self->thread.x / 32 * 32 + index]; }
inline void start() {
  entry(arguments);
  self->done = true;
  ++progress;
  for (;;) yield();
}
inline void run_cluster() {
  const int total = num_threads * num_ctas;
  for (int i = 0; i < total; ++i) {
    Fiber& f = fibers[i];
    if (!f.stack) f.stack.reset(new char[kStack]);
    f.rank = i / num_threads, f.first = f.rank * num_threads;
    f.thread = dim3(i % num_threads), f.block = dim3(block.x + f.rank, block.y);
    f.done = false, f.groups.assign(1, {});
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.get();
    f.context.uc_stack.ss_size = kStack;
    makecontext(&f.context, start, 0);
  }
  bool live = true;
  auto run = [&](int first, bool is_starved) {  // threads of a CTA, once
    for (int i = first; i < first + num_threads; ++i) {
      if (fibers[i].done) continue;
      live = true;
      if ((int(fibers[i].thread.x) / 128 == starved) != is_starved) continue;
      self = &fibers[i];
      swapcontext(&scheduler, &self->context);
    }
  };
  while (live) {
    const long before = progress;
    live = false;
    for (int first = 0; first < total; first += num_threads)  // one CTA as far as it gets before the next: they drift apart
      for (long last = -1; last != progress;) last = progress, run(first, false);
    for (int first = 0; first < total && progress == before; first += num_threads) run(first, true);
    if (live && progress == before && !on_idle()) {
      fprintf(stderr, "simulate: deadlock in CTA %u\n", block.x);
      abort();
    }
  }
}
inline void run_grid(dim3 grid, int threads, size_t bytes, int cluster_size) {
  num_threads = threads, num_ctas = cluster_size;
  const size_t total = size_t(threads) * num_ctas;
  if (fibers.size() < total) fibers = std::vector<Fiber>(total);
  warps.assign(total / 32, {});
  ctas.assign(num_ctas, {});
  cluster = {};
  smem_stride = (bytes + 1023) / 1024 * 1024;
  for (unsigned i = 0; i < grid.x * grid.y; i += num_ctas) {
    block = dim3(i % grid.x, i / grid.x);
    smem.assign(num_ctas * smem_stride + 1024, char(0xff));
    on_begin();
    run_cluster();
    on_end();
  }
}
inline char* shared_of(int rank) {
  return (char*)((uintptr_t(smem.data()) + 1023) & ~uintptr_t(1023)) + rank * smem_stride;
}
inline char* shared() { return shared_of(self->rank); }
inline void make(const Copy& c) {
  memcpy(c.to, c.from, c.bytes);
  memset(c.to + c.bytes, 0, c.size - c.bytes);
  on_copy(c.to, c.size);
}
inline uint32_t bf16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return x != x ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
}  // namespace sim
using std::max;
using std::min;
#define threadIdx (sim::self->thread)
#define blockIdx (sim::self->block)

template <class T> T __shfl_sync(unsigned, T value, int lane, int = 32) {
  memcpy(sim::self->words, &value, sizeof(T));
  sim::warp_sync();
  memcpy(&value, sim::lane(lane).words, sizeof(T));
  sim::warp_sync();
  return value;
}
template <class T> T __shfl_xor_sync(unsigned, T value, int mask) {
  return __shfl_sync(~0u, value, (sim::self->thread.x % 32) ^ mask);
}
inline void __syncthreads() { sim::wait(sim::ctas[sim::self->rank], sim::num_threads); }
inline size_t __cvta_generic_to_shared(const void* p) { return (const char*)p - sim::shared(); }
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const uint64_t pair = uint64_t(b) << 32 | a;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) result |= unsigned(pair >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
  return result;
}
inline unsigned __ballot_sync(unsigned, int predicate) {
  sim::self->words[0] = predicate != 0;
  sim::warp_sync();
  unsigned lanes = 0;
  for (int i = 0; i < 32; ++i) lanes |= unsigned(sim::lane(i).words[0]) << i;
  sim::warp_sync();
  return lanes;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline void __syncwarp() { sim::warp_sync(); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
template <class T> T atomicAdd(T* p, T value) { return std::exchange(*p, *p + value); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float x) { return expf(x); }
"""

_INSTRUCTIONS = r"""
namespace ptx {
template <class T> T& at(uint32_t shared) { return *(T*)(sim::shared() + shared); }
template <class T> T& at(const void* p) { return *(T*)p; }
inline void griddepcontrol_wait() {}  // grids run one after another
inline void griddepcontrol_launch_dependents() {}
template <class T> void ld_global_b32(T& d, const void* p) { memcpy(&d, p, 4); }
template <class T> void ld_shared_b32(T& d, uint32_t p) { memcpy(&d, sim::shared() + p, 4); }
inline void ld_global_f32(float& d, const void* p) { d = at<float>(p); }
inline void ld_global_v4_b32(uint32_t& a, uint32_t& b, uint32_t& c, uint32_t& d, const void* p) {
  const uint32_t* w = &at<uint32_t>(p);
  a = w[0], b = w[1], c = w[2], d = w[3];
}
template <class T> void ld_relaxed_gpu_global_b32(T& d, const void* p) { ld_global_b32(d, p); }
template <class T> void ld_relaxed_gpu_global_b64(T& d, const void* p) { memcpy(&d, p, 8); }
// Asked again and again until someone has written it, who must be let on.
template <class T> void ld_acquire_gpu_global_b32(T& d, const void* p) { sim::yield(), ld_global_b32(d, p); }
inline void ld_relaxed_gpu_global_v4_b32(uint32_t& a, uint32_t& b, uint32_t& c, uint32_t& d, const void* p) {
  ld_global_v4_b32(a, b, c, d, p);
}
template <class T> void ld_global_b16(T& d, const void* p) { memcpy(&d, p, 2); }
template <class T> void ld_relaxed_gpu_global_b16(T& d, const void* p) { ld_global_b16(d, p); }
template <class T> void ld_shared_b16(T& d, uint32_t p) { memcpy(&d, sim::shared() + p, 2); }
inline void ld_global_u8(uint32_t& d, const void* p) { d = at<uint8_t>(p); }
inline void ld_relaxed_gpu_global_u8(uint32_t& d, const void* p) { ld_global_u8(d, p); }
inline void ld_global_u16(uint32_t& d, const void* p) { d = at<uint16_t>(p); }
inline void ld_shared_u8(uint32_t& d, uint32_t p) { d = at<uint8_t>(p); }
inline void ld_shared_f32(float& d, uint32_t p) { d = at<float>(p); }
inline void ld_shared_v4_b32(uint32_t& a, uint32_t& b, uint32_t& c, uint32_t& d, uint32_t p) {
  if (p % 16) fprintf(stderr, "simulate: misaligned ld.shared\n"), abort();
  ld_global_v4_b32(a, b, c, d, sim::shared() + p);
}
inline void st_shared_f32(uint32_t p, float v) { at<float>(p) = v; }
template <class T> void st_global_b16(const void* p, T v) { memcpy((void*)p, &v, 2); }
inline void ld_shared_v2_b32(uint32_t& a, uint32_t& b, uint32_t p) { a = at<uint32_t>(p), b = at<uint32_t>(p + 4); }
template <class T> void st_global_b32(const void* p, T v) { memcpy((void*)p, &v, 4); }
inline void st_global_f32(const void* p, float v) { at<float>(p) = v; }
inline void st_global_u8(const void* p, uint32_t v) { at<uint8_t>(p) = uint8_t(v); }
inline void st_global_v2_b32(const void* p, uint32_t a, uint32_t b) {
  at<uint32_t>(p) = a, at<uint32_t>((const char*)p + 4) = b;
}
inline void st_global_v4_b32(const void* p, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  st_global_v2_b32(p, a, b), st_global_v2_b32((const char*)p + 8, c, d);
}
inline void cp_async_ca_shared_global(uint32_t to, const void* from, uint32_t bytes, int size) {
  if (to % size || (bytes && uintptr_t(from) % size)) fprintf(stderr, "simulate: misaligned cp.async\n"), abort();
  const sim::Copy copy{sim::shared() + to, from, size, int(bytes)};
  if (SIM_EARLY) sim::make(copy); else sim::self->groups.back().push_back(copy);
}
inline void cp_async_commit_group() { sim::self->groups.emplace_back(); }
inline void cp_async_wait_group(int n) {
  auto& groups = sim::self->groups;  // the last one is still open
  for (; int(groups.size()) > n + 1; groups.erase(groups.begin()))
    for (const auto& copy : groups.front()) sim::make(copy);
}
inline void ldmatrix_sync_aligned_m8n8_x4_shared_b16(uint32_t& a, uint32_t& b, uint32_t& c, uint32_t& d, uint32_t p) {
  if (p % 16) fprintf(stderr, "simulate: misaligned ldmatrix\n"), abort();
  sim::self->words[0] = p;
  sim::warp_sync();
  const int l = sim::self->thread.x % 32;
  uint32_t* out[4] = {&a, &b, &c, &d};
  for (int m = 0; m < 4; ++m) *out[m] = at<uint32_t>(sim::lane(8 * m + l / 4).words[0] + 4 * (l % 4));
  sim::warp_sync();
}
inline void movmatrix_sync_aligned_m8n8_trans_b16(uint32_t& d, uint32_t a) {
  sim::self->words[0] = a;
  sim::warp_sync();
  const int row = sim::self->thread.x % 32 / 4, column = 2 * (sim::self->thread.x % 4);
  auto element = [](int r, int c) { return sim::lane(4 * r + c / 2).words[0] >> 16 * (c % 2) & 0xffff; };
  d = element(column, row) | element(column + 1, row) << 16;
  sim::warp_sync();
}
inline void redux_sync_max_s32(int32_t& d, int32_t a, uint32_t) {
  sim::self->words[0] = a;
  sim::warp_sync();
  d = a;
  for (int i = 0; i < 32; ++i) if (int32_t(sim::lane(i).words[0]) > d) d = sim::lane(i).words[0];
  sim::warp_sync();
}
inline void redux_sync_min_s32(int32_t& d, int32_t a, uint32_t mask) {
  int32_t most;
  redux_sync_max_s32(most, ~a, mask);
  d = ~most;
}
inline void redux_sync_add_s32(int32_t& d, int32_t a, uint32_t) {
  sim::self->words[0] = a;
  sim::warp_sync();
  uint32_t sum = 0;
  for (int i = 0; i < 32; ++i) sum += sim::lane(i).words[0];
  d = sum;
  sim::warp_sync();
}
template <class T> void from_lane(T& d, T a, int lane) {
  const T value = __shfl_sync(~0u, a, lane & 31);
  d = lane < 0 ? a : value;
}
inline int lane_id() { return sim::self->thread.x % 32; }
template <class T> void shfl_sync_bfly_b32(T& d, T a, uint32_t b, uint32_t, uint32_t) { from_lane(d, a, lane_id() ^ b); }
template <class T> void shfl_sync_idx_b32(T& d, T a, uint32_t b, uint32_t, uint32_t) { from_lane(d, a, b); }
template <class T> void shfl_sync_up_b32(T& d, T a, uint32_t b, uint32_t, uint32_t) { from_lane(d, a, lane_id() - int(b)); }
inline void match_any_sync_b32(uint32_t& d, uint32_t a, uint32_t) {
  sim::self->words[0] = a;
  sim::warp_sync();
  d = 0;
  for (int i = 0; i < 32; ++i) d |= uint32_t(sim::lane(i).words[0] == a) << i;
  sim::warp_sync();
}
inline float bf16_half(uint32_t pair, int half) {
  const uint32_t bits = half ? pair & 0xffff0000 : pair << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
inline void fma_rn_bf16x2(uint32_t& d, uint32_t a, uint32_t b, uint32_t c) {  // exact where the product of halves is a float
  auto half = [&](int i) { return sim::bf16(bf16_half(a, i) * bf16_half(b, i) + bf16_half(c, i)); };
  d = half(0) | half(1) << 16;
}
inline void mma_sync_aligned_m16n8k16_row_col_f32_bf16_bf16_f32(
    float& d0, float& d1, float& d2, float& d3, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1,
    float c0, float c1, float c2, float c3) {
  const uint32_t words[6] = {a0, a1, a2, a3, b0, b1};
  memcpy(sim::self->words, words, sizeof(words));
  sim::warp_sync();
  float* d[4] = {&d0, &d1, &d2, &d3};
  const float c[4] = {c0, c1, c2, c3};
  const int g = lane_id() / 4, t = lane_id() % 4;
  for (int i = 0; i < 4; ++i) {  // row g + 8 (i / 2), column 2t + i % 2; a register 2 (k / 8) + row / 8, b register k / 8
    double sum = c[i];
    for (int k = 0; k < 16; ++k) {
      const uint32_t a = sim::lane(4 * g + k % 8 / 2).words[2 * (k / 8) + i / 2];
      const uint32_t b = sim::lane(4 * (2 * t + i % 2) + k % 8 / 2).words[4 + k / 8];
      sum += double(bf16_half(a, k % 2)) * bf16_half(b, k % 2);
    }
    *d[i] = float(sum);
  }
  sim::warp_sync();
}
inline void prmt_b32(uint32_t& d, uint32_t a, uint32_t b, uint32_t selector) {
  const uint32_t bytes = __byte_perm(a, b, selector);
  d = 0;
  for (int i = 0; i < 4; ++i) {  // selector bit 3: the byte's sign in all of its bits
    const uint32_t byte = bytes >> 8 * i & 255;
    d |= (selector >> 4 * i & 8 ? (byte & 128 ? 255 : 0) : byte) << 8 * i;
  }
}
inline void shf_r_wrap_b32(uint32_t& d, uint32_t a, uint32_t b, uint32_t c) {
  d = uint32_t((uint64_t(b) << 32 | a) >> (c & 31));
}
inline void max_NaN_f32(float& d, float a, float b) { d = a != a || b != b ? NAN : fmaxf(a, b); }
inline void min_NaN_f32(float& d, float a, float b) { d = a != a || b != b ? NAN : fminf(a, b); }
inline void cvt_rn_bf16x2_f32(uint32_t& d, float high, float low) {
  d = sim::bf16(high) << 16 | sim::bf16(low);
}
}  // namespace ptx

struct AllLanes {
  uint32_t operator()(int lane, int index) const { return sim::lane(lane).words[index]; }
};
template <class Form> void warp_mma(float* d, const uint32_t (&words)[8], int ba, int ta, int bb, int tb) {
  memcpy(sim::self->words, words, sizeof(words));
  sim::warp_sync();
  tvmmoe_emulate<Form>(AllLanes{}, sim::self->thread.x % 32, d, ba, ta, bb, tb);
  sim::warp_sync();
}
"""

_MMA = r"""
inline void {name}(float* d, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1, uint32_t sa,
                   uint32_t sb, int ba, int ta, int bb, int tb) {{
  warp_mma<{form}>(d, {{a0, a1, a2, a3, b0, b1, sa, sb}}, ba, ta, bb, tb);
}}
"""

_HOST = r"""
struct cudaLaunchAttribute {
  int id;
  struct { int programmaticStreamSerializationAllowed; struct { unsigned x, y, z; } clusterDim; } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim; size_t dynamicSmemBytes; void* stream; cudaLaunchAttribute* attrs; int numAttrs;
};
using cudaError_t = int;
using cudaStream_t = void*;
enum { cudaSuccess, cudaErrorCudartUnloading, cudaFuncAttributeMaxDynamicSharedMemorySize,
       cudaFuncAttributeNonPortableClusterSizeAllowed,
       cudaLaunchAttributeProgrammaticStreamSerialization, cudaLaunchAttributeClusterDimension };
inline const char* cudaGetErrorString(int) { return ""; }
inline int cudaGetLastError() { return 0; }
inline int cudaGetDevice(int* d) { return *d = 0; }
inline int cudaSetDevice(int) { return 0; }
namespace tvm { namespace ffi { struct CUDADeviceGuard { CUDADeviceGuard(int = 0) {} }; } }
template <class F> int cudaFuncSetAttribute(F, int, int) { return 0; }
template <class F> int tvmmoe_allow_shared_memory(F, int, int, std::atomic<uint64_t>&) { return 0; }
template <class... P, class... A> int cudaLaunchKernelEx(const cudaLaunchConfig_t* c, void (*kernel)(P...), A... args) {
  auto call = [&] { kernel(args...); };
  sim::arguments = &call;
  sim::entry = [](void* p) { (*(decltype(call)*)p)(); };
  int cluster = 1;
  for (int i = 0; i < c->numAttrs; ++i)
    if (c->attrs[i].id == cudaLaunchAttributeClusterDimension) cluster = c->attrs[i].val.clusterDim.x;
  sim::run_grid(c->gridDim, c->blockDim.x, c->dynamicSmemBytes, cluster);
  return 0;
}
"""


def _translate(match: re.Match) -> str:
    """An asm statement of one instruction as a call of the function of that name, literal operands last."""
    mnemonic, operands, outputs, inputs = match.groups()
    values = re.findall(r'"[^"]*"\((\w+)\)', f"{outputs} , {inputs or ''}")
    values += re.findall(r"(?<![%\w])\d+", operands)
    return f"ptx::{mnemonic.replace('.', '_').replace('::', '_')}({', '.join(values)});"


def host_source(cuda: str, early: bool = False, extra: str = "") -> str:
    """Host C++ of what ``build.cuda_source`` returned; ``extra`` defines what this module does not."""
    kernels, host = cuda.replace(ALLOW_SHARED_MEMORY, "").split("#include <tvm/ffi/c_api.h>", 1)
    kernels = re.sub(r"#include <(cuda|math_constants|cuda_runtime)\.h>", "", kernels)
    for form in FORMS:  # the simulator has its own
        kernels = re.sub(rf"^[^\n]*\b{form.function}\(float.*?\n}}\n", "", kernels, flags=re.M | re.S)
    asm = r'asm volatile\("([\w.:]+) ?([^"]*);"\s*:\s*([^:]*?)\s*:\s*([^:;]*?)\s*(?::[^;]*)?\);'
    kernels = re.sub(asm, _translate, kernels)
    kernels = re.sub(
        r"extern __shared__ __align__\(64\) uchar (\w+)\[\];", r"uchar* \1 = (uchar*)sim::shared();", kernels
    )
    host = re.sub(r"#include <(cuda|cuda_runtime|tvm/ffi/extra/cuda/device_guard)\.h>", "", host)
    host = re.sub(r"(device_type\)+) == 2", r"\1 == 1", host)
    mma = "".join(_MMA.format(name=form.function, form=form.model) for form in FORMS)
    parts = (f"#define SIM_EARLY {int(early)}", _RUNTIME, emulation.MODEL, _INSTRUCTIONS, mma, extra, kernels, _HOST)
    return "\n".join(parts) + "\n#include <tvm/ffi/c_api.h>" + host


def compile_so(source: str, path: Path) -> None:
    """Run g++ on what :func:`host_source` returned. Raises RuntimeError with its message."""
    path.parent.mkdir(parents=True, exist_ok=True)
    includes = [tvm_ffi.libinfo.find_include_path(), tvm_ffi.libinfo.find_dlpack_include_path()]
    command = [
        "g++", "-shared", "-fPIC", "-fvisibility=hidden", "-std=c++17", "-O1", "-w",
        "-fno-strict-aliasing", "-ffp-contract=off",
        *(f"-I{folder}" for folder in includes), "-x", "c++", "-", "-o", str(path),
        f"-L{Path(tvm_ffi.libinfo.find_libtvm_ffi()).parent}", "-ltvm_ffi",
    ]  # fmt: skip
    done = subprocess.run(command, input=source, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"g++ failed for {path.name}:\n{done.stderr[:6000]}")
