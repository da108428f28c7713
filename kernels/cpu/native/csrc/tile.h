// Register-blocked inner loops of attention: R query rows against one key block.
//
//   scores:  S[r][position] = q[r] . k[position]            S: [R][kBlock] fp32
//   soften:  S becomes 2^(scale S - maximum), running maximum and sum updated, alpha[r] = what the past must be scaled by
//   gather:  O[r] = alpha[r] O[r] + sum over positions of S[r][position] v[position]
//
// Every row goes through the same sequence of operations whatever R is, so R never shows in a result.
#pragma once

#include <cmath>

#include "pack.h"

namespace kvloom {

constexpr int kGroup = 6;  // rows in registers
#ifdef KVLOOM_AVX512
constexpr int across(int) { return 4; }  // vecs beside R rows: 6 x 4 accumulators, 4 of K or V
constexpr int kInPlace = kGroup;         // rows up to which keys are turned on their way into registers
#else
constexpr int across(int rows) { return rows > 3 ? 1 : 2; }  // a vec is two registers of sixteen (AVX2) or four (NEON)
constexpr int kInPlace = 3;
#endif

// f(0), f(1), ... f(N - 1), each known where it is compiled: only so does gcc keep arrays of registers in registers.
template <int N, class F> __attribute__((always_inline)) inline void unrolled(F f) {
  if constexpr (N > 0) {
    unrolled<N - 1>(f);
    f(std::integral_constant<int, N - 1>{});
  }
}

struct Softmax {        // per row of a tile
  float* maximum;       // of log2-scaled scores, or up to kSlack below it
  vec* sum;             // lane sums; added up once per split
};

// Scores from a packed block.
template <int R> void scores(const float* const* q, const float* packed, int64_t dim, float* s) {
  constexpr int kAcross = across(R);
  for (int at = 0; at < kBlock; at += kAcross * kLanes) {
    vec acc[R][kAcross];
    for (int r = 0; r < R; r++)
      for (int i = 0; i < kAcross; i++) acc[r][i] = zero();
    for (int64_t d = 0; d < dim; d++) {
      vec k[kAcross];
      for (int i = 0; i < kAcross; i++) k[i] = load(packed + d * kBlock + at + i * kLanes);
      for (int r = 0; r < R; r++)
        for (int i = 0; i < kAcross; i++) acc[r][i] = fma(splat(q[r][d]), k[i], acc[r][i]);
    }
    for (int r = 0; r < R; r++)
      for (int i = 0; i < kAcross; i++) store(s + r * kBlock + at + i * kLanes, acc[r][i]);
  }
}

// The same products in the same order straight from the cache: for few query rows, packing would be most of the work.
// rows, ahead: [kBlock] valid addresses; those of the next block are fetched meanwhile, evenly spread over the work.
// Positions from `count` on, up to whole sixteens, are anything.
#ifdef KVLOOM_AVX512
template <class T, int R>
void scores_in_place(const float* const* q, const T* const* rows, const T* const* ahead, int count, int64_t dim, float* s) {
  constexpr int kCount = Columns<T>::kCount;
  auto lines = reinterpret_cast<const float* const*>(rows);
  const int64_t bytes = dim * int64_t(sizeof(T));
  int64_t fetched = 0, line = 0;
  vec acc[R][4];
  for (int r = 0; r < R; r++)
    for (int i = 0; i < 4; i++) acc[r][i] = zero();
  for (int64_t d = 0; d < dim; d += kCount) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
      if (i * kLanes >= count) break;
      vec columns[kCount];
      Columns<T>::get(lines + i * 16, d * int64_t(sizeof(T)) / 4, columns);
      for (int l = 0; l < 4 && fetched < kBlock; l++) {  // sixteen bytes of 16 rows are four cache lines
        __builtin_prefetch(reinterpret_cast<const char*>(ahead[fetched]) + line, 0, 2);
        line += 64;
        if (line >= bytes) line = 0, fetched++;
      }
      for (int c = 0; c < kCount; c++)
        for (int r = 0; r < R; r++) acc[r][i] = fma(splat(q[r][d + c]), columns[c], acc[r][i]);
    }
  }
  for (int r = 0; r < R; r++)
    for (int i = 0; i < 4; i++) store(s + r * kBlock + i * kLanes, acc[r][i]);
}
#elif defined(KVLOOM_AVX2)
template <class T, int R>
void scores_in_place(const float* const* q, const T* const* rows, const T* const* ahead, int count, int64_t dim, float* s) {
  constexpr int kCount = 32 / int(sizeof(T));  // dimensions of eight dwords
  auto lines = reinterpret_cast<const float* const*>(rows);
  const int64_t bytes = dim * int64_t(sizeof(T));
  int64_t fetched = 0, line = 0;
  for (int at = 0; at < count; at += 16) {
    __m256 acc[R][2];
    for (int r = 0; r < R; r++) acc[r][0] = acc[r][1] = _mm256_setzero_ps();
    for (int64_t d = 0; d < dim; d += kCount)
      for (int h = 0; h < 2; h++) {
        __m256 turned[8];
        turn_dwords(lines + at + 8 * h, d * int64_t(sizeof(T)) / 4, turned);
        for (int l = 0; l < 4 && fetched < kBlock; l++) {  // thirty-two bytes of eight rows are four cache lines
          __builtin_prefetch(reinterpret_cast<const char*>(ahead[fetched]) + line, 0, 2);
          line += 64;
          if (line >= bytes) line = 0, fetched++;
        }
        auto add = [&](__m256 column, int64_t e) {
          for (int r = 0; r < R; r++) acc[r][h] = _mm256_fmadd_ps(_mm256_broadcast_ss(q[r] + e), column, acc[r][h]);
        };
        for (int i = 0; i < 8; i++) {
          if constexpr (sizeof(T) == 4) {
            add(turned[i], d + i);
          } else {
            const __m256i pair = _mm256_castps_si256(turned[i]);
            add(_mm256_castsi256_ps(_mm256_slli_epi32(pair, 16)), d + 2 * i);
            add(_mm256_castsi256_ps(_mm256_and_si256(pair, _mm256_set1_epi32(int(0xffff0000u)))), d + 2 * i + 1);
          }
        }
      }
    for (int r = 0; r < R; r++)
      for (int h = 0; h < 2; h++) _mm256_storeu_ps(s + r * kBlock + at + 8 * h, acc[r][h]);
  }
}
#endif

