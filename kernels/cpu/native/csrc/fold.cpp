// Sums of keys and values that leave what rows see: per record and KV head one sum of each, which one thread adds to.

#include <algorithm>

#include "abi.h"
#include "dispatch.h"
#include "parallel.h"

namespace kvloom {
namespace {

// Adds positions [first, last) of one head. A block's are added up by themselves: what is folded block by block has the bits
// of what is folded at once.
template <class T> void fold(const FoldArgs& a, const Paged& cache, int64_t row, int64_t head, float* to) {
  const int64_t size = a.block_size, dim = a.head_dim, last = a.last[row];
  const int32_t* table = a.tables + a.request[row] * a.table_stride;
  if (a.first[row] <= a.origin) std::fill_n(to, dim, 0.0f);
  for (int64_t position = a.first[row]; position < last;) {
    const int64_t block = position / size, end = std::min(last, (block + 1) * size);
    const T* from = static_cast<const T*>(cache.data) + table[block] * cache.block + head * cache.head;
    from += (position - block * size) * cache.slot;
    for (int64_t d = 0; d < dim; d += kLanes) {
      const int64_t lanes = std::min<int64_t>(kLanes, dim - d);
      vec sum = zero();
      for (int64_t i = 0; i < end - position; i++) {
        const T* at = from + i * cache.slot + d;
        sum = sum + (lanes == kLanes ? load(at) : load_first(at, lanes));
      }
      if (lanes == kLanes) store(to + d, load(to + d) + sum);
      else store_first(to + d, load_first(to + d, lanes) + sum, lanes);
    }
    position = end;
  }
}

template <class T> void fold(const FoldArgs& a) {
  const int64_t heads = a.kv_heads, sums = 2 * heads;  // of K, then of V
  int64_t positions = 0;
  for (int64_t row = 0; row < a.rows; row++)
    if (a.at[row] >= 0) positions += a.last[row] - a.first[row];
  parallel(threads_for(positions * sums * a.head_dim, a.threads), a.rows * sums, [&](int64_t i) {
    const int64_t row = i / sums, which = i % sums;
    if (a.at[row] < 0) return;
    fold<T>(a, which < heads ? a.k : a.v, row, which % heads, a.sums + a.at[row] + which * a.head_dim);
  });
}

}  // namespace
}  // namespace kvloom

KVLOOM_API void kvloom_fold(const kvloom::FoldArgs* args) {
  kvloom::with_dtype(args->dtype, [&](auto t) { kvloom::fold<decltype(t)>(*args); });
}
