// Sixteen float lanes, and the three element types of a cache, in one vocabulary.
//
// With AVX-512 a vec is one register, with AVX2 two. Elsewhere, and under KVLOOM_GENERIC, it is a compiler vector of the same
// sixteen lanes, which gcc and clang lower to whatever the machine has. Kernels are written once against these names; only
// inner loops that the abstraction would slow down look at KVLOOM_AVX512 and at how many vecs the registers hold.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__) && \
    !defined(KVLOOM_GENERIC)
#define KVLOOM_AVX512 1
#include <immintrin.h>
#endif
#if defined(KVLOOM_AVX512) && defined(__AVX512VNNI__)
#define KVLOOM_VNNI 1
#endif
#if defined(KVLOOM_BF16_DOT) && !(defined(KVLOOM_AVX512) && defined(__AVX512BF16__))
#undef KVLOOM_BF16_DOT  // asked for by build.py, and the compiler knows no such instruction
#endif
#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__) && !defined(KVLOOM_VNNI) && !defined(KVLOOM_GENERIC)
#define KVLOOM_AVX2 1
#include <immintrin.h>
#endif

namespace kvloom {

constexpr int kLanes = 16;

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

enum DType : int32_t { kF32 = 0, kBF16 = 1, kF16 = 2 };  // mirrored in library.py

#ifdef KVLOOM_AVX512
using vec = __m512;
using ivec = __m512i;
#elif defined(KVLOOM_AVX2)
struct vec { __m256 half[2]; };
#else
typedef float vec __attribute__((vector_size(64)));
typedef int32_t ivec __attribute__((vector_size(64)));
#endif

// Scalars -------------------------------------------------------------------------------------------------------------

inline float bits_to_float(uint32_t bits) { float f; std::memcpy(&f, &bits, 4); return f; }
inline uint32_t float_to_bits(float f) { uint32_t bits; std::memcpy(&bits, &f, 4); return bits; }

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return bits_to_float(uint32_t(x.bits) << 16); }
inline float to_float(f16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16, magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
  // Placing the half's bits in a float's field leaves the exponent 112 too small; the product repairs it, denormals too.
  return bits_to_float(sign | float_to_bits(bits_to_float(magnitude << 13) * 0x1p112f));
}

