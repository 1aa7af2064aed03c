// Threads: torch's own, so that two pools do not compete for the processor, in teams that share one piece of work.

#ifndef M2D_PARALLEL_H
#define M2D_PARALLEL_H

#include <limits.h>
#include <sched.h>
#include <stdatomic.h>
#include <stddef.h>

#ifdef __linux__
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

// The entry points of the OpenMP runtime that torch has loaded; any that speaks GNU's interface will do.
typedef struct {
  void (*parallel)(void (*)(void*), void*, unsigned, unsigned);
  int (*thread_number)(void);
  int (*num_threads)(void);
} Runtime;

typedef struct {
  atomic_int arrived;
  atomic_int round;
  atomic_int asleep;
  char padding[52];  // a cache line for each team
} Barrier;

typedef struct {
  int rank, size;
  Barrier* barrier;
} Team;

enum { SPINS = 2000 };  // some ten microseconds to a hundred, about what it takes to sleep and be woken

static inline void pause_briefly(void) {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

// Until `word` is no longer `value`, or without a reason.
static inline void sleep_while(atomic_int* word, int value) {
#ifdef __linux__
  syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, NULL, NULL, 0);
#else
  (void)word, (void)value;
  sched_yield();
#endif
}

static inline void wake_all(atomic_int* word) {
#ifdef __linux__
  syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
#else
  (void)word;
#endif
}

// A member that waits longer gives its core to whoever else needs it, which may be the member that it waits for: there
// may be more threads than cores, of this process or of others.
static inline void wait_for_all(Team team) {
  if (team.size == 1) return;
  Barrier* barrier = team.barrier;
  int round = atomic_load_explicit(&barrier->round, memory_order_acquire);
  if (atomic_fetch_add_explicit(&barrier->arrived, 1, memory_order_acq_rel) == team.size - 1) {
    atomic_store_explicit(&barrier->arrived, 0, memory_order_relaxed);
    atomic_store(&barrier->round, round + 1);
    if (atomic_load(&barrier->asleep)) wake_all(&barrier->round);
    return;
  }
  for (int spins = 0; spins < SPINS; spins++) {
    if (atomic_load_explicit(&barrier->round, memory_order_acquire) != round) return;
    pause_briefly();
  }
  atomic_fetch_add(&barrier->asleep, 1);
  while (atomic_load(&barrier->round) == round) sleep_while(&barrier->round, round);
  atomic_fetch_sub(&barrier->asleep, 1);
}

typedef struct {
  long first, stop;
} Share;

// What one member of a team does of so many equal pieces.
static inline Share share_of(Team team, long pieces) {
  return (Share){pieces * team.rank / team.size, pieces * (team.rank + 1) / team.size};
}

#endif
