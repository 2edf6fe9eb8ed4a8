/* Attention and activations in fp32 and bf16 by plain vectors, a (row, head) at a time, so that scores never leave the caches.

   All arithmetic is fp32; bf16 is widened when it is read and rounded when it is written. Exponentials are good to 3e-7. The vectors
   are GCC's own, so the same text serves AVX-512 and AVX2. */

#ifdef __AVX512F__
#include <immintrin.h>
#endif
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "bf16.h"
#include "hash.h"

enum { LANES = 16 };

typedef float V __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t I __attribute__((vector_size(64), aligned(4), may_alias));
typedef struct { int64_t row, head, token; } Strides; /* in entries; the last axis is dense */

static inline int padded(int n) { return (n + LANES - 1) / LANES * LANES; }

static inline V all(float x) { return (V){x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }

static inline V choose(I where, V yes, V no) { return (V)(((I)yes & where) | ((I)no & ~where)); }

static inline float sum(V x) {
  float s = 0;
  for (int i = 0; i < LANES; i++) s += x[i];
  return s;
}

static inline float most(V x) {
  float m = x[0];
  for (int i = 1; i < LANES; i++) m = x[i] > m ? x[i] : m;
  return m;
}

/* e^x for x <= 0; below -80 zero, so that nothing here is ever subnormal, which would be slow. NaN stays NaN. */
static inline V exponential(V x) {
  const V round = all(12582912.0f); /* 1.5 * 2^23: what is added to it loses its fraction */
  I unseen = x < all(-80.0f);
  V n = (x * 1.44269504f + round) - round, f = x - n * 0.693147181f;
  V p = all(1.0f / 720) * f + 1.0f / 120;
  p = p * f + 1.0f / 24;
  p = p * f + 1.0f / 6;
  p = p * f + 0.5f;
  p = p * f + 1.0f;
  p = p * f + 1.0f;
  I power = (__builtin_convertvector(n, I) + 127) << 23;
  return (V)((I)(p * (V)power) & ~unseen);
}

/* ---- activations: a bf16 number has 65536 values, so a function of one is a table ------------------------------------ */

/* dx = g f'(x); table: f' of every bf16 bit pattern. */
void activation_backward(const bf16 *g, const bf16 *x, const float *table, bf16 *dx, int64_t n, int threads) {
  int64_t done = 0;
#ifdef __AVX512F__
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t i = 0; i < n / LANES; i++) {
    __m512i at = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(x + LANES * i)));
    __m512i u = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(g + LANES * i))), 16);
    __m512 y = _mm512_mul_ps(_mm512_castsi512_ps(u), _mm512_i32gather_ps(at, table, 4));
    __m512i v = _mm512_castps_si512(y), odd = _mm512_and_si512(_mm512_srli_epi32(v, 16), _mm512_set1_epi32(1));
    v = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(v, odd), _mm512_set1_epi32(0x7fff)), 16);
    v = _mm512_mask_mov_epi32(v, _mm512_cmp_ps_mask(y, y, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0));
    _mm256_storeu_si256((__m256i *)(dx + LANES * i), _mm512_cvtepi32_epi16(v));
  }
  done = n / LANES * LANES;
#endif
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t i = done; i < n; i++) dx[i] = narrow(wide(g[i]) * table[x[i]]);
}

/* ---- small matrices --------------------------------------------------------------------------------------------------- */

/* [n d] of stride `stride` to a dense [n padded(d)] in fp32, zeros beside it. at: of the first entry. */
static void load(float *to, const void *from, int64_t at, int64_t stride, int n, int d, int half) {
  int side = padded(d);
  for (int i = 0; i < n; i++, to += side) {
    if (half) {
      const bf16 *x = (const bf16 *)from + at + i * stride;
      for (int j = 0; j < d; j++) to[j] = wide(x[j]);
    } else {
      memcpy(to, (const float *)from + at + i * stride, (size_t)d * 4);
    }
    memset(to + d, 0, (size_t)(side - d) * 4);
  }
}

