#include "plan.h"

#include <algorithm>

namespace kvloom {
namespace {

bool same_lists(const RowsView& rows, int32_t a, int32_t b) {
  if (!rows.lengths) return true;
  for (int32_t h = 0; h < rows.list_heads; h++) {
    const int64_t i = int64_t(a) * rows.list_heads + h, j = int64_t(b) * rows.list_heads + h;
    if (rows.lengths[i] != rows.lengths[j] || (rows.lengths[i] && rows.offsets[i] != rows.offsets[j])) return false;
  }
  return true;
}

bool same_starts(const RowsView& rows, int32_t a, int32_t b) {
  const int32_t *of_a = rows.start + int64_t(a) * rows.start_heads, *of_b = rows.start + int64_t(b) * rows.start_heads;
  for (int32_t h = 0; h < rows.start_heads; h++)
    if (of_a[h] != of_b[h] || rows.stop[a] < of_a[h]) return false;
  return true;
}

// Row b may follow row a in a tile if what a sees is a beginning of what b sees.
bool extends(const RowsView& rows, int32_t a, int32_t b) {
  return rows.request[a] == rows.request[b] && rows.stop[a] <= rows.stop[b] && same_starts(rows, a, b) &&
         same_lists(rows, a, b);
}

// Rows that one tile may have, where threads get equally many: of `rows` that follow each other.
int32_t tile_rows(const Plan& plan, int32_t rows) {
  const int64_t heads = plan.rows.kv_heads, threads = plan.rows.threads;
  auto tiles_of = [&](int64_t most) { return (int64_t(rows) * plan.group + most - 1) / most; };
  int64_t tiles = std::max<int64_t>(1, tiles_of(kMostTileRows));
  const int64_t most = std::max(tiles, tiles_of(kTileRows));
  while (tiles < most && (tiles * heads < 3 * threads || (tiles * heads % threads && tiles * heads < 8 * threads))) tiles++;
  return std::max<int32_t>(1, int32_t((rows + tiles - 1) / tiles));
}

void make_tiles(Plan& plan) {
  const RowsView& rows = plan.rows;
  for (int32_t row = 0, end = 0; row < rows.rows; row = end) {
    for (end = row + 1; end < rows.rows && !rows.most && extends(rows, end - 1, end);) end++;
    const int32_t each = tile_rows(plan, end - row);
    for (int32_t first = row; first < end; first += each) plan.tiles.push_back({first, std::min(each, end - first)});
  }
}

int32_t splits_of(const Plan& plan, const Tile& tile, int32_t head) {
  return int32_t((plan.planned(tile.row + tile.rows - 1, head) + kSplit - 1) / kSplit);
}

// A tile whose share of the work would keep one thread busy after the others are done is spread, split by split.
void make_tasks(Plan& plan) {
  int64_t total = 0;
  for (const Tile& tile : plan.tiles)
    for (int32_t h = 0; h < plan.rows.kv_heads; h++) total += int64_t(splits_of(plan, tile, h)) * tile.rows;
  const int64_t share = std::max<int64_t>(1, total * 11 / (int64_t(plan.rows.threads) * 30));  // a third of a thread's
  for (int32_t t = 0; t < int32_t(plan.tiles.size()); t++) {
    const Tile& tile = plan.tiles[size_t(t)];
    for (int32_t h = 0; h < plan.rows.kv_heads; h++) {
      const int32_t splits = splits_of(plan, tile, h);
      if (plan.rows.threads == 1 || int64_t(splits) * tile.rows <= share || splits < 2) {
        plan.tasks.push_back({t, h, 0, splits, -1});
        continue;
      }
      const int32_t step = int32_t(std::max<int64_t>(1, share / (4 * tile.rows)));
      for (int32_t s = 0; s < splits; s += step)
        plan.tasks.push_back({t, h, s, std::min(splits, s + step), plan.partial_floats});
      plan.folds.push_back({t, h, splits, plan.partial_floats});
      plan.partial_floats += splits * plan.state_floats(tile);
    }
  }
  auto cost = [&](const Task& a) { return int64_t(a.last - a.first) * plan.tiles[size_t(a.tile)].rows; };
  std::stable_sort(plan.tasks.begin(), plan.tasks.end(), [&](auto& a, auto& b) { return cost(a) > cost(b); });
}

void weigh(Plan& plan) {
  for (const Tile& tile : plan.tiles)
    for (int32_t h = 0; h < plan.rows.kv_heads; h++)
      plan.work += plan.planned(tile.row + tile.rows - 1, h) * tile.rows * plan.group;
}

}  // namespace
}  // namespace kvloom

// into: a plan that is made anew in its place, or null.
KVLOOM_API void* kvloom_plan(const kvloom::RowsView* rows, void* into) {
  auto* plan = into ? static_cast<kvloom::Plan*>(into) : new kvloom::Plan;
  plan->clear();
  plan->rows = *rows;
  plan->group = rows->q_heads / rows->kv_heads;
  plan->padded_dim = (rows->head_dim + 31) / 32 * 32;
  kvloom::make_tiles(*plan);
  kvloom::make_tasks(*plan);
  kvloom::weigh(*plan);
  return plan;
}

KVLOOM_API void kvloom_plan_free(void* plan) { delete static_cast<kvloom::Plan*>(plan); }
