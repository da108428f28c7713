// Memory that a thread keeps between calls, so that no operation allocates once it has run at its size.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

namespace kvloom {

class Arena {
 public:
  ~Arena() { std::free(data_); }

  // Room for `bytes`, 64-byte aligned, contents unspecified. Everything handed out earlier becomes invalid.
  void* reserve(int64_t bytes) {
    if (bytes > size_) {
      std::free(data_);
      size_ = (bytes + bytes / 4 + 4095) / 4096 * 4096;
      data_ = std::aligned_alloc(4096, size_t(size_));
      if (!data_) { size_ = 0; throw std::bad_alloc(); }
    }
    return data_;
  }

 private:
  void* data_ = nullptr;
  int64_t size_ = 0;
};

// Cuts an arena's memory into aligned pieces. Made twice: once with no base, to learn the total, once to hand out.
class Cut {
 public:
  explicit Cut(void* base) : base_(reinterpret_cast<uintptr_t>(base)) {}
  template <class T> T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(base_ + used_);
    used_ += (count * int64_t(sizeof(T)) + 63) / 64 * 64;
    return piece;
  }
  int64_t used() const { return used_; }

 private:
  uintptr_t base_;  // a number: nothing may be added to a null pointer
  int64_t used_ = 0;
};

}  // namespace kvloom