static void store(void *to, int64_t at, int64_t stride, const float *from, int n, int d, int half) {
  int side = padded(d);
  for (int i = 0; i < n; i++, from += side) {
    if (half) {
      bf16 *x = (bf16 *)to + at + i * stride;
      for (int j = 0; j < d; j++) x[j] = narrow(from[j]);
    } else {
      memcpy((float *)to + at + i * stride, from, (size_t)d * 4);
    }
  }
}

static void zeros(void *to, int64_t at, int64_t stride, int n, int d, int half) {
  size_t one = half ? 2 : 4;
  for (int i = 0; i < n; i++) memset((char *)to + (size_t)(at + i * stride) * one, 0, (size_t)d * one);
}

/* x [n d] of side padded(d) to [d padded(n)], zeros beside it. */
static void transpose(float *to, const float *from, int n, int d) {
  int side = padded(n), wide_ = padded(d);
  for (int i = 0; i < n; i += LANES)
    for (int j = 0; j < d; j += LANES) {
      int rows = n - i < LANES ? n - i : LANES, cols = d - j < LANES ? d - j : LANES;
      for (int c = 0; c < cols; c++) {
        float *line = to + (int64_t)(j + c) * side + i;
        const float *x = from + (int64_t)i * wide_ + j + c;
        for (int r = 0; r < rows; r++) line[r] = x[r * wide_];
        for (int r = rows; r < LANES; r++) line[r] = 0;
      }
    }
}

/* Of c [. n], R rows and W vectors of columns. */
static inline __attribute__((always_inline)) void tile(float *c, int side, const float *a, int64_t row, int64_t col, const float *b, int n,
                                                       int k, const int R, const int W, int add) {
  V s[8][2];
  for (int r = 0; r < R; r++)
    for (int w = 0; w < W; w++) s[r][w] = add ? *(const V *)(c + r * side + LANES * w) : (V){};
  for (int l = 0; l < k; l++) {
    V y[2];
    for (int w = 0; w < W; w++) y[w] = *(const V *)(b + (int64_t)l * n + LANES * w);
    for (int r = 0; r < R; r++) {
      V x = all(a[r * row + l * col]);
      for (int w = 0; w < W; w++) s[r][w] += x * y[w];
    }
  }
  for (int r = 0; r < R; r++)
    for (int w = 0; w < W; w++) *(V *)(c + r * side + LANES * w) = s[r][w];
}

#ifdef __AVX512F__
enum { ROWS = 8 };
#else
enum { ROWS = 2 }; /* a vector takes two registers of 16 */
#endif

/* c [m n] = a b, or that added to c. a [m k], its rows and columns `row` and `col` apart; b [k n] dense; n a multiple of LANES. */
static void product(float *c, const float *a, int64_t row, int64_t col, const float *b, int m, int n, int k, int add) {
  for (int j = 0; j < n; j += 2 * LANES) {
    int pair = n - j > LANES, i = 0;
    for (; i + ROWS <= m; i += ROWS)
      if (pair) tile(c + (int64_t)i * n + j, n, a + i * row, row, col, b + j, n, k, ROWS, 2, add);
      else tile(c + (int64_t)i * n + j, n, a + i * row, row, col, b + j, n, k, ROWS, 1, add);
    for (; i < m; i++)
      if (pair) tile(c + (int64_t)i * n + j, n, a + i * row, row, col, b + j, n, k, 1, 2, add);
      else tile(c + (int64_t)i * n + j, n, a + i * row, row, col, b + j, n, k, 1, 1, add);
  }
}

/* ---- attention ----------------------------------------------------------------------------------------------------- */

/* per_key: query heads of a key head; queries: the most of a row; least, kept: of dropout, as dropout.c has them; causal: a token sees
   itself and those before it; half: the tensors are bf16. */
