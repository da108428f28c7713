// Calls of kernels with numbers that are the same on every machine; what comes out goes to standard output, a line a call. See
// check_kernels.py.

#include <cstdio>
#include <vector>

#include "abi.h"
#include "vec.h"

extern "C" {
void kvloom_linear(const kvloom::LinearArgs*);
void kvloom_linear_pack(const kvloom::PackArgs*);
void kvloom_linear_rows(const kvloom::RowsOfArgs*);
int64_t kvloom_linear_bytes(int64_t, int64_t, int32_t);
void* kvloom_plan(const kvloom::RowsView*, void*);
void kvloom_plan_free(void*);
void kvloom_attend(const kvloom::AttendArgs*);
void kvloom_silu_mul(const kvloom::SiluArgs*);
void kvloom_add_rms_norm(const kvloom::NormArgs*);
}

using namespace kvloom;

#ifdef KVLOOM_AMX_MODEL
constexpr int32_t kTiles = 16;  // rows
#else
constexpr int32_t kTiles = 1 << 30;
#endif

uint32_t state = 1;
uint32_t draw() { return (state = state * 1664525u + 1013904223u) >> 8; }
float number() { return float(draw()) / float(1 << 23) - 1.0f; }

template <class T> std::vector<T> numbers(size_t count) {
  std::vector<T> made(count);
  for (T& one : made) one = from_float<T>(number());
  return made;
}

template <class T> void tell(const char* name, int which, const std::vector<T>& values) {
  std::printf("%s %d", name, which);
  for (T value : values) std::printf(" %.7g", double(to_float(value)));
  std::printf("\n");
}

void linears(int32_t format, int64_t values, int64_t bytes, std::vector<int64_t> factors) {
  const int64_t outputs = 40, inputs = 512, blocks = outputs * inputs / values;
  std::vector<uint8_t> file(size_t(blocks * bytes));
  for (uint8_t& one : file) one = uint8_t(draw());
  for (int64_t b = 0; b < blocks; b++)
    for (int64_t at : factors) {
      const f16 factor = from_float<f16>(0.005f + 0.004f * number());
      std::memcpy(&file[size_t(b * bytes + at)], &factor, 2);
    }
  std::vector<uint8_t> packed(size_t(kvloom_linear_bytes(inputs, outputs, format)));
  const PackArgs pack{file.data(), packed.data(), inputs, outputs, format, 2};
  kvloom_linear_pack(&pack);
  for (int64_t rows : {1, 3, 20}) {
    const auto x = numbers<bf16>(size_t(rows * inputs));
    std::vector<float> out(size_t(rows * outputs));
    const LinearArgs args{x.data(), inputs, out.data(), outputs, nullptr, 0, nullptr, packed.data(), rows, inputs, outputs,
                          format, kBF16, kF32, 0, 0, 2, 2, 8, kTiles};
    kvloom_linear(&args);
    tell("linear", format, out);
  }
  const int64_t indices[] = {0, 39, 17};
  std::vector<float> out(size_t(3 * inputs));
  const RowsOfArgs rows{packed.data(), indices, out.data(), inputs, 3, inputs, outputs, format, kF32, 2};
  kvloom_linear_rows(&rows);
  tell("rows", format, out);
}

template <class T> void attention(int32_t dtype, int64_t dim) {
  const int32_t q_heads = 6, kv_heads = 2, block = 16, blocks = 80, rows = 12;
  std::vector<int32_t> table(blocks), request(rows, 0), start(rows, 0), stop(rows);
  for (int32_t i = 0; i < blocks; i++) table[size_t(i)] = (i * 37) % blocks;
  for (int32_t r = 0; r < rows; r++) stop[size_t(r)] = r < 4 ? 300 * (r + 1) : 1201 + r - 4;  // single rows, then a chunk
  const RowsView view{table.data(), request.data(), start.data(), stop.data(), nullptr, nullptr, nullptr, nullptr, blocks,
                      rows, 1, 0, q_heads, kv_heads, int32_t(dim), 2};
  const auto k = numbers<T>(size_t(blocks * kv_heads * block * dim)), v = numbers<T>(k.size());
  const auto q = numbers<T>(size_t(rows * q_heads * dim));
  std::vector<T> out(q.size());
  std::vector<float> lse(size_t(rows * q_heads));
  auto paged = [&](const std::vector<T>& of) {
    return Paged{const_cast<T*>(of.data()), kv_heads * block * dim, block * dim, dim};
  };
  void* plan = kvloom_plan(&view, nullptr);
  Totals totals{};
  AttendArgs args{};
  args.q = q.data(), args.q_row = q_heads * dim, args.q_head = dim;
  args.out = out.data(), args.out_row = args.q_row, args.out_head = dim;
  args.lse = lse.data(), args.lse_row = q_heads;
  args.k = paged(k), args.v = paged(v), args.block_size = block, args.plan = plan, args.totals = &totals;
  args.scale = 0.2f, args.dtype = dtype;
  kvloom_attend(&args);
  kvloom_plan_free(plan);
  tell("attend", dtype, out), tell("lse", dtype, lse);
}

template <class T> void layer(int32_t dtype) {
  const int64_t rows = 3, hidden = 100;
  auto x = numbers<float>(size_t(rows * hidden));
  const auto delta = numbers<T>(x.size()), gates = numbers<T>(2 * x.size());
  const auto weight = numbers<float>(size_t(hidden));
  std::vector<T> normed(x.size()), gated(x.size());
  const NormArgs norm{x.data(), hidden, delta.data(), hidden, weight.data(), normed.data(), hidden, rows, hidden, 1e-5f,
                      kF32, kF32, dtype, 2};
  kvloom_add_rms_norm(&norm);
  const SiluArgs silu{gates.data(), 2 * hidden, gated.data(), hidden, rows, hidden, dtype, 2};
  kvloom_silu_mul(&silu);
  tell("norm", dtype, normed), tell("silu", dtype, gated);
}

int main() {
  linears(0, 32, 18, {0}), linears(1, 32, 20, {0, 2}), linears(2, 32, 22, {0}), linears(3, 32, 24, {0, 2});
  linears(4, 32, 34, {0}), linears(5, 256, 144, {0, 2}), linears(6, 256, 176, {0, 2}), linears(7, 256, 210, {208});
  attention<float>(kF32, 64), attention<bf16>(kBF16, 64), attention<f16>(kF16, 64), attention<bf16>(kBF16, 80);
  layer<float>(kF32), layer<bf16>(kBF16), layer<f16>(kF16);
}
