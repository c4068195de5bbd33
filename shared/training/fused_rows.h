/* Week 2. Activations and norms in fused.c: what is computed number by number, or row by row. */

#pragma once

#include <math.h>
#include <string.h>

/* ---- elementwise */

/* eˣ, to two units in the last place (Cephes): 2ⁿ eʳ with |r| <= ln 2 / 2, and a polynomial for eʳ. Written so
   that the compiler makes vectors of it. 0 below -87, and no more than e⁸⁸; nan remains nan. */
static inline float exponential(float given) {
    float x = given > 88 ? 88 : given;
    x = x < -87 ? -87 : x;
    const float round = 12582912; /* 1.5 · 2²³: what is added to it loses its fraction */
    const float n = (x * 1.44269504f + round) - round;
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f; /* ln 2 in two parts */
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1;
    const int bits = ((int)n + 127) << 23;
    float power;
    memcpy(&power, &bits, sizeof power);
    return given < -87 ? 0 : p * power;
}

static inline float sigmoid(float x) { return 1 / (1 + exponential(-x)); }

/* y = silu(gate) · up,  silu(g) = g σ(g) */
void gated_silu(const float *gate, const float *up, long count, float *y, int threads) {
    (void)threads;
#pragma omp parallel for simd schedule(static) num_threads(threads)
    for (long i = 0; i < count; i++) y[i] = gate[i] * sigmoid(gate[i]) * up[i];
}

/* With s = σ(gate):

       d gate = dy · up · s · (1 + gate (1 - s)),  d up = dy · gate · s */
void gated_silu_backward(const float *gate, const float *up, const float *dy, long count, float *d_gate,
                         float *d_up, int threads) {
    (void)threads;
#pragma omp parallel for simd schedule(static) num_threads(threads)
    for (long i = 0; i < count; i++) {
        const float s = sigmoid(gate[i]);
        d_gate[i] = dy[i] * up[i] * s * (1 + gate[i] * (1 - s));
        d_up[i] = dy[i] * gate[i] * s;
    }
}

/* ---- RMSNorm (Zhang & Sennrich, 2019) */

static inline float inverse_rms(const float *x, long width, float eps) {
    float squares = 0;
#pragma omp simd reduction(+ : squares)
    for (long i = 0; i < width; i++) squares += x[i] * x[i];
    return 1 / sqrtf(squares / (float)width + eps);
}

/* One row, with r = 1 / √(mean(x²) + eps) and y = x r weight:

       dx = r weight · dy - x r³ mean(weight · dy · x),  d weight += dy x r

   beside: what is added to dx, or NULL. */
static inline void norm_backward(const float *x, const float *weight, const float *dy, const float *beside,
                                 long width, float r, float *dx, float *d_weight) {
    float product = 0;
#pragma omp simd reduction(+ : product)
    for (long i = 0; i < width; i++) product += weight[i] * dy[i] * x[i];
    const float along_x = r * r * r * product / (float)width;
#pragma omp simd
    for (long i = 0; i < width; i++) {
        const float own = dy[i]; /* dx may be dy */
        dx[i] = r * weight[i] * own - along_x * x[i];
        d_weight[i] += own * x[i] * r;
    }
    if (beside)
        for (long i = 0; i < width; i++) dx[i] += beside[i];
}

/* y = x r weight, row by row: [rows, width] */
void rms_norm(const float *x, const float *weight, long rows, long width, float eps, float *y, int threads) {
    (void)threads;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long row = 0; row < rows; row++) {
        const float *from = x + row * width, r = inverse_rms(from, width, eps);
        for (long i = 0; i < width; i++) y[row * width + i] = from[i] * r * weight[i];
    }
}

enum { CHUNK = 64 };

/* d_weights: zeros [rows / CHUNK, rounded up, width], a part of weight's gradient from each CHUNK rows, so that
   it does not depend on the number of threads in which order they are added. beside: [rows, width], or NULL. */
void rms_norm_backward(const float *x, const float *weight, const float *dy, const float *beside, long rows,
                       long width, float eps, float *dx, float *d_weights, int threads) {
    (void)threads;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long chunk = 0; chunk < (rows + CHUNK - 1) / CHUNK; chunk++)
        for (long row = chunk * CHUNK; row < rows && row < (chunk + 1) * CHUNK; row++) {
            const long at = row * width;
            const float r = inverse_rms(x + at, width, eps);
            norm_backward(x + at, weight, dy + at, beside ? beside + at : NULL, width, r, dx + at,
                          d_weights + chunk * width);
        }
}