typedef struct { int rows, heads, per_key, queries, keys, width, threads, least, causal, half; float scale, kept; } Shape;

/* Where a row's tokens lie, for rows that follow each other without padding: they are its queries and its keys. A negative length
   is of tokens that belong to no row, and zeros are put there. */
typedef struct { int64_t row, start, length; } Place;

typedef struct { float top, share; } Softmax; /* of a query: e^(score - top) share */

static inline Place place(const Place *places, Shape z, int b) {
  return places ? places[b] : (Place){.row = b, .start = 0, .length = z.queries};
}

/* Of a row's first token. */
static inline int64_t at(Place p, Strides s) { return p.row * s.row + p.start * s.token; }

static float *take(char **room, size_t entries) {
  char *here = *room;
  *room += (entries * 4 + 63) / 64 * 64;
  return (float *)here;
}

/* Scores scaled, minus infinity where a key is not seen. x: over `side` keys, of which `keys` are; mask: bool, 0 for none. */
static inline void seen(float *x, const uint8_t *mask, int keys, int side, float scale) {
  for (int j = 0; j < keys; j++) x[j] = !mask || mask[j] ? x[j] * scale : -INFINITY;
  for (int j = keys; j < side; j++) x[j] = -INFINITY;
}

/* What dropout multiplies the shares of query i of head h by, a tensor [rows heads queries keys]. */
static inline void dropping(float *stays, uint64_t *room, const uint64_t *start, int h, int i, int side, const Shape *z) {
  hashes(room, *start + ((uint64_t)h + ((uint64_t)i << 18) + 1) * GOLDEN, (uint64_t)1 << 36, side / 4);
  const int16_t *bits = (const int16_t *)room;
  for (int j = 0; j < side; j++) stays[j] = bits[j] >= z->least ? z->kept : 0.0f;
}

/* The shares of a query's keys, in place of its scores. */
static inline Softmax soften(float *x, int side) {
  V high = all(-INFINITY), total = {};
  for (int j = 0; j < side; j += LANES) {
    V y = *(const V *)(x + j);
    high = choose(y > high, y, high);
  }
  float top = most(high);
  if (top == -INFINITY) top = 0;
  for (int j = 0; j < side; j += LANES) {
    V y = exponential(*(const V *)(x + j) - top);
    *(V *)(x + j) = y;
    total += y;
  }
  float whole = sum(total), share = whole == 0 ? 0 : 1 / whole;
  for (int j = 0; j < side; j += LANES) *(V *)(x + j) *= share;
  return (Softmax){top, share};
}

/* The same shares again in place of the scores x, and in place of d, the gradient by what is left of them, that by the scores. */
static inline void harden(float *x, float *d, Softmax of, const float *stays, int side, float scale) {
  V total = {};
  for (int j = 0; j < side; j += LANES) {
    V p = exponential(*(const V *)(x + j) - of.top) * of.share, e = *(const V *)(d + j);
    if (stays) e *= *(const V *)(stays + j);
    total += p * e;
    *(V *)(x + j) = p;
    *(V *)(d + j) = e;
  }
  V mean = all(sum(total));
  for (int j = 0; j < side; j += LANES) {
    V p = *(const V *)(x + j);
    *(V *)(d + j) = p * (*(const V *)(d + j) - mean) * scale;
    if (stays) *(V *)(x + j) = p * *(const V *)(stays + j);
  }
}

/* out = softmax(scale q k' + mask) v and what the backward pass needs of the softmax; rows without a key are zero.
   places: 0 for rows that are rows of the tensors; starts: of the rows' dropout, 0 for none. Strides: q, k, v, out, mask. Returns 1 without memory. */
