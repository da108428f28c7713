// GGUF's blocks of quantised weights, as its files hold them (ggml's block_q*): into panels (quant.h).
#pragma once

#include "quant.h"

namespace kvloom {

template <Format F> struct FileBlock {
  static constexpr int kValues = kGroupInputs * Weights<F>::kGroups;
  static constexpr bool kAtEnd = F == kQ6_K;  // the fp16 factor lies behind the codes, not in front
  static constexpr int kFactors = kAtEnd ? 0 : 2 * (1 + Weights<F>::kHasMin);
  static constexpr int64_t kBytes = Weights<F>::kBits * kValues / 8 + Weights<F>::kScaleBytes / kPanel;
};

// Codes of a block: one to a byte, in order; of 8 bits with 128 added.
template <Format F> void codes_of_block(const uint8_t* block, uint8_t* codes) {
  constexpr int kValues = FileBlock<F>::kValues, kFirst = FileBlock<F>::kFactors;
  if constexpr (F == kQ8_0) {
    for (int i = 0; i < kValues; i++) codes[i] = uint8_t(block[kFirst + i] + 128);
  } else if constexpr (F == kQ6_K) {
    for (int i = 0; i < kValues; i++) {
      const int half = i / 128, quarter = i % 128 / 32, l = i % 32;
      const int low = block[half * 64 + quarter % 2 * 32 + l] >> (quarter / 2 * 4) & 15;
      codes[i] = uint8_t(low | (block[128 + half * 32 + l] >> (2 * quarter) & 3) << 4);
    }
  } else if constexpr (Weights<F>::kOfK) {
    constexpr int kFifth = kFirst + 12, kLow = kFifth + (F == kQ5_K ? 32 : 0);
    for (int i = 0; i < kValues; i++) {
      const int group = i / 32, l = i % 32;
      codes[i] = uint8_t(block[kLow + group / 2 * 32 + l] >> (group % 2 * 4) & 15);
      if (F == kQ5_K) codes[i] |= uint8_t((block[kFifth + l] >> group & 1) << 4);
    }
  } else {
    constexpr int kLow = kFirst + (Weights<F>::kBits == 5 ? 4 : 0);
    for (int i = 0; i < kValues; i++) {
      codes[i] = uint8_t(block[kLow + i % 16] >> (i / 16 * 4) & 15);
      if (Weights<F>::kBits == 5) codes[i] |= uint8_t((block[kFirst + i / 8] >> i % 8 & 1) << 4);
    }
  }
}

// Codes of a group of output o into its panel, whose bits there are all zero.
template <Format F> void place(const uint8_t* codes, int64_t o, uint8_t* group) {
  for (int i = 0; i < kGroupInputs; i++) {
    const int s = i / 4, lane = int(o) * 4 + i % 4;
    if (Weights<F>::kBits == 8) {
      group[s * 64 + lane] = codes[i];
      continue;
    }
    group[s % 4 * 64 + lane] |= uint8_t((codes[i] & 15) << (s / 4 * 4));
    if (Weights<F>::kBits == 5) group[4 * 64 + lane] |= uint8_t(codes[i] >> 4 << s);
    if (Weights<F>::kBits == 6) group[(4 + s / 4) * 64 + lane] |= uint8_t(codes[i] >> 4 << (s % 4 * 2));
  }
}

// A block's scales of output o: fp16 factors, and with K-quants the bytes of its groups.
template <Format F> void place_scales(const uint8_t* block, int64_t o, uint8_t* scales) {
  using B = FileBlock<F>;
  const uint8_t* factors = B::kAtEnd ? block + B::kBytes - 2 : block;
  for (int i = 0; i < 1 + Weights<F>::kHasMin; i++) std::memcpy(scales + (i * kPanel + o) * 2, factors + 2 * i, 2);
  if constexpr (Weights<F>::kOfK) {
    constexpr int kBytes = F == kQ6_K ? 16 : 12, kFactors = 1 + Weights<F>::kHasMin;
    const uint8_t* from = F == kQ6_K ? block + B::kBytes - 2 - kBytes : block + B::kFactors;
    for (int i = 0; i < kBytes; i++) scales[2 * kFactors * kPanel + i * kPanel + o] = from[i];
  }
}

// Codes of inputs 4 s to 4 s + 3 of output o of a panel, with their offset taken off. Four bytes at once: of one by one, clang
// 22 makes vector code with wrong shifts.
template <Format F> void four_codes(const uint8_t* group, int64_t o, int s, float* to) {
  constexpr int kBits = Weights<F>::kBits;
  auto bytes = [&](int i) { uint32_t x; std::memcpy(&x, group + i * 64 + 4 * o, 4); return x; };
  uint32_t codes = kBits == 8 ? bytes(s) : bytes(s % 4) >> (s / 4 * 4) & 0x0f0f0f0fu;
  if (kBits == 5) codes |= (bytes(4) >> s & 0x01010101u) << 4;
  if (kBits == 6) codes |= (bytes(4 + s / 4) >> (s % 4 * 2) & 0x03030303u) << 4;
  for (int i = 0; i < 4; i++) to[i] = float(int(codes >> (8 * i) & 255) - Weights<F>::kOffset);
}

}  // namespace kvloom
