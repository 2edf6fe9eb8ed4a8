/* Attention and activations in bf16 for CPUs with AMX, a (row, head) at a time, so that scores never leave the caches.

   Softmax and sums are fp32, as are the scores; products round their factors to bf16. Exponentials are good to 3e-6. */

#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "hash.h"

enum { KEYS = 1024 }; /* at most, for a query */

typedef uint16_t bf16;
typedef struct { int64_t row, head, token; } Strides; /* in entries; the last axis is dense */

/* ---- vectors of 16 ------------------------------------------------------------------------------------------------- */

static inline __m512 get(const bf16 *x) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)x)), 16));
}

static inline __m256i narrow(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }

static inline void put(bf16 *to, __m512 x) { _mm256_storeu_si256((__m256i *)to, narrow(x)); }

static inline __mmask16 first(int n) { return n >= 16 ? 0xffff : n <= 0 ? 0 : (__mmask16)((1 << n) - 1); }

/* e^x for x <= 0; below -80 zero, so that nothing here is ever subnormal, which would be slow. */
static inline __m512 exponential(__m512 x) {
  __mmask16 seen = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-80.0f), _CMP_NLT_UQ); /* NaN stays NaN */
  __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 8);
  __m512 f = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693147181f), x);
  __m512 p = _mm512_set1_ps(1.0f / 120);
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f / 24));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f / 6));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f / 2));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
  return _mm512_maskz_scalef_ps(seen, p, n);
}

/* ---- activations: a bf16 number has 65536 values, so a function of one is a table ------------------------------------ */

/* dx = g f'(x); table: f' of every bf16 bit pattern. */
void activation_backward(const bf16 *g, const bf16 *x, const float *table, bf16 *dx, int64_t n, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t i = 0; i < n / 16; i++) {
    __m512i at = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(x + 16 * i)));
    put(dx + 16 * i, _mm512_mul_ps(get(g + 16 * i), _mm512_i32gather_ps(at, table, 4)));
  }
  for (int64_t i = n / 16 * 16; i < n; i++) {
    bf16 one[16] = {g[i]}, out[16];
    put(out, _mm512_mul_ps(get(one), _mm512_set1_ps(table[x[i]])));
    dx[i] = out[0];
  }
}

/* ---- small matrices, sides padded to multiples of 32 ----------------------------------------------------------------- */

static inline int padded(int n) { return (n + 31) / 32 * 32; }

/* [n d] of stride `stride` to a dense [padded(n) padded(d)] with zeros around. */
static void load(bf16 *to, const bf16 *from, int64_t stride, int n, int d) {
  int wide = padded(d);
  for (int i = 0; i < n; i++) {
    memcpy(to + i * wide, from + i * stride, (size_t)d * 2);
    memset(to + i * wide + d, 0, (size_t)(wide - d) * 2);
  }
  memset(to + n * wide, 0, (size_t)(padded(n) - n) * wide * 2);
}

/* Ask for the part-th of `parts` slices of [l heads d], in the order of memory: `load` takes a head at a time, whose entries lie
   far apart, which caches do not foresee. */
static void expect(const bf16 *from, Strides s, int l, int heads, int d, int part, int parts) {
  for (int i = l * part / parts; i < l * (part + 1) / parts; i++)
    for (int h = 0; h < heads; h++)
      for (int j = 0; j < d; j += 32) _mm_prefetch((const char *)(from + i * s.token + h * s.head + j), _MM_HINT_T1);
}

static void store(bf16 *to, int64_t stride, const float *from, int n, int d) {
  for (int i = 0; i < n; i++)
    for (int j = 0; j < d; j += 16)
      _mm256_mask_storeu_epi16(to + i * stride + j, first(d - j), narrow(_mm512_loadu_ps(from + i * padded(d) + j)));
}

