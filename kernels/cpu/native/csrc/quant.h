// Quantised weights and activations: their layout in memory and the loop over groups.
//
// Weights come in panels of 16 outputs and groups of 32 inputs; w = scale * (code - offset) + min, with one scale (and, in
// Q4, one min) per output and group, kept in fp16 as GGUF stores them. A panel, padded to 64 bytes, is
//
//     codes of group 0, 1, ...     { scale fp16[16], min fp16[16] (Q4 only) } of group 0, 1, ...
//
// int8 codes (stored unsigned, offset 128): 8 registers; byte 4 o + i of register s is input 4 s + i of output o.
// int4 codes: 4 registers; register s holds in its low nibbles what int8 register s would, in its high nibbles s + 4.
//
// Activations are rounded once per call to 15-bit codes, with one scale per row and group of 32: 127 * 128 stands for the
// group's largest magnitude. Products of a group are exact in int32; groups are added in fp32, in order.
#pragma once

#include "dispatch.h"
#include "dot.h"

namespace kvloom {

// Rows and panels in registers.
#if defined(KVLOOM_VNNI)
constexpr int kRows = 6, kPanels = 2;  // 6 x 2 integer and 6 x 2 float accumulators
#elif defined(KVLOOM_AVX2)
constexpr int kRows = 3, kPanels = 1;
#else
constexpr int kRows = 1, kPanels = 1;  // without the instructions, blocking gains nothing
#endif

// Unrolled, gcc computes AVX2's products long before it adds them, and keeps them in memory meanwhile.
#ifdef KVLOOM_AVX2
#define KVLOOM_UNROLL _Pragma("GCC unroll 1")
#else
#define KVLOOM_UNROLL _Pragma("GCC unroll 8")
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

// Cache lines of the weights that lie a panel or two behind group g: Zen 3 does not see these reads coming.
template <Format F> inline void ask_ahead(const uint8_t* panel, int64_t g) {
  constexpr int64_t kAhead = 8192, kGroup = Weights<F>::kCodeBytes + 2 * Weights<F>::kScales;
  for (int64_t at = 0; at < kGroup; at += 64) __builtin_prefetch(panel + kAhead + g * kGroup + at);
}

constexpr int kGroupCodes = kPlanes * kGroupInputs;

struct Activations {  // of `rows` rows, `groups` groups each
  Code* codes;        // [rows][groups][kGroupCodes], see dot.h
  float* scale;       // [rows][groups]
  float* scaled_sum;  // scale * sum of codes: what a min is multiplied by
  int32_t* start;     // -offset * sum of codes: where the integer sum of a group begins
};

// Codes of one group as its target wants them; returns their sum. Every |x * inverse| is at most kMostCode.
inline int32_t place_codes(const float* x, float inverse, Code* codes) {
#if defined(KVLOOM_VNNI)
  int32_t total = 0;
  for (int i = 0; i < kGroupInputs; i += kLanes) {
    const __m512i c = _mm512_cvtps_epi32(load(x + i) * splat(inverse));
    const __m512i high = _mm512_srai_epi32(_mm512_add_epi32(c, isplat(kPlane / 2)), 7);
    _mm_storeu_si128((__m128i*)(codes + i), _mm512_cvtepi32_epi8(high));
    _mm_storeu_si128((__m128i*)(codes + kGroupInputs + i), _mm512_cvtepi32_epi8(_mm512_sub_epi32(c, _mm512_slli_epi32(high, 7))));
    total += _mm512_reduce_add_epi32(c);
  }
  return total;
#elif defined(KVLOOM_AVX2)
  __m256i total = _mm256_setzero_si256();
  for (int i = 0; i < kGroupInputs; i += 16) {
    __m256i half[2];
    for (int h = 0; h < 2; h++) {
      half[h] = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + i + 8 * h), _mm256_set1_ps(inverse)));
      total = _mm256_add_epi32(total, half[h]);
      half[h] = _mm256_shuffle_epi32(half[h], 0xd8);  // 0 2 1 3 of every four
    }
    _mm256_storeu_si256((__m256i*)(codes + i), _mm256_permute4x64_epi64(_mm256_packs_epi32(half[0], half[1]), 0xd8));
  }
  int32_t lanes[8], sum = 0;
  _mm256_storeu_si256((__m256i*)lanes, total);
  for (int32_t lane : lanes) sum += lane;
  return sum;
#else
  int32_t total = 0;
  for (int i = 0; i < kGroupInputs; i++) {
    codes[i] = Code(std::lrint(x[i] * inverse));
    total += codes[i];
  }
  return total;
#endif
}

