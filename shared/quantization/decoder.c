/* Week 8. A GPT's forward pass for some new tokens of some texts, in one call; for shared/quantization/native,
   which has it compiled. The order is that of shared/models/gpt.py, which stays the reference.

   kernels.h has the products of weights and activations, pool.h the threads. */

#include <stddef.h>
#include <stdlib.h>

#include "kernels.h"
#include "pool.h"

typedef struct {
  const float *weight; /* [size]; NULL: there is no such norm */
  const float *bias;   /* of a LayerNorm, or NULL */
  float eps;
  int32_t is_layer_norm; /* else RMSNorm */
} Norm;

typedef struct {
  Norm attention_norm, q_norm, k_norm, attention_post_norm, mlp_norm, mlp_post_norm;
  Matrix q, k, v, o, up, gate, down;
  const float *cos, *sin; /* [positions, rope_dim], as in shared/models/rotary.py; NULL: nothing is turned */
  int32_t rope_dim, window; /* 0: no window */
} Layer;

enum { GELU, GELU_TANH, RELU2, SWIGLU, GEGLU };

typedef struct {
  int32_t n_layer, n_embd, n_head, n_kv_head, head_dim, hidden, activation;
  int32_t norms_heads; /* whether queries and keys are normed by head, or all heads together */
  float attention_scale, attention_softcap, embedding_scale, logit_softcap; /* a cap of 0: none */
  Matrix embedding, head;
  const float *position_embedding; /* or NULL */
  int32_t largest_r;               /* of all changes */
  Norm norm;
  const Layer *layers;
} Model;

/* Values [layers, slots, n_kv_head, places, head_dim], and keys [..., places / 16, head_dim, 16]: so scores of
   16 keys come side by side. The strides are in floats. */
typedef struct {
  float *k, *v;
  int64_t layer, slot, head;
  int32_t places;
} Cache;

/* The new tokens: of each its id, its text's slot and its position there, the number of its weights' change (-1:
   none), and whether its logits are wanted. Tokens of one text follow each other. */
typedef struct {
  const int32_t *ids, *slots, *positions, *changes;
  const uint8_t *wanted;
  int32_t count;
} Tokens;

#define ROWS_AT_ONCE 64 /* tokens that go through the model together: what is computed stays in caches */

/* What a pass computes on the way; n rows at a time. */
typedef struct {
  Rows x, normed, heads, hidden; /* [n, n_embd], the same, [n, n_head * head_dim], [n, hidden] */
  float *q, *k, *v, *added;      /* of the heads; [n, n_embd] */
  float *low;                    /* of three weights: a x of their changes, [n, largest_r] */
  float *sums;                   /* of each worker: two panels of products with n rows, twice */
  float *scores;                 /* of each worker: [places] */
  int64_t sums_size, scores_size;
} Space;

typedef struct {
  const Model *model;
  const Layer *layer;
  Cache cache; /* of this layer */
  Tokens tokens;
  Space space;
  struct Products *hidden; /* of up and gate */
  int rows, threads;
} Pass;

/* e^x, within two units in the last place; the compiler computes many at once. Cephes' polynomial. */
INLINE float fast_exp(float x) {
  x = x < -87 ? -87 : x;
  x = x > 88 ? 88 : x;
  float n = rintf(x * 1.44269504f);
  float r = x - n * 0.693359375f + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1;
  int32_t whole = n == n ? (int32_t)n : 0; /* NaN is no whole number; p is NaN then */
  uint32_t bits = (uint32_t)(whole + 127) << 23;
  float power;
  memcpy(&power, &bits, sizeof power);
  return p * power;
}

INLINE float sigmoid(float x) { return 1 / (1 + fast_exp(-x)); }

/* Its formula by tanh, and tanh(u) = 2 sigmoid(2u) - 1. */
INLINE float gelu_tanh(float x) { return x * sigmoid(2 * 0.7978845608f * (x + 0.044715f * x * x * x)); }

static void activate(int activation, float *up, const float *gate, int n) {
  for (int i = 0; activation == GELU && i < n; i++)
    up[i] = 0.5f * up[i] * (1 + erff(up[i] * 0.7071067812f));
  for (int i = 0; activation == GELU_TANH && i < n; i++)
    up[i] = gelu_tanh(up[i]);
  for (int i = 0; activation == RELU2 && i < n; i++)
    up[i] = up[i] > 0 ? up[i] * up[i] : up[i] * 0; /* NaN stays */
  for (int i = 0; activation == SWIGLU && i < n; i++)
    up[i] *= gate[i] * sigmoid(gate[i]);
  for (int i = 0; activation == GEGLU && i < n; i++)
    up[i] *= gelu_tanh(gate[i]);
}

