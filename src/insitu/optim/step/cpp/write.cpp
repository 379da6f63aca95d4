// The second pass: weights, rounded as they are written.
#include "adam.h"
#include "kernels.h"

namespace {

constexpr int64_t PIECE = 512;  // elements of AdamW that one thread takes at a time

// W (1 - decay) - G eta. The same whatever the types are: a part of a tensor may be written as another than the whole.
inline float moved(float w, float keep, float g, float eta) { return std::fma(-g, eta, w * keep); }
inline bf16 rounded(float x, uint32_t random) { return bf16((float_to_bits(x) + random) >> 16); }

// Two neighbours of a bf16 row are one word, as the random bits come: nothing has to change its place. The random words are
// counted, not multiplied out; a compiler's own loop takes twice the time.
template <bool BY_COLUMN>
inline void apply_pairs(Pair* w, const Pair* g, int64_t pairs, float keep, const float* eta_low, const float* eta_high,
                        uint32_t word_index, uint32_t base, uint32_t factor) {
  Words counter;
  for (int64_t k = 0; k < WORDS; k++) counter[k] = base + (word_index + uint32_t(k)) * WEYL;
  Floats even = Floats{} + *eta_low, odd = Floats{} + *eta_high;
  int64_t j = 0;
  for (; j + WORDS <= pairs; j += WORDS, counter += uint32_t(WORDS) * WEYL) {
    Words random = (counter ^ (Words)((Integers)counter >> 15)) * factor;
    random = (random ^ (Words)((Integers)random >> 15)) * MIXER;
    auto x = load_words<Words>(w + j), y = load_words<Words>(g + j);
    fetch((const char*)(w + j) + AHEAD), fetch((const char*)(g + j) + AHEAD);
    Floats first = (Floats)(x << 16), second = (Floats)(x & 0xFFFF0000u);
    if (keep != 1.0f) first *= keep, second *= keep;
    if (BY_COLUMN) even = load_words<Floats>(eta_low + j), odd = load_words<Floats>(eta_high + j);
    first = madd(-(Floats)(y << 16), even, first), second = madd(-(Floats)(y & 0xFFFF0000u), odd, second);
    x = halves_of((Words)first + (random & 0xFFFFu), (Words)second + (random >> 16));
    std::memcpy(w + j, &x, sizeof x);
  }
  for (; j < pairs; j++) {
    uint32_t random = random_word(word_index + uint32_t(j), base, factor);
    float first = moved(low(w[j]), keep, low(g[j]), eta_low[BY_COLUMN ? j : 0]);
    float second = moved(high(w[j]), keep, high(g[j]), eta_high[BY_COLUMN ? j : 0]);
    w[j] = rounded(first, random & 0xFFFF) | uint32_t(rounded(second, random >> 16)) << 16;
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
    float x = moved(load(w[j]), keep, load(g[j]), eta[by_column ? j : 0]);
    w[j] = rounded(x, random_bits(place + uint32_t(j), base, factor));
  };
  int64_t first = place & 1, pairs = (cols - first) / 2;
  if (first) single(0);
  auto w2 = (Pair*)(w + first);
  auto g2 = (const Pair*)(g + first);
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
    float x = moved(load(w[j]), keep, g[j], eta[by_column ? j : 0]);
    w[j] = rounded(x, random_bits(place + uint32_t(j), base, factor));
  }
}
template <class S>
inline void apply_rounded(float*, const S*, int64_t, float, const float*, bool, uint32_t, uint32_t, uint32_t, Halves&) {
}  // never asked for

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
    const float* eta = eta_s + t * eta_matrix + row * eta_row;
    float keep = 1 - (decay ? decay[t] : 0.0f), one = eta[0];
    if (hash) {
      uint32_t place = uint32_t(row * cols + hash[3 * t + 2]);
      apply_rounded(w, g, cols, keep, eta, eta_col != 0, place, uint32_t(hash[3 * t]), uint32_t(hash[3 * t + 1]), halves);
    } else if (eta_col == 0) {
#pragma omp simd
      for (int64_t j = 0; j < cols; j++) store(w[j], moved(load(w[j]), keep, load(g[j]), one));
    } else {
#pragma omp simd
      for (int64_t j = 0; j < cols; j++) store(w[j], moved(load(w[j]), keep, load(g[j]), eta[j]));
    }
  }
}

}  // namespace

void apply(int64_t num, void* const* W, int64_t w_bfloat, const void* const* G, int64_t g_bfloat, int64_t rows, int64_t cols,
           const float* eta_s, int64_t eta_matrix, int64_t eta_row, int64_t eta_col, const float* decay, const int64_t* hash) {
  auto run = [&](auto w, auto g) { apply_typed(num, w, g, rows, cols, eta_s, eta_matrix, eta_row, eta_col, decay, hash); };
  auto with = [&](auto w) { g_bfloat ? run(w, (const bf16* const*)G) : run(w, (const float* const*)G); };
  w_bfloat ? with((bf16* const*)W) : with((float* const*)W);
}

void adamw(int64_t num, void* const* W, int64_t w_bfloat, const void* const* G, int64_t g_bfloat, float* const* M,
           float* const* V, int64_t size, const float* numbers, const int64_t* hash) {
  Adam a(numbers);
  auto run = [&](auto w, auto g) { adamw_typed(num, w, g, M, V, size, a, numbers[7], numbers[8], hash); };
  auto with = [&](auto w) { g_bfloat ? run(w, (const bf16* const*)G) : run(w, (const float* const*)G); };
  w_bfloat ? with((bf16* const*)W) : with((float* const*)W);
}
