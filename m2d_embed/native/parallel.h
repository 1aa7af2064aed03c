// Threads: torch's own, so that two pools do not compete for the processor, in teams that share one piece of work.

#ifndef M2D_PARALLEL_H
#define M2D_PARALLEL_H

#include <sched.h>
#include <stdatomic.h>

// The entry points of the OpenMP runtime that torch has loaded; any that speaks GNU's interface will do.
typedef struct {
  void (*parallel)(void (*)(void*), void*, unsigned, unsigned);
  int (*thread_number)(void);
  int (*num_threads)(void);
} Runtime;

typedef struct {
  atomic_int arrived;
  atomic_int round;
  char padding[56];  // a cache line for each team
} Barrier;

typedef struct {
  int rank, size;
  Barrier* barrier;
} Team;

enum { SPINS = 20000 };

static inline void wait_for_all(Team team) {
  if (team.size == 1) return;
  int round = atomic_load_explicit(&team.barrier->round, memory_order_acquire);
  if (atomic_fetch_add_explicit(&team.barrier->arrived, 1, memory_order_acq_rel) == team.size - 1) {
    atomic_store_explicit(&team.barrier->arrived, 0, memory_order_relaxed);
    atomic_store_explicit(&team.barrier->round, round + 1, memory_order_release);
    return;
  }
  for (long spins = 0; atomic_load_explicit(&team.barrier->round, memory_order_acquire) == round; spins++) {
    if (spins < SPINS) {
      __builtin_ia32_pause();
    } else {
      sched_yield();
    }
  }
}

typedef struct {
  long first, stop;
} Share;

// What one member of a team does of so many equal pieces.
static inline Share share_of(Team team, long pieces) {
  return (Share){pieces * team.rank / team.size, pieces * (team.rank + 1) / team.size};
}

#endif
