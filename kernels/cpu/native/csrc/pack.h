// Key blocks turned so that one register holds one dimension of sixteen positions, in fp32: packed[dim][position].
//
// fp32 and not bf16, although the processor may have a bf16 dot product: on Intel (measured on Emerald Rapids) vdpbf16ps starts
// every other cycle and fp32 FMA twice a cycle, so widening once and multiplying in fp32 is twice as fast. Where both start
// twice a cycle, pairs.h is used for bf16.
#pragma once

#include "dispatch.h"
#include "plan.h"

namespace kvloom {

#ifdef KVLOOM_AVX512
// Dwords [w, w + 4) of sixteen rows, turned: out[i] holds dword w + i of rows 0..15.
inline void turn_dwords(const float* const* rows, int64_t w, __m512i* out) {
  __m512i part[4];  // part[i], 128-bit lane j: dwords of row i + 4 j
  for (int i = 0; i < 4; i++) {
    part[i] = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i*)(rows[i] + w)));
    part[i] = _mm512_mask_broadcast_i32x4(part[i], 0x00f0, _mm_loadu_si128((const __m128i*)(rows[i + 4] + w)));
    part[i] = _mm512_mask_broadcast_i32x4(part[i], 0x0f00, _mm_loadu_si128((const __m128i*)(rows[i + 8] + w)));
    part[i] = _mm512_mask_broadcast_i32x4(part[i], 0xf000, _mm_loadu_si128((const __m128i*)(rows[i + 12] + w)));
  }
  const __m512i a = _mm512_unpacklo_epi32(part[0], part[1]), b = _mm512_unpackhi_epi32(part[0], part[1]);
  const __m512i c = _mm512_unpacklo_epi32(part[2], part[3]), d = _mm512_unpackhi_epi32(part[2], part[3]);
  out[0] = _mm512_unpacklo_epi64(a, c), out[1] = _mm512_unpackhi_epi64(a, c);
  out[2] = _mm512_unpacklo_epi64(b, d), out[3] = _mm512_unpackhi_epi64(b, d);
}

// Sixteen bytes of each of sixteen rows as fp32 columns, one per dimension. fp16 has no such form: it is widened first.
template <class T> struct Columns;
template <> struct Columns<float> {
  static constexpr int kCount = 4;
  static void get(const float* const* rows, int64_t w, vec* columns) {
    __m512i turned[4];
    turn_dwords(rows, w, turned);
    for (int i = 0; i < 4; i++) columns[i] = _mm512_castsi512_ps(turned[i]);
  }
};
template <> struct Columns<bf16> {
  static constexpr int kCount = 8;
  static void get(const float* const* rows, int64_t w, vec* columns) {
    __m512i turned[4];
    turn_dwords(rows, w, turned);
    for (int i = 0; i < 4; i++) {
      columns[2 * i] = _mm512_castsi512_ps(_mm512_slli_epi32(turned[i], 16));
      columns[2 * i + 1] = _mm512_castsi512_ps(_mm512_and_si512(turned[i], _mm512_set1_epi32(int(0xffff0000u))));
    }
  }
};
#endif

#if defined(KVLOOM_AVX2) && !defined(KVLOOM_AVX512)
// Dwords [w, w + 8) of eight rows, turned: out[i] holds dword w + i of rows 0..7.
inline void turn_dwords(const float* const* rows, int64_t w, __m256* out) {
  __m256 half[8];  // half[i]: dwords 0..3 of row i and of row i + 4; half[i + 4]: dwords 4..7
  for (int i = 0; i < 4; i++)
    for (int j = 0; j < 2; j++)
      half[i + 4 * j] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(rows[i] + w + 4 * j)),
                                             _mm_loadu_ps(rows[i + 4] + w + 4 * j), 1);
  for (int j = 0; j < 8; j += 4) {
    const __m256 a = _mm256_unpacklo_ps(half[j], half[j + 1]), b = _mm256_unpackhi_ps(half[j], half[j + 1]);
    const __m256 c = _mm256_unpacklo_ps(half[j + 2], half[j + 3]), d = _mm256_unpackhi_ps(half[j + 2], half[j + 3]);
    out[j] = _mm256_shuffle_ps(a, c, 0x44), out[j + 1] = _mm256_shuffle_ps(a, c, 0xee);
    out[j + 2] = _mm256_shuffle_ps(b, d, 0x44), out[j + 3] = _mm256_shuffle_ps(b, d, 0xee);
  }
}