/* Words of 32 bits, [rows cols] to [cols rows]; sides are multiples of 16. */
static void transpose(uint32_t *to, const uint32_t *from, int rows, int cols) {
  for (int i = 0; i < rows; i += 16)
    for (int j = 0; j < cols; j += 16) {
      __m512i a[16], b[16];
      for (int r = 0; r < 16; r++) a[r] = _mm512_loadu_si512(from + (i + r) * cols + j);
      for (int r = 0; r < 16; r += 2) {
        b[r] = _mm512_unpacklo_epi32(a[r], a[r + 1]);
        b[r + 1] = _mm512_unpackhi_epi32(a[r], a[r + 1]);
      }
      for (int r = 0; r < 16; r += 4) {
        a[r] = _mm512_unpacklo_epi64(b[r], b[r + 2]);
        a[r + 1] = _mm512_unpackhi_epi64(b[r], b[r + 2]);
        a[r + 2] = _mm512_unpacklo_epi64(b[r + 1], b[r + 3]);
        a[r + 3] = _mm512_unpackhi_epi64(b[r + 1], b[r + 3]);
      }
      for (int r = 0; r < 4; r++) {
        b[r] = _mm512_shuffle_i32x4(a[r], a[r + 4], 0x88);
        b[r + 4] = _mm512_shuffle_i32x4(a[r], a[r + 4], 0xdd);
        b[r + 8] = _mm512_shuffle_i32x4(a[r + 8], a[r + 12], 0x88);
        b[r + 12] = _mm512_shuffle_i32x4(a[r + 8], a[r + 12], 0xdd);
      }
      for (int r = 0; r < 4; r++) {
        a[r] = _mm512_shuffle_i32x4(b[r], b[r + 8], 0x88);
        a[r + 4] = _mm512_shuffle_i32x4(b[r + 4], b[r + 12], 0x88);
        a[r + 8] = _mm512_shuffle_i32x4(b[r], b[r + 8], 0xdd);
        a[r + 12] = _mm512_shuffle_i32x4(b[r + 4], b[r + 12], 0xdd);
      }
      for (int r = 0; r < 16; r++) _mm512_storeu_si512(to + (j + r) * rows + i, a[r]);
    }
}

/* The right factor of a product as AMX wants it: words (x[2i][j], x[2i+1][j]), [rows/2 cols]. */
static void pairs(uint32_t *to, const bf16 *from, int rows, int cols) {
  for (int i = 0; i < rows; i += 2)
    for (int j = 0; j < cols; j += 16) {
      __m512i even = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(from + i * cols + j)));
      __m512i odd = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(from + (i + 1) * cols + j)));
      _mm512_storeu_si512(to + i / 2 * cols + j, _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
    }
}

/* The same of the transpose of x [rows cols]: its rows are pairs already. */
static void pairs_of_transpose(uint32_t *to, const bf16 *from, int rows, int cols) {
  transpose(to, (const uint32_t *)from, rows, cols / 2);
}

/* x [rows cols] transposed in place, through `room` of the same size. */
static void turn(bf16 *x, uint32_t *room, int rows, int cols) {
  pairs(room, x, rows, cols);
  transpose((uint32_t *)x, room, rows / 2, cols);
}

/* c [m n] = a [m k] b [k n], b as pairs. */
static void product(float *c, const bf16 *a, const uint32_t *b, int m, int n, int k) {
  __asm__ volatile("" ::: "memory"); /* a tile's load does not tell the compiler what it reads */
  for (int i = 0; i < m; i += 32)
    for (int j = 0; j < n; j += 32) {
      _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
      for (int l = 0; l < k; l += 32) {
        _tile_loadd(4, a + i * k + l, k * 2);
        _tile_loadd(5, a + (i + 16) * k + l, k * 2);
        _tile_loadd(6, b + l / 2 * n + j, n * 4);
        _tile_loadd(7, b + l / 2 * n + j + 16, n * 4);
        _tile_dpbf16ps(0, 4, 6); _tile_dpbf16ps(1, 4, 7); _tile_dpbf16ps(2, 5, 6); _tile_dpbf16ps(3, 5, 7);
      }
      _tile_stored(0, c + i * n + j, n * 4);
      _tile_stored(1, c + i * n + j + 16, n * 4);
      _tile_stored(2, c + (i + 16) * n + j, n * 4);
      _tile_stored(3, c + (i + 16) * n + j + 16, n * 4);
    }
}

