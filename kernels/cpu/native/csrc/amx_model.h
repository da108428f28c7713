// A model of AMX's tiles (Intel's Software Developer's Manual, volume 2: LDTILECFG, TILELOADD, TDPBSSD, TDPBF16PS), palette 1, a thread's
// own as in the processor. What raises an exception there ends the process here.
#pragma once

#include <cstdio>
#include <cstdlib>

namespace kvloom {

struct ModelTiles {
  TileShapes shapes;
  uint8_t data[8][16][64];
  bool configured = false;
};
inline thread_local ModelTiles model_tiles;

inline void model_needs(bool met, const char* what) {
  if (met) return;
  std::fprintf(stderr, "AMX model: %s\n", what);
  std::abort();
}

inline void configure_tiles(const TileShapes& shapes) {
  bool zeros = shapes.start_row == 0;
  for (uint8_t byte : shapes.reserved) zeros = zeros && byte == 0;
  for (int t = 8; t < 16; t++) zeros = zeros && shapes.bytes[t] == 0 && shapes.rows[t] == 0;
  model_needs(shapes.palette == 1 && zeros, "ldtilecfg: palette 1, no start row, and zeros where nothing is defined");
  for (int t = 0; t < 8; t++) {
    model_needs(shapes.bytes[t] <= 64 && shapes.rows[t] <= 16, "ldtilecfg: at most 16 rows of 64 bytes");
    model_needs((shapes.bytes[t] == 0) == (shapes.rows[t] == 0), "ldtilecfg: rows without bytes, or bytes without rows");
  }
  model_needs(!model_tiles.configured, "ldtilecfg: tiles that nobody released");  // here: a defect of ours
  model_tiles = ModelTiles{shapes, {}, true};
}

inline void release_tiles() { model_tiles = ModelTiles{}; }

template <int T> inline void model_tile_exists() {
  static_assert(T >= 0 && T < 8);
  model_needs(model_tiles.configured && model_tiles.shapes.rows[T] > 0, "a tile without a shape");
}

template <int T> inline void zero_tile() {
  model_tile_exists<T>();
  std::memset(model_tiles.data[T], 0, sizeof model_tiles.data[T]);
}

template <int T> inline void load_tile(const void* p, int64_t row_bytes) {
  zero_tile<T>();
  for (int r = 0; r < model_tiles.shapes.rows[T]; r++)
    std::memcpy(model_tiles.data[T][r], static_cast<const uint8_t*>(p) + r * row_bytes, model_tiles.shapes.bytes[T]);
}

template <int T> inline void store_tile(void* p, int64_t row_bytes) {
  model_tile_exists<T>();
  for (int r = 0; r < model_tiles.shapes.rows[T]; r++)
    std::memcpy(static_cast<uint8_t*>(p) + r * row_bytes, model_tiles.data[T][r], model_tiles.shapes.bytes[T]);
}

template <int Sums, int A, int B> inline void model_shapes_fit() {
  static_assert(Sums != A && Sums != B && A != B);
  model_tile_exists<Sums>(), model_tile_exists<A>(), model_tile_exists<B>();
  const TileShapes& is = model_tiles.shapes;
  model_needs(is.bytes[Sums] % 4 == 0 && is.bytes[A] % 4 == 0 && is.bytes[Sums] == is.bytes[B] && is.rows[Sums] == is.rows[A] &&
                  is.bytes[A] / 4 == is.rows[B], "tiles whose shapes do not fit");
}

template <int Sums, int A, int B> inline void multiply_signed_bytes() {
  model_shapes_fit<Sums, A, B>();
  const TileShapes& is = model_tiles.shapes;
  for (int m = 0; m < is.rows[Sums]; m++)
    for (int n = 0; n < is.bytes[Sums] / 4; n++) {
      uint32_t sum;
      std::memcpy(&sum, &model_tiles.data[Sums][m][4 * n], 4);
      for (int k = 0; k < is.rows[B]; k++)
        for (int i = 0; i < 4; i++)
          sum += uint32_t(int8_t(model_tiles.data[A][m][4 * k + i]) * int8_t(model_tiles.data[B][k][4 * n + i]));
      std::memcpy(&model_tiles.data[Sums][m][4 * n], &sum, 4);
    }
}

inline float model_flushed(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }
inline float model_number(const uint8_t* p) {
  bf16 x;
  std::memcpy(&x, p, 2);
  return model_flushed(to_float(x));
}

template <int Sums, int A, int B> inline void multiply_bf16() {
  model_shapes_fit<Sums, A, B>();
  const TileShapes& is = model_tiles.shapes;
  for (int m = 0; m < is.rows[Sums]; m++)
    for (int n = 0; n < is.bytes[Sums] / 4; n++) {
      float both[2] = {0.0f, 0.0f}, sum;
      for (int k = 0; k < is.rows[B]; k++)
        for (int i = 0; i < 2; i++)
          both[i] = model_flushed(std::fma(model_number(&model_tiles.data[A][m][4 * k + 2 * i]),
                                           model_number(&model_tiles.data[B][k][4 * n + 2 * i]), both[i]));
      std::memcpy(&sum, &model_tiles.data[Sums][m][4 * n], 4);
      sum = model_flushed(model_flushed(sum) + model_flushed(both[0] + both[1]));
      std::memcpy(&model_tiles.data[Sums][m][4 * n], &sum, 4);
    }
}

}  // namespace kvloom
