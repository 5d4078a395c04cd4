# SPDX-License-Identifier: Apache-2.0
"""The block-scaled mma.sync instructions in plain C++: same operands, same lanes, any GPU with warp shuffles.

Written from the PTX ISA, sections "Block Scaling for mma.sync" and "Matrix Fragments for mma.m16n8k64 / m16n8k32". With
g = lane / 4, t = lane % 4 and n elements a register (8 of four bits, 4 of eight bits):

    a    register r of lane (g, t) holds row g + 8 (r % 2),  k = 4n (r / 2) + n t .. + n - 1, lowest bits first
    b    register r of lane (g, t) holds column g,           k = 4n r + n t .. + n - 1
    d    register i of lane (g, t) holds row g + 8 (i / 2), column 2t + i % 2
    sa   lanes 2 thread_a and 2 thread_a + 1 of a quad supply the scales of rows g and g + 8
    sb   lane thread_b of a quad supplies the scales of column g
    byte the first byte that counts: byte_id + s is the scale of the s-th of 4, 2 or 1 equal parts of k

An e2m1 of the m16n8k32 form sits in bits 5:2 of its byte. ue4m3 ignores the sign bit.

The tensor cores' order of accumulation is not documented. Here every output is accumulated in double and rounded once.
The only foreign data a lane sees comes from ``peer(lane, register)``: shuffles on a GPU, an array on the host, where
the tests run the same text.
"""

MODEL = r"""
#ifndef __CUDACC__
#include <cmath>
#define TVMMOE_INLINE inline
#else
#define TVMMOE_INLINE __device__ __forceinline__
#endif

TVMMOE_INLINE double tvmmoe_e2m1(unsigned code) {
  const int exponent = code >> 1 & 3, fraction = code & 1;
  const double magnitude = exponent == 0 ? 0.5 * fraction : ldexp(1.0 + 0.5 * fraction, exponent - 1);
  return code & 8 ? -magnitude : magnitude;
}

TVMMOE_INLINE double tvmmoe_e4m3(unsigned code) {
  const int exponent = code >> 3 & 15, fraction = code & 7;
  if (exponent == 15 && fraction == 7) return NAN;
  const double magnitude = exponent == 0 ? ldexp(double(fraction), -9) : ldexp(8.0 + fraction, exponent - 10);
  return code & 128 ? -magnitude : magnitude;
}

TVMMOE_INLINE double tvmmoe_ue8m0(unsigned code) { return code == 255 ? NAN : ldexp(1.0, int(code) - 127); }

struct TvmmoeNvfp4 {  // kind::mxf4nvf4, scale_vec::4X, ue4m3
  static constexpr int elements = 8, scales = 4;
  static TVMMOE_INLINE double a(unsigned word, int i) { return tvmmoe_e2m1(word >> 4 * i & 15); }
  static TVMMOE_INLINE double b(unsigned word, int i) { return tvmmoe_e2m1(word >> 4 * i & 15); }
  static TVMMOE_INLINE double scale(unsigned byte) { return tvmmoe_e4m3(byte & 127); }
};

struct TvmmoeMxfp4 {  // kind::mxf4nvf4, scale_vec::2X, ue8m0
  static constexpr int elements = 8, scales = 2;
  static TVMMOE_INLINE double a(unsigned word, int i) { return tvmmoe_e2m1(word >> 4 * i & 15); }
  static TVMMOE_INLINE double b(unsigned word, int i) { return tvmmoe_e2m1(word >> 4 * i & 15); }
  static TVMMOE_INLINE double scale(unsigned byte) { return tvmmoe_ue8m0(byte); }
};

struct TvmmoeMxfp8 {  // kind::mxf8f6f4, scale_vec::1X, a e2m1 in bytes, b e4m3
  static constexpr int elements = 4, scales = 1;
  static TVMMOE_INLINE double a(unsigned word, int i) { return tvmmoe_e2m1(word >> (8 * i + 2) & 15); }
  static TVMMOE_INLINE double b(unsigned word, int i) { return tvmmoe_e4m3(word >> 8 * i & 255); }
  static TVMMOE_INLINE double scale(unsigned byte) { return tvmmoe_ue8m0(byte); }
};

// Registers of a lane as peer() numbers them: a 0..3, b 4..5, scale a 6, scale b 7.
template <class Form, class Peer>
TVMMOE_INLINE void tvmmoe_emulate(const Peer& peer, int lane, float* d, int byte_a, int thread_a, int byte_b, int thread_b) {
  constexpr int part = 8 * Form::elements / Form::scales;  // k of a scale
  for (int i = 0; i < 4; ++i) {
    const int half = i / 2, quad_a = lane & ~3, quad_b = 4 * (2 * (lane & 3) + i % 2);
    const unsigned scale_a = peer(quad_a + 2 * thread_a + half, 6) >> 8 * byte_a;
    const unsigned scale_b = peer(quad_b + thread_b, 7) >> 8 * byte_b;
    double sums[Form::scales] = {};
    for (int r = 0; r < 2; ++r) {
      for (int t = 0; t < 4; ++t) {
        const unsigned a = half ? peer(quad_a + t, 2 * r + 1) : peer(quad_a + t, 2 * r);
        const unsigned b = peer(quad_b + t, 4 + r);
        for (int e = 0; e < Form::elements; ++e)
          sums[(4 * r + t) * Form::elements / part] += Form::a(a, e) * Form::b(b, e);
      }
    }
    double total = d[i];
    for (int s = 0; s < Form::scales; ++s)
      total += sums[s] * Form::scale(scale_a >> 8 * s & 255) * Form::scale(scale_b >> 8 * s & 255);
    d[i] = float(total);
  }
}
"""

_DEVICE_PEER = r"""
struct TvmmoeShuffle {
  unsigned words[8];
  TVMMOE_INLINE unsigned operator()(int lane, int index) const { return __shfl_sync(0xffffffffu, words[index], lane); }
};
"""

_DEVICE_FUNCTION = r"""
__device__ __noinline__ float4 {name}_emulated(float4 c, TvmmoeShuffle peer, int byte_a, int thread_a, int byte_b,
                                               int thread_b) {{
  float d[4] = {{c.x, c.y, c.z, c.w}};
  tvmmoe_emulate<{form}>(peer, threadIdx.x & 31, d, byte_a, thread_a, byte_b, thread_b);
  return make_float4(d[0], d[1], d[2], d[3]);
}}
__device__ __forceinline__ void {name}(float* d, unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0,
                                       unsigned b1, unsigned sa, unsigned sb, int byte_a, int thread_a, int byte_b,
                                       int thread_b) {{
  const float4 result = {name}_emulated(make_float4(d[0], d[1], d[2], d[3]), {{{{a0, a1, a2, a3, b0, b1, sa, sb}}}},
                                        byte_a, thread_a, byte_b, thread_b);
  d[0] = result.x, d[1] = result.y, d[2] = result.z, d[3] = result.w;
}}
"""


def device_source(functions: dict[str, str]) -> str:
    """CUDA C++ of the emulations: ``functions`` maps the name of each to its form in ``MODEL``."""
    bodies = (_DEVICE_FUNCTION.format(name=name, form=form) for name, form in functions.items())
    return MODEL + _DEVICE_PEER + "".join(bodies)