typedef struct { uint8_t palette, start, none[14]; uint16_t bytes[16]; uint8_t rows[16]; } Tiles;

/* All tiles 16 x 64 bytes on this thread; what other libraries had set goes to `before`, to be loaded again after. */
static void tiles(Tiles *before) {
  Tiles now = {.palette = 1};
  for (int i = 0; i < 8; i++) now.bytes[i] = 64, now.rows[i] = 16;
  _tile_storeconfig(before);
  __asm__ volatile("" : : "m"(now) : "memory");
  _tile_loadconfig(&now);
}

/* ---- attention ----------------------------------------------------------------------------------------------------- */

/* per_key: query heads of a key head; queries: the most of a row; least, kept: of dropout, as dropout.c has them; causal: a token sees
   itself and those before it; half: always 1 here. */
typedef struct { int rows, heads, per_key, queries, keys, width, threads, least, causal, half; float scale, kept; } Shape;

/* Where a row's tokens lie, for rows that follow each other without padding: they are its queries and its keys. A negative length
   is of tokens that belong to no row, and zeros are put there. */
typedef struct { int64_t row, start, length; } Place;

static inline Place place(const Place *places, Shape z, int b) {
  return places ? places[b] : (Place){.row = b, .start = 0, .length = z.queries};
}

/* First entry of a row. */
static inline int64_t at(Place p, Strides s) { return p.row * s.row + p.start * s.token; }

static void *take(char **room, size_t bytes) {
  void *here = *room;
  *room += (bytes + 63) / 64 * 64;
  return here;
}

/* Scores of 16 keys: scaled, and which of them are seen. mask: bool, 0 for none. */
static inline __m512 scores(const float *s, float scale, const uint8_t *mask, int left, __mmask16 *seen) {
  *seen = first(left);
  if (mask) *seen = _mm_mask_test_epi8_mask(*seen, _mm_maskz_loadu_epi8(*seen, mask), _mm_set1_epi8(-1));
  return _mm512_mul_ps(_mm512_loadu_ps(s), _mm512_set1_ps(scale));
}

/* What dropout multiplies the shares of 16 keys by; bits: of the first key on, 0 for no dropout. */
static inline __m512 dropping(const int16_t *bits, const Shape *z) {
  if (!bits) return _mm512_set1_ps(1);
  __mmask16 stay = _mm256_cmpge_epi16_mask(_mm256_loadu_si256((const __m256i *)bits), _mm256_set1_epi16((short)z->least));
  return _mm512_maskz_mov_ps(stay, _mm512_set1_ps(z->kept));
}

/* The bits of all keys of query i of head h, a tensor [rows heads queries keys]. */
static inline const int16_t *bits_of(uint64_t *room, const uint64_t *start, int h, int i, int keys) {
  if (!start) return 0;
  hashes(room, *start + ((uint64_t)h + ((uint64_t)i << 18) + 1) * GOLDEN, (uint64_t)1 << 36, keys / 4);
  return (const int16_t *)room;
}

typedef struct { float top, share; } Softmax; /* of a query: e^(score - top) share */

