/* Small models of random numbers, and products with random weights, of each kind of weight: for sanitizers
   and valgrind, which look at what a Python test cannot see (make sanitize), and for processors that this
   machine is not (test_arm.py).

   Without an argument the models are read in several ways with several threads, and two ways that give
   different bits end with a status of 1. With an argument, what is computed is printed: a name and its numbers
   in a line. */

#include <stdio.h>

#include "../../shared/quantization/decoder.c"

enum { LAYERS = 2, WIDTH = 64, HEADS = 4, KV_HEADS = 2, HIDDEN = 96, LOW = 5 };
enum { VOCAB = 75, PLACES = 48, SLOTS = 3 };
static const char *KINDS[] = {"", "fp32", "bf16", "int8", "int4", "nf4"};

/* Which of the numbers in one initializer is drawn first, the compiler may choose: so only one is. */
static uint32_t state = 1;
static float number(void) {
  state = state * 1664525 + 1013904223;
  return (state >> 8) / (float)(1 << 24) - 0.5f;
}

static float *numbers(int count, float scale) {
  float *all = malloc(count * sizeof *all);
  for (int i = 0; i < count; i++)
    all[i] = scale * number();
  return all;
}

static uint16_t *halves(int count, float scale) {
  uint16_t *all = malloc(count * sizeof *all);
  for (int i = 0; i < count; i++) {
    float value = scale * number();
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    all[i] = (uint16_t)(bits >> 16);
  }
  return all;
}

/* Any codes, the most extreme ones in rows 0 and 1: there sums are largest. */
static uint8_t *codes(int rows, int columns) {
  uint8_t *all = malloc((size_t)rows * columns);
  for (int i = 0; i < rows * columns; i++) {
    int row = i / (PANEL * columns) * PANEL + i / 4 % PANEL; /* see kernels.h */
    all[i] = row < 2 ? (uint8_t)(255 * row) : (uint8_t)(256 * (number() + 0.5f));
  }
  return all;
}

static Matrix matrix(int kind, int n_out, int n_in, int group) {
  Matrix m = {.kind = kind, .n_out = n_out, .n_in = n_in, .group = group};
  const int rows = (n_out + PANEL - 1) / PANEL * PANEL, scales = group ? rows * n_in / group : 0;
  if (kind == FLOAT32)
    m.codes = numbers(n_out * n_in, 1);
  else if (kind == BFLOAT16)
    m.codes = halves(n_out * n_in, 1);
  else
    m.codes = codes(rows, kind == INT8 ? n_in : n_in / 2);
  if (kind == INT4)
    m.scale = halves(2 * scales, 0.1f);
  else
    m.scale = numbers(scales, kind == INT8 ? 0.01f : 1);
  return m;
}

static Norm norm(int size, int is_layer_norm) {
  Norm n = {numbers(size, 1), NULL, 1e-5f, is_layer_norm};
  if (is_layer_norm)
    n.bias = numbers(size, 1);
  return n;
}

/* What two adapters add to a weight, the second nothing. */
static Change *make_changes(int n_out, int n_in) {
  Change *both = calloc(2, sizeof *both);
  both[0].r = LOW;
  both[0].a = numbers(LOW * n_in, 0.1f);
  both[0].b = numbers(LOW * n_out, 0.1f);
  return both;
}

/* Llama's form, or GPT-2's together with all else that a model may have. */
static Layer make_layer(int kind, int full, const float *angles, int window) {
  const int head = WIDTH / HEADS, group = kind < INT8 ? 0 : GROUP;
  Layer layer = {.window = window};
  layer.attention_norm = norm(WIDTH, full);
  layer.mlp_norm = norm(WIDTH, full);
  layer.q = matrix(kind, WIDTH, WIDTH, 2 * group);
  layer.k = matrix(kind, KV_HEADS * head, WIDTH, group);
  layer.v = matrix(kind, KV_HEADS * head, WIDTH, group);
  layer.o = matrix(kind, WIDTH, WIDTH, group);
  layer.up = matrix(kind, HIDDEN, WIDTH, group);
  layer.down = matrix(kind, WIDTH, HIDDEN, group);
  if (!full) {
    layer.gate = matrix(kind, HIDDEN, WIDTH, group);
    layer.cos = layer.sin = angles;
    layer.rope_dim = head;
    return layer;
  }
  layer.q.bias = numbers(WIDTH, 1);
  layer.down.bias = numbers(WIDTH, 1);
  layer.q.changes = make_changes(WIDTH, WIDTH);
  layer.down.changes = make_changes(WIDTH, HIDDEN);
  layer.q_norm = norm(head, 0);
  layer.k_norm = norm(head, 0);
  layer.attention_post_norm = norm(WIDTH, 0);
  layer.mlp_post_norm = norm(WIDTH, 0);
  return layer;
}

static Model make_model(int kind, int full) {
  static const int of_full[] = {0, GELU_TANH, RELU2, GELU_TANH, RELU2, GELU_TANH};
  const int head = WIDTH / HEADS, group = kind < INT8 ? 0 : GROUP;
  Layer *layers = malloc(LAYERS * sizeof *layers);
  const float *angles = numbers(PLACES * head, 1);
  for (int i = 0; i < LAYERS; i++)
    layers[i] = make_layer(kind, full, angles, i ? 9 : 0);
  Model m = {LAYERS, WIDTH, HEADS, KV_HEADS, head, HIDDEN, .attention_scale = 0.25f, .embedding_scale = 1};
  m.norms_heads = 1;
  m.activation = full ? of_full[kind] : kind % 2 ? SWIGLU : GEGLU;
  m.embedding = matrix(kind, VOCAB, WIDTH, group);
  m.head = matrix(kind, VOCAB, WIDTH, group);
  m.norm = norm(WIDTH, full);
  m.layers = layers;
  if (full) {
    m.attention_softcap = 5;
    m.logit_softcap = 3;
    m.embedding_scale = 8;
    m.position_embedding = numbers(PLACES * WIDTH, 1);
    m.largest_r = LOW;
  }
  return m;
}