static void soft_cap(float *values, int n, float cap) {
  for (int i = 0; i < n; i++)
    values[i] = cap * (2 * sigmoid(2 * values[i] / cap) - 1);
}

INLINE float dot_product(const float *a, const float *b, int n) {
  Floats sums = {0};
  int i = 0;
  for (; i + LANES <= n; i += LANES)
    sums += load(a + i) * load(b + i);
  float sum = total(sums);
  for (; i < n; i++)
    sum += a[i] * b[i];
  return sum;
}

/* The sum of values, or of their squared distances from `mean`. */
INLINE float sum_of(const float *values, int n, int squares, float mean) {
  Floats sums = {0};
  int i = 0;
  for (; i + LANES <= n; i += LANES) {
    Floats some = load(values + i) - mean;
    sums += squares ? some * some : some;
  }
  float sum = total(sums);
  for (; i < n; i++)
    sum += squares ? (values[i] - mean) * (values[i] - mean) : values[i] - mean;
  return sum;
}

/* to = norm(from). */
static void apply_norm(const Norm *norm, const float *from, float *to, int n) {
  float mean = norm->is_layer_norm ? sum_of(from, n, 0, 0) / n : 0;
  float inverse = 1 / sqrtf(sum_of(from, n, 1, mean) / n + norm->eps);
  for (int i = 0; i < n; i++)
    to[i] = (from[i] - mean) * inverse * norm->weight[i];
  for (int i = 0; norm->bias && i < n; i++)
    to[i] += norm->bias[i];
}

INLINE int is_packed(const Matrix *m) { return m->kind >= INT8; }

/* One row of a weight. */
static void unpack_row(const Matrix *m, int row, float *to) {
  const int n = m->n_in, panel = row / PANEL, lane = row % PANEL;
  const uint8_t *codes = m->codes;
  const float *scale = m->scale;
  const uint16_t *halves = m->scale;
  for (int k = 0; k < n; k++) {
    size_t quad = ((size_t)panel * n / 4 + k / 4) * PANEL + lane, pair = ((size_t)panel * n / 8 + k / 8) * PANEL + lane;
    size_t range = (size_t)panel * (n / (m->group ? m->group : n)) + k / (m->group ? m->group : n);
    switch (m->kind) {
    case FLOAT32:
      to[k] = ((const float *)m->codes)[(size_t)row * n + k];
      break;
    case BFLOAT16: {
      uint32_t bits = (uint32_t)((const uint16_t *)m->codes)[(size_t)row * n + k] << 16;
      memcpy(to + k, &bits, sizeof *to);
      break;
    }
    case INT8:
      to[k] = (codes[4 * quad + k % 4] - 128) * scale[PANEL * range + lane];
      break;
    default: {
      int code = codes[4 * pair + k % 4] >> (k & 4) & 15;
      if (m->kind == NF4) {
        to[k] = NF4_LEVELS[code] * (1.0f / LARGEST) * scale[PANEL * range + lane];
        break;
      }
      uint32_t bits[2] = {(uint32_t)halves[2 * PANEL * range + lane] << 16,
                          (uint32_t)halves[2 * PANEL * range + PANEL + lane] << 16};
      float one[2];
      memcpy(one, bits, sizeof one);
      to[k] = one[0] * (code - 8) + one[1];
    }
    }
  }
}

/* A loop over the panels of up to three weights that read the same rows. */
typedef struct Products {
  const Matrix *weights[3];
  float *to[3]; /* [rows, n_out] */
  int stride[3];
  int count, rows, per_piece, add; /* add: to what is there */
  const Rows *x;
  const int32_t *changes; /* of each row, or NULL */
  float *low;             /* [3, rows, largest_r] */
  int largest_r;
  float *sums;
  int64_t sums_size;
} Products;

static const Change *change_of(const Products *p, int weight, int row) {
  const Change *changes = p->weights[weight]->changes;
  if (!changes || !p->changes || p->changes[row] < 0 || !changes[p->changes[row]].r)
    return NULL;
  return changes + p->changes[row];
}

