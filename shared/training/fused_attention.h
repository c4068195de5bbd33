/* Week 2. Causal attention in fused.c, with norms and rotation of queries and keys, or without. */

#pragma once

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "fused_products.h"
#include "fused_rows.h"

/* ---- causal attention

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
    if (!weight && !in->rope_dim) {
        memcpy(y, x, (size_t)in->head_dim * sizeof(float));
        return;
    }
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
    if (!weight && !in->rope_dim) {
        memcpy(dx, dy, (size_t)in->head_dim * sizeof(float));
        return;
    }
    const long half = in->rope_dim / 2;
    const float *c = in->cosines + token * in->rope_dim, *s = in->sines + token * in->rope_dim;
    for (long i = 0; i < half; i++) dx[i] = dy[i] * c[i] + dy[i + half] * s[i + half];
    for (long i = half; i < 2 * half; i++) dx[i] = dy[i] * c[i] + dy[i - half] * s[i - half];
    for (long i = 2 * half; i < in->head_dim; i++) dx[i] = dy[i];
    if (weight)
        rms_norm_backward(x, weight, dx, NULL, in->head_dim, inverse_rms(x, in->head_dim, in->eps), dx,
                          d_weight);
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

/* The rows of a head [count, dim], each `step` floats behind the last, as columns of to [dim, length]. */
static void as_columns(const float *rows, long step, long count, long dim, float *to, long length) {
    for (long i = 0; i < count; i += LANES)
        for (long c = 0; c < dim; c += LANES) {
            if (i + LANES <= count && c + LANES <= dim) {
                transpose_square(rows + i * step + c, step, to + c * length + i, length);
                continue;
            }
            for (long row = i; row < count && row < i + LANES; row++)
                for (long at = c; at < dim && at < c + LANES; at++) to[at * length + row] = rows[row * step + at];
        }
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
        float *memory = zeros(3 * length * width + BLOCK * (2 * width + length));
        float *keys = memory, *values = keys + length * width; /* [length, width] */
        float *key_columns = values + length * width;          /* [width, length] */
        failed |= !memory;
#pragma omp for schedule(static)
        for (long task = 0; task < in->batch * in->n_kv_head; task++) {
            if (!memory) continue;
            const long text = task / in->n_kv_head, shared = task % in->n_kv_head;
            for (long i = 0; i < in->time; i++) {
                const long at = key_at(in, text, i, shared);
                turn(in, in->k_weight, i, in->k + at, keys + i * width);
                memcpy(values + i * width, in->v + at, (size_t)dim * sizeof(float));
            }
            as_columns(keys, width, in->time, dim, key_columns, length);
            for (long head = shared * group; head < (shared + 1) * group; head++)
                for (long start = 0; start < in->time; start += BLOCK)
                    attend(in, block_at(in, text, head, start), key_columns, values, length, width,
                           key_columns + length * width, out, log_sums);
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
            for (long i = 0; i < in->time; i++)
                turn(in, in->k_weight, i, in->k + key_at(in, text, i, shared), m.keys + i * width);
            as_columns(m.keys, width, in->time, dim, m.key_columns, length);
            as_columns(in->v + key_at(in, text, 0, shared), in->n_kv_head * dim, in->time, dim, m.value_columns,
                       length);
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
