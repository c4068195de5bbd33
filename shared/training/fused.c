/* A training step on a CPU, each part in one pass over memory: products of linear layers, Muon's step, SiLU with
   a gate, RMSNorm, and causal attention with norms and rotation of queries and keys. fused.py calls these
   functions. PyTorch's operations compute the same, and are what they are tested against.

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

/* `count` floats of which each lies `step` behind the one before it. Element by element: where a processor can
   gather or scatter a vector, the compiler would otherwise let it, which is slower. */
static inline vector column_of(const float *at, long step, long count) {
    vector column = {0};
#pragma GCC unroll 16
    for (int l = 0; l < LANES; l++)
        if (l < count) column[l] = at[l * step];
    return column;
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
            for (long column = j; column < j + TILE_COLUMNS; column++)
                *(vector *)(c + column * size + row) = column_of(c + row * size + column, size, LANES);
    }
}

/* ---- products of linear layers, of any size

   c = a b, or c += a b. What fills no tile is computed in a tile of its own. GROUP rows of c are a task. */

/* The largest layer, in inputs or outputs, for which these were faster than a BLAS that prepares its operands,
   as all do for large ones; with narrower registers none was. */
int largest_linear(void) { return VECTOR_BYTES == 64 ? 384 : 0; }

enum { GROUP = 32, DEPTH = 128 }; /* DEPTH rows of a tile's columns of b stay in the first cache */

typedef struct {
    long rows, columns, depth;
    matrix a;
    const float *b; /* [depth, b_width], b_width whole tiles */
    long b_width;
    float *c; /* [rows, columns] */
    int adds;
} product;

/* A tile at the edge: what a lacks is taken as 0, what c lacks is not written. scratch: [TILE_ROWS, DEPTH]. */
static void multiply_edge(const product *p, long i, long j, long k, long depth, float *scratch) {
    float tile[TILE_ROWS * TILE_COLUMNS] = {0};
    const long rows = p->rows - i < TILE_ROWS ? p->rows - i : TILE_ROWS;
    const long columns = p->columns - j < TILE_COLUMNS ? p->columns - j : TILE_COLUMNS;
    memset(scratch, 0, TILE_ROWS * DEPTH * sizeof(float));
    for (long r = 0; r < rows; r++) {
        for (long d = 0; d < depth; d++)
            scratch[r * DEPTH + d] = p->a.at[(i + r) * p->a.by_row + (k + d) * p->a.by_column];
    }
    multiply_tile(depth, plain(scratch, DEPTH), p->b + k * p->b_width + j, p->b_width, tile, TILE_COLUMNS);
    for (long r = 0; r < rows; r++)
        for (long d = 0; d < columns; d++) p->c[(i + r) * p->columns + j + d] += tile[r * TILE_COLUMNS + d];
}

/* The rows of c from `first` on that are a task. */
static void multiply_group(const product *p, long first) {
    float scratch[TILE_ROWS * DEPTH];
    const long last = first + GROUP < p->rows ? first + GROUP : p->rows;
    if (!p->adds) memset(p->c + first * p->columns, 0, (size_t)((last - first) * p->columns) * sizeof(float));
    for (long k = 0; k < p->depth; k += DEPTH) {
        const long depth = p->depth - k < DEPTH ? p->depth - k : DEPTH;
        for (long j = 0; j < p->columns; j += TILE_COLUMNS)
            for (long i = first; i < last; i += TILE_ROWS) {
                if (i + TILE_ROWS > last || j + TILE_COLUMNS > p->columns) {
                    multiply_edge(p, i, j, k, depth, scratch);
                    continue;
                }
                const matrix part = {p->a.at + i * p->a.by_row + k * p->a.by_column, p->a.by_row, p->a.by_column};
                multiply_tile(depth, part, p->b + k * p->b_width + j, p->b_width, p->c + i * p->columns + j,
                              p->columns);
            }
    }
}

/* Rows of b [depth, columns] from `first` on, copied to whole tiles [depth, width]; b may be a transpose. */
static void copy_rows(matrix b, long columns, long first, long last, float *to, long width) {
    for (long k = first; k < last && b.by_column == 1; k++)
        memcpy(to + k * width, b.at + k * b.by_row, (size_t)columns * sizeof(float));
    for (long j = 0; j < columns && b.by_column != 1; j += LANES)
        for (long k = first; k < last; k++)
            *(vector *)(to + k * width + j) =
                column_of(b.at + k * b.by_row + j * b.by_column, b.by_column, columns - j);
}

