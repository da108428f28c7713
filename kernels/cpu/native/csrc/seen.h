// Which positions a tile sees, and where their keys and values lie.
#pragma once

#include <algorithm>

#include "plan.h"

namespace kvloom {

// Addresses of a block's keys and values: `count` of them, the last repeated up to kBlock; nothing if count is 0.
template <class T> struct BlockRows {
  const T* rows[2 * kBlock];  // keys, then values
  int count;
  const T* const* k() const { return rows; }
  const T* const* v() const { return rows + kBlock; }
};

// Cache lines of rows that are read soon. Listed rows lie where no hardware prefetcher looks.
template <class T> inline void ask(const T* const* rows, int count, int64_t dim) {
  for (int j = 0; j < count; j++)
    for (int64_t d = 0; d < dim; d += 64 / int64_t(sizeof(T))) __builtin_prefetch(rows[j] + d, 0, 2);
}

// The positions a tile sees for one KV head, as addresses: its list, then its tail.
template <class T> class Seen {
 public:
  Seen(const AttendArgs& args, const Plan& plan, const Tile& tile, int32_t head, int32_t lister)
      : args_(args), shift_(exponent(args.block_size)) {
    const RowsView& rows = plan.rows;
    list_length_ = plan.list_length(tile.row, lister);
    if (list_length_)
      list_ = (args.positions ? args.positions : rows.positions) + rows.offsets[plan.list_index(tile.row, lister)];
    start_ = plan.start(tile.row, head);
    table_ = rows.tables + int64_t(rows.request[tile.row]) * rows.table_stride;
    k_ = static_cast<const T*>(args.k.data) + head * args.k.head;
    v_ = static_cast<const T*>(args.v.data) + head * args.v.head;
  }

  // Seen positions [first, first + count), count <= kBlock.
  void rows(int64_t first, int count, BlockRows<T>& into) const {
    const T **k = into.rows, **v = into.rows + kBlock;
    into.count = std::max(count, 0);
    int i = 0;
    for (; i < count && first + i < list_length_; i++) {
      const int64_t position = list_[first + i], block = block_of(position);
      address(block, position - block * args_.block_size, k + i, v + i);
    }
    while (i < count) {  // block by block: one division and one table look-up each
      const int64_t position = start_ + first + i - list_length_, block = block_of(position);
      int64_t offset = position - block * args_.block_size;
      const T *k_row, *v_row;
      address(block, offset, &k_row, &v_row);
      for (; i < count && offset < args_.block_size; i++, offset++) {
        k[i] = k_row, v[i] = v_row;
        k_row += args_.k.slot, v_row += args_.v.slot;
      }
    }
    if (count > 0)
      for (; i < kBlock; i++) k[i] = k[count - 1], v[i] = v[count - 1];
  }

 private:
  static int exponent(int64_t size) { return size & (size - 1) ? -1 : __builtin_ctzll(uint64_t(size)); }
  int64_t block_of(int64_t position) const { return shift_ < 0 ? position / args_.block_size : position >> shift_; }
  void address(int64_t block, int64_t offset, const T** k, const T** v) const {
    const int64_t id = table_[block];
    *k = k_ + id * args_.k.block + offset * args_.k.slot;
    *v = v_ + id * args_.v.block + offset * args_.v.slot;
  }

  const AttendArgs& args_;
  const int shift_;  // of a block size that is a power of two, else -1: a list pays for its divisions one by one
  const int32_t *list_ = nullptr, *table_;
  int64_t list_length_, start_;
  const T *k_, *v_;
};

}  // namespace kvloom