inline bool any_above(vec a, float limit) {
#if defined(KVLOOM_AVX512)
  return _mm512_cmp_ps_mask(a, splat(limit), _CMP_GT_OQ) != 0;
#elif defined(KVLOOM_AVX2)
  const vec above = each([&](int h) { return _mm256_cmp_ps(a.half[h], _mm256_set1_ps(limit), _CMP_GT_OQ); });
  return _mm256_movemask_ps(_mm256_or_ps(above.half[0], above.half[1])) != 0;
#else
  return max_lane(a) > limit;
#endif
}

inline vec first_lanes(vec a, int64_t n) {  // lanes [n, 16) become -inf
#if defined(KVLOOM_AVX512)
  const __mmask16 keep = n >= kLanes ? 0xffff : n <= 0 ? 0 : __mmask16((1u << n) - 1);
  return _mm512_mask_blend_ps(keep, splat(-INFINITY), a);
#elif defined(KVLOOM_AVX2)
  const int32_t kept = int32_t(n < 0 ? 0 : n > kLanes ? kLanes : n);
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return each([&](int h) {
    const __m256 keep = _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(kept - 8 * h), lane));
    return _mm256_blendv_ps(_mm256_set1_ps(-INFINITY), a.half[h], keep);
  });
#else
  for (int64_t i = n < 0 ? 0 : n; i < kLanes; i++) a[i] = -INFINITY;
  return a;
