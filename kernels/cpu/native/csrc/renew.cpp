// Which rows make their lists anew, and what is kept of those that do. Too little work for more than one thread.

#include <algorithm>
#include <cmath>
#include <limits>

#include "abi.h"
#include "dispatch.h"
#include "scratch.h"

namespace kvloom {
namespace {

thread_local Arena query_arena;

enum Compare { kNothing, kMean, kMin, kFlat };

// All heads of a row's query in fp32, turned back to position 0 if angles are given.
template <class T> void turned_back(const RenewArgs& a, int64_t row, float* to) {
  const int64_t dim = a.head_dim, half = a.rotary / 2;
  for (int64_t h = 0; h < a.q_heads; h++, to += dim) {
    widen(static_cast<const T*>(a.q) + row * a.q_row + h * a.q_head, dim, to);
    if (!a.cos) continue;
    const float *cos = a.cos + row * half, *sin = a.sin + row * half;
    for (int64_t i = 0; i < half; i++) {
      const float x = to[i], y = to[i + half];
      to[i] = x * cos[i] + y * sin[i], to[i + half] = y * cos[i] - x * sin[i];
    }
  }
}

// What is compared of a query [q_heads, head_dim], in its place. Returns how many floats it is.
int64_t summarise(const RenewArgs& a, float* q) {
  const int64_t dim = a.head_dim, heads = a.q_heads;
  if (a.compare != kMean) return heads * dim;
  for (int64_t i = 0; i < dim; i++) {
    float all = 0;
    for (int64_t h = 0; h < heads; h++) all += q[h * dim + i];
    q[i] = all / float(heads);
  }
  return dim;
}

double cosine(const float* x, const float* y, int64_t n) {
  double xy = 0, xx = 0, yy = 0;
  for (int64_t i = 0; i < n; i++) {
    const double a = x[i], b = y[i];
    xy += a * b, xx += a * a, yy += b * b;
  }
  return xy / std::max(std::sqrt(xx * yy), double(std::numeric_limits<float>::min()));
}

// The least cosine of a query's parts and those that were kept.
double likeness(const RenewArgs& a, const float* q, const float* kept, int64_t size) {
  if (a.compare != kMin) return cosine(q, kept, size);
  double least = INFINITY;
  for (int64_t at = 0; at < size; at += a.head_dim) least = std::min(least, cosine(q + at, kept + at, a.head_dim));
  return least;
}

template <class T> bool renews(const RenewArgs& a, int64_t row) {
  int32_t* tail = a.words + a.at[row] + a.tail_at;
  auto* kept = reinterpret_cast<float*>(a.words + a.at[row] + a.query_at);
  const int64_t stop = a.stop[row];
  const bool have = *tail < stop;
  bool anew = a.due[row] == 1 || !have || stop - *tail - a.recent > a.most;
  if (a.compare != kNothing && (anew || a.due[row] == 2)) {
    auto* q = static_cast<float*>(query_arena.reserve(int64_t(a.q_heads) * a.head_dim * int64_t(sizeof(float))));
    turned_back<T>(a, row, q);
    const int64_t size = summarise(a, q);
    anew = anew || likeness(a, q, kept, size) < a.threshold;
    if (anew) std::copy_n(q, size, kept);
  }
  if (anew) *tail = int32_t(stop - a.recent);
  a.counts[0] += anew, a.counts[1] += anew && have, a.counts[2] += !anew;
  a.start[row] = *tail;
  return anew;
}

template <class T> void renew(const RenewArgs& a) {
  for (int64_t row = 0; row < a.rows; row++) {
    if (a.at[row] < 0) {
      a.active[row] = -1, a.start[row] = 0;
      std::fill_n(a.lengths + row * a.lists, a.lists, 0);
      continue;
    }
    const bool anew = renews<T>(a, row);
    a.active[row] = anew ? a.at[row] : -1;
    const bool all = anew && a.dense;
    if (all) a.start[row] = 0;
    std::fill_n(a.lengths + row * a.lists, a.lists, all ? 0 : a.width);
  }
}

}  // namespace
}  // namespace kvloom

KVLOOM_API void kvloom_renew(const kvloom::RenewArgs* args) {
  kvloom::with_dtype(args->dtype, [&](auto t) { kvloom::renew<decltype(t)>(*args); });
}
