/* The bits that dropout.py's masks are made of: 16 for an entry, four entries a hash. */

#include <stdint.h>

static const uint64_t GOLDEN = 0x9e3779b97f4a7c15u;

static inline uint64_t mix(uint64_t z) { /* splitmix64's finaliser */
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
  z = (z ^ z >> 27) * 0x94d049bb133111ebu;
  return z ^ z >> 31;
}

/* n hashes along a line. first: of its first four entries, before it is mixed; step: what the counter grows by. */
static inline void hashes(uint64_t *to, uint64_t first, uint64_t step, int64_t n) {
  for (int64_t j = 0; j < n; j++) to[j] = mix(first + (uint64_t)j * (step * GOLDEN));
}