#endif
}

// How far scores may rise above a row's maximum, in powers of two, before the maximum is moved: weights stay below 2^8, and
// most blocks need neither a reduction across lanes nor a rescaling of the past.
constexpr float kSlack = 8.0f;

// visible[r]: how many of the block's positions row r sees (any sign, any size). log2_scale > 0.
template <int R> void soften(float* s, const int64_t* visible, float log2_scale, Softmax state, float* alpha) {
  alignas(64) float shift[kLanes] = {}, past[kLanes] = {};
  for (int r = 0; r < R; r++) {
    vec x[4];
    for (int i = 0; i < 4; i++) x[i] = load(s + r * kBlock + i * kLanes);
    if (visible[r] < kBlock)
      for (int i = 0; i < 4; i++) store(s + r * kBlock + i * kLanes, x[i] = first_lanes(x[i], visible[r] - i * kLanes));
    const vec top = max(max(x[0], x[1]), max(x[2], x[3])) * splat(log2_scale);
    past[r] = state.maximum[r];
    if (any_above(top, past[r] + kSlack)) state.maximum[r] = max_lane(top);
    shift[r] = state.maximum[r] == -INFINITY ? 0.0f : state.maximum[r];  // nothing seen yet: keep 2^(-inf) = 0, not NaN
  }
  store(alpha, exp2(load(past) - load(shift)));
  for (int r = 0; r < R; r++) {
    vec total = zero();
    for (int i = 0; i < 4; i++) {
      const vec p = exp2(fma(load(s + r * kBlock + i * kLanes), splat(log2_scale), splat(-shift[r])));
      store(s + r * kBlock + i * kLanes, p);
      total = total + p;
    }
    state.sum[r] = fma(state.sum[r], splat(alpha[r]), total);
  }
}

// V rows read where they lie in the cache.
template <class T> struct DirectValues {
  const T *const *rows, *const *ahead;  // of this block and the next
  void get(int position, int64_t d, vec& a, vec& b) const {
    for (int64_t e = 0; e < 32; e += 64 / int64_t(sizeof(T))) __builtin_prefetch(ahead[position] + d + e, 0, 2);
    load_pair(rows[position] + d, a, b);
  }
  vec get(int position, int64_t d) const {
    __builtin_prefetch(ahead[position] + d, 0, 2);
    vec a, b;
    load_pair(rows[position] + d / 32 * 32, a, b);
    return d % 32 ? b : a;
  }
};
// V rows converted once for many query rows: [kBlock][stride] fp32 in pair order.
struct WideValues {
  const float* data;
  int64_t stride;
  void get(int position, int64_t d, vec& a, vec& b) const {
    a = load(data + position * stride + d);
    b = load(data + position * stride + d + kLanes);
  }
  vec get(int position, int64_t d) const { return load(data + position * stride + d); }
};

// O[r][d, d + 16 vecs) of R rows; `Vecs` is 1, or whole pairs.
template <int R, int Vecs, class Values>
void gather(const float* s, Values values, int count, int64_t d, const float* alpha, float* o, int64_t stride) {
  vec acc[R * Vecs];
  unrolled<R * Vecs>([&](auto i) { acc[i] = load(o + i / Vecs * stride + d + i % Vecs * kLanes) * splat(alpha[i / Vecs]); });
  for (int j = 0; j < count; j++) {
    vec v[Vecs];
    if constexpr (Vecs == 1) v[0] = values.get(j, d);
    else unrolled<Vecs / 2>([&](auto i) { values.get(j, d + 2 * i * kLanes, v[2 * i], v[2 * i + 1]); });
    unrolled<R * Vecs>([&](auto i) { acc[i] = fma(splat(s[i / Vecs * kBlock + j]), v[i % Vecs], acc[i]); });
  }
  unrolled<R * Vecs>([&](auto i) { store(o + i / Vecs * stride + d + i % Vecs * kLanes, acc[i]); });
}

}  // namespace kvloom
