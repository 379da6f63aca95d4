// The passes over large tensors for CPUs, each matrix read once: see native.py, and reference.py for what they compute.
// Tensors of one shape come as tables of pointers. Loops over elements are written so that a compiler vectorises them.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <vector>

#include <omp.h>
#if defined(__AVX512F__) || (defined(__AVX2__) && defined(__FMA__))
#define REGISTERS  // that a block of LANES can be permuted in
#include <immintrin.h>
#endif

namespace {

using bf16 = uint16_t;
constexpr int64_t PIECE = 512;  // elements that one thread takes at a time
constexpr int64_t LANES = 16;   // of insitu.optim.projection
constexpr float TINY = std::numeric_limits<float>::min();

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

// The row that comes next, ordered now: in bf16 a row is too short for what a core fetches ahead by itself (measured: 15 % of a
// pass over W and G, 20 % of one over a wide G; nothing in float32).
constexpr int64_t PAGE = 2048, AHEAD = 2;  // AHEAD: rows, of a pass that reads them in another order
inline void fetch(const float*, int64_t) {}
inline void fetch(const bf16* row, int64_t cols) {
  for (int64_t j = 0; j < std::min(cols, PAGE); j += 32) __builtin_prefetch(row + j);
}

// STREAMS rows at a time, each in pages of its own: a core fetches ahead in several pages at once, and never across their ends.
// A row has the same bits whatever its neighbours are.
constexpr int64_t STREAMS = 4, APART = 48;  // rows from one stream to the next: 16 are 10 % slower in bf16
template <class T, class Row>
inline void for_rows(int64_t num, int64_t rows, int64_t cols, const T* const* G, Row row) {
  constexpr int64_t BLOCK = STREAMS * APART;
  int64_t all = num * rows, blocks = (all + BLOCK - 1) / BLOCK;
#pragma omp parallel for schedule(static)
  for (int64_t block = 0; block < blocks; block++) {
    for (int64_t i = 0; i < APART; i++) {
      int64_t at[STREAMS];
      const T* g[STREAMS];
      for (int64_t k = 0; k < STREAMS; k++) {
        at[k] = std::min(block * BLOCK + k * APART + i, all - 1);  // past the end: the last one once more
        g[k] = G[at[k] / rows] + (at[k] % rows) * cols;
      }
      row(at, g);
    }
  }
}

// The columns of a wide matrix, in pieces of about the same size that a thread takes at a time.
struct Pieces {
  int64_t cols, num, size;
  Pieces(int64_t cols, int64_t most) : cols(cols), num((cols + most - 1) / most) {
    size = ((cols + num - 1) / num + 15) / 16 * 16;
    num = (cols + size - 1) / size;
  }
  int64_t first(int64_t at) const { return at % num * size; }
  int64_t count(int64_t at) const { return std::min(size, cols - first(at)); }
};
constexpr int64_t WIDE = 1536;  // sums of them stay in the first cache

template <class T>
void measure_one_tall(int64_t num, const T* const* G, int64_t rows, int64_t cols, const float* const* P, float* R, float* G_sq) {
  for_rows(num, rows, cols, G, [=](const int64_t* at, const T* const* g) {
    const T *g0 = g[0], *g1 = g[1], *g2 = g[2], *g3 = g[3];
    const float *p0 = P[at[0] / rows], *p1 = P[at[1] / rows], *p2 = P[at[2] / rows], *p3 = P[at[3] / rows];
    float r0 = 0, r1 = 0, r2 = 0, r3 = 0, s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd reduction(+ : r0, r1, r2, r3, s0, s1, s2, s3)
    for (int64_t i = 0; i < cols; i++) {
      float x0 = load(g0[i]), x1 = load(g1[i]), x2 = load(g2[i]), x3 = load(g3[i]);
      r0 = std::fma(x0, p0[i], r0), r1 = std::fma(x1, p1[i], r1), r2 = std::fma(x2, p2[i], r2), r3 = std::fma(x3, p3[i], r3);
      s0 = std::fma(x0, x0, s0), s1 = std::fma(x1, x1, s1), s2 = std::fma(x2, x2, s2), s3 = std::fma(x3, x3, s3);
    }
    R[at[0]] = r0, R[at[1]] = r1, R[at[2]] = r2, R[at[3]] = r3;
    G_sq[at[0]] = s0, G_sq[at[1]] = s1, G_sq[at[2]] = s2, G_sq[at[3]] = s3;
  });
}

template <class T>
void measure_one_wide(int64_t num, const T* const* G, int64_t rows, int64_t cols, const float* const* P, float* R, float* G_sq) {
  Pieces pieces(cols, WIDE);
#pragma omp parallel for schedule(static)
  for (int64_t at = 0; at < num * pieces.num; at++) {
    int64_t t = at / pieces.num, first = pieces.first(at), count = pieces.count(at);
    float r[WIDE] = {}, square[WIDE] = {};
    auto add = [&](int64_t row) {
      const T* g = G[t] + row * cols + first;
      float p = P[t][row];
#pragma omp simd
      for (int64_t j = 0; j < count; j++) {
        float x = load(g[j]);
        r[j] = std::fma(x, p, r[j]);
        square[j] = std::fma(x, x, square[j]);
      }
    };
    int64_t row = 0;
    for (; row + STREAMS <= rows; row += STREAMS) {
      const T *g0 = G[t] + row * cols + first, *g1 = g0 + cols, *g2 = g1 + cols, *g3 = g2 + cols;
      const float* p = P[t] + row;
      for (int64_t next = row + STREAMS; next < std::min(row + 2 * STREAMS, rows); next++) fetch(G[t] + next * cols + first, count);
#pragma omp simd
      for (int64_t j = 0; j < count; j++) {
        float x0 = load(g0[j]), x1 = load(g1[j]), x2 = load(g2[j]), x3 = load(g3[j]);
        r[j] = std::fma(x3, p[3], std::fma(x2, p[2], std::fma(x1, p[1], std::fma(x0, p[0], r[j]))));
        square[j] = std::fma(x3, x3, std::fma(x2, x2, std::fma(x1, x1, std::fma(x0, x0, square[j]))));
      }
    }
    for (; row < rows; row++) add(row);
    std::copy(r, r + count, R + t * cols + first);
    std::copy(square, square + count, G_sq + t * cols + first);
  }
}

// A block of LANES float32 in registers.
#if defined(__AVX512F__)
struct Block {
  __m512 x;
  static Block zero() { return {_mm512_setzero_ps()}; }
  static Block load(const float* x) { return {_mm512_loadu_ps(x)}; }
  static Block load(const bf16* x) {
    __m512i words = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)x));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(words, 16))};
  }
  void store(float* out) const { _mm512_storeu_ps(out, x); }
  Block turned(const int32_t* order) const {  // by the low four bits
    return {_mm512_permutexvar_ps(_mm512_loadu_si512(order), x)};
  }
  void add(Block a, Block b) { x = _mm512_fmadd_ps(a.x, b.x, x); }  // a b
  Block times(Block a) const { return {_mm512_mul_ps(x, a.x)}; }
  float sum() const { return _mm512_reduce_add_ps(x); }
};
constexpr int64_t ABREAST = 4;  // rows, whose sums are all in registers
#elif defined(REGISTERS)
struct Block {
  __m256 x, y;
  static Block zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
  static Block load(const float* x) { return {_mm256_loadu_ps(x), _mm256_loadu_ps(x + 8)}; }
  static Block load(const bf16* x) {
    auto half = [](const bf16* x) {
      return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)x)), 16));
    };
    return {half(x), half(x + 8)};
  }
  void store(float* out) const { _mm256_storeu_ps(out, x), _mm256_storeu_ps(out + 8, y); }
  Block turned(const int32_t* order) const {  // by the low three bits within a half, by the fourth from either
    auto half = [this](const int32_t* order) {
      __m256i lanes = _mm256_loadu_si256((const __m256i*)order);
      __m256 low = _mm256_permutevar8x32_ps(x, lanes), high = _mm256_permutevar8x32_ps(y, lanes);
      return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(lanes, 28)));
    };
    return {half(order), half(order + 8)};
  }
  void add(Block a, Block b) { x = _mm256_fmadd_ps(a.x, b.x, x), y = _mm256_fmadd_ps(a.y, b.y, y); }  // a b
  Block times(Block a) const { return {_mm256_mul_ps(x, a.x), _mm256_mul_ps(y, a.y)}; }
  float sum() const {
    __m256 both = _mm256_add_ps(x, y);
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps(both, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
  }
};
constexpr int64_t ABREAST = 2;  // rows, whose sums are all in registers
#endif

