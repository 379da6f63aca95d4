// The first pass of a sketch.
#include "kernels.h"
#include "pairs.h"
#include "rows.h"

namespace {

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
    fetch(x + 2 * cols + first);
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
inline void measure_blocks(const T* x, int64_t cols, const int32_t* order, const float* sign, int64_t rank, float* R,
                           float* R_sq, float* G_sq) {
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
      for (size_t line = 0; line < ROWS * LANES * sizeof(T); line += 64) fetch(next + line);
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
    share(num * groups, [=](int64_t at) {
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
    });
    return;
  }
#endif
  std::vector<float> turned(repeats * rank);  // what is left over stays 0
  share(num * rows, [=](int64_t at) mutable {
    int64_t t = at / rows;
    float* y = turned.data();
    G_sq[at] = turn(G[t] + at % rows * cols, cols, order[t], signs[t], y);
    for (int64_t i = 1; i < repeats; i++) {
#pragma omp simd
      for (int64_t b = 0; b < rank; b++) y[b] += y[i * rank + b];
    }
    float *r = R + at * rank, norm = 0;
#pragma omp simd reduction(+ : norm)
    for (int64_t b = 0; b < rank; b++) r[b] = y[b], norm += y[b] * y[b];
    R_sq[at] = norm;
  });
}

// N rows of one bucket; with what is in it already unless they are the FIRST, and |sum|^2 when they are the LAST. `next`: rows
// that come after them.
template <int64_t N, bool FIRST, bool LAST, class T>
inline void add_rows(const T* const* g, const T* const* next, const float* sign, int64_t count, float* sum, float* square,
                     float* norm) {
  const T* row[N];  // here, where nothing that is written can be one of them
  float factor[N];
  for (int64_t i = 0; i < N; i++) row[i] = g[i], factor[i] = sign[i];
  auto add = [&](int64_t first, int64_t last) {
#pragma omp simd
    for (int64_t j = first; j < last; j++) {
      float added = FIRST ? 0.0f : sum[j], squares = square[j];
      for (int64_t i = 0; i < N; i++) {
        float x = load(row[i][j]);
        added = std::fma(factor[i], x, added), squares = std::fma(x, x, squares);
      }
      sum[j] = added, square[j] = squares;
      if (LAST) norm[j] = std::fma(added, added, norm[j]);
    }
  };
  int64_t j = 0;
  for (; j + LINE <= count; j += LINE) {
    for (int64_t i = 0; i < N; i++) {
      for (size_t line = 0; line < sizeof(T) / 2; line++) fetch_near(next[i] + j + line * LINE / 2);
    }
    add(j, j + LINE);
  }
  add(j, count);
}
template <int64_t N, class T>
inline void add_rows(bool is_first, bool is_last, const T* const* g, const T* const* next, const float* sign, int64_t count,
                     float* sum, float* square, float* norm) {
  auto add = is_first ? (is_last ? add_rows<N, true, true, T> : add_rows<N, true, false, T>)
                      : (is_last ? add_rows<N, false, true, T> : add_rows<N, false, false, T>);
  add(g, next, sign, count, sum, square, norm);
}

template <class T>
void measure_sketch_wide(int64_t num, const T* const* G, int64_t rows, int64_t cols, const int32_t* const* order,
                         const float* const* signs, int64_t rank, float* R, float* R_sq, float* G_sq) {
  constexpr int64_t MOST = 4;  // rows at a time
  Pieces pieces(cols, WIDE);
  share(num * pieces.num, [=](int64_t at) {
    int64_t t = at / pieces.num, first = pieces.first(at), count = pieces.count(at);
    float square[WIDE] = {}, norm[WIDE] = {};
    auto row = [&](int64_t place) { return G[t] + order[t][std::min(place, rows - 1)] * cols + first; };
    for (int64_t b = 0; b < rank; b++) {
      float* sum = R + (t * rank + b) * cols + first;
      for (int64_t place = b; place < rows; place += MOST * rank) {
        const T *g[MOST], *next[MOST];
        float sign[MOST];
        int64_t n = 0;
        for (int64_t i = place; i < rows && n < MOST; i += rank, n++)
          g[n] = row(i), sign[n] = signs[t][i], next[n] = row(i + 1);
        auto add = n == 4 ? add_rows<4, T> : n == 3 ? add_rows<3, T> : n == 2 ? add_rows<2, T> : add_rows<1, T>;
        add(place == b, place + MOST * rank >= rows, g, next, sign, count, sum, square, norm);
      }
    }
    std::copy(norm, norm + count, R_sq + t * cols + first);
    std::copy(square, square + count, G_sq + t * cols + first);
  });
}

}  // namespace

void measure_sketch(int64_t num, const void* const* G, int64_t bfloat, int64_t rows, int64_t cols, int64_t tall,
                    const int32_t* const* order, const float* const* signs, int64_t rank, int64_t repeats, float* R,
                    float* R_sq, float* G_sq) {
  auto f = (const float* const*)G;
  auto h = (const bf16* const*)G;
  if (tall && bfloat && measure_sketch_by_pairs(num, h, rows, cols, order, signs, rank, R, R_sq, G_sq)) return;
  if (tall) {
    bfloat ? measure_sketch_tall(num, h, rows, cols, order, signs, rank, repeats, R, R_sq, G_sq)
           : measure_sketch_tall(num, f, rows, cols, order, signs, rank, repeats, R, R_sq, G_sq);
  } else {
    bfloat ? measure_sketch_wide(num, h, rows, cols, order, signs, rank, R, R_sq, G_sq)
           : measure_sketch_wide(num, f, rows, cols, order, signs, rank, R, R_sq, G_sq);
  }
}
