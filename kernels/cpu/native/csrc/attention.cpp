// attend and score: tiles of query rows over paged keys and values. See plan.h for what is computed where.

#include <algorithm>

#include "amx_pairs.h"
#include "pairs.h"
#include "parallel.h"
#include "tile.h"

namespace kvloom {
namespace {

thread_local Arena local_arena, partial_arena;

#if defined(KVLOOM_AMX_BF16)
template <class T> using Products = std::conditional_t<std::is_same_v<T, bf16>, TileProducts, WideProducts<T>>;
#elif defined(KVLOOM_BF16_DOT)
template <class T> using Products = std::conditional_t<std::is_same_v<T, bf16>, PairProducts, WideProducts<T>>;
#else
template <class T> using Products = WideProducts<T>;
#endif

struct State {  // of one tile and head after some splits: o unnormalised, in the order of Products
  float *o, *maximum, *sum;
  float* exact;  // sums of weights as they were before rounding, if somebody asks for their logarithm
};

State state_at(float* memory, int64_t m, int64_t stride) {
  float* rest = memory + m * stride;
  return {memory, rest, rest + m, rest + 2 * m};
}

// Folds b, the later splits, into a. A row that has seen nothing in one of them is copied or left, so folding is exact there.
void fold(State a, State b, int64_t m, int64_t stride) {
  for (int64_t r = 0; r < m; r++) {
    if (b.maximum[r] == -INFINITY) continue;
    float* into = a.o + r * stride;
    const float* from = b.o + r * stride;
    if (a.maximum[r] == -INFINITY) {
      std::copy(from, from + stride, into);
      a.maximum[r] = b.maximum[r], a.sum[r] = b.sum[r], a.exact[r] = b.exact[r];
      continue;
    }
    const float top = std::max(a.maximum[r], b.maximum[r]);
    const float wa = std::exp2(a.maximum[r] - top), wb = std::exp2(b.maximum[r] - top);
    for (int64_t d = 0; d < stride; d += kLanes) store(into + d, fma(load(from + d), splat(wb), load(into + d) * splat(wa)));
    a.sum[r] = a.sum[r] * wa + b.sum[r] * wb;
    a.exact[r] = a.exact[r] * wa + b.exact[r] * wb;
    a.maximum[r] = top;
  }
}

template <class T> class TileRun {
 public:
  TileRun(const AttendArgs& args, const Plan& plan, int32_t tile, int32_t head, int32_t lister)
      : args_(args), plan_(plan), tile_(plan.tiles[size_t(tile)]), head_(head), lister_(lister), dim_(plan.rows.head_dim),
        stride_(plan.padded_dim), m_(int64_t(tile_.rows) * plan.group),
        seen_(args, plan, tile_, head, lister), products_(dim_, stride_, m_) {
    for (Cut cut(nullptr);; cut = Cut(local_arena.reserve(cut.used()))) {
      limit_ = cut.take<int64_t>(m_);
      lanes_ = {nullptr, cut.take<vec>(m_), args.lse ? cut.take<vec>(m_) : nullptr};
      s_ = cut.take<float>(kRows * kBlock);
      state_[0] = state_at(cut.take<float>(m_ * (stride_ + 3)), m_, stride_);
      state_[1] = state_at(cut.take<float>(m_ * (stride_ + 3)), m_, stride_);
      rows_ = cut.take<BlockRows<T>>(2);
      products_.take(cut);
      if (limit_ != nullptr) break;
    }
    longest_ = plan.seen(tile_.row + tile_.rows - 1, head, lister);
    splits_ = int32_t((longest_ + kSplit - 1) / kSplit);
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
  static constexpr int kRows = Products<T>::kRows;

  int64_t token(int64_t r) const { return tile_.row + r / plan_.group; }
  int64_t query_head(int64_t r) const { return int64_t(head_) * plan_.group + r % plan_.group; }
  const T* query(int64_t r) const {
    return static_cast<const T*>(args_.q) + token(r) * args_.q_row + query_head(r) * args_.q_head;
  }

  void prepare_queries() {
    for (int64_t r = 0; r < m_; r++) {
      products_.query(r, query(r));
      limit_[r] = plan_.seen(int32_t(token(r)), head_, lister_);
    }
  }

  void clear(State state) {
    std::fill(state.o, state.o + m_ * stride_, 0.0f);
    std::fill(state.maximum, state.maximum + m_, -INFINITY);
    std::fill(state.sum, state.sum + m_, 0.0f);
    std::fill(state.exact, state.exact + m_, 0.0f);
  }

  void compute(int32_t split, State into) {
    clear(into);
    std::fill(lanes_.sum, lanes_.sum + m_, zero());
    if (lanes_.exact) std::fill(lanes_.exact, lanes_.exact + m_, zero());
    const int64_t begin = int64_t(split) * kSplit, end = std::min(longest_, begin + kSplit);
    BlockRows<T>*now = rows_, *next = rows_ + 1;
    seen_.rows(begin, int(std::min<int64_t>(kBlock, end - begin)), *now);
    *next = *now;
    if (split == begun_at_) {  // nobody asked for these while computing something else
      ask(now->k(), now->count, dim_);
      if (args_.out) ask(now->v(), now->count, dim_);
    }
    for (int64_t at = begin; at < end; at += kBlock) {
      seen_.rows(at + kBlock, int(std::min<int64_t>(kBlock, longest_ - at - kBlock)), *next);
      products_.open(*now, *next, args_.out != nullptr);
      block(at, now->count, into);
      std::swap(now, next);
    }
    for (int64_t r = 0; r < m_; r++) {
      into.sum[r] = sum(lanes_.sum[r]);
      if (lanes_.exact) into.exact[r] = sum(lanes_.exact[r]);
    }
  }

  void block(int64_t at, int count, State into) {
    const int64_t groups = (m_ + kRows - 1) / kRows;
    int64_t r = 0;
    for (int64_t left = groups; left > 0; left--) {
      const int64_t rows = (m_ - r + left - 1) / left;  // 4 and 3 rather than 6 and 1
      if (limit_[r + rows - 1] > at) group_of<kRows>(rows, at, r, count, into);  // limits ascend within a tile
      r += rows;
    }
  }

  template <int R> void group_of(int64_t rows, int64_t at, int64_t r, int count, State into) {
    if (rows == R) group<R>(at, r, count, into);
    else if constexpr (R > 1) group_of<R - 1>(rows, at, r, count, into);
  }

  template <int R> void group(int64_t at, int64_t r, int count, State into) {
    products_.template scores<R>(r, s_);
    if (args_.logits && token(r) < args_.logits_rows) emit<R>(at, r);
    if (!args_.out) return;
    int64_t visible[R];
    for (int i = 0; i < R; i++) visible[i] = limit_[r + i] - at;
    alignas(64) float alpha[kLanes];
    const Softmax state{into.maximum + r, lanes_.sum + r, lanes_.exact ? lanes_.exact + r : nullptr};
    products_.template soften<R>(s_, visible, args_.scale * kLog2E, state, alpha);
    products_.template weigh<R>(s_, int(std::min<int64_t>(count, visible[R - 1])), alpha, into.o + r * stride_);
  }

  template <int R> void emit(int64_t at, int64_t r) {
    for (int i = 0; i < R && token(r + i) < args_.logits_rows; i++) {
      float* to = args_.logits + token(r + i) * args_.logits_row + query_head(r + i) * args_.logits_head + at;
      const int64_t n = std::min({int64_t(kBlock), limit_[r + i] - at, args_.width - at});
      for (int64_t j = 0; j < n; j++) to[j] = s_[i * kBlock + j] * args_.scale;
    }
  }

  // The position that stands for what was folded, behind all others: its key and value are means of `count` of them.
  void add_folded(State state, int64_t r, int32_t count) {
    const float* keys = args_.sums + args_.sums_at[token(r)] + int64_t(head_) * dim_;
    const float* values = keys + int64_t(plan_.rows.kv_heads) * dim_;
    const T* q = query(r);
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
      Products<T>::spread(mean, a, b);
      store(o + d, fma(a, splat(own), load(o + d) * splat(past)));
      store(o + d + kLanes, fma(b, splat(own), load(o + d + kLanes) * splat(past)));
    }
    state.sum[r] = state.sum[r] * past + own;
    state.exact[r] = state.exact[r] * past + own;
    state.maximum[r] = top;
  }

  void finish(State state) {
    for (int64_t r = 0; r < m_; r++) {
      if (args_.counts && args_.counts[token(r)] > 0) add_folded(state, r, args_.counts[token(r)]);
      const bool any = state.maximum[r] != -INFINITY;
      const vec scale = splat(any ? 1.0f / state.sum[r] : 0.0f);
      const float* o = state.o + r * stride_;
      T* out = static_cast<T*>(args_.out) + token(r) * args_.out_row + query_head(r) * args_.out_head;
      for (int64_t d = 0; d < dim_; d += 32)
        Products<T>::store_sums(out + d, load(o + d) * scale, load(o + d + kLanes) * scale, dim_ - d);
      if (args_.lse) {
        const float lse = any ? (state.maximum[r] + std::log2(state.exact[r])) * kLn2 : -INFINITY;
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
  Products<T> products_;
  int64_t* limit_;
  Softmax lanes_;  // of all rows
  float* s_;
  State state_[2];
  BlockRows<T>* rows_;  // of this block and the next
  int64_t longest_;
  int32_t splits_;  // that have positions
  int32_t begun_at_ = 0;
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
