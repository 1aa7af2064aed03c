"""Compiled kernels for CPUs: the log-mel, tokens, and transformer blocks.

There are kernels for AVX2, AVX-512 and NEON in float32, with weights in float32 or bfloat16, and in int8, for which
AVX-VNNI, AVX-512 VNNI and Arm's dot products are used; and for Intel's matrix unit (AMX) and AVX-512's dot products of
bfloat16 in bfloat16 and int8.

They are compiled when the package is built, if there is a C compiler (``hatch_build.py``). Where they are missing, or
the processor lacks the instructions, ``packed.py`` and ``frontend.py`` do the same through PyTorch: ``backends.py``
chooses. ``library.py`` asks the processor and tries what it says in a child process; ``M2D_EMBED_ISA`` caps what is
used of it, or switches the kernels off.

The library is plain C, called through ctypes, which lets go of the GIL; it holds no state and no threads of its own. It
runs in the threads of the OpenMP runtime that torch has loaded, as many as ``torch.get_num_threads()``.
"""

from m2d_embed.backends.native.blocks import BlockLike, NativeBlocks, Shape, fits, rounded_to_int8
from m2d_embed.backends.native.library import (
    ISA_VARIABLE,
    TILED,
    Arithmetic,
    Unit,
    available,
    isa_limit,
    kernels,
    why_no_kernels,
)
from m2d_embed.backends.native.log_mel import NativeLogMel
from m2d_embed.backends.native.tokens import fits_tokens, make_tokens

__all__ = [
    "ISA_VARIABLE",
    "TILED",
    "Arithmetic",
    "BlockLike",
    "NativeBlocks",
    "NativeLogMel",
    "Shape",
    "Unit",
    "available",
    "fits",
    "fits_tokens",
    "isa_limit",
    "kernels",
    "make_tokens",
    "rounded_to_int8",
    "why_no_kernels",
]
