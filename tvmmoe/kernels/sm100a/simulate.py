# SPDX-License-Identifier: Apache-2.0
"""tcgen05, TMA and mbarrier for the CPU simulation of sm120a/simulate.py, written from the PTX ISA's text.

    mbarrier   arrivals, transaction bytes and phases; one arrival or byte too many ends the process
    TMA        boxes of up to five dimensions, zeros outside of the tensor, 128-byte swizzle by address bits, the
               requirements of cuTensorMapEncodeTiled
    tcgen05    tensor memory of 128 lanes x 512 columns; cp, mma, commit and ld read descriptors and addresses by the
               documented fields and layouts, none of which comes from descriptors.py

Two queues, TMA and the tensor core, run in order: at once with ``early``, else only when no thread can go on, which is as
late as the program allows. So a missing wait reads what was there before, and a buffer that is given back too soon is
overwritten before it is read. Shared memory written by a thread may be read by the tensor core only after that thread's
fence.proxy.async; tcgen05.ld delivers in its tcgen05.wait::ld. Tensor memory starts as 0xff bytes in every CTA, and all of
it must have been given back at the end.
"""

import re
from pathlib import Path

from tvmmoe.kernels.sm120a import simulate as sm120a

_MODEL = r"""
#include <deque>
#include <functional>
#include <map>
namespace tc {
struct Barrier { int count, pending; long bytes; unsigned phase; };
inline std::map<uint32_t, Barrier> barriers;
inline std::map<uint32_t, sim::Barrier> named;
inline uint32_t tmem[128][512];
inline int allocated = 0;
inline std::deque<std::function<void()>> tma, tensor;
inline std::vector<char> unfenced;                        // bytes of shared memory that a thread has written
inline std::vector<std::pair<uint32_t, int>> written[1024];  // the same by thread
inline std::vector<std::pair<uint32_t*, uint32_t>> loads[1024];  // of tcgen05.ld, by thread

[[noreturn]] inline void fail(const char* what) {
  fprintf(stderr, "simulate: %s (CTA %u, thread %u)\n", what, sim::block.x, sim::self->thread.x);
  abort();
}
inline void require(bool condition, const char* what) { if (!condition) fail(what); }
inline unsigned thread() { return sim::self->thread.x; }
inline void wrote(uint32_t place, int size) {
  written[thread()].push_back({place, size});
  memset(&unfenced[place], 1, size);
}
inline void fence() {
  for (auto [place, size] : written[thread()]) memset(&unfenced[place], 0, size);
  written[thread()].clear();
}
inline uint8_t read(uint32_t place) {
  require(place < unfenced.size() && !unfenced[place], "the tensor core reads what no fence has made visible");
  return sim::shared()[place];
}
inline void begin() {
  barriers.clear(), named.clear(), tma.clear(), tensor.clear();
  memset(tmem, 0xff, sizeof(tmem));
  unfenced.assign(sim::smem.size() - 1023, 0);
  for (auto& list : written) list.clear();
}
inline void end() {
  require(tma.empty() && tensor.empty(), "a CTA ended before what it had issued");
  require(!allocated, "tensor memory was not given back");
}
inline bool advance() {
  static unsigned state = 1;  // which queue goes on is any order, the same in every run
  state = state * 1664525 + 1013904223;
  auto& queue = tensor.empty() || (state >> 31 && !tma.empty()) ? tma : tensor;
  if (queue.empty()) return false;
  auto work = queue.front();
  queue.pop_front();
  work();
  return true;
}
inline void issue(std::deque<std::function<void()>>& queue, std::function<void()> work) {
  if (SIM_EARLY) work(); else queue.push_back(work);
}
inline Barrier& barrier(uint32_t place) {
  require(place % 8 == 0 && barriers.count(place), "not an mbarrier");
  return barriers[place];
}
inline void update(uint32_t place, int arrivals, long bytes) {
  Barrier& b = barrier(place);
  b.pending -= arrivals, b.bytes += bytes;
  require(b.pending >= 0, "one arrival too many");
  if (b.pending || b.bytes) return;
  b.pending = b.count, ++b.phase, ++sim::progress;
}
inline void wait(uint32_t place, unsigned parity) {
  const Barrier& b = barrier(place);
  while ((b.phase & 1) == parity) sim::yield();
  ++sim::progress;
}
struct Init {
  Init() {
    sim::on_begin = begin, sim::on_end = end, sim::on_idle = advance;
    sim::on_copy = [](const char* p, int size) { wrote(p - sim::shared(), size); };
  }
};
inline Init init;

inline uint32_t swizzled(uint32_t place) { return place ^ (place >> 7 & 7) << 4; }  // 16-byte chunks of 128 bytes
inline uint64_t bits(uint64_t word, int low, int high) { return word >> low & ((2ull << (high - low)) - 1); }
// Byte ``column`` of a row of a K-major matrix: rows in groups of 8, ``pitch`` bytes apart inside a group.
struct Matrix {
  uint32_t start, stride, pitch;
  bool is_swizzled;
  Matrix(uint64_t word, uint32_t row_bytes) {
    start = bits(word, 0, 13) << 4, stride = bits(word, 32, 45) << 4;
    is_swizzled = bits(word, 61, 63) == 2, pitch = is_swizzled ? 128 : row_bytes;
    require(bits(word, 46, 48) == 1 && !bits(word, 49, 60), "descriptor fields");
    require(is_swizzled || !bits(word, 61, 63), "swizzle mode");
  }
  uint8_t byte(uint32_t row, uint32_t column) const {
    const uint32_t place = start + row / 8 * stride + row % 8 * pitch + column;
    return read(is_swizzled ? swizzled(place) : place);
  }
};
inline double e2m1(unsigned code) {
  const double values[] = {0, 0.5, 1, 1.5, 2, 3, 4, 6};
  return code & 8 ? -values[code & 7] : values[code & 7];
}
inline double e4m3(unsigned byte) {
  const int exponent = byte >> 3 & 15, mantissa = byte & 7;
  if ((byte & 127) == 127) return NAN;
  const double magnitude = exponent ? ldexp(8 + mantissa, exponent - 10) : ldexp(mantissa, -9);
  return byte & 128 ? -magnitude : magnitude;
}
inline double ue8m0(unsigned byte) { return byte == 255 ? NAN : ldexp(1, int(byte) - 127); }
inline double bf16(unsigned word) {
  const uint32_t pattern = word << 16;
  float value;
  memcpy(&value, &pattern, 4);
  return value;
}
enum Kind { kNvfp4, kMxfp8, kBf16 };
// Element k of the 32 bytes of a row that an instruction takes.
inline double element(Kind kind, bool is_weight, const Matrix& m, int row, int k) {
  if (kind == kBf16) return bf16(m.byte(row, 2 * k) | m.byte(row, 2 * k + 1) << 8);
  if (kind == kNvfp4) return e2m1(m.byte(row, k / 2) >> 4 * (k % 2) & 15);
  return is_weight ? e2m1(m.byte(row, k / 16 * 16 + k % 16 / 2) >> 4 * (k % 2) & 15) : e4m3(m.byte(row, k));
}
inline double scale(Kind kind, uint32_t place, int row, int byte) {
  require(place >> 16 == 0 && place % 2 == 0, "scales start in lane 0 and in even columns");
  const uint32_t cell = tmem[row % 32 + row / 32 % 4 * 32][(place & 0xffff) + row / 32];
  const unsigned value = cell >> 8 * byte & 255;
  return kind == kNvfp4 ? e4m3(value & 127) : ue8m0(value);
}
inline void mma(Kind kind, uint32_t d, uint64_t a, uint64_t b, uint32_t word, uint32_t sfa, uint32_t sfb, uint32_t add) {
  const bool is_scaled = kind != kBf16;
  const int n = bits(word, 17, 22) * 8, m = is_scaled ? bits(word, 27, 28) * 128 : bits(word, 24, 28) * 16;
  require(m == 128 && n >= 8 && n <= 256, "shape of the instruction");
  require(int(bits(word, 7, 9)) == (kind == kMxfp8 ? 5 : 1) && bits(word, 10, 12) == (kind != kMxfp8), "operand types");
  require(!bits(word, 0, 3) && !bits(word, 13, 16) && !bits(word, 31, 31), "instruction descriptor");
  const int id_a = is_scaled ? bits(word, 29, 30) : 0, id_b = is_scaled ? bits(word, 4, 5) : 0;
  require(is_scaled ? !bits(word, 24, 26) && !bits(word, 6, 6) && bits(word, 23, 23) == (kind == kMxfp8)
                    : bits(word, 4, 6) == 1 && !bits(word, 23, 23) && !bits(word, 29, 30), "instruction descriptor");
  require(kind != kNvfp4 || (!id_a && !id_b), "scale ids");
  require((d >> 16) == 0 && (d & 0xffff) + n <= unsigned(allocated), "accumulator outside of the allocation");
  const int k = kind == kNvfp4 ? 64 : kind == kMxfp8 ? 32 : 16, block = kind == kNvfp4 ? 16 : 32;
  const Matrix x(a, 32), y(b, 32);
  auto row_of = [&](bool is_weight, int row, std::vector<double>& out) {
    for (int i = 0; i < k; ++i) {
      const double factor = !is_scaled ? 1 : is_weight ? scale(kind, sfa, row, id_a + i / block)
                                                       : scale(kind, sfb, row, id_b + i / block);
      out[row * k + i] = element(kind, is_weight, is_weight ? x : y, row, i) * factor;
    }
  };
  std::vector<double> left(m * k), right(n * k);
  for (int i = 0; i < m; ++i) row_of(true, i, left);
  for (int i = 0; i < n; ++i) row_of(false, i, right);
  for (int i = 0; i < m; ++i)
    for (int j = 0; j < n; ++j) {
      float& out = (float&)tmem[i][(d & 0xffff) + j];
      double sum = add ? out : 0;
      for (int l = 0; l < k; ++l) sum += left[i * k + l] * right[j * k + l];
      out = float(sum);
    }
}
}  // namespace tc

struct CUtensorMap { const char* data; int rank; uint64_t dims[5], strides[4]; uint32_t box[5]; int swizzle; };
using CUresult = int;
using cuuint32_t = uint32_t;
using cuuint64_t = uint64_t;
using CUtensorMapInterleave = int;
using CUtensorMapSwizzle = int;
using CUtensorMapL2promotion = int;
using CUtensorMapFloatOOBfill = int;
enum { CUDA_SUCCESS, CU_TENSOR_MAP_DATA_TYPE_UINT8 };
inline int cuGetErrorString(int, const char**) { return 0; }
inline int cuTensorMapEncodeTiled(CUtensorMap* map, int, int rank, const void* data, const uint64_t* dims,
                                  const uint64_t* strides, const uint32_t* box, const uint32_t* steps, int, int swizzle,
                                  int, int) {
  bool good = uintptr_t(data) % 16 == 0 && rank >= 1 && rank <= 5 && swizzle == 3 && box[0] % 16 == 0 && box[0] <= 128;
  *map = {(const char*)data, rank, {}, {}, {}, swizzle};
  for (int i = 0; i < rank; ++i) {
    map->dims[i] = dims[i], map->box[i] = box[i];
    good = good && dims[i] > 0 && dims[i] <= 1ull << 32 && box[i] > 0 && box[i] <= 256 && steps[i] == 1;
    if (i) map->strides[i - 1] = strides[i - 1], good = good && strides[i - 1] % 16 == 0 && strides[i - 1] < 1ull << 40;
  }
  return good ? 0 : 1;
}

namespace ptx {
template <class... C> void load_box(uint32_t to, const void* descriptor, C... rest) {
  const int64_t values[] = {rest...};
  const int rank = sizeof...(C) - 1;
  const uint32_t bar = values[rank];
  const CUtensorMap map = *(const CUtensorMap*)descriptor;
  tc::require(map.rank == rank && to % 128 == 0, "TMA");
  std::vector<int64_t> first(values, values + rank);
  tc::issue(tc::tma, [=] {
    uint32_t size = 1;
    for (int i = 0; i < rank; ++i) size *= map.box[i];
    for (uint32_t byte = 0; byte < size; ++byte) {
      bool inside = true;
      uint64_t offset = 0;
      for (uint32_t i = 0, left = byte; i < uint32_t(rank); left /= map.box[i++]) {
        const int64_t at = first[i] + left % map.box[i];
        inside = inside && at >= 0 && at < int64_t(map.dims[i]);
        offset += at * (i ? map.strides[i - 1] : 1);
      }
      const uint32_t place = tc::swizzled(to + byte);
      sim::shared()[place] = inside ? map.data[offset] : 0;
      tc::unfenced[place] = 0;
    }
    tc::update(bar, 0, -long(size));
  });
}
#define TVMMOE_TMA(rank) \
  template <class... C> void cp_async_bulk_tensor_##rank##d_shared_cta_global_mbarrier_complete_tx_bytes( \
      uint32_t to, const void* map, C... rest) { load_box(to, map, int64_t(rest)...); } \
  template <class... C> void cp_async_bulk_tensor_##rank##d_shared_cta_global_mbarrier_complete_tx_bytes_L2_cache_hint( \
      uint32_t to, const void* map, C... rest) { without_last(to, map, std::make_tuple(int64_t(rest)...)); }
template <class Tuple, size_t... I> void call_box(uint32_t to, const void* map, Tuple t, std::index_sequence<I...>) {
  load_box(to, map, std::get<I>(t)...);
}
template <class Tuple> void without_last(uint32_t to, const void* map, Tuple t) {
  call_box(to, map, t, std::make_index_sequence<std::tuple_size<Tuple>::value - 1>{});
}
TVMMOE_TMA(2)
TVMMOE_TMA(3)
TVMMOE_TMA(5)
inline void mbarrier_init_shared_b64(uint32_t p, uint32_t count) { tc::barriers[p] = {int(count), int(count), 0, 0}; }
inline void mbarrier_arrive_shared_b64(uint32_t p, uint32_t count) { tc::update(p, count, 0); }
inline void mbarrier_arrive_expect_tx_shared_b64(uint32_t p, uint32_t bytes) { tc::update(p, 1, bytes); }
inline void fence_mbarrier_init_release_cluster() {}
inline void fence_proxy_async_shared_cta() { tc::fence(); }
inline void barrier_sync_aligned(uint32_t id, uint32_t count) { sim::wait(tc::named[id], count); }
inline void st_shared_b32(uint32_t p, uint32_t v) { at<uint32_t>(p) = v, tc::wrote(p, 4); }
inline void st_shared_v4_b32(uint32_t p, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  st_shared_b32(p, a), st_shared_b32(p + 4, b), st_shared_b32(p + 8, c), st_shared_b32(p + 12, d);
}
inline void store_matrices(uint32_t p, const std::vector<uint32_t>& pairs) {
  if (p % 16) tc::fail("misaligned stmatrix");
  sim::self->words[0] = p;
  for (size_t i = 0; i < pairs.size(); ++i) sim::self->words[1 + i] = pairs[i];
  sim::warp_sync();
  const int l = tc::thread() % 32;  // transposed: this thread's row is a column, its columns are rows 2 (l % 4) and on
  for (size_t i = 0; i < pairs.size(); ++i)
    for (int n = 0; n < 2; ++n) {
      const uint32_t row = sim::lane(8 * i + 2 * (l % 4) + n).words[0];
      at<uint16_t>(row + l / 4 * 2) = pairs[i] >> 16 * n;
    }
  sim::warp_sync();
}
inline void stmatrix_sync_aligned_m8n8_x4_trans_shared_b16(uint32_t p, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  store_matrices(p, {a, b, c, d});
}
inline void stmatrix_sync_aligned_m8n8_x2_trans_shared_b16(uint32_t p, uint32_t a, uint32_t b) {
  store_matrices(p, {a, b});
}
inline void mul_rn_bf16x2(uint32_t& d, uint32_t a, uint32_t b) {
  uint32_t out = 0;
  for (int i = 0; i < 2; ++i) out |= sim::bf16(tc::bf16(a >> 16 * i & 0xffff) * tc::bf16(b >> 16 * i & 0xffff)) << 16 * i;
  d = out;
}
inline void tcgen05_alloc_cta_group_1_sync_aligned_shared_cta_b32(uint32_t p, uint32_t columns) {
  if (tc::thread() % 32 == 0) {
    tc::require(!tc::allocated && columns >= 32 && columns <= 512 && !(columns & (columns - 1)), "tcgen05.alloc");
    tc::allocated = columns, at<uint32_t>(p) = 0;
  }
  sim::warp_sync();
}
inline void tcgen05_dealloc_cta_group_1_sync_aligned_b32(uint32_t place, uint32_t columns) {
  if (tc::thread() % 32 == 0) {
    tc::require(tc::allocated == int(columns) && !place && tc::tensor.empty(), "tcgen05.dealloc");
    tc::allocated = 0;
  }
  sim::warp_sync();
}
inline void tcgen05_relinquish_alloc_permit_cta_group_1_sync_aligned() {}
inline void tcgen05_fence_before_thread_sync() {}
inline void tcgen05_fence_after_thread_sync() {}
inline void tcgen05_cp_cta_group_1_32x128b_warpx4(uint32_t to, uint64_t descriptor) {
  tc::require(to >> 16 == 0 && to + 4 <= unsigned(tc::allocated), "tcgen05.cp");
  tc::issue(tc::tensor, [=] {
    const tc::Matrix m(descriptor, 16);
    for (int lane = 0; lane < 128; ++lane)
      for (int i = 0; i < 16; ++i) ((uint8_t*)&tc::tmem[lane][to])[i] = m.byte(lane % 32, i);
  });
}
inline void tcgen05_commit_cta_group_1_mbarrier_arrive_one_shared_cluster_b64(uint32_t p) {
  tc::issue(tc::tensor, [=] { tc::update(p, 1, 0); });
}
inline void tcgen05_ld_sync_aligned_16x256b_x1_b32(uint32_t& a, uint32_t& b, uint32_t& c, uint32_t& d, uint32_t from) {
  const unsigned lane = tc::thread() % 32, row = from >> 16, column = from & 0xffff;
  tc::require(row % 16 == 0 && row / 32 == tc::thread() / 32 % 4, "tcgen05.ld: lanes of another warp");
  tc::require(column + 8 <= unsigned(tc::allocated), "tcgen05.ld");
  uint32_t* out[4] = {&a, &b, &c, &d};
  for (int i = 0; i < 4; ++i) {
    tc::loads[tc::thread()].push_back({out[i], tc::tmem[row + lane / 4 + i / 2 * 8][column + lane % 4 * 2 + i % 2]});
    *out[i] = ~0u;
  }
}
inline void tcgen05_wait_ld_sync_aligned() {
  for (auto [out, value] : tc::loads[tc::thread()]) *out = value;
  tc::loads[tc::thread()].clear();
}
}  // namespace ptx
"""

