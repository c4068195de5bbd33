/* Week 2. The steps of optimizers in fused.c. */

#pragma once

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "fused_products.h"

/* ---- Muon (Jordan et al., 2024) */

/* As torch.lerp. */
static float between(float x, float y, float amount) {
    return amount < 0.5f ? x + amount * (y - x) : y - (y - x) * (1 - amount);
}

static void exchange(float **one, float **other) {
    float *kept = *one;
    *one = *other;
    *other = kept;
}

/* Moves the singular values of y [tall, wide], tall >= wide, near 1 and keeps its singular vectors, by so many
   steps of Newton and Schulz

       y <- y p,  p = a + b g + c g²,  g = yᵀ y

   after division by its length, that is the root of the sum of its squares. Where y is more than square, up to
   three steps are taken together with matrices that are smaller than y,

       q <- q p,  g <- p g p,  and at last y <- y q,

   which is the same, since polynomials of one matrix may be multiplied in any order. (After more than three,
   the rounding of g would have grown too large where singular values are small.) memory: for another y, and for
   four [wide, wide]. Returns where the result is: y, or that other. */
static float *orthogonalize(float *y, long tall, long wide, int steps, float *memory) {
    const float a = 3.4445f, b = -4.7750f, c = 2.0315f;
    const long size = tall * wide, square = wide * wide;
    const int together = tall >= 2 * wide ? 3 : 1;
    float *next = memory, *g = next + size, *p = g + square, *q = p + square, *spare = q + square;
    float squares = 0;
#pragma omp simd reduction(+ : squares)
    for (long i = 0; i < size; i++) squares += y[i] * y[i];
    const float factor = 1 / fmaxf(sqrtf(squares), 1e-7f);
    for (long i = 0; i < size; i++) y[i] *= factor;
    for (int step = 0; step < steps; step++) {
        const int is_first = step % together == 0, is_last = (step + 1) % together == 0 || step + 1 == steps;
        if (is_first) multiply_symmetric(wide, tall, transposed(y, wide), y, g);
        multiply_symmetric(wide, wide, plain(g, wide), g, p);
        for (long i = 0; i < square; i++) p[i] = b * g[i] + c * p[i];
        for (long i = 0; i < wide; i++) p[i * wide + i] += a;
        if (is_first)
            memcpy(q, p, (size_t)square * sizeof(float));
        else {
            multiply_symmetric(wide, wide, plain(q, wide), p, spare);
            exchange(&q, &spare);
        }
        if (is_last) {
            memset(next, 0, (size_t)size * sizeof(float));
            multiply(tall, wide, wide, plain(y, wide), q, wide, next, wide);
            exchange(&y, &next);
        } else {
            multiply_symmetric(wide, wide, plain(p, wide), g, spare);
            multiply_symmetric(wide, wide, plain(spare, wide), p, g);
        }
    }
    return y;
}

typedef struct {
    float *parameter;
    const float *gradient;
    float *momentum;
    long rows, columns;
} muon_matrix;

/* The step of one matrix, `momentum` being m, u what becomes orthogonal, and s = √max(1, rows / columns):

       m <- m + (1 - momentum) (gradient - m),  u = gradient + momentum (m - gradient)
       parameter <- (1 - rate decay) parameter - rate s orthogonalize(u) */
static int update(muon_matrix p, int steps, float rate, float momentum, float decay) {
    const long tall = p.rows > p.columns ? p.rows : p.columns;
    const long wide = p.rows > p.columns ? p.columns : p.rows;
    const long y_tall = padded(tall), y_wide = padded(wide);
    float *memory = zeros(2 * y_tall * y_wide + 4 * y_wide * y_wide);
    if (!memory) return 1;
    float *y = memory;
    /* Where p has fewer rows than columns, y is the transpose of its update. */
    const long by_row = p.rows >= p.columns ? y_wide : 1, by_column = p.rows >= p.columns ? 1 : y_wide;
    for (long i = 0; i < p.rows; i++)
        for (long j = 0; j < p.columns; j++) {
            const long at = i * p.columns + j;
            p.momentum[at] = between(p.momentum[at], p.gradient[at], 1 - momentum);
            /* Nesterov: the gradient as it will look after this step. */
            y[i * by_row + j * by_column] = between(p.gradient[at], p.momentum[at], momentum);
        }
    y = orthogonalize(y, y_tall, y_wide, steps, memory + y_tall * y_wide);
    const float scale = p.rows > p.columns ? sqrtf((float)p.rows / p.columns) : 1;
    for (long i = 0; i < p.rows; i++)
        for (long j = 0; j < p.columns; j++) {
            const long at = i * p.columns + j;
            p.parameter[at] = p.parameter[at] * (1 - rate * decay) - rate * scale * y[i * by_row + j * by_column];
        }
    free(memory);
    return 0;
}

/* One step of Muon for all its matrices. */
int muon(int count, const muon_matrix *matrices, int steps, float rate, float momentum, float decay,
         int threads) {
    int failed = 0;
    (void)threads;
#pragma omp parallel for schedule(dynamic) reduction(| : failed) num_threads(threads)
    for (int i = 0; i < count; i++) failed |= update(matrices[i], steps, rate, momentum, decay);
    return failed;
}
