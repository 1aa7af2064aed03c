// What is used next is asked for while something else is computed: it is far away, in memory or a cache that cores
// share.

#ifndef M2D_AHEAD_H
#define M2D_AHEAD_H

#include <stdint.h>

#include "vec.h"

enum { LINE = 64 };  // bytes of a cache line

// Runs of lines, each some bytes after the one before.
typedef struct {
  const uint8_t* next;
  int64_t lines, lines_per_run;  // left of this run
  int64_t runs, to_next_run;     // left, and bytes from the end of one to the next
  int64_t at_once;               // lines
} Ahead;

INLINE void fetch(Ahead* ahead) {
  for (int64_t i = 0; i < ahead->at_once && ahead->runs; i++) {
    __builtin_prefetch(ahead->next, 0, 2);
    ahead->next += LINE;
    if (--ahead->lines == 0) {
      ahead->lines = ahead->lines_per_run, ahead->runs--;
      ahead->next += ahead->to_next_run;
    }
  }
}

#endif
