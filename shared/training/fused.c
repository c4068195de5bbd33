/* What a training step on a CPU computes beside the products of its linear layers, each in one pass over
   memory: Muon's update here. fused.py calls these functions; the formulas are those of PyTorch's operations,
   which it is tested against.

   All numbers are fp32, all matrices lie row by row. A result does not depend on the number of threads: each
   task is computed by one of them, in one order. Functions that need memory of their own return 1 where there
   is none, else 0.
*/

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* A vector of as many floats as a register holds. TILE_ROWS rows of two vectors are as many sums as the
   registers keep at once, and enough to hide how long a multiplication takes. */
#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#define TILE_ROWS 8
#elif defined(__AVX__)
#define VECTOR_BYTES 32
#define TILE_ROWS 4
#else
#define VECTOR_BYTES 16
#define TILE_ROWS 8
#endif

typedef float vector __attribute__((vector_size(VECTOR_BYTES), aligned(4), may_alias));
enum { LANES = VECTOR_BYTES / 4, TILE_COLUMNS = 2 * LANES };

int is_parallel(void) {
#ifdef _OPENMP
    return 1;
#else
    return 0;
#endif
}

/* ---- small products of matrices

   Their sides are padded with zeros to whole tiles, which changes no product. They should fit into a core's
   second cache: larger ones are for a BLAS. */

static long padded(long size) { return (size + TILE_COLUMNS - 1) / TILE_COLUMNS * TILE_COLUMNS; }

static float *zeros(long count) { return calloc((size_t)count, sizeof(float)); }

/* A matrix, or its transpose: element (i, k) is at[i * by_row + k * by_column]. */
typedef struct {
    const float *at;
    long by_row, by_column;
} matrix;

static matrix plain(const float *at, long width) { return (matrix){at, width, 1}; }

static matrix transposed(const float *at, long width) { return (matrix){at, 1, width}; }

/* One tile of c += a b. b, c: rows of b_width and c_width floats. */
static inline void multiply_tile(long depth, matrix a, const float *b, long b_width, float *c, long c_width) {
    vector sums[TILE_ROWS][2];
#pragma GCC unroll 8
    for (int i = 0; i < TILE_ROWS; i++) {
        sums[i][0] = *(const vector *)(c + i * c_width);
        sums[i][1] = *(const vector *)(c + i * c_width + LANES);
    }
    for (long k = 0; k < depth; k++) {
        const vector left = *(const vector *)(b + k * b_width);
        const vector right = *(const vector *)(b + k * b_width + LANES);
#pragma GCC unroll 8
        for (int i = 0; i < TILE_ROWS; i++) {
            const float factor = a.at[i * a.by_row + k * a.by_column];
            sums[i][0] += factor * left;
            sums[i][1] += factor * right;
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < TILE_ROWS; i++) {
        *(vector *)(c + i * c_width) = sums[i][0];
        *(vector *)(c + i * c_width + LANES) = sums[i][1];
    }
}

/* c += a b, of [rows, depth] and [depth, columns]. */
static void multiply(long rows, long columns, long depth, matrix a, const float *b, long b_width, float *c,
                     long c_width) {
    for (long j = 0; j < columns; j += TILE_COLUMNS)
        for (long i = 0; i < rows; i += TILE_ROWS) {
            matrix part = {a.at + i * a.by_row, a.by_row, a.by_column};
            multiply_tile(depth, part, b + j, b_width, c + i * c_width + j, c_width);
        }
}

/* c = a b [size, size], of which it is known that it is symmetric: what lies below the diagonal is copied. */
static void multiply_symmetric(long size, long depth, matrix a, const float *b, float *c) {
    memset(c, 0, (size_t)(size * size) * sizeof(float));
    for (long j = 0; j < size; j += TILE_COLUMNS) {
        for (long k = 0; k < depth; k += 128) { /* so that this part of b stays in the first cache */
            long part = depth - k < 128 ? depth - k : 128;
            matrix from = {a.at + k * a.by_column, a.by_row, a.by_column};
            multiply(j + TILE_COLUMNS, TILE_COLUMNS, part, from, b + k * size + j, size, c + j, size);
        }
        for (long row = 0; row < j; row++)
            for (long column = j; column < j + TILE_COLUMNS; column++) c[column * size + row] = c[row * size + column];
    }
}

/* ---- Muon (Jordan et al., 2024) */

/* As torch.lerp. */
static float between(float x, float y, float amount) {
    return amount < 0.5f ? x + amount * (y - x) : y - (y - x) * (1 - amount);
}

/* Moves the singular values of y [tall, wide], tall >= wide, near 1 and keeps its singular vectors, by so many
   steps of Newton and Schulz

       y <- a y + y (b g + c g²),  g = yᵀ y

   after division by its length, that is the root of the sum of its squares. memory: for another y, and for two
   [wide, wide]. Returns where the result is: y, or that other. */
static float *orthogonalize(float *y, long tall, long wide, int steps, float *memory) {
    const float a = 3.4445f, b = -4.7750f, c = 2.0315f;
    const long size = tall * wide, square = wide * wide;
    float *next = memory, *g = next + size, *polynomial = g + square;
    float squares = 0;
#pragma omp simd reduction(+ : squares)
    for (long i = 0; i < size; i++) squares += y[i] * y[i];
    const float factor = 1 / fmaxf(sqrtf(squares), 1e-7f);
    for (long i = 0; i < size; i++) y[i] *= factor;
    for (int step = 0; step < steps; step++) {
        multiply_symmetric(wide, tall, transposed(y, wide), y, g);
        multiply_symmetric(wide, wide, plain(g, wide), g, polynomial);
        for (long i = 0; i < square; i++) polynomial[i] = b * g[i] + c * polynomial[i];
        for (long i = 0; i < size; i++) next[i] = a * y[i];
        multiply(tall, wide, wide, plain(y, wide), polynomial, wide, next, wide);
        float *old = y;
        y = next;
        next = old;
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
    float *memory = zeros(2 * y_tall * y_wide + 2 * y_wide * y_wide);
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
