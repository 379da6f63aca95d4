// Between the two passes: sums of squares, moments, scaling factors and the limiter.
#include "adam.h"
#include "kernels.h"
#include "rows.h"

namespace {

constexpr int64_t FEW = 512;  // numbers that one thread takes alone

}  // namespace

void square(int64_t num, const void* const* G, int64_t bfloat, int64_t size, int64_t piece, double* out) {
  int64_t pieces = (size + piece - 1) / piece;
  share(num * pieces, [=](int64_t at) {
    int64_t first = at % pieces * piece, count = std::min(piece, size - first);
    auto sum = [&](auto g) {
      float square = 0;
#pragma omp simd reduction(+ : square)
      for (int64_t i = 0; i < count; i++) square += load(g[i]) * load(g[i]);
      return double(square);
    };
    out[at] = bfloat ? sum((const bf16*)G[at / pieces] + first) : sum((const float*)G[at / pieces] + first);
  });
}

void norms(int64_t num, int64_t rows, int64_t cols, int64_t tall, const float* R, float* out) {
  if (tall) {
    share(num * rows, [=](int64_t at) {
      float square = 0;
#pragma omp simd reduction(+ : square)
      for (int64_t i = 0; i < cols; i++) square += R[at * cols + i] * R[at * cols + i];
      out[at] = square;
    });
    return;
  }
  Pieces pieces(cols, WIDE);
  share(num * pieces.num, [=](int64_t at) {
    int64_t t = at / pieces.num, first = pieces.first(at), count = pieces.count(at);
    float square[WIDE] = {};
    for (int64_t row = 0; row < rows; row++) {
      const float* r = R + (t * rows + row) * cols + first;
#pragma omp simd
      for (int64_t j = 0; j < count; j++) square[j] += r[j] * r[j];
    }
    std::copy(square, square + count, out + t * cols + first);
  });
}

void direct(int64_t num, int64_t rows, int64_t cols, int64_t tall, const float* R, float* const* M, float* const* V,
            const float* live, const float* numbers, float* out) {
  if (tall && cols == 1) return direct(num, cols, rows, 0, R, M, V, live, numbers, out);  // the same, a register at a time
  const Adam adam(numbers);
  if (tall) {
    share(num * rows, [=](int64_t at) {
      const Adam a = adam;  // here, where nothing that is written can be one of its numbers
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
    });
    return;
  }
  Pieces pieces(cols, WIDE);
  share(num * pieces.num, [=](int64_t at) {
    int64_t t = at / pieces.num, first = pieces.first(at), count = pieces.count(at);
    const Adam a = adam;
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
  });
}

void factors(int64_t num, int64_t n, const float* above, const float* below, const float* needed, const float* G_sq, float* s,
             double* norm_sq) {
  auto take = [=](int64_t t) {
    // Here, where nothing that is written can be one of these addresses.
    const float *up = above + t * n, *low = below + t * n, *other = needed + t * n, *squares = G_sq + t * n;
    float* out = s + t * n;
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < n; j++) {
      float found = std::sqrt(up[j]) / std::max(std::sqrt(low[j]), TINY);
      out[j] = low[j] == 0 || other[j] == 0 ? 0.0f : found;
      sum += double(out[j] * out[j] * squares[j]);
    }
    norm_sq[t] = sum;
  };
  share(num, take, num * n <= FEW);
}

void limited(int64_t num, int64_t n, int64_t b, float* s, const double* norm_sq, float* const* last_norm, const float* live,
             const float* numbers) {
  auto take = [=](int64_t t) {
    float *out = s + t * n, &last = last_norm[t / b][t % b];
    float norm = std::sqrt(float(norm_sq[t])) * numbers[0], factor = numbers[2];
    if (!(live[t] > 0)) {
      std::fill(out, out + n, 0.0f);
      return;
    }
    if (norm > 0) {
      float most = last > 0 ? std::min(norm, numbers[1] * last) : norm;
      factor *= most / std::max(norm, TINY);
      last = most;
    }
    for (int64_t j = 0; j < n; j++) out[j] *= factor;
  };
  share(num, take, num * n <= FEW);
}
