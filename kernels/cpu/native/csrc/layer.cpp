// Element-wise operations of a decoder layer: norms, rotary positions, cache writes, the gated activation.
// All arithmetic is fp32 and is rounded once, where a value leaves for memory.

#include <algorithm>
#include <vector>

#include "abi.h"
#include "dispatch.h"
#include "parallel.h"
#include "scratch.h"

namespace kvloom {
namespace {

thread_local Arena row_arena, weight_arena;

float* row_scratch(int64_t floats) { return static_cast<float*>(row_arena.reserve(floats * int64_t(sizeof(float)))); }

template <class F> void each_row(int64_t rows, int threads, F f) {
  parallel_rows(threads, rows, [&](int64_t r, int64_t end) {
    for (; r < end; r++) f(r);
  });
}

// fp32 copy of a norm's weights, or the weights themselves. Lives until the calling thread's next use.
const float* wide_weight(const void* weight, int32_t dtype, int64_t n, int64_t offset = 0) {
  if (!weight || dtype == kF32) return static_cast<const float*>(weight);
  auto* wide = static_cast<float*>(weight_arena.reserve(4 * n * int64_t(sizeof(float)))) + offset;
  with_dtype(dtype, [&](auto t) { widen(static_cast<const decltype(t)*>(weight), n, wide); });
  return wide;
}

float inverse_rms(const float* x, int64_t n, float eps) {
  vec squares = zero();
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) squares = fma(load(x + i), load(x + i), squares);
  float total = sum(squares);
  for (; i < n; i++) total += x[i] * x[i];
  return 1.0f / std::sqrt(total / float(n) + eps);
}

void scale_by(const float* x, const float* weight, float factor, int64_t n, float* to) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(to + i, load(x + i) * splat(factor) * load(weight + i));
  for (; i < n; i++) to[i] = x[i] * factor * weight[i];
}

template <class X, class T> void add_rms_norm(const NormArgs& a) {
  const float* weight = wide_weight(a.weight, a.weight_dtype, a.hidden);
  each_row(a.rows, threads_for(a.rows * a.hidden, a.threads), [&](int64_t r) {
    float* wide = row_scratch(2 * a.hidden);
    X* x = static_cast<X*>(a.x) + r * a.x_row;
    widen(x, a.hidden, wide);
    if (a.delta) {
      float* delta = wide + a.hidden;
      widen(static_cast<const T*>(a.delta) + r * a.delta_row, a.hidden, delta);
      for (int64_t i = 0; i < a.hidden; i++) wide[i] += delta[i];
      narrow(wide, a.hidden, x);
      if (sizeof(X) < 4) widen(x, a.hidden, wide);  // the norm sees the residual stream as stored
    }
    scale_by(wide, weight, inverse_rms(wide, a.hidden, a.eps), a.hidden, wide);
    narrow(wide, a.hidden, static_cast<T*>(a.out) + r * a.out_row);
  });
}

// Turns pairs (i, i + half) by angles given as cosines and sines.
void turn(float* x, const float* cos, const float* sin, int64_t half) {
  int64_t i = 0;
  for (; i + kLanes <= half; i += kLanes) {
    const vec a = load(x + i), b = load(x + half + i), c = load(cos + i), s = load(sin + i);
    store(x + i, a * c - b * s);
    store(x + half + i, b * c + a * s);
  }
  for (; i < half; i++) {
    const float a = x[i], b = x[half + i];
    x[i] = a * cos[i] - b * sin[i];
    x[half + i] = b * cos[i] + a * sin[i];
  }
}

template <class T> T* slot_row(const Paged& cache, int64_t block_size, int64_t slot, int64_t head) {
  const int64_t block = slot / block_size;
  return static_cast<T*>(cache.data) + block * cache.block + head * cache.head + (slot - block * block_size) * cache.slot;
}

template <class T> void rotate_store(const RotateStoreArgs& a) {
  const float* q_norm = wide_weight(a.q_norm, a.norm_dtype, a.head_dim);
  const float* k_norm = wide_weight(a.k_norm, a.norm_dtype, a.head_dim, a.head_dim);
  const int64_t dim = a.head_dim, heads = a.q_heads + 2 * int64_t(a.kv_heads);
  each_row(a.rows, threads_for(a.rows * heads * dim, a.threads), [&](int64_t r) {
    float* x = row_scratch(dim);
    const T* from = static_cast<const T*>(a.qkv) + r * a.qkv_row;
    const float *cos = a.cos + a.positions[r] * a.angle_row, *sin = a.sin + a.positions[r] * a.angle_row;
    auto turned = [&](const T* head, const float* norm, T* to) {
      widen(head, dim, x);
      if (norm) scale_by(x, norm, inverse_rms(x, dim, a.eps), dim, x);
      turn(x, cos, sin, a.rotary / 2);
      narrow(x, dim, to);
    };
    for (int64_t h = 0; h < a.q_heads; h++)
      turned(from + h * dim, q_norm, static_cast<T*>(a.q) + r * a.q_row + h * a.q_head);
    if (a.slots[r] < 0) return;
    for (int64_t h = 0; h < a.kv_heads; h++) {
      turned(from + (a.q_heads + h) * dim, k_norm, slot_row<T>(a.k, a.block_size, a.slots[r], h));
      std::copy_n(from + (a.q_heads + a.kv_heads + h) * dim, dim, slot_row<T>(a.v, a.block_size, a.slots[r], h));
    }
  });
}

