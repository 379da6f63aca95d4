// The passes over large tensors for CPUs, each matrix read once: see native.py, and reference.py for what they compute.
// Tensors of one shape come as tables of pointers. Loops over elements are written so that a compiler vectorises them.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>
#ifdef __AVX512F__
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
inline uint32_t random_word(uint32_t index, uint32_t base, uint32_t factor) {
  uint32_t word = base + index * 0x9E3779B1u;
  word = (word ^ uint32_t(int32_t(word) >> 15)) * factor;
  return (word ^ uint32_t(int32_t(word) >> 15)) * 0x85EBCA6Bu;
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

#ifdef __AVX512F__
inline __m512 load16(const float* x) { return _mm512_loadu_ps(x); }
inline __m512 load16(const bf16* x) {
  __m512i words = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)x));
  return _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
}
#endif

// y = sign x[order] of a row, and |x|^2. A sketch keeps 16 neighbours together: they only change places within a register.
template <class T>
inline float turn(const T* x, int64_t cols, const int32_t* order, const float* sign, float* y) {
  int64_t first = 0;
  float square = 0;
#ifdef __AVX512F__
  __m512 squares = _mm512_setzero_ps();
  for (; first + LANES <= cols; first += LANES) {
    __builtin_prefetch(x + AHEAD * cols + first);
    __m512 block = load16(x + order[first] / LANES * LANES);
    squares = _mm512_fmadd_ps(block, block, squares);
    __m512 turned = _mm512_permutexvar_ps(_mm512_loadu_si512(order + first), block);  // by the low four bits
    _mm512_storeu_ps(y + first, _mm512_mul_ps(turned, _mm512_loadu_ps(sign + first)));
  }
  square = _mm512_reduce_add_ps(squares);
#endif
#pragma omp simd reduction(+ : square)
  for (int64_t i = first; i < cols; i++) {
    float one = load(x[order[i]]);
    y[i] = sign[i] * one;
    square += one * one;
  }
  return square;
}

template <class T>
void measure_sketch_tall(int64_t num, const T* const* G, int64_t rows, int64_t cols, const int32_t* const* order,
                         const float* const* signs, int64_t rank, int64_t repeats, float* R, float* R_sq, float* G_sq) {
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

// Blocks of rows in the order of their buckets, the rows of each in the order of memory.
template <class T>
void measure_sketch_wide(int64_t num, const T* const* G, int64_t rows, int64_t cols, const int32_t* const* order,
                         const float* const* signs, int64_t rank, float* R, float* R_sq, float* G_sq) {
  Pieces pieces(cols, WIDE);
  int64_t group = rank % LANES ? rank : LANES;  // of buckets, that blocks fill together
#pragma omp parallel for schedule(static)
  for (int64_t at = 0; at < num * pieces.num; at++) {
    int64_t t = at / pieces.num, first = pieces.first(at), count = pieces.count(at);
    float square[WIDE] = {}, norm[WIDE] = {};
    float* r = R + t * rank * cols + first;
    for (int64_t b = 0; b < rank; b += group) {
      for (int64_t k = b; k < b + group; k++) std::fill(r + k * cols, r + k * cols + count, 0.0f);
      for (int64_t block = 0; block < rows; block += LANES) {
        if (block % rank / group != b / group) continue;
        int64_t size = std::min(LANES, rows - block), start = order[t][block] / LANES * LANES, place[LANES];
        for (int64_t i = block; i < block + size; i++) place[order[t][i] - start] = i;
        for (int64_t k = 0; k < size; k++) {
          const T* g = G[t] + (start + k) * cols + first;
          float sign = signs[t][place[k]], *sum = r + place[k] % rank * cols;
          if (k + 1 < size) fetch(g + cols, count);
#pragma omp simd
          for (int64_t j = 0; j < count; j++) {
            float x = load(g[j]);
            sum[j] += sign * x;
            square[j] += x * x;
          }
        }
      }
      for (int64_t k = b; k < b + group; k++) {
#pragma omp simd
        for (int64_t j = 0; j < count; j++) norm[j] += r[k * cols + j] * r[k * cols + j];
      }
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

// Two neighbours of a bf16 row as one word, as the random bits come: nothing has to change its place.
template <bool BY_COLUMN>
inline void apply_pairs(uint32_t* w, const uint32_t* g, int64_t pairs, float keep, float one, const float* eta, uint32_t word_index,
                        uint32_t base, uint32_t factor) {
#pragma omp simd
  for (int64_t j = 0; j < pairs; j++) {
    uint32_t random = random_word(word_index + uint32_t(j), base, factor);
    float low = bits_to_float(w[j] << 16) * keep - bits_to_float(g[j] << 16) * (BY_COLUMN ? eta[2 * j] : one);
    float high = bits_to_float(w[j] & 0xFFFF0000u) * keep - bits_to_float(g[j] & 0xFFFF0000u) * (BY_COLUMN ? eta[2 * j + 1] : one);
    w[j] = ((float_to_bits(low) + (random & 0xFFFF)) >> 16) | ((float_to_bits(high) + (random >> 16)) & 0xFFFF0000u);
  }
}

// A row that is rounded stochastically: pairs, with what is left over at both ends.
inline void apply_rounded(bf16* w, const bf16* g, int64_t cols, float keep, const float* eta, bool by_column, uint32_t place,
                          uint32_t base, uint32_t factor) {
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
    apply_pairs<true>(w2, g2, pairs, keep, eta[0], eta + first, word_index, base, factor);
  } else {
    apply_pairs<false>(w2, g2, pairs, keep, eta[0], eta, word_index, base, factor);
  }
  if (first + 2 * pairs < cols) single(cols - 1);
}
inline void apply_rounded(bf16* w, const float* g, int64_t cols, float keep, const float* eta, bool by_column, uint32_t place,
                          uint32_t base, uint32_t factor) {
#pragma omp simd
  for (int64_t j = 0; j < cols; j++) {
    float x = load(w[j]) * keep - g[j] * eta[by_column ? j : 0];
    w[j] = bf16((float_to_bits(x) + random_bits(place + uint32_t(j), base, factor)) >> 16);
  }
}
template <class S>
inline void apply_rounded(float*, const S*, int64_t, float, const float*, bool, uint32_t, uint32_t, uint32_t) {}  // never asked for

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
#pragma omp parallel for schedule(static)
  for (int64_t at = 0; at < num * rows; at++) {
    int64_t t = at / rows, row = at % rows;
    T* w = W[t] + row * cols;
    const S* g = G[t] + row * cols;
    if (row + 1 < rows) fetch(w + cols, cols), fetch(g + cols, cols);
    const float* eta = eta_s + t * eta_matrix + row * eta_row;
    float keep = 1 - (decay ? decay[t] : 0.0f), one = eta[0];
    if (hash) {
      uint32_t place = uint32_t(row * cols + hash[3 * t + 2]);
      apply_rounded(w, g, cols, keep, eta, eta_col != 0, place, uint32_t(hash[3 * t]), uint32_t(hash[3 * t + 1]));
    } else if (eta_col == 0) {
#pragma omp simd
      for (int64_t j = 0; j < cols; j++) store(w[j], load(w[j]) * keep - load(g[j]) * one);
    } else {
#pragma omp simd
      for (int64_t j = 0; j < cols; j++) store(w[j], load(w[j]) * keep - load(g[j]) * eta[j]);
    }
  }
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
}
