/* A small model of random numbers, read in several ways with several threads: for sanitizers and valgrind, which
   look at what a Python test cannot see (make sanitize). Exits with 1 where two ways give different bits. */

#include <stdio.h>

#include "../../shared/quantization/decoder.c"

enum { LAYERS = 2, WIDTH = 64, HEADS = 4, KV_HEADS = 2, HIDDEN = 96, VOCAB = 75, PLACES = 48, SLOTS = 3 };

static uint32_t state = 1;
static float number(void) {
  state = state * 1664525 + 1013904223;
  return (state >> 8) / (float)(1 << 24) - 0.5f;
}

static float *numbers(int count) {
  float *all = malloc(count * sizeof *all);
  for (int i = 0; i < count; i++)
    all[i] = number();
  return all;
}

/* In 8 bits where the columns come in groups, else in fp32. */
static Matrix matrix(int n_out, int n_in, int packed) {
  Matrix m = {.kind = FLOAT32, .n_out = n_out, .n_in = n_in};
  if (!packed) {
    m.codes = numbers(n_out * n_in);
    return m;
  }
  int rows = (n_out + PANEL - 1) / PANEL * PANEL;
  uint8_t *codes = malloc((size_t)rows * n_in);
  for (int i = 0; i < rows * n_in; i++)
    codes[i] = (uint8_t)(128 + 120 * number());
  float *scale = numbers(rows * n_in / GROUP);
  for (int i = 0; i < rows * n_in / GROUP; i++)
    scale[i] *= 0.01f;
  m.kind = INT8;
  m.group = GROUP;
  m.codes = codes;
  m.scale = scale;
  return m;
}

static Norm norm(int size) {
  Norm n = {numbers(size), NULL, 1e-5f, 0};
  return n;
}

static Model model(int packed) {
  static Layer layers[2][LAYERS];
  const int head = WIDTH / HEADS;
  float *angles = numbers(PLACES * head);
  for (int i = 0; i < LAYERS; i++) {
    Layer layer = {.attention_norm = norm(WIDTH), .mlp_norm = norm(WIDTH), .rope_dim = head, .window = i ? 9 : 0};
    layer.cos = layer.sin = angles;
    layer.q = matrix(WIDTH, WIDTH, packed);
    layer.k = matrix(KV_HEADS * head, WIDTH, packed);
    layer.v = matrix(KV_HEADS * head, WIDTH, packed);
    layer.o = matrix(WIDTH, WIDTH, packed);
    layer.up = matrix(HIDDEN, WIDTH, packed);
    layer.gate = matrix(HIDDEN, WIDTH, packed);
    layer.down = matrix(WIDTH, HIDDEN, packed);
    layers[packed][i] = layer;
  }
  Model m = {LAYERS, WIDTH, HEADS, KV_HEADS, head, HIDDEN, SWIGLU, 1, 0.25f, 0, 1, 0, matrix(VOCAB, WIDTH, packed)};
  m.head = matrix(VOCAB, WIDTH, packed);
  m.norm = norm(WIDTH);
  m.layers = layers[packed];
  return m;
}

/* Reads PLACES tokens of each slot, `step` at a time, and returns the logits of the last ones. */
static float *read_all(const Model *m, int step, int threads) {
  const int64_t size = (int64_t)PLACES * m->head_dim;
  const size_t all = (size_t)LAYERS * SLOTS * KV_HEADS * size;
  float *k = malloc(all * sizeof *k), *v = malloc(all * sizeof *v), *logits = malloc(SLOTS * VOCAB * sizeof *logits);
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
        changes[count] = -1;
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

int main(void) {
  int wrong = 0;
  for (int packed = 0; packed < 2; packed++) {
    Model m = model(packed);
    float *expected = read_all(&m, PLACES, 1);
    for (int threads = 1; threads <= 5; threads++)
      for (int step = 1; step <= PLACES; step *= threads < 3 ? 2 : 4) {
        if (PLACES % step)
          continue;
        float *logits = read_all(&m, step, threads);
        wrong |= !!memcmp(logits, expected, SLOTS * VOCAB * sizeof *logits);
        free(logits);
      }
    free(expected);
  }
  printf(wrong ? "different bits\n" : "the same bits\n");
  return wrong;
}