int attention_forward(const void *q, const void *k, const void *v, const uint8_t *mask, void *out, Softmax *softmax, const Strides *s,
                      const Place *places, const uint64_t *starts, Shape z) {
  size_t L = (size_t)z.queries, M = (size_t)padded(z.keys), D = (size_t)padded(z.width);
  int failed = 0;
#pragma omp parallel num_threads(z.threads)
  {
    char *room = aligned_alloc(64, (L * M + 2 * L * D + 3 * M * D + 4 * M + 256) / 16 * 64), *left = room;
    if (!room) failed = 1;
    float *S = take(&left, L * M), *Q = take(&left, L * D), *O = take(&left, L * D), *K = take(&left, M * D), *T = take(&left, M * D);
    float *stays = take(&left, M);
    uint64_t *hashed = (uint64_t *)take(&left, M);
#pragma omp for schedule(static) collapse(2)
    for (int b = 0; b < z.rows; b++)
      for (int h = 0; h < z.heads; h++) {
        if (!room) continue;
        Place p = place(places, z, b);
        int64_t to = at(p, s[3]) + h * s[3].head;
        if (p.length < 0) {
          zeros(out, to, s[3].token, (int)-p.length, z.width, z.half);
          continue;
        }
        int n = (int)p.length, m = places ? n : z.keys, side = padded(m), shared = h / z.per_key;
        load(Q, q, at(p, s[0]) + h * s[0].head, s[0].token, n, z.width, z.half);
        load(K, k, at(p, s[1]) + shared * s[1].head, s[1].token, m, z.width, z.half);
        transpose(T, K, m, z.width);
        product(S, Q, (int64_t)D, 1, T, n, side, z.width, 0);
        const uint8_t *seeing = mask ? mask + b * s[4].row + h * s[4].head : 0;
        Softmax *of = softmax + ((int64_t)b * z.heads + h) * z.queries;
        for (int i = 0; i < n; i++) {
          float *x = S + (int64_t)i * side;
          seen(x, seeing ? seeing + i * s[4].token : 0, z.causal && i + 1 < m ? i + 1 : m, side, z.scale);
          of[i] = soften(x, side);
          if (starts) {
            dropping(stays, hashed, starts + b, h, i, side, &z);
            for (int j = 0; j < side; j++) x[j] *= stays[j];
          }
        }
        load(K, v, at(p, s[2]) + shared * s[2].head, s[2].token, m, z.width, z.half);
        product(O, S, side, 1, K, n, (int)D, m, 0);
        store(out, to, s[3].token, O, n, z.width, z.half);
      }
    free(room);
  }
  return failed;
}

