// From a run-time element type to a compile-time one.
#pragma once

#include <type_traits>

#include "vec.h"

namespace kvloom {

template <class F> inline void with_dtype(int32_t dtype, F f) {
  switch (dtype) {
    case kBF16: return f(bf16{});
    case kF16: return f(f16{});
    default: return f(float{});
  }
}

template <class T> inline void widen(const T* from, int64_t n, float* to) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(to + i, load(from + i));
  for (; i < n; i++) to[i] = to_float(from[i]);
}

template <class T> inline void narrow(const float* from, int64_t n, T* to) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(to + i, load(from + i));
  for (; i < n; i++) to[i] = from_float<T>(from[i]);
}

// Forking costs about a microsecond; below this many elements one thread is as fast.
constexpr int64_t kForkElements = 1 << 15;
inline int threads_for(int64_t elements, int threads) { return elements < kForkElements ? 1 : threads; }

}  // namespace kvloom
