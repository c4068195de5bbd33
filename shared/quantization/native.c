/* Week 8. Products of a few rows of activations with packed weights, for shared/quantization/native.py, which
   has it compiled for the processor it runs on: with AVX2, or as plain C that the compiler makes the best of.

   Activations are rounded to int8 in groups of 32, each group with a scale of its own, so that the products
   within a group are of small integers: one instruction multiplies 32 of them. llama.cpp computes like this
   too (its Q8_0 activations). */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define GROUP 32
#define BLOCK 4 /* rows of activations that share what is read of a weight */

/* Rounded activations [rows, n]; for each row and group their scale, and their sum times that scale. */
typedef struct {
  int8_t *codes;
  float *scale, *sum;
  int n, groups;
} Rows;

/* Rounds x [rows, n]. `split` puts the even columns of a group before its odd ones: in that order nibbles
   come out of 16 bytes. Returns 0 where memory is out. */
static int round_rows(Rows *to, const float *x, int rows, int n, int split) {
  size_t count = (size_t)rows * n, groups = count / GROUP;
  to->n = n;
  to->groups = n / GROUP;
  to->codes = malloc(count + 2 * groups * sizeof(float));
  if (!to->codes)
    return 0;
  to->scale = (float *)(to->codes + count);
  to->sum = to->scale + groups;
  for (size_t g = 0; g < groups; g++) {
    const float *from = x + GROUP * g;
    int8_t *codes = to->codes + GROUP * g;
    int32_t largest = 0, total = 0;
    /* The largest magnitude. Without its sign, a float's bits as an integer are ordered like the float, and
       the compiler compares many integers at once. */
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
      to->scale[g] = to->sum[g] = bad;
      continue;
    }
    float inverse = most > 0 ? 127 / most : 0;
    int8_t rounded[GROUP];
    for (int i = 0; i < GROUP; i++) {
      rounded[i] = (int8_t)rintf(from[i] * inverse);
      total += rounded[i];
    }
    for (int i = 0; i < GROUP / 2; i++) {
      codes[i] = split ? rounded[2 * i] : rounded[i];
      codes[GROUP / 2 + i] = split ? rounded[2 * i + 1] : rounded[GROUP / 2 + i];
    }
    to->scale[g] = most / 127;
    to->sum[g] = to->scale[g] * total;
  }
  return 1;
}

/* NF4's levels, 32767 times as large. */
static const int16_t NF4[16] = {-32767, -22812, -17205, -12940, -9320, -6054, -2983, 0,
                                2608,   5273,   8064,   11072,  14441, 18435, 23689, 32767};

static float from_bfloat16(uint16_t half) {
  uint32_t bits = (uint32_t)half << 16;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

/* The sum of the products of 32 columns, by format: add_int8, add_int4, add_nf4; in AVX2, then in plain C. */

#ifdef __AVX2__
#include <immintrin.h>
typedef __m256 Sum; /* eight partial sums */
static Sum nothing(void) { return _mm256_setzero_ps(); }
static Sum plus(Sum v, float x) { return _mm256_add_ps(v, _mm256_castps128_ps256(_mm_set_ss(x))); }

static float total(Sum v) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

/* sum + scale * (32 products). In the sums of two products that come first, 2 * 127 * 127 fits in 16 bits. */
static Sum add_products(__m256i unsigned_codes, __m256i codes, float scale, Sum sum) {
  __m256i fours = _mm256_madd_epi16(_mm256_maddubs_epi16(unsigned_codes, codes), _mm256_set1_epi16(1));
  return _mm256_add_ps(_mm256_mul_ps(_mm256_cvtepi32_ps(fours), _mm256_set1_ps(scale)), sum);
}

/* The first factor must be unsigned: the weight's sign goes to x. */
static Sum add_int8(const int8_t *weight, const int8_t *x, float scale, Sum sum) {
  __m256i w = _mm256_loadu_si256((const __m256i *)weight), a = _mm256_loadu_si256((const __m256i *)x);
  return add_products(_mm256_sign_epi8(w, w), _mm256_sign_epi8(a, w), scale, sum);
}

static Sum add_int4(const uint8_t *codes, const int8_t *x, float scale, Sum sum) {
  __m128i bytes = _mm_loadu_si128((const __m128i *)codes);
  __m256i nibbles = _mm256_and_si256(_mm256_set_m128i(_mm_srli_epi16(bytes, 4), bytes), _mm256_set1_epi8(15));
  return add_products(nibbles, _mm256_loadu_si256((const __m256i *)x), scale, sum);
}

/* Levels have 16 bits; the two bytes of each are looked up apart. Even columns are in the high nibbles. */
static Sum add_nf4(const uint8_t *codes, const int8_t *x, float scale, Sum sum) {
  uint8_t halves[2][16];
  for (int i = 0; i < 16; i++) {
    halves[0][i] = (uint8_t)((uint16_t)NF4[i] & 255);
    halves[1][i] = (uint8_t)((uint16_t)NF4[i] >> 8);
  }
  __m256i low = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)halves[0]));
  __m256i high = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)halves[1]));
  __m128i bytes = _mm_loadu_si128((const __m128i *)codes);
  __m256i nibbles = _mm256_and_si256(_mm256_set_m128i(bytes, _mm_srli_epi16(bytes, 4)), _mm256_set1_epi8(15));
  __m256i a = _mm256_loadu_si256((const __m256i *)x);
  low = _mm256_shuffle_epi8(low, nibbles);
  high = _mm256_shuffle_epi8(high, nibbles);
  __m256i a_first = _mm256_srai_epi16(_mm256_unpacklo_epi8(a, a), 8); /* x in 16 bits */
  __m256i a_second = _mm256_srai_epi16(_mm256_unpackhi_epi8(a, a), 8);
  __m256i first = _mm256_madd_epi16(_mm256_unpacklo_epi8(low, high), a_first);
  __m256i second = _mm256_madd_epi16(_mm256_unpackhi_epi8(low, high), a_second);
  __m256 products = _mm256_cvtepi32_ps(_mm256_add_epi32(first, second));
  return _mm256_add_ps(_mm256_mul_ps(products, _mm256_set1_ps(scale)), sum);
}
#else
typedef float Sum;
static Sum nothing(void) { return 0; }
static Sum plus(Sum v, float x) { return v + x; }
static float total(Sum v) { return v; }

