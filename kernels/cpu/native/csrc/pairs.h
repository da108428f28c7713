// Attention's inner loops on dot products of bf16 pairs (vdpbf16ps), in place of those of tile.h.
//
//   keys     packed[pair of dimensions][position]: what lies in the cache, turned, and multiplied with pairs of the query
//   weights  rounded to bf16, so that what values are multiplied with is also what is summed
//   values   pairs of positions side by side, in the order of unpack: dimensions 0-3, 8-11, 16-19, 24-27, and the rest
//
// A dot product adds both products of a pair at once, rounds to nearest and takes denormals for zeros. Which pairs are added
// in which order depends on neither R nor on what is packed, so neither shows in a result.
#pragma once

#include "scratch.h"
#include "seen.h"
#include "softmax.h"

#ifdef KVLOOM_BF16_DOT
namespace kvloom {

using pairs = __m512i;  // sixteen pairs of bf16

inline vec dot(vec acc, pairs a, pairs b) { return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b); }
inline pairs splat_pair(const uint32_t* p) { return _mm512_set1_epi32(int(*p)); }
inline pairs round_pairs(vec a, vec b) { return (pairs)_mm512_cvtne2ps_pbh(b, a); }  // 32 numbers in order
inline pairs load_bf16(const bf16* p, int64_t n) {  // the first n of 32, the rest zero
  return n >= 32 ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi16((1u << n) - 1, p);
}

// 2^x to 3e-6 for what is rounded to bf16 (minimax of degree 4 on [-1/2, 1/2], exact at 0). -inf gives 0, and so does rounding
// of what comes out denormal. NaN stays NaN.
inline vec exp2_near(vec x) {
  const vec n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), r = x - n;
  vec p = splat(9.582853169e-3f);
  p = fma(p, r, splat(5.590642504e-2f));
  p = fma(p, r, splat(2.402409861e-1f));
  p = fma(p, r, splat(6.931241934e-1f));
  p = fma(p, r, splat(1.0f));
  return _mm512_scalef_ps(p, n);
}

// Sixteen dimensions of sixteen rows, turned: out[i] holds pair i of rows 0..15.
template <class Load> inline void turn_pairs(Load load, pairs* out) {
  pairs part[8], two[8], four[8];
  for (int i = 0; i < 8; i++) {  // eight pairs of two rows that are four apart
    const int row = i % 4 + i / 4 * 8;
    part[i] = _mm512_inserti64x4(_mm512_castsi256_si512(load(row)), load(row + 4), 1);
  }
  for (int i = 0; i < 8; i += 2)
    two[i] = _mm512_unpacklo_epi32(part[i], part[i + 1]), two[i + 1] = _mm512_unpackhi_epi32(part[i], part[i + 1]);
  for (int i = 0; i < 8; i += 4)
    for (int h = 0; h < 2; h++) {
      four[i + 2 * h] = _mm512_unpacklo_epi64(two[i + h], two[i + 2 + h]);
      four[i + 2 * h + 1] = _mm512_unpackhi_epi64(two[i + h], two[i + 2 + h]);
    }
  for (int i = 0; i < 4; i++) {
    out[i] = _mm512_shuffle_i32x4(four[i], four[i + 4], 0x88);
    out[i + 4] = _mm512_shuffle_i32x4(four[i], four[i + 4], 0xdd);
  }
}

// Two rows' numbers side by side.
inline void interleave(pairs a, pairs b, pairs& low, pairs& high) {
  low = _mm512_unpacklo_epi16(a, b), high = _mm512_unpackhi_epi16(a, b);
}

// Cache lines of the next block, asked for a few at a time between products: a core has some twenty requests to memory under
// way at most, and where the context is long they must never run dry. Rows sixteen apart take turns, keys and values alike: that
// many pages are looked up, and followed by the hardware's prefetcher, at once.
class Ahead {
 public:
  Ahead() = default;
  Ahead(const BlockRows<bf16>& next, int64_t dim, bool values)
      : rows_(next.rows), shift_(values ? 3 : 2), end_(next.count > 0 ? 16 << shift_ : 0), bytes_(dim * 2) {}
  template <int N> void ask() {
    for (int i = 0; i < N && at_ < end_; i++) {
      const bf16* row = rows_[(at_ & ((1 << shift_) - 1)) * 16 + (at_ >> shift_)];
      __builtin_prefetch(reinterpret_cast<const char*>(row) + line_, 0, 3);
      line_ += 64;
      if (line_ >= bytes_) line_ = 0, at_++;
    }
  }

