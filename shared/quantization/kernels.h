/* Week 8. Dot products of weights with activations, for the processor that this is compiled for: AVX-512 with
   VNNI, AVX2, NEON with or without its instruction for dot products, or plain C (also with -DPLAIN) that the
   compiler makes the best of. native.py looks at the processor when the course runs, and chooses.

   Packed weights lie in panels of 16 rows of the matrix (outputs). Within a panel come 4 columns of row 0, the
   same 4 of row 1, ... of row 15, then the next 4 columns. One instruction then multiplies the 4 columns of
   all 16 rows with 4 activations, and leaves 16 sums side by side: nothing is added across at the end.

   Activations are rounded to int8 in groups of 32, each group with a scale of its own, so that the products
   within a group are of small integers. llama.cpp computes like this too (its Q8_0 activations).

   Every sum is taken in the same order whatever the number of rows: a text's result does not depend on what
   else is in the batch. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define GROUP 32 /* activations that share a scale */
#define PANEL 16 /* rows of a matrix that lie together */

#if defined(PLAIN)
#define LANES 4
#define TILE 4
#elif defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VNNI__)
#include <immintrin.h>
#define LANES 16
#define TILE 8 /* rows of activations that share what is read of a weight */
#elif defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>
#define LANES 8
#define TILE 4
#elif defined(__aarch64__)
#include <arm_neon.h>
#define NEON
#define LANES 4
#define TILE 4
#else
#define LANES 4
#define TILE 4
#endif
#define PARTS (PANEL / LANES) /* vectors for the outputs of a panel */

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));
typedef Floats AnyFloats __attribute__((aligned(4), may_alias)); /* wherever they lie */
typedef Words AnyWords __attribute__((aligned(1), may_alias));
typedef Halves AnyHalves __attribute__((aligned(2), may_alias));

INLINE Floats load(const float *from) { return *(const AnyFloats *)from; }
INLINE void store(float *to, Floats values) { *(AnyFloats *)to = values; }

/* bfloat16 is the upper half of a float. */
INLINE Floats load_halves(const uint16_t *from) {
  return (Floats)(__builtin_convertvector(*(const AnyHalves *)from, Words) << 16);
}

/* The sum of all lanes: halves are added until one is left. */
INLINE float total(Floats values) {
#if LANES == 16
  return _mm512_reduce_add_ps((__m512)values);
#else
  float lanes[LANES];
  store(lanes, values);
  for (int half = LANES / 2; half; half /= 2)
    for (int i = 0; i < half; i++)
      lanes[i] += lanes[half + i];
  return lanes[0];
#endif
}

/* What is special about a processor: products of 4 bytes in each lane.

   start(sum)          what sums of `dot` begin with, for activations whose codes add up to `sum`
   dot(sums, w, a)     sums + w · a: w has 4 numbers in each lane, from -128 to 127 and stored plus 128; a has
                       4 from -127 to 127, for all lanes
   dot_small(...)      the same for w from 0 to 15, stored as they are
   look_up(table, i)   for each of the 4 bytes in each lane, table[i], i from 0 to 15 */

#if LANES == 16
INLINE Ints start(int32_t sum) { return (Ints)_mm512_set1_epi32(-128 * sum); }
INLINE Ints dot(Ints sums, Words w, int32_t a) {
  return (Ints)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)w, _mm512_set1_epi32(a));
}
INLINE Ints dot_small(Ints sums, Words w, int32_t a) { return dot(sums, w, a); }
INLINE Words look_up(const uint8_t *table, Words i) {
  __m512i levels = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)table));
  return (Words)_mm512_shuffle_epi8(levels, (__m512i)i);
}
#elif LANES == 8
INLINE Ints start(int32_t sum) {
  (void)sum;
  return (Ints){0};
}
/* The instruction multiplies numbers without a sign by such with one, and adds two products in 16 bits. So w's
   sign goes to a, and 2 · 128 · 127 fits. */
INLINE Ints dot(Ints sums, Words w, int32_t a) {
  __m256i codes = _mm256_xor_si256((__m256i)w, _mm256_set1_epi8(-128));
  __m256i moved = _mm256_sign_epi8(_mm256_set1_epi32(a), codes);
  __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(codes), moved);
  return sums + (Ints)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}
