// Scratch memory, handed out piece by piece.

#ifndef M2D_MEMORY_H
#define M2D_MEMORY_H

#include <stddef.h>
#include <stdint.h>

// Without a base nothing is handed out, and what would have been is counted.
typedef struct {
  uint8_t* base;
  int64_t used;
} Memory;

// So many bytes, on cache lines of their own; NULL for none.
static inline void* take(Memory* memory, int64_t bytes) {
  int64_t at = memory->used;
  memory->used += (bytes + 63) / 64 * 64;
  return memory->base && bytes ? memory->base + at : NULL;
}

#endif
