// Quantised weights and activations: their layout in memory and the loop over groups.
//
// Weights are GGUF's codes, in panels of 16 outputs: w = scale (code - offset) + min, where each output has a scale (and with
// some formats a min) for every group of 32 inputs, Q6_K for every 16. K-quants keep those as whole numbers beside fp16
// factors, for blocks of 8 groups. A panel holds no bit more than the file, padded to 64 bytes:
//
//     codes of group 0, 1, ...     scales of block 0, 1, ...
//
// Codes of b bits are b registers of 64 bytes a group. Of 8 bits (stored unsigned, offset 128), byte 4 o + i of register s is
// input 4 s + i of output o. Of fewer, register s < 4 holds in its low halves bits 0 to 3 of what register s would, in its high
// halves those of s + 4. The fifth bits follow, in bit s of register 4; the fifth and sixth of 6 in bits 2 (s % 4) of register
// 4 + s / 4. Scales of a block:
//
//     fp16 scale[16], min[16] (if any)                                of a group: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0
//     fp16 d[16], dmin[16]; byte j of each output's twelve, [12][16]  of 8 groups: Q4_K, Q5_K, 6-bit numbers as in the file
//     fp16 d[16]; int8 [16][16], of every 16 inputs                   of 8 groups: Q6_K
//
// Activations are rounded once per call to 8-bit codes, with one scale per row and group of 32: 127 stands for the group's
// largest magnitude. Products of a group are exact in int32; groups are added in fp32, in order.
#pragma once

#include "dispatch.h"
#include "dot.h"

namespace kvloom {

// Rows and panels in registers: up to kFewRows rows meet panels as they are stored, up to kRows panels that were unpacked.
#if defined(KVLOOM_VNNI)
constexpr int kRows = 6, kPanels = 2, kFewRows = 8;  // 6 x 2 integer and 6 x 2 float accumulators
#elif defined(KVLOOM_AVX2)
constexpr int kRows = 3, kPanels = 1, kFewRows = 3;
#else
constexpr int kRows = 1, kPanels = 1, kFewRows = 1;  // without the instructions, blocking gains nothing
#endif

// Unrolled, gcc computes AVX2's products long before it adds them, and keeps them in memory meanwhile.
#ifdef KVLOOM_AVX2
#define KVLOOM_UNROLL _Pragma("GCC unroll 1")
#else
#define KVLOOM_UNROLL _Pragma("GCC unroll 8")
#endif

enum Format : int32_t { kQ4_0, kQ4_1, kQ5_0, kQ5_1, kQ8_0, kQ4_K, kQ5_K, kQ6_K };  // mirrored in linear.py

template <Format F> struct Weights {
  static constexpr bool kOfK = F >= kQ4_K, kHasMin = F == kQ4_1 || F == kQ5_1 || F == kQ4_K || F == kQ5_K;
  static constexpr int kBits = F == kQ8_0 ? 8 : F == kQ6_K ? 6 : F == kQ5_0 || F == kQ5_1 || F == kQ5_K ? 5 : 4;
  static constexpr int kOffset = kHasMin ? 0 : 1 << (kBits - 1);
  static constexpr int kGroups = kOfK ? 8 : 1;                // of a block
  static constexpr int kRuns = F == kQ6_K ? 2 : 1;            // stretches of a group that have a scale each
  static constexpr int kScales = kGroups * (kRuns + kHasMin); // of a block and an output
  static constexpr int64_t kCodeBytes = 64 * kBits;           // of a group
  static constexpr int64_t kScaleBytes = F == kQ6_K ? 18 * kPanel : kOfK ? 16 * kPanel : 2 * kScales * kPanel;  // of a block
  static constexpr int64_t panel_bytes(int64_t groups) {
    return (groups * kCodeBytes + groups / kGroups * kScaleBytes + 63) / 64 * 64;
  }
};

template <class F> inline auto with_format(int32_t format, F f) {
  switch (format) {
    case kQ4_0: return f(std::integral_constant<Format, kQ4_0>{});
    case kQ4_1: return f(std::integral_constant<Format, kQ4_1>{});
    case kQ5_0: return f(std::integral_constant<Format, kQ5_0>{});
    case kQ5_1: return f(std::integral_constant<Format, kQ5_1>{});
    case kQ4_K: return f(std::integral_constant<Format, kQ4_K>{});
    case kQ5_K: return f(std::integral_constant<Format, kQ5_K>{});
    case kQ6_K: return f(std::integral_constant<Format, kQ6_K>{});
    default: return f(std::integral_constant<Format, kQ8_0>{});
  }
}

typedef uint8_t Octets __attribute__((vector_size(kPanel)));
inline Octets load_octets(const uint8_t* p) { Octets x; std::memcpy(&x, p, sizeof x); return x; }
inline vec widened(Octets x) {
#if defined(KVLOOM_AVX512)
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32((__m128i)x));
#elif defined(KVLOOM_AVX2)
  const __m128i low = (__m128i)x;
  return {{_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(low)), _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(low, 8)))}};