INLINE Ints dot_small(Ints sums, Words w, int32_t a) {
  __m256i pairs = _mm256_maddubs_epi16((__m256i)w, _mm256_set1_epi32(a));
  return sums + (Ints)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}
INLINE Words look_up(const uint8_t *table, Words i) {
  __m256i levels = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)table));
  return (Words)_mm256_shuffle_epi8(levels, (__m256i)i);
}
#elif defined(NEON)
INLINE Ints start(int32_t sum) {
  (void)sum;
  return (Ints){0};
}
#if defined(__ARM_FEATURE_DOTPROD)
INLINE Ints dot_small(Ints sums, Words w, int32_t a) {
  return (Ints)vdotq_s32((int32x4_t)sums, (int8x16_t)w, (int8x16_t)vdupq_n_s32(a));
}
#else
/* Two products are added in 16 bits, where 2 · 128 · 127 fits, then pairs of those in 32. */
INLINE Ints dot_small(Ints sums, Words w, int32_t a) {
  int8x16_t codes = (int8x16_t)w, moved = (int8x16_t)vdupq_n_s32(a);
  int16x8_t first = vmull_s8(vget_low_s8(codes), vget_low_s8(moved)), last = vmull_high_s8(codes, moved);
  return (Ints)vpadalq_s16((int32x4_t)sums, vpaddq_s16(first, last));
}
#endif
INLINE Ints dot(Ints sums, Words w, int32_t a) { return dot_small(sums, w ^ 0x80808080u, a); }
INLINE Words look_up(const uint8_t *table, Words i) {
  return (Words)vqtbl1q_u8(vld1q_u8(table), (uint8x16_t)i);
}
#else
INLINE Ints start(int32_t sum) { return -128 * sum - (Ints){0}; }
INLINE Ints dot(Ints sums, Words w, int32_t a) {
  for (int byte = 0; byte < 4; byte++)
    sums += (Ints)(w >> (8 * byte) & 255) * (int32_t)(int8_t)(a >> (8 * byte));
  return sums;
}
INLINE Ints dot_small(Ints sums, Words w, int32_t a) { return dot(sums, w, a); }
INLINE Words look_up(const uint8_t *table, Words i) {
  uint8_t bytes[4 * LANES];
  memcpy(bytes, &i, sizeof bytes);
  for (int k = 0; k < 4 * LANES; k++)
    bytes[k] = table[bytes[k]];
  memcpy(&i, bytes, sizeof bytes);
  return i;
}
#endif

/* What an adapter adds to a weight: b a (LoRA), a [r, n_in] and b [n_out, r]. */
typedef struct {
  const float *a, *b;
  int32_t r; /* 0: nothing */
} Change;

/* A weight [n_out, n_in]. */
enum { NO_MATRIX, FLOAT32, BFLOAT16, INT8, INT4, NF4 };
typedef struct {
  int32_t kind, n_out, n_in;
  int32_t group; /* columns that share a scale; 32 divides it */
  /* FLOAT32, BFLOAT16: [n_out, n_in]. INT8, plus 128: [panels, n_in / 4, 16, 4]. INT4, NF4: [panels, n_in / 8,
     16, 4]; of 8 columns, the first 4 are in the low halves of the bytes. */
  const void *codes;
  /* INT8, NF4: float [panels, n_in / group, 16]. INT4: bfloat16 [panels, n_in / group, 2, 16]: the scale, then
     the value of code 8. */
  const void *scale;
  const float *bias; /* [n_out], or NULL */
  const Change *changes; /* of the adapters, or NULL */
} Matrix;

/* Rows of activations [rows, n] as they are, and rounded. */
typedef struct {
  float *values;
  int8_t *codes;
  float *scale; /* [rows, n / 32] */
  int32_t *sum; /* [rows, n / 32]: of the codes */
  int32_t n;
} Rows;