/* P of one query over `vectors` * 16 keys. Inlined with a known number of vectors, they stay in registers. */
static inline __attribute__((always_inline)) Softmax soften(bf16 *P, const float *s, const uint8_t *mask, const int16_t *bits, int keys,
                                                            int vectors, const Shape *z) {
  __m512 x[KEYS / 16], most = _mm512_set1_ps(-INFINITY), sum = _mm512_setzero_ps();
  __mmask16 seen;
  for (int j = 0; j < vectors; j++) {
    x[j] = scores(s + 16 * j, z->scale, mask ? mask + 16 * j : 0, keys - 16 * j, &seen);
    x[j] = _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), seen, x[j]);
    most = _mm512_max_ps(x[j], most); /* a NaN is not lost below: the exponential keeps it */
  }
  float top = _mm512_reduce_max_ps(most);
  if (top == -INFINITY) top = 0;
  for (int j = 0; j < vectors; j++) {
    x[j] = exponential(_mm512_sub_ps(x[j], _mm512_set1_ps(top)));
    sum = _mm512_add_ps(sum, x[j]);
  }
  float all = _mm512_reduce_add_ps(sum), share = all == 0 ? 0 : 1 / all;
  for (int j = 0; j < vectors; j++)
    put(P + 16 * j, _mm512_mul_ps(_mm512_mul_ps(x[j], _mm512_set1_ps(share)), dropping(bits ? bits + 16 * j : 0, z)));
  return (Softmax){top, share};
}

/* The same P again, and X, the gradient of the query's scores, of dP. */
static inline __attribute__((always_inline)) void harden(bf16 *P, bf16 *X, const float *s, const float *dP, Softmax of, const uint8_t *mask,
                                                         const int16_t *bits, int keys, int vectors, const Shape *z) {
  __m512 x[KEYS / 16], d[KEYS / 16], sum = _mm512_setzero_ps();
  __mmask16 seen;
  for (int j = 0; j < vectors; j++) {
    x[j] = scores(s + 16 * j, z->scale, mask ? mask + 16 * j : 0, keys - 16 * j, &seen);
    x[j] = _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), seen, x[j]);
    x[j] = _mm512_mul_ps(exponential(_mm512_sub_ps(x[j], _mm512_set1_ps(of.top))), _mm512_set1_ps(of.share));
    __m512 stays = dropping(bits ? bits + 16 * j : 0, z);
    put(P + 16 * j, _mm512_mul_ps(x[j], stays));
    d[j] = _mm512_mul_ps(_mm512_loadu_ps(dP + 16 * j), stays);
    sum = _mm512_fmadd_ps(x[j], d[j], sum);
  }
  __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(sum));
  for (int j = 0; j < vectors; j++) {
    put(X + 16 * j, _mm512_mul_ps(_mm512_mul_ps(x[j], _mm512_sub_ps(d[j], mean)), _mm512_set1_ps(z->scale)));
  }
}

/* A statement for the usual numbers of vectors, V, and for any. */
#define FOR_VECTORS(number, statement)                                   \
  switch (number) {                                                      \
    case 2: { enum { V = 2 }; statement; break; }                        \
    case 4: { enum { V = 4 }; statement; break; }                        \
    case 6: { enum { V = 6 }; statement; break; }                        \
    case 8: { enum { V = 8 }; statement; break; }                        \
    default: { const int V = number; statement; }                        \
  }

/* out = softmax(scale q k' + mask) v and what the backward pass needs of the softmax; rows without a key are zero.
   places: 0 for rows that are rows of the tensors; starts: of the rows' dropout, 0 for none. Strides: q, k, v, out, mask. Returns 1 without memory. */