static float *low_of(const Products *p, int weight, int row) {
  return p->low + ((size_t)weight * p->rows + row) * p->largest_r;
}

/* a x, of the changes of a row. */
static void low_piece(void *task, int row, int worker) {
  const Products *p = task;
  (void)worker;
  for (int weight = 0; weight < p->count; weight++) {
    const Change *change = change_of(p, weight, row);
    const int n = p->weights[weight]->n_in;
    for (int i = 0; change && i < change->r; i++)
      low_of(p, weight, row)[i] = dot_product(change->a + (size_t)i * n, p->x->values + (size_t)row * n, n);
  }
}

/* The products of a panel with all rows, and with what the changes add. */
static void changed_products(const Products *p, int weight, int panel, float *sums) {
  const Matrix *m = p->weights[weight];
  panel_products(m, panel, p->x, p->rows, sums);
  int begin = panel * PANEL, outputs = begin + PANEL < m->n_out ? PANEL : m->n_out - begin;
  for (int row = 0; row < p->rows; row++) {
    const Change *change = change_of(p, weight, row);
    for (int o = 0; change && o < outputs; o++)
      sums[PANEL * row + o] +=
          dot_product(change->b + (size_t)(begin + o) * change->r, low_of(p, weight, row), change->r);
  }
}

static int panels(const Matrix *m) { return (m->n_out + PANEL - 1) / PANEL; }

static void products_piece(void *task, int piece, int worker) {
  const Products *p = task;
  float *sums = p->sums + p->sums_size * worker;
  int begin = piece * p->per_piece, end = begin + p->per_piece;
  for (int i = 0; i < p->count; i++) {
    const Matrix *m = p->weights[i];
    int last = end < panels(m) ? end : panels(m);
    for (int panel = begin > 0 ? begin : 0; panel < last; panel++) {
      changed_products(p, i, panel, sums);
      int first = panel * PANEL, outputs = first + PANEL < m->n_out ? PANEL : m->n_out - first;
      for (int row = 0; row < p->rows; row++) {
        float *to = p->to[i] + (size_t)row * p->stride[i] + first;
        for (int o = 0; o < outputs; o++)
          to[o] = p->add ? to[o] + sums[PANEL * row + o] : sums[PANEL * row + o];
      }
    }
    begin -= panels(m);
    end -= panels(m);
  }
}

/* Pieces of some 64 KiB, and at least some for each thread. */
static int panels_per_piece(const Matrix *m, int all, int threads) {
  static const int bits[] = {0, 32, 16, 8, 5, 5};
  int by_size = (int)(65536 * 8 / ((int64_t)PANEL * m->n_in * bits[m->kind]));
  int by_threads = all / (4 * threads);
  int per_piece = by_size < by_threads ? by_size : by_threads;
  return per_piece > 1 ? per_piece : 1;
}

/* What the changes need first, where there are any. */
static void multiply_low(Products *p, int threads) {
  if (p->changes && p->largest_r)
    share(threads, p->rows, low_piece, p);
}

static void multiply(Products *p, int threads) {
  multiply_low(p, threads);
  int all = 0;
  for (int i = 0; i < p->count; i++)
    all += panels(p->weights[i]);
  p->per_piece = panels_per_piece(p->weights[0], all, threads);
  share(threads, (all + p->per_piece - 1) / p->per_piece, products_piece, p);
}

static Products products_of(const Pass *pass, const Rows *x) {
  Products p = {.rows = pass->rows, .x = x, .sums = pass->space.sums, .sums_size = pass->space.sums_size};
  p.changes = pass->tokens.changes;
  p.low = pass->space.low;
  p.largest_r = pass->model->largest_r;
  return p;
}

static void add_weight(Products *p, const Matrix *m, float *to, int stride) {
  p->weights[p->count] = m;
  p->to[p->count] = to;
  p->stride[p->count++] = stride;
}

/* Row `piece` of the embedding. */
static void embed_piece(void *task, int row, int worker) {
  const Pass *pass = task;
  const Model *model = pass->model;
  float *x = pass->space.x.values + (size_t)row * model->n_embd;
  (void)worker;
  unpack_row(&model->embedding, pass->tokens.ids[row], x);
  for (int i = 0; model->embedding_scale != 1 && i < model->n_embd; i++)
    x[i] *= model->embedding_scale;
  const float *position = model->position_embedding;
  for (int i = 0; position && i < model->n_embd; i++)
    x[i] += position[(size_t)pass->tokens.positions[row] * model->n_embd + i];
}

