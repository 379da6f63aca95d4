// Whole steps of bundles of tensors, by the kernels: what Python would do between them costs as much as a pass.
#include <omp.h>

#include <initializer_list>

#include "kernels.h"
#include "numbers.h"

namespace {

// A bundle of num matrices, as insitu.optim.step.carried lays it out.
struct Bundle {
  int64_t num, chunk;  // chunk: so many of them at a time, for which there is room
  int64_t rows, cols, tall, w_bfloat, g_bfloat;
  int64_t rank, repeats;                     // repeats: of a sketch; 0 for one row; -1 where R and |G_j|^2 are there already
  int64_t per_tensor, exact, rounded, done;  // done: updates so far
  void* const* W;
  float* const* M;
  float* const* V;
  float* const* last_norm;
  const uint64_t* seeds;  // of the random bits
  const void* const* P;   // rows, or orders
  const float* const* signs;
  const void* const* G;
  double* squares;             // |G|^2 of each of num
  float *R, *R_sq, *G_sq, *s;  // of chunk
  float adam[7], numbers[3], decay;
};

struct Elements {
  int64_t num, size, w_bfloat, g_bfloat, rounded, done;
  void* const* W;
  float* const* M;
  float* const* V;
  const uint64_t* seeds;
  const void* const* G;
  double* squares;   // |G|^2 of each
  float numbers[9];  // as adamw has them
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

// Those of insitu.optim.rounding, of a whole tensor of less than 2^31 elements.
void hash_numbers(uint64_t seed, int64_t done, int64_t* out) {
  uint64_t key = mix({mix({seed, uint64_t(done)}), 0});
  out[0] = int64_t(key >> 31), out[1] = int64_t(2 * (key & 0x7FFFFFFF) + 1), out[2] = 0;
}

double total(const float* x, int64_t n) {
  constexpr int64_t SUMS = 64;  // at once: a single one waits for what it had
  double sums[SUMS] = {}, sum = 0;
  int64_t j = 0;
  for (; j + SUMS <= n; j += SUMS) {
#pragma omp simd
    for (int64_t k = 0; k < SUMS; k++) sums[k] += x[j + k];
  }
  for (; j < n; j++) sum += x[j];
  for (int64_t k = 0; k < SUMS; k++) sum += sums[k];
  return sum;
}

// Parts of a step of k matrices from the one at `at` on; what is on its way is in the part of the room that `slot` is.
enum Parts : int64_t { MEASURE = 1, SQUARE = 2, SCALE = 4, APPLY = 8 };
void carry_some(const Bundle& b, int64_t at, int64_t k, int64_t slot, int64_t parts) {
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
      if (b.rounded) hash_numbers(b.seeds[at + end], b.done, hash.data() + 3 * end);
    }
    apply(end - t, b.W + at + t, b.w_bfloat, G + t, b.g_bfloat, b.rows, b.cols, s + t * channels, channels,
          b.tall && !b.per_tensor, !b.tall && !b.per_tensor, b.decay == 0 ? nullptr : decay.data() + t,
          b.rounded ? hash.data() + 3 * t : nullptr);
  }
}

}  // namespace

extern "C" {

// A bundle of num small tensors that take AdamW, as insitu.optim.step.carried_elements lays it out.
void carry_adamw(const Elements* bundle, int64_t parts) {
  const Elements& b = *bundle;
  if (parts & SQUARE) square(b.num, b.G, b.g_bfloat, b.size, b.size, b.squares);
  std::vector<int64_t> hash(b.rounded ? 3 * b.num : 0);
  for (int64_t t = 0, end; parts & APPLY && t < b.num; t = end + 1) {  // runs of tensors that are not to stand still
    for (end = t; end < b.num && b.squares[end] > 0 && b.squares[end] < INFINITY; end++) {
      if (b.rounded) hash_numbers(b.seeds[end], b.done, hash.data() + 3 * end);
    }
    adamw(end - t, b.W + t, b.w_bfloat, b.G + t, b.g_bfloat, b.M + t, b.V + t, b.size, b.numbers,
          b.rounded ? hash.data() + 3 * t : nullptr);
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