// y = sign x[order] of a row, and |x|^2. A sketch keeps 16 neighbours together: they only change places within a register.
template <class T>
inline float turn(const T* x, int64_t cols, const int32_t* order, const float* sign, float* y) {
  int64_t first = 0;
  float square = 0;
#ifdef REGISTERS
  Block squares = Block::zero();
  for (; first + LANES <= cols; first += LANES) {
    __builtin_prefetch(x + AHEAD * cols + first);
    Block block = Block::load(x + order[first] / LANES * LANES);
    squares.add(block, block);
    block.turned(order + first).times(Block::load(sign + first)).store(y + first);
  }
  square = squares.sum();
#endif
#pragma omp simd reduction(+ : square)
  for (int64_t i = first; i < cols; i++) {
    float one = load(x[order[i]]);
    y[i] = sign[i] * one;
    square += one * one;
  }
  return square;
}

#ifdef REGISTERS
// ROWS rows whose blocks fill whole registers of buckets, at a time: the order is read once for all of them.
template <int64_t ROWS, class T>
inline void measure_blocks(const T* x, int64_t cols, const int32_t* order, const float* sign, int64_t rank, float* R, float* R_sq,
                           float* G_sq) {
  Block squares[ROWS], norms[ROWS], sums[ROWS];
  for (int64_t k = 0; k < ROWS; k++) squares[k] = norms[k] = Block::zero();
  const char* next = (const char*)(x + ROWS * cols);
  for (int64_t b = 0; b < rank; b += LANES) {
    for (int64_t k = 0; k < ROWS; k++) sums[k] = Block::zero();
    for (int64_t i = b; i < cols; i += rank) {
      const T* block = x + order[i] / LANES * LANES;
      Block signs = Block::load(sign + i);
      for (int64_t k = 0; k < ROWS; k++) {
        Block found = Block::load(block + k * cols);
        squares[k].add(found, found);
        sums[k].add(found.turned(order + i), signs);
      }
      for (size_t line = 0; line < ROWS * LANES * sizeof(T); line += 64) __builtin_prefetch(next + line);
      next += ROWS * LANES * sizeof(T);
    }
    for (int64_t k = 0; k < ROWS; k++) sums[k].store(R + k * rank + b), norms[k].add(sums[k], sums[k]);
  }
  for (int64_t k = 0; k < ROWS; k++) G_sq[k] = squares[k].sum(), R_sq[k] = norms[k].sum();
}
#endif