static void norm_or_copy(const Norm *norm, const float *from, float *to, int n) {
  if (norm->weight)
    apply_norm(norm, from, to, n);
  else if (from != to)
    memcpy(to, from, n * sizeof *to);
}

static void attention_norm_piece(void *task, int row, int worker) {
  const Pass *pass = task;
  const Space *s = &pass->space;
  const int n = pass->model->n_embd;
  const Layer *layer = pass->layer;
  (void)worker;
  norm_or_copy(&layer->attention_norm, s->x.values + (size_t)row * n, s->normed.values + (size_t)row * n, n);
  if (is_packed(&layer->q) || is_packed(&layer->k) || is_packed(&layer->v))
    round_columns(&s->normed, row, 0, n);
}

/* Turns the pairs (i, i + dim / 2) of a head by its position. */
static void turn(float *head, const float *cos, const float *sin, int dim) {
  for (int i = 0, half = dim / 2; i < half; i++) {
    float first = head[i], second = head[half + i];
    head[i] = first * cos[i] + second * sin[i];
    head[half + i] = second * cos[half + i] + first * sin[half + i];
  }
}

/* Norms and turns the queries and keys of a row, and puts its keys and values into the cache. */
static void place_piece(void *task, int row, int worker) {
  const Pass *pass = task;
  const Model *model = pass->model;
  const Layer *layer = pass->layer;
  const int dim = model->head_dim, q_heads = model->n_head, kv_heads = model->n_kv_head;
  float *q = pass->space.q + (size_t)row * q_heads * dim, *k = pass->space.k + (size_t)row * kv_heads * dim;
  const float *v = pass->space.v + (size_t)row * kv_heads * dim;
  const int64_t position = pass->tokens.positions[row];
  const int64_t slot = pass->tokens.slots[row] * pass->cache.slot;
  (void)worker;
  if (!model->norms_heads) {
    norm_or_copy(&layer->q_norm, q, q, q_heads * dim);
    norm_or_copy(&layer->k_norm, k, k, kv_heads * dim);
  }
  for (int head = 0; head < q_heads + kv_heads; head++) {
    float *one = head < q_heads ? q + head * dim : k + (head - q_heads) * dim;
    if (model->norms_heads)
      norm_or_copy(head < q_heads ? &layer->q_norm : &layer->k_norm, one, one, dim);
    if (layer->cos)
      turn(one, layer->cos + position * layer->rope_dim, layer->sin + position * layer->rope_dim, layer->rope_dim);
  }
  for (int head = 0; head < kv_heads; head++) {
    float *to = pass->cache.k + slot + head * pass->cache.head + position / PANEL * PANEL * dim + position % PANEL;
    for (int i = 0; i < dim; i++)
      to[PANEL * i] = k[head * dim + i];
    memcpy(pass->cache.v + slot + head * pass->cache.head + position * dim, v + head * dim, dim * sizeof *v);
  }
}

/* Scores of a query and the keys from `begin` to `end`, from the panel on in which `begin` lies. */
static void score_keys(const float *q, const float *k, int begin, int end, int dim, float scale, float *scores) {
  for (int key = begin / PANEL * PANEL; key < end; key += LANES) {
    const float *panel = k + (size_t)(key / PANEL) * PANEL * dim + key % PANEL;
    Floats sums[4] = {0};
    for (int i = 0; i + 4 <= dim; i += 4)
      for (int part = 0; part < 4; part++)
        sums[part] += q[i + part] * load(panel + PANEL * (i + part));
    for (int i = dim / 4 * 4; i < dim; i++)
      sums[0] += q[i] * load(panel + PANEL * i);
    store(scores + key - begin / PANEL * PANEL, (sums[0] + sums[1] + (sums[2] + sums[3])) * scale);
  }
}

/* Scores become weights, up to their sum, which is returned. */
static float soft_max(float *scores, int n) {
  float lanes[LANES], most = scores[0];
  int i = 0;
  for (int lane = 0; lane < LANES; lane++)
    lanes[lane] = most;
  for (; i + LANES <= n; i += LANES)
    for (int lane = 0; lane < LANES; lane++)
      lanes[lane] = scores[i + lane] > lanes[lane] ? scores[i + lane] : lanes[lane];
  for (; i < n; i++)
    most = scores[i] > most ? scores[i] : most;
  for (int lane = 0; lane < LANES; lane++)
    most = lanes[lane] > most ? lanes[lane] : most;
  for (i = 0; i < n; i++)
    scores[i] = fast_exp(scores[i] - most);
  return sum_of(scores, n, 0, 0);
}

