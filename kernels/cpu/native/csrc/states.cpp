// Operations on attention results: merge of two states, deterministic top-k of scores.

#include <algorithm>

#include "abi.h"
#include "dispatch.h"

namespace kvloom {
namespace {

template <class T> void merge(const MergeArgs& a) {
  const int64_t heads = a.heads, dim = a.head_dim;
#pragma omp parallel for schedule(static) num_threads(threads_for(a.rows * heads * dim, a.threads))
  for (int64_t i = 0; i < a.rows * heads; i++) {
    const int64_t r = i / heads, h = i % heads;
    float* lse_a = a.lse_a + r * a.lse_a_row + h;
    const float lse_b = a.lse_b[r * a.lse_b_row + h];
    if (lse_b == -INFINITY) continue;
    T* to = static_cast<T*>(a.out_a) + r * a.a_row + h * a.a_head;
    const T* from = static_cast<const T*>(a.out_b) + r * a.b_row + h * a.b_head;
    if (*lse_a == -INFINITY) {
      std::copy_n(from, dim, to);
      *lse_a = lse_b;
      continue;
    }
    const float top = std::max(*lse_a, lse_b);
    const float ea = std::exp(*lse_a - top), eb = std::exp(lse_b - top), wa = ea / (ea + eb), wb = eb / (ea + eb);
    for (int64_t d = 0; d < dim; d++) to[d] = from_float<T>(to_float(to[d]) * wa + to_float(from[d]) * wb);
    *lse_a = top + std::log(ea + eb);
  }
}

// An unsigned number that orders as the float does. Both zeros are one; adding +0 makes them so.
inline uint32_t order_key(float x) {
  const uint32_t bits = float_to_bits(x + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// The k-th largest key of n, 1 <= k <= n, by radix: eleven, eleven and ten bits. `ties`: how many of the equal ones count.
uint32_t kth_largest(const float* scores, int64_t n, int64_t k, int64_t* ties) {
  static const int shifts[] = {21, 10, 0}, widths[] = {11, 11, 10};
  uint32_t prefix = 0, mask = 0;
  for (int pass = 0; pass < 3; pass++) {
    int32_t counts[2048] = {};
    const uint32_t digits = (1u << widths[pass]) - 1;
    for (int64_t i = 0; i < n; i++) {
      const uint32_t key = order_key(scores[i]);
      counts[(key >> shifts[pass]) & digits] += (key & mask) == prefix;
    }
    uint32_t digit = digits;
    while (counts[digit] < k) k -= counts[digit--];
    prefix |= digit << shifts[pass];
    mask |= digits << shifts[pass];
  }
  *ties = k;
  return prefix;
}

void select_row(const float* scores, int64_t n, int64_t k, int32_t* columns) {
  int64_t kept = 0;
  if (n <= k) {
    for (; kept < n; kept++) columns[kept] = int32_t(kept);
  } else if (k > 0) {
    int64_t ties;
    const uint32_t least = kth_largest(scores, n, k, &ties);
    for (int64_t i = 0; kept < k; i++) {
      const uint32_t key = order_key(scores[i]);
      if (key > least || (key == least && ties-- > 0)) columns[kept++] = int32_t(i);
    }
  }
  std::fill(columns + kept, columns + k, -1);
}

}  // namespace
}  // namespace kvloom

KVLOOM_API void kvloom_merge(const kvloom::MergeArgs* args) {
  kvloom::with_dtype(args->dtype, [&](auto t) { kvloom::merge<decltype(t)>(*args); });
}

KVLOOM_API void kvloom_select(const kvloom::SelectArgs* args) {
  const int64_t rows = args->rows, k = args->k;
#pragma omp parallel for schedule(dynamic, 1) num_threads(rows > 1 ? args->threads : 1)
  for (int64_t r = 0; r < rows; r++) {
    const int64_t n = std::max(0, args->lengths[r]);
    kvloom::select_row(args->scores + r * args->scores_row, n, k, args->columns + r * k);
    args->counts[r] = int32_t(std::min(n, k));
  }
}
