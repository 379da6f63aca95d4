// The passes over large tensors for CPUs, each matrix read once: see native.py, and reference.py for what they compute. Tensors
// of one shape come as tables of pointers; bfloat, w_bfloat, g_bfloat: 1 for bf16, 0 for float32; tall: rows are channels.
#pragma once
#include <cstdint>

extern "C" {

// R = P G of one row P, and |G_j|^2.
void measure_one(int64_t num, const void* const* G, int64_t bfloat, int64_t rows, int64_t cols, int64_t tall,
                 const float* const* P, float* R, float* G_sq);

// R and |G_j|^2 of a sketch, and |R_j|^2.
void measure_sketch(int64_t num, const void* const* G, int64_t bfloat, int64_t rows, int64_t cols, int64_t tall,
                    const int32_t* const* order, const float* const* signs, int64_t rank, int64_t repeats, float* R,
                    float* R_sq, float* G_sq);

// |G|^2 of num flat tensors; of each its pieces, to be added up.
void square(int64_t num, const void* const* G, int64_t bfloat, int64_t size, int64_t piece, double* out);

// |R_j|^2; of num matrices of rows x cols, along the columns (tall) or the rows.
void norms(int64_t num, int64_t rows, int64_t cols, int64_t tall, const float* R, float* out);

// Adam's moments in place, and |R~_j|^2; where live is 0 nothing changes.
void direct(int64_t num, int64_t rows, int64_t cols, int64_t tall, const float* R, float* const* M, float* const* V,
            const float* live, const float* numbers, float* out);

// Scaling factors of num matrices with n channels, and the sum of s^2 G_sq of each.
void factors(int64_t num, int64_t n, const float* above, const float* below, const float* needed, const float* G_sq, float* s,
             double* norm_sq);

// The limiter of num matrices, b of them to each last_norm, which changes; s becomes eta alpha s factor. numbers: alpha, gamma,
// eta alpha.
void limited(int64_t num, int64_t n, int64_t b, float* s, const double* norm_sq, float* const* last_norm, const float* live,
             const float* numbers);

// W (1 - decay) - G eta_s of num matrices; decay or hash (base, factor, odd of each matrix) may be null.
void apply(int64_t num, void* const* W, int64_t w_bfloat, const void* const* G, int64_t g_bfloat, int64_t rows, int64_t cols,
           const float* eta_s, int64_t eta_matrix, int64_t eta_row, int64_t eta_col, const float* decay, const int64_t* hash);

// AdamW; numbers: those of Adam, then 1 - lr decay, and lr (negative to climb).
void adamw(int64_t num, void* const* W, int64_t w_bfloat, const void* const* G, int64_t g_bfloat, float* const* M,
           float* const* V, int64_t size, const float* numbers, const int64_t* hash);
}
