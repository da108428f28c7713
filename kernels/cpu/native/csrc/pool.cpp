// From raw logits to a ranking per group of query heads: softmax per head, heads combined, running maximum over columns.
//
// A row and group is the work of one thread, head after head, so no sum depends on how many there are.

#include <algorithm>

#include "abi.h"
#include "parallel.h"
#include "scratch.h"
#include "tile.h"

namespace kvloom {
namespace {

thread_local Arena pool_arena;

// x[at, at + 16) of n elements; -inf past the end.
inline vec candidates(const float* x, int64_t at, int64_t n) {
  return n - at >= kLanes ? load(x + at) : first_lanes(load_first(x + at, n - at), n - at);
}

// weights[0, n rounded up to 16) = exp(x - maximum), 0 past n. Returns the inverse of their sum, 0 if nothing is finite.
float weigh(const float* x, int64_t n, float* weights) {
  vec top = splat(-INFINITY), total = zero();
  for (int64_t i = 0; i < n; i += kLanes) top = max(candidates(x, i, n), top);
  const float peak = max_lane(top), shift = peak == -INFINITY ? 0.0f : peak * kLog2E;
  for (int64_t i = 0; i < n; i += kLanes) {
    const vec weight = exp2(fma(candidates(x, i, n), splat(kLog2E), splat(-shift)));
    store(weights + i, weight);
    total = total + weight;
  }
  const float all = sum(total);
  return all == 0.0f ? 0.0f : 1.0f / all;
}

// to[i] = sum or maximum over heads of inverse[h] * weights[h][i]
template <bool Maximum> void combine(const float* weights, int64_t stride, const float* inverse, int64_t heads, float* to) {
  for (int64_t i = 0; i < stride; i += kLanes) {
    vec all = load(weights + i) * splat(inverse[0]);
    for (int64_t h = 1; h < heads; h++) {
      const vec x = load(weights + h * stride + i), share = splat(inverse[h]);
      all = Maximum ? max(all, x * share) : fma(x, share, all);
    }
    store(to + i, all);
  }
}

// x[i] = maximum of x[i, i + window) for the first n; by doubling: stretches of 1, 2, 4, .. and two that overlap.
// x: readable and writable up to n + 2 window + 16.
void dilate(float* x, int64_t n, int64_t window) {
  int64_t span = 1;
  for (; 2 * span <= window; span *= 2)
    for (int64_t i = 0; i < n + window; i += kLanes) store(x + i, max(load(x + i), load(x + i + span)));
  if (span < window)
    for (int64_t i = 0; i < n; i += kLanes) store(x + i, max(load(x + i), load(x + i + window - span)));
}

void pool_group(const PoolArgs& a, int64_t row, int64_t group) {
  const int64_t n = int64_t(a.last[row]) - a.first[row], heads = a.q_heads / a.groups, half = a.window / 2;
  if (n <= 0 || (a.active && a.active[row] < 0)) return;
  const int64_t stride = (n + kLanes - 1) / kLanes * kLanes, margin = a.window > 1 ? (half + kLanes - 1) / kLanes * kLanes : 0;
  const int64_t room = margin + stride + 2 * a.window + 2 * kLanes;
  float *weights, *inverse, *ranks;
  for (Cut cut(nullptr);; cut = Cut(pool_arena.reserve(cut.used()))) {
    ranks = cut.take<float>(room);  // candidates behind a margin of zeros: shares are never below
    inverse = cut.take<float>(heads);
    weights = cut.take<float>(heads * stride);
    if (ranks != nullptr) break;
  }
  const float* x = a.logits + row * a.logits_row + group * heads * a.logits_head + a.first[row];
  for (int64_t h = 0; h < heads; h++) inverse[h] = weigh(x + h * a.logits_head, n, weights + h * stride);
  if (a.maximum) combine<true>(weights, stride, inverse, heads, ranks + margin);
  else combine<false>(weights, stride, inverse, heads, ranks + margin);
  if (a.window > 1) {
    std::fill(ranks, ranks + margin, 0.0f);
    std::fill(ranks + margin + stride, ranks + room, 0.0f);
    dilate(ranks + margin - half, n, a.window);
  }
  std::copy_n(ranks + margin - half, n, a.out + row * a.out_row + group * a.out_group);
}

}  // namespace
}  // namespace kvloom

KVLOOM_API void kvloom_pool(const kvloom::PoolArgs* args) {
  int64_t elements = 0;
  for (int64_t r = 0; r < args->rows; r++)
    if (!args->active || args->active[r] >= 0) elements += int64_t(std::max(0, args->last[r] - args->first[r])) * args->q_heads;
  kvloom::parallel(kvloom::threads_for(elements, args->threads), args->rows * args->groups,
                   [&](int64_t i) { kvloom::pool_group(*args, i / args->groups, i % args->groups); });
}