// Eight rows into columns `base` on of packed.
inline void pack_eight(const float* const* rows, int64_t dim, float* packed) {
  __m256 turned[8];
  for (int64_t d = 0; d < dim; d += 8) {
    turn_dwords(rows, d, turned);
    for (int i = 0; i < 8; i++) _mm256_storeu_ps(packed + (d + i) * kBlock, turned[i]);
  }
}
inline void pack_eight(const bf16* const* rows, int64_t dim, float* packed) {  // dim % 16 == 0
  __m256 turned[8];
  for (int64_t d = 0; d < dim; d += 16) {
    turn_dwords(reinterpret_cast<const float* const*>(rows), d / 2, turned);
    for (int i = 0; i < 8; i++) {
      const __m256i pair = _mm256_castps_si256(turned[i]);
      const __m256i odd = _mm256_and_si256(pair, _mm256_set1_epi32(int(0xffff0000u)));
      _mm256_storeu_ps(packed + (d + 2 * i) * kBlock, _mm256_castsi256_ps(_mm256_slli_epi32(pair, 16)));
      _mm256_storeu_ps(packed + (d + 2 * i + 1) * kBlock, _mm256_castsi256_ps(odd));
    }
  }
}
#endif

// Whether keys of T and this dimension can be turned straight from the cache.
template <class T> constexpr bool turns_in_place(int64_t dim) {
#if defined(KVLOOM_AVX512)
  return sizeof(T) == 4 ? dim % 4 == 0 : std::is_same_v<T, bf16> && dim % 8 == 0;
#elif defined(KVLOOM_AVX2)
  return sizeof(T) == 4 ? dim % 8 == 0 : std::is_same_v<T, bf16> && dim % 16 == 0;
#else
  return false && dim;
#endif
}

// Packs rows[0, count), count <= kBlock, into packed[dim rounded up to 8][kBlock]. rows holds valid addresses up to the
// next multiple of 16; the columns past count are whatever they point to, and are masked by whoever reads them.
// wide: [16][dim + 16] fp32 scratch for what cannot be turned in place.
template <class T> void pack_keys(const T* const* rows, int count, int64_t dim, float* wide, float* packed) {
  for (int base = 0; base < count; base += 16) {
#ifdef KVLOOM_AVX512
    if constexpr (!std::is_same_v<T, f16>)
      if (turns_in_place<T>(dim)) {
        vec columns[Columns<T>::kCount];
        for (int64_t d = 0; d < dim; d += Columns<T>::kCount) {
          Columns<T>::get(reinterpret_cast<const float* const*>(rows + base), d * int64_t(sizeof(T)) / 4, columns);
          for (int i = 0; i < Columns<T>::kCount; i++) store(packed + (d + i) * kBlock + base, columns[i]);
        }
        continue;
      }
    const float* lines[16];
    for (int i = 0; i < 16; i++) widen(rows[base + i], dim, wide + i * (dim + 16)), lines[i] = wide + i * (dim + 16);
    vec columns[4];
    for (int64_t d = 0; d < dim; d += 4) {
      Columns<float>::get(lines, d, columns);
      for (int i = 0; i < 4; i++) store(packed + (d + i) * kBlock + base, columns[i]);
    }
#elif defined(KVLOOM_AVX2)
    for (int half = 0; half < 16; half += 8) {
      if constexpr (std::is_same_v<T, bf16>)
        if (dim % 16 == 0) {
          pack_eight(rows + base + half, dim, packed + base + half);
          continue;
        }
      const float* lines[8];
      for (int i = 0; i < 8; i++) widen(rows[base + half + i], dim, wide + i * (dim + 16)), lines[i] = wide + i * (dim + 16);
      pack_eight(lines, dim, packed + base + half);
    }
#else
    for (int i = 0; i < 16; i++)
      for (int64_t d = 0; d < dim; d++) packed[d * kBlock + base + i] = to_float(rows[base + i][d]);
#endif
  }
}

}  // namespace kvloom
