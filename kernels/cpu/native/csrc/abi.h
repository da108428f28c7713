// The C structures that cross into Python. library.py mirrors each field by field; change both together.
// Strides are in elements. A null pointer means "absent".
#pragma once

#include <cstdint>

namespace kvloom {

struct Paged {  // one of the two cache tensors: [blocks, heads, block_size, head_dim], innermost stride 1
  void* data;
  int64_t block, head, slot;
};

struct RowsView {  // interface.Rows
  const int32_t *tables, *request, *start, *stop;
  const int32_t *positions, *offsets, *lengths;  // interface.Lists, or null
  const int32_t* most;                           // null: contents are those of planning
  int64_t table_stride;
  int32_t rows, start_heads, list_heads, q_heads, kv_heads, head_dim, threads;  // *_heads: columns, 1 or kv_heads
};

struct Totals {  // interface.Counters
  int64_t rows, positions, kv_bytes, score_bytes, list_kv_bytes;
};

struct AttendArgs {
  const void* q;
  int64_t q_row, q_head;
  void* out;  // null: scores only
  int64_t out_row, out_head;
  float* lse;
  int64_t lse_row;
  float* logits;
  int64_t logits_rows, logits_row, logits_head, width;  // logits_rows: how many of the first rows want them
  Paged k, v;
  int64_t block_size;
  const void* plan;
  const int32_t* active;     // [rows]: negative, and the row is left out
  const int32_t* heads;      // [kv_heads]: whose list a KV head reads; negative, and the head is left out
  const int32_t* positions;  // of lists, in place of the plan's
  int64_t* read;             // [rows]: positions seen are added
  const float* sums;         // interface.Folded: [2, kv_heads, head_dim] from sums_at[row] on, if counts[row] is not 0; or null
  const int32_t *sums_at, *counts;
  Totals* totals;
  float scale;
  int32_t dtype;
};

struct NormArgs {
  void* x;
  int64_t x_row;
  const void* delta;
  int64_t delta_row;
  const void* weight;
  void* out;
  int64_t out_row, rows, hidden;
  float eps;
  int32_t x_dtype, weight_dtype, dtype;  // dtype: of delta and out
  int32_t threads;
};

struct RotateStoreArgs {
  const void* qkv;
  int64_t qkv_row;
  const float *cos, *sin;
  int64_t angle_row;
  const int64_t *positions, *slots;
  Paged k, v;
  int64_t block_size;
  void* q;
  int64_t q_row, q_head;
  const void *q_norm, *k_norm;
  int64_t rows;
  int32_t q_heads, kv_heads, head_dim, rotary;
  float eps;
  int32_t norm_dtype, dtype, threads;
};

struct StoreArgs {
  const void* k;
  int64_t k_row, k_head;
  const void* v;
  int64_t v_row, v_head;
  Paged k_cache, v_cache;
  int64_t block_size;
  const int64_t* slots;
  int64_t rows, row_bytes_per_head;
  int32_t heads, item_bytes, threads;
};

struct RotateArgs {
  const void* k;
  int64_t k_row, k_head;
  void* out;
  int64_t out_row, out_head;
  const int32_t* delta;
  const float* inv_freq;
  int64_t rows;
  int32_t heads, head_dim, rotary, dtype, threads;
};

struct FoldArgs {
  Paged k, v;
  int64_t block_size;
  const int32_t* tables;
  int64_t table_stride;
  const int32_t *request, *first, *last, *at;  // [rows]: positions [first, last) go to the sums from at on; negative to leave out
  float* sums;
  int64_t rows;
  int32_t kv_heads, head_dim, origin, dtype, threads;
};

struct SelectArgs {
  const float* scores;
  int64_t scores_row, score_head;
  const int32_t *lengths, *offset;
  int32_t* columns;
  const int32_t* at;  // [rows]: where in columns a row's first list begins, negative to leave the row out; or null
  int64_t columns_row, columns_head;
  int32_t* counts;
  int64_t rows;
  int32_t heads, k, threads;
};

struct RenewArgs {
  const void* q;
  int64_t q_row, q_head;
  const float *cos, *sin;  // [rows, rotary / 2], or null
  int32_t* words;
  const int32_t *at, *stop, *due;
  int32_t *active, *start, *lengths;
  int64_t* counts;
  int64_t rows, tail_at, query_at;
  int32_t q_heads, head_dim, rotary, compare, recent, most, width, lists, dense, dtype;  // lists: columns of lengths
  float threshold;
};

struct PoolArgs {
  const float* logits;
  int64_t logits_row, logits_head;
  const int32_t *first, *last, *active;
  float* out;
  int64_t out_row, out_group, rows;
  int32_t q_heads, groups, window, maximum, threads;  // maximum: combine heads by it, not by their sum
};

struct SampleArgs {
  const float* logits;
  int64_t logits_row;
  const double* how;  // [rows, 5]: see interface.Kernels.sample
  int64_t* out;
  const uint32_t* bits;  // interface.Allowed, or null
  int64_t bits_row;
  const int32_t* mask;
  int64_t rows, vocab;
  int32_t threads;
};

struct LinearArgs {  // out = x W^T (+ bias) (+ residual)
  const void* x;
  int64_t x_row;
  void* out;
  int64_t out_row;
  const void* residual;
  int64_t residual_row;
  const void *bias, *packed;
  int64_t rows, inputs, outputs;
  int32_t format, dtype, out_dtype, bias_dtype, residual_dtype, threads;
  // Which loop, by rows (paths.py): up to one_panel_rows of them meet panels one by one, up to stored_rows panels as they are
  // stored, more of them panels that are unpacked first; from tile_rows on they are multiplied in tiles, if this library has
  // any. No result depends on it.
  int32_t one_panel_rows, stored_rows, tile_rows;
};

struct SiluArgs {
  const void* gate_up;
  int64_t in_row;
  void* out;
  int64_t out_row, rows, intermediate;
  int32_t dtype, threads;
};

struct PackArgs {
  const void* rows;  // [outputs] of the file's blocks, without gaps
  void* packed;
  int64_t inputs, outputs;
  int32_t format, threads;
};

struct RowsOfArgs {  // of a packed matrix
  const void* packed;
  const int64_t* indices;
  void* out;
  int64_t out_row, rows, inputs, outputs;
  int32_t format, dtype, threads;
};

struct Call {  // of one of the functions that take one of these structures
  void (*run)(const void* args);
  void* args;
  int64_t* rows;  // the structure's own count of rows, if it has one: every replay's own goes there
};

}  // namespace kvloom

#define KVLOOM_API extern "C" __attribute__((visibility("default")))
