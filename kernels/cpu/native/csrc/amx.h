// AMX: eight tiles of up to 16 rows of 64 bytes, and what is done with them, as far as the kernels use it.
//
// Under KVLOOM_AMX_MODEL amx_model.h stands in for the instructions, on any processor. The instructions are written out here
// because gcc's intrinsics name tiles by literals only, and do not say that a load reads memory.
//
// The system lets a process use tiles once it has asked: variants.py does, and no library with tiles is loaded without.
#pragma once

#include "vec.h"

#if defined(KVLOOM_AMX_MODEL) || (defined(__AMX_TILE__) && defined(__AMX_INT8__) && defined(KVLOOM_VNNI))
#define KVLOOM_AMX 1
#if defined(KVLOOM_BF16_DOT) && (defined(KVLOOM_AMX_MODEL) || defined(__AMX_BF16__))
#define KVLOOM_AMX_BF16 1
#endif

namespace kvloom {

constexpr int kAmxRows = 16;

struct alignas(64) TileShapes {  // as ldtilecfg reads them
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {};  // of a row
  uint8_t rows[16] = {};
};

#ifdef KVLOOM_AMX_MODEL
}  // namespace kvloom
#include "amx_model.h"
namespace kvloom {
#else
inline void configure_tiles(const TileShapes& shapes) { asm volatile("ldtilecfg %0" ::"m"(shapes) : "memory"); }
inline void release_tiles() { asm volatile("tilerelease" ::: "memory"); }
template <int T> inline void zero_tile() { asm volatile("tilezero %%tmm%c0" ::"i"(T)); }
template <int T> inline void load_tile(const void* p, int64_t row_bytes) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(row_bytes), "i"(T) : "memory");
}
template <int T> inline void store_tile(void* p, int64_t row_bytes) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(row_bytes), "i"(T) : "memory");
}
// Sums[m][n] += A[m][4 k + i] B[k][4 n + i] over all k and i < 4; bytes signed, sums int32.
template <int Sums, int A, int B> inline void multiply_signed_bytes() {
  asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(Sums), "i"(A), "i"(B));
}
// Sums[m][n] += A[m][2 k] B[k][2 n] over all k, and the odd ones, which are summed apart; numbers bf16, sums fp32. Denormals are
// zeros throughout.
template <int Sums, int A, int B> inline void multiply_bf16() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(Sums), "i"(A), "i"(B));
}
#endif

// This thread's tiles, in these shapes, until the end of the scope: what is kept there costs every switch of threads.
class Tiles {
 public:
  explicit Tiles(const TileShapes& shapes) { configure_tiles(shapes); }
  ~Tiles() { release_tiles(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

}  // namespace kvloom
#endif