/* Gradients of sum(g out) by q, k and v. Strides: q, k, v, g, mask, dq, dk, dv. Returns 1 without memory. */
int attention_backward(const void *q, const void *k, const void *v, const void *g, const uint8_t *mask, const Softmax *softmax, void *dq,
                       void *dk, void *dv, const Strides *s, const Place *places, const uint64_t *starts, Shape z) {
  size_t L = (size_t)z.queries, M = (size_t)padded(z.keys), D = (size_t)padded(z.width);
  int heads = z.heads / z.per_key, failed = 0;
#pragma omp parallel num_threads(z.threads)
  {
    char *room = aligned_alloc(64, (2 * L * M + 3 * L * D + 6 * M * D + 4 * M + 384) / 16 * 64), *left = room;
    if (!room) failed = 1;
    float *S = take(&left, L * M), *X = take(&left, L * M), *Q = take(&left, L * D), *G = take(&left, L * D), *O = take(&left, L * D);
    float *K = take(&left, M * D), *KT = take(&left, M * D), *VT = take(&left, M * D), *dK = take(&left, M * D), *dV = take(&left, M * D);
    float *stays = take(&left, M);
    uint64_t *hashed = (uint64_t *)take(&left, M);
#pragma omp for schedule(static) collapse(2)
    for (int b = 0; b < z.rows; b++)
      for (int c = 0; c < heads; c++) {
        if (!room) continue;
        Place p = place(places, z, b);
        int64_t to_q = at(p, s[5]), to_k = at(p, s[6]) + c * s[6].head, to_v = at(p, s[7]) + c * s[7].head;
        if (p.length < 0) {
          for (int h = c * z.per_key; h < (c + 1) * z.per_key; h++)
            zeros(dq, to_q + h * s[5].head, s[5].token, (int)-p.length, z.width, z.half);
          zeros(dk, to_k, s[6].token, (int)-p.length, z.width, z.half);
          zeros(dv, to_v, s[7].token, (int)-p.length, z.width, z.half);
          continue;
        }
        int n = (int)p.length, m = places ? n : z.keys, side = padded(m);
        load(K, v, at(p, s[2]) + c * s[2].head, s[2].token, m, z.width, z.half);
        transpose(VT, K, m, z.width);
        load(K, k, at(p, s[1]) + c * s[1].head, s[1].token, m, z.width, z.half);
        transpose(KT, K, m, z.width);
        for (int h = c * z.per_key; h < (c + 1) * z.per_key; h++) {
          load(Q, q, at(p, s[0]) + h * s[0].head, s[0].token, n, z.width, z.half);
          load(G, g, at(p, s[3]) + h * s[3].head, s[3].token, n, z.width, z.half);
          product(S, Q, (int64_t)D, 1, KT, n, side, z.width, 0);
          product(X, G, (int64_t)D, 1, VT, n, side, z.width, 0);
          const uint8_t *seeing = mask ? mask + b * s[4].row + h * s[4].head : 0;
          const Softmax *of = softmax + ((int64_t)b * z.heads + h) * z.queries;
          for (int i = 0; i < n; i++) {
            float *x = S + (int64_t)i * side;
            seen(x, seeing ? seeing + i * s[4].token : 0, z.causal && i + 1 < m ? i + 1 : m, side, z.scale);
            if (starts) dropping(stays, hashed, starts + b, h, i, side, &z);
            harden(x, X + (int64_t)i * side, of[i], starts ? stays : 0, side, z.scale);
          }
          product(O, X, side, 1, K, n, (int)D, m, 0);
          store(dq, to_q + h * s[5].head, s[5].token, O, n, z.width, z.half);
          product(dV, S, 1, side, G, m, (int)D, n, h % z.per_key != 0);
          product(dK, X, 1, side, Q, m, (int)D, n, h % z.per_key != 0);
        }
        store(dk, to_k, s[6].token, dK, m, z.width, z.half);
        store(dv, to_v, s[7].token, dV, m, z.width, z.half);
      }
    free(room);
  }
  return failed;
}

/* ---- low-rank deltas of clients whose tokens follow each other ------------------------------------------------------------ */

enum { CHUNK = 64 }; /* tokens at a time: their activations stay in the caches */

/* The tokens of client c are those from ends[c] to ends[c + 1]. in, out: multiples of LANES. half: x, y, g and dx are bf16. */
typedef struct { int clients, in, out, rank, half, threads; } Deltas;

/* x [n d] dense as fp32; where it is already, itself. */
static const float *widened(float *room, const void *x, int64_t first, int n, int d, int half) {
  if (!half) return (const float *)x + first * d;
  load(room, x, first * d, d, n, d, 1);
  return room;
}

/* c [n d] += a b, a [n padded(k)], b [k d]. */
static void add_product(void *c, int64_t first, float *room, const float *a, int side, const float *b, int n, int d, int k, int half) {
  if (!half) {
    product((float *)c + first * d, a, side, 1, b, n, d, k, 1);
    return;
  }
  load(room, c, first * d, d, n, d, 1);
  product(room, a, side, 1, b, n, d, k, 1);
  store(c, first * d, d, room, n, d, 1);
}