/* out = the sum of weights[key] * v[key], for COUNT * LANES channels. */
INLINE void mean_values(const float *weights, const float *v, int keys, int dim, float sum, const int count,
                        float *out) {
  Floats sums[4] = {0};
  for (int key = 0; key < keys; key++)
    for (int i = 0; i < count; i++)
      sums[i] += weights[key] * load(v + (size_t)key * dim + LANES * i);
  for (int i = 0; i < count; i++)
    store(out + LANES * i, sums[i] / sum);
}

/* Attention of one row, for the query heads that share one key and value head. */
static void attend_piece(void *task, int piece, int worker) {
  const Pass *pass = task;
  const Model *model = pass->model;
  const int dim = model->head_dim, sharing = model->n_head / model->n_kv_head;
  const int row = piece / model->n_kv_head, kv_head = piece % model->n_kv_head;
  const int position = pass->tokens.positions[row], window = pass->layer->window;
  const int first = window && position >= window ? position - window + 1 : 0, keys = position + 1 - first;
  const int64_t at = pass->tokens.slots[row] * pass->cache.slot + kv_head * pass->cache.head;
  const float *v = pass->cache.v + at + (int64_t)first * dim;
  float *scores = pass->space.scores + pass->space.scores_size * worker, *weights = scores + first % PANEL;
  for (int head = kv_head * sharing; head < (kv_head + 1) * sharing; head++) {
    const size_t begin = ((size_t)row * model->n_head + head) * dim;
    float *out = pass->space.heads.values + begin;
    score_keys(pass->space.q + begin, pass->cache.k + at, first, position + 1, dim, model->attention_scale, scores);
    if (model->attention_softcap)
      soft_cap(weights, keys, model->attention_softcap);
    float sum = soft_max(weights, keys);
    int i = 0;
    for (; i + 4 * LANES <= dim; i += 4 * LANES)
      mean_values(weights, v + i, keys, dim, sum, 4, out + i);
    for (; i + LANES <= dim; i += LANES)
      mean_values(weights, v + i, keys, dim, sum, 1, out + i);
    for (; i < dim; i++) {
      float mean = 0;
      for (int key = 0; key < keys; key++)
        mean += weights[key] * v[(size_t)key * dim + i];
      out[i] = mean / sum;
    }
  }
}

static void round_heads_piece(void *task, int row, int worker) {
  const Pass *pass = task;
  (void)worker;
  round_columns(&pass->space.heads, row, 0, pass->model->n_head * pass->model->head_dim);
}

/* Adds what a part of the block has computed to the stream, and makes the next part's input. */
static void mlp_norm_piece(void *task, int row, int worker) {
  const Pass *pass = task;
  const Space *s = &pass->space;
  const Layer *layer = pass->layer;
  const int n = pass->model->n_embd;
  (void)worker;
  norm_or_copy(&layer->mlp_norm, s->x.values + (size_t)row * n, s->normed.values + (size_t)row * n, n);
  if (is_packed(&layer->up) || is_packed(&layer->gate))
    round_columns(&s->normed, row, 0, n);
}

static void add_normed(const Pass *pass, const Norm *norm, int row) {
  const int n = pass->model->n_embd;
  float *added = pass->space.added + (size_t)row * n, *x = pass->space.x.values + (size_t)row * n;
  apply_norm(norm, added, added, n);
  for (int i = 0; i < n; i++)
    x[i] += added[i];
}

static void attention_post_norm_piece(void *task, int row, int worker) {
  (void)worker;
  add_normed(task, &((const Pass *)task)->layer->attention_post_norm, row);
}

static void mlp_post_norm_piece(void *task, int row, int worker) {
  (void)worker;
  add_normed(task, &((const Pass *)task)->layer->mlp_post_norm, row);
}

