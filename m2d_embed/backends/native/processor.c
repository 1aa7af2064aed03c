// What the processor says that it has and the system saves of it, by the names that library.py and Linux have for it;
// on x86 also which model it is, so that what was tried on one processor is tried again on another.

#include <stdint.h>
#include <stdio.h>
#include <string.h>

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

typedef struct {
  char* to;
  size_t left;
} Names;

static void add(Names* names, const char* name, int is_there) {
  size_t length = strlen(name);
  if (!is_there || length + 2 > names->left) return;
  memcpy(names->to, name, length);
  memcpy(names->to + length, " ", 2);
  names->to += length + 1, names->left -= length + 1;
}

#if defined(__x86_64__)

typedef struct {
  unsigned a, b, c, d;
} Registers;

static Registers cpuid(unsigned leaf, unsigned part) {
  Registers r = {0, 0, 0, 0};
  __get_cpuid_count(leaf, part, &r.a, &r.b, &r.c, &r.d);  // a leaf that is not there leaves zeros
  return r;
}

static int bit(unsigned value, int number) { return (int)(value >> number & 1); }

// The registers that the system saves when it switches between threads.
static uint64_t saved_registers(void) {
  if (!bit(cpuid(1, 0).c, 27)) return 0;
  unsigned low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (uint64_t)high << 32 | low;
}

static void add_all(Names* names) {
  enum { AVX = 0x6, AVX512 = 0xe6, AMX = 0x60000 };
  Registers one = cpuid(1, 0), seven = cpuid(7, 0), more = {0, 0, 0, 0};
  if (seven.a >= 1) more = cpuid(7, 1);
  uint64_t saved = saved_registers();
  int avx = (saved & AVX) == AVX && bit(one.c, 28), avx512 = avx && (saved & AVX512) == AVX512;
  int amx = (saved & AMX) == AMX;
  char model[24];
  snprintf(model, sizeof model, "model_%08x", one.a);
  add(names, model, 1);
  add(names, "hypervisor", bit(one.c, 31));
  add(names, "fma", avx && bit(one.c, 12));
  add(names, "f16c", avx && bit(one.c, 29));
  add(names, "avx2", avx && bit(seven.b, 5));
  add(names, "avx_vnni", avx && bit(more.a, 4));
  add(names, "avx512f", avx512 && bit(seven.b, 16));
  add(names, "avx512dq", avx512 && bit(seven.b, 17));
  add(names, "avx512bw", avx512 && bit(seven.b, 30));
  add(names, "avx512vl", avx512 && bit(seven.b, 31));
  add(names, "avx512_vnni", avx512 && bit(seven.c, 11));
  add(names, "avx512_bf16", avx512 && bit(more.a, 5));
  add(names, "amx_tile", amx && bit(seven.d, 24));
  add(names, "amx_bf16", amx && bit(seven.d, 22));
  add(names, "amx_int8", amx && bit(seven.d, 25));
}

#elif defined(__aarch64__) && defined(__linux__)

static void add_all(Names* names) {
  unsigned long first = getauxval(AT_HWCAP), second = getauxval(AT_HWCAP2);  // bits as in the kernel's asm/hwcap.h
  add(names, "asimd", (int)(first >> 1 & 1));
  add(names, "asimddp", (int)(first >> 20 & 1));
  add(names, "i8mm", (int)(second >> 13 & 1));
  add(names, "bf16", (int)(second >> 14 & 1));
}

#elif defined(__aarch64__) && defined(__APPLE__)

static int says(const char* question) {
  int answer = 0;
  size_t size = sizeof answer;
  return sysctlbyname(question, &answer, &size, NULL, 0) == 0 && answer;
}

static void add_all(Names* names) {
  add(names, "asimd", 1);  // of every such processor
  add(names, "asimddp", says("hw.optional.arm.FEAT_DotProd"));
  add(names, "i8mm", says("hw.optional.arm.FEAT_I8MM"));
  add(names, "bf16", says("hw.optional.arm.FEAT_BF16"));
}

#else

static void add_all(Names* names) { (void)names; }

#endif

// Names, with a space after each, of as many as there is room for in `size` bytes.
void m2d_processor(char* names, int64_t size) {
  Names all = {names, (size_t)size};
  names[0] = 0;
  add_all(&all);
}
