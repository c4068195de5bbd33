/* Week 2. Products of matrices in fused.c: small ones, whose sides are whole tiles, and those of linear layers,
   of any size. */

#pragma once

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

/* ---- small products of matrices

   Their sides are padded with zeros to whole tiles, which changes no product. */

static long padded(long size) { return (size + TILE_COLUMNS - 1) / TILE_COLUMNS * TILE_COLUMNS; }

static float *zeros(long count) { return calloc((size_t)count, sizeof(float)); }

/* A matrix, or its transpose: element (i, k) is at[i * by_row + k * by_column]. */
typedef struct {
    const float *at;
    long by_row, by_column;
} matrix;

static matrix plain(const float *at, long width) { return (matrix){at, width, 1}; }

static matrix transposed(const float *at, long width) { return (matrix){at, 1, width}; }

/* What a product begins with, from some tile on: rows of `width` floats, 0 where all are the same. */
typedef struct {
    const float *at;
    long width;
} start;

static const float ZEROS[TILE_COLUMNS];

/* One tile of c = start + a b, which may begin with c. b, c: rows of b_width and c_width floats. */
static inline void multiply_tile(long depth, matrix a, const float *b, long b_width, start from, float *c,
                                 long c_width) {
    vector sums[TILE_ROWS][2];
#pragma GCC unroll 8
    for (int i = 0; i < TILE_ROWS; i++) {
        sums[i][0] = *(const vector *)(from.at + i * from.width);
        sums[i][1] = *(const vector *)(from.at + i * from.width + LANES);
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
            float *tile = c + i * c_width + j;
            multiply_tile(depth, part, b + j, b_width, (start){tile, c_width}, tile, c_width);
        }
}

/* `count` floats of which each lies `step` behind the one before it. Element by element: where a processor can
   gather or scatter a vector, the compiler would otherwise let it, which is slower. */
static inline vector column_of(const float *at, long step, long count) {
    vector column = {0};
#pragma GCC unroll 16
    for (int l = 0; l < LANES; l++)
        if (l < count) column[l] = at[l * step];
    return column;
}

/* A square of LANES rows and columns, transposed; by way of a copy, since the rows of a wide matrix drive each
   other out of the first cache. */
static inline void transpose_square(const float *from, long from_width, float *to, long to_width) {
    float copy[LANES * LANES];
    for (int i = 0; i < LANES; i++) *(vector *)(copy + i * LANES) = *(const vector *)(from + i * from_width);
    for (int i = 0; i < LANES; i++) *(vector *)(to + i * to_width) = column_of(copy + i, LANES, LANES);
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
        for (long row = 0; row < j; row += LANES)
            for (long column = j; column < j + TILE_COLUMNS; column += LANES)
                transpose_square(c + row * size + column, size, c + column * size + row, size);
    }
}

/* ---- products of linear layers, of any size

   c = a b, and what is added to it. What fills no tile is computed in a tile of its own. GROUP rows of c are a
   task. */

/* The most weights of a layer for which these were faster than a BLAS that prepares its operands, as all do for
   large ones; with narrower registers none was. */
int largest_linear(void) { return VECTOR_BYTES == 64 ? 384 * 384 : 0; }

enum { GROUP = 32, DEPTH = 128 }; /* DEPTH rows of a tile's columns of b stay in the first cache */

/* What is added to a product [rows, columns], each may be NULL. */
typedef struct {
    const float *matrix; /* [rows, columns]; may be the product itself, that is, what lies there */
    const float *bias;   /* [columns], for each row */
} addends;

typedef struct {
    long rows, columns, depth;
    matrix a;
    const float *b; /* [depth, b_width], b_width whole tiles */
    long b_width;
    float *c; /* [rows, columns] */
    addends adds;
} product;

/* What the tile at (i, j) of c begins with: what is added, or what the columns of a before k gave. */
static inline start start_at(const product *p, long i, long j, long k) {
    if (k > 0 || (p->adds.matrix && p->adds.bias)) return (start){p->c + i * p->columns + j, p->columns};
    if (p->adds.matrix) return (start){p->adds.matrix + i * p->columns + j, p->columns};
    return (start){p->adds.bias ? p->adds.bias + j : ZEROS, 0};
}

/* A tile at the edge: what a lacks is taken as 0, what c lacks is not written. scratch: [TILE_ROWS, DEPTH]. */
static void multiply_edge(const product *p, long i, long j, long k, long depth, float *scratch) {
    float tile[TILE_ROWS * TILE_COLUMNS];
    const start from = start_at(p, i, j, k);
    const long rows = p->rows - i < TILE_ROWS ? p->rows - i : TILE_ROWS;
    const long columns = p->columns - j < TILE_COLUMNS ? p->columns - j : TILE_COLUMNS;
    memset(scratch, 0, TILE_ROWS * DEPTH * sizeof(float));
    for (long r = 0; r < rows; r++) {
        for (long d = 0; d < depth; d++)
            scratch[r * DEPTH + d] = p->a.at[(i + r) * p->a.by_row + (k + d) * p->a.by_column];
    }
    multiply_tile(depth, plain(scratch, DEPTH), p->b + k * p->b_width + j, p->b_width, (start){ZEROS, 0}, tile,
                  TILE_COLUMNS);
    for (long r = 0; r < rows; r++)
        for (long d = 0; d < columns; d++)
            p->c[(i + r) * p->columns + j + d] = from.at[r * from.width + d] + tile[r * TILE_COLUMNS + d];
}