/* Two panels of the hidden layer: 32 columns, which are rounded together. */
static void hidden_piece(void *task, int piece, int worker) {
  const Pass *pass = task;
  const Space *s = &pass->space;
  const Layer *layer = pass->layer;
  const int n = pass->model->hidden, rows = pass->rows;
  float *up = s->sums + s->sums_size * worker, *gate = up + s->sums_size / 2;
  for (int panel = 2 * piece; panel < 2 * piece + 2 && panel * PANEL < n; panel++) {
    changed_products(pass->hidden, 0, panel, up);
    if (layer->gate.kind)
      changed_products(pass->hidden, 1, panel, gate);
    activate(pass->model->activation, up, gate, PANEL * rows);
    int begin = panel * PANEL, count = begin + PANEL < n ? PANEL : n - begin;
    for (int row = 0; row < rows; row++)
      memcpy(s->hidden.values + (size_t)row * n + begin, up + (size_t)PANEL * row, count * sizeof *up);
  }
  if (is_packed(&layer->down))
    for (int row = 0; row < rows; row++)
      round_columns(&s->hidden, row, 2 * PANEL * piece, 2 * PANEL * (piece + 1));
}

/* The product that ends a part of the block, added to the stream; by way of a norm, where there is one. */
static void into_stream(Pass *pass, const Matrix *weight, const Rows *from, const Norm *norm, Work add) {
  const int n = pass->model->n_embd;
  Products p = products_of(pass, from);
  p.add = !norm->weight;
  add_weight(&p, weight, norm->weight ? pass->space.added : pass->space.x.values, n);
  multiply(&p, pass->threads);
  if (norm->weight)
    share(pass->threads, pass->rows, add, pass);
}

static void block(Pass *pass) {
  const Model *model = pass->model;
  const Layer *layer = pass->layer;
  const Space *s = &pass->space;
  const int threads = pass->threads, rows = pass->rows;
  const int width = model->n_head * model->head_dim, kv_width = model->n_kv_head * model->head_dim;

  share(threads, rows, attention_norm_piece, pass);
  Products p = products_of(pass, &s->normed);
  add_weight(&p, &layer->q, s->q, width);
  add_weight(&p, &layer->k, s->k, kv_width);
  add_weight(&p, &layer->v, s->v, kv_width);
  multiply(&p, threads);
  share(threads, rows, place_piece, pass);
  share(threads, rows * model->n_kv_head, attend_piece, pass);
  if (is_packed(&layer->o))
    share(threads, rows, round_heads_piece, pass);
  into_stream(pass, &layer->o, &s->heads, &layer->attention_post_norm, attention_post_norm_piece);

  share(threads, rows, mlp_norm_piece, pass);
  Products hidden = products_of(pass, &s->normed);
  add_weight(&hidden, &layer->up, NULL, 0);
  if (layer->gate.kind)
    add_weight(&hidden, &layer->gate, NULL, 0);
  multiply_low(&hidden, threads);
  pass->hidden = &hidden;
  share(threads, (model->hidden + 2 * PANEL - 1) / (2 * PANEL), hidden_piece, pass);
  into_stream(pass, &layer->down, &s->hidden, &layer->mlp_post_norm, mlp_post_norm_piece);
}

/* The logits of those rows of the stream that are wanted: [wanted, n_out]. Returns how many. */
static int to_logits(Pass *pass, float *logits) {
  const Model *model = pass->model;
  const Space *s = &pass->space;
  const int n = model->n_embd, n_out = model->head.n_out;
  int32_t changes[ROWS_AT_ONCE];
  int count = 0;
  for (int row = 0; row < pass->rows; row++)
    if (pass->tokens.wanted[row]) {
      changes[count] = pass->tokens.changes[row];
      apply_norm(&model->norm, s->x.values + (size_t)row * n, s->normed.values + (size_t)count * n, n);
      if (is_packed(&model->head))
        round_columns(&s->normed, count, 0, n);
      count++;
    }
  if (!count)
    return 0;
  Products p = products_of(pass, &s->normed);
  p.rows = count;
  p.changes = changes;
  add_weight(&p, &model->head, logits, n_out);
  multiply(&p, pass->threads);
  for (int row = 0; model->logit_softcap && row < count; row++)
    soft_cap(logits + (size_t)row * n_out, n_out, model->logit_softcap);
  return count;
}

/* Parts of some memory, each aligned to 64 bytes. Without memory, only what they take is counted. */
typedef struct {
  char *memory;
  size_t taken;
} Parts;

static void *take(Parts *parts, size_t count, size_t size) {
  size_t begin = parts->taken;
  parts->taken += (count * size + 63) / 64 * 64;
  return parts->memory ? parts->memory + begin : NULL;
}

