// The running softmax of attention, whatever its products are made of: what is masked, and when a maximum moves.
#pragma once

#include <type_traits>

#include "plan.h"
#include "vec.h"

namespace kvloom {

constexpr int kGroup = 6;  // rows in registers, where products are made there

// f(0), f(1), ... f(N - 1), each known where it is compiled: only so does gcc keep arrays of registers in registers.
template <int N, class F> __attribute__((always_inline)) inline void unrolled(F f) {
  if constexpr (N > 0) {
    unrolled<N - 1>(f);
    f(std::integral_constant<int, N - 1>{});
  }
}

struct Softmax {        // per row of a tile
  float* maximum;       // of log2-scaled scores, or up to kSlack below it
  vec* sum;             // lane sums of the weights that values are multiplied with; added up once per split
  vec* exact;           // and of weights before they are rounded, if they are; null: nobody asks
};

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

struct Sums { vec sum, exact; };  // of a row's weights, as in Softmax

// From scores to weights. weigh(r, s, scale, shift) makes row r's of its scores s, 2^(s scale + shift), and returns their sums.
// visible[r]: how many of the block's positions row r sees (any sign, any size). log2_scale > 0.
// alpha[r]: what row r's past must be multiplied with, as its sums have been.
template <int R, class Weigh>
void soften(float* s, const int64_t* visible, float log2_scale, Softmax state, float* alpha, Weigh weigh) {
  alignas(64) float past[kLanes] = {}, shift[kLanes] = {};
  bool moved = false;
  for (int r = 0; r < R; r++) {
    vec x[4];
    for (int i = 0; i < 4; i++) x[i] = load(s + r * kBlock + i * kLanes);
    if (visible[r] < kBlock)
      for (int i = 0; i < 4; i++) store(s + r * kBlock + i * kLanes, x[i] = first_lanes(x[i], visible[r] - i * kLanes));
    const vec top = max(max(x[0], x[1]), max(x[2], x[3])) * splat(log2_scale);
    past[r] = state.maximum[r];
    if (any_above(top, past[r] + kSlack)) state.maximum[r] = max_lane(top), moved = true;
    shift[r] = state.maximum[r] == -INFINITY ? 0.0f : state.maximum[r];  // nothing seen yet: keep 2^(-inf) = 0, not NaN
  }
  store(alpha, moved ? exp2(load(past) - load(shift)) : splat(1.0f));
  for (int r = 0; r < R; r++) {
    const Sums added = weigh(r, s + r * kBlock, splat(log2_scale), splat(-shift[r]));
    state.sum[r] = fma(state.sum[r], splat(alpha[r]), added.sum);
    if (state.exact) state.exact[r] = fma(state.exact[r], splat(alpha[r]), added.exact);
  }
}

}  // namespace kvloom