/* The rows of c from `first` on that are a task. */
static void multiply_group(const product *p, long first) {
    float scratch[TILE_ROWS * DEPTH];
    const long last = first + GROUP < p->rows ? first + GROUP : p->rows;
    for (long i = first; i < last && p->adds.matrix && p->adds.bias; i++)
        for (long j = 0; j < p->columns; j++)
            p->c[i * p->columns + j] = p->adds.matrix[i * p->columns + j] + p->adds.bias[j];
    for (long k = 0; k < p->depth; k += DEPTH) {
        const long depth = p->depth - k < DEPTH ? p->depth - k : DEPTH;
        for (long j = 0; j < p->columns; j += TILE_COLUMNS)
            for (long i = first; i < last; i += TILE_ROWS) {
                if (i + TILE_ROWS > last || j + TILE_COLUMNS > p->columns) {
                    multiply_edge(p, i, j, k, depth, scratch);
                    continue;
                }
                const matrix part = {p->a.at + i * p->a.by_row + k * p->a.by_column, p->a.by_row, p->a.by_column};
                multiply_tile(depth, part, p->b + k * p->b_width + j, p->b_width, start_at(p, i, j, k),
                              p->c + i * p->columns + j, p->columns);
            }
    }
}

/* Rows of b [depth, columns] from `first` on, copied to whole tiles [depth, width]; b may be a transpose. */
static void copy_rows(matrix b, long columns, long first, long last, float *to, long width) {
    for (long k = first; k < last && b.by_column == 1; k++)
        memcpy(to + k * width, b.at + k * b.by_row, (size_t)columns * sizeof(float));
    for (long j = 0; j < columns && b.by_column != 1; j += LANES) {
        if (j + LANES <= columns && first + LANES <= last) {
            transpose_square(b.at + first + j * b.by_column, b.by_column, to + first * width + j, width);
            continue;
        }
        for (long k = first; k < last; k++)
            *(vector *)(to + k * width + j) = column_of(b.at + k + j * b.by_column, b.by_column, columns - j);
    }
}

static int multiply_any(long rows, long columns, long depth, matrix a, matrix b, addends adds, float *c,
                        int threads) {
    const long width = padded(columns);
    const int copies = b.by_column != 1 || width != columns;
    float *copy = copies ? zeros(depth * width) : NULL;
    if (copies && !copy) return 1;
    const product p = {rows, columns, depth, a, copies ? copy : b.at, copies ? width : columns, c, adds};
    (void)threads;
#pragma omp parallel num_threads(threads)
    {
        if (copies) {
#pragma omp for schedule(static)
            for (long k = 0; k < depth; k += LANES)
                copy_rows(b, columns, k, k + LANES < depth ? k + LANES : depth, copy, width);
        }
#pragma omp for schedule(static)
        for (long first = 0; first < rows; first += GROUP) multiply_group(&p, first);
    }
    free(copy);
    return 0;
}

/* y [rows, outputs] = x weightᵀ, of x [rows, inputs] and weight [outputs, inputs], and what is added to it. */
int linear(const float *x, const float *weight, const float *bias, const float *beside, long rows, long inputs,
           long outputs, float *y, int threads) {
    return multiply_any(rows, outputs, inputs, plain(x, inputs), transposed(weight, inputs),
                        (addends){beside, bias}, y, threads);
}

/* dx = dy weight; adds: dx += dy weight */
int linear_backward_input(const float *dy, const float *weight, long rows, long inputs, long outputs, float *dx,
                          int adds, int threads) {
    return multiply_any(rows, inputs, outputs, plain(dy, outputs), plain(weight, inputs),
                        (addends){adds ? dx : NULL, NULL}, dx, threads);
}

/* d weight = dyᵀ x */
int linear_backward_weight(const float *dy, const float *x, long rows, long inputs, long outputs, float *d_weight,
                           int threads) {
    return multiply_any(outputs, inputs, rows, transposed(dy, outputs), plain(x, inputs), (addends){NULL, NULL},
                        d_weight, threads);
}

/* d bias: the sums of the columns of dy [rows, outputs]. Each is added up in parts, which rounds less. */
void linear_backward_bias(const float *dy, long rows, long outputs, float *d_bias, int threads) {
    (void)threads;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long j = 0; j < outputs; j += TILE_COLUMNS) {
        const int count = (int)(outputs - j < TILE_COLUMNS ? outputs - j : TILE_COLUMNS);
        float sums[TILE_COLUMNS] = {0};
        for (long first = 0; first < rows; first += DEPTH) {
            float part[TILE_COLUMNS] = {0};
            for (long row = first; row < rows && row < first + DEPTH; row++)
                for (int l = 0; l < count; l++) part[l] += dy[row * outputs + j + l];
            for (int l = 0; l < count; l++) sums[l] += part[l];
        }
        memcpy(d_bias + j, sums, (size_t)count * sizeof(float));
    }
}