template <class T> T from_float(float x);
template <> inline float from_float<float>(float x) { return x; }
template <> inline bf16 from_float<bf16>(float x) {
  const uint32_t bits = float_to_bits(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {uint16_t((bits >> 16) | 0x40u)};  // a NaN must not round to infinity
  return {uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}
template <> inline f16 from_float<f16>(float x) {
  const uint32_t bits = float_to_bits(x), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {uint16_t(sign | 0x7e00u)};
  if (magnitude >= 0x477ff000u) return {uint16_t(sign | 0x7c00u)};
  if (magnitude < 0x38800000u) {  // below the smallest normal half: let the adder round to the denormal grid
    const float rounded = bits_to_float(magnitude) + 0.5f;
    return {uint16_t(sign | (float_to_bits(rounded) - 0x3f000000u))};
  }
  return {uint16_t(sign | ((magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13))};
}

// Vectors -------------------------------------------------------------------------------------------------------------

#ifdef KVLOOM_AVX512
inline vec zero() { return _mm512_setzero_ps(); }
inline vec splat(float x) { return _mm512_set1_ps(x); }
inline vec load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, vec a) { _mm512_storeu_ps(p, a); }
inline vec fma(vec a, vec b, vec c) { return _mm512_fmadd_ps(a, b, c); }
inline vec max(vec a, vec b) { return _mm512_max_ps(a, b); }
inline float sum(vec a) { return _mm512_reduce_add_ps(a); }
inline float max_lane(vec a) { return _mm512_reduce_max_ps(a); }
inline vec load(const bf16* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}
inline vec load(const f16* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
inline __m256i round_bf16(vec a) {
#ifdef __AVX512BF16__
  return (__m256i)_mm512_cvtneps_pbh(a);
#else
  const __m512i bits = _mm512_castps_si512(a);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  rounded = _mm512_mask_or_epi32(rounded, _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), bits, _mm512_set1_epi32(0x400000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
#endif
}
inline void store(bf16* p, vec a) { _mm256_storeu_si256((__m256i*)p, round_bf16(a)); }
inline void store(f16* p, vec a) { _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT)); }
#elif defined(KVLOOM_AVX2)
template <class F> inline vec each(F f) { return {{f(0), f(1)}}; }  // of a vec's halves
inline vec operator+(vec a, vec b) { return each([&](int h) { return _mm256_add_ps(a.half[h], b.half[h]); }); }
inline vec operator-(vec a, vec b) { return each([&](int h) { return _mm256_sub_ps(a.half[h], b.half[h]); }); }
inline vec operator*(vec a, vec b) { return each([&](int h) { return _mm256_mul_ps(a.half[h], b.half[h]); }); }
inline vec operator/(vec a, vec b) { return each([&](int h) { return _mm256_div_ps(a.half[h], b.half[h]); }); }
inline vec zero() { return {{_mm256_setzero_ps(), _mm256_setzero_ps()}}; }
inline vec splat(float x) { return {{_mm256_set1_ps(x), _mm256_set1_ps(x)}}; }
inline vec load(const float* p) { return {{_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}}; }
inline void store(float* p, vec a) { _mm256_storeu_ps(p, a.half[0]), _mm256_storeu_ps(p + 8, a.half[1]); }
inline vec fma(vec a, vec b, vec c) { return each([&](int h) { return _mm256_fmadd_ps(a.half[h], b.half[h], c.half[h]); }); }
inline vec max(vec a, vec b) { return each([&](int h) { return _mm256_max_ps(a.half[h], b.half[h]); }); }
inline float sum(vec a) {  // the tree of the AVX-512 reduction
  const __m256 eight = _mm256_add_ps(a.half[0], a.half[1]);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
inline float max_lane(vec a) {
  const __m256 eight = _mm256_max_ps(a.half[0], a.half[1]);
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}
inline __m128i eight_at(const void* p, int h) { return _mm_loadu_si128(static_cast<const __m128i*>(p) + h); }
inline vec load(const bf16* p) {
  return each([&](int h) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(eight_at(p, h)), 16)); });
}
inline vec load(const f16* p) { return each([&](int h) { return _mm256_cvtph_ps(eight_at(p, h)); }); }
inline __m256i round_bf16(__m256 a) {  // in the low half of each lane
  const __m256i bits = _mm256_castps_si256(a), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  const __m256i nan = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
  return _mm256_srli_epi32(_mm256_blendv_epi8(rounded, nan, is_nan), 16);
}
inline void store(bf16* p, vec a) {
  const __m256i both = _mm256_packus_epi32(round_bf16(a.half[0]), round_bf16(a.half[1]));
  _mm256_storeu_si256((__m256i*)p, _mm256_permute4x64_epi64(both, 0xd8));
}
inline void store(f16* p, vec a) {
  for (int h = 0; h < 2; h++) _mm_storeu_si128((__m128i*)p + h, _mm256_cvtps_ph(a.half[h], _MM_FROUND_TO_NEAREST_INT));
}
#else
inline vec zero() { return vec{}; }
inline vec splat(float x) { return x - vec{}; }
inline vec load(const float* p) { vec a; std::memcpy(&a, p, sizeof a); return a; }
inline void store(float* p, vec a) { std::memcpy(p, &a, sizeof a); }
inline vec fma(vec a, vec b, vec c) { return a * b + c; }
inline vec max(vec a, vec b) { return a > b ? a : b; }
inline float sum(vec a) {  // the tree of the AVX-512 reduction, so that both builds add in one order
  float s[kLanes];
  store(s, a);
  for (int width = kLanes / 2; width; width /= 2)
    for (int i = 0; i < width; i++) s[i] += s[i + width];
  return s[0];
}
inline float max_lane(vec a) {
  float m = a[0];
  for (int i = 1; i < kLanes; i++) m = m > a[i] ? m : a[i];
  return m;
}
template <class T> inline vec load(const T* p) {
  vec a;
  for (int i = 0; i < kLanes; i++) a[i] = to_float(p[i]);
  return a;
}
template <class T> inline void store(T* p, vec a) {
  for (int i = 0; i < kLanes; i++) p[i] = from_float<T>(a[i]);
}
#endif

template <class T> inline vec load_first(const T* p, int64_t n) {  // n < 16 elements, the rest zero
  T tail[kLanes] = {};
  std::memcpy(tail, p, size_t(n) * sizeof(T));
  return load(tail);
}
template <class T> inline void store_first(T* p, vec a, int64_t n) {
  T tail[kLanes];
  store(tail, a);
  std::memcpy(p, tail, size_t(n) * sizeof(T));
}

