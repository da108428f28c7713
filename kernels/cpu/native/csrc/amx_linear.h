// The loop over groups on AMX tiles, for many rows: the numbers of quant.h's multiply, bit for bit.
//
// A group has scales of its own, so its products are a tile product of their own: 16 rows times 16 outputs over 32 inputs (Q6_K:
// twice 16), exact in int32. They go through memory into vector registers, and are scaled and added there in the order of
// multiply. For such a block a core of Sapphire Rapids starts, by Intel's tables and not measured,
//
//                       here                               with VNNI
//     tile products     1 (16 cycles; beside the rest)     -
//     byte products     -                                  128
//     scaling           48 (64 with mins)                  48 (64)
//     loads             56 (72)                            152 (168)
//
// at two a cycle, so 28 cycles (36) instead of 88 (96): three times as fast at best (Q6_K: 52 instead of 112). It is bound by
// its scaling, and gets no nearer to the tiles' own peak while a result must be the same on every path.
//
// Codes are unpacked as signed bytes, offset taken off: then no sum starts elsewhere than at zero. Activations lie in blocks of 16
// rows, a group of all rows side by side: a tile's rows would otherwise be a power of two apart, and push each other out of a cache.
#pragma once

#include "amx.h"
#include "quant.h"

#ifdef KVLOOM_AMX
namespace kvloom {

constexpr int64_t kSliceGroups = 32;  // inputs unpacked at once: with the scales and the sums of 240 rows they stay in an L1 cache

template <Format F> struct Slice {  // of a panel
  alignas(64) uint8_t codes[kSliceGroups * kSteps * kReadyBytes];  // int8
  alignas(64) float scales[kSliceGroups / Weights<F>::kGroups * Weights<F>::kScales * kPanel];
};

// Groups [first, first + count) of a panel; whole blocks.
template <Format F> void unpack(const uint8_t* panel, int64_t groups, int64_t first, int64_t count, Slice<F>& to) {
  using W = Weights<F>;
  uint8_t* codes = to.codes;
  for (int64_t g = first; g < first + count; g++) {
    ask_ahead<F>(panel, g);
    for (int s = 0; s < kSteps; s++, codes += kReadyBytes) {
      store_ready(codes, codes_of<F>(panel + g * W::kCodeBytes, s));
      for (int i = 0; i < kReadyBytes; i++) codes[i] = uint8_t(codes[i] - W::kOffset);
    }
    if (g % W::kGroups == 0)
      scales_of<F>(panel + groups * W::kCodeBytes + g / W::kGroups * W::kScaleBytes,
                   to.scales + (g - first) / W::kGroups * W::kScales * kPanel);
  }
}

// Tiles: 0 to 3 sums of two groups' runs, 4 and 5 activations, 6 and 7 weights.
template <Format F> TileShapes tile_shapes() {
  constexpr int kInputs = kGroupInputs / Weights<F>::kRuns;  // of a product
  TileShapes shapes;
  for (int t = 0; t < 8; t++) {
    shapes.bytes[t] = t == 4 || t == 5 ? kInputs : 4 * kPanel;
    shapes.rows[t] = t < 6 ? kAmxRows : kInputs / 4;
  }
  return shapes;
}

using TileSums = int32_t[kAmxRows][kPanel];

// Products of a group, its runs one after the other. Turn: 0 or 1; while one's sums are scaled the other's products are under way.
template <Format F, int Turn> inline void multiply_group(const Code* x, const uint8_t* weights, TileSums* sums) {
  constexpr int kRuns = Weights<F>::kRuns;
  auto run = [&](auto u) __attribute__((always_inline)) {
    constexpr int kSums = 2 * Turn + u, kRows = 4 + (Turn + u) % 2, kWeights = 6 + (Turn + u) % 2;
    load_tile<kRows>(x + u * (kGroupInputs / kRuns), kGroupInputs);
    load_tile<kWeights>(weights + u * (kSteps / kRuns) * kReadyBytes, kReadyBytes);
    zero_tile<kSums>();
    multiply_signed_bytes<kSums, kRows, kWeights>();
    store_tile<kSums>(sums[u], sizeof sums[u][0]);
  };
  run(std::integral_constant<int, 0>{});
  if constexpr (kRuns > 1) run(std::integral_constant<int, 1>{});
}

// 16 rows times a slice, groups [first, first + count) of a panel, added to out[16][16]. x: the first row's activations.
template <Format F> void multiply_tiles(const Slice<F>& slice, const Activations& x, int64_t first, int64_t count, float* out) {
  using W = Weights<F>;
  alignas(64) TileSums sums[2][W::kRuns];
  fsum acc[kAmxRows];
  for (int r = 0; r < kAmxRows; r++) acc[r] = load_floats(out + r * kPanel);
  auto products = [&](int64_t g, auto turn) __attribute__((always_inline)) {
    if (g >= count) return;
    const Code* codes = x.codes + (first + g) * kAmxRows * kGroupInputs;
    multiply_group<F, turn>(codes, slice.codes + g * kSteps * kReadyBytes, sums[turn]);
  };
  auto scale = [&](int64_t g, auto turn) __attribute__((always_inline)) {
    if (g >= count) return;
    const int64_t in_block = g % W::kGroups;
    const float* scales = slice.scales + g / W::kGroups * W::kScales * kPanel;
    const float *of_rows = x.scale + (first + g) * kAmxRows, *scaled_sums = x.scaled_sum + (first + g) * kAmxRows;
    for (int u = 0; u < W::kRuns; u++) {
      const fsum factor = load_floats(scales + (in_block * W::kRuns + u) * kPanel);
_Pragma("GCC unroll 16")
      for (int r = 0; r < kAmxRows; r++)
        acc[r] = add_product(to_float(load_sums(sums[turn][u][r])), times(factor, of_rows[r]), acc[r]);
    }
    if constexpr (W::kHasMin) {
      const fsum min = load_floats(scales + (W::kGroups * W::kRuns + in_block) * kPanel);
_Pragma("GCC unroll 16")
      for (int r = 0; r < kAmxRows; r++) acc[r] = add_product(min, fsplat(scaled_sums[r]), acc[r]);
    }
  };
  constexpr std::integral_constant<int, 0> even;
  constexpr std::integral_constant<int, 1> odd;
  products(0, even);
  for (int64_t g = 0; g < count; g += 2) {
    products(g + 1, odd), scale(g, even);
    products(g + 2, even), scale(g + 1, odd);
  }
  for (int r = 0; r < kAmxRows; r++) store_sum(out + r * kPanel, acc[r]);
}

}  // namespace kvloom
#endif