/* [rows cols] to [cols padded(rows)], zeros beside it; for few rows. */
static void turned(float *to, const float *from, int rows, int cols) {
  int side = padded(rows);
  for (int j = 0; j < cols; j++) {
    for (int i = 0; i < rows; i++) to[j * side + i] = from[(int64_t)i * cols + j];
    for (int i = rows; i < side; i++) to[j * side + i] = 0;
  }
}

/* h = x A' [tokens padded(rank)], and y += h B', A [clients rank in], B [clients out rank]. Returns 1 without memory. */
int deltas_forward(const void *x, void *y, float *h, const float *a, const float *b, const int64_t *ends, Deltas z) {
  int side = padded(z.rank), failed = 0;
  size_t wide_ = z.in > z.out ? (size_t)z.in : (size_t)z.out;
#pragma omp parallel num_threads(z.threads)
  {
    char *room = aligned_alloc(64, ((size_t)z.in * side + (size_t)z.out * z.rank + 2 * wide_ * CHUNK + 256) / 16 * 64), *left = room;
    if (!room) failed = 1;
    float *A = take(&left, (size_t)z.in * side), *B = take(&left, (size_t)z.out * z.rank), *X = take(&left, wide_ * CHUNK);
    float *Y = take(&left, wide_ * CHUNK);
#pragma omp for schedule(dynamic)
    for (int c = 0; c < z.clients; c++) {
      if (!room) continue;
      turned(A, a + (int64_t)c * z.rank * z.in, z.rank, z.in);
      for (int i = 0; i < z.rank; i++)
        for (int j = 0; j < z.out; j++) B[(int64_t)i * z.out + j] = b[((int64_t)c * z.out + j) * z.rank + i];
      for (int64_t t = ends[c]; t < ends[c + 1]; t += CHUNK) {
        int n = ends[c + 1] - t < CHUNK ? (int)(ends[c + 1] - t) : CHUNK;
        product(h + t * side, widened(X, x, t, n, z.in, z.half), z.in, 1, A, n, side, z.in, 0);
        add_product(y, t, Y, h + t * side, side, B, n, z.out, z.rank, z.half);
      }
    }
    free(room);
  }
  return failed;
}

/* Gradients of what deltas_forward adds, by A and B, and added to dx by x; dx: 0 where nobody asks. Returns 1 without memory. */
int deltas_backward(const void *x, const void *g, void *dx, const float *h, const float *a, const float *b, float *da, float *db,
                    const int64_t *ends, Deltas z) {
  int side = padded(z.rank), failed = 0;
  size_t wide_ = z.in > z.out ? (size_t)z.in : (size_t)z.out;
#pragma omp parallel num_threads(z.threads)
  {
    size_t entries = (size_t)z.out * side + (size_t)z.out * z.rank + (size_t)CHUNK * side + 3 * wide_ * CHUNK + 320;
    char *room = aligned_alloc(64, entries / 16 * 64), *left = room;
    if (!room) failed = 1;
    float *B = take(&left, (size_t)z.out * side), *dB = take(&left, (size_t)z.out * z.rank), *dH = take(&left, (size_t)CHUNK * side);
    float *X = take(&left, wide_ * CHUNK), *G = take(&left, wide_ * CHUNK), *D = take(&left, wide_ * CHUNK);
#pragma omp for schedule(dynamic)
    for (int c = 0; c < z.clients; c++) {
      if (!room) continue;
      const float *A = a + (int64_t)c * z.rank * z.in;
      float *dA = da + (int64_t)c * z.rank * z.in;
      memset(B, 0, (size_t)z.out * side * 4);
      for (int j = 0; j < z.out; j++) memcpy(B + (int64_t)j * side, b + ((int64_t)c * z.out + j) * z.rank, (size_t)z.rank * 4);
      memset(dA, 0, (size_t)z.rank * z.in * 4);
      memset(dB, 0, (size_t)z.rank * z.out * 4);
      for (int64_t t = ends[c]; t < ends[c + 1]; t += CHUNK) {
        int n = ends[c + 1] - t < CHUNK ? (int)(ends[c + 1] - t) : CHUNK;
        const float *gs = widened(G, g, t, n, z.out, z.half), *xs = widened(X, x, t, n, z.in, z.half);
        product(dH, gs, z.out, 1, B, n, side, z.out, 0);
        if (dx) add_product(dx, t, D, dH, side, A, n, z.in, z.rank, z.half);
        product(dA, dH, 1, side, xs, z.rank, z.in, n, 1);
        product(dB, h + t * side, 1, side, gs, z.rank, z.out, n, 1);
      }
      for (int j = 0; j < z.out; j++)
        for (int i = 0; i < z.rank; i++) db[((int64_t)c * z.out + j) * z.rank + i] = dB[(int64_t)i * z.out + j];
    }
    free(room);
  }
  return failed;
}

