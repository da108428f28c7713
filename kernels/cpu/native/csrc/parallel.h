// Work of one call spread over threads of our own.
//
// A call is cut into items, which threads take one by one; the caller takes them too, and waits only for items that
// others have begun: a thread whose core somebody else has taken delays a call by the item that it is in. Who waits looks
// for some microseconds and then sleeps: on an idle core the kernel then puts the thread that is waited for. Which thread
// takes an item never shows in a result.
#pragma once

#include <algorithm>
#include <cstdint>

namespace kvloom {

constexpr int64_t kMostItems = 60000;  // of one call

// body(context, item) for every item in [0, items), on at most `threads` threads, the calling one among them. Returns when
// all are done. A call from within an item, or beside another thread's with as many threads, is done by its own thread alone.
void run_items(int threads, int64_t items, void (*body)(void*, int64_t), void* context) noexcept;

template <class F> void parallel(int threads, int64_t items, F f) {
  if (threads < 2 || items < 2) {
    for (int64_t i = 0; i < items; i++) f(i);
    return;
  }
  const int64_t each = (items + kMostItems - 1) / kMostItems;
  auto body = [&](int64_t item) {
    for (int64_t i = item * each, end = std::min(items, i + each); i < end; i++) f(i);
  };
  using Body = decltype(body);
  run_items(threads, (items + each - 1) / each, [](void* context, int64_t item) { (*static_cast<Body*>(context))(item); }, &body);
}

// f(row, end) for stretches of [0, rows), about eight for each thread.
template <class F> void parallel_rows(int threads, int64_t rows, F f) {
  if (threads < 2) return f(0, rows);
  const int64_t each = std::max<int64_t>(1, rows / (int64_t(threads) * 8));
  parallel(threads, (rows + each - 1) / each, [&](int64_t i) { f(i * each, std::min(rows, (i + 1) * each)); });
}

}  // namespace kvloom
