// Who does which windows: a team for each window or more, until all threads are in one.

#ifndef M2D_TEAMS_H
#define M2D_TEAMS_H

#include "blocks.h"

enum { MOST_TEAMS = 256 };

typedef void (*Work)(const Call* call, Team team, int64_t first, int64_t stop, uint8_t* scratch);

typedef struct {
  const Call* call;
  Work work;
  int64_t teams, scratch_per_team;
  Barrier barriers[MOST_TEAMS];
} Region;

static inline int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t at_least(int64_t a, int64_t b) { return a > b ? a : b; }
static inline float at_least_float(float a, float b) { return a > b ? a : b; }
static inline int64_t rounded_up(int64_t a, int64_t to) { return (a + to - 1) / to * to; }

// As many teams as make the one with the most to do finish first; the members of a team wait for one another now and
// then, which is put at a tenth.
static inline int64_t num_teams(int64_t windows, int64_t threads) {
  int64_t best = 1;
  double least = 0;
  for (int64_t teams = at_most(at_most(windows, threads), MOST_TEAMS); teams >= 1; teams--) {
    int64_t members = threads / teams;
    double time = (double)((windows + teams - 1) / teams) / members * (members > 1 ? 1.1 : 1.0);
    if (least == 0 || time < least) least = time, best = teams;
  }
  return best;
}

// The windows of a team that go through a block together, of at most so many: chunks that are as good as equal, since a
// small one costs almost as much reading of weights as a large one.
static inline int64_t end_of_chunk(int64_t window, int64_t stop, int64_t most) {
  int64_t left = stop - window, chunks = (left + most - 1) / most;
  return window + (left + chunks - 1) / chunks;
}

static void run_member(void* pointer) {
  Region* region = pointer;
  const Call* call = region->call;
  int64_t threads = call->runtime->num_threads(), thread = call->runtime->thread_number();
  int64_t teams = at_most(region->teams, threads);  // the runtime may give fewer threads than were asked for
  int64_t number = thread * teams / threads;        // of this thread's team
  int64_t first_member = (number * threads + teams - 1) / teams;
  int64_t next_team = ((number + 1) * threads + teams - 1) / teams;
  Team team = {thread - first_member, next_team - first_member, &region->barriers[number]};
  int64_t first = call->windows * number / teams, stop = call->windows * (number + 1) / teams;
  region->work(call, team, first, stop, call->scratch + number * region->scratch_per_team);
}

static inline void run_in_teams(const Call* call, Work work, int64_t scratch_per_team) {
  Region region = {call, work, num_teams(call->windows, call->threads), scratch_per_team, {{0}}};
  call->runtime->parallel(run_member, &region, call->threads, 0);
}

#endif
