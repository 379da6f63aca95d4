// The second pass: weights, rounded as they are written.
#include "adam.h"
#include "kernels.h"
#include "rows.h"

namespace {

constexpr int64_t PIECE = 512;  // elements of AdamW that one thread takes at a time

// W (1 - decay) - G eta. The same whatever the types are: a part of a tensor may be written as another than the whole.
inline float moved(float w, float keep, float g, float eta) { return std::fma(-g, eta, w * keep); }
inline bf16 rounded(float x, uint32_t random) { return bf16((float_to_bits(x) + random) >> 16); }

// Two neighbours of a bf16 row are one word, as the random bits come: nothing has to change its place. The random words are
// counted, not multiplied out; a compiler's own loop takes twice the time. N rows at a time, whose factors per column, if they
// are such, are the same.
template <int64_t N, bool BY_COLUMN, bool DECAYED>
inline void apply_pairs(Pair* const* W, const Pair* const* G, int64_t pairs, float keep, const float* const* eta_low,
                        const float* const* eta_high, const uint32_t* word_index, uint32_t base, uint32_t factor) {
  Pair* w[N];  // here, where nothing that is written can be one of them
  const Pair* g[N];
  Words counter[N], steps;
  Floats even[N], odd[N];
  for (int64_t k = 0; k < WORDS; k++) steps[k] = uint32_t(k) * WEYL;  // known to a compiler
  for (int64_t i = 0; i < N; i++) {
    w[i] = W[i], g[i] = G[i], counter[i] = steps + (base + word_index[i] * WEYL);
    even[i] = Floats{} + *eta_low[i], odd[i] = Floats{} + *eta_high[i];
  }
  int64_t j = 0;
  for (; j + WORDS <= pairs; j += WORDS) {
    if (BY_COLUMN) even[0] = load_words<Floats>(eta_low[0] + j), odd[0] = load_words<Floats>(eta_high[0] + j);
    for (int64_t i = 0; i < N; i++) {
      Words random = (counter[i] ^ (Words)((Integers)counter[i] >> 15)) * factor;
      random = (random ^ (Words)((Integers)random >> 15)) * MIXER;
      counter[i] += uint32_t(WORDS) * WEYL;
      auto x = load_words<Words>(w[i] + j), y = load_words<Words>(g[i] + j);
      fetch((const char*)(w[i] + j) + AHEAD / N), fetch((const char*)(g[i] + j) + (N == 1 ? AHEAD : NEAR));
      Floats first = (Floats)(x << 16), second = (Floats)(x & 0xFFFF0000u);
      if (DECAYED) first *= keep, second *= keep;
      const Floats &of_first = even[BY_COLUMN ? 0 : i], &of_second = odd[BY_COLUMN ? 0 : i];
      first = madd(-(Floats)(y << 16), of_first, first), second = madd(-(Floats)(y & 0xFFFF0000u), of_second, second);
      x = halves_of((Words)first + (random & 0xFFFFu), (Words)second + (random >> 16));
      std::memcpy(w[i] + j, &x, sizeof x);
    }
  }
  for (int64_t i = 0; i < N; i++) {
    for (int64_t at = j; at < pairs; at++) {
      uint32_t random = random_word(word_index[i] + uint32_t(at), base, factor);
      float first = moved(low(w[i][at]), keep, low(g[i][at]), eta_low[i][BY_COLUMN ? at : 0]);
      float second = moved(high(w[i][at]), keep, high(g[i][at]), eta_high[i][BY_COLUMN ? at : 0]);
      w[i][at] = rounded(first, random & 0xFFFF) | uint32_t(rounded(second, random >> 16)) << 16;
    }
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
    const float *low = halves.low.data(), *high = halves.high.data();
    auto apply = keep == 1.0f ? apply_pairs<1, true, false> : apply_pairs<1, true, true>;
    apply(&w2, &g2, pairs, keep, &low, &high, &word_index, base, factor);
  } else {
    auto apply = keep == 1.0f ? apply_pairs<1, false, false> : apply_pairs<1, false, true>;
    apply(&w2, &g2, pairs, keep, &eta, &eta, &word_index, base, factor);
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
void adamw_typed(int64_t num, T* const* W, const S* const* G, float* const* M, float* const* V, int64_t size, const Adam& adam,
                 float all_keep, float all_rate, const int64_t* hash) {
  int64_t pieces = (size + PIECE - 1) / PIECE;
  share(num * pieces, [=](int64_t at) {
    const Adam a = adam;  // here, where nothing that is written can be one of these numbers
    const float keep = all_keep, rate = all_rate;
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
  });
}

// STREAMS rows at a time, as for_rows has them, of a matrix whose rows are whole pairs. W is what has to come from memory; G may
// still be in the cache.
inline void apply_block(bf16* W, const bf16* G, int64_t first, int64_t cols, float keep, const float* eta_s, int64_t eta_row,
                        bool by_column, const int64_t* hash, Halves& halves) {
  if (by_column) halves.take(eta_s, cols / 2);
  for (int64_t i = 0; i < APART; i++) {
    Pair* w[STREAMS];
    const Pair* g[STREAMS];
    const float *even[STREAMS], *odd[STREAMS];
    uint32_t word_index[STREAMS];
    for (int64_t k = 0; k < STREAMS; k++) {
      int64_t row = first + k * APART + i;
      w[k] = (Pair*)(W + row * cols), g[k] = (const Pair*)(G + row * cols);
      even[k] = by_column ? halves.low.data() : eta_s + row * eta_row;
      odd[k] = by_column ? halves.high.data() : even[k];
      word_index[k] = uint32_t(row * cols) >> 1;
    }
    auto apply = keep == 1.0f ? (by_column ? apply_pairs<STREAMS, true, false> : apply_pairs<STREAMS, false, false>)
                              : (by_column ? apply_pairs<STREAMS, true, true> : apply_pairs<STREAMS, false, true>);
    apply(w, g, cols / 2, keep, even, odd, word_index, uint32_t(hash[0]), uint32_t(hash[1]));
  }
}
template <class T, class S>
inline void apply_block(T*, const S*, int64_t, int64_t, float, const float*, int64_t, bool, const int64_t*, Halves&) {
}  // never asked for

template <class T, class S>
void apply_typed(int64_t num, T* const* W, const S* const* G, int64_t rows, int64_t cols, const float* eta_s,
                 int64_t eta_matrix, int64_t eta_row, int64_t eta_col, const float* decay, const int64_t* hash) {
  constexpr int64_t BLOCK = STREAMS * APART;
  bool in_pairs = sizeof(T) == 2 && sizeof(S) == 2 && hash && cols % 2 == 0;
  for (int64_t t = 0; in_pairs && t < num; t++) in_pairs = hash[3 * t + 2] % 2 == 0;
  int64_t blocks = in_pairs ? rows / BLOCK : 0, singles = rows - blocks * BLOCK;
  auto keep_of = [=](int64_t t) { return 1 - (decay ? decay[t] : 0.0f); };
  share(num * blocks, [=, halves = Halves()](int64_t at) mutable {
    int64_t t = at / blocks, first = at % blocks * BLOCK;
    apply_block(W[t], G[t], first, cols, keep_of(t), eta_s + t * eta_matrix, eta_row, eta_col != 0, hash + 3 * t, halves);
  });
  share(num * singles, [=, halves = Halves()](int64_t at) mutable {
    int64_t t = at / singles, row = blocks * BLOCK + at % singles;
    T* w = W[t] + row * cols;
    const S* g = G[t] + row * cols;
    const float* eta = eta_s + t * eta_matrix + row * eta_row;
    float keep = keep_of(t), one = eta[0];
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
  });
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