/* Rounds 32 values, group `g` of all. */
static void round_group(const Rows *x, size_t g) {
  const float *from = x->values + GROUP * g;
  int8_t *codes = x->codes + GROUP * g;
  int32_t largest = 0, sum = 0;
  /* The largest magnitude. Without its sign, a float's bits as an integer are ordered like the float, and the
     compiler compares many integers at once. */
  for (int i = 0; i < GROUP; i++) {
    int32_t bits;
    memcpy(&bits, from + i, sizeof bits);
    bits &= 0x7fffffff;
    largest = bits > largest ? bits : largest;
  }
  float most;
  memcpy(&most, &largest, sizeof most);
  float bad = most * 0; /* 0; NaN where a value is NaN or infinite */
  if (bad != 0) {       /* codes cannot be NaN: the scale is */
    memset(codes, 0, GROUP);
    x->scale[g] = bad;
    x->sum[g] = 0;
    return;
  }
  float inverse = most > 1e-36f ? 127 / most : 0; /* which would be infinite for less than 127 / FLT_MAX */
  for (int i = 0; i < GROUP; i++) {
    codes[i] = (int8_t)rintf(from[i] * inverse);
    sum += codes[i];
  }
  x->scale[g] = most / 127;
  x->sum[g] = sum;
}

static void round_columns(const Rows *x, int row, int begin, int end) {
  size_t groups = x->n / GROUP;
  for (int g = begin / GROUP; g < end / GROUP; g++)
    round_group(x, row * groups + g);
}

INLINE int32_t four(const int8_t *codes) {
  int32_t word;
  memcpy(&word, codes, sizeof word);
  return word;
}

INLINE Words words_at(const uint8_t *from) { return *(const AnyWords *)from; }

/* Below: the products of one panel of a weight with `rows` rows of activations from `first` on, into sums
   [rows, 16]. Where these functions are inlined, `rows` is a constant. */

INLINE void panel_int8(const Matrix *m, int panel, const Rows *x, int first, const int rows, float *sums) {
  const int groups = m->n_in / GROUP, per = m->group / GROUP;
  const uint8_t *codes = (const uint8_t *)m->codes + (size_t)panel * PANEL * m->n_in;
  const float *scale = (const float *)m->scale + (size_t)panel * PANEL * (groups / per);
  const int8_t *a = x->codes + (size_t)first * m->n_in;
  const float *a_scale = x->scale + (size_t)first * groups;
  const int32_t *a_sum = x->sum + (size_t)first * groups;
  for (int part = 0; part < PARTS; part++) {
    Floats result[TILE] = {0};
    for (int g = 0, range = 0; g < groups; range++) {
      Floats partial[TILE] = {0};
      for (int end = g + per; g < end; g++) {
        const uint8_t *w = codes + (size_t)g * GROUP * PANEL + 4 * LANES * part;
        Ints products[TILE];
        for (int r = 0; r < rows; r++)
          products[r] = start(a_sum[r * groups + g]);
        for (int k = 0; k < GROUP; k += 4) {
          Words w4 = words_at(w + k * PANEL);
          for (int r = 0; r < rows; r++)
            products[r] = dot(products[r], w4, four(a + (size_t)r * m->n_in + GROUP * g + k));
        }
        for (int r = 0; r < rows; r++)
          partial[r] += __builtin_convertvector(products[r], Floats) * a_scale[r * groups + g];
      }
      Floats range_scale = load(scale + PANEL * range + LANES * part);
      for (int r = 0; r < rows; r++)
        result[r] += partial[r] * range_scale;
    }
    for (int r = 0; r < rows; r++)
      store(sums + PANEL * r + LANES * part, result[r]);
  }
}