_ADDRESS = "static inline int64_t tvmmoe_address(const void* pointer) { return reinterpret_cast<int64_t>(pointer); }\n"
_KINDS = {"mxf4nvf4": "kNvfp4", "mxf8f6f4": "kMxfp8", "f16": "kBf16"}


def _bodies(cuda: str) -> str:
    """``cuda`` with helpers of several instructions as calls of the model."""
    elect = r"(uint32_t tvm_builtin_elect_one_sync\(\) \{\{).*?\n\}\}"
    cuda = re.sub(elect, r"\1 return sim::self->thread.x % 32 == 0; }}", cuda, flags=re.S)
    wait = r"(void tvm_builtin_cuda_mbarrier_wait\(void\* barrier, int phase\) \{).*?\n\}\n"
    cuda = re.sub(wait, r"\1 tc::wait(__cvta_generic_to_shared(barrier), phase); }\n", cuda, flags=re.S)

    def mma(match: re.Match) -> str:
        arguments = re.findall(r'"[rl]"\((\w+)\)', match[2])
        if match[1] == "f16":
            arguments[4:8] = ["0", "0"]  # no lanes are disabled, no scales
        call = f"tc::mma(tc::{_KINDS[match[1]]}, {', '.join(arguments)})"
        return f"tc::issue(tc::tensor, [=] {{ {call}; }});"

    return re.sub(r'asm volatile\("\{ \.reg \.pred ps0; .*?tcgen05\.mma.*?kind::(\w+).*?" :  : (.*)\);', mma, cuda)


def host_source(cuda: str, early: bool = False) -> str:
    """Host C++ of what ``build.cuda_source`` returned."""
    kernels = _bodies(cuda[cuda.index("#ifdef __CUDACC_RTC__") :])
    return sm120a.host_source(_ADDRESS + kernels, early, _MODEL)


def compile_so(source: str, path: Path) -> None:
    """Run g++ on what :func:`host_source` returned. Raises RuntimeError with its message."""
    sm120a.compile_so(source, path)
