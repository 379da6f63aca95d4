// The first pass of rank 1.
#include "kernels.h"
#include "rows.h"

namespace {

void measure_one_tall(int64_t num, const float* const* G, int64_t rows, int64_t cols, const float* const* P, float* R,
                      float* G_sq) {
  for_rows(num, rows, cols, G, [=](int64_t t, const int64_t* at, const float* const* g) {
    const float *g0 = g[0], *g1 = g[1], *g2 = g[2], *g3 = g[3], *p = P[t];
    float r0 = 0, r1 = 0, r2 = 0, r3 = 0, s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd reduction(+ : r0, r1, r2, r3, s0, s1, s2, s3)
    for (int64_t i = 0; i < cols; i++) {
      float x0 = g0[i], x1 = g1[i], x2 = g2[i], x3 = g3[i];
      r0 = std::fma(x0, p[i], r0), r1 = std::fma(x1, p[i], r1), r2 = std::fma(x2, p[i], r2), r3 = std::fma(x3, p[i], r3);
      s0 = std::fma(x0, x0, s0), s1 = std::fma(x1, x1, s1), s2 = std::fma(x2, x2, s2), s3 = std::fma(x3, x3, s3);
    }
    R[at[0]] = r0, R[at[1]] = r1, R[at[2]] = r2, R[at[3]] = r3;
    G_sq[at[0]] = s0, G_sq[at[1]] = s1, G_sq[at[2]] = s2, G_sq[at[3]] = s3;
  });
}

void measure_one_tall(int64_t num, const bf16* const* G, int64_t rows, int64_t cols, const float* const* P, float* R,
                      float* G_sq) {
  int64_t pairs = cols / 2;
  std::vector<float> halves(num * 2 * pairs);  // of each P its even places, then its odd ones
  for (int64_t t = 0; t < num; t++) {
    float *even = halves.data() + t * 2 * pairs, *odd = even + pairs;
    for (int64_t i = 0; i < pairs; i++) even[i] = P[t][2 * i], odd[i] = P[t][2 * i + 1];
  }
  const float* split = halves.data();
  for_rows(num, rows, cols, G, [=](int64_t t, const int64_t* at, const bf16* const* g) {
    const float *even = split + t * 2 * pairs, *odd = even + pairs;
    Floats r[STREAMS] = {}, square[STREAMS] = {};
    int64_t i = 0;
    for (; i + WORDS <= pairs; i += WORDS) {
      auto p = load_words<Floats>(even + i), q = load_words<Floats>(odd + i);
      for (int64_t k = 0; k < STREAMS; k++) {
        auto words = load_words<Words>(g[k] + 2 * i);
        Floats x = (Floats)(words << 16), y = (Floats)(words & 0xFFFF0000u);
        r[k] = madd(x, p, madd(y, q, r[k])), square[k] = madd(x, x, madd(y, y, square[k]));
        if (!BY_ITSELF) fetch(g[k] + 2 * cols + 2 * i);
      }
    }
    for (int64_t k = 0; k < STREAMS; k++) {
      float found = sum(r[k]), found_sq = sum(square[k]);
      for (int64_t j = 2 * i; j < cols; j++) {
        float x = load(g[k][j]);
        found = std::fma(x, P[t][j], found), found_sq = std::fma(x, x, found_sq);
      }
      R[at[k]] = found, G_sq[at[k]] = found_sq;
    }
  });
}

// N rows, `apart` rows from one to the next, added to a piece of a wide matrix's channels.
template <int64_t N>
inline void add_one(const float* g, int64_t cols, int64_t apart, const float* p, int64_t count, float* r, float* square) {
#pragma omp simd
  for (int64_t j = 0; j < count; j++) {
    float found = r[j], squares = square[j];
    for (int64_t i = 0; i < N; i++) {
      float x = g[i * apart * cols + j];
      found = std::fma(x, p[i * apart], found), squares = std::fma(x, x, squares);
    }
    r[j] = found, square[j] = squares;
  }
}
// Even channels, and at WIDE / 2 the odd ones.
template <int64_t N>
inline void add_one(const bf16* g, int64_t cols, int64_t apart, const float* p, int64_t count, float* r, float* square) {
  constexpr int64_t ODD = WIDE / 2;
  auto add = [&](int64_t first, int64_t last) {
#pragma omp simd
    for (int64_t j = first; j < last; j++) {
      float even = r[j], odd = r[ODD + j], even_sq = square[j], odd_sq = square[ODD + j];
      for (int64_t i = 0; i < N; i++) {
        uint32_t pair = ((const Pair*)(g + i * apart * cols))[j];
        even = std::fma(low(pair), p[i * apart], even), odd = std::fma(high(pair), p[i * apart], odd);
        even_sq = std::fma(low(pair), low(pair), even_sq), odd_sq = std::fma(high(pair), high(pair), odd_sq);
      }
      r[j] = even, r[ODD + j] = odd, square[j] = even_sq, square[ODD + j] = odd_sq;
    }
  };
  int64_t j = 0, pairs = count / 2;
  for (; j + LINE / 2 <= pairs; j += LINE / 2) {
    for (int64_t i = 0; !BY_ITSELF && i < N; i++) fetch(g + (i * apart + 2) * cols + 2 * j);
    add(j, j + LINE / 2);
  }
  add(j, pairs);
  for (int64_t i = 0; count % 2 && i < N; i++) {
    float x = load(g[i * apart * cols + count - 1]);
    r[pairs] = std::fma(x, p[i * apart], r[pairs]), square[pairs] = std::fma(x, x, square[pairs]);
  }
}
inline void put(const float* found, int64_t count, float* out, const float*) { std::copy(found, found + count, out); }
inline void put(const float* found, int64_t count, float* out, const bf16*) {
  const float* odd = found + WIDE / 2;
  for (int64_t j = 0; j < count / 2; j++) out[2 * j] = found[j], out[2 * j + 1] = odd[j];
  if (count % 2) out[count - 1] = found[count / 2];
}

template <class T>
void measure_one_wide(int64_t num, const T* const* G, int64_t rows, int64_t cols, const float* const* P, float* R,
                      float* G_sq) {
  Pieces pieces(cols, WIDE);
  share(num * pieces.num, [=](int64_t at) {
    int64_t t = at / pieces.num, first = pieces.first(at), count = pieces.count(at);
    float r[WIDE] = {}, square[WIDE] = {};
    const T* g = G[t] + first;
    int64_t apart = rows / STREAMS;  // a stream is a quarter of the rows
    for (int64_t row = 0; row < apart; row++) add_one<STREAMS>(g + row * cols, cols, apart, P[t] + row, count, r, square);
    for (int64_t row = STREAMS * apart; row < rows; row++) add_one<1>(g + row * cols, cols, 1, P[t] + row, count, r, square);
    put(r, count, R + t * cols + first, g);
    put(square, count, G_sq + t * cols + first, g);
  });
}

}  // namespace

void measure_one(int64_t num, const void* const* G, int64_t bfloat, int64_t rows, int64_t cols, int64_t tall,
                 const float* const* P, float* R, float* G_sq) {
  auto f = (const float* const*)G;
  auto h = (const bf16* const*)G;
  if (tall) {
    bfloat ? measure_one_tall(num, h, rows, cols, P, R, G_sq) : measure_one_tall(num, f, rows, cols, P, R, G_sq);
  } else {
    bfloat ? measure_one_wide(num, h, rows, cols, P, R, G_sq) : measure_one_wide(num, f, rows, cols, P, R, G_sq);
  }
}