/* weight = scale * code + low, with low = zero - 8 * scale. */
INLINE void panel_int4(const Matrix *m, int panel, const Rows *x, int first, const int rows, float *sums) {
  const int groups = m->n_in / GROUP, per = m->group / GROUP;
  const uint8_t *codes = (const uint8_t *)m->codes + (size_t)panel * PANEL / 2 * m->n_in;
  const uint16_t *scale = (const uint16_t *)m->scale + (size_t)panel * 2 * PANEL * (groups / per);
  const int8_t *a = x->codes + (size_t)first * m->n_in;
  const float *a_scale = x->scale + (size_t)first * groups;
  const int32_t *a_sum = x->sum + (size_t)first * groups;
  for (int part = 0; part < PARTS; part++) {
    Floats result[TILE] = {0};
    for (int g = 0, range = 0; g < groups; range++) {
      Floats range_scale = load_halves(scale + 2 * PANEL * range + LANES * part);
      Floats low = load_halves(scale + 2 * PANEL * range + PANEL + LANES * part) - 8 * range_scale;
      for (int end = g + per; g < end; g++) {
        const uint8_t *w = codes + (size_t)g * GROUP / 2 * PANEL + 4 * LANES * part;
        Ints products[TILE] = {0};
        for (int k = 0; k < GROUP; k += 8) {
          Words both = words_at(w + k / 2 * PANEL), high = both >> 4 & 0x0f0f0f0f;
          both &= 0x0f0f0f0f;
          for (int r = 0; r < rows; r++) {
            const int8_t *a8 = a + (size_t)r * m->n_in + GROUP * g + k;
            products[r] = dot_small(dot_small(products[r], both, four(a8)), high, four(a8 + 4));
          }
        }
        for (int r = 0; r < rows; r++) {
          float one = a_scale[r * groups + g];
          Floats codes_part = __builtin_convertvector(products[r], Floats) * range_scale;
          result[r] += (codes_part + (float)a_sum[r * groups + g] * low) * one;
        }
      }
    }
    for (int r = 0; r < rows; r++)
      store(sums + PANEL * r + LANES * part, result[r]);
  }
}

/* NF4's levels, LARGEST times as large: 256 · high + low, with both from -128 to 127. */
#define LARGEST 32639
static const int16_t NF4_LEVELS[16] = {-32639, -22723, -17138, -12890, -9284, -6031, -2972, 0,
                                       2597, 5253, 8033, 11029, 14384, 18363, 23597, 32639};

/* Levels have 16 bits; the two bytes of each are looked up and multiplied apart. */
INLINE void panel_nf4(const Matrix *m, int panel, const Rows *x, int first, const int rows, float *sums) {
  const int groups = m->n_in / GROUP, per = m->group / GROUP;
  const uint8_t *codes = (const uint8_t *)m->codes + (size_t)panel * PANEL / 2 * m->n_in;
  const float *scale = (const float *)m->scale + (size_t)panel * PANEL * (groups / per);
  const int8_t *a = x->codes + (size_t)first * m->n_in;
  const float *a_scale = x->scale + (size_t)first * groups;
  const int32_t *a_sum = x->sum + (size_t)first * groups;
  uint8_t high_bytes[16], low_bytes[16];
  for (int i = 0; i < 16; i++) {
    int low = (int8_t)(NF4_LEVELS[i] & 255);
    low_bytes[i] = (uint8_t)(low + 128);
    high_bytes[i] = (uint8_t)((NF4_LEVELS[i] - low) / 256 + 128);
  }
  for (int part = 0; part < PARTS; part++) {
    Floats result[TILE] = {0};
    for (int g = 0, range = 0; g < groups; range++) {
      Floats partial[TILE] = {0};
      for (int end = g + per; g < end; g++) {
        const uint8_t *w = codes + (size_t)g * GROUP / 2 * PANEL + 4 * LANES * part;
        Ints high[TILE], low[TILE];
        for (int r = 0; r < rows; r++)
          high[r] = low[r] = start(a_sum[r * groups + g]);
        for (int k = 0; k < GROUP; k += 4) {
          Words i = words_at(w + k / 8 * 4 * PANEL) >> (k & 4) & 0x0f0f0f0f;
          Words w_high = look_up(high_bytes, i), w_low = look_up(low_bytes, i);
          for (int r = 0; r < rows; r++) {
            int32_t a4 = four(a + (size_t)r * m->n_in + GROUP * g + k);
            high[r] = dot(high[r], w_high, a4);
            low[r] = dot(low[r], w_low, a4);
          }
        }
        for (int r = 0; r < rows; r++)
          partial[r] += __builtin_convertvector(256 * high[r] + low[r], Floats) * a_scale[r * groups + g];
      }
      Floats range_scale = load(scale + PANEL * range + LANES * part) * (1.0f / LARGEST);
      for (int r = 0; r < rows; r++)
        result[r] += partial[r] * range_scale;
    }
    for (int r = 0; r < rows; r++)
      store(sums + PANEL * r + LANES * part, result[r]);
  }
}