static int multiply_any(long rows, long columns, long depth, matrix a, matrix b, float *c, int adds, int threads) {
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

/* y [rows, outputs] = x weightᵀ, of x [rows, inputs] and weight [outputs, inputs]; adds: y += x weightᵀ */
int linear(const float *x, const float *weight, long rows, long inputs, long outputs, float *y, int adds,
           int threads) {
    return multiply_any(rows, outputs, inputs, plain(x, inputs), transposed(weight, inputs), y, adds, threads);
}

/* dx = dy weight; adds: dx += dy weight */
int linear_backward_input(const float *dy, const float *weight, long rows, long inputs, long outputs, float *dx,
                          int adds, int threads) {
    return multiply_any(rows, inputs, outputs, plain(dy, outputs), plain(weight, inputs), dx, adds, threads);
}

/* d weight = dyᵀ x */
int linear_backward_weight(const float *dy, const float *x, long rows, long inputs, long outputs, float *d_weight,
                           int threads) {
    return multiply_any(outputs, inputs, rows, transposed(dy, outputs), plain(x, inputs), d_weight, 0, threads);
}

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

/* ---- causal attention, with norms and rotation of queries and keys

   Queries [batch, time, n_head, head_dim], keys and values [batch, time, n_kv_head, head_dim]: as the linear
   layers leave them. A task is a key/value head of a text, with all query heads that share it. It goes through
   the queries in blocks, and computes the scores of a block with the keys that one of its queries may see; so
   the scores are never whole, and those of the future mostly not computed. */

enum { BLOCK = 32 };

typedef struct {
    long batch, time, n_head, n_kv_head, head_dim, rope_dim, window;
    const float *q, *k, *v;
    const float *q_weight, *k_weight; /* of the norms [head_dim], or NULL */
    const float *cosines, *sines;     /* [time, rope_dim], or NULL */
    float eps, scale;
} attention_input;

/* One head of one token, normed and then rotated: with c and s the token's cosines and sines,

       y[i] = x[i] c[i] + x[j] s[i],  j = i + rope_dim / 2, modulo rope_dim */
static void turn(const attention_input *in, const float *weight, long token, const float *restrict x,
                 float *restrict y) {
    float normed[in->head_dim];
    const float r = weight ? inverse_rms(x, in->head_dim, in->eps) : 1;
    for (long i = 0; i < in->head_dim; i++) normed[i] = weight ? x[i] * r * weight[i] : x[i];
    const long half = in->rope_dim / 2;
    const float *c = in->cosines + token * in->rope_dim, *s = in->sines + token * in->rope_dim;
    for (long i = 0; i < half; i++) y[i] = normed[i] * c[i] + normed[i + half] * s[i];
    for (long i = half; i < 2 * half; i++) y[i] = normed[i] * c[i] + normed[i - half] * s[i];
    for (long i = 2 * half; i < in->head_dim; i++) y[i] = normed[i];
}

/* The way back: dy[j] reaches x[i] by its sine, and then the norm's backward. */
static void turn_back(const attention_input *in, const float *weight, long token, const float *x,
                      const float *restrict dy, float *restrict dx, float *d_weight) {
    const long half = in->rope_dim / 2;
    const float *c = in->cosines + token * in->rope_dim, *s = in->sines + token * in->rope_dim;
    for (long i = 0; i < half; i++) dx[i] = dy[i] * c[i] + dy[i + half] * s[i + half];
    for (long i = half; i < 2 * half; i++) dx[i] = dy[i] * c[i] + dy[i - half] * s[i - half];
    for (long i = 2 * half; i < in->head_dim; i++) dx[i] = dy[i];
    if (weight)
        norm_backward(x, weight, dx, NULL, in->head_dim, inverse_rms(x, in->head_dim, in->eps), dx, d_weight);
}

/* Where a head of a token lies. */
static long query_at(const attention_input *in, long text, long token, long head) {
    return ((text * in->time + token) * in->n_head + head) * in->head_dim;
}

static long key_at(const attention_input *in, long text, long token, long head) {
    return ((text * in->time + token) * in->n_kv_head + head) * in->head_dim;
}

/* The first key that a query sees. */
static long first_key(const attention_input *in, long token) {
    return token < in->window ? 0 : token - in->window + 1;
}

/* Some queries in a row, and the keys that one of them may see, in whole tiles. */
typedef struct {
    long text, head, start, end, from, to;
} block;

static block block_at(const attention_input *in, long text, long head, long start) {
    const long end = start + BLOCK < in->time ? start + BLOCK : in->time;
    return (block){text, head, start, end, first_key(in, start) / TILE_COLUMNS * TILE_COLUMNS, padded(end)};
}

static void clear(float *rows, long count, long width, long from, long to) {
    for (long i = 0; i < count; i++) memset(rows + i * width + from, 0, (size_t)(to - from) * sizeof(float));
}

/* The block's queries, turned, and 0 in the rows that it lacks at the end of the text: [BLOCK, width] */
static void turn_queries(const attention_input *in, block b, float *queries, long width) {
    clear(queries, BLOCK, width, 0, width);
    for (long i = b.start; i < b.end; i++)
        turn(in, in->q_weight, i, in->q + query_at(in, b.text, i, b.head), queries + (i - b.start) * width);
}

/* A row of a head [head_dim] as a column of to [head_dim, length]. */
static inline void as_column(const float *row, long dim, long place, float *to, long length) {
    for (long c = 0; c < dim; c++) to[c * length + place] = row[c];
}

/* Of the scores of one query with the keys of its block: those that it does not see become -∞. Loops run over
   whole tiles, which takes less time than to end them where the query's keys do. */
static void hide(const attention_input *in, block b, long token, float *scores) {
    const int first = (int)(first_key(in, token) - b.from), last = (int)(token - b.from);
    for (int j = 0; j < (int)(b.to - b.from); j++) scores[j] = j < first || j > last ? -INFINITY : scores[j];
}

/* softmax without its denominator: each score becomes exp(scale (score - the largest)). Returns the sum;
   largest: times scale. */
static float exponentials(float *scores, int count, float scale, float *largest) {
    float most = -INFINITY, sum = 0;
#pragma omp simd reduction(max : most)
    for (int j = 0; j < count; j++) most = scores[j] > most ? scores[j] : most;
#pragma omp simd reduction(+ : sum)
    for (int j = 0; j < count; j++) {
        scores[j] = exponential(scale * (scores[j] - most));
        sum += scores[j];
    }
    *largest = scale * most;
    return sum;
}

/* One block: out = softmax(scale q kᵀ) v. */
static void attend(const attention_input *in, block b, const float *keys, const float *values, long length,
                   long width, float *memory, float *out, float *log_sums) {
    float *queries = memory, *sums = queries + BLOCK * width, *scores = sums + BLOCK * width;
    float denominators[BLOCK];
    turn_queries(in, b, queries, width);
    clear(scores, BLOCK, length, b.from, b.to);
    multiply(BLOCK, b.to - b.from, in->head_dim, plain(queries, width), keys + b.from, length, scores + b.from,
             length);
    for (long i = b.start; i < b.end; i++) {
        float largest, *row = scores + (i - b.start) * length + b.from;
        hide(in, b, i, row);
        denominators[i - b.start] = exponentials(row, (int)(b.to - b.from), in->scale, &largest);
        log_sums[(b.text * in->n_head + b.head) * in->time + i] = largest + logf(denominators[i - b.start]);
    }
    clear(sums, BLOCK, width, 0, width);
    multiply(BLOCK, width, b.to - b.from, plain(scores + b.from, length), values + b.from * width, width, sums,
             width);
    for (long i = b.start; i < b.end; i++) {
        const float *row = sums + (i - b.start) * width, factor = 1 / denominators[i - b.start];
        float *to = out + query_at(in, b.text, i, b.head);
        for (long c = 0; c < in->head_dim; c++) to[c] = row[c] * factor;
    }
}

/* out [batch, time, n_head, head_dim], and log_sums [batch, n_head, time], the logarithms of the softmax's
   denominators, for the backward. */
int attention(const attention_input *in, float *out, float *log_sums, int threads) {
    const long dim = in->head_dim, group = in->n_head / in->n_kv_head;
    const long length = padded(in->time), width = padded(dim);
    int failed = 0;
    (void)threads;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        float *memory = zeros(2 * length * width + BLOCK * (2 * width + length));
        float *keys = memory, *values = keys + length * width; /* [width, length], [length, width] */
        failed |= !memory;
#pragma omp for schedule(static)
        for (long task = 0; task < in->batch * in->n_kv_head; task++) {
            if (!memory) continue;
            const long text = task / in->n_kv_head, shared = task % in->n_kv_head;
            for (long i = 0; i < in->time; i++) {
                const long at = key_at(in, text, i, shared);
                float key[dim];
                turn(in, in->k_weight, i, in->k + at, key);
                as_column(key, dim, i, keys, length);
                memcpy(values + i * width, in->v + at, (size_t)dim * sizeof(float));
            }
            for (long head = shared * group; head < (shared + 1) * group; head++)
                for (long start = 0; start < in->time; start += BLOCK)
                    attend(in, block_at(in, text, head, start), keys, values, length, width,
                           values + length * width, out, log_sums);
        }
        free(memory);
    }
    return failed;
}