template <class T> void rotate(const RotateArgs& a) {
  const int64_t dim = a.head_dim, half = a.rotary / 2;
  parallel_rows(threads_for(a.rows * a.heads * dim, a.threads), a.rows, [&](int64_t r, int64_t end) {
    float* x = row_scratch(dim + a.rotary);
    float *cos = x + dim, *sin = cos + half;
    int64_t turned_by = INT64_MIN;  // neighbours mostly move by the same distance
    for (; r < end; r++) {
      if (a.delta[r] != turned_by) {
        turned_by = a.delta[r];
        for (int64_t i = 0; i < half; i++) {
          const double angle = double(a.delta[r]) * a.inv_freq[i];  // a long shift must not lose its phase
          cos[i] = float(std::cos(angle)), sin[i] = float(std::sin(angle));
        }
      }
      for (int64_t h = 0; h < a.heads; h++) {
        widen(static_cast<const T*>(a.k) + r * a.k_row + h * a.k_head, dim, x);
        turn(x, cos, sin, half);
        narrow(x, dim, static_cast<T*>(a.out) + r * a.out_row + h * a.out_head);
      }
    }
  });
}

void store_rows(const StoreArgs& a) {
  const int64_t bytes = a.row_bytes_per_head, item = a.item_bytes;
  auto cache_row = [&](const Paged& cache, int64_t slot, int64_t head) {
    const int64_t block = slot / a.block_size;
    const int64_t at = block * cache.block + head * cache.head + (slot - block * a.block_size) * cache.slot;
    return static_cast<char*>(cache.data) + at * item;
  };
  each_row(a.rows, threads_for(a.rows * a.heads * bytes, a.threads), [&](int64_t r) {
    if (a.slots[r] < 0) return;
    for (int64_t h = 0; h < a.heads; h++) {
      const char* k = static_cast<const char*>(a.k) + (r * a.k_row + h * a.k_head) * item;
      const char* v = static_cast<const char*>(a.v) + (r * a.v_row + h * a.v_head) * item;
      std::memcpy(cache_row(a.k_cache, a.slots[r], h), k, size_t(bytes));
      std::memcpy(cache_row(a.v_cache, a.slots[r], h), v, size_t(bytes));
    }
  });
}

template <class T> void silu_mul(const SiluArgs& a) {
  const int64_t n = a.intermediate;
  each_row(a.rows, threads_for(a.rows * n, a.threads), [&](int64_t r) {
    const T *gate = static_cast<const T*>(a.gate_up) + r * a.in_row, *up = gate + n;
    T* to = static_cast<T*>(a.out) + r * a.out_row;
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store(to + i, silu(load(gate + i)) * load(up + i));
    if (i < n) store_first(to + i, silu(load_first(gate + i, n - i)) * load_first(up + i, n - i), n - i);
  });
}

}  // namespace
}  // namespace kvloom

KVLOOM_API void kvloom_add_rms_norm(const kvloom::NormArgs* args) {
  kvloom::with_dtype(args->dtype, [&](auto t) {
    if (args->x_dtype == kvloom::kF32) kvloom::add_rms_norm<float, decltype(t)>(*args);
    else kvloom::add_rms_norm<decltype(t), decltype(t)>(*args);
  });
}

KVLOOM_API void kvloom_rotate_store(const kvloom::RotateStoreArgs* args) {
  kvloom::with_dtype(args->dtype, [&](auto t) { kvloom::rotate_store<decltype(t)>(*args); });
}

KVLOOM_API void kvloom_rotate(const kvloom::RotateArgs* args) {
  kvloom::with_dtype(args->dtype, [&](auto t) { kvloom::rotate<decltype(t)>(*args); });
}

KVLOOM_API void kvloom_store(const kvloom::StoreArgs* args) { kvloom::store_rows(*args); }

KVLOOM_API void kvloom_silu_mul(const kvloom::SiluArgs* args) {
  kvloom::with_dtype(args->dtype, [&](auto t) { kvloom::silu_mul<decltype(t)>(*args); });
}
