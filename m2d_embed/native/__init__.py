"""Compiled kernels for CPUs: the log-mel, tokens, and transformer blocks.

float32 is for AVX-512; bfloat16 and int8 are for Intel's matrix unit (AMX) or, where there is none, AVX-512's dot
products.

They are compiled when the package is built, if there is a C compiler, for Linux on x86 (``hatch_build.py``). Where they
are missing, or the processor lacks the instructions, ``packed.py`` and ``frontend.py`` do the same through PyTorch:
``backends.py`` chooses. ``M2D_EMBED_ISA`` caps what they use of the processor, or switches them off.

The library is plain C, called through ctypes, which lets go of the GIL; it holds no state and no threads of its own. It
runs in the threads of the OpenMP runtime that torch has loaded, as many as ``torch.get_num_threads()``.
"""

from m2d_embed.native.blocks import BlockLike, NativeBlocks, Shape, fits, rounded_to_int8
from m2d_embed.native.library import ISA_VARIABLE, Kind, Unit, available, isa_limit, kernels, why_no_kernels
from m2d_embed.native.log_mel import NativeLogMel
from m2d_embed.native.tokens import fits_tokens, make_tokens

__all__ = [
    "ISA_VARIABLE",
    "BlockLike",
    "Kind",
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