int attention_forward(const bf16 *q, const bf16 *k, const bf16 *v, const uint8_t *mask, bf16 *out, Softmax *softmax, const Strides *s,
                      const Place *places, const uint64_t *starts, Shape z) {
  size_t L = padded(z.queries), M = padded(z.keys), D = padded(z.width);
  int failed = 0;
#pragma omp parallel num_threads(z.threads)
  {
    char *room = aligned_alloc(64, L * M * 6 + (L + M) * D * 6 + 512), *left = room;
    if (!room) failed = 1;
    float *S = take(&left, L * M * 4), *O = take(&left, L * D * 4);
    bf16 *P = take(&left, L * M * 2), *Q = take(&left, L * D * 2), *K = take(&left, M * D * 2);
    uint32_t *right = take(&left, M * D * 2);
    Tiles before;
    tiles(&before);
#pragma omp for schedule(static) collapse(2)
    for (int b = 0; b < z.rows; b++)
      for (int h = 0; h < z.heads; h++) {
        if (!room) continue;
        Place p = place(places, z, b);
        bf16 *to = out + at(p, s[3]) + h * s[3].head;
        if (p.length < 0) {
          for (int i = 0; i < -p.length; i++) memset(to + i * s[3].token, 0, (size_t)z.width * 2);
          continue;
        }
        int n = (int)p.length, m = places ? n : z.keys, l = padded(n), w = padded(m), shared = h / z.per_key;
        load(Q, q + at(p, s[0]) + h * s[0].head, s[0].token, n, z.width);
        load(K, k + at(p, s[1]) + shared * s[1].head, s[1].token, m, z.width);
        if (b + 1 < z.rows) {
          Place next = place(places, z, b + 1);
          expect(q + at(next, s[0]), s[0], n, z.heads, z.width, h, z.heads);
          expect(k + at(next, s[1]), s[1], m, z.heads / z.per_key, z.width, h, z.heads);
          expect(v + at(next, s[2]), s[2], m, z.heads / z.per_key, z.width, h, z.heads);
        }
        pairs_of_transpose(right, K, w, D);
        product(S, Q, right, l, w, D);
        const uint8_t *seeing = mask ? mask + b * s[4].row + h * s[4].head : 0;
        const uint64_t *start = starts ? starts + b : 0;
        uint64_t room_of_bits[KEYS / 4];
        Softmax *of = softmax + ((int64_t)b * z.heads + h) * z.queries;
        FOR_VECTORS(w / 16, for (int i = 0; i < n; i++) of[i] = soften(
          P + i * w, S + i * w, seeing ? seeing + i * s[4].token : 0, bits_of(room_of_bits, start, h, i, w),
          z.causal && i + 1 < m ? i + 1 : m, V, &z))
        memset(P + (size_t)n * w, 0, (size_t)(l - n) * w * 2);
        load(K, v + at(p, s[2]) + shared * s[2].head, s[2].token, m, z.width);
        pairs(right, K, w, D);
        product(O, P, right, l, D, w);
        store(to, s[3].token, O, n, z.width);
      }
    _tile_loadconfig(&before);
    free(room);
  }
  return failed;
}

/* Gradients of sum(g out) by q, k and v; P and X are the softmax and the gradient of the scores.
   Strides: q, k, v, g, mask, dq, dk, dv. Returns 1 without memory. */
