// Merging two attention states over disjoint positions.

#include <algorithm>

#include "abi.h"
#include "dispatch.h"
#include "parallel.h"

namespace kvloom {
namespace {

template <class T> void merge(const MergeArgs& a) {
  const int64_t heads = a.heads, dim = a.head_dim;
  auto one = [&](int64_t i) {
    const int64_t r = i / heads, h = i % heads;
    float* lse_a = a.lse_a + r * a.lse_a_row + h;
    const float lse_b = a.lse_b[r * a.lse_b_row + h];
    if (lse_b == -INFINITY) return;
    T* to = static_cast<T*>(a.out_a) + r * a.a_row + h * a.a_head;
    const T* from = static_cast<const T*>(a.out_b) + r * a.b_row + h * a.b_head;
    if (*lse_a == -INFINITY) {
      std::copy_n(from, dim, to);
      *lse_a = lse_b;
      return;
    }
    const float top = std::max(*lse_a, lse_b);
    const float ea = std::exp(*lse_a - top), eb = std::exp(lse_b - top), wa = ea / (ea + eb), wb = eb / (ea + eb);
    for (int64_t d = 0; d < dim; d++) to[d] = from_float<T>(to_float(to[d]) * wa + to_float(from[d]) * wb);
    *lse_a = top + std::log(ea + eb);
  };
  parallel_rows(threads_for(a.rows * heads * dim, a.threads), a.rows * heads, [&](int64_t i, int64_t end) {
    for (; i < end; i++) one(i);
  });
}

}  // namespace
}  // namespace kvloom

KVLOOM_API void kvloom_merge(const kvloom::MergeArgs* args) {
  kvloom::with_dtype(args->dtype, [&](auto t) { kvloom::merge<decltype(t)>(*args); });
}
