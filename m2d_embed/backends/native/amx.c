// The blocks of tiles.h on Intel's matrix unit (AMX).

#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

enum {
  HIDDEN_BYTES = 640 << 10,
  CHUNK_ROWS = 384,
  LEVELS_ARE_UNSIGNED = 0,
};

#include "tiles.h"

typedef struct {
  uint8_t palette, start_row, reserved[14];
  uint16_t bytes_per_row[16];
  uint8_t rows[16];
} __attribute__((aligned(64))) TileConfig;

INLINE void begin_products(void) {
  TileConfig config = {.palette = 1};
  for (int i = 0; i < 8; i++) config.bytes_per_row[i] = 64, config.rows[i] = TILE_ROWS;
  __asm__ volatile("" ::"r"(&config) : "memory");  // GCC takes it to read no more than 8 bytes
  _tile_loadconfig(&config);
}

INLINE void end_products(void) { _tile_release(); }

INLINE __m512i surplus_of(const uint8_t* b, int64_t steps) {
  (void)b, (void)steps;
  return _mm512_setzero_si512();
}

#define ADD_PRODUCT(sums, a, b)   \
  do {                            \
    if (is_int8)                  \
      _tile_dpbssd(sums, a, b);   \
    else                          \
      _tile_dpbf16ps(sums, a, b); \
  } while (0)

// A comes from further away than B, which is used again soon: the streaming load leaves B in the nearest cache. The
// vector units finish the last product while the matrix unit computes this one.
INLINE void multiply(Factors f, int row_tiles, int is_int8, Sums sums, const Beside* beside) {
  const uint8_t *a = f.a, *a1 = a + (row_tiles - 1) * f.steps * TILE, *b = f.b, *b1 = b + f.b_stride;
  uint8_t* c = sums.c;
  __asm__ volatile("" ::: "memory");  // the loads of tiles are not known to read memory
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t k = 0; k < f.steps; k++) {
    _tile_stream_loadd(4, a + k * TILE, 64);
    _tile_loadd(6, b + k * TILE, 64);
    ADD_PRODUCT(0, 4, 6);
    _tile_loadd(7, b1 + k * TILE, 64);
    ADD_PRODUCT(1, 4, 7);
    if (row_tiles == 2) {
      _tile_stream_loadd(5, a1 + k * TILE, 64);
      ADD_PRODUCT(2, 5, 6);
      ADD_PRODUCT(3, 5, 7);
    }
    if (beside) fetch(beside->ahead), finish_some(beside);
  }
  _tile_stored(0, c, sums.row);
  _tile_stored(1, c + sums.column_tile, sums.row);
  if (row_tiles == 2) {
    _tile_stored(2, c + sums.row_tile, sums.row);
    _tile_stored(3, c + sums.row_tile + sums.column_tile, sums.row);
  }
}

#ifdef SYS_arch_prctl  // not where generic vectors stand for the unit
// Ask the system for the use of tiles, for the whole process; 0 if it is granted.
int m2d_request_amx(void) {
  enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };
  return (int)syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA);
}
#endif

int64_t m2d_amx_tiles_scratch(const Call* call) { return bytes_of_scratch(call); }
void m2d_amx_tiles_run(const Call* call) { run_blocks(call); }
int m2d_amx_tiles_probe(int bytes) { return probe_blocks(m2d_amx_tiles_scratch, m2d_amx_tiles_run, bytes); }
