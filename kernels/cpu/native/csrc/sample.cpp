// From a row of logits to a token: the inverse of the distribution function over the kept tokens, likeliest first, ties by id.
//
// No row is sorted as a whole: a histogram over values says in which narrow range a place of the order lies, and only that
// range is sorted. A row is the work of one thread. Of a row with a mask, the tokens that it allows are put side by side, and
// one of those is drawn: what is not allowed is never looked at, so that a mask makes a draw cheaper.

#include <algorithm>
#include <cfloat>

#include "abi.h"
#include "dispatch.h"
#include "parallel.h"
#include "scratch.h"
#include "tile.h"

namespace kvloom {
namespace {

constexpr int64_t kBuckets = 2048;
constexpr int64_t kScan = 64;  // elements looked at together
constexpr float kPerUnit = 32.0f;  // of logit over temperature: the last bucket begins where weights are below e^-64 of the highest

thread_local Arena sample_arena, allowed_arena;

struct Place {  // in a row's sorted order
  int64_t bucket;
  double mass;  // weight of the tokens up to and including it
};

class SortedRow {
 public:
  SortedRow(const float* x, int64_t n, float top, float temperature, float min_p) : x_(x), n_(n) {
    const int64_t room = (n + kScan - 1) / kScan * kScan;
    float* place;
    for (Cut cut(nullptr);; cut = Cut(sample_arena.reserve(cut.used()))) {
      weight_ = cut.take<float>(room);
      place = cut.take<float>(room);
      bucket_ = cut.take<uint16_t>(room);
      mass_ = cut.take<double>(kBuckets);
      count_ = cut.take<int64_t>(kBuckets);
      ids_ = cut.take<int32_t>(n);
      inside_ = cut.take<double>(n);
      if (weight_ != nullptr) break;
    }
    for (int64_t i = 0; i < n; i += kLanes) {
      const vec scaled = ((n - i >= kLanes ? load(x + i) : load_first(x + i, n - i)) - splat(top)) / splat(temperature);
      store(weight_ + i, exp(scaled));
      store(place + i, max(scaled * splat(kPerUnit), splat(1.0f - kBuckets)));
    }
    std::fill_n(mass_, kBuckets, 0.0);
    std::fill_n(count_, kBuckets, 0);
    for (int64_t i = 0; i < n; i++) {
      if (weight_[i] < min_p) weight_[i] = 0.0f;
      const int32_t bucket = int32_t(-place[i]);
      bucket_[i] = uint16_t(bucket);
      mass_[bucket] += weight_[i];
      count_[bucket]++;
    }
    std::fill(bucket_ + n, bucket_ + room, uint16_t(kBuckets));
    for (int64_t b = 1; b < kBuckets; b++) mass_[b] += mass_[b - 1], count_[b] += count_[b - 1];
  }

  Place everything() const {
    const double total = mass_[kBuckets - 1];
    return {std::lower_bound(mass_, mass_ + kBuckets, total) - mass_, total};
  }

  Place first(int64_t count) {  // after the `count` likeliest
    const int64_t bucket = std::lower_bound(count_, count_ + kBuckets, count) - count_;
    if (bucket == kBuckets) return everything();
    sort(bucket);
    return {bucket, inside_[count - (bucket ? count_[bucket - 1] : 0) - 1]};
  }

  Place reaching(double mass, Place within) {  // after the first token with which the weight so far is that much
    const int64_t bucket = std::min<int64_t>(std::lower_bound(mass_, mass_ + kBuckets, mass) - mass_, within.bucket);
    sort(bucket);
    const int64_t at = std::min<int64_t>(std::lower_bound(inside_, inside_ + sorted_, mass) - inside_, sorted_ - 1);
    return {bucket, std::min(inside_[at], within.mass)};
  }

  int64_t at(double mass, Place kept) {  // over whose share of [0, kept.mass) it lies; rounding leads past no cut, nor to weight 0
    const int64_t bucket = std::min<int64_t>(std::upper_bound(mass_, mass_ + kBuckets, mass) - mass_, kept.bucket);
    sort(bucket);
    double* const end = inside_ + sorted_;
    const int64_t last = std::lower_bound(inside_, end, std::min(kept.mass, inside_[sorted_ - 1])) - inside_;
    return ids_[std::min<int64_t>(std::upper_bound(inside_, end, mass) - inside_, last)];
  }

 private:
  void sort(int64_t place) {  // its ids in order, and the weight up to and including each
    const uint16_t bucket = uint16_t(place);
    const int64_t wanted = count_[bucket] - (bucket ? count_[bucket - 1] : 0);
    int64_t found = 0;
    for (int64_t i = 0; found < wanted; i += kScan) {
      bool any = false;
      for (int64_t j = i; j < i + kScan; j++) any |= bucket_[j] == bucket;
      for (int64_t j = i; any && j < i + kScan; j++)
        if (bucket_[j] == bucket) ids_[found++] = int32_t(j);
    }
    std::sort(ids_, ids_ + found, [&](int32_t a, int32_t b) { return x_[a] != x_[b] ? x_[a] > x_[b] : a < b; });
    double mass = bucket ? mass_[bucket - 1] : 0.0;
    for (int64_t i = 0; i < found; i++) inside_[i] = mass += weight_[ids_[i]];
    sorted_ = found;
  }