static Rows take_rows(Parts *parts, size_t rows, size_t n) {
  size_t groups = rows * n / GROUP;
  Rows r = {.n = (int32_t)n};
  r.values = take(parts, rows * n, sizeof *r.values);
  r.codes = take(parts, rows * n, sizeof *r.codes);
  r.scale = take(parts, groups, sizeof *r.scale);
  r.sum = take(parts, groups, sizeof *r.sum);
  return r;
}

/* The space for n rows at a time, in `parts`. places: of a slot. */
static Space take_space(Parts *parts, const Model *model, size_t n, size_t places, size_t threads) {
  const size_t head = model->head_dim, embd = model->n_embd;
  Space s;
  s.x = take_rows(parts, n, embd);
  s.normed = take_rows(parts, n, embd);
  s.heads = take_rows(parts, n, model->n_head * head);
  s.hidden = take_rows(parts, n, model->hidden);
  s.q = take(parts, n * model->n_head * head, sizeof *s.q);
  s.k = take(parts, n * model->n_kv_head * head, sizeof *s.k);
  s.v = take(parts, n * model->n_kv_head * head, sizeof *s.v);
  s.added = take(parts, n * embd, sizeof *s.added);
  s.low = take(parts, 3 * n * model->largest_r, sizeof *s.low);
  s.sums_size = (int64_t)(2 * PANEL * n);
  s.sums = take(parts, threads * s.sums_size, sizeof *s.sums);
  s.scores_size = (int64_t)places + PANEL;
  s.scores = take(parts, threads * s.scores_size, sizeof *s.scores);
  return s;
}

/* Reads tokens, and writes the logits of those that are wanted, in order. Returns 0, or 1 where memory is out. */
int forward(const Model *model, const Cache *cache, const Tokens *tokens, float *logits, int threads) {
  const int n = tokens->count < ROWS_AT_ONCE ? tokens->count : ROWS_AT_ONCE;
  threads = enter_pool(threads);
  Parts parts = {0};
  take_space(&parts, model, n, cache->places, threads);
  parts.memory = aligned_alloc(64, parts.taken);
  parts.taken = 0;
  if (parts.memory) {
    Pass pass = {.model = model, .threads = threads};
    pass.space = take_space(&parts, model, n, cache->places, threads);
    for (int begin = 0; begin < tokens->count; begin += n) {
      pass.rows = begin + n < tokens->count ? n : tokens->count - begin;
      pass.tokens = (Tokens){tokens->ids + begin,       tokens->slots + begin,  tokens->positions + begin,
                             tokens->changes + begin, tokens->wanted + begin, pass.rows};
      share(threads, pass.rows, embed_piece, &pass);
      for (int layer = 0; layer < model->n_layer; layer++) {
        pass.layer = model->layers + layer;
        pass.cache = *cache;
        pass.cache.k += layer * cache->layer;
        pass.cache.v += layer * cache->layer;
        block(&pass);
      }
      logits += (size_t)to_logits(&pass, logits) * model->head.n_out;
    }
    free(parts.memory);
  }
  leave_pool(threads);
  return !parts.memory;
}

static void round_piece(void *task, int row, int worker) {
  const Rows *x = task;
  (void)worker;
  round_columns(x, row, 0, x->n);
}

/* y [rows, n_out] = x [rows, n_in] times a weight, transposed. Returns 0, or 1 where memory is out. */
int product(const Matrix *weight, const float *x, int rows, float *y, int threads) {
  int n = weight->n_in;
  threads = enter_pool(threads);
  size_t groups = (size_t)rows * n / GROUP + 1, sums = (size_t)PANEL * rows;
  char *memory = malloc(8 * groups + 4 * sums * threads + (size_t)rows * n);
  if (memory) {
    Rows from = {(float *)x, NULL, (float *)memory, (int32_t *)memory + groups, n};
    float *own_sums = (float *)memory + 2 * groups;
    from.codes = (int8_t *)(own_sums + sums * threads);
    if (is_packed(weight))
      share(threads, rows, round_piece, &from);
    Products p = {.rows = rows, .x = &from, .sums = own_sums, .sums_size = (int64_t)sums};
    add_weight(&p, weight, y, weight->n_out);
    multiply(&p, threads);
    free(memory);
  }
  leave_pool(threads);
  return !memory;
}
