/* Week 2. Activations and norms in fused.c: what is computed number by number, or row by row. */

#pragma once

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "fused_products.h"

/* ---- activations */

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

/* Φ, the share of the normal distribution below x, and its density φ: erf to 1.5·10⁻⁷ (Abramowitz & Stegun,
   7.1.26), in which both have one exponential. */
static inline float normal_below(float x, float *density) {
    const float t = 1 / (1 + 0.3275911f * 0.70710678f * fabsf(x));
    const float e = exponential(-0.5f * x * x);
    float p = 1.061405429f;
    p = p * t - 1.453152027f;
    p = p * t + 1.421413741f;
    p = p * t - 0.284496736f;
    p = p * t + 0.254829592f;
    const float beyond = 0.5f * p * t * e; /* of |x| */
    *density = 0.39894228f * e;
    return x < 0 ? beyond : 1 - beyond;
}

/* GELU (Hendrycks & Gimpel, 2016): y = x Φ(x), of slope Φ + x φ; by_tanh: GPT-2's approximation of it,

       y = x (1 + tanh(√(2/π) (x + 0.044715 x³))) / 2 = x s,  s = σ(a x + b x³),

   of slope s + x s (1 - s) (a + 3 b x²). Beyond ±16 s is 0 or 1: there x is taken for ±16, so that nothing
   overflows. The slope, all that the backward needs, costs little beside y; it may be written where x is. */
static inline float within(float x) {
    const float below = x > 16 ? 16 : x;
    return below < -16 ? -16 : below;
}

void gelu(const float *x, long count, int by_tanh, float *y, float *slope, int threads) {
    const float a = 1.5957691216f, b = 0.0713548163f;
    (void)threads;
    if (by_tanh) {
#pragma omp parallel for simd schedule(static) num_threads(threads)
        for (long i = 0; i < count; i++) {
            const float z = within(x[i]), s = sigmoid(z * (a + b * z * z));
            y[i] = x[i] * s;
            slope[i] = s + z * s * (1 - s) * (a + 3 * b * z * z);
        }
        return;
    }
#pragma omp parallel for simd schedule(static) num_threads(threads)
    for (long i = 0; i < count; i++) {
        float density;
        const float given = x[i], below = normal_below(given, &density);
        y[i] = given * below;
        slope[i] = below + given * density;
    }
}

/* ---- RMSNorm (Zhang & Sennrich, 2019) and LayerNorm (Ba et al., 2016) */

static inline float inverse_rms(const float *x, long width, float eps) {
    float squares = 0;
#pragma omp simd reduction(+ : squares)
    for (long i = 0; i < width; i++) squares += x[i] * x[i];
    return 1 / sqrtf(squares / (float)width + eps);
}

/* One row of RMSNorm, with r = 1 / √(mean(x²) + eps) and y = x r weight:

       dx = r weight · dy - x r³ mean(weight · dy · x),  d weight += dy x r

   beside: what is added to dx, or NULL. */
static inline void rms_norm_backward(const float *x, const float *weight, const float *dy, const float *beside,
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

typedef struct {
    float mean, inverse_deviation;
} moments;

static inline moments moments_of(const float *x, long width, float eps) {
    float sum = 0, squares = 0;
#pragma omp simd reduction(+ : sum)
    for (long i = 0; i < width; i++) sum += x[i];
    const float mean = sum / (float)width;
#pragma omp simd reduction(+ : squares)
    for (long i = 0; i < width; i++) squares += (x[i] - mean) * (x[i] - mean);
    return (moments){mean, 1 / sqrtf(squares / (float)width + eps)};
}

/* One row of LayerNorm, with r = 1 / √(variance + eps), n = (x - mean) r and y = n weight + bias:

       dx = r (g - mean(g) - n mean(g n)),  g = weight · dy,  d weight += dy n,  d bias += dy

   beside: as above, or NULL. */
static inline void layer_norm_backward(const float *x, const float *weight, const float *dy, const float *beside,
                                       long width, moments m, float *dx, float *d_weight, float *d_bias) {
    const float r = m.inverse_deviation;
    float sum = 0, along = 0;
#pragma omp simd reduction(+ : sum, along)
    for (long i = 0; i < width; i++) {
        sum += weight[i] * dy[i];
        along += weight[i] * dy[i] * (x[i] - m.mean);
    }
    const float mean = sum / (float)width, along_n = along * r / (float)width;
#pragma omp simd
    for (long i = 0; i < width; i++) {
        const float n = (x[i] - m.mean) * r, own = dy[i]; /* dx may be dy */
        dx[i] = r * (weight[i] * own - mean - n * along_n);
        d_weight[i] += own * n;
        d_bias[i] += own;
    }
    if (beside)
        for (long i = 0; i < width; i++) dx[i] += beside[i];
}

/* The sum of rows [count, width]. */
static void add_rows(const float *rows, long count, long width, float *sum) {
    memcpy(sum, rows, (size_t)width * sizeof(float));
    for (long row = 1; row < count; row++)
        for (long i = 0; i < width; i++) sum[i] += rows[row * width + i];
}

/* y [rows, width]: of each row LayerNorm where `centered`, with a bias or NULL, else RMSNorm. */
void norm(const float *x, const float *weight, const float *bias, long rows, long width, float eps, int centered,
          float *y, int threads) {
    (void)threads;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long row = 0; row < rows; row++) {
        const float *from = x + row * width;
        float *to = y + row * width;
        if (centered) {
            const moments m = moments_of(from, width, eps);
            for (long i = 0; i < width; i++)
                to[i] = (from[i] - m.mean) * m.inverse_deviation * weight[i] + (bias ? bias[i] : 0);
        } else {
            const float r = inverse_rms(from, width, eps);
            for (long i = 0; i < width; i++) to[i] = from[i] * r * weight[i];
        }
    }
}

enum { CHUNK = 64 };

/* The gradients of x, weight and bias. beside: [rows, width], what is added to dx, or NULL; d_bias: or NULL. Each
   CHUNK rows add up a part of those of weight and bias, so that it does not depend on the number of threads in
   which order they are added. */
int norm_backward(const float *x, const float *weight, const float *dy, const float *beside, long rows,
                  long width, float eps, int centered, float *dx, float *d_weight, float *d_bias, int threads) {
    const long chunks = rows / CHUNK + 1;
    float *d_weights = zeros(2 * chunks * width), *d_biases = d_weights + chunks * width;
    if (!d_weights) return 1;
    (void)threads;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long chunk = 0; chunk < chunks; chunk++)
        for (long row = chunk * CHUNK; row < rows && row < (chunk + 1) * CHUNK; row++) {
            const long at = row * width;
            const float *more = beside ? beside + at : NULL;
            float *of_weight = d_weights + chunk * width, *of_bias = d_biases + chunk * width;
            if (centered)
                layer_norm_backward(x + at, weight, dy + at, more, width, moments_of(x + at, width, eps), dx + at,
                                    of_weight, of_bias);
            else
                rms_norm_backward(x + at, weight, dy + at, more, width, inverse_rms(x + at, width, eps), dx + at,
                                  of_weight);
        }
    add_rows(d_weights, chunks, width, d_weight);
    if (d_bias) add_rows(d_biases, chunks, width, d_bias);
    free(d_weights);
    return 0;
}
