"""Compiled kernels for CPUs: transformer blocks (AMX for bfloat16 and int8, AVX-512 for float32), and the log-mel.

They are compiled when the package is built, if there is a C compiler, for Linux on x86 (``hatch_build.py``). Where they
are missing, or the processor lacks the instructions, ``packed.py`` and ``frontend.py`` do the same through PyTorch.

The library is plain C, called through ctypes, which lets go of the GIL; it holds no state and no threads of its own. It
runs in the threads of the OpenMP runtime that torch has loaded, as many as ``torch.get_num_threads()``.
"""

from m2d_embed.native.blocks import BlockLike, NativeBlock, Scratch, fits, rounded_to_int8
from m2d_embed.native.library import Kind, available, is_eager_on_cpu, kernels
from m2d_embed.native.log_mel import NativeLogMel

__all__ = [
    "BlockLike",
    "Kind",
    "NativeBlock",
    "NativeLogMel",
    "Scratch",
    "available",
    "fits",
    "is_eager_on_cpu",
    "kernels",
    "rounded_to_int8",
]