/* Reads PLACES tokens of each slot, `step` at a time, and returns the logits of the last ones. */
static float *read_all(const Model *m, int step, int threads) {
  const int64_t size = (int64_t)PLACES * m->head_dim;
  const size_t all = (size_t)LAYERS * SLOTS * KV_HEADS * size;
  float *k = malloc(all * sizeof *k), *v = malloc(all * sizeof *v);
  float *logits = malloc(SLOTS * VOCAB * sizeof *logits);
  Cache cache = {k, v, SLOTS * KV_HEADS * size, KV_HEADS * size, size, PLACES};
  for (int begin = 0; begin < PLACES; begin += step) {
    int32_t ids[SLOTS * PLACES], slots[SLOTS * PLACES], positions[SLOTS * PLACES], changes[SLOTS * PLACES];
    uint8_t wanted[SLOTS * PLACES];
    int count = 0;
    for (int slot = 0; slot < SLOTS; slot++)
      for (int i = begin; i < begin + step; i++, count++) {
        ids[count] = (7 * i + 13 * slot) % VOCAB;
        slots[count] = slot;
        positions[count] = i;
        changes[count] = slot - 1;
        wanted[count] = i == PLACES - 1;
      }
    Tokens tokens = {ids, slots, positions, changes, wanted, count};
    if (forward(m, &cache, &tokens, logits, threads))
      exit(2);
  }
  free(k);
  free(v);
  return logits;
}

static int compare_ways(const Model *m) {
  int wrong = 0;
  float *expected = read_all(m, PLACES, 1);
  for (int threads = 1; threads <= 5; threads++)
    for (int step = 1; step <= PLACES; step *= threads < 3 ? 2 : 4) {
      if (PLACES % step)
        continue;
      float *logits = read_all(m, step, threads);
      wrong |= !!memcmp(logits, expected, SLOTS * VOCAB * sizeof *logits);
      free(logits);
    }
  free(expected);
  return wrong;
}

static void print(const char *kind, const char *what, const float *values, int count) {
  printf("%s %s:", kind, what);
  for (int i = 0; i < count; i++)
    printf(" %a", values[i]);
  printf("\n");
}

/* Rows that are hard to round, and random ones. */
static float *hard_rows(int rows, int columns) {
  float *x = numbers(rows * columns, 1);
  for (int i = 0; i < columns; i++) {
    x[i] = 1;
    x[columns + i] = i % 2 ? 1 : -1;
    x[2 * columns + i] = 0;
    x[3 * columns + i] *= 1e-37f;
    x[4 * columns + i] = (float)(i % 255 - 127) / 2; /* halves: between two codes */
  }
  x[5 * columns + 3] = NAN;
  x[6 * columns + 3] = -INFINITY;
  return x;
}

static void print_products(void) {
  enum { ROWS = 15, OUTPUTS_OF = 37 };
  for (int kind = FLOAT32; kind <= NF4; kind++) {
    const int columns = kind < INT8 ? 50 : 320; /* 50: no whole vectors */
    const Matrix m = matrix(kind, OUTPUTS_OF, columns, kind < INT8 ? 0 : 64);
    float *x = hard_rows(ROWS, columns), y[ROWS * OUTPUTS_OF];
    for (int rows = 1; rows <= ROWS; rows += 7) {
      if (product(&m, x, rows, y, 1))
        exit(2);
      print(KINDS[kind], "product", y, rows * OUTPUTS_OF);
    }
    free(x);
  }
}

static void print_rounded(void) {
  enum { ROWS = 8, COLUMNS = 320, GROUPS = COLUMNS / GROUP };
  int8_t rounded[ROWS * COLUMNS];
  float scale[ROWS * GROUPS], as_float[ROWS * COLUMNS];
  int32_t sum[ROWS * GROUPS];
  Rows x = {hard_rows(ROWS, COLUMNS), rounded, scale, sum, COLUMNS};
  for (int row = 0; row < ROWS; row++)
    round_columns(&x, row, 0, COLUMNS);
  print("rounded", "scale", scale, ROWS * GROUPS);
  for (int i = 0; i < ROWS * COLUMNS; i++)
    as_float[i] = rounded[i];
  print("rounded", "codes", as_float, ROWS * COLUMNS);
  for (int i = 0; i < ROWS * GROUPS; i++)
    as_float[i] = (float)sum[i];
  print("rounded", "sum", as_float, ROWS * GROUPS);
  free(x.values);
}

int main(int count, char **arguments) {
  const int prints = count > 1;
  int wrong = 0;
  (void)arguments;
  if (prints) {
    print_rounded();
    print_products();
  }
  for (int kind = FLOAT32; kind <= NF4; kind++)
    for (int full = 0; full < 2; full++) {
      Model m = make_model(kind, full);
      if (!prints) {
        wrong |= compare_ways(&m);
        continue;
      }
      for (int gelu = 0; gelu <= full; gelu++) {
        m.activation = gelu ? GELU : m.activation;
        float *logits = read_all(&m, 16, 1);
        print(KINDS[kind], gelu ? "GPT with erf" : full ? "GPT" : "Llama", logits, SLOTS * VOCAB);
        free(logits);
      }
    }
  if (!prints)
    printf(wrong ? "different bits\n" : "the same bits\n");
  return wrong;
}