typedef struct {
    const float *out, *log_sums, *d_out;       /* what came out of attention, and the gradient of out */
    float *d_q, *d_k, *d_v;                    /* as q, k, v */
    float *d_q_weights, *d_k_weights;          /* zeros [tasks, head_dim]: a part of a gradient from each task */
} attention_gradients;

/* The keys and values of a task, and what its blocks add to their gradients. */
typedef struct {
    float *keys, *key_columns, *value_columns; /* [length, width], [width, length] twice */
    float *d_keys, *d_values;                  /* [length, width] */
    float *memory;                             /* of a block */
    long length, width;
} task_memory;

/* One block. With p = softmax(s), s = scale q kᵀ, and d out given:

       dv += pᵀ d out,  dp = d out vᵀ,  ds = p (dp - Σ d out · out),
       dq = scale ds k,  dk += scale dsᵀ q

   where Σ, over the channels, is what the softmax's denominator adds: Σ_j p_j dp_j. */
static void attend_backward(const attention_input *in, block b, task_memory m, const attention_gradients *g,
                            float *d_q_weight) {
    const long dim = in->head_dim, length = m.length, width = m.width, seen = b.to - b.from;
    float *queries = m.memory, *d_out = queries + BLOCK * width, *d_queries = d_out + BLOCK * width;
    float *p = d_queries + BLOCK * width, *ds = p + BLOCK * length; /* each [BLOCK, width or length] */
    turn_queries(in, b, queries, width);
    clear(d_out, BLOCK, width, 0, width);
    for (long i = b.start; i < b.end; i++)
        memcpy(d_out + (i - b.start) * width, g->d_out + query_at(in, b.text, i, b.head),
               (size_t)dim * sizeof(float));
    clear(p, BLOCK, length, b.from, b.to);
    clear(ds, BLOCK, length, b.from, b.to);
    multiply(BLOCK, seen, dim, plain(queries, width), m.key_columns + b.from, length, p + b.from, length);
    multiply(BLOCK, seen, dim, plain(d_out, width), m.value_columns + b.from, length, ds + b.from, length);
    for (long i = b.start; i < b.end; i++) {
        float *own_p = p + (i - b.start) * length + b.from, *own_ds = ds + (i - b.start) * length + b.from;
        const float *out = g->out + query_at(in, b.text, i, b.head), *own = d_out + (i - b.start) * width;
        const float log_sum = g->log_sums[(b.text * in->n_head + b.head) * in->time + i];
        float along = 0;
#pragma omp simd reduction(+ : along)
        for (long c = 0; c < dim; c++) along += own[c] * out[c];
        hide(in, b, i, own_p);
#pragma omp simd
        for (int j = 0; j < (int)seen; j++) {
            own_p[j] = exponential(in->scale * own_p[j] - log_sum);
            own_ds[j] = in->scale * own_p[j] * (own_ds[j] - along);
        }
    }
    multiply(seen, width, BLOCK, transposed(p + b.from, length), d_out, width, m.d_values + b.from * width,
             width);
    multiply(seen, width, BLOCK, transposed(ds + b.from, length), queries, width, m.d_keys + b.from * width,
             width);
    clear(d_queries, BLOCK, width, 0, width);
    multiply(BLOCK, width, seen, plain(ds + b.from, length), m.keys + b.from * width, width, d_queries, width);
    for (long i = b.start; i < b.end; i++) {
        const long at = query_at(in, b.text, i, b.head);
        turn_back(in, in->q_weight, i, in->q + at, d_queries + (i - b.start) * width, g->d_q + at, d_q_weight);
    }
}

