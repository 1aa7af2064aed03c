// Intel's tile instructions in plain vectors, so that amx.c is tested on processors without a matrix unit:
// compile it with `-include` this, in real or generic vectors. Sums of bf16 are added in another order than the unit does.

#include "vec.h"
#ifdef M2D_GENERIC
#include "generic.h"
#endif
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef uint8_t EmulatedTile[16][64] __attribute__((aligned(64)));

static _Thread_local EmulatedTile emulated_tiles[8];
static _Thread_local int emulated_rows;  // 0: not configured

static inline EmulatedTile* emulated(int tile) {
  if (emulated_rows != 16) abort();  // the unit faults without a configuration; all tiles of this package are whole
  return &emulated_tiles[tile];
}

static inline void emulated_loadconfig(const void* config) {
  const uint8_t* bytes = config;
  uint16_t bytes_per_row;
  memcpy(&bytes_per_row, bytes + 16, sizeof bytes_per_row);
  if (bytes[0] != 1 || bytes_per_row != 64) abort();
  emulated_rows = bytes[48];
}

static inline void emulated_release(void) { emulated_rows = 0; }

static inline void emulated_zero(int tile) { memset(*emulated(tile), 0, sizeof(EmulatedTile)); }

static inline void emulated_load(int tile, const void* from, int64_t stride) {
  EmulatedTile* to = emulated(tile);
  for (int r = 0; r < 16; r++) memcpy((*to)[r], (const uint8_t*)from + r * stride, 64);
}

static inline void emulated_store(int tile, void* to, int64_t stride) {
  EmulatedTile* from = emulated(tile);
  for (int r = 0; r < 16; r++) memcpy((uint8_t*)to + r * stride, (*from)[r], 64);
}

static inline void emulated_bf16(int sums, int left, int right) {
  EmulatedTile *c = emulated(sums), *a = emulated(left), *b = emulated(right);
  for (int r = 0; r < 16; r++) {
    __m512 sum = _mm512_load_ps((*c)[r]);
    for (int k = 0; k < 16; k++) {
      int32_t pair;
      memcpy(&pair, (*a)[r] + 4 * k, sizeof pair);
      sum = _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32(pair), (__m512bh)_mm512_load_si512((*b)[k]));
    }
    _mm512_store_ps((*c)[r], sum);
  }
}

static inline void emulated_int8(int sums, int left, int right) {
  EmulatedTile *c = emulated(sums), *a = emulated(left), *b = emulated(right);
  for (int r = 0; r < 16; r++) {
    int32_t* sum = (int32_t*)(*c)[r];
    for (int k = 0; k < 16; k++) {
      const int8_t *group = (const int8_t*)(*a)[r] + 4 * k, *column = (const int8_t*)(*b)[k];
      for (int n = 0; n < 16; n++) {
        for (int i = 0; i < 4; i++) sum[n] += group[i] * column[4 * n + i];
      }
    }
  }
}

#undef _tile_zero
#undef _tile_loadd
#undef _tile_stream_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#undef _tile_dpbssd
#define _tile_loadconfig emulated_loadconfig
#define _tile_release emulated_release
#define _tile_zero emulated_zero
#define _tile_loadd emulated_load
#define _tile_stream_loadd emulated_load
#define _tile_stored emulated_store
#define _tile_dpbf16ps emulated_bf16
#define _tile_dpbssd emulated_int8