#else
  alignas(64) float wide[kPanel];
  for (int o = 0; o < kPanel; o++) wide[o] = float(x[o]);
  return load(wide);
#endif
}

// Codes of step s of a group, ready to multiply. part: the group's first register, at the part that is wanted.
template <Format F> inline Weights4 codes_of(const uint8_t* part, int s) {
  if constexpr (Weights<F>::kBits == 8) return whole(load_stored(part + s * 64));
  const Weights4 low = nibbles(load_stored(part + s % 4 * 64), s / 4 * 4);
  if constexpr (Weights<F>::kBits == 5) return with_bits(low, load_stored(part + 4 * 64), s, 1);
  if constexpr (Weights<F>::kBits == 6) return with_bits(low, load_stored(part + (4 + s / 4) * 64), s % 4 * 2, 3);
  return low;
}

// Scales of a block's groups, run by run, then mins: to[kScales][16]. w = scale (code - offset) + min.
template <Format F> inline void scales_of(const uint8_t* block, float* to) {
  using W = Weights<F>;
  const auto* halves = reinterpret_cast<const f16*>(block);
  const vec d = load(halves);
  if constexpr (!W::kOfK) {
    store(to, d);
    if (W::kHasMin) store(to + kPanel, load(halves + kPanel));
    return;
  }
  auto put = [&](int at, vec factor, Octets whole_numbers) { store(to + at * kPanel, factor * widened(whole_numbers)); };
  if constexpr (F == kQ6_K) {  // signed: 128 is added, and taken off again
    const uint8_t* scales = block + 2 * kPanel;
    for (int i = 0; i < W::kScales; i++)
      store(to + i * kPanel, d * (widened(load_octets(scales + i * kPanel) + 128) - splat(128.0f)));
    return;
  }
  const vec dmin = splat(0.0f) - load(halves + kPanel);
  for (int g = 0; g < 4; g++) {  // six bits each: the first four whole, the others' upper two above those
    const uint8_t* packed = block + (4 + g) * kPanel;
    const Octets a = load_octets(packed), b = load_octets(packed + 4 * kPanel), c = load_octets(packed + 8 * kPanel);
    put(g, d, a & 63), put(g + 4, d, (c & 15) | (a >> 6 << 4));
    put(g + 8, dmin, b & 63), put(g + 12, dmin, (c >> 4) | (b >> 6 << 4));
  }
}

// Cache lines of the weights that lie a panel or two behind group g: Zen 3 does not see these reads coming.
template <Format F> inline void ask_ahead(const uint8_t* panel, int64_t g) {
  constexpr int64_t kAhead = 8192, kGroup = Weights<F>::kCodeBytes + Weights<F>::kScaleBytes / Weights<F>::kGroups;
  for (int64_t at = 0; at < kGroup; at += 64) __builtin_prefetch(panel + kAhead + g * kGroup + at, 0, 0);
}

struct Activations {  // of `rows` rows, `groups` groups each
  Code* codes;        // [rows][groups][32], in the order of dot.h
  float* scale;       // [rows][groups]
  float* scaled_sum;  // scale * sum of codes: what a min is multiplied by
  int32_t* start;     // [rows][groups][runs]: -offset * sum of codes, where an integer sum begins
  int64_t step = 1;   // rows side by side: all four are [rows / step][groups][step]
};

// Codes of a group as its target wants them, and the sum of each half's. Every |x * inverse| is at most kMostCode.
inline void place_codes(const float* x, float inverse, Code* codes, int32_t* sums) {
#if defined(KVLOOM_VNNI)
  for (int h = 0; h < 2; h++) {
    const __m512i c = _mm512_cvtps_epi32(load(x + h * kLanes) * splat(inverse));
    _mm_storeu_si128((__m128i*)(codes + h * kLanes), _mm512_cvtepi32_epi8(c));
    sums[h] = _mm512_reduce_add_epi32(c);
  }
#elif defined(KVLOOM_AVX2)
  for (int i = 0; i < 2; i++) {
    __m256i half[2];
    for (int h = 0; h < 2; h++)
      half[h] = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + 16 * i + 8 * h), _mm256_set1_ps(inverse)));
    int32_t lanes[8];
    _mm256_storeu_si256((__m256i*)lanes, _mm256_add_epi32(half[0], half[1]));
    sums[i] = 0;
    for (int32_t lane : lanes) sums[i] += lane;
    for (__m256i& h : half) h = _mm256_shuffle_epi32(h, 0xd8);  // 0 2 1 3 of every four
    _mm256_storeu_si256((__m256i*)(codes + 16 * i), _mm256_permute4x64_epi64(_mm256_packs_epi32(half[0], half[1]), 0xd8));
  }
