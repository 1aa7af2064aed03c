"""The compiled library: whether it is there, what of it this processor can run, and whose threads it runs in."""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Mapping
from ctypes import Structure, c_size_t, c_void_p
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

#: What a block's products are computed in.
Kind = Literal["fp32", "bf16", "int8"]
#: What of the processor computes them: the matrix unit, or vectors.
Unit = Literal["amx", "avx512"]

_LARGE_PAGE = 2 << 20
_LIBRARY = Path(__file__).with_name("kernels.so")
_CPUINFO = Path("/proc/cpuinfo")
_AVX512 = {"avx512f", "avx512bw", "avx512vl", "avx512dq", "fma"}
_AVX512_BF16 = _AVX512 | {"avx512_bf16"}
_AMX = _AVX512_BF16 | {"amx_tile", "amx_bf16"}
#: What of the processor each kind needs in which unit, the faster unit first.
_FEATURES: dict[Kind, dict[Unit, set[str]]] = {
    "fp32": {"avx512": _AVX512},
    "bf16": {"amx": _AMX, "avx512": _AVX512_BF16},
    "int8": {"amx": _AMX | {"amx_int8"}, "avx512": _AVX512_BF16 | {"avx512_vnni"}},
}


class Runtime(Structure):
    """``parallel.h``: the entry points of OpenMP."""

    _fields_ = (("parallel", c_void_p), ("thread_number", c_void_p), ("num_threads", c_void_p))


class Kernels:
    """The library, and the runtime whose threads it runs in."""

    def __init__(self, library: ctypes.CDLL, runtime: Runtime):
        self.library = library
        self.runtime = runtime

    def request_amx(self) -> bool:
        """Ask the system for the use of the matrix unit, which is granted to whole processes."""
        return bool(self.library.m2d_request_amx() == 0)


@cache
def kernels() -> Kernels | None:
    """The library, or None where it was not built, or torch runs without an OpenMP runtime of a known interface."""
    if not _LIBRARY.exists():
        return None
    try:
        everything = ctypes.CDLL(None)
        names = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
        addresses = [ctypes.cast(getattr(everything, name), c_void_p).value for name in names]
        return Kernels(ctypes.CDLL(str(_LIBRARY)), Runtime(*addresses))
    except (OSError, AttributeError):
        return None


@cache
def available() -> Mapping[Kind, Unit]:
    """The kinds of products that there are kernels for on this machine, and what computes them."""
    library = kernels()
    if library is None:
        return MappingProxyType({})
    flags = _processor_flags()
    missing = set() if flags >= _AMX and library.request_amx() else {"amx"}
    found: dict[Kind, Unit] = {}
    for kind, units in _FEATURES.items():
        possible = [unit for unit, features in units.items() if features <= flags and unit not in missing]
        if possible:
            found[kind] = possible[0]
    return MappingProxyType(found)


def in_large_pages(size: int) -> Tensor:
    """(size,) uint8 of unset memory on the CPU, in pages of 2 MiB where the system has them to give.

    Matrix products read so much memory that looking up where its pages are takes some time.
    """
    memory = torch.empty(size, dtype=torch.uint8, device="cpu")
    if size >= _LARGE_PAGE and sys.platform == "linux":
        start, stop = memory.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE, memory.data_ptr() + size
        # It is advice: whatever comes of it, the memory can be used.
        ctypes.CDLL(None).madvise(c_void_p(start), c_size_t(stop - start), mmap.MADV_HUGEPAGE)
    return memory


def is_eager_on_cpu(x: Tensor) -> bool:
    """Whether ``x`` is a plain tensor in the CPU's memory, and nobody traces or compiles what is done with it."""
    return (
        type(x) is Tensor
        and x.device.type == "cpu"
        and not torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]  # torch.jit does not list it
        and not torch.compiler.is_compiling()
    )


def _processor_flags() -> set[str]:
    lines = _CPUINFO.read_text().splitlines() if _CPUINFO.exists() else []
    return next((set(line.partition(":")[2].split()) for line in lines if line.startswith("flags")), set())
