// Linear layers with quantised weights: out = x W^T (+ bias) (+ residual). Layouts and the inner loop are in quant.h.

#include <algorithm>

#include "abi.h"
#include "parallel.h"
#include "quant.h"
#include "scratch.h"

namespace kvloom {
namespace {

constexpr int64_t kChunkRows = 240;  // rows that meet one panel before the next: their activations stay in the L2 cache
constexpr int64_t kFewRows = 4;  // up to here the calling thread rounds the activations: shorter than a call of its own

constexpr int64_t kItemProducts = 4 << 20;  // some 50 microseconds: what is lost when a thread's core is taken meanwhile

thread_local Arena activation_arena, panel_arena;

Activations activations(Arena& arena, int64_t rows, int64_t inputs) {
  const int64_t groups = inputs / kGroupInputs;
  Activations a;
  for (Cut cut(nullptr);; cut = Cut(arena.reserve(cut.used()))) {
    a.scale = cut.take<float>(rows * groups);
    a.scaled_sum = cut.take<float>(rows * groups);
    a.start = cut.take<int32_t>(rows * groups);
    a.codes = cut.take<Code>(rows * groups * kGroupCodes);
    if (a.scale) return a;
  }
}

Activations from_row(const Activations& a, int64_t row, int64_t groups) {
  const int64_t at = row * groups;
  return {a.codes + at * kGroupCodes, a.scale + at, a.scaled_sum + at, a.start + at};
}

template <class T> void quantise_row(const T* x, int64_t inputs, int32_t offset, const Activations& to) {
  alignas(64) float wide[kGroupInputs];
  for (int64_t g = 0; g < inputs / kGroupInputs; g++) {
    widen(x + g * kGroupInputs, kGroupInputs, wide);
    quantise_group(wide, offset, to.codes + g * kGroupCodes, to.scale + g, to.scaled_sum + g, to.start + g);
  }
}

void quantise_row(const LinearArgs& a, int64_t row, int32_t offset, const Activations& to) {
  with_dtype(a.dtype, [&](auto t) {
    quantise_row(static_cast<const decltype(t)*>(a.x) + row * a.x_row, a.inputs, offset, to);
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

template <Format F, int R, int P>
void tile(const LinearArgs& a, const uint8_t* panel, const uint8_t* ready, const Activations& x, int64_t groups,
          int64_t row, int64_t column) {
  alignas(64) float out[R * P * kPanel];
  multiply<F, R, P>(panel, ready, x, groups, out);
  for (int r = 0; r < R; r++)
    for (int p = 0; p < P; p++) write(a, row + r, column + p * kPanel, out + (r * P + p) * kPanel);
}

// tile with as many rows as `count` says, at most R.
template <Format F, int R, int P, class... Rest> void tile_of(int64_t count, const Rest&... rest) {
  if (count == R) tile<F, R, P>(rest...);
  else if constexpr (R > 1) tile_of<F, R - 1, P>(count, rest...);
}

constexpr bool kSpread = kParts > 1;  // bytes must become int16 before they are multiplied

// P panels' weights ready to multiply, in the order the inner loop reads them; null where that would save nothing.
template <Format F, int P> const uint8_t* prepare(const uint8_t* panel, int64_t groups) {
  using W = Weights<F>;
  if (!(W::kNibbles || kSpread) || kRows == 1) return nullptr;
  constexpr int Q = P * kParts;
  auto* to = static_cast<uint8_t*>(panel_arena.reserve(groups * kSteps * Q * kReadyBytes));
  for (int64_t g = 0; g < groups; g++) {
    for (int p = 0; p < P; p++) ask_ahead<F>(panel + p * W::panel_bytes(groups), g);
    for (int s = 0; s < kSteps; s++)
      for (int q = 0; q < Q; q++, to += kReadyBytes) {
        const uint8_t* from = panel + q / kParts * W::panel_bytes(groups) + g * W::kCodeBytes + q % kParts * (64 / kParts);
        if (!W::kNibbles) store_ready(to, whole(load_stored(from + s * 64)));
        else if (s < kSteps / 2) store_ready(to, low_nibbles(load_stored(from + s * 64)));
        else store_ready(to, high_nibbles(load_stored(from + (s - kSteps / 2) * 64)));
      }
  }
  return static_cast<const uint8_t*>(panel_arena.reserve(0));
}

// Rows [row, end) against panels [first, first + P).
template <Format F, int P> void column_block(const LinearArgs& a, int64_t row, int64_t end, int64_t first, const Activations& x) {
  const int64_t groups = a.inputs / kGroupInputs, panel_bytes = Weights<F>::panel_bytes(groups);
  const auto* panel = static_cast<const uint8_t*>(a.packed) + first * panel_bytes;
  const uint8_t* ready = end - row > kRows ? prepare<F, P>(panel, groups) : nullptr;
  while (row < end) {
    const int64_t rest = end - row;
    const int64_t count = rest > kRows && rest < 2 * kRows ? (rest + 1) / 2 : std::min<int64_t>(rest, kRows);
    const Activations block = from_row(x, row, groups);
    tile_of<F, kRows, P>(count, a, panel, ready, block, groups, row, first * kPanel);
    row += count;
  }
}

// Block `index`: a chunk of rows against kPanels panels, or against the odd one at the end.
template <Format F> void block(const LinearArgs& a, int64_t index, int64_t panels, const Activations& x) {
  const int64_t across = (panels + kPanels - 1) / kPanels, first = index % across * kPanels;
  const int64_t row = index / across * kChunkRows, end = std::min(a.rows, row + kChunkRows);
  if (first + kPanels <= panels) column_block<F, kPanels>(a, row, end, first, x);
  else column_block<F, 1>(a, row, end, first, x);
}

template <Format F> void linear(const LinearArgs& a) {
  if (a.rows == 0) return;
  const int64_t panels = (a.outputs + kPanel - 1) / kPanel, chunks = (a.rows + kChunkRows - 1) / kChunkRows;
  const int64_t blocks = (panels + kPanels - 1) / kPanels * chunks, groups = a.inputs / kGroupInputs;
  const int threads = threads_for(a.inputs * a.outputs / 4, a.threads);
  const Activations x = activations(activation_arena, a.rows, a.inputs);
  parallel_rows(a.rows <= kFewRows ? 1 : threads, a.rows, [&](int64_t row, int64_t end) {
    for (; row < end; row++) quantise_row(a, row, Weights<F>::kOffset, from_row(x, row, groups));
  });
  const int64_t products = std::min(a.rows, kChunkRows) * a.inputs * kPanels * kPanel;  // of a block
  const int64_t each = std::max<int64_t>(1, std::min(blocks / (8 * threads), kItemProducts / products));
  parallel(threads, (blocks + each - 1) / each, [&](int64_t item) {
    for (int64_t i = item * each, end = std::min(blocks, i + each); i < end; i++) block<F>(a, i, panels, x);
  });
}

// Codes [outputs][inputs], one per byte, into panels. Outputs past the last get scale 0.
template <Format F> void pack(const PackArgs& a) {
  using W = Weights<F>;
  const int64_t groups = a.inputs / kGroupInputs, panels = (a.outputs + kPanel - 1) / kPanel;
  std::memset(a.packed, 0, size_t(panels * W::panel_bytes(groups)));
  for (int64_t o = 0; o < a.outputs; o++)
    for (int64_t g = 0; g < groups; g++) {
      auto* panel = static_cast<uint8_t*>(a.packed) + o / kPanel * W::panel_bytes(groups);
      auto* scales = reinterpret_cast<f16*>(panel + groups * W::kCodeBytes) + g * W::kScales;
      scales[o % kPanel] = from_float<f16>(a.scales[o * groups + g]);
      if (W::kHasMin) scales[kPanel + o % kPanel] = from_float<f16>(a.mins[o * groups + g]);
      const auto* codes = static_cast<const uint8_t*>(a.codes) + o * a.inputs + g * kGroupInputs;
      for (int i = 0; i < kGroupInputs; i++) {
        const int step = i / 4, lane = int(o % kPanel) * 4 + i % 4;
        uint8_t* group = panel + g * W::kCodeBytes;
        if (!W::kNibbles) group[step * 64 + lane] = codes[i];
        else group[step % 4 * 64 + lane] |= uint8_t(codes[i] << (step / 4 * 4));
      }
    }
}

}  // namespace
}  // namespace kvloom

KVLOOM_API void kvloom_linear(const kvloom::LinearArgs* args) {
  kvloom::with_format(args->format, [&](auto f) { kvloom::linear<f()>(*args); });
}

KVLOOM_API void kvloom_linear_pack(const kvloom::PackArgs* args) {
  kvloom::with_format(args->format, [&](auto f) { kvloom::pack<f()>(*args); });
}

KVLOOM_API int64_t kvloom_linear_bytes(int64_t inputs, int64_t outputs, int32_t format) {
  const int64_t groups = inputs / kvloom::kGroupInputs, panels = (outputs + kvloom::kPanel - 1) / kvloom::kPanel;
  return kvloom::with_format(format, [&](auto f) { return panels * kvloom::Weights<f()>::panel_bytes(groups); });
}
