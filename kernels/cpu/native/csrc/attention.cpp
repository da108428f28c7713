// attend and score: tiles of query rows over paged keys and values. See plan.h for what is computed where.

#include <algorithm>

#include "parallel.h"
#include "scratch.h"
#include "tile.h"

namespace kvloom {
namespace {

thread_local Arena local_arena, partial_arena;

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

  // Addresses of seen positions [first, first + count); the last is repeated up to kBlock.
  void rows(int64_t first, int count, const T** k, const T** v) const {
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

struct State {  // of one tile and head after some splits: o unnormalised, in pair order
  float *o, *maximum, *sum;
};

State state_at(float* memory, int64_t m, int64_t stride) { return {memory, memory + m * stride, memory + m * (stride + 1)}; }

// Folds b, the later splits, into a. A row that has seen nothing in one of them is copied or left, so folding is exact there.
void fold(State a, State b, int64_t m, int64_t stride) {
  for (int64_t r = 0; r < m; r++) {
    if (b.maximum[r] == -INFINITY) continue;
    float* into = a.o + r * stride;
    const float* from = b.o + r * stride;
    if (a.maximum[r] == -INFINITY) {
      std::copy(from, from + stride, into);
      a.maximum[r] = b.maximum[r], a.sum[r] = b.sum[r];
      continue;
    }
    const float top = std::max(a.maximum[r], b.maximum[r]);
    const float wa = std::exp2(a.maximum[r] - top), wb = std::exp2(b.maximum[r] - top);
    for (int64_t d = 0; d < stride; d += kLanes) store(into + d, fma(load(from + d), splat(wb), load(into + d) * splat(wa)));
    a.sum[r] = a.sum[r] * wa + b.sum[r] * wb;
    a.maximum[r] = top;
  }
}

template <class T> class TileRun {
 public:
  TileRun(const AttendArgs& args, const Plan& plan, int32_t tile, int32_t head, int32_t lister)
      : args_(args), plan_(plan), tile_(plan.tiles[size_t(tile)]), head_(head), lister_(lister), dim_(plan.rows.head_dim),
        stride_(plan.padded_dim), m_(int64_t(tile_.rows) * plan.group),
        seen_(args, plan, tile_, head, lister) {
    for (Cut cut(nullptr);; cut = Cut(local_arena.reserve(cut.used()))) {
      packed_ = cut.take<float>((dim_ + 8) * kBlock);
      wide_ = cut.take<float>(16 * (dim_ + 32));
      values_ = cut.take<float>(kBlock * stride_);
      queries_ = cut.take<float>(m_ * dim_);
      q_ = cut.take<const float*>(m_);
      limit_ = cut.take<int64_t>(m_);
      lanes_ = cut.take<vec>(m_);
      s_ = cut.take<float>(kGroup * kBlock);
      state_[0] = state_at(cut.take<float>(m_ * (stride_ + 2)), m_, stride_);
      state_[1] = state_at(cut.take<float>(m_ * (stride_ + 2)), m_, stride_);
      for (auto& rows : rows_) rows = cut.take<const T*>(kBlock);
      if (packed_ != nullptr) break;
    }
    longest_ = plan.seen(tile_.row + tile_.rows - 1, head, lister);
    splits_ = int32_t((longest_ + kSplit - 1) / kSplit);
    keys_in_place_ = m_ <= kInPlace && turns_in_place<T>(dim_);
    values_in_place_ = m_ <= kGroup && dim_ == stride_;
  }

  void run(int32_t first, int32_t last, float* partials, int64_t partial_stride) {
    prepare_queries();
    State total = state_[0];
    begun_at_ = first;
    last = std::min(last, splits_);
    if (first >= last) clear(total);
    for (int32_t split = first; split < last; split++) {
      State into = partials ? state_at(partials + split * partial_stride, m_, stride_) : state_[split != first];
      compute(split, into);
      if (!partials && split != first) fold(total, into, m_, stride_);
    }
    if (!partials && args_.out) finish(total);
  }

  void run_fold(float* partials, int64_t partial_stride) {
    State total = state_at(partials, m_, stride_);
    if (splits_ == 0) clear(total);
    for (int32_t split = 1; split < splits_; split++)
      fold(total, state_at(partials + split * partial_stride, m_, stride_), m_, stride_);
    finish(total);
  }

 private:
  int64_t token(int64_t r) const { return tile_.row + r / plan_.group; }
  int64_t query_head(int64_t r) const { return int64_t(head_) * plan_.group + r % plan_.group; }

  void prepare_queries() {
    for (int64_t r = 0; r < m_; r++) {
      const T* q = static_cast<const T*>(args_.q) + token(r) * args_.q_row + query_head(r) * args_.q_head;
      widen(q, dim_, queries_ + r * dim_);
      q_[r] = queries_ + r * dim_;
      limit_[r] = plan_.seen(int32_t(token(r)), head_, lister_);
    }
  }

  void clear(State state) {
    std::fill(state.o, state.o + m_ * stride_, 0.0f);
    std::fill(state.maximum, state.maximum + m_, -INFINITY);
    std::fill(state.sum, state.sum + m_, 0.0f);
  }

  void compute(int32_t split, State into) {
    clear(into);
    std::fill(lanes_, lanes_ + m_, zero());
    const int64_t begin = int64_t(split) * kSplit, end = std::min(longest_, begin + kSplit);
    seen_.rows(begin, int(std::min<int64_t>(kBlock, end - begin)), rows_[0], rows_[1]);
    std::copy_n(rows_[0], kBlock, rows_[2]), std::copy_n(rows_[1], kBlock, rows_[3]);
    if (split == begun_at_) {  // nobody asked for these while computing something else
      const int count = int(std::min<int64_t>(kBlock, end - begin));
      ask(rows_[0], count);
      if (args_.out) ask(rows_[1], count);
    }
    for (int64_t at = begin; at < end; at += kBlock) {
      const int count = int(std::min<int64_t>(kBlock, end - at));
      const int next = int(std::min<int64_t>(kBlock, longest_ - at - kBlock));
      if (next > 0) {
        seen_.rows(at + kBlock, next, rows_[2], rows_[3]);
        if (!keys_in_place_) ask(rows_[2], next);
        if (args_.out && !values_in_place_) ask(rows_[3], next);
      }
      block(at, count, into);
      std::swap(rows_[0], rows_[2]);
      std::swap(rows_[1], rows_[3]);
    }
    for (int64_t r = 0; r < m_; r++) into.sum[r] = sum(lanes_[r]);
  }

  // Cache lines of rows that are read soon. Listed rows lie where no hardware prefetcher looks.
  void ask(const T* const* rows, int count) const {
    for (int j = 0; j < count; j++)
      for (int64_t d = 0; d < dim_; d += 64 / int64_t(sizeof(T))) __builtin_prefetch(rows[j] + d, 0, 2);
  }

  void block(int64_t at, int count, State into) {
    if (!keys_in_place_) pack_keys(rows_[0], count, dim_, wide_, packed_);
    if (args_.out && !values_in_place_) widen_values(count);
    for (int64_t r = 0; r < m_; r += kGroup) {
      const int64_t rest = m_ - r;
      if (limit_[std::min(m_, r + kGroup) - 1] <= at) continue;  // limits ascend within a tile
      switch (rest < kGroup ? rest : kGroup) {
        case 1: group<1>(at, r, count, into); break;
        case 2: group<2>(at, r, count, into); break;
        case 3: group<3>(at, r, count, into); break;
        case 4: group<4>(at, r, count, into); break;
        case 5: group<5>(at, r, count, into); break;
        default: group<6>(at, r, count, into);
      }
    }
  }

  template <int R> void group(int64_t at, int64_t r, int count, State into) {
    score_block<R>(r, count);
    if (args_.logits && token(r) < args_.logits_rows) emit<R>(at, r);
    if (!args_.out) return;
    int64_t visible[R];
    for (int i = 0; i < R; i++) visible[i] = limit_[r + i] - at;
    alignas(64) float alpha[kLanes];
    soften<R>(s_, visible, args_.scale * kLog2E, {into.maximum + r, lanes_ + r}, alpha);
    count = int(std::min<int64_t>(count, visible[R - 1]));
    float* o = into.o + r * stride_;
    if (values_in_place_) weigh<R>(DirectValues<T>{rows_[1], rows_[3]}, count, alpha, o);
    else weigh<R>(WideValues{values_, stride_}, count, alpha, o);
  }

  template <int R> void score_block(int64_t r, int count) {
#if defined(KVLOOM_AVX512) || defined(KVLOOM_AVX2)
    if constexpr (!std::is_same_v<T, f16> && R <= kInPlace)
      if (keys_in_place_) return scores_in_place<T, R>(q_ + r, rows_[0], rows_[2], count, dim_, s_);
#endif
    scores<R>(q_ + r, packed_, dim_, s_);
  }

  template <int R, class Values> void weigh(Values values, int count, const float* alpha, float* o) {
    constexpr int kAcross = across(R);
    int64_t d = 0;
    for (; d + kAcross * kLanes <= stride_; d += kAcross * kLanes) gather<R, kAcross>(s_, values, count, d, alpha, o, stride_);
    if (d < stride_) gather<R, 2>(s_, values, count, d, alpha, o, stride_);  // of four
  }

  template <int R> void emit(int64_t at, int64_t r) {
    for (int i = 0; i < R && token(r + i) < args_.logits_rows; i++) {
      float* to = args_.logits + token(r + i) * args_.logits_row + query_head(r + i) * args_.logits_head + at;
      const int64_t n = std::min({int64_t(kBlock), limit_[r + i] - at, args_.width - at});
      for (int64_t j = 0; j < n; j++) to[j] = s_[i * kBlock + j] * args_.scale;
    }
  }

  void widen_values(int count) {
    for (int j = 0; j < count; j++) {
      float* to = values_ + j * stride_;
      int64_t d = 0;
      vec a, b;
      for (; d + 32 <= dim_; d += 32) {
        load_pair(rows_[1][j] + d, a, b);
        store(to + d, a), store(to + d + kLanes, b);
      }
      if (d == dim_) continue;
      T tail[32] = {};
      std::memcpy(tail, rows_[1][j] + d, size_t(dim_ - d) * sizeof(T));
      load_pair(tail, a, b);
      store(to + d, a), store(to + d + kLanes, b);
    }
  }

  // The position that stands for what was folded, behind all others: its key and value are means of `count` of them.
  void add_folded(State state, int64_t r, int32_t count) {
    const float* keys = args_.sums + args_.sums_at[token(r)] + int64_t(head_) * dim_;
    const float* values = keys + int64_t(plan_.rows.kv_heads) * dim_;
    const T* q = static_cast<const T*>(args_.q) + token(r) * args_.q_row + query_head(r) * args_.q_head;
    vec products = zero();
    int64_t d = 0;
    for (; d + kLanes <= dim_; d += kLanes) products = fma(load(q + d), load(keys + d), products);
    if (d < dim_) products = fma(load_first(q + d, dim_ - d), load_first(keys + d, dim_ - d), products);
    const float n = float(count), logit = sum(products) / n * (args_.scale * kLog2E) + std::log2(n);
    const float top = std::max(state.maximum[r], logit);
    const float past = std::exp2(state.maximum[r] - top), own = std::exp2(logit - top);
    float* o = state.o + r * stride_;
    for (d = 0; d < dim_; d += 32) {
      alignas(64) float mean[32] = {};
      for (int64_t i = 0; i < std::min<int64_t>(32, dim_ - d); i++) mean[i] = values[d + i] / n;
      vec a, b;
      pair_of<T>(mean, a, b);
      store(o + d, fma(a, splat(own), load(o + d) * splat(past)));
      store(o + d + kLanes, fma(b, splat(own), load(o + d + kLanes) * splat(past)));
    }
    state.sum[r] = state.sum[r] * past + own;
    state.maximum[r] = top;
  }

  void finish(State state) {
    for (int64_t r = 0; r < m_; r++) {
      if (args_.counts && args_.counts[token(r)] > 0) add_folded(state, r, args_.counts[token(r)]);
      const bool any = state.maximum[r] != -INFINITY;
      const vec scale = splat(any ? 1.0f / state.sum[r] : 0.0f);
      const float* o = state.o + r * stride_;
      T* out = static_cast<T*>(args_.out) + token(r) * args_.out_row + query_head(r) * args_.out_head;
      int64_t d = 0;
      for (; d + 32 <= dim_; d += 32) store_pair(out + d, load(o + d) * scale, load(o + d + kLanes) * scale);
      if (d < dim_) {
        T tail[32];
        store_pair(tail, load(o + d) * scale, load(o + d + kLanes) * scale);
        std::memcpy(out + d, tail, size_t(dim_ - d) * sizeof(T));
      }
      if (args_.lse) {
        const float lse = any ? (state.maximum[r] + std::log2(state.sum[r])) * kLn2 : -INFINITY;
        args_.lse[token(r) * args_.lse_row + query_head(r)] = lse;
      }
    }
  }

  const AttendArgs& args_;
  const Plan& plan_;
  const Tile tile_;
  const int32_t head_, lister_;
  const int64_t dim_, stride_, m_;
  const Seen<T> seen_;
  float *packed_, *wide_, *values_, *queries_, *s_;
  const float** q_;
  int64_t* limit_;
  vec* lanes_;
  State state_[2];
  const T** rows_[4];  // K and V addresses of this block, K and V addresses of the next
  int64_t longest_;
  int32_t splits_;  // that have positions
  int32_t begun_at_ = 0;
  bool keys_in_place_, values_in_place_;  // few rows: no packed copy
};

// The head whose list a KV head reads; negative if it is left out, or if the tile is.
int32_t lister_of(const AttendArgs& args, const Tile& tile, int32_t head) {
  if (args.active && args.active[tile.row] < 0) return -1;
  return args.heads ? args.heads[head] : head;
}

// Bytes that must be read are counted once per tile and KV head.
void count(const AttendArgs& args, const Plan& plan, int64_t item) {
  const int64_t position_bytes = plan.rows.head_dim * item;
  Totals& totals = *args.totals;
  const int32_t* stop = plan.rows.stop;
  for (const Tile& tile : plan.tiles) {
    for (int32_t head = 0; head < plan.rows.kv_heads; head++) {
      const int32_t lister = lister_of(args, tile, head);
      if (lister < 0) continue;
      const int64_t shared = plan.seen(tile.row + tile.rows - 1, head, lister);
      if (!args.out) {
        totals.score_bytes += shared * position_bytes;
        continue;
      }
      totals.kv_bytes += 2 * shared * position_bytes;
      totals.list_kv_bytes += 2 * plan.list_length(tile.row, lister) * position_bytes;
      for (int32_t row = tile.row; row < tile.row + tile.rows; row++) {
        const int64_t seen = plan.seen(row, head, lister);
        totals.positions += seen;
        if (args.read) args.read[row] += seen;
      }
    }
  }
  if (args.out) totals.rows += std::count_if(stop, stop + plan.rows.rows, [](int32_t end) { return end > 0; });
}

template <class T> void attend(const AttendArgs& args, const Plan& plan) {
  if (args.active && std::all_of(args.active, args.active + plan.rows.rows, [](int32_t at) { return at < 0; })) return;
  auto* partials = static_cast<float*>(partial_arena.reserve(args.out ? plan.partial_floats * int64_t(sizeof(float)) : 0));
  const int threads = plan.work * plan.rows.head_dim < 65536 ? 1 : plan.rows.threads;
  parallel(threads, int64_t(plan.tasks.size()), [&](int64_t i) {
    const Task& task = plan.tasks[size_t(i)];
    const Tile& tile = plan.tiles[size_t(task.tile)];
    const int32_t lister = lister_of(args, tile, task.head);
    if (lister < 0 || (task.first && plan.seen(tile.row + tile.rows - 1, task.head, lister) <= int64_t(task.first) * kSplit)) return;
    float* memory = args.out && task.partial >= 0 ? partials + task.partial : nullptr;
    TileRun<T>(args, plan, task.tile, task.head, lister).run(task.first, task.last, memory, plan.state_floats(tile));
  });
  if (args.out)
    parallel(threads, int64_t(plan.folds.size()), [&](int64_t i) {
      const Fold& fold = plan.folds[size_t(i)];
      const Tile& tile = plan.tiles[size_t(fold.tile)];
      const int32_t lister = lister_of(args, tile, fold.head);
      if (lister < 0) return;
      TileRun<T>(args, plan, fold.tile, fold.head, lister).run_fold(partials + fold.partial, plan.state_floats(tile));
    });
  count(args, plan, sizeof(T));
}

}  // namespace
}  // namespace kvloom

KVLOOM_API void kvloom_attend(const kvloom::AttendArgs* args) {
  const auto& p = *static_cast<const kvloom::Plan*>(args->plan);
  switch (args->dtype) {
    case kvloom::kBF16: return kvloom::attend<kvloom::bf16>(*args, p);
    case kvloom::kF16: return kvloom::attend<kvloom::f16>(*args, p);
    default: return kvloom::attend<float>(*args, p);
  }
}
