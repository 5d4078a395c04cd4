# SPDX-License-Identifier: Apache-2.0
"""The generated CUDA C++ of a Hopper operator compiled by the host compiler: it runs on a CPU, host function included.

Fibers, CTA barriers, shuffles, ldmatrix and mma.sync are those of sm120a.simulate. Here are mbarriers, TMA (boxes of a tensor
map, zeros outside of it, 128-byte swizzle, to one CTA or all of a cluster), named barriers, and wgmma with A in registers: of
bf16, and of e4m3, which sums as the H100 was measured to: 32 products and the accumulator aligned to the largest of them, cut
off below 2^-13 of it.

A TMA copy is made when a thread first asks for its barrier, or with ``early`` at once: a missing wait shows in the one, a
buffer that is overwritten too soon in the other. wgmma happens when it is issued.
"""

import re

from tvmmoe.kernels.sm90a import races
from tvmmoe.kernels.sm120a import simulate as base

_RUNTIME = r"""
#include <functional>
#include <map>
using cuuint32_t = uint32_t;
using cuuint64_t = uint64_t;
using CUresult = int;
enum { CUDA_SUCCESS };
enum CUtensorMapDataType { CU_TENSOR_MAP_DATA_TYPE_UINT8 = 1, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 };  // bytes of an element
using CUtensorMapInterleave = int;
using CUtensorMapSwizzle = int;
using CUtensorMapL2promotion = int;
using CUtensorMapFloatOOBfill = int;
#define __grid_constant__
struct CUtensorMap {  // innermost dimension in bytes
  const char* data; int rank, swizzle, element; uint64_t dims[5], strides[5]; uint32_t box[5];
};
inline int64_t tvmmoe_address(const void* p) { return int64_t(p); }
inline int cuGetErrorString(int, const char**) { return 0; }
inline int cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, uint32_t rank, void* data, const uint64_t* dims,
                                  const uint64_t* strides, const uint32_t* box, const uint32_t*, int, int swizzle, int, int) {
  *map = {(const char*)data, int(rank), swizzle, int(type)};
  bool good = uintptr_t(data) % 16 == 0;
  for (unsigned i = 0; i < rank; ++i) {
    const int bytes = i ? 1 : type;
    map->dims[i] = dims[i] * bytes, map->box[i] = box[i] * bytes, map->strides[i] = i ? strides[i - 1] : 1;
    good = good && box[i] && box[i] <= 256 && dims[i] && (!i || strides[i - 1] % 16 == 0);
  }
  good = good && (swizzle != 3 || map->box[0] == 128) && map->box[0] % 16 == 0;
  if (!good) fprintf(stderr, "simulate: bad tensor map\n"), abort();
  return CUDA_SUCCESS;
}

namespace sim {
struct Mbarrier {
  int count = 0, pending = 0;
  long bytes = 0;
  unsigned phase = 0;
  std::vector<std::function<void()>> copies;
};
inline std::map<uint64_t, Mbarrier> mbarriers;
inline std::map<int, Barrier> named_barriers;
inline Barrier& named(int id) { return named_barriers[self->rank * 10000 + id]; }
inline uint64_t key(int rank, uint32_t at) { return uint64_t(rank) << 32 | at; }
inline Mbarrier& mbarrier_of(int rank, uint32_t at) {
  const auto found = mbarriers.find(key(rank, at));
  if (found == mbarriers.end()) fprintf(stderr, "simulate: no mbarrier at %u\n", at), abort();
  return found->second;
}
inline Mbarrier& mbarrier(uint32_t at) { return mbarrier_of(self->rank, at); }
inline void settle(uint64_t at) {
  Mbarrier& b = mbarriers[at];
  if (b.pending < 0 || (b.pending == 0 && b.bytes < 0)) fprintf(stderr, "simulate: mbarrier overrun\n"), abort();
  if (b.pending == 0 && b.bytes == 0) race::complete(at, b.phase), b.phase ^= 1, b.pending = b.count;
  ++progress;
}
inline void arrive(uint32_t at, int count, int rank) {
  mbarrier_of(rank, at).pending -= count;
  race::release(key(rank, at));
  settle(key(rank, at));
}
inline void arrive(uint32_t at, int count) { arrive(at, count, self->rank); }
inline void meet(Barrier& b, int count) { race::meet(&b, b.generation, [&] { wait(b, count); }); }
template <int rank>
void tma_to(int cta, uint32_t to, const void* tensor_map, const int (&at)[rank], uint32_t barrier) {
  const CUtensorMap map = *(const CUtensorMap*)tensor_map;
  if (map.rank != rank || to % (map.swizzle ? 1024 : 128)) fprintf(stderr, "simulate: bad TMA destination\n"), abort();
  int start[rank];
  for (int i = 0; i < rank; ++i) start[i] = i ? at[i] : at[i] * map.element;
  std::vector<int> place(start, start + rank);
  uint32_t bytes = map.box[0];
  for (int i = 1; i < rank; ++i) bytes *= map.box[i];
  const auto when = race::copy(cta, to, bytes, key(cta, barrier));
  auto copy = [=] {
    for (uint32_t row = 0; row < bytes / map.box[0]; ++row) {
      const char* from = map.data;
      bool inside = true;
      uint32_t rest = row;
      for (int i = 1; i < rank; ++i) {
        const int64_t index = place[i] + int64_t(rest % map.box[i]);
        rest /= map.box[i];
        inside = inside && index >= 0 && index < int64_t(map.dims[i]);
        from += index * int64_t(map.strides[i]);
      }
      for (uint32_t x = 0; x < map.box[0]; ++x) {
        const int64_t index = place[0] + int64_t(x);
        uint32_t offset = to + row * map.box[0] + x;
        if (map.swizzle == 3) offset ^= (offset >> 7 & 7) << 4;
        shared_of(cta)[offset] = inside && index >= 0 && index < int64_t(map.dims[0]) ? from[index] : 0;
      }
    }
    mbarrier_of(cta, barrier).bytes -= bytes;
    race::copied(key(cta, barrier), when);
    settle(key(cta, barrier));
  };
  if (SIM_EARLY) copy(); else mbarrier_of(cta, barrier).copies.push_back(copy);
}
template <int rank> void tma(uint32_t to, const void* tensor_map, const int (&at)[rank], uint32_t barrier) {
  tma_to<rank>(self->rank, to, tensor_map, at, barrier);
}
inline void wait_for(uint32_t at, unsigned parity) {
  for (;;) {
    Mbarrier& b = mbarrier(at);
    if (b.phase != parity) break;
    if (!b.copies.empty()) {
      auto copies = std::move(b.copies);
      b.copies.clear();
      for (auto& copy : copies) copy();
      continue;
    }
    yield();
  }
  race::acquire(key(self->rank, at), parity);
  ++progress;
}
inline float e4m3(uint32_t byte) {
  const int exponent = byte >> 3 & 15, mantissa = byte & 7;
  if ((byte & 127) == 127) return NAN;
  const float value = exponent ? ldexpf(8 + mantissa, exponent - 10) : ldexpf(mantissa, -9);
  return byte & 128 ? -value : value;
}
inline uint32_t to_e4m3(float x) {
  uint32_t sign = std::signbit(x) ? 128 : 0;
  if (x != x) return 127;
  const float a = std::min(fabsf(x), 448.f);
  if (a == 0) return sign;
  const int exponent = std::max(ilogbf(a), -6);
  const int units = int(nearbyintf(ldexpf(a, 3 - exponent)));  // ties to even; 8 ... 16 of a normal number
  return sign | (units >= 8 ? uint32_t((exponent + 7) * 8 + units - 8) : uint32_t(units));
}
inline float f16(uint32_t h) {
  const int exponent = h >> 10 & 31, mantissa = h & 1023;
  const float value = exponent == 31 ? (mantissa ? NAN : INFINITY)
                      : exponent ? ldexpf(1024 + mantissa, exponent - 25) : ldexpf(mantissa, -24);
  return h & 0x8000 ? -value : value;
}
inline uint32_t to_f16(float x) {
  const uint32_t sign = std::signbit(x) ? 0x8000 : 0;
  if (x != x) return 0x7fff;
  const float a = fabsf(x);
  if (a == 0) return sign;
  const int exponent = std::max(ilogbf(a), -14);
  const int units = int(nearbyintf(ldexpf(a, 10 - exponent)));
  if (exponent > 15) return sign | 0x7c00;
  return sign | (units >= 1024 ? uint32_t((exponent + 15) * 1024 + units - 1024) : uint32_t(units));
}
inline float cut(double sum) {  // to 13 fractional bits
  if (sum == 0 || !std::isfinite(sum)) return float(sum);
  const int exponent = ilogb(sum);
  return float(ldexp(trunc(ldexp(sum, 13 - exponent)), exponent - 13));
}
inline float dot(const float (&a)[32], const float (&b)[32], float c) {
  int top = c == 0 ? -10000 : ilogb(c);
  double products[32], sum = 0;
  for (int k = 0; k < 32; ++k) {
    products[k] = double(a[k]) * b[k];
    if (products[k] != products[k]) return NAN;
    if (products[k] != 0) top = std::max(top, ilogb(products[k]));
  }
  if (c != c || top == -10000) return c;
  const double unit = ldexp(1., top - 13);
  for (double product : products) sum += trunc(product / unit);
  return cut((sum + trunc(c / unit)) * unit);
}
inline float bf16_value(uint32_t half) {
  const uint32_t bits = half << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
inline float dot(const float (&a)[16], const float (&b)[16], float c) {
  double sum = c;
  for (int k = 0; k < 16; ++k) sum += double(a[k]) * b[k];
  return float(sum);
}
// Element ``k`` of a fragment row or of a token: ``bits`` of 8 or 16 each.
template <int bits> float element(uint32_t word, int place) {
  const uint32_t code = word >> place * bits & ((1u << bits) - 1);
  return bits == 8 ? e4m3(code) : bf16_value(code);
}
template <int n, int bits>
void wgmma(float* (&d)[n / 2], const uint32_t (&a)[4], uint64_t descriptor, uint32_t accumulate) {
  constexpr int depth = 256 / bits, per_word = 32 / bits;
  const unsigned id = self->thread.x % 32;
  memcpy(self->words, a, sizeof(a));
  Barrier& barrier = named(1000 + self->thread.x / 128);
  race::meet_in_warp([&] { wait(barrier, 128); });
  const uint32_t start = (descriptor & 0x3fff) << 4, stride = (descriptor >> 32 & 0x3fff) << 4;
  if (descriptor >> 62 != 1) fprintf(stderr, "simulate: wgmma swizzle\n"), abort();
  float rows[2][depth];
  for (int r = 0; r < 2; ++r)
    for (int k = 0; k < depth; ++k) {
      const int half = k / (depth / 2), word = k % (depth / 2) / per_word;
      rows[r][k] = element<bits>(lane(id / 4 * 4 + word).words[half * 2 + r], k % per_word);
    }
  for (int i = 0; i < n / 8; ++i)
    for (int t = 0; t < 2; ++t) {
      float column[depth];
      const int token = id % 4 * 2 + t;
      for (int word = 0; word < 8; ++word) {
        uint32_t offset = start + i * stride + token * 128 + 4 * word, value;
        offset ^= (offset >> 7 & 7) << 4;
        memcpy(&value, shared() + offset, 4);
        if (id < 4) race::wgmma_read(offset);  // four lanes have all tokens
        for (int k = 0; k < per_word; ++k) column[word * per_word + k] = element<bits>(value, k);
      }
      for (int r = 0; r < 2; ++r) {
        float& sum = *d[4 * i + 2 * r + t];
        sum = dot(rows[r], column, accumulate ? sum : 0);
      }
    }
  wait(barrier, 128);
}
}  // namespace sim
inline void meet_in_cta() { sim::meet(sim::ctas[sim::self->rank], sim::num_threads); }
#define __syncthreads() meet_in_cta()
inline void meet_in_warp() { race::meet_in_warp(sim::warp_sync); }
#define __syncwarp() meet_in_warp()
"""