template <class T>
void measure_sketch_tall(int64_t num, const T* const* G, int64_t rows, int64_t cols, const int32_t* const* order,
                         const float* const* signs, int64_t rank, int64_t repeats, float* R, float* R_sq, float* G_sq) {
#ifdef REGISTERS
  if (rank % LANES == 0 && cols % LANES == 0) {
    int64_t groups = (rows + ABREAST - 1) / ABREAST;
#pragma omp parallel for schedule(static)
    for (int64_t at = 0; at < num * groups; at++) {
      int64_t t = at / groups, row = at % groups * ABREAST, end = std::min(row + ABREAST, rows);
      auto measure = [&](auto measured, int64_t row) {
        int64_t to = t * rows + row;
        measured(G[t] + row * cols, cols, order[t], signs[t], rank, R + to * rank, R_sq + to, G_sq + to);
      };
      if (end - row == ABREAST) {
        measure(measure_blocks<ABREAST, T>, row);
      } else {
        for (; row < end; row++) measure(measure_blocks<1, T>, row);
      }
    }
    return;
  }
#endif
#pragma omp parallel
  {
    std::vector<float> turned(repeats * rank);  // what is left over stays 0
    float* y = turned.data();
#pragma omp for schedule(static)
    for (int64_t at = 0; at < num * rows; at++) {
      int64_t t = at / rows;
      G_sq[at] = turn(G[t] + at % rows * cols, cols, order[t], signs[t], y);
      for (int64_t i = 1; i < repeats; i++) {
#pragma omp simd
        for (int64_t b = 0; b < rank; b++) y[b] += y[i * rank + b];
      }
      float *r = R + at * rank, norm = 0;
#pragma omp simd reduction(+ : norm)
      for (int64_t b = 0; b < rank; b++) r[b] = y[b], norm += y[b] * y[b];
      R_sq[at] = norm;
    }
  }
}

// N rows of one bucket, with what is in it already.
template <int64_t N, class T>
inline void add_rows(const T* const* g, const float* sign, int64_t count, float* sum, float* square) {
#pragma omp simd
  for (int64_t j = 0; j < count; j++) {
    float added = sum[j], squares = square[j];
    for (int64_t i = 0; i < N; i++) {
      float x = load(g[i][j]);
      added += sign[i] * x, squares += x * x;
    }
    sum[j] = added, square[j] = squares;
  }
}

