// Numbers as they are stored, as many of them at a time as a register holds, and the random bits of rounding.
// Loops over elements are written so that a compiler vectorises them, here and in all files beside.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>
#if defined(__AVX512F__) || (defined(__AVX2__) && defined(__FMA__))
#define REGISTERS  // that a block of 16 float32 can be permuted in
#include <immintrin.h>
#endif

namespace {

using bf16 = uint16_t;

constexpr int64_t LANES = 16;  // neighbours that a sketch keeps together: of insitu.optim.projection
constexpr float TINY = std::numeric_limits<float>::min();  // 2^-126

inline float bits_to_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline uint32_t float_to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float load(float x) { return x; }
inline float load(bf16 x) { return bits_to_float(uint32_t(x) << 16); }
inline void store(float& out, float x) { out = x; }
inline void store(bf16& out, float x) {  // to nearest even
  uint32_t bits = float_to_bits(x);
  out = bf16((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

// As insitu.optim.rounding has it, to the bit.
constexpr uint32_t WEYL = 0x9E3779B1u, MIXER = 0x85EBCA6Bu;
inline uint32_t random_word(uint32_t index, uint32_t base, uint32_t factor) {
  uint32_t word = base + index * WEYL;
  word = (word ^ uint32_t(int32_t(word) >> 15)) * factor;
  return (word ^ uint32_t(int32_t(word) >> 15)) * MIXER;
}
inline uint32_t random_bits(uint32_t place, uint32_t base, uint32_t factor) {
  return (random_word(place >> 1, base, factor) >> ((place & 1) << 4)) & 0xFFFF;
}

// Two neighbours of a bf16 row as they lie there, at any address: low and high half are taken apart faster than each is
// widened.
typedef uint32_t Pair __attribute__((aligned(2), may_alias));
inline float low(uint32_t pair) { return bits_to_float(pair << 16); }
inline float high(uint32_t pair) { return bits_to_float(pair & 0xFFFF0000u); }

// As many 32-bit numbers as a register holds: wider ones would go through memory.
#ifdef __AVX512F__
constexpr int64_t WORDS = 16;
#else
constexpr int64_t WORDS = 8;
#endif
typedef uint32_t Words __attribute__((vector_size(4 * WORDS)));
typedef int32_t Integers __attribute__((vector_size(4 * WORDS)));
typedef float Floats __attribute__((vector_size(4 * WORDS)));
template <class V>
inline V load_words(const void* from) {
  V x;
  std::memcpy(&x, from, sizeof x);
  return x;
}
inline Floats madd(Floats a, Floats b, Floats c) {  // a b + c, rounded once, as std::fma
#if defined(__AVX512F__)
  return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(REGISTERS)
  return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  for (int64_t k = 0; k < WORDS; k++) c[k] = std::fma(a[k], b[k], c[k]);
  return c;
#endif
}
// The lower halves are those of `low`, shifted down, the upper ones those of `high`.
inline Words halves_of(Words low, Words high) {
#if defined(REGISTERS) && !defined(__AVX512F__)
  return (Words)_mm256_blend_epi16((__m256i)(low >> 16), (__m256i)high, 0xAA);
#else
  return (low >> 16) | (high & 0xFFFF0000u);
#endif
}
inline float sum(Floats x) {
#ifdef __AVX512F__
  return _mm512_reduce_add_ps((__m512)x);
#else
  float total = 0;
  for (int64_t k = 0; k < WORDS; k++) total += x[k];
  return total;
#endif
}

// What comes next, ordered now: in bf16 arithmetic and memory take as long, and a core does not fetch far enough ahead by itself
// to do both at once. Spread over the loop: ordered all together, lines wait for one another (measured: a tenth of a step of
// rank 1). What lies beyond the end of a matrix may be ordered too, and is never read.
constexpr int64_t AHEAD = 4608;  // bytes, of what is read in the order of memory
constexpr int64_t NEAR = 256;    // of what may be in a cache
constexpr int64_t LINE = 32;     // bf16 numbers
template <class T>
inline void fetch(const T* x) {
  __builtin_prefetch((const void*)x);
}
template <class T>
inline void fetch_near(const T* x) {  // into the second cache: for more than the first has room for
  __builtin_prefetch((const void*)x, 0, 2);
}
// With wide registers arithmetic is no longer what takes the time, and where rows are read in streams a core that fetches ahead
// by itself does it better (measured with AVX-512: a seventh of the first pass of rank 1).
#ifdef __AVX512F__
constexpr bool BY_ITSELF = true;
#else
constexpr bool BY_ITSELF = false;
#endif

}  // namespace