_HOST = r"""
template <auto kernel, class... A> int tvmmoe_launch(const cudaLaunchConfig_t* c, A... args) {
  return cudaLaunchKernelEx(c, kernel, args...);
}
"""

_INSTRUCTIONS = r"""
struct half { uint16_t bits; };
using __half = half;
namespace ptx {
inline void setmaxnreg_inc_sync_aligned_u32(int) {}
inline void setmaxnreg_dec_sync_aligned_u32(int) {}
inline void fence_proxy_async_shared_cta() {}
inline void fence_proxy_async_global() {}
inline void fence_mbarrier_init_release_cluster() {}
inline void wgmma_fence_sync_aligned() {}
inline void wgmma_commit_group_sync_aligned() { race::commit(); }
inline void wgmma_wait_group_sync_aligned(int left) {
  meet_in_warp();
  race::retire(left);
}
inline void prefetch_tensormap(const void*) {}
inline void atom_relaxed_gpu_global_add_u32(uint32_t& d, const void* p, uint32_t value) {
  d = __atomic_fetch_add(static_cast<uint32_t*>(const_cast<void*>(p)), value, __ATOMIC_RELAXED);
}
inline void st_release_gpu_global_b32(const void* p, uint32_t value) {
  at<uint32_t>(const_cast<void*>(p)) = value;
  ++sim::progress;
}
inline void red_release_gpu_global_add_u32(const void* p, uint32_t value) {
  at<uint32_t>(const_cast<void*>(p)) += value;
  ++sim::progress;
}
inline void bar_sync(int id, int count) { sim::meet(sim::named(id), count); }
inline void barrier_sync_aligned(uint32_t id, uint32_t count) { sim::meet(sim::named(id), count); }
inline void mbarrier_init_shared_b64(uint32_t at, uint32_t count) {
  sim::mbarriers[sim::key(sim::self->rank, at)] = {int(count), int(count)};
}
// An address in another CTA of the cluster has that CTA's rank, plus one, in its upper byte.
inline void mapa_shared_cluster_u32(uint32_t& d, uint32_t at, uint32_t rank) { d = at | (rank + 1) << 24; }
inline void mbarrier_arrive_shared_cluster_b64(uint32_t at) { sim::arrive(at & 0xffffff, 1, int(at >> 24) - 1); }
inline void st_async_shared_cluster_mbarrier_complete_tx_bytes_v4_b32(
    uint32_t to, uint32_t a, uint32_t b, uint32_t c, uint32_t d, uint32_t barrier) {
  const uint32_t words[4] = {a, b, c, d};
  const int rank = int(to >> 24) - 1;
  memcpy(sim::shared_of(rank) + (to & 0xffffff), words, sizeof(words));
  const uint64_t there = sim::key(rank, barrier & 0xffffff);
  sim::mbarrier_of(rank, barrier & 0xffffff).bytes -= sizeof(words);
  race::copied(there, race::copy(rank, to & 0xffffff, sizeof(words), there));
  sim::settle(there);
}
inline void cp_async_bulk_tensor_2d_shared_cluster_global_mbarrier_complete_tx_bytes_multicast_cluster(
    uint32_t to, const void* map, int x, int y, uint32_t barrier, uint32_t ctas) {
  for (int rank = 0; rank < sim::num_ctas; ++rank)
    if (ctas >> rank & 1) sim::tma_to<2>(rank, to, map, {x, y}, barrier);
}
inline void mbarrier_arrive_shared_b64(uint32_t at, uint32_t count) { sim::arrive(at, count); }
inline void mbarrier_arrive_expect_tx_shared_b64(uint32_t at, uint32_t bytes) {
  sim::mbarrier(at).bytes += bytes;
  sim::arrive(at, 1);
}
inline void cp_async_mbarrier_arrive_noinc_shared_b64(uint32_t at) {
  cp_async_commit_group();
  cp_async_wait_group(0);
  sim::arrive(at, 1);
}
template <class... Rest>
void cp_async_bulk_tensor_2d_shared_cta_global_mbarrier_complete_tx_bytes(
    uint32_t to, const void* map, int x, int y, uint32_t barrier, Rest...) {
  sim::tma<2>(to, map, {x, y}, barrier);
}
template <class... Rest>
void cp_async_bulk_tensor_3d_shared_cta_global_mbarrier_complete_tx_bytes(
    uint32_t to, const void* map, int x, int y, int z, uint32_t barrier, Rest...) {
  sim::tma<3>(to, map, {x, y, z}, barrier);
}
template <class... Rest>
void cp_async_bulk_tensor_3d_shared_cta_global_mbarrier_complete_tx_bytes_L2_cache_hint(
    uint32_t to, const void* map, int x, int y, int z, uint32_t barrier, Rest...) {
  sim::tma<3>(to, map, {x, y, z}, barrier);
}
template <class... Rest>
void cp_async_bulk_tensor_5d_shared_cta_global_mbarrier_complete_tx_bytes(
    uint32_t to, const void* map, int x, int y, int z, int u, int v, uint32_t barrier, Rest...) {
  sim::tma<5>(to, map, {x, y, z, u, v}, barrier);
}
template <class... Rest>
void cp_async_bulk_tensor_5d_shared_cta_global_mbarrier_complete_tx_bytes_L2_cache_hint(
    uint32_t to, const void* map, int x, int y, int z, int u, int v, uint32_t barrier, Rest...) {
  sim::tma<5>(to, map, {x, y, z, u, v}, barrier);
}
template <class T> void ld_global_u8(T& d, const void* p) { d = at<uint8_t>(p); }
template <class T> void ld_relaxed_gpu_global_u16(T& d, const void* p) { d = at<uint16_t>(p); }
template <class T> void ld_global_u16(T& d, const void* p) { uint16_t value; memcpy(&value, p, 2); d = value; }
template <class T> void ld_shared_u8(T& d, uint32_t p) { d = at<uint8_t>(p); }
inline void st_shared_b32(uint32_t p, uint32_t a) { at<uint32_t>(p) = a; }
inline void st_shared_v4_b32(uint32_t p, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  at<uint32_t>(p) = a, at<uint32_t>(p + 4) = b, at<uint32_t>(p + 8) = c, at<uint32_t>(p + 12) = d;
}
inline void st_shared_v2_b32(uint32_t p, uint32_t a, uint32_t b) { at<uint32_t>(p) = a, at<uint32_t>(p + 4) = b; }
template <size_t n> void stmatrix_transposed(uint32_t p, const uint32_t (&words)[n]) {
  if (p % 16) fprintf(stderr, "simulate: misaligned stmatrix\n"), abort();
  sim::self->words[0] = p;
  meet_in_warp();
  for (int i = 0; i < 8 * int(n) && race::is_leader(); ++i) race::write(sim::lane(i).words[0], 16);
  const int lane = sim::self->thread.x % 32;
  for (int m = 0; m < int(n); ++m)
    for (int h = 0; h < 2; ++h)  // element (row lane / 4, column 2 (lane % 4) + h) goes to row and column exchanged
      at<uint16_t>(sim::lane(8 * m + 2 * (lane % 4) + h).words[0] + 2 * (lane / 4)) = words[m] >> 16 * h;
  sim::warp_sync();
}
inline void stmatrix_sync_aligned_m8n8_x1_trans_shared_b16(uint32_t p, uint32_t a) { stmatrix_transposed(p, {a}); }
inline void stmatrix_sync_aligned_m8n8_x2_trans_shared_b16(uint32_t p, uint32_t a, uint32_t b) {
  stmatrix_transposed(p, {a, b});
}
inline void stmatrix_sync_aligned_m8n8_x4_trans_shared_b16(uint32_t p, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  stmatrix_transposed(p, {a, b, c, d});
}
template <class F> uint32_t halves(uint32_t a, uint32_t b, F f) {
  return uint32_t(f(a & 0xffff, b & 0xffff)) | uint32_t(f(a >> 16, b >> 16)) << 16;
}
inline void max_u16x2(uint32_t& d, uint32_t a, uint32_t b) { d = halves(a, b, [](auto x, auto y) { return max(x, y); }); }
inline void min_u16x2(uint32_t& d, uint32_t a, uint32_t b) { d = halves(a, b, [](auto x, auto y) { return min(x, y); }); }
inline void mul_rn_bf16x2(uint32_t& d, uint32_t a, uint32_t b) {
  d = halves(a, b, [](auto x, auto y) { return sim::bf16(sim::bf16_value(x) * sim::bf16_value(y)); });
}
inline void mul_rn_f16x2(uint32_t& d, uint32_t a, uint32_t b) {
  d = halves(a, b, [](auto x, auto y) { return sim::to_f16(sim::f16(x) * sim::f16(y)); });
}
inline void cvt_rn_f16x2_e4m3x2(uint32_t& d, uint16_t a) {
  d = sim::to_f16(sim::e4m3(a & 255)) | sim::to_f16(sim::e4m3(a >> 8)) << 16;
}
inline void cvt_rn_satfinite_e4m3x2_f16x2(uint16_t& d, uint32_t a) {
  d = sim::to_e4m3(sim::f16(a & 0xffff)) | sim::to_e4m3(sim::f16(a >> 16)) << 8;
}
inline void cvt_rn_satfinite_e4m3x2_f32(uint16_t& d, float high, float low) {
  d = sim::to_e4m3(low) | sim::to_e4m3(high) << 8;
}
}  // namespace ptx
"""