inline float largest_magnitude(const float* x) {  // of a group
#ifdef KVLOOM_AVX512
  return max_lane(_mm512_max_ps(_mm512_abs_ps(load(x)), _mm512_abs_ps(load(x + kLanes))));
#else
  float lanes[8] = {};
  for (int i = 0; i < kGroupInputs; i += 8)
    for (int j = 0; j < 8; j++) lanes[j] = lanes[j] < std::fabs(x[i + j]) ? std::fabs(x[i + j]) : lanes[j];
  float most = 0.0f;
  for (float lane : lanes) most = most < lane ? lane : most;
  return most;
#endif
}

inline void quantise_group(const float* x, int32_t offset, Code* codes, float* scale, float* scaled_sum, int32_t* start) {
  const float d = largest_magnitude(x) / float(kMostCode);
  const int32_t total = place_codes(x, d > 0.0f ? 1.0f / d : 0.0f, codes);
  *scale = d;
  *scaled_sum = d * float(total);
  *start = -offset * total;
}

// R rows times P neighbouring panels over all groups: out[R][P][16]. x: the first row's activations.
// ready: null, or the panels' weights ready to multiply, [groups][kSteps][P][kParts][kReadyBytes].
template <Format F, int R, int P>
void multiply(const uint8_t* panel, const uint8_t* ready, const Activations& x, int64_t groups, float* out) {
  using W = Weights<F>;
  constexpr int Q = P * kParts;
  const int64_t panel_bytes = W::panel_bytes(groups), row = groups * kGroupCodes;
  auto of_part = [&](int q) { return q / kParts * panel_bytes + q % kParts * (64 / kParts); };
  const f16* scales = reinterpret_cast<const f16*>(panel + groups * W::kCodeBytes);
  fsum acc[R][Q];
  for (int r = 0; r < R; r++)
    for (int q = 0; q < Q; q++) acc[r][q] = fsplat(0.0f);
  for (int64_t g = 0; g < groups; g++) {
    const uint8_t* group = panel + g * W::kCodeBytes;
    if (!ready)
      for (int p = 0; p < P; p++) ask_ahead<F>(panel + p * panel_bytes, g);
    isum sums[R][Q];
    for (int r = 0; r < R; r++)
      for (int q = 0; q < Q; q++) sums[r][q] = isplat(kPlanes > 1 ? 0 : x.start[r * groups + g]);
    for (int plane = 0; plane < kPlanes; plane++) {
      const Code* codes = x.codes + g * kGroupCodes + plane * kGroupInputs;
      if (plane > 0)
        for (int r = 0; r < R; r++)
          for (int q = 0; q < Q; q++) sums[r][q] = next_plane(sums[r][q], x.start[r * groups + g]);
      auto add = [&](const Weights4* w, int step) {
        for (int r = 0; r < R; r++)
          for (int q = 0; q < Q; q++) sums[r][q] = dot4(sums[r][q], w[q], codes + r * row + 4 * step);
      };
      Weights4 w[Q], upper[Q];
      if (ready) {
KVLOOM_UNROLL
        for (int s = 0; s < kSteps; s++) {
          for (int q = 0; q < Q; q++) w[q] = load_ready(ready + ((g * kSteps + s) * Q + q) * kReadyBytes);
          add(w, s);
        }
      } else if (!W::kNibbles) {
KVLOOM_UNROLL
        for (int s = 0; s < kSteps; s++) {
          for (int q = 0; q < Q; q++) w[q] = whole(load_stored(group + of_part(q) + s * 64));
          add(w, s);
        }
      } else {
KVLOOM_UNROLL
        for (int s = 0; s < kSteps / 2; s++) {
          for (int q = 0; q < Q; q++) {
            const Stored both = load_stored(group + of_part(q) + s * 64);
            w[q] = low_nibbles(both), upper[q] = high_nibbles(both);
          }
          add(w, s);
          add(upper, s + kSteps / 2);
        }
      }
    }
    for (int q = 0; q < Q; q++) {
      const f16* at = scales + q / kParts * (panel_bytes / 2) + g * W::kScales + q % kParts * kPart;
      const fsum scale = load_halves(at);
      for (int r = 0; r < R; r++)
        acc[r][q] = add_product(to_float(sums[r][q]), times(scale, x.scale[r * groups + g]), acc[r][q]);
      if constexpr (W::kHasMin) {
        const fsum min = load_halves(at + kPanel);
        for (int r = 0; r < R; r++) acc[r][q] = add_product(min, fsplat(x.scaled_sum[r * groups + g]), acc[r][q]);
      }
    }
  }
  for (int r = 0; r < R; r++)
    for (int q = 0; q < Q; q++) store_sum(out + (r * Q + q) * kPart, acc[r][q]);
}

}  // namespace kvloom
