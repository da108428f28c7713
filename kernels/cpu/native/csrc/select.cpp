// Deterministic top-k of every row: ties go to the lower column, columns come out ascending.
//
// Scores become unsigned keys of the same order. A histogram of their upper eleven bits finds the bin that holds the k-th
// largest; only that bin's keys are looked at again, seven bits at a time. One last pass over all keys collects columns.

#include <algorithm>

#include "abi.h"
#include "dispatch.h"
#include "parallel.h"
#include "scratch.h"

namespace kvloom {
namespace {

thread_local Arena key_arena;

constexpr int kTop = 21, kDigit = 7;  // bits below the histogram's, in three digits

// Both zeros are one: adding +0 makes them so.
void order_keys(const float* scores, int64_t n, uint32_t* keys) {
  for (int64_t i = 0; i < n; i++) {
    const uint32_t bits = float_to_bits(scores[i] + 0.0f);
    keys[i] = bits ^ (uint32_t(int32_t(bits) >> 31) | 0x80000000u);
  }
}

// Copies the keys whose upper bits are `prefix`; returns how many. `to` may be `keys`.
int64_t keep_prefix(const uint32_t* keys, int64_t n, int shift, uint32_t prefix, uint32_t* to) {
  int64_t kept = 0, i = 0;
#ifdef KVLOOM_AVX512
  for (; i + kLanes <= n; i += kLanes) {
    const ivec key = _mm512_loadu_si512(keys + i);
    const __mmask16 same = _mm512_cmpeq_epi32_mask(_mm512_srl_epi32(key, _mm_cvtsi32_si128(shift)), _mm512_set1_epi32(int(prefix)));
    const int more = __builtin_popcount(same);
    _mm512_mask_storeu_epi32(to + kept, __mmask16((1u << more) - 1), _mm512_maskz_compress_epi32(same, key));
    kept += more;
  }
#endif
  for (; i < n; i++) {
    const uint32_t key = keys[i];
    to[kept] = key;
    kept += key >> shift == prefix;
  }
  return kept;
}

// The digit, from the top, under which the k-th largest falls; k becomes its rank there.
template <class Counts> uint32_t digit_of(Counts counts, uint32_t digits, int64_t* k) {
  uint32_t digit = digits - 1;
  for (int64_t here; (here = counts(digit)) < *k; digit--) *k -= here;
  return digit;
}

// The k-th largest of n keys, 1 <= k <= n, and how many of those equal to it count. close: [n] scratch.
uint32_t kth_largest(const uint32_t* keys, int64_t n, int64_t k, uint32_t* close, int64_t* ties) {
  constexpr uint32_t kBins = 1u << (32 - kTop), kDigits = 1u << kDigit;
  int32_t even[kBins] = {}, odd[kBins] = {};  // two, because neighbours often fall into one bin and would wait for each other
  int64_t i = 0;
  for (; i + 2 <= n; i += 2) even[keys[i] >> kTop]++, odd[keys[i + 1] >> kTop]++;
  if (i < n) even[keys[i] >> kTop]++;
  uint32_t prefix = digit_of([&](uint32_t d) { return int64_t(even[d]) + odd[d]; }, kBins, &k);
  n = keep_prefix(keys, n, kTop, prefix, close);
  for (int shift = kTop - kDigit; shift >= 0; shift -= kDigit) {
    int32_t counts[kDigits] = {};
    for (i = 0; i < n; i++) counts[(close[i] >> shift) & (kDigits - 1)]++;
    prefix = prefix << kDigit | digit_of([&](uint32_t d) { return int64_t(counts[d]); }, kDigits, &k);
    n = keep_prefix(close, n, shift, prefix, close);
  }
  *ties = k;
  return prefix;
}

// Columns whose key is above `least`, and the first `ties` of those equal to it.
void collect(const uint32_t* keys, int64_t n, uint32_t least, int64_t ties, int32_t offset, int32_t* columns) {
  int64_t i = 0;
#ifdef KVLOOM_AVX512
  const ivec limit = _mm512_set1_epi32(int(least));
  ivec column = _mm512_add_epi32(_mm512_set1_epi32(offset), _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
  for (; i + kLanes <= n; i += kLanes, column = _mm512_add_epi32(column, _mm512_set1_epi32(kLanes))) {
    const ivec key = _mm512_loadu_si512(keys + i);
    uint32_t keep = _mm512_cmpgt_epu32_mask(key, limit);
    for (uint32_t equal = _mm512_cmpeq_epu32_mask(key, limit); equal && ties; equal &= equal - 1, ties--) keep |= equal & -equal;
    const int more = __builtin_popcount(keep);
    _mm512_mask_storeu_epi32(columns, __mmask16((1u << more) - 1), _mm512_maskz_compress_epi32(__mmask16(keep), column));
    columns += more;
  }
#endif
  for (; i < n; i++) {
    if (keys[i] < least || (keys[i] == least && ties-- <= 0)) continue;
    *columns++ = int32_t(i) + offset;
  }
}

void select_row(const float* scores, int64_t n, int64_t k, int32_t offset, int32_t* columns) {
  const int64_t kept = std::min(n, k);
  if (n <= k) {
    for (int64_t i = 0; i < n; i++) columns[i] = int32_t(i) + offset;
  } else if (k > 0) {
    auto* keys = static_cast<uint32_t*>(key_arena.reserve(2 * n * int64_t(sizeof(uint32_t))));
    int64_t ties;
    order_keys(scores, n, keys);
    const uint32_t least = kth_largest(keys, n, k, keys + n, &ties);
    collect(keys, n, least, ties, offset, columns);
  }
  std::fill(columns + kept, columns + k, -1);
}

}  // namespace
}  // namespace kvloom

KVLOOM_API void kvloom_select(const kvloom::SelectArgs* args) {
  const int64_t k = args->k, heads = args->heads;
  int64_t elements = 0;
  for (int64_t r = 0; r < args->rows; r++) elements += !args->at || args->at[r] >= 0 ? args->lengths[r] * heads : 0;
  kvloom::parallel(kvloom::threads_for(elements, args->threads), args->rows * heads, [&](int64_t i) {
    const int64_t r = i / heads, h = i % heads, n = std::max(0, args->lengths[r]);
    if (args->at && args->at[r] < 0) return;
    const int32_t offset = args->offset ? args->offset[r] : 0;
    int32_t* columns = args->columns + (args->at ? args->at[r] : r * args->columns_row) + h * args->columns_head;
    kvloom::select_row(args->scores + r * args->scores_row + h * args->score_head, n, k, offset, columns);
    if (args->counts) args->counts[i] = int32_t(std::min(n, k));
  });
}
