// The first pass of a sketch of bf16 by products of pairs, on CPUs that have them: two numbers of one bucket are put beside each
// other, and one instruction multiplies both by their signs and adds them up.
//
// These instructions take what is below 2^-126 for zero, a product too: of numbers of less than 1e-19 the squares are lost.
// Where a sum of squares says that it may have happened, it is made again, one number at a time.
#include "pairs.h"
#include "rows.h"

#ifdef __AVX512BF16__
namespace {

constexpr int64_t FAR = 16 << 20;  // bytes: more than a cache keeps
constexpr uint32_t ALL = 0xFFFFFFFFu, LOWER = 0x55555555u;  // words of a register

inline __m512bh halves(__m512i words) { return (__m512bh)words; }

// Two blocks of a row that are added to the same buckets.
struct Two {
  __m512i places, signs;  // words of either; bf16
  int64_t first, second;  // where in a row they are
  __mmask32 found;        // LOWER where there is no second
};

// All blocks of one order, bucket after bucket.
class Blocks {
  const int32_t* of = nullptr;
  std::vector<Two> all;

 public:
  const std::vector<Two>& take(const int32_t* order, const float* sign, int64_t cols, int64_t rank) {
    if (of == order) return all;
    of = order, all.clear(), all.reserve(cols / LANES);
    const __m512i within = _mm512_set1_epi32(LANES - 1), other = _mm512_set1_epi32(2 * LANES);
    for (int64_t b = 0; b < rank; b += LANES) {
      for (int64_t i = b; i < cols; i += 2 * rank) {
        int64_t j = i + rank < cols ? i + rank : i;
        __m512i low = _mm512_and_si512(_mm512_loadu_si512(order + i), within);
        __m512i high = _mm512_or_si512(_mm512_and_si512(_mm512_loadu_si512(order + j), within), other);
        __m512i signs = _mm512_srli_epi32(_mm512_loadu_si512(sign + i), 16);
        signs = _mm512_or_si512(signs, _mm512_loadu_si512(sign + j));  // -1, 0 and 1 have no lower half
        all.push_back({_mm512_or_si512(low, _mm512_slli_epi32(high, 16)), signs, order[i] / LANES * LANES,
                       order[j] / LANES * LANES, j == i ? LOWER : ALL});
      }
    }
    return all;
  }
};

void measure_plainly(const bf16* x, int64_t cols, const int32_t* order, const float* sign, int64_t rank, float* R, float& R_sq,
                     float& G_sq) {
  std::fill(R, R + rank, 0.0f);
  R_sq = G_sq = 0;
  for (int64_t i = 0; i < cols; i++) {
    float found = load(x[order[i]]);
    R[i % rank] += sign[i] * found, G_sq += found * found;
  }
  for (int64_t b = 0; b < rank; b++) R_sq += R[b] * R[b];
}

// Squares first, in the order of memory, in which a core fetches ahead by itself; then blocks, in the order of buckets. `far`: R
// does not stay in a cache, so that it need not come there.
inline void measure_rows(const bf16* const* g, int64_t cols, const std::vector<Two>& blocks, int64_t rank, bool far,
                         float* const* out, float* R_sq, float* G_sq) {
  const bf16* row[STREAMS];  // here, where nothing that is written can be one of them
  float* R[STREAMS];
  __m512 squares[STREAMS], norms[STREAMS], sums[STREAMS];
  for (int64_t k = 0; k < STREAMS; k++) row[k] = g[k], R[k] = out[k], squares[k] = norms[k] = _mm512_setzero_ps();
  for (int64_t i = 0; i < cols; i += 2 * LANES) {
    __mmask32 found = cols - i < 2 * LANES ? 0xFFFFu : ALL;
    for (int64_t k = 0; k < STREAMS; k++) {
      auto x = halves(_mm512_maskz_loadu_epi16(found, row[k] + i));
      squares[k] = _mm512_dpbf16_ps(squares[k], x, x);
    }
  }
  int64_t ahead = cols;
  const Two* two = blocks.data();
  for (int64_t b = 0; b < rank; b += LANES) {
    for (int64_t k = 0; k < STREAMS; k++) sums[k] = _mm512_setzero_ps();
    for (int64_t i = b; i < cols; i += 2 * rank, two++, ahead += 2 * LANES) {
      const Two now = *two;
      for (int64_t k = 0; k < STREAMS; k++) {
        auto block = [&](int64_t from) {
          return _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)(row[k] + from)));
        };
        auto both = halves(_mm512_maskz_permutex2var_epi16(now.found, block(now.first), now.places, block(now.second)));
        sums[k] = _mm512_dpbf16_ps(sums[k], both, halves(now.signs));
        fetch(row[k] + ahead);
      }
    }
    for (int64_t k = 0; k < STREAMS; k++) {
      far ? _mm512_stream_ps(R[k] + b, sums[k]) : _mm512_storeu_ps(R[k] + b, sums[k]);
      norms[k] = _mm512_fmadd_ps(sums[k], sums[k], norms[k]);
    }
  }
  for (int64_t k = 0; k < STREAMS; k++) G_sq[k] = _mm512_reduce_add_ps(squares[k]), R_sq[k] = _mm512_reduce_add_ps(norms[k]);
}

bool is_zero(const bf16* x, int64_t cols) {
  uint32_t any = 0;
#pragma omp simd reduction(| : any)
  for (int64_t i = 0; i < cols; i++) any |= x[i];
  return (any & 0x7FFF) == 0;
}

void measure_tall(int64_t num, const bf16* const* G, int64_t rows, int64_t cols, const int32_t* const* order,
                  const float* const* signs, int64_t rank, float* R, float* R_sq, float* G_sq) {
  bool far = num * rows * rank * int64_t(sizeof(float)) > FAR && uintptr_t(R) % 64 == 0;
  for_rows(num, rows, cols, G, [=, blocks = Blocks()](int64_t t, const int64_t* at, const bf16* const* g) mutable {
    float *r[STREAMS], norms[STREAMS], squares[STREAMS];
    for (int64_t k = 0; k < STREAMS; k++) r[k] = R + at[k] * rank;
    measure_rows(g, cols, blocks.take(order[t], signs[t], cols, rank), rank, far, r, norms, squares);
    for (int64_t k = 0; k < STREAMS; k++) {
      if (squares[k] < TINY && !is_zero(g[k], cols))
        measure_plainly(g[k], cols, order[t], signs[t], rank, r[k], norms[k], squares[k]);
      R_sq[at[k]] = norms[k], G_sq[at[k]] = squares[k];
    }
    if (far) _mm_sfence();  // for whoever reads R
  });
}

}  // namespace

bool measure_sketch_by_pairs(int64_t num, const bf16* const* G, int64_t rows, int64_t cols, const int32_t* const* order,
                             const float* const* signs, int64_t rank, float* R, float* R_sq, float* G_sq) {
  if (rank % LANES || cols % LANES) return false;
  measure_tall(num, G, rows, cols, order, signs, rank, R, R_sq, G_sq);
  return true;
}
#else
bool measure_sketch_by_pairs(int64_t, const bf16* const*, int64_t, int64_t, const int32_t* const*, const float* const*, int64_t,
                             float*, float*, float*) {
  return false;
}
#endif