template <class T>
void measure_sketch_wide(int64_t num, const T* const* G, int64_t rows, int64_t cols, const int32_t* const* order,
                         const float* const* signs, int64_t rank, float* R, float* R_sq, float* G_sq) {
  Pieces pieces(cols, WIDE);
#pragma omp parallel for schedule(static)
  for (int64_t at = 0; at < num * pieces.num; at++) {
    int64_t t = at / pieces.num, first = pieces.first(at), count = pieces.count(at);
    float square[WIDE] = {}, norm[WIDE] = {};
    auto row = [&](int64_t place) { return G[t] + order[t][place] * cols + first; };
    for (int64_t b = 0; b < rank; b++) {
      float* sum = R + (t * rank + b) * cols + first;
      std::fill(sum, sum + count, 0.0f);
      for (int64_t next = b + 1; next < rows && b + 1 < rank; next += rank) fetch(row(next), count);
      for (int64_t place = b; place < rows; place += 4 * rank) {
        const T* g[4];
        float sign[4];
        int64_t n = 0;
        for (int64_t i = place; i < rows && n < 4; i += rank, n++) g[n] = row(i), sign[n] = signs[t][i];
        n == 4   ? add_rows<4>(g, sign, count, sum, square)
        : n == 3 ? add_rows<3>(g, sign, count, sum, square)
        : n == 2 ? add_rows<2>(g, sign, count, sum, square)
                 : add_rows<1>(g, sign, count, sum, square);
      }
#pragma omp simd
      for (int64_t j = 0; j < count; j++) norm[j] += sum[j] * sum[j];
    }
    std::copy(norm, norm + count, R_sq + t * cols + first);
    std::copy(square, square + count, G_sq + t * cols + first);
  }
}

struct Adam {
  float beta1, weight1, beta2, weight2, correction1, scale2, eps;  // weight: 1 - beta; scale2: 1 / the correction of V
  explicit Adam(const float* n) : beta1(n[0]), weight1(n[1]), beta2(n[2]), weight2(n[3]), correction1(n[4]), scale2(n[5]), eps(n[6]) {}
};

inline float direction(const Adam& a, float r, float& m, float& v) {
  m = m * a.beta1 + r * a.weight1;  // m + (r - m) weight would lose what is small beside m
  v = v * a.beta2 + r * r * a.weight2;
  return m / ((std::sqrt(v * a.scale2) + a.eps) * a.correction1);
}

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

// Two neighbours of a bf16 row are one word, as the random bits come: nothing has to change its place.
inline uint32_t rounded(uint32_t w, uint32_t g, float keep, float eta_low, float eta_high, uint32_t random) {
  float low = bits_to_float(w << 16) * keep - bits_to_float(g << 16) * eta_low;
  float high = bits_to_float(w & 0xFFFF0000u) * keep - bits_to_float(g & 0xFFFF0000u) * eta_high;
  return ((float_to_bits(low) + (random & 0xFFFF)) >> 16) | ((float_to_bits(high) + (random >> 16)) & 0xFFFF0000u);
}

// The random words are counted, not multiplied out; a compiler's own loop takes twice the time.
template <bool BY_COLUMN>
inline void apply_pairs(uint32_t* w, const uint32_t* g, int64_t pairs, float keep, const float* eta_low, const float* eta_high,
                        uint32_t word_index, uint32_t base, uint32_t factor) {
  Words counter;
  for (int64_t k = 0; k < WORDS; k++) counter[k] = base + (word_index + uint32_t(k)) * WEYL;
  int64_t j = 0;
  for (; j + WORDS <= pairs; j += WORDS, counter += uint32_t(WORDS) * WEYL) {
    Words random = (counter ^ (Words)((Integers)counter >> 15)) * factor;
    random = (random ^ (Words)((Integers)random >> 15)) * MIXER;
    auto x = load_words<Words>(w + j), y = load_words<Words>(g + j);
    Floats low = (Floats)(x << 16) * keep, high = (Floats)(x & 0xFFFF0000u) * keep;
    if (BY_COLUMN) {
      low -= (Floats)(y << 16) * load_words<Floats>(eta_low + j), high -= (Floats)(y & 0xFFFF0000u) * load_words<Floats>(eta_high + j);
    } else {
      low -= (Floats)(y << 16) * *eta_low, high -= (Floats)(y & 0xFFFF0000u) * *eta_high;
    }
    x = (((Words)low + (random & 0xFFFFu)) >> 16) | (((Words)high + (random >> 16)) & 0xFFFF0000u);
    std::memcpy(w + j, &x, sizeof x);
  }
  for (; j < pairs; j++) {
    uint32_t random = random_word(word_index + uint32_t(j), base, factor);
    w[j] = rounded(w[j], g[j], keep, eta_low[BY_COLUMN ? j : 0], eta_high[BY_COLUMN ? j : 0], random);
  }
}

// The factors of the even and of the odd columns, from the first that is the lower half of a word.
struct Halves {
  const float* of = nullptr;
  std::vector<float> low, high;
  void take(const float* eta, int64_t pairs) {
    if (of == eta && int64_t(low.size()) == pairs) return;
    of = eta, low.resize(pairs), high.resize(pairs);
    for (int64_t j = 0; j < pairs; j++) low[j] = eta[2 * j], high[j] = eta[2 * j + 1];
  }
};

