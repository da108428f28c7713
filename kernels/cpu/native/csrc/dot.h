// The integer inner step of quant.h, for three kinds of processor: 16 outputs times 4 inputs at a time, exact in int32.
//
// A group's activations are 32 codes of 8 bits, stored as the target multiplies them:
//
//     VNNI    int8 in order: one instruction multiplies bytes
//     AVX2    int16; of every four inputs first 0 and 2, then 1 and 3: the weights' bytes spread by masks alone
//     else    int8 in order
//
// All three give the same integers. A panel's 16 outputs are kParts registers of sums.
#pragma once

#include "vec.h"

namespace kvloom {

constexpr int kPanel = 16, kGroupInputs = 32, kSteps = kGroupInputs / 4;
constexpr int kMostCode = 127;

#if defined(KVLOOM_VNNI)

using Code = int8_t;
using Stored = __m512i;   // 64 bytes of weights as they lie in memory
using Weights4 = __m512i; // 16 outputs x 4 inputs, ready to multiply
using isum = __m512i;     // an int32 per output
using fsum = vec;
constexpr int kParts = 1;

inline Stored load_stored(const uint8_t* p) { return _mm512_loadu_si512(p); }
inline Weights4 whole(Stored c) { return c; }
inline Weights4 nibbles(Stored c, int shift) { return _mm512_and_si512(_mm512_srli_epi16(c, shift), _mm512_set1_epi8(15)); }
inline Weights4 with_bits(Weights4 low, Stored c, int from, int mask) {
  const Stored moved = from < 4 ? _mm512_slli_epi16(c, 4 - from) : _mm512_srli_epi16(c, from - 4);
  return _mm512_or_si512(low, _mm512_and_si512(moved, _mm512_set1_epi8(char(mask << 4))));
}
inline void store_ready(uint8_t* p, Weights4 c) { _mm512_storeu_si512(p, c); }
inline Weights4 load_ready(const uint8_t* p) { return _mm512_loadu_si512(p); }
inline isum isplat(int32_t x) { return _mm512_set1_epi32(x); }
inline isum load_sums(const int32_t* p) { return _mm512_loadu_si512(p); }
inline fsum to_float(isum x) { return _mm512_cvtepi32_ps(x); }
inline isum dot4(isum acc, Weights4 weights, const Code* x) {
  int32_t four;
  std::memcpy(&four, x, 4);
  return _mm512_dpbusd_epi32(acc, weights, _mm512_set1_epi32(four));
}

#elif defined(KVLOOM_AVX2)

using Code = int16_t;
using Stored = __m256i;
struct Weights4 { __m256i even, odd; };  // 8 outputs: inputs 0 and 2, and 1 and 3, as int16
using isum = __m256i;
using fsum = __m256;
constexpr int kParts = 2;

inline Stored load_stored(const uint8_t* p) { return _mm256_loadu_si256((const __m256i*)p); }
inline __m256i bits(__m256i x, int shift, int mask) {
  return _mm256_and_si256(_mm256_srli_epi16(x, shift), _mm256_set1_epi16(short(mask)));
}
inline Weights4 whole(Stored c) { return {bits(c, 0, 255), bits(c, 8, 255)}; }
inline Weights4 nibbles(Stored c, int shift) { return {bits(c, shift, 15), bits(c, 8 + shift, 15)}; }
inline Weights4 with_bits(Weights4 low, Stored c, int from, int mask) {
  auto or_moved = [&](__m256i to, int shift) { return _mm256_or_si256(to, _mm256_slli_epi16(bits(c, shift, mask), 4)); };
  return {or_moved(low.even, from), or_moved(low.odd, 8 + from)};
}
inline void store_ready(uint8_t* p, const Weights4& c) {
  _mm256_storeu_si256((__m256i*)p, c.even), _mm256_storeu_si256((__m256i*)p + 1, c.odd);
}
inline Weights4 load_ready(const uint8_t* p) { return {load_stored(p), load_stored(p + 32)}; }
inline isum isplat(int32_t x) { return _mm256_set1_epi32(x); }
inline fsum to_float(isum x) { return _mm256_cvtepi32_ps(x); }
inline __m256i pair_at(const Code* x) {  // everywhere; loaded so because gcc would go by way of a general register
  return _mm256_castps_si256(_mm256_broadcast_ss(reinterpret_cast<const float*>(x)));
}
inline isum dot4(isum acc, const Weights4& weights, const Code* x) {
  acc = _mm256_add_epi32(acc, _mm256_madd_epi16(weights.even, pair_at(x)));
  return _mm256_add_epi32(acc, _mm256_madd_epi16(weights.odd, pair_at(x + 2)));
}

#else

using Code = int8_t;
typedef uint8_t Stored __attribute__((vector_size(64)));
using Weights4 = Stored;
using isum = ivec;
using fsum = vec;
constexpr int kParts = 1;

inline Stored load_stored(const uint8_t* p) { Stored c; std::memcpy(&c, p, sizeof c); return c; }
inline Weights4 whole(Stored c) { return c; }
inline Weights4 nibbles(Stored c, int shift) { return (c >> uint8_t(shift)) & 15; }
inline Weights4 with_bits(Weights4 low, Stored c, int from, int mask) { return low | (((c >> uint8_t(from)) & uint8_t(mask)) << 4); }
inline void store_ready(uint8_t* p, Weights4 c) { std::memcpy(p, &c, sizeof c); }
inline Weights4 load_ready(const uint8_t* p) { return load_stored(p); }
inline isum isplat(int32_t x) {
#ifdef KVLOOM_AVX512
  return _mm512_set1_epi32(x);
#else
  return x - isum{};
#endif
}
inline isum load_sums(const int32_t* p) { isum x; std::memcpy(&x, p, sizeof x); return x; }
inline fsum to_float(isum x) {
#ifdef KVLOOM_AVX512
  return _mm512_cvtepi32_ps(x);
#else
  return __builtin_convertvector(x, vec);
#endif
}
inline isum dot4(isum acc, Weights4 weights, const Code* x) {
  int32_t sums[kPanel];
  std::memcpy(sums, &acc, sizeof sums);
  uint8_t w[64];
  std::memcpy(w, &weights, sizeof w);
  for (int o = 0; o < kPanel; o++)
    sums[o] += int(w[4 * o]) * x[0] + int(w[4 * o + 1]) * x[1] + int(w[4 * o + 2]) * x[2] + int(w[4 * o + 3]) * x[3];
  std::memcpy(&acc, sums, sizeof sums);
  return acc;
}

#endif

constexpr int kPart = kPanel / kParts, kReadyBytes = 64;  // of a part: outputs, bytes of four inputs ready to multiply

// Sums across groups: fp32, one lane per output. ----------------------------------------------------------------------

#ifdef KVLOOM_AVX2
inline fsum fsplat(float x) { return _mm256_set1_ps(x); }
inline fsum load_floats(const float* p) { return _mm256_loadu_ps(p); }
inline fsum times(fsum a, float b) { return _mm256_mul_ps(a, fsplat(b)); }
inline fsum add_product(fsum a, fsum b, fsum c) { return _mm256_fmadd_ps(a, b, c); }
inline void store_sum(float* p, fsum a) { _mm256_storeu_ps(p, a); }
#else
inline fsum fsplat(float x) { return splat(x); }
inline fsum load_floats(const float* p) { return load(p); }
inline fsum times(fsum a, float b) { return a * splat(b); }
inline fsum add_product(fsum a, fsum b, fsum c) { return fma(a, b, c); }
inline void store_sum(float* p, fsum a) { store(p, a); }
#endif

}  // namespace kvloom
