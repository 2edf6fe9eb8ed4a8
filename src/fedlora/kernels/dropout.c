/* Dropout whose mask is a hash of the row's seed and the entry's coordinates: dropout.py's masks, to the bit.

   One hash gives the 16 bits of four entries that lie beside each other. What is hashed is a counter of the coordinates, each with
   room for 2^18: the first, the second and last of all the four's place in their line. */

#include <stdint.h>
#include <string.h>

typedef uint16_t bf16;

enum { ROOM = 18, LINE = 1024 }; /* of an axis, in bits; hashes at a time */
static const uint64_t GOLDEN = 0x9e3779b97f4a7c15u;

static inline uint64_t mix(uint64_t z) { /* splitmix64's finaliser */
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
  z = (z ^ z >> 27) * 0x94d049bb133111ebu;
  return z ^ z >> 31;
}

static inline float wide(bf16 x) {
  uint32_t u = (uint32_t)x << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}

static inline bf16 narrow(float f) { /* to nearest, ties to even; NaN stays NaN */
  uint32_t u;
  memcpy(&u, &f, 4);
  return f != f ? 0x7fc0 : (bf16)((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

/* y = x times `scale` where the entry's 16 bits are at least `least`, else times 0. x: [rows outer middle last]; starts: a hash of
   each row's seed and of the call; step: what the counter grows by along a line. */
#define DROPOUT(name, type, read, write)                                                                                   \
  void name(const type *x, type *y, const uint64_t *starts, int64_t rows, int64_t outer, int64_t middle, int64_t last,     \
            uint64_t step, int least, float scale, int threads) {                                                                      \
    _Pragma("omp parallel for schedule(static) num_threads(threads)")                                                      \
    for (int64_t line = 0; line < rows * outer * middle; line++) {                                                         \
      uint64_t hashes[LINE], place = (uint64_t)(line / middle % outer) | (uint64_t)(line % middle) << ROOM;                \
      uint64_t first = starts[line / (outer * middle)] + (place + 1) * GOLDEN;                                             \
      for (int64_t from = 0; from < last; from += 4 * LINE) {                                                              \
        int64_t n = last - from < 4 * LINE ? last - from : 4 * LINE;                                                       \
        for (int64_t j = 0; j < (n + 3) / 4; j++) hashes[j] = mix(first + (uint64_t)(from / 4 + j) * step * GOLDEN);       \
        const type *in = x + line * last + from;                                                                           \
        type *out = y + line * last + from;                                                                                \
        const int16_t *bits = (const int16_t *)hashes;                                                                     \
        for (int64_t j = 0; j < n; j++) out[j] = write(read(in[j]) * (bits[j] >= least ? scale : 0.0f));                   \
      }                                                                                                                    \
    }                                                                                                                      \
  }

#define SAME(x) (x)

DROPOUT(dropout_fp32, float, SAME, SAME)
DROPOUT(dropout_bf16, bf16, wide, narrow)
