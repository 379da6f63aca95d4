// The passes over large tensors for CPUs, each matrix read once: see native.py, and reference.py for what they compute.
// Tensors of one shape come as tables of pointers. Loops over elements are written so that a compiler vectorises them.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

using bf16 = uint16_t;
constexpr int64_t PIECE = 512;  // columns of a wide matrix that one thread takes at a time: sums of them stay in its first cache

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
inline uint32_t random_bits(uint32_t place, uint32_t base, uint32_t factor) {
  uint32_t word = base + (place >> 1) * 0x9E3779B1u;
  word = (word ^ uint32_t(int32_t(word) >> 15)) * factor;
  word = (word ^ uint32_t(int32_t(word) >> 15)) * 0x85EBCA6Bu;
  return (word >> ((place & 1) << 4)) & 0xFFFF;
}

// A row of G in float32: itself, or a copy in scratch memory.
inline const float* as_float(const float* row, int64_t, float*) { return row; }
inline const float* as_float(const bf16* row, int64_t count, float* scratch) {
#pragma omp simd
  for (int64_t i = 0; i < count; i++) scratch[i] = load(row[i]);
  return scratch;
}

template <class T>
void measure_one_tall(int64_t num, const T* const* G, int64_t rows, int64_t cols, const float* const* P, float* R, float* G_sq) {
#pragma omp parallel for schedule(static)
  for (int64_t at = 0; at < num * rows; at++) {
    const T* g = G[at / rows] + (at % rows) * cols;
    const float* p = P[at / rows];
    float r = 0, square = 0;
#pragma omp simd reduction(+ : r, square)
    for (int64_t i = 0; i < cols; i++) {
      float x = load(g[i]);
      r += x * p[i];
      square += x * x;
    }
    R[at] = r;
    G_sq[at] = square;
  }
}

template <class T>
void measure_one_wide(int64_t num, const T* const* G, int64_t rows, int64_t cols, const float* const* P, float* R, float* G_sq) {
  int64_t pieces = (cols + PIECE - 1) / PIECE;
#pragma omp parallel for schedule(static)
  for (int64_t at = 0; at < num * pieces; at++) {
    int64_t t = at / pieces, first = at % pieces * PIECE, count = std::min(PIECE, cols - first);
    float *r = R + t * cols + first, *square = G_sq + t * cols + first;
    std::fill(r, r + count, 0.0f);
    std::fill(square, square + count, 0.0f);
    for (int64_t row = 0; row < rows; row++) {
      const T* g = G[t] + row * cols + first;
      float p = P[t][row];
#pragma omp simd
      for (int64_t j = 0; j < count; j++) {
        float x = load(g[j]);
        r[j] += x * p;
        square[j] += x * x;
      }
    }
  }
}

template <class T>
void measure_sketch_tall(int64_t num, const T* const* G, int64_t rows, int64_t cols, const int32_t* const* order,
                         const float* const* signs, int64_t rank, int64_t repeats, float* R, float* G_sq) {
#pragma omp parallel
  {
    std::vector<float> scratch(cols);
#pragma omp for schedule(static)
    for (int64_t at = 0; at < num * rows; at++) {
      int64_t t = at / rows;
      const float* g = as_float(G[t] + (at % rows) * cols, cols, scratch.data());
      float square = 0;
#pragma omp simd reduction(+ : square)
      for (int64_t i = 0; i < cols; i++) square += g[i] * g[i];
      G_sq[at] = square;
      float* r = R + at * rank;
      for (int64_t k = 0; k < repeats; k++) {
        const int32_t* from = order[t] + k * rank;
        const float* sign = signs[t] + k * rank;
        if (k == 0) {
#pragma omp simd
          for (int64_t b = 0; b < rank; b++) r[b] = sign[b] * g[from[b]];
        } else {
#pragma omp simd
          for (int64_t b = 0; b < rank; b++) r[b] += sign[b] * g[from[b]];
        }
      }
    }
  }
}

template <class T>
void measure_sketch_wide(int64_t num, const T* const* G, int64_t cols, const int32_t* const* order,
                         const float* const* signs, int64_t rank, int64_t repeats, float* R, float* G_sq) {
  int64_t pieces = (cols + PIECE - 1) / PIECE;
#pragma omp parallel for schedule(static)
  for (int64_t at = 0; at < num * pieces; at++) {
    int64_t t = at / pieces, first = at % pieces * PIECE, count = std::min(PIECE, cols - first);
    float square[PIECE] = {}, sum[PIECE];
    for (int64_t b = 0; b < rank; b++) {
      std::fill(sum, sum + count, 0.0f);
      for (int64_t k = 0; k < repeats; k++) {
        float sign = signs[t][k * rank + b];
        if (sign == 0) continue;
        const T* g = G[t] + order[t][k * rank + b] * cols + first;
#pragma omp simd
        for (int64_t j = 0; j < count; j++) {
          float x = load(g[j]);
          sum[j] += sign * x;
          square[j] += x * x;
        }
      }
      std::copy(sum, sum + count, R + (t * rank + b) * cols + first);
    }
    std::copy(square, square + count, G_sq + t * cols + first);
  }
}