static Sum add_int8(const int8_t *weight, const int8_t *x, float scale, Sum sum) {
  int32_t dot = 0;
  for (int i = 0; i < GROUP; i++)
    dot += weight[i] * x[i];
  return sum + scale * dot;
}

static Sum add_int4(const uint8_t *codes, const int8_t *x, float scale, Sum sum) {
  int32_t dot = 0;
  for (int i = 0; i < GROUP / 2; i++)
    dot += (codes[i] & 15) * x[i] + (codes[i] >> 4) * x[GROUP / 2 + i];
  return sum + scale * dot;
}

static Sum add_nf4(const uint8_t *codes, const int8_t *x, float scale, Sum sum) {
  int32_t dot = 0;
  for (int i = 0; i < GROUP / 2; i++)
    dot += NF4[codes[i] >> 4] * x[i] + NF4[codes[i] & 15] * x[GROUP / 2 + i];
  return sum + scale * dot;
}
#endif

#define INLINE static inline __attribute__((always_inline))

/* The products of one row of a weight with `rows` rows of activations, from `first` on. Where these functions
   are inlined, `rows` is a constant. A scale, or a pair of scale and zero, is for `per` groups. */

INLINE void dots_int8(const int8_t *weight, const float *scale, int per, const Rows *x, int first,
                      const int rows, float *y) {
  Sum sums[BLOCK];
  for (int r = 0; r < rows; r++)
    sums[r] = nothing();
  for (int g = 0; g < x->groups; scale++)
    for (int end = g + per; g < end; g++)
      for (int r = 0; r < rows; r++) {
        size_t at = (size_t)(first + r) * x->groups + g;
        sums[r] = add_int8(weight + GROUP * g, x->codes + GROUP * at, *scale * x->scale[at], sums[r]);
      }
  for (int r = 0; r < rows; r++)
    y[r] = total(sums[r]);
}

/* weight = scale * code + low, with low = zero - 8 * scale. `ranges` has scale and zero in bfloat16. */
INLINE void dots_int4(const uint8_t *codes, const uint16_t *ranges, int per, const Rows *x, int first,
                      const int rows, float *y) {
  Sum sums[BLOCK];
  int g = 0;
  for (int r = 0; r < rows; r++)
    sums[r] = nothing();
#ifdef __AVX2__
  /* The scales and zeros of 8 groups at once. */
  for (; per == 1 && g + 8 <= x->groups; g += 8, ranges += 16) {
    __m256i both = _mm256_loadu_si256((const __m256i *)ranges);
    __m256 scale = _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));
    __m256 zero = _mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32((int)0xffff0000)));
    __m256 low = _mm256_sub_ps(zero, _mm256_mul_ps(_mm256_set1_ps(8), scale));
    for (int r = 0; r < rows; r++) {
      size_t at = (size_t)(first + r) * x->groups + g;
      float scales[8];
      _mm256_storeu_ps(scales, _mm256_mul_ps(scale, _mm256_loadu_ps(x->scale + at)));
      sums[r] = _mm256_add_ps(_mm256_mul_ps(low, _mm256_loadu_ps(x->sum + at)), sums[r]);
      for (int i = 0; i < 8; i++)
        sums[r] = add_int4(codes + GROUP / 2 * (g + i), x->codes + GROUP * (at + i), scales[i], sums[r]);
    }
  }