 private:
  const bf16* const* rows_ = nullptr;
  int shift_ = 0, end_ = 0, at_ = 0;
  int64_t bytes_ = 0, line_ = 0;
};

// Products of one tile's queries with block after block of keys and values: see WideProducts, whose place it takes.
class PairProducts {
 public:
  static constexpr int kRows = kGroup;  // at once

  PairProducts(int64_t dim, int64_t stride, int64_t m)
      : dim_(dim), stride_(stride), pairs_((dim + 1) / 2), m_(m), values_in_place_(m <= kGroup && dim == stride) {}

  void take(Cut& cut) {
    queries_ = cut.take<uint32_t>(m_ * pairs_);
    keys_ = cut.take<uint32_t>((pairs_ + 7) / 8 * 8 * kBlock);
    values_ = cut.take<uint32_t>(kBlock / 2 * stride_);
    weights_ = cut.take<uint32_t>(kLanes * kBlock / 2);
  }

  void query(int64_t r, const bf16* q) {
    queries_[(r + 1) * pairs_ - 1] = 0;
    std::memcpy(queries_ + r * pairs_, q, size_t(dim_) * sizeof(bf16));
  }

  void open(const BlockRows<bf16>& now, const BlockRows<bf16>& next, bool values) {
    now_ = &now;
    ahead_ = Ahead(next, dim_, values);
    pack_keys();
    if (values && !values_in_place_) pack_values();
  }

  template <int R> void scores(int64_t r, float* s) {
    const uint32_t* q = queries_ + r * pairs_;
    vec acc[R * 4];
    unrolled<R * 4>([&](auto i) { acc[i] = zero(); });
    Ahead ahead = ahead_;
    for (int64_t d = 0; d < pairs_; d++) {
      ahead.ask<2>();
      pairs k[4];
      unrolled<4>([&](auto i) { k[i] = _mm512_load_si512(keys_ + d * kBlock + i * kLanes); });
      unrolled<R>([&](auto row) {
        const pairs both = splat_pair(q + row * pairs_ + d);
        unrolled<4>([&](auto i) { acc[row * 4 + i] = dot(acc[row * 4 + i], both, k[i]); });
      });
    }
    unrolled<R * 4>([&](auto i) { store(s + i * kLanes, acc[i]); });
    ahead_ = ahead;
  }

  template <int R> void soften(float* s, const int64_t* visible, float log2_scale, Softmax state, float* alpha) {
    const pairs ones = _mm512_set1_epi32(0x3f803f80);
    kvloom::soften<R>(s, visible, log2_scale, state, alpha, [&](int r, const float* row, vec scale, vec shift) {
      ahead_.ask<10>();
      Sums sums{zero(), zero()};
      for (int i = 0; i < kBlock; i += 2 * kLanes) {
        const vec a = exp2_near(fma(load(row + i), scale, shift)), b = exp2_near(fma(load(row + i + kLanes), scale, shift));
        const pairs rounded = round_pairs(a, b);
        _mm512_store_si512(weights_ + (r * kBlock + i) / 2, rounded);
        sums = {dot(sums.sum, rounded, ones), sums.exact + (a + b)};
      }
      return sums;
    });
  }

  template <int R> void weigh(const float*, int count, const float* alpha, float* o) {
    int64_t d = 0;
    for (; d + 4 * kLanes <= stride_; d += 4 * kLanes) gather<R, 4>(count, d, alpha, o);
    if (d < stride_) gather<R, 2>(count, d, alpha, o);
  }

  // 32 sums in the order they are kept in, and back.
  static void spread(const float* p, vec& a, vec& b) {
    const vec low = load(p), high = load(p + kLanes);
    a = _mm512_shuffle_f32x4(low, high, 0x88), b = _mm512_shuffle_f32x4(low, high, 0xdd);
  }
  static void store_sums(bf16* p, vec a, vec b, int64_t n) {  // the first n
    const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
    const pairs all = _mm512_permutexvar_epi64(order, round_pairs(a, b));
    _mm512_mask_storeu_epi16(p, n >= 32 ? ~0u : (1u << n) - 1, all);
  }