  const float* x_;
  int64_t n_, sorted_ = 0;
  float* weight_;
  uint16_t* bucket_;
  double *mass_, *inside_;
  int64_t* count_;
  int32_t* ids_;
};

struct Top {
  float value;
  int64_t id;  // the first that has it, -1 if something is NaN or inf, or nothing finite
};

Top highest(const float* x, int64_t n) {
  constexpr int64_t kPart = 64 * kLanes;
  vec broken = zero();
  float top = -INFINITY;
  int64_t part = 0;
  for (int64_t begin = 0; begin < n; begin += kPart) {
    const int64_t end = std::min(n, begin + kPart);
    vec most = splat(-INFINITY);
    for (int64_t i = begin; i < end; i += kLanes) {
      const vec at = end - i >= kLanes ? load(x + i) : first_lanes(load_first(x + i, end - i), end - i);
      most = max(at, most);                                            // `most` if a lane is NaN
      broken = fma(max(splat(-FLT_MAX), at), zero(), broken);          // the lane itself if it is NaN
    }
    if (max_lane(most) > top) top = max_lane(most), part = begin;
  }
  if (!(sum(broken) == 0.0f) || top == -INFINITY) return {top, -1};
  return {top, std::find(x + part, x + n, top) - x};
}

int64_t sample_row(const float* x, int64_t n, const double* how) {
  const Top top = highest(x, n);
  const double temperature = how[0], top_k = how[1], top_p = how[2], min_p = how[3], number = how[4];
  if (top.id < 0 || temperature == 0.0) return top.id;
  SortedRow row(x, n, top.value, float(temperature), float(min_p));
  Place kept = top_k > 0.0 ? row.first(int64_t(std::min(top_k, double(n)))) : row.everything();
  if (top_p < 1.0) kept = row.reaching(top_p * kept.mass, kept);
  return row.at(number * kept.mass, kept);
}

class AllowedTokens {
 public:
  AllowedTokens(const float* x, int64_t n, const uint32_t* bits) {
    for (Cut cut(nullptr);; cut = Cut(allowed_arena.reserve(cut.used()))) {
      values_ = cut.take<float>(n + kLanes);
      ids_ = cut.take<int32_t>(n + kLanes);
      if (values_ != nullptr) break;
    }
    for (int64_t begin = 0; begin < n; begin += kWord) {
      const uint32_t word = bits[begin / kWord];
      if (n - begin < kWord) take(x, begin, word & ((1u << (n - begin)) - 1));
      else if (word != 0) take_whole(x, begin, word);
    }
  }

  int64_t draw(const double* how) const {
    const int64_t at = count_ ? sample_row(values_, count_, how) : -1;
    return at < 0 ? at : ids_[at];
  }

 private:
  static constexpr int64_t kWord = 32;

  void take(const float* x, int64_t begin, uint32_t word) {
    for (; word != 0; word &= word - 1) {
      const int64_t id = begin + __builtin_ctz(word);
      values_[count_] = x[id], ids_[count_++] = int32_t(id);
    }
  }

  void take_whole(const float* x, int64_t begin, uint32_t word) {  // a word all of whose tokens there are
#ifdef KVLOOM_AVX512
    const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    for (int64_t id = begin; id < begin + kWord; id += kLanes, word >>= kLanes) {
      const __mmask16 these = __mmask16(word);
      _mm512_storeu_ps(values_ + count_, _mm512_maskz_compress_ps(these, load(x + id)));
      _mm512_storeu_si512(ids_ + count_, _mm512_maskz_compress_epi32(these, _mm512_add_epi32(lanes, _mm512_set1_epi32(int32_t(id)))));
      count_ += __builtin_popcount(these);
    }
#else
    take(x, begin, word);
#endif
  }

  float* values_;
  int32_t* ids_;
  int64_t count_ = 0;
};

}  // namespace
}  // namespace kvloom

KVLOOM_API void kvloom_sample(const kvloom::SampleArgs* a) {
  kvloom::parallel(kvloom::threads_for(a->rows * a->vocab, a->threads), a->rows, [&](int64_t row) {
    const float* x = a->logits + row * a->logits_row;
    const double* how = a->how + 5 * row;
    const int64_t mask = a->mask == nullptr ? -1 : a->mask[row];
    a->out[row] = mask < 0 ? kvloom::sample_row(x, a->vocab, how)
                           : kvloom::AllowedTokens(x, a->vocab, a->bits + mask * a->bits_row).draw(how);
  });
}
