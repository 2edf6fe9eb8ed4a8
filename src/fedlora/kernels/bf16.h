/* bf16 numbers one by one: the upper half of a float. */

#include <stdint.h>
#include <string.h>

typedef uint16_t bf16;

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