 protected:
  void pack_keys() {
    Ahead ahead = ahead_;
    for (int base = 0; base < now_->count; base += 16)
      for (int64_t d = 0; d < dim_; d += 16) {
        const bf16* const* rows = now_->k() + base;
        pairs turned[8];
        if (d + 16 <= dim_) turn_pairs([&](int i) { return _mm256_loadu_si256((const __m256i*)(rows[i] + d)); }, turned);
        else turn_pairs([&](int i) { return _mm256_maskz_loadu_epi16(__mmask16((1u << (dim_ - d)) - 1), rows[i] + d); }, turned);
        for (int i = 0; i < 8; i++) _mm512_store_si512(keys_ + (d / 2 + i) * kBlock + base, turned[i]);
        ahead.ask<6>();
      }
    ahead_ = ahead;
  }

  void pack_values() {
    for (int j = 0; j < now_->count; j += 2)
      for (int64_t d = 0; d < dim_; d += 32) {
        pairs low, high;
        const pairs first = load_bf16(now_->v()[j] + d, dim_ - d);
        interleave(first, j + 1 < now_->count ? load_bf16(now_->v()[j + 1] + d, dim_ - d) : _mm512_setzero_si512(), low, high);
        uint32_t* to = values_ + j / 2 * stride_ + d;
        _mm512_store_si512(to, low), _mm512_store_si512(to + kLanes, high);
      }
  }

  // O[r][d, d + 16 vecs) of R rows.
  template <int R, int Vecs> void gather(int count, int64_t d, const float* alpha, float* o) {
    vec acc[R * Vecs];
    unrolled<R * Vecs>([&](auto i) { acc[i] = load(o + i / Vecs * stride_ + d + i % Vecs * kLanes) * splat(alpha[i / Vecs]); });
    auto add = [&](int j, auto get) __attribute__((always_inline)) {
      pairs v[Vecs];
      unrolled<Vecs / 2>([&](auto i) { get(d + 2 * i * kLanes, v[2 * i], v[2 * i + 1]); });
      unrolled<R>([&](auto r) {
        const pairs both = splat_pair(weights_ + r * kBlock / 2 + j / 2);
        unrolled<Vecs>([&](auto i) { acc[r * Vecs + i] = dot(acc[r * Vecs + i], both, v[i]); });
      });
    };
    if (!values_in_place_) {
      auto packed = [&](int j, __mmask32 seen) __attribute__((always_inline)) {
        add(j, [&](int64_t at, pairs& low, pairs& high) {
          low = _mm512_maskz_mov_epi16(seen, _mm512_load_si512(values_ + j / 2 * stride_ + at));
          high = _mm512_maskz_mov_epi16(seen, _mm512_load_si512(values_ + j / 2 * stride_ + at + kLanes));
        });
      };
      int j = 0;
      for (; j + 1 < count; j += 2) packed(j, 0xffffffffu);
      if (j < count) packed(j, 0x55555555u);  // beside a position that no row of these sees, whatever it holds
    } else {
      Ahead ahead = ahead_;
      int j = 0;
      for (; j + 1 < count; j += 2) {
        ahead.ask<2>();
        add(j, [&](int64_t at, pairs& low, pairs& high) {
          interleave(_mm512_loadu_si512(now_->v()[j] + at), _mm512_loadu_si512(now_->v()[j + 1] + at), low, high);
        });
      }
      ahead_ = ahead;
      if (j < count)
        add(j, [&](int64_t at, pairs& low, pairs& high) {
          interleave(_mm512_loadu_si512(now_->v()[j] + at), _mm512_setzero_si512(), low, high);
        });
    }
    unrolled<R * Vecs>([&](auto i) { store(o + i / Vecs * stride_ + d + i % Vecs * kLanes, acc[i]); });
  }

  const int64_t dim_, stride_, pairs_, m_;
  uint32_t *queries_, *keys_, *values_, *weights_;
  const BlockRows<bf16>* now_;
  Ahead ahead_;
  const bool values_in_place_;
};

}  // namespace kvloom
#endif