#define AHEAD 256 /* bytes by which memory is asked for a weight before it is needed */
#define OUTPUTS 4 /* rows of a float weight that are multiplied at once */

INLINE Floats float_weights(const Matrix *m, size_t at) {
  if (m->kind == FLOAT32)
    return load((const float *)m->codes + at);
  return load_halves((const uint16_t *)m->codes + at);
}

/* The last columns of a row where LANES does not divide it, with zeros behind. */
INLINE Floats last_weights(const Matrix *m, size_t at, int count) {
  float lanes[LANES] = {0};
  uint16_t halves[LANES] = {0};
  if (m->kind == FLOAT32) {
    memcpy(lanes, (const float *)m->codes + at, count * sizeof *lanes);
    return load(lanes);
  }
  memcpy(halves, (const uint16_t *)m->codes + at, count * sizeof *halves);
  return load_halves(halves);
}

INLINE void outputs_float(const Matrix *m, size_t output, const int outputs, const float *x, const int rows,
                          float *sums) {
  const size_t n = m->n_in, whole = n / LANES * LANES;
  Floats products[TILE][OUTPUTS] = {0};
  for (size_t k = 0; k < whole; k += LANES) {
    Floats w[OUTPUTS];
    for (int o = 0; o < outputs; o++) {
      w[o] = float_weights(m, (output + o) * n + k);
      if (rows == 1)
        __builtin_prefetch((const char *)m->codes + (output * n + k) * (m->kind == FLOAT32 ? 4 : 2) + AHEAD);
    }
    for (int r = 0; r < rows; r++) {
      Floats a = load(x + r * n + k);
      for (int o = 0; o < outputs; o++)
        products[r][o] += w[o] * a;
    }
  }
  if (whole < n)
    for (int r = 0; r < rows; r++) {
      float a[LANES] = {0};
      memcpy(a, x + r * n + whole, (n - whole) * sizeof *a);
      for (int o = 0; o < outputs; o++)
        products[r][o] += last_weights(m, (output + o) * n + whole, n - whole) * load(a);
    }
  for (int r = 0; r < rows; r++)
    for (int o = 0; o < outputs; o++)
      sums[PANEL * r + o] = total(products[r][o]);
}

INLINE void panel_float(const Matrix *m, int panel, const Rows *x, int first, const int rows, float *sums) {
  const float *a = x->values + (size_t)first * m->n_in;
  int begin = panel * PANEL, end = begin + PANEL < m->n_out ? begin + PANEL : m->n_out, o = begin;
  /* A single row reads each weight once: from front to back memory is fastest. */
  for (; rows > 1 && o + OUTPUTS <= end; o += OUTPUTS)
    outputs_float(m, o, OUTPUTS, a, rows, sums + o - begin);
  for (; o < end; o++)
    outputs_float(m, o, 1, a, rows, sums + o - begin);
}

/* The products of one panel with all rows of x: sums [rows, 16], bias added. What lies beyond n_out has no
   meaning. */
#define TILES_OF(ROWS, PRODUCTS)            \
  for (; row + ROWS <= rows; row += ROWS) \
    PRODUCTS(m, panel, x, row, ROWS, sums + (size_t)PANEL * row);
#define TILES(PRODUCTS)    \
  TILES_OF(TILE, PRODUCTS) \
  TILES_OF(4, PRODUCTS)    \
  TILES_OF(2, PRODUCTS)    \
  TILES_OF(1, PRODUCTS)    \
  break;

static void panel_products(const Matrix *m, int panel, const Rows *x, int rows, float *sums) {
  int row = 0;
  switch (m->kind) {
  case INT8:
    TILES(panel_int8)
  case INT4:
    TILES(panel_int4)
  case NF4:
    TILES(panel_nf4)
  default:
    TILES(panel_float)
  }
  if (!m->bias)
    return;
  int begin = panel * PANEL, outputs = begin + PANEL < m->n_out ? PANEL : m->n_out - begin;
  for (row = 0; row < rows; row++)
    for (int o = 0; o < outputs; o++)
      sums[(size_t)PANEL * row + o] += m->bias[begin + o];
}