def _body(name: str) -> str | None:
    """C++ of the helper ``name`` where its asm is no single instruction."""
    if name == "tvm_builtin_elect_one_sync":
        return "{ return sim::self->thread.x % 32 == 0; }"
    if name == "tvm_builtin_cuda_mbarrier_wait":
        return "{ sim::wait_for(__cvta_generic_to_shared(barrier), phase); }"
    if name == "tvm_builtin_cuda_cluster_sync":
        return "{ sim::meet(sim::cluster, sim::num_threads * sim::num_ctas); }"
    if name == "tvm_builtin_cluster_ctaid_x":
        return "{ return sim::self->rank; }"
    if name == "tvm_builtin_ptx_cvt_f32_f16_f32_f16":
        return "{ __d = sim::f16(__a.bits); }"
    shape = re.search(r"wgmma_\w+_rs_mma_async_sync_aligned_m64n(\d+)k(16|32)", name)
    if shape:
        n, bits = int(shape[1]), 256 // int(shape[2])
        sums = ", ".join(f"&__d{i}" for i in range(n // 2))
        call = f"sim::wgmma<{n}, {bits}>(d, {{__a0, __a1, __a2, __a3}}, __b_desc, __scale_d)"
        return f"{{ float* d[] = {{{sums}}}; {call}; }}"
    return None


def host_source(cuda: str, early: bool = False, is_watched: bool = False) -> str:
    """Host C++ of what ``build.cuda_source`` returned; ``is_watched``: it counts races (races.py)."""
    kernels, host = cuda[cuda.index("#ifdef __CUDACC_RTC__") :].split("#include <tvm/ffi/c_api.h>", 1)
    # With what is only for half arithmetic, which these kernels have none of.
    kernels = re.sub(r"#if [^\n]*\n#include <cuda_fp16\.h>.*?(?=#include <math_constants\.h>)", "", kernels, flags=re.S)
    kernels = re.sub(r"#include <(cuda|math_constants|cuda_runtime)\.h>", "", kernels)

    def replaced(match: re.Match) -> str:
        body = _body(match[2])
        return match[0] if body is None else f"inline {match[1]} {match[2]}({match[3]}) {body}\n"

    helper = r"^__forceinline__ __device__ ((?:unsigned )?\w+) (tvm_builtin_\w+)\(([^)]*)\) \{\{?\n.*?^\}\}?\n"
    kernels = re.sub(helper, replaced, kernels, flags=re.M | re.S)
    asm = r'asm(?: volatile)?\("([\w.:]+) ?([^";]*);?"\s*:\s*([^:]*?)\s*:\s*([^:;]*?)\s*(?::[^;]*)?\);'
    kernels = re.sub(asm, base._translate, kernels)
    kernels = re.sub(
        r"extern __shared__ __align__\(64\) uchar (\w+)\[\];", r"uchar* \1 = (uchar*)sim::shared();", kernels
    )
    host = re.sub(r"#include <(cuda|cuda_runtime|tvm/ffi/extra/cuda/device_guard)\.h>", "", host)
    host = re.sub(r"(device_type\)+) == 2", r"\1 == 1", host)
    instructions = base._INSTRUCTIONS.split("\nstruct AllLanes")[0] + "\n" + _INSTRUCTIONS
    watch = races.WATCH if is_watched else races.IGNORE
    if is_watched:
        instructions, kernels = races.watched(instructions), races.watched_arrays(kernels)
    parts = f"#define SIM_EARLY {int(early)}", base._RUNTIME, watch, _RUNTIME, instructions, kernels, base._HOST, _HOST
    return "\n".join(parts) + "\n#include <tvm/ffi/c_api.h>" + host