// A row that is rounded stochastically: pairs, with what is left over at both ends.
inline void apply_rounded(bf16* w, const bf16* g, int64_t cols, float keep, const float* eta, bool by_column, uint32_t place,
                          uint32_t base, uint32_t factor, Halves& halves) {
  auto single = [&](int64_t j) {
    float x = load(w[j]) * keep - load(g[j]) * eta[by_column ? j : 0];
    w[j] = bf16((float_to_bits(x) + random_bits(place + uint32_t(j), base, factor)) >> 16);
  };
  int64_t first = place & 1, pairs = (cols - first) / 2;
  if (first) single(0);
  auto w2 = (uint32_t*)(w + first);
  auto g2 = (const uint32_t*)(g + first);
  uint32_t word_index = (place + uint32_t(first)) >> 1;
  if (by_column) {
    halves.take(eta + first, pairs);
    apply_pairs<true>(w2, g2, pairs, keep, halves.low.data(), halves.high.data(), word_index, base, factor);
  } else {
    apply_pairs<false>(w2, g2, pairs, keep, eta, eta, word_index, base, factor);
  }
  if (first + 2 * pairs < cols) single(cols - 1);
}
inline void apply_rounded(bf16* w, const float* g, int64_t cols, float keep, const float* eta, bool by_column, uint32_t place,
                          uint32_t base, uint32_t factor, Halves&) {
#pragma omp simd
  for (int64_t j = 0; j < cols; j++) {
    float x = load(w[j]) * keep - g[j] * eta[by_column ? j : 0];
    w[j] = bf16((float_to_bits(x) + random_bits(place + uint32_t(j), base, factor)) >> 16);
  }
}
template <class S>
inline void apply_rounded(float*, const S*, int64_t, float, const float*, bool, uint32_t, uint32_t, uint32_t, Halves&) {}  // never asked for

template <class T, class S>
void adamw_typed(int64_t num, T* const* W, const S* const* G, float* const* M, float* const* V, int64_t size, const Adam& a,
                 float keep, float rate, const int64_t* hash) {
  int64_t pieces = (size + PIECE - 1) / PIECE;
#pragma omp parallel for schedule(static)
  for (int64_t at = 0; at < num * pieces; at++) {
    int64_t t = at / pieces, first = at % pieces * PIECE, count = std::min(PIECE, size - first);
    T* w = W[t] + first;
    const S* g = G[t] + first;
    float *m = M[t] + first, *v = V[t] + first, moved[PIECE];
#pragma omp simd
    for (int64_t j = 0; j < count; j++) moved[j] = load(w[j]) * keep - direction(a, load(g[j]), m[j], v[j]) * rate;
    if (hash) {
      uint32_t place = uint32_t(first + hash[3 * t + 2]), base = uint32_t(hash[3 * t]), factor = uint32_t(hash[3 * t + 1]);
#pragma omp simd
      for (int64_t j = 0; j < count; j++) {
        store(w[j], bits_to_float((float_to_bits(moved[j]) + random_bits(place + uint32_t(j), base, factor)) & 0xFFFF0000u));
      }
    } else {
#pragma omp simd
      for (int64_t j = 0; j < count; j++) store(w[j], moved[j]);
    }
  }
}

template <class T, class S>
void apply_typed(int64_t num, T* const* W, const S* const* G, int64_t rows, int64_t cols, const float* eta_s,
                 int64_t eta_matrix, int64_t eta_row, int64_t eta_col, const float* decay, const int64_t* hash) {
  Halves halves;
#pragma omp parallel for schedule(static) firstprivate(halves)
  for (int64_t at = 0; at < num * rows; at++) {
    int64_t t = at / rows, row = at % rows;
    T* w = W[t] + row * cols;
    const S* g = G[t] + row * cols;
    if (row + 1 < rows) fetch(w + cols, cols), fetch(g + cols, cols);
    const float* eta = eta_s + t * eta_matrix + row * eta_row;
    float keep = 1 - (decay ? decay[t] : 0.0f), one = eta[0];
    if (hash) {
      uint32_t place = uint32_t(row * cols + hash[3 * t + 2]);
      apply_rounded(w, g, cols, keep, eta, eta_col != 0, place, uint32_t(hash[3 * t]), uint32_t(hash[3 * t + 1]), halves);
    } else if (eta_col == 0) {
#pragma omp simd
      for (int64_t j = 0; j < cols; j++) store(w[j], load(w[j]) * keep - load(g[j]) * one);
    } else {
#pragma omp simd
      for (int64_t j = 0; j < cols; j++) store(w[j], load(w[j]) * keep - load(g[j]) * eta[j]);
    }
  }
}