int attention_backward(const attention_input *in, const attention_gradients *g, int threads) {
    const long dim = in->head_dim, group = in->n_head / in->n_kv_head;
    const long length = padded(in->time), width = padded(dim), size = length * width;
    int failed = 0;
    (void)threads;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        float *memory = zeros(5 * size + BLOCK * (3 * width + 2 * length));
        task_memory m = {memory,            memory + size,     memory + 2 * size, memory + 3 * size,
                         memory + 4 * size, memory + 5 * size, length,            width};
        failed |= !memory;
#pragma omp for schedule(static)
        for (long task = 0; task < in->batch * in->n_kv_head; task++) {
            if (!memory) continue;
            const long text = task / in->n_kv_head, shared = task % in->n_kv_head;
            for (long i = 0; i < in->time; i++) {
                const long at = key_at(in, text, i, shared);
                turn(in, in->k_weight, i, in->k + at, m.keys + i * width);
                as_column(m.keys + i * width, dim, i, m.key_columns, length);
                as_column(in->v + at, dim, i, m.value_columns, length);
            }
            memset(m.d_keys, 0, (size_t)(2 * size) * sizeof(float)); /* and the values' */
            for (long head = shared * group; head < (shared + 1) * group; head++)
                for (long start = 0; start < in->time; start += BLOCK)
                    attend_backward(in, block_at(in, text, head, start), m, g, g->d_q_weights + task * dim);
            for (long i = 0; i < in->time; i++) {
                const long at = key_at(in, text, i, shared);
                turn_back(in, in->k_weight, i, in->k + at, m.d_keys + i * width, g->d_k + at,
                          g->d_k_weights + task * dim);
                memcpy(g->d_v + at, m.d_values + i * width, (size_t)dim * sizeof(float));
            }
        }
        free(memory);
    }
    return failed;
}