#else
  sums[0] = sums[1] = 0;
  for (int i = 0; i < kGroupInputs; i++) {
    codes[i] = Code(std::lrint(x[i] * inverse));
    sums[i / 16] += codes[i];
  }
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

template <Format F> inline void quantise_group(const float* x, int64_t g, const Activations& to) {
  using W = Weights<F>;
  const float d = largest_magnitude(x) / float(kMostCode);
  int32_t sums[2];
  g *= to.step;
  place_codes(x, d > 0.0f ? 1.0f / d : 0.0f, to.codes + g * kGroupInputs, sums);
  to.scale[g] = d;
  to.scaled_sum[g] = d * float(sums[0] + sums[1]);
  for (int u = 0; u < W::kRuns; u++) to.start[g * W::kRuns + u] = -W::kOffset * (W::kRuns > 1 ? sums[u] : sums[0] + sums[1]);
}

struct Ready {  // panels unpacked for many rows: what codes_of and scales_of give
  const uint8_t* codes;  // [groups][kSteps][panels][kParts][kReadyBytes]
  const float* scales;   // [blocks][panels][kScales][16]
};

// R rows times P neighbouring panels over all groups: out[R][P][16]. x: the first row's activations. Which of `panel` and
// `ready` is read is known at compile time: else compilers load all codes of a group before they multiply any, and spill them.
template <Format F, int R, int P, bool Unpacked>
void multiply(const uint8_t* panel, const Ready& ready, const Activations& x, int64_t groups, float* out) {
  using W = Weights<F>;
  constexpr int Q = P * kParts, kOfRun = kSteps / W::kRuns, kBlockScales = P * W::kScales * kPanel;
  const int64_t panel_bytes = W::panel_bytes(groups), row = groups * kGroupInputs;
  alignas(64) float own[kBlockScales];
  fsum acc[R][Q];
  for (int r = 0; r < R; r++)
    for (int q = 0; q < Q; q++) acc[r][q] = fsplat(0.0f);
  for (int64_t g = 0; g < groups; g++) {
    const int64_t block = g / W::kGroups, in_block = g % W::kGroups;
    if constexpr (!Unpacked)
      for (int p = 0; p < P; p++) {
        ask_ahead<F>(panel + p * panel_bytes, g);
        const uint8_t* scales = panel + p * panel_bytes + groups * W::kCodeBytes + block * W::kScaleBytes;
        if (in_block == 0) scales_of<F>(scales, own + p * W::kScales * kPanel);
      }
    const float* scales = Unpacked ? ready.scales + block * kBlockScales : own;
    auto scale_at = [&](int q, int64_t i) {
      return load_floats(scales + (q / kParts * W::kScales + i) * kPanel + q % kParts * kPart);
    };
    for (int u = 0; u < W::kRuns; u++) {
      isum sums[R][Q];
      for (int r = 0; r < R; r++)
        for (int q = 0; q < Q; q++) sums[r][q] = isplat(W::kOffset ? x.start[(r * groups + g) * W::kRuns + u] : 0);
KVLOOM_UNROLL
      for (int s = u * kOfRun; s < (u + 1) * kOfRun; s++) {
        Weights4 w[Q];
        for (int q = 0; q < Q; q++)
          w[q] = Unpacked ? load_ready(ready.codes + ((g * kSteps + s) * Q + q) * kReadyBytes)
                          : codes_of<F>(panel + q / kParts * panel_bytes + g * W::kCodeBytes + q % kParts * (64 / kParts), s);
        for (int r = 0; r < R; r++)
          for (int q = 0; q < Q; q++) sums[r][q] = dot4(sums[r][q], w[q], x.codes + r * row + g * kGroupInputs + 4 * s);
      }
      for (int q = 0; q < Q; q++) {
        const fsum scale = scale_at(q, in_block * W::kRuns + u);
        for (int r = 0; r < R; r++)
          acc[r][q] = add_product(to_float(sums[r][q]), times(scale, x.scale[r * groups + g]), acc[r][q]);
      }
    }
    if constexpr (W::kHasMin)
      for (int q = 0; q < Q; q++) {
        const fsum min = scale_at(q, W::kGroups * W::kRuns + in_block);
        for (int r = 0; r < R; r++) acc[r][q] = add_product(min, fsplat(x.scaled_sum[r * groups + g]), acc[r][q]);
      }
  }
  for (int r = 0; r < R; r++)
    for (int q = 0; q < Q; q++) store_sum(out + (r * Q + q) * kPart, acc[r][q]);
}

}  // namespace kvloom
