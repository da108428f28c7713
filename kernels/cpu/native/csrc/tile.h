// Register-blocked inner loops of attention, in fp32: R query rows against one key block. Where bf16 pairs are multiplied as
// they are, pairs.h stands in place of this.
//
//   scores:  S[r][position] = q[r] . k[position]            S: [R][kBlock] fp32
//   soften:  S becomes 2^(scale S - maximum), running maximum and sum updated, alpha[r] = what the past must be scaled by
//   gather:  O[r] = alpha[r] O[r] + sum over positions of S[r][position] v[position]
//
// Every row goes through the same sequence of operations whatever R is, so R never shows in a result.
#pragma once

#include "pack.h"
#include "scratch.h"
#include "seen.h"
#include "softmax.h"

namespace kvloom {

#ifdef KVLOOM_AVX512
constexpr int across(int) { return 4; }  // vecs beside R rows: 6 x 4 accumulators, 4 of K or V
constexpr int kInPlace = kGroup;         // rows up to which keys are turned on their way into registers
#else
constexpr int across(int rows) { return rows > 3 ? 1 : 2; }  // a vec is two registers of sixteen (AVX2) or four (NEON)
constexpr int kInPlace = 3;
#endif

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

// Products of one tile's queries with block after block of keys and values.
template <class T> class WideProducts {
 public:
  static constexpr int kRows = kGroup;

  WideProducts(int64_t dim, int64_t stride, int64_t m)
      : dim_(dim), stride_(stride), m_(m), keys_in_place_(m <= kInPlace && turns_in_place<T>(dim)),
        values_in_place_(m <= kGroup && dim == stride) {}

  void take(Cut& cut) {
    packed_ = cut.take<float>((dim_ + 8) * kBlock);
    wide_ = cut.take<float>(16 * (dim_ + 32));
    values_ = cut.take<float>(kBlock * stride_);
    queries_ = cut.take<float>(m_ * dim_);
    q_ = cut.take<const float*>(m_);
  }

  void query(int64_t r, const T* q) {
    widen(q, dim_, queries_ + r * dim_);
    q_[r] = queries_ + r * dim_;
  }

  // Makes `now` the block that the others speak of. `next` is asked for meanwhile; values: whether those are wanted.
  void open(const BlockRows<T>& now, const BlockRows<T>& next, bool values) {
    now_ = &now, next_ = &next;
    if (!keys_in_place_) ask(next.k(), next.count, dim_), pack_keys(now.k(), now.count, dim_, wide_, packed_);
    if (values && !values_in_place_) ask(next.v(), next.count, dim_), widen_values();
  }

  // s: [R][kBlock], of rows r to r + R.
  template <int R> void scores(int64_t r, float* s) const {
#if defined(KVLOOM_AVX512) || defined(KVLOOM_AVX2)
    if constexpr (!std::is_same_v<T, f16> && R <= kInPlace)
      if (keys_in_place_) return scores_in_place<T, R>(q_ + r, now_->k(), next_->k(), now_->count, dim_, s);
#endif
    kvloom::scores<R>(q_ + r, packed_, dim_, s);
  }

  template <int R> void soften(float* s, const int64_t* visible, float log2_scale, Softmax state, float* alpha) const {
    kvloom::soften<R>(s, visible, log2_scale, state, alpha, [](int, float* row, vec scale, vec shift) {
      vec total = zero();
      for (int i = 0; i < 4; i++) {
        const vec p = exp2(fma(load(row + i * kLanes), scale, shift));
        store(row + i * kLanes, p);
        total = total + p;
      }
      return Sums{total, total};
    });
  }

  // Adds the first `count` values, weighted with what soften left, to o: [R][stride].
  template <int R> void weigh(const float* s, int count, const float* alpha, float* o) const {
    if (values_in_place_) weigh<R>(s, DirectValues<T>{now_->v(), next_->v()}, count, alpha, o);
    else weigh<R>(s, WideValues{values_, stride_}, count, alpha, o);
  }

  // 32 sums in the order they are kept in, and back.
  static void spread(const float* p, vec& a, vec& b) { pair_of<T>(p, a, b); }
  static void store_sums(T* p, vec a, vec b, int64_t n) {  // the first n
    if (n >= 32) return store_pair(p, a, b);
    T tail[32];
    store_pair(tail, a, b);
    std::memcpy(p, tail, size_t(n) * sizeof(T));
  }

 private:
  template <int R, class Values> void weigh(const float* s, Values values, int count, const float* alpha, float* o) const {
    constexpr int kAcross = across(R);
    int64_t d = 0;
    for (; d + kAcross * kLanes <= stride_; d += kAcross * kLanes) gather<R, kAcross>(s, values, count, d, alpha, o, stride_);
    if (d < stride_) gather<R, 2>(s, values, count, d, alpha, o, stride_);  // of four
  }

  void widen_values() {
    for (int j = 0; j < now_->count; j++) {
      float* to = values_ + j * stride_;
      int64_t d = 0;
      vec a, b;
      for (; d + 32 <= dim_; d += 32) {
        load_pair(now_->v()[j] + d, a, b);
        store(to + d, a), store(to + d + kLanes, b);
      }
      if (d == dim_) continue;
      T tail[32] = {};
      std::memcpy(tail, now_->v()[j] + d, size_t(dim_ - d) * sizeof(T));
      load_pair(tail, a, b);
      store(to + d, a), store(to + d + kLanes, b);
    }
  }

  const int64_t dim_, stride_, m_;
  const bool keys_in_place_, values_in_place_;  // few rows: no packed copy
  float *packed_, *wide_, *values_, *queries_;
  const float** q_;
  const BlockRows<T>*now_, *next_;
};

}  // namespace kvloom
