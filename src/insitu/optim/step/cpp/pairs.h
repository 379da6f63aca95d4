// bf16 numbers as the pairs that some CPUs multiply and add in one instruction.
#pragma once
#include "numbers.h"

// As measure_sketch does it where rows are channels; false, with nothing done, where the CPU has no such instruction or the sizes
// are no whole blocks.
bool measure_sketch_by_pairs(int64_t num, const bf16* const* G, int64_t rows, int64_t cols, const int32_t* const* order,
                             const float* const* signs, int64_t rank, float* R, float* R_sq, float* G_sq);