struct Adam {
  float weight1, weight2, correction1, correction2, eps;
};

inline float direction(const Adam& a, float r, float& m, float& v) {
  m += (r - m) * a.weight1;
  v += (r * r - v) * a.weight2;
  return m / (std::sqrt(v / a.correction2) + a.eps) / a.correction1;
}

template <class T, class S>
void apply_typed(int64_t num, T* const* W, const S* const* G, int64_t rows, int64_t cols, const float* eta_s,
                 int64_t eta_matrix, int64_t eta_row, int64_t eta_col, const float* decay, const int64_t* hash) {
#pragma omp parallel for schedule(static)
  for (int64_t at = 0; at < num * rows; at++) {
    int64_t t = at / rows, row = at % rows;
    T* w = W[t] + row * cols;
    const S* g = G[t] + row * cols;
    const float* eta = eta_s + t * eta_matrix + row * eta_row;
    float keep = 1 - (decay ? decay[t] : 0.0f), one = eta[0];
    if (hash) {
      uint32_t base = uint32_t(hash[3 * t]), factor = uint32_t(hash[3 * t + 1]);
      uint32_t place = uint32_t(row * cols + hash[3 * t + 2]);
      if (eta_col == 0) {
#pragma omp simd
        for (int64_t j = 0; j < cols; j++) {
          float x = load(w[j]) * keep - load(g[j]) * one;
          w[j] = T((float_to_bits(x) + random_bits(place + uint32_t(j), base, factor)) >> 16);
        }
      } else {
#pragma omp simd
        for (int64_t j = 0; j < cols; j++) {
          float x = load(w[j]) * keep - load(g[j]) * eta[j];
          w[j] = T((float_to_bits(x) + random_bits(place + uint32_t(j), base, factor)) >> 16);
        }
      }
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
                    const int32_t* const* order, const float* const* signs, int64_t rank, int64_t repeats, float* R, float* G_sq) {
  auto f = (const float* const*)G;
  auto h = (const bf16* const*)G;
  if (tall) {
    bfloat ? measure_sketch_tall(num, h, rows, cols, order, signs, rank, repeats, R, G_sq)
           : measure_sketch_tall(num, f, rows, cols, order, signs, rank, repeats, R, G_sq);
  } else {
    bfloat ? measure_sketch_wide(num, h, cols, order, signs, rank, repeats, R, G_sq)
           : measure_sketch_wide(num, f, cols, order, signs, rank, repeats, R, G_sq);
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
  int64_t pieces = (cols + PIECE - 1) / PIECE;
#pragma omp parallel for schedule(static)
  for (int64_t at = 0; at < num * pieces; at++) {
    int64_t t = at / pieces, first = at % pieces * PIECE, count = std::min(PIECE, cols - first);
    float square[PIECE] = {};
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
  Adam a{numbers[0], numbers[1], numbers[2], numbers[3], numbers[4]};
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
  int64_t pieces = (cols + PIECE - 1) / PIECE;
#pragma omp parallel for schedule(static)
  for (int64_t at = 0; at < num * pieces; at++) {
    int64_t t = at / pieces, first = at % pieces * PIECE, count = std::min(PIECE, cols - first);
    float square[PIECE] = {};
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

// W (1 - decay) - G eta_s of num matrices; decay or hash (base, factor, odd of each matrix) may be null.
void apply(int64_t num, void* const* W, int64_t w_bfloat, const void* const* G, int64_t g_bfloat, int64_t rows, int64_t cols,
           const float* eta_s, int64_t eta_matrix, int64_t eta_row, int64_t eta_col, const float* decay, const int64_t* hash) {
  auto run = [&](auto w, auto g) {
    apply_typed(num, w, g, rows, cols, eta_s, eta_matrix, eta_row, eta_col, decay, hash);
  };
  auto with = [&](auto w) { g_bfloat ? run(w, (const bf16* const*)G) : run(w, (const float* const*)G); };
  w_bfloat ? with((bf16* const*)W) : with((float* const*)W);
}
}
