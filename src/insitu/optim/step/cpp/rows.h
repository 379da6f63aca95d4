// How the rows and columns of matrices are shared out among threads.
#pragma once
#include <omp.h>

#include "numbers.h"

namespace {

// The numbers below `num`, shared out among threads, each with its own copy of `take`; where they are `few`, one thread takes
// all. Inside of a parallel region there are no other threads to be had, and to ask for them takes a microsecond.
template <class Take>
inline void share(int64_t num, Take take, bool few = false) {
  if (few || num < 2 || omp_in_parallel()) {
    for (int64_t at = 0; at < num; at++) take(at);
    return;
  }
#pragma omp parallel firstprivate(take)
#pragma omp for schedule(static)
  for (int64_t at = 0; at < num; at++) take(at);
}

// STREAMS rows of a matrix at a time, each in pages of its own: a core fetches ahead in several pages at once, and never across
// their ends. A row has the same bits whatever its neighbours are. Each thread has its own copy of `take`.
constexpr int64_t STREAMS = 4, APART = 48;  // rows from one stream to the next: 16 are 10 % slower in bf16
template <class T, class Take>
inline void for_rows(int64_t num, int64_t rows, int64_t cols, const T* const* G, Take take) {
  constexpr int64_t BLOCK = STREAMS * APART;
  int64_t blocks = (rows + BLOCK - 1) / BLOCK;
  share(num * blocks, [=](int64_t block) mutable {
    int64_t t = block / blocks, first = block % blocks * BLOCK, count = std::min(BLOCK, rows - first);
    int64_t apart = (count + STREAMS - 1) / STREAMS;
    for (int64_t i = 0; i < apart; i++) {
      int64_t at[STREAMS];
      const T* g[STREAMS];
      for (int64_t k = 0; k < STREAMS; k++) {
        int64_t row = first + std::min(k * apart + i, count - 1);  // past the end: the last one once more
        at[k] = t * rows + row, g[k] = G[t] + row * cols;
      }
      take(t, at, g);
    }
  });
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

}  // namespace