// A bundle of num matrices, as insitu.optim.step.carried lays it out.
struct Bundle {
  int64_t num, chunk;  // chunk: so many of them at a time, for which there is room
  int64_t rows, cols, tall, w_bfloat, g_bfloat;
  int64_t rank, repeats;  // repeats: of a sketch; 0 for one row; -1 where R and |G_j|^2 are there already
  int64_t per_tensor, exact, rounded, done;  // done: updates so far
  void* const* W;
  float* const* M;
  float* const* V;
  float* const* last_norm;
  const uint64_t* seeds;  // of the random bits
  const void* const* P;   // rows, or orders
  const float* const* signs;
  const void* const* G;
  double* squares;            // |G|^2 of each of num
  float *R, *R_sq, *G_sq, *s;  // of chunk
  float adam[7], numbers[3], decay;
};

// As insitu.optim.seeds has it.
uint64_t mix(std::initializer_list<uint64_t> values) {
  uint64_t state = 0;
  for (uint64_t value : values) {
    state += value + 0x9E3779B97F4A7C15u;
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9u;
    state = (state ^ (state >> 27)) * 0x94D049BB133111EBu;
    state ^= state >> 31;
  }
  return state >> 1;
}

double total(const float* x, int64_t n) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < n; j++) sum += x[j];
  return sum;
}

}  // namespace

extern "C" {

void measure_one(int64_t num, const void* const* G, int64_t bfloat, int64_t rows, int64_t cols, int64_t tall, const float* const* P,
                 float* R, float* G_sq) {
  auto f = (const float* const*)G;
  auto h = (const bf16* const*)G;
  if (tall) {
    bfloat ? measure_one_tall(num, h, rows, cols, P, R, G_sq) : measure_one_tall(num, f, rows, cols, P, R, G_sq);
  } else {
    bfloat ? measure_one_wide(num, h, rows, cols, P, R, G_sq) : measure_one_wide(num, f, rows, cols, P, R, G_sq);
  }
}

void measure_sketch(int64_t num, const void* const* G, int64_t bfloat, int64_t rows, int64_t cols, int64_t tall,
                    const int32_t* const* order, const float* const* signs, int64_t rank, int64_t repeats, float* R, float* R_sq,
                    float* G_sq) {
  auto f = (const float* const*)G;
  auto h = (const bf16* const*)G;
  if (tall) {
    bfloat ? measure_sketch_tall(num, h, rows, cols, order, signs, rank, repeats, R, R_sq, G_sq)
           : measure_sketch_tall(num, f, rows, cols, order, signs, rank, repeats, R, R_sq, G_sq);
  } else {
    bfloat ? measure_sketch_wide(num, h, rows, cols, order, signs, rank, R, R_sq, G_sq)
           : measure_sketch_wide(num, f, rows, cols, order, signs, rank, R, R_sq, G_sq);
  }
}

// |G|^2 of num flat tensors; of each its pieces, to be added up.
void square(int64_t num, const void* const* G, int64_t bfloat, int64_t size, int64_t piece, double* out) {
  int64_t pieces = (size + piece - 1) / piece;
#pragma omp parallel for schedule(static)
  for (int64_t at = 0; at < num * pieces; at++) {
    int64_t first = at % pieces * piece, count = std::min(piece, size - first);
    auto sum = [&](auto g) {
      float square = 0;
#pragma omp simd reduction(+ : square)
      for (int64_t i = 0; i < count; i++) square += load(g[i]) * load(g[i]);
      return double(square);
    };
    out[at] = bfloat ? sum((const bf16*)G[at / pieces] + first) : sum((const float*)G[at / pieces] + first);
  }
}

// |R_j|^2; of num matrices of rows x cols, along the columns (tall) or the rows.
void norms(int64_t num, int64_t rows, int64_t cols, int64_t tall, const float* R, float* out) {
  if (tall) {
#pragma omp parallel for schedule(static)
    for (int64_t at = 0; at < num * rows; at++) {
      float square = 0;
#pragma omp simd reduction(+ : square)
      for (int64_t i = 0; i < cols; i++) square += R[at * cols + i] * R[at * cols + i];
      out[at] = square;
    }
    return;
  }
  Pieces pieces(cols, WIDE);
#pragma omp parallel for schedule(static)
  for (int64_t at = 0; at < num * pieces.num; at++) {
    int64_t t = at / pieces.num, first = pieces.first(at), count = pieces.count(at);
    float square[WIDE] = {};
    for (int64_t row = 0; row < rows; row++) {
      const float* r = R + (t * rows + row) * cols + first;
#pragma omp simd
      for (int64_t j = 0; j < count; j++) square[j] += r[j] * r[j];
    }
    std::copy(square, square + count, out + t * cols + first);
  }
}

// Adam's moments in place, and |R~_j|^2; where live is 0 nothing changes.
void direct(int64_t num, int64_t rows, int64_t cols, int64_t tall, const float* R, float* const* M, float* const* V,
            const float* live, const float* numbers, float* out) {
  Adam a(numbers);
  if (tall) {
#pragma omp parallel for schedule(static)
    for (int64_t at = 0; at < num * rows; at++) {
      int64_t t = at / rows, start = at % rows * cols;
      float *m = M[t] + start, *v = V[t] + start, square = 0;
      const float* r = R + at * cols;
      if (live[t] > 0) {
#pragma omp simd reduction(+ : square)
        for (int64_t i = 0; i < cols; i++) {
          float d = direction(a, r[i], m[i], v[i]);
          square += d * d;
        }
      }
      out[at] = square;
    }
    return;
  }
  Pieces pieces(cols, WIDE);
#pragma omp parallel for schedule(static)
  for (int64_t at = 0; at < num * pieces.num; at++) {
    int64_t t = at / pieces.num, first = pieces.first(at), count = pieces.count(at);
    float square[WIDE] = {};
    for (int64_t row = 0; live[t] > 0 && row < rows; row++) {
      float *m = M[t] + row * cols + first, *v = V[t] + row * cols + first;
      const float* r = R + (t * rows + row) * cols + first;
#pragma omp simd
      for (int64_t j = 0; j < count; j++) {
        float d = direction(a, r[j], m[j], v[j]);
        square[j] += d * d;
      }
    }
    std::copy(square, square + count, out + t * cols + first);
  }
}

// Scaling factors of num matrices with n channels, and the sum of s^2 G_sq of each.
void factors(int64_t num, int64_t n, const float* above, const float* below, const float* needed, const float* G_sq, float* s,
             double* norm_sq) {
#pragma omp parallel for schedule(static) if (num * n > PIECE)
  for (int64_t t = 0; t < num; t++) {
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = t * n; j < (t + 1) * n; j++) {
      float found = std::sqrt(above[j]) / std::max(std::sqrt(below[j]), TINY);
      s[j] = below[j] == 0 || needed[j] == 0 ? 0.0f : found;
      sum += double(s[j] * s[j] * G_sq[j]);
    }
    norm_sq[t] = sum;
  }
}