/* ---- int8: rows of numbers as bytes with a scale each, and products of them back in fp32 ---------------------------------- */

typedef int8_t B __attribute__((vector_size(16), aligned(1), may_alias));

/* codes = round(x fold 127 / m), scale = m / 127 with m the largest |x fold| of a row; fold: of each column, or NULL. A row that is not
   finite has the scale NaN. Products are rounded before they are added to anything, so that every build gives the same codes. */
__attribute__((optimize("fp-contract=off"))) void quantise(const float *x, const float *fold, int8_t *codes, float *scale, int64_t n,
                                                           int64_t d, int threads) {
  const V one = all(1.0f), round = all(12582912.0f);
  const I magnitude = (I)all(0) + 0x7fffffff;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t i = 0; i < n; i++) {
    const float *row = x + i * d;
    V m = all(0), odd = all(0);
    int64_t j = 0;
    for (; j + LANES <= d; j += LANES) {
      V v = *(const V *)(row + j) * (fold ? *(const V *)(fold + j) : one);
      V size = (V)((I)v & magnitude);
      m = choose(size > m, size, m);
      odd += v * 0;
    }
    float high = most(m), wrong = sum(odd);
    for (int64_t k = j; k < d; k++) {
      float v = row[k] * (fold ? fold[k] : 1.0f), size = fabsf(v);
      high = size > high ? size : high;
      wrong += v * 0;
    }
    int8_t *out = codes + i * d;
    if (wrong != 0 || high == 0) { /* NaN differs from 0 too */
      memset(out, 0, (size_t)d);
      scale[i] = high == 0 && wrong == 0 ? 0.0f : NAN;
      continue;
    }
    scale[i] = high / 127.0f;
    float factor = 127.0f / high;
    for (j = 0; j + LANES <= d; j += LANES) {
      V v = *(const V *)(row + j) * (fold ? *(const V *)(fold + j) : one);
      v = v * factor;
      v = (v + round) - round;
      *(B *)(out + j) = __builtin_convertvector(__builtin_convertvector(v, I), B);
    }
    for (; j < d; j++) out[j] = (int8_t)nearbyintf(row[j] * (fold ? fold[j] : 1.0f) * factor);
  }
}

/* out = y row column + bias; column and bias: of each column, or NULL. */
__attribute__((optimize("fp-contract=off"))) void rescale(const int32_t *y, const float *row, const float *column, const float *bias,
                                                          float *out, int64_t n, int64_t d, int threads) {
  const V one = all(1.0f), nothing = all(0);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t i = 0; i < n; i++) {
    const int32_t *from = y + i * d;
    float *to = out + i * d;
    int64_t j = 0;
    for (; j + LANES <= d; j += LANES) {
      V v = __builtin_convertvector(*(const I *)(from + j), V) * row[i] * (column ? *(const V *)(column + j) : one);
      *(V *)(to + j) = v + (bias ? *(const V *)(bias + j) : nothing);
    }
    for (; j < d; j++) to[j] = (float)from[j] * row[i] * (column ? column[j] : 1.0f) + (bias ? bias[j] : 0.0f);
  }
}
