#include "parallel.h"

#include <pthread.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

namespace kvloom {
namespace {

inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Whether `met` became true within a while that is long beside the gap between two calls of a step, and short beside a
// time slice.
template <class F> bool soon(std::chrono::microseconds limit, F met) {
  const auto end = std::chrono::steady_clock::now() + limit;
  do {
    for (int i = 0; i < 32; i++) {
      if (met()) return true;
      pause();
    }
  } while (std::chrono::steady_clock::now() < end);
  return met();
}

constexpr std::chrono::microseconds kForWork{150}, kForOthers{20};

// The threads beside the calling one. One word says which call runs, how many items it has and which is next: taking an
// item is one compare-and-swap of it, which fails for a thread that slept through the end of its call.
class Pool {
 public:
  explicit Pool(int helpers) {
    try {
      for (int i = 0; i < helpers; i++) std::thread([this] { help(); }).detach();  // for the life of the process
    } catch (const std::system_error&) {  // no more threads are to be had: those there are, and the caller, do the work
    }
  }

  // False, with nothing done, if another thread's call runs.
  bool run(int64_t items, void (*body)(void*, int64_t), void* context) {
    if (busy_.exchange(true, std::memory_order_acquire)) return false;
    body_.store(body, std::memory_order_relaxed);
    context_.store(context, std::memory_order_relaxed);
    done_.store(0, std::memory_order_relaxed);
    const uint64_t call = (ticket_.load(std::memory_order_relaxed) >> 32) + 1;
    ticket_.store(call << 32 | uint64_t(items) << 16);  // sequentially consistent, as is what sleepers do
    if (sleepers_.load()) {
      std::lock_guard<std::mutex> lock(mutex_);
      work_.notify_all();
    }
    take(uint32_t(call));
    const auto all = [&] { return done_.load() == items; };  // sequentially consistent, as waiting_ is
    if (!soon(kForOthers, all)) {
      std::unique_lock<std::mutex> lock(mutex_);
      waiting_.store(true);
      finished_.wait(lock, all);
      waiting_.store(false);
    }
    busy_.store(false, std::memory_order_release);
    return true;
  }

 private:
  // Items of this call until none is left to begin.
  void take(uint32_t call) {
    uint64_t ticket = ticket_.load();
    while (uint32_t(ticket >> 32) == call) {
      const uint64_t items = ticket >> 16 & 0xffff, item = ticket & 0xffff;
      if (item == items) return;
      if (!ticket_.compare_exchange_weak(ticket, ticket + 1)) continue;
      // The call cannot end before this item is done, so what it left here is still of this call.
      body_.load(std::memory_order_relaxed)(context_.load(std::memory_order_relaxed), int64_t(item));
      if (done_.fetch_add(1) + 1 == int64_t(items) && waiting_.load()) {
        std::lock_guard<std::mutex> lock(mutex_);
        finished_.notify_one();
      }
      ticket = ticket_.load();
    }
  }

  void help() {
    uint32_t seen = 0;
    const auto more = [&] { return uint32_t(ticket_.load() >> 32) != seen; };
    for (;;) {
      if (!soon(kForWork, more)) {
        std::unique_lock<std::mutex> lock(mutex_);
        sleepers_.fetch_add(1);
        work_.wait(lock, more);
        sleepers_.fetch_sub(1);
      }
      seen = uint32_t(ticket_.load() >> 32);
      take(seen);
    }
  }

  alignas(64) std::atomic<uint64_t> ticket_{0};  // call << 32 | items << 16 | next item
  alignas(64) std::atomic<int64_t> done_{0};
  alignas(64) std::atomic<void (*)(void*, int64_t)> body_{nullptr};
  std::atomic<void*> context_{nullptr};
  std::atomic<bool> busy_{false}, waiting_{false};
  std::atomic<int> sleepers_{0};
  std::mutex mutex_;
  std::condition_variable work_, finished_;
};

constexpr int kMostThreads = 1024;
std::mutex pools_mutex;
std::atomic<Pool*> pools[kMostThreads];  // by number of threads; almost always one is used

// Threads do not survive a fork: a child begins with none, and leaves its parent's pools where they are.
void forget_pools() {
  for (auto& pool : pools) pool.store(nullptr);
}
const int registered [[maybe_unused]] = pthread_atfork(
    [] { pools_mutex.lock(); }, [] { pools_mutex.unlock(); }, [] { pools_mutex.unlock(), forget_pools(); });

Pool* pool_of(int threads) {
  threads = std::min(threads, kMostThreads);
  std::atomic<Pool*>& found = pools[threads - 1];
  if (Pool* pool = found.load(std::memory_order_acquire)) return pool;
  std::lock_guard<std::mutex> lock(pools_mutex);
  if (!found.load()) found.store(new Pool(threads - 1), std::memory_order_release);
  return found.load();
}

}  // namespace

void run_items(int threads, int64_t items, void (*body)(void*, int64_t), void* context) noexcept {
  if (pool_of(threads)->run(items, body, context)) return;
  for (int64_t i = 0; i < items; i++) body(context, i);
}

}  // namespace kvloom
