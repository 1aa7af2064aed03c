// A unit's self-test: one small block. Python runs it in a child process, which dies where a hypervisor or emulator
// says that there are instructions that are not.

#ifndef M2D_PROBE_H
#define M2D_PROBE_H

#include <stdlib.h>

#include "blocks.h"

static void probe_parallel(void (*work)(void*), void* argument, unsigned threads, unsigned flags) {
  (void)threads, (void)flags;
  work(argument);
}
static int probe_thread(void) { return 0; }
static int probe_threads(void) { return 1; }

// Whether the numbers are right, of weights of 4 (float32), 2 (bfloat16) or 1 byte (int8).
static int probe_blocks(int64_t (*scratch_of)(const Call*), void (*run)(const Call*), int bytes) {
  enum { DIM = 64, HEADS = 2, TOKENS = 3, OUTPUTS = 3 * DIM, WEIGHTS = OUTPUTS * DIM };
  float x[TOKENS * DIM], before[TOKENS * DIM], quarters[DIM], scales[OUTPUTS];
  for (int i = 0; i < TOKENS * DIM; i++) x[i] = before[i] = (float)(i % 7 - 3);
  for (int i = 0; i < DIM; i++) quarters[i] = 0.25f;
  for (int i = 0; i < OUTPUTS; i++) scales[i] = 1.0f / 4096;
  Linear any = {.scales = bytes == 1 ? scales : NULL, .weight_format = bytes == 2 ? BFLOAT16 : FLOAT32};
  Norm norm = {NULL, quarters, 1e-6f};
  Block block = {DIM, DIM, HEADS, bytes == 1, norm, norm, any, any, any, any};
  Runtime alone = {probe_parallel, probe_thread, probe_threads};
  Call call = {.blocks = &block, .num_blocks = 1, .x = x, .windows = 1, .tokens = TOKENS, .runtime = &alone,
               .threads = 1, .rows = 1};
  uint8_t* memory = malloc((size_t)(64 + 4 * WEIGHTS + scratch_of(&call)));
  if (!memory) return 0;
  uint8_t* weights = memory + (64 - (uintptr_t)memory % 64);
  call.scratch = weights + 4 * WEIGHTS;
  // 1 / 64 each, so that the order in which a unit reads them does not matter.
  for (int i = 0; i < WEIGHTS; i++) {
    if (bytes == 4) ((float*)weights)[i] = 1.0f / 64;
    if (bytes == 2) ((uint16_t*)weights)[i] = 0x3c80;
    if (bytes == 1) weights[i] = 64;
  }
  block.qkv.weight = block.proj.weight = block.fc1.weight = block.fc2.weight = weights;
  block.proj.bias = quarters;
  run(&call);
  free(memory);
  // A norm's values add up to 64 quarters, so all products are 1/4, and those of the last matrix gelu(1/4).
  int wrong = 0;
  for (int i = 0; i < TOKENS * DIM; i++) wrong += !(__builtin_fabsf(x[i] - before[i] - 0.649677f) < 0.02f);
  return !wrong;
}

#endif
