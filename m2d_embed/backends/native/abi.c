// A number for what Python and the kernels have to agree on, so that a library of other sources is never called.

#include <stddef.h>

#include "blocks.h"
#include "log_mel.h"

enum { MEANING = 3 };  // raise it when a field changes its meaning and not its place

// Sizes of all structures, each followed by offset and size of its fields, in their order; native/structures.py has the
// same.
#define AT(field) offsetof(STRUCTURE, field), sizeof(((STRUCTURE*)0)->field)
static const uint32_t layout[] = {
    MEANING,
#define STRUCTURE Runtime
    sizeof(STRUCTURE), AT(parallel), AT(thread_number), AT(num_threads),
#undef STRUCTURE
#define STRUCTURE Linear
    sizeof(STRUCTURE), AT(weight), AT(scales), AT(bias), AT(bias_format), AT(weight_format),
#undef STRUCTURE
#define STRUCTURE Norm
    sizeof(STRUCTURE), AT(weight), AT(bias), AT(eps),
#undef STRUCTURE
#define STRUCTURE Block
    sizeof(STRUCTURE), AT(dim), AT(hidden), AT(heads), AT(quantized), AT(norm1), AT(norm2), AT(qkv), AT(proj), AT(fc1),
    AT(fc2),
#undef STRUCTURE
#define STRUCTURE Call
    sizeof(STRUCTURE), AT(blocks), AT(num_blocks), AT(x), AT(windows), AT(tokens), AT(scratch), AT(runtime),
    AT(threads), AT(rows), AT(features), AT(norm),
#undef STRUCTURE
#define STRUCTURE TokensCall
    sizeof(STRUCTURE), AT(call), AT(log_mel), AT(window_stride), AT(mel_stride), AT(rows), AT(columns), AT(height),
    AT(width), AT(dim), AT(grid_columns), AT(projection), AT(class_token), AT(positions),
#undef STRUCTURE
#define STRUCTURE LogMel
    sizeof(STRUCTURE), AT(n_fft), AT(hop), AT(mels), AT(stages), AT(window), AT(radices), AT(twiddles), AT(split),
    AT(first_bins), AT(num_bins), AT(weights), AT(eps), AT(mean), AT(std),
#undef STRUCTURE
#define STRUCTURE LogMelCall
    sizeof(STRUCTURE), AT(settings), AT(samples), AT(clips), AT(clip_stride), AT(frames), AT(out), AT(runtime),
    AT(scratch), AT(threads),
#undef STRUCTURE
};

// FNV-1a of 32 bits, of whole numbers instead of bytes.
uint32_t m2d_abi(void) {
  uint32_t hash = 2166136261u;
  for (size_t i = 0; i < sizeof(layout) / sizeof(layout[0]); i++) hash = (hash ^ layout[i]) * 16777619u;
  return hash;
}