// The limiter of num matrices, b of them to each last_norm, which changes; s becomes eta alpha s factor. numbers: alpha, gamma,
// eta alpha.
void limited(int64_t num, int64_t n, int64_t b, float* s, const double* norm_sq, float* const* last_norm, const float* live,
             const float* numbers) {
#pragma omp parallel for schedule(static) if (num * n > PIECE)
  for (int64_t t = 0; t < num; t++) {
    float &last = last_norm[t / b][t % b], norm = std::sqrt(float(norm_sq[t])) * numbers[0], factor = numbers[2];
    if (!(live[t] > 0)) {
      std::fill(s + t * n, s + (t + 1) * n, 0.0f);
      continue;
    }
    if (norm > 0) {
      float most = last > 0 ? std::min(norm, numbers[1] * last) : norm;
      factor *= most / std::max(norm, TINY);
      last = most;
    }
    for (int64_t j = t * n; j < (t + 1) * n; j++) s[j] *= factor;
  }
}

// W (1 - decay) - G eta_s of num matrices; decay or hash (base, factor, odd of each matrix) may be null.
void apply(int64_t num, void* const* W, int64_t w_bfloat, const void* const* G, int64_t g_bfloat, int64_t rows, int64_t cols,
           const float* eta_s, int64_t eta_matrix, int64_t eta_row, int64_t eta_col, const float* decay, const int64_t* hash) {
  auto run = [&](auto w, auto g) {
    apply_typed(num, w, g, rows, cols, eta_s, eta_matrix, eta_row, eta_col, decay, hash);
  };
  auto with = [&](auto w) { g_bfloat ? run(w, (const bf16* const*)G) : run(w, (const float* const*)G); };
  w_bfloat ? with((bf16* const*)W) : with((float* const*)W);
}

