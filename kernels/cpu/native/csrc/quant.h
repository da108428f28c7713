// Quantised weights and activations: their layout in memory and the int8 inner loop.
//
// Weights come in panels of 16 outputs and groups of 32 inputs; w = scale * (code - offset) + min, with one scale (and, in
// Q4, one min) per output and group, kept in fp16 as GGUF stores them. A panel, padded to 64 bytes, is
//
//     codes of group 0, 1, ...     { scale fp16[16], min fp16[16] (Q4 only) } of group 0, 1, ...
//
// int8 codes (stored unsigned, offset 128): 8 registers; byte 4 o + i of register s is input 4 s + i of output o.
// int4 codes: 4 registers; register s holds in its low nibbles what int8 register s would, in its high nibbles s + 4.
//
// Activations are rounded to int8 once per call, with one scale per row and group of 32 (the scheme of llama.cpp's Q8_1).
// Products of a group are exact in int32; groups are added in fp32, in order.
#pragma once

#include "dispatch.h"

namespace kvloom {

constexpr int kPanel = 16, kGroupInputs = 32, kSteps = kGroupInputs / 4;

// Rows and panels in registers: 6 x 2 integer and 6 x 2 float accumulators. Without the instruction, blocking gains nothing.
#ifdef KVLOOM_VNNI
constexpr int kRows = 6, kPanels = 2;
#else
constexpr int kRows = 1, kPanels = 1;
#endif

enum Format : int32_t { kQ4 = 0, kQ4Symmetric = 1, kQ8 = 2 };  // mirrored in linear.py

template <Format F> struct Weights {
  static constexpr bool kHasMin = F == kQ4, kNibbles = F != kQ8;
  static constexpr int kOffset = F == kQ4 ? 0 : F == kQ4Symmetric ? 8 : 128;
  static constexpr int64_t kCodeBytes = kPanel * kGroupInputs / (1 + kNibbles), kScales = kPanel * (1 + kHasMin);
  static constexpr int64_t panel_bytes(int64_t groups) { return (groups * (kCodeBytes + 2 * kScales) + 63) / 64 * 64; }
};

template <class F> inline auto with_format(int32_t format, F f) {
  switch (format) {
    case kQ4: return f(std::integral_constant<Format, kQ4>{});
    case kQ4Symmetric: return f(std::integral_constant<Format, kQ4Symmetric>{});
    default: return f(std::integral_constant<Format, kQ8>{});
  }
}

struct Activations {  // of `rows` rows, `groups` groups each
  int8_t* codes;      // [rows][groups * 32]
  float* scale;       // [rows][groups]
  float* scaled_sum;  // scale * sum of codes: what a min is multiplied by
  int32_t* start;     // -offset * sum of codes: where the integer sum of a group begins
};

inline void quantise_group(const float* x, int32_t offset, int8_t* codes, float* scale, float* scaled_sum, int32_t* start) {
#ifdef KVLOOM_AVX512
  const vec a = load(x), b = load(x + kLanes);
  const float most = max_lane(_mm512_max_ps(_mm512_abs_ps(a), _mm512_abs_ps(b)));
  const float d = most / 127.0f;
  const vec inverse = splat(d > 0.0f ? 1.0f / d : 0.0f);
  const __m512i ia = _mm512_cvtps_epi32(a * inverse), ib = _mm512_cvtps_epi32(b * inverse);
  _mm_storeu_si128((__m128i*)codes, _mm512_cvtsepi32_epi8(ia));
  _mm_storeu_si128((__m128i*)(codes + kLanes), _mm512_cvtsepi32_epi8(ib));
  const int32_t total = _mm512_reduce_add_epi32(_mm512_add_epi32(ia, ib));
#else
  float most = 0.0f;
  for (int i = 0; i < kGroupInputs; i++) most = most < std::fabs(x[i]) ? std::fabs(x[i]) : most;
  const float d = most / 127.0f, inverse = d > 0.0f ? 1.0f / d : 0.0f;
  int32_t total = 0;
  for (int i = 0; i < kGroupInputs; i++) {
    codes[i] = int8_t(std::lrint(x[i] * inverse));
    total += codes[i];
  }
#endif
  *scale = d;
  *scaled_sum = d * float(total);
  *start = -offset * total;
}

#ifdef KVLOOM_VNNI
using isum = __m512i;
inline isum isplat(int32_t x) { return _mm512_set1_epi32(x); }
inline vec to_vec(isum x) { return _mm512_cvtepi32_ps(x); }
inline isum dot4(isum acc, __m512i weights, const int8_t* x) {
  int32_t four;
  std::memcpy(&four, x, 4);
  return _mm512_dpbusd_epi32(acc, weights, _mm512_set1_epi32(four));
}
using Codes = __m512i;
inline Codes load_codes(const uint8_t* p) { return _mm512_loadu_si512(p); }
inline Codes low_nibbles(Codes c) { return _mm512_and_si512(c, _mm512_set1_epi8(15)); }
inline Codes high_nibbles(Codes c) { return _mm512_and_si512(_mm512_srli_epi16(c, 4), _mm512_set1_epi8(15)); }
inline void store_codes(uint8_t* p, Codes c) { _mm512_storeu_si512(p, c); }
#else
using isum = ivec;
typedef uint8_t Codes __attribute__((vector_size(64)));
inline isum isplat(int32_t x) { return x - isum{}; }
inline vec to_vec(isum x) {
#ifdef KVLOOM_AVX512
  return _mm512_cvtepi32_ps(x);
#else
  return __builtin_convertvector(x, vec);
#endif
}
inline isum dot4(isum acc, Codes weights, const int8_t* x) {
  int32_t sums[kPanel];
  std::memcpy(sums, &acc, sizeof sums);
  uint8_t w[64];
  std::memcpy(w, &weights, sizeof w);
  for (int o = 0; o < kPanel; o++)
    sums[o] += int(w[4 * o]) * x[0] + int(w[4 * o + 1]) * x[1] + int(w[4 * o + 2]) * x[2] + int(w[4 * o + 3]) * x[3];
  std::memcpy(&acc, sums, sizeof sums);
  return acc;
}
inline Codes load_codes(const uint8_t* p) { Codes c; std::memcpy(&c, p, sizeof c); return c; }
inline Codes low_nibbles(Codes c) { return c & 15; }
inline Codes high_nibbles(Codes c) { return c >> 4; }
inline void store_codes(uint8_t* p, Codes c) { std::memcpy(p, &c, sizeof c); }
#endif

// R rows times P neighbouring panels over all groups: out[R][P][16]. x: the first row's activations.
// unpacked: null, or the panels' nibbles as bytes, [groups][P][8][64].
template <Format F, int R, int P>
void multiply(const uint8_t* panel, const uint8_t* unpacked, const Activations& x, int64_t groups, float* out) {
  using W = Weights<F>;
  const int64_t panel_bytes = W::panel_bytes(groups);
  const f16* scales = reinterpret_cast<const f16*>(panel + groups * W::kCodeBytes);
  vec acc[R][P];
  for (int r = 0; r < R; r++)
    for (int p = 0; p < P; p++) acc[r][p] = zero();
  for (int64_t g = 0; g < groups; g++) {
    const uint8_t* group = panel + g * W::kCodeBytes;
    isum sums[R][P];
    for (int r = 0; r < R; r++)
      for (int p = 0; p < P; p++) sums[r][p] = isplat(x.start[r * groups + g]);
    const int8_t* codes = x.codes + g * kGroupInputs;
    const int64_t row = groups * kGroupInputs;
    if (!W::kNibbles || unpacked) {
#pragma GCC unroll 8
      for (int s = 0; s < kSteps; s++) {
        Codes w[P];
        for (int p = 0; p < P; p++)
          w[p] = load_codes(W::kNibbles ? unpacked + ((g * P + p) * kSteps + s) * 64
                                        : group + p * panel_bytes + s * 64);
        for (int r = 0; r < R; r++)
          for (int p = 0; p < P; p++) sums[r][p] = dot4(sums[r][p], w[p], codes + r * row + 4 * s);
      }
    } else {
#pragma GCC unroll 4
      for (int s = 0; s < kSteps / 2; s++) {
        Codes w[P];
        for (int p = 0; p < P; p++) {
          w[p] = load_codes(group + p * panel_bytes + s * 64);
          const Codes low = low_nibbles(w[p]), high = high_nibbles(w[p]);
          for (int r = 0; r < R; r++) {
            sums[r][p] = dot4(sums[r][p], low, codes + r * row + 4 * s);
            sums[r][p] = dot4(sums[r][p], high, codes + r * row + 4 * (s + kSteps / 2));
          }
        }
      }
    }
    for (int p = 0; p < P; p++) {
      const f16* at = scales + p * panel_bytes / 2 + g * W::kScales;
      const vec scale = load(at);
      for (int r = 0; r < R; r++)
        acc[r][p] = fma(to_vec(sums[r][p]), scale * splat(x.scale[r * groups + g]), acc[r][p]);
      if constexpr (W::kHasMin) {
        const vec min = load(at + kPanel);
        for (int r = 0; r < R; r++) acc[r][p] = fma(min, splat(x.scaled_sum[r * groups + g]), acc[r][p]);
      }
    }
  }
  for (int r = 0; r < R; r++)
    for (int p = 0; p < P; p++) store(out + (r * P + p) * kPanel, acc[r][p]);
}

}  // namespace kvloom
