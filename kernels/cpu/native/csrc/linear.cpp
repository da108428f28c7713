// Linear layers with quantised weights: out = x W^T (+ bias) (+ residual), and rows of such a matrix: an embedding's.
// Layouts and the inner loop are in quant.h, that on AMX tiles is in amx_linear.h.

#include <algorithm>

#include "abi.h"
#include "amx_linear.h"
#include "blocks.h"
#include "parallel.h"
#include "scratch.h"

namespace kvloom {
namespace {

constexpr int64_t kChunkRows = 240;  // rows that meet one panel before the next: activations of up to 4,096 inputs stay in an L2 cache of 1 MiB
constexpr int64_t kAlone = 4;  // rows up to which the calling thread rounds the activations: shorter than a call of its own

constexpr int64_t kItemProducts = 4 << 20;  // some 50 microseconds: what is lost when a thread's core is taken meanwhile

thread_local Arena activation_arena, panel_arena;

template <Format F> Activations activations(Arena& arena, int64_t rows, int64_t inputs, int64_t step) {
  const int64_t groups = inputs / kGroupInputs;
  Activations a;
  a.step = step;
  for (Cut cut(nullptr);; cut = Cut(arena.reserve(cut.used()))) {
    a.scale = cut.take<float>(rows * groups);
    a.scaled_sum = cut.take<float>(rows * groups);
    a.start = cut.take<int32_t>(rows * groups * Weights<F>::kRuns);
    a.codes = cut.take<Code>(rows * inputs);
    if (a.scale) return a;
  }
}

template <Format F> Activations from_row(const Activations& a, int64_t row, int64_t groups) {
  const int64_t at = row / a.step * a.step * groups + row % a.step;
  return {a.codes + at * kGroupInputs, a.scale + at, a.scaled_sum + at, a.start + at * Weights<F>::kRuns, a.step};
}

// Rows past the last become zeros.
template <Format F> void quantise_row(const LinearArgs& a, int64_t row, const Activations& to) {
  with_dtype(a.dtype, [&](auto t) {
    const auto* x = static_cast<const decltype(t)*>(a.x);
    alignas(64) float wide[kGroupInputs] = {};
    for (int64_t g = 0; g < a.inputs / kGroupInputs; g++) {
      if (row < a.rows) widen(x + row * a.x_row + g * kGroupInputs, kGroupInputs, wide);
      quantise_group<F>(wide, g, to);
    }
  });
}

// `n` elements at `offset` of an array of a run-time type, n <= 16.
vec load_any(const void* data, int32_t dtype, int64_t offset, int64_t n) {
  vec result = zero();
  with_dtype(dtype, [&](auto t) {
    const auto* p = static_cast<const decltype(t)*>(data) + offset;
    result = n == kLanes ? load(p) : load_first(p, n);
  });
  return result;
}

void write(const LinearArgs& a, int64_t row, int64_t column, const float* values) {
  const int64_t n = std::min<int64_t>(kPanel, a.outputs - column);
  if (n <= 0) return;
  vec result = load(values);
  if (a.bias) result = result + load_any(a.bias, a.bias_dtype, column, n);
  if (a.residual) result = result + load_any(a.residual, a.residual_dtype, row * a.residual_row + column, n);
  with_dtype(a.out_dtype, [&](auto t) {
    auto* p = static_cast<decltype(t)*>(a.out) + row * a.out_row + column;
    n == kLanes ? store(p, result) : store_first(p, result, n);
  });
}

template <Format F, int R, int P, bool Unpacked>
void tile(const LinearArgs& a, const uint8_t* panel, const Ready& ready, const Activations& x, int64_t groups,
          int64_t row, int64_t column) {
  alignas(64) float out[R * P * kPanel];
  multiply<F, R, P, Unpacked>(panel, ready, x, groups, out);
  for (int r = 0; r < R; r++)
    for (int p = 0; p < P; p++) write(a, row + r, column + p * kPanel, out + (r * P + p) * kPanel);
}

// tile with as many rows as `count` says, at most R.
template <Format F, int R, int P, bool Unpacked, class... Rest> void tile_of(int64_t count, const Rest&... rest) {
  if (count == R) tile<F, R, P, Unpacked>(rest...);
  else if constexpr (R > 1) tile_of<F, R - 1, P, Unpacked>(count, rest...);
}

// P panels unpacked, in the order the inner loop reads them.
template <Format F, int P> Ready prepare(const uint8_t* panel, int64_t groups) {
  using W = Weights<F>;
  constexpr int Q = P * kParts;
  const int64_t bytes = groups * kSteps * Q * kReadyBytes, floats = groups / W::kGroups * P * W::kScales * kPanel;
  auto* codes = static_cast<uint8_t*>(panel_arena.reserve(bytes + floats * int64_t(sizeof(float))));
  auto* scales = reinterpret_cast<float*>(codes + bytes);
  const Ready ready{codes, scales};
  for (int64_t g = 0; g < groups; g++) {
    for (int p = 0; p < P; p++) {
      const uint8_t* from = panel + p * W::panel_bytes(groups);
      ask_ahead<F>(from, g);
      if (g % W::kGroups) continue;
      scales_of<F>(from + groups * W::kCodeBytes + g / W::kGroups * W::kScaleBytes, scales);
      scales += W::kScales * kPanel;
    }
KVLOOM_UNROLL
    for (int s = 0; s < kSteps; s++)
      for (int q = 0; q < Q; q++, codes += kReadyBytes)
        store_ready(codes, codes_of<F>(panel + q / kParts * W::panel_bytes(groups) + g * W::kCodeBytes + q % kParts * (64 / kParts), s));
  }
  return ready;
}

// Rows [row, end) against panels [first, first + P).
template <Format F, int P> void column_block(const LinearArgs& a, int64_t row, int64_t end, int64_t first, const Activations& x) {
  const int64_t groups = a.inputs / kGroupInputs;
  const auto* panel = static_cast<const uint8_t*>(a.packed) + first * Weights<F>::panel_bytes(groups);
  const bool stored = end - row <= a.stored_rows || kRows == 1;
  const Ready ready = stored ? Ready{} : prepare<F, P>(panel, groups);
  while (row < end) {
    const int64_t rest = end - row, most = stored ? kFewRows : kRows, passes = (rest + most - 1) / most;
    const int64_t count = (rest + passes - 1) / passes;
    const Activations from = from_row<F>(x, row, groups);
    if (stored) tile_of<F, kFewRows, P, false>(count, a, panel, ready, from, groups, row, first * kPanel);
    else if constexpr (kRows > 1) tile_of<F, kRows, P, true>(count, a, panel, ready, from, groups, row, first * kPanel);
    row += count;
  }
}

#ifdef KVLOOM_AMX
static_assert(kChunkRows % kAmxRows == 0);
bool in_tiles(const LinearArgs& a) { return a.rows >= a.tile_rows; }

// Rows [row, end) against panel `p`, in tiles.
template <Format F> void tile_block(const LinearArgs& a, int64_t row, int64_t end, int64_t p, const Activations& x) {
  const int64_t groups = a.inputs / kGroupInputs;
  const auto* panel = static_cast<const uint8_t*>(a.packed) + p * Weights<F>::panel_bytes(groups);
  alignas(64) float sums[kChunkRows * kPanel] = {};
  Slice<F> slice;
  {
    const Tiles tiles(tile_shapes<F>());
    for (int64_t g = 0; g < groups; g += kSliceGroups) {
      const int64_t count = std::min(kSliceGroups, groups - g);
      unpack<F>(panel, groups, g, count, slice);
      for (int64_t r = row; r < end; r += kAmxRows)
        multiply_tiles<F>(slice, from_row<F>(x, r, groups), g, count, sums + (r - row) * kPanel);
    }
  }
  for (int64_t r = row; r < end; r++) write(a, r, p * kPanel, sums + (r - row) * kPanel);
}
#else
bool in_tiles(const LinearArgs&) { return false; }
constexpr int kAmxRows = 1;
template <Format F> void tile_block(const LinearArgs&, int64_t, int64_t, int64_t, const Activations&) {}
#endif

// Block `index`: a chunk of rows against kPanels panels, or against fewer at the end.
template <Format F> void block(const LinearArgs& a, int64_t index, int64_t panels, const Activations& x) {
  const int64_t across = (panels + kPanels - 1) / kPanels, first = index % across * kPanels;
  const int64_t row = index / across * kChunkRows, end = std::min(a.rows, row + kChunkRows);
  const bool tiles = in_tiles(a);
  if (first + kPanels <= panels && end - row > a.one_panel_rows && !tiles) return column_block<F, kPanels>(a, row, end, first, x);
  for (int64_t p = first; p < std::min(panels, first + kPanels); p++)
    tiles ? tile_block<F>(a, row, end, p, x) : column_block<F, 1>(a, row, end, p, x);
}

template <Format F> void linear(const LinearArgs& a) {
  if (a.rows == 0) return;
  const int64_t panels = (a.outputs + kPanel - 1) / kPanel, chunks = (a.rows + kChunkRows - 1) / kChunkRows;
  const int64_t blocks = (panels + kPanels - 1) / kPanels * chunks, groups = a.inputs / kGroupInputs;
  const int threads = threads_for(a.inputs * a.outputs / 4, a.threads);
  const int64_t step = in_tiles(a) ? kAmxRows : 1, filled = (a.rows + step - 1) / step * step;
  const Activations x = activations<F>(activation_arena, filled, a.inputs, step);
  parallel_rows(a.rows <= kAlone ? 1 : threads, filled, [&](int64_t row, int64_t end) {
    for (; row < end; row++) quantise_row<F>(a, row, from_row<F>(x, row, groups));
  });
  const int64_t products = std::min(a.rows, kChunkRows) * a.inputs * kPanels * kPanel;  // of a block
  const int64_t each = std::max<int64_t>(1, std::min(blocks / (8 * threads), kItemProducts / products));
  parallel(threads, (blocks + each - 1) / each, [&](int64_t item) {
    for (int64_t i = item * each, end = std::min(blocks, i + each); i < end; i++) block<F>(a, i, panels, x);
  });
}

// The file's rows into panels. Outputs past the last get scale 0.
template <Format F> void pack(const PackArgs& a) {
  using W = Weights<F>;
  using B = FileBlock<F>;
  const int64_t groups = a.inputs / kGroupInputs, blocks = groups / W::kGroups, panels = (a.outputs + kPanel - 1) / kPanel;
  parallel(a.threads, panels, [&](int64_t p) {
    uint8_t* panel = static_cast<uint8_t*>(a.packed) + p * W::panel_bytes(groups);
    std::memset(panel, 0, size_t(W::panel_bytes(groups)));
    for (int64_t o = p * kPanel; o < std::min(a.outputs, (p + 1) * kPanel); o++)
      for (int64_t b = 0; b < blocks; b++) {
        const uint8_t* block = static_cast<const uint8_t*>(a.rows) + (o * blocks + b) * B::kBytes;
        uint8_t codes[B::kValues];
        codes_of_block<F>(block, codes);
        for (int g = 0; g < W::kGroups; g++)
          place<F>(codes + g * kGroupInputs, o % kPanel, panel + (b * W::kGroups + g) * W::kCodeBytes);
        place_scales<F>(block, o % kPanel, panel + groups * W::kCodeBytes + b * W::kScaleBytes);
      }
  });
}

// Row `index` of the matrix: out[inputs]; zeros where there is none.
template <Format F, class T> void read_row(const RowsOfArgs& a, int64_t index, T* out) {
  using W = Weights<F>;
  if (index < 0 || index >= a.outputs) return void(std::fill(out, out + a.inputs, T{}));
  const int64_t groups = a.inputs / kGroupInputs, o = index % kPanel;
  const uint8_t* panel = static_cast<const uint8_t*>(a.packed) + index / kPanel * W::panel_bytes(groups);
  alignas(64) float scales[W::kScales * kPanel], wide[kGroupInputs];
  for (int64_t g = 0; g < groups; g++) {
    const int64_t at = g % W::kGroups;
    if (at == 0) scales_of<F>(panel + groups * W::kCodeBytes + g / W::kGroups * W::kScaleBytes, scales);
    const float min = W::kHasMin ? scales[(W::kGroups * W::kRuns + at) * kPanel + o] : 0.0f;
    for (int s = 0; s < kSteps; s++) {
      const float scale = scales[(at * W::kRuns + s * W::kRuns / kSteps) * kPanel + o];
      four_codes<F>(panel + g * W::kCodeBytes, o, s, wide + 4 * s);
      for (int i = 4 * s; i < 4 * s + 4; i++) wide[i] = scale * wide[i] + min;
    }
    narrow(wide, kGroupInputs, out + g * kGroupInputs);
  }
}

template <Format F> void read_rows(const RowsOfArgs& a) {
  parallel_rows(threads_for(a.rows * a.inputs, a.threads), a.rows, [&](int64_t r, int64_t end) {
    for (; r < end; r++)
      with_dtype(a.dtype, [&](auto t) { read_row<F>(a, a.indices[r], static_cast<decltype(t)*>(a.out) + r * a.out_row); });
  });
}

}  // namespace
}  // namespace kvloom

KVLOOM_API void kvloom_linear(const kvloom::LinearArgs* args) {
  kvloom::with_format(args->format, [&](auto f) { kvloom::linear<f()>(*args); });
}

KVLOOM_API void kvloom_linear_pack(const kvloom::PackArgs* args) {
  kvloom::with_format(args->format, [&](auto f) { kvloom::pack<f()>(*args); });
}

KVLOOM_API void kvloom_linear_rows(const kvloom::RowsOfArgs* args) {
  kvloom::with_format(args->format, [&](auto f) { kvloom::read_rows<f()>(*args); });
}

KVLOOM_API int64_t kvloom_linear_bytes(int64_t inputs, int64_t outputs, int32_t format) {
  const int64_t groups = inputs / kvloom::kGroupInputs, panels = (outputs + kvloom::kPanel - 1) / kvloom::kPanel;
  return kvloom::with_format(format, [&](auto f) { return panels * kvloom::Weights<f()>::panel_bytes(groups); });
}