// AdamW; numbers: those of Adam, then 1 - lr decay, and lr (negative to climb).
void adamw(int64_t num, void* const* W, int64_t w_bfloat, const void* const* G, int64_t g_bfloat, float* const* M, float* const* V,
           int64_t size, const float* numbers, const int64_t* hash) {
  Adam a(numbers);
  auto run = [&](auto w, auto g) { adamw_typed(num, w, g, M, V, size, a, numbers[7], numbers[8], hash); };
  auto with = [&](auto w) { g_bfloat ? run(w, (const bf16* const*)G) : run(w, (const float* const*)G); };
  w_bfloat ? with((bf16* const*)W) : with((float* const*)W);
}

// Parts of a step of k matrices from the one at `at` on; what is on its way is in the part of the room that `slot` is.
enum Parts : int64_t { MEASURE = 1, SQUARE = 2, SCALE = 4, APPLY = 8 };
static void carry_some(const Bundle& b, int64_t at, int64_t k, int64_t slot, int64_t parts) {
  int64_t n = b.tall ? b.rows : b.cols, channels = b.per_tensor ? 1 : n;
  float *R = b.R + slot * n * b.rank, *R_sq = b.R_sq + slot * n, *G_sq = b.G_sq + slot * n, *s = b.s + slot * n;
  const void* const* G = b.G + at;
  double* squares = b.squares + at;
  std::vector<float> live(k), decay(k, b.decay);
  if (parts & MEASURE && b.repeats > 0) {
    auto orders = (const int32_t* const*)b.P + at;
    measure_sketch(k, G, b.g_bfloat, b.rows, b.cols, b.tall, orders, b.signs + at, b.rank, b.repeats, R, R_sq, G_sq);
  } else if (parts & MEASURE && b.repeats == 0) {
    measure_one(k, G, b.g_bfloat, b.rows, b.cols, b.tall, (const float* const*)b.P + at, R, G_sq);
    for (int64_t j = 0; j < k * n; j++) R_sq[j] = R[j] * R[j];
  }
  for (int64_t t = 0; t < k; t++) {
    if (parts & SQUARE) squares[t] = total(G_sq + t * n, n);
    live[t] = squares[t] > 0 && squares[t] < INFINITY;
  }
  if (parts & SCALE) {
    int64_t height = b.tall ? b.rows : b.rank, width = b.tall ? b.rank : b.cols;
    std::vector<float> above(k * n), sums(b.per_tensor ? 3 * k : 0);
    std::vector<double> norm_sq(k);
    if (b.repeats < 0) norms(k, height, width, b.tall, R, R_sq);
    direct(k, height, width, b.tall, R, b.M + at, b.V + at, live.data(), b.adam, above.data());
    const float *numerator = above.data(), *r = R_sq, *g = G_sq;
    if (b.per_tensor) {  // as one channel
      float *x = sums.data(), *y = x + k, *z = y + k;
      for (int64_t t = 0; t < k; t++) {
        x[t] = float(total(numerator + t * n, n)), y[t] = float(total(r + t * n, n)), z[t] = float(total(g + t * n, n));
      }
      numerator = x, r = y, g = z;
    }
    factors(k, channels, numerator, b.exact ? g : r, b.exact ? r : g, g, s, norm_sq.data());
    limited(k, channels, 1, s, norm_sq.data(), b.last_norm + at, live.data(), b.numbers);
  }
  std::vector<int64_t> hash(parts & APPLY && b.rounded ? 3 * k : 0);
  for (int64_t t = 0, end; parts & APPLY && t < k; t = end + 1) {  // runs of matrices that are not to stand still
    for (end = t; end < k && live[end] > 0; end++) {
      if (!b.rounded) continue;
      uint64_t key = mix({mix({b.seeds[at + end], uint64_t(b.done)}), 0});
      hash[3 * end] = int64_t(key >> 31), hash[3 * end + 1] = int64_t(2 * (key & 0x7FFFFFFF) + 1);
    }
    apply(end - t, b.W + at + t, b.w_bfloat, G + t, b.g_bfloat, b.rows, b.cols, s + t * channels, channels, b.tall && !b.per_tensor,
          !b.tall && !b.per_tensor, b.decay == 0 ? nullptr : decay.data() + t, b.rounded ? hash.data() + 3 * t : nullptr);
  }
}

// As many matrices at a time as there is room for. Of many, each thread takes whole ones: it never waits for the others.
void carry(const Bundle* bundle, int64_t parts) {
  const Bundle& b = *bundle;
  int64_t threads = omp_get_max_threads();
  if (b.chunk < b.num && b.chunk >= threads && b.num >= 4 * threads) {
#pragma omp parallel for schedule(dynamic)
    for (int64_t t = 0; t < b.num; t++) carry_some(b, t, 1, omp_get_thread_num(), parts);
    return;
  }
  for (int64_t at = 0; at < b.num; at += b.chunk) carry_some(b, at, std::min(b.chunk, b.num - at), 0, parts);
}
}
