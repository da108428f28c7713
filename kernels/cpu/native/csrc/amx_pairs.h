// Attention's products of bf16 in AMX tiles, in place of the dot products of pairs.h, whose layouts they take: keys turned, values
// in pairs of positions, weights rounded. For every number of rows, so that a row has the same bits in a prompt and in decoding.
//
// A product goes over 32 dimensions, or 32 positions, at once: even and odd ones are summed apart, from zero, then added to each
// other and to what there was. Numbers of rows beside a row's own do not touch it, and positions that it does not see are zeros.
#pragma once

#include "amx.h"
#include "pairs.h"

#ifdef KVLOOM_AMX_BF16
namespace kvloom {

class TileProducts : public PairProducts {
 public:
  static constexpr int kRows = kAmxRows;

  using PairProducts::PairProducts;
  TileProducts(const TileProducts&) = delete;
  TileProducts& operator=(const TileProducts&) = delete;
  ~TileProducts() {
    if (shaped_) release_tiles();
  }

  void take(Cut& cut) {
    PairProducts::take(cut);
    edge_ = cut.take<uint32_t>(kPairs * stride_);
  }

  void open(const BlockRows<bf16>& now, const BlockRows<bf16>& next, bool values) {
    now_ = &now;
    ahead_ = Ahead(next, dim_, values);
    pack_keys();
    if (!values) return;
    pack_values();
    uint32_t* end = values_ + (now.count + 1) / 2 * stride_;
    std::fill(end, values_ + (now.count + 31) / 32 * kPairs * stride_, 0u);
  }

  template <int R> void scores(int64_t r, float* s) {
    shape<R>();
    ahead_.ask<96>();
    const uint32_t* q = queries_ + r * pairs_;
    const int64_t q_row = pairs_ * 4, k_row = kBlock * 4, whole = pairs_ / kPairs * kPairs;
    unrolled<4>([&](auto i) { zero_tile<i>(); });
    for (int64_t d = 0; d < whole; d += kPairs) {
      load_tile<4>(q + d, q_row);
      unrolled<4>([&](auto i) { load_tile<5>(keys_ + d * kBlock + i * kLanes, k_row), multiply_bf16<i, 4, 5>(); });
    }
    if (whole < pairs_) {
      load_tile<6>(q + whole, q_row);
      unrolled<4>([&](auto i) { load_tile<7>(keys_ + whole * kBlock + i * kLanes, k_row), multiply_bf16<i, 6, 7>(); });
    }
    unrolled<4>([&](auto i) { store_tile<i>(s + i * kLanes, k_row); });
  }

  template <int R> void weigh(const float*, int count, const float* alpha, float* o) {
    for (int r = 0; r < R; r++)
      if (alpha[r] != 1.0f)
        for (int64_t d = 0; d < stride_; d += kLanes) store(o + r * stride_ + d, load(o + r * stride_ + d) * splat(alpha[r]));
    const uint32_t* last = values_ + count / 32 * kPairs * stride_;
    if (count % 32 && count < now_->count) last = without_unseen(last, count % 32);
    ahead_.ask<64>();
    int64_t d = 0;
    for (; d + 4 * kLanes <= stride_; d += 4 * kLanes) gather<4>(count, last, o + d, d);
    if (d < stride_) gather<2>(count, last, o + d, d);
  }

 private:
  static constexpr int kPairs = 16;  // of a tile's row

  // Tiles: 0 to 3 sums of R rows, 4 and 6 queries or weights, 5 and 7 keys or values; 6 and 7 where dimensions fill no tile.
  template <int R> void shape() {
    if (shaped_ == R) return;
    if (shaped_) release_tiles();
    const int rest = int(pairs_ % kPairs);
    TileShapes shapes;
    for (int t = 0; t < 5; t++) shapes.rows[t] = R, shapes.bytes[t] = 64;
    shapes.rows[5] = kPairs, shapes.bytes[5] = 64;
    if (rest) shapes.rows[6] = R, shapes.bytes[6] = uint16_t(4 * rest), shapes.rows[7] = uint8_t(rest), shapes.bytes[7] = 64;
    configure_tiles(shapes);
    shaped_ = R;
  }

  // 32 positions' values, zeros from position `seen` on: rows that see more may hold anything there.
  const uint32_t* without_unseen(const uint32_t* values, int seen) {
    std::copy(values, values + (seen + 1) / 2 * stride_, edge_);
    if (seen % 2)
      for (uint32_t *p = edge_ + seen / 2 * stride_, *end = p + stride_; p < end; p++) *p &= 0xffff;
    std::fill(edge_ + (seen + 1) / 2 * stride_, edge_ + kPairs * stride_, 0u);
    return edge_;
  }

  // O[.][d, d + 16 Vecs): the weighted sum of `count` values. last: the 32 that count does not fill, if there are such.
  template <int Vecs> void gather(int count, const uint32_t* last, float* o, int64_t d) {
    const int64_t row = stride_ * 4;
    unrolled<Vecs>([&](auto i) { load_tile<i>(o + i * kLanes, row); });
    for (int at = 0; at < count; at += 32) {
      const uint32_t* values = (at + 32 <= count ? values_ + at / 2 * stride_ : last) + d;
      load_tile<4>(weights_ + at / 2, kBlock * 2);
      unrolled<Vecs>([&](auto i) { load_tile<5>(values + i * kLanes, row), multiply_bf16<i, 4, 5>(); });
    }
    unrolled<Vecs>([&](auto i) { store_tile<i>(o + i * kLanes, row); });
  }

  uint32_t* edge_ = nullptr;
  int shaped_ = 0;  // rows of this thread's tiles, as long as they are this object's
};

}  // namespace kvloom
#endif