#endif
  for (; g < x->groups; ranges += 2) {
    float scale = from_bfloat16(ranges[0]), low = from_bfloat16(ranges[1]) - 8 * scale;
    for (int end = g + per; g < end; g++)
      for (int r = 0; r < rows; r++) {
        size_t at = (size_t)(first + r) * x->groups + g;
        Sum sum = add_int4(codes + GROUP / 2 * g, x->codes + GROUP * at, scale * x->scale[at], sums[r]);
        sums[r] = plus(sum, low * x->sum[at]);
      }
  }
  for (int r = 0; r < rows; r++)
    y[r] = total(sums[r]);
}

/* The blocks' largest magnitudes: in full; or as 8-bit codes of levels, with a scale for each 256 blocks,
   plus an offset. */
typedef struct {
  const float *full;
  const uint8_t *codes;
  const float *levels, *scale;
  float offset;
} Absmax;

static float absmax_at(const Absmax *a, size_t block) {
  if (a->full)
    return a->full[block];
  return a->levels[a->codes[block]] * a->scale[block / 256] + a->offset;
}

INLINE void dots_nf4(const uint8_t *codes, const Absmax *absmax, size_t block, int per, const Rows *x,
                     int first, const int rows, float *y) {
  Sum sums[BLOCK];
  for (int r = 0; r < rows; r++)
    sums[r] = nothing();
  for (int g = 0; g < x->groups; block++) {
    float scale = absmax_at(absmax, block) / 32767;
    for (int end = g + per; g < end; g++)
      for (int r = 0; r < rows; r++) {
        size_t at = (size_t)(first + r) * x->groups + g;
        sums[r] = add_nf4(codes + GROUP / 2 * g, x->codes + GROUP * at, scale * x->scale[at], sums[r]);
      }
  }
  for (int r = 0; r < rows; r++)
    y[r] = total(sums[r]);
}

/* x [rows, n] times a weight [n_out, n], transposed: y [rows, n_out]. Returns 0, or 1 where memory is out.

   size: how many columns share a range. DOTS(o, first, count, to): row o of the weight with `count` rows of
   activations. */

#define PRODUCT(split, DOTS)                                             \
  Rows rounded;                                                          \
  size_t blocks = n / size;                                              \
  int per = size / GROUP;                                                \
  if (!round_rows(&rounded, x, rows, n, split))                          \
    return 1;                                                            \
  _Pragma("omp parallel for num_threads(threads) schedule(static)")      \
  for (int o = 0; o < n_out; o++)                                        \
    for (int first = 0, count; first < rows; first += count) {           \
      float dots[BLOCK];                                                 \
      count = rows - first < BLOCK ? 1 : BLOCK;                          \
      if (count == 1)                                                    \
        DOTS((size_t)o, first, 1, dots);                                 \
      else                                                               \
        DOTS((size_t)o, first, BLOCK, dots);                             \
      for (int r = 0; r < count; r++)                                    \
        y[(size_t)(first + r) * n_out + o] = dots[r];                    \
    }                                                                    \
  free(rounded.codes);                                                   \
  return 0;

int product_int8(const float *x, int rows, int n, const int8_t *weight, const float *scale, int size,
                 int n_out, float *y, int threads) {
#define INT8_DOTS(o, first, count, to) \
  dots_int8(weight + o * n, scale + o * blocks, per, &rounded, first, count, to)
  PRODUCT(0, INT8_DOTS)
}

int product_int4(const float *x, int rows, int n, const uint8_t *codes, const uint16_t *ranges, int size,
                 int n_out, float *y, int threads) {
#define INT4_DOTS(o, first, count, to) \
  dots_int4(codes + o * (n / 2), ranges + 2 * o * blocks, per, &rounded, first, count, to)
  PRODUCT(1, INT4_DOTS)
}

/* absmax: float; or, with `levels`, uint8. */
int product_nf4(const float *x, int rows, int n, const uint8_t *codes, const void *absmax,
                const float *levels, const float *scale, float offset, int size, int n_out, float *y,
                int threads) {
  Absmax largest = {levels ? NULL : (const float *)absmax, (const uint8_t *)absmax, levels, scale, offset};
#define NF4_DOTS(o, first, count, to) \
  dots_nf4(codes + o * (n / 2), &largest, o * blocks, per, &rounded, first, count, to)
  PRODUCT(1, NF4_DOTS)
}