int attention_backward(const bf16 *q, const bf16 *k, const bf16 *v, const bf16 *g, const uint8_t *mask, const Softmax *softmax, bf16 *dq,
                       bf16 *dk, bf16 *dv, const Strides *s, const Place *places, const uint64_t *starts, Shape z) {
  size_t L = padded(z.queries), M = padded(z.keys), D = padded(z.width), N = L > M ? L : M;
  int heads = z.heads / z.per_key, failed = 0;
#pragma omp parallel num_threads(z.threads)
  {
    char *room = aligned_alloc(64, L * M * 14 + (L + M) * D * 4 + N * D * 18 + 1024), *left = room;
    if (!room) failed = 1;
    float *S = take(&left, L * M * 4), *dP = take(&left, L * M * 4);
    bf16 *P = take(&left, L * M * 2), *X = take(&left, L * M * 2);
    uint32_t *turned = take(&left, L * M * 2), *right = take(&left, N * D * 2);
    bf16 *Q = take(&left, L * D * 2), *G = take(&left, L * D * 2), *K = take(&left, M * D * 2), *V = take(&left, M * D * 2);
    float *O = take(&left, N * D * 4), *dK = take(&left, M * D * 4), *dV = take(&left, M * D * 4);
    Tiles before;
    tiles(&before);
#pragma omp for schedule(static) collapse(2)
    for (int b = 0; b < z.rows; b++)
      for (int c = 0; c < heads; c++) {
        if (!room) continue;
        Place p = place(places, z, b);
        bf16 *to_q = dq + at(p, s[5]), *to_k = dk + at(p, s[6]) + c * s[6].head, *to_v = dv + at(p, s[7]) + c * s[7].head;
        if (p.length < 0) {
          for (int i = 0; i < -p.length; i++) {
            for (int h = c * z.per_key; h < (c + 1) * z.per_key; h++)
              memset(to_q + h * s[5].head + i * s[5].token, 0, (size_t)z.width * 2);
            memset(to_k + i * s[6].token, 0, (size_t)z.width * 2);
            memset(to_v + i * s[7].token, 0, (size_t)z.width * 2);
          }
          continue;
        }
        int n = (int)p.length, m = places ? n : z.keys, l = padded(n), w = padded(m);
        load(K, k + at(p, s[1]) + c * s[1].head, s[1].token, m, z.width);
        load(V, v + at(p, s[2]) + c * s[2].head, s[2].token, m, z.width);
        if (b + 1 < z.rows) {
          Place next = place(places, z, b + 1);
          expect(q + at(next, s[0]), s[0], n, z.heads, z.width, c, heads);
          expect(g + at(next, s[3]), s[3], n, z.heads, z.width, c, heads);
          expect(k + at(next, s[1]), s[1], m, heads, z.width, c, heads);
          expect(v + at(next, s[2]), s[2], m, heads, z.width, c, heads);
        }
        for (int h = c * z.per_key; h < (c + 1) * z.per_key; h++) {
          load(Q, q + at(p, s[0]) + h * s[0].head, s[0].token, n, z.width);
          load(G, g + at(p, s[3]) + h * s[3].head, s[3].token, n, z.width);
          pairs_of_transpose(right, K, w, D);
          product(S, Q, right, l, w, D);
          pairs_of_transpose(right, V, w, D);
          product(dP, G, right, l, w, D);
          const uint8_t *seeing = mask ? mask + b * s[4].row + h * s[4].head : 0;
          const uint64_t *start = starts ? starts + b : 0;
          uint64_t room_of_bits[KEYS / 4];
          const Softmax *of = softmax + ((int64_t)b * z.heads + h) * z.queries;
          FOR_VECTORS(w / 16, for (int i = 0; i < n; i++) harden(
            P + i * w, X + i * w, S + i * w, dP + i * w, of[i], seeing ? seeing + i * s[4].token : 0,
            bits_of(room_of_bits, start, h, i, w), z.causal && i + 1 < m ? i + 1 : m, V, &z))
          memset(P + (size_t)n * w, 0, (size_t)(l - n) * w * 2);
          memset(X + (size_t)n * w, 0, (size_t)(l - n) * w * 2);
          pairs(right, K, w, D);
          product(O, X, right, l, D, w);
          store(to_q + h * s[5].head, s[5].token, O, n, z.width);
          turn(P, turned, l, w);
          pairs(right, G, l, D);
          product(h % z.per_key ? O : dV, P, right, w, D, l);
          if (h % z.per_key) for (size_t i = 0; i < w * D; i++) dV[i] += O[i];
          turn(X, turned, l, w);
          pairs(right, Q, l, D);
          product(h % z.per_key ? O : dK, X, right, w, D, l);
          if (h % z.per_key) for (size_t i = 0; i < w * D; i++) dK[i] += O[i];
        }
        store(to_k, s[6].token, dK, m, z.width);
        store(to_v, s[7].token, dV, m, z.width);
      }
    _tile_loadconfig(&before);
    free(room);
  }
  return failed;
}
