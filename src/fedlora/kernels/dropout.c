/* Dropout whose mask is a hash of the row's seed and the entry's coordinates: dropout.py's masks, to the bit. */

#include <stdint.h>
#include <string.h>

#include "bf16.h"
#include "hash.h"

enum { LINE = 1024 }; /* hashes at a time */

/* y = x times `kept` where the entry's 16 bits are at least `least`, else times 0. x: [lines last]; firsts: of each line's hashes;
   step: what their counter grows by along a line. */
#define DROPOUT(name, type, read, write)                                                                                   \
  void name(const type *x, type *y, const uint64_t *firsts, int64_t lines, int64_t last, uint64_t step, int least,        \
            float kept, int threads) {                                                                                     \
    _Pragma("omp parallel for schedule(static) num_threads(threads)")                                                      \
    for (int64_t line = 0; line < lines; line++)                                                                           \
      for (int64_t from = 0; from < last; from += 4 * LINE) {                                                              \
        int64_t n = last - from < 4 * LINE ? last - from : 4 * LINE;                                                       \
        uint64_t found[LINE];                                                                                              \
        hashes(found, firsts[line] + (uint64_t)(from / 4) * (step * GOLDEN), step, (n + 3) / 4);                           \
        const type *in = x + line * last + from;                                                                           \
        type *out = y + line * last + from;                                                                                \
        const int16_t *bits = (const int16_t *)found;                                                                      \
        for (int64_t j = 0; j < n; j++) out[j] = write(read(in[j]) * (bits[j] >= least ? kept : 0.0f));                    \
      }                                                                                                                    \
  }

#define SAME(x) (x)

DROPOUT(dropout_fp32, float, SAME, SAME)
DROPOUT(dropout_bf16, bf16, wide, narrow)
