// Host work for one Rows: which rows are computed together, and who computes which stretch of positions.
//
// A row's arithmetic depends on the row alone. Its seen positions [0, n) are cut into splits of kSplit, each split is
// reduced with its own running maximum, and splits are folded from left to right. Tiling and the spread over threads
// decide only where that happens, so a row's result is the same bits alone, in any batch, decoded or prefilled, and a
// list of all positions equals the dense tail. A plan from bounds (rows.most) has splits that may turn out to be empty.
#pragma once

#include <cstdint>
#include <vector>

#include "abi.h"

namespace kvloom {

constexpr int kBlock = 64;    // positions scored at once
constexpr int kSplit = 256;   // positions under one running maximum, a multiple of kBlock
constexpr int kTileRows = 96; // query rows (tokens x query heads of a KV head) that share one read of K and V
#ifdef KVLOOM_BF16_DOT
constexpr int kMostTileRows = 384;  // where there is work for all threads: packing K and V is much beside fast products
#else
constexpr int kMostTileRows = kTileRows;
#endif

struct Tile { int32_t row, rows; };

struct Task {            // splits [first, last) of one tile and KV head
  int32_t tile, head, first, last;
  int64_t partial;       // where split 0 of this tile and head leaves its state, in floats; -1: folded by this task
};

struct Fold {            // a tile and head whose splits were computed apart
  int32_t tile, head, splits;
  int64_t partial;
};

struct Plan {
  RowsView rows;
  std::vector<Tile> tiles;
  std::vector<Task> tasks;
  std::vector<Fold> folds;
  int64_t partial_floats = 0;
  int64_t work = 0;      // positions x rows over all tasks
  int32_t group, padded_dim;

  void clear() {
    tiles.clear(), tasks.clear(), folds.clear();
    partial_floats = work = 0;
  }
  int64_t list_length(int32_t row, int32_t head) const {
    return rows.lengths ? rows.lengths[list_index(row, head)] : 0;
  }
  int64_t list_index(int32_t row, int32_t head) const {
    return int64_t(row) * rows.list_heads + (rows.list_heads > 1 ? head : 0);
  }
  int64_t start(int32_t row, int32_t head) const {
    return rows.start[int64_t(row) * rows.start_heads + (rows.start_heads > 1 ? head : 0)];
  }
  int64_t seen(int32_t row, int32_t head, int32_t lister) const {  // lister: the head whose list is read
    const int64_t tail = rows.stop[row] - start(row, head);
    return list_length(row, lister) + (tail > 0 ? tail : 0);
  }
  int64_t planned(int32_t row, int32_t head) const { return rows.most ? rows.most[row] : seen(row, head, head); }
  int64_t state_floats(const Tile& tile) const {  // o [m][padded_dim], maximum, sum and exact sum [m]
    const int64_t m = int64_t(tile.rows) * group;
    return (m * (padded_dim + 3) + 15) / 16 * 16;
  }
};

}  // namespace kvloom