// 32 elements as two vecs. For bf16 these are the even and the odd elements: one mask and one shift split a register, where
// widening halves costs shuffles. Whoever loads with load_pair stores with store_pair and never looks inside.
template <class T> inline void load_pair(const T* p, vec& a, vec& b) { a = load(p); b = load(p + kLanes); }
template <class T> inline void store_pair(T* p, vec a, vec b) { store(p, a); store(p + kLanes, b); }
template <class T> inline void pair_of(const float* p, vec& a, vec& b) { a = load(p); b = load(p + kLanes); }  // as load_pair<T>
#if defined(KVLOOM_AVX512)
inline void load_pair(const bf16* p, vec& a, vec& b) {
  const __m512i both = _mm512_loadu_si512(p);
  a = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
  b = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(int(0xffff0000u))));
}
inline void store_pair(bf16* p, vec a, vec b) {
  const __m512i low = _mm512_cvtepu16_epi32(round_bf16(a)), high = _mm512_cvtepu16_epi32(round_bf16(b));
  _mm512_storeu_si512(p, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
}
#elif defined(KVLOOM_AVX2)
inline void load_pair(const bf16* p, vec& a, vec& b) {
  for (int h = 0; h < 2; h++) {
    const __m256i both = _mm256_loadu_si256((const __m256i*)p + h);
    a.half[h] = _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));
    b.half[h] = _mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32(int(0xffff0000u))));
  }
}
inline void store_pair(bf16* p, vec a, vec b) {
  for (int h = 0; h < 2; h++) {
    const __m256i high = _mm256_slli_epi32(round_bf16(b.half[h]), 16);
    _mm256_storeu_si256((__m256i*)p + h, _mm256_or_si256(round_bf16(a.half[h]), high));
  }
}
#endif
#if defined(KVLOOM_AVX512) || defined(KVLOOM_AVX2)
template <> inline void pair_of<bf16>(const float* p, vec& a, vec& b) {
  float even[kLanes], odd[kLanes];
  for (int i = 0; i < kLanes; i++) even[i] = p[2 * i], odd[i] = p[2 * i + 1];
  a = load(even), b = load(odd);
}
#endif

// 2^x to 2e-7 (minimax of degree 5 on [-1/2, 1/2], exact at 0). Below -126 the result is 0, so -inf is a valid argument; a result
// that underflows would cost a hundred cycles of microcode, and masked scores make many. NaN stays NaN.
inline vec exp2(vec x) {
#if defined(KVLOOM_AVX512)
  const __mmask16 normal = _mm512_cmp_ps_mask(x, splat(-126.0f), _CMP_NLT_UQ);
  const vec n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(KVLOOM_AVX2)
  const vec given = x;
  x = each([&](int h) { return _mm256_min_ps(_mm256_set1_ps(128.0f), _mm256_max_ps(_mm256_set1_ps(-126.0f), x.half[h])); });
  const vec n = each([&](int h) { return _mm256_round_ps(x.half[h], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); });
#else
  const vec given = x;
  x = x < splat(-126.0f) ? splat(-126.0f) : x;
  x = x > splat(128.0f) ? splat(128.0f) : x;
  const vec magic = splat(12582912.0f);  // 1.5 * 2^23: adding it leaves the rounded integer in the low bits
  const vec shifted = x + magic, n = shifted - magic;
#endif
  const vec r = x - n;
  vec p = splat(1.326472731e-03f);
  p = fma(p, r, splat(9.671512991e-03f));
  p = fma(p, r, splat(5.550733581e-02f));
  p = fma(p, r, splat(2.402224243e-01f));
  p = fma(p, r, splat(6.931470037e-01f));
  p = fma(p, r, splat(1.0f));
#if defined(KVLOOM_AVX512)
  return _mm512_maskz_scalef_ps(normal, p, n);
#elif defined(KVLOOM_AVX2)
  return each([&](int h) {
    const __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n.half[h]), _mm256_set1_epi32(127)), 23);
    const __m256 tiny = _mm256_cmp_ps(given.half[h], _mm256_set1_ps(-126.0f), _CMP_LT_OQ);
    return _mm256_andnot_ps(tiny, _mm256_mul_ps(p.half[h], _mm256_castsi256_ps(power)));
  });
#else
  const ivec power = (__builtin_convertvector(n, ivec) + 127) << 23;
  vec scale;
  std::memcpy(&scale, &power, sizeof scale);
  return given < splat(-126.0f) ? zero() : p * scale;
#endif
}

constexpr float kLog2E = 1.44269504088896341f;
constexpr float kLn2 = 0.69314718055994531f;
inline vec exp(vec x) { return exp2(x * splat(kLog2E)); }
inline vec silu(vec x) { return x / (splat(1.0f) + exp(zero() - x)); }

}  // namespace kvloom
