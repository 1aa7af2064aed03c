"""The compiled library: whether it is there, what of it this processor can run, and whose threads it runs in.

What the processor says that it can do is asked in C (``processor.c``), and tried before it is used (``probe.py``).
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import sys
import threading
from collections.abc import Mapping
from ctypes import c_int64, c_size_t, c_uint32, c_void_p
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

from m2d_embed.backends.native.probe import Trial, faults
from m2d_embed.backends.native.structures import Runtime, abi_number
from m2d_embed.errors import ConfigError

log = logging.getLogger("m2d_embed")

#: What a block's products are computed in.
Arithmetic = Literal["fp32", "bf16", "int8"]
#: What of the processor computes them: a matrix unit, or vectors.
Unit = Literal["amx", "avx512_bf16", "avx512", "avx_vnni", "avx2", "neon_dot", "neon"]

ISA_VARIABLE = "M2D_EMBED_ISA"
_LARGE_PAGE = 2 << 20
_LIBRARY = Path(__file__).with_name("kernels.so")
_NAMES = 512  # bytes of the names of all features
_BYTES: dict[Arithmetic, int] = {"fp32": 4, "bf16": 2, "int8": 1}  # of a weight
_AVX2 = {"avx2", "fma", "f16c"}
_AVX512 = _AVX2 | {"avx512f", "avx512bw", "avx512vl", "avx512dq"}
_AVX512_BF16 = _AVX512 | {"avx512_bf16"}
_AMX = _AVX512_BF16 | {"amx_tile", "amx_bf16"}
#: What of the processor each kind needs in which unit, the fastest unit first.
_FEATURES: dict[Arithmetic, dict[Unit, set[str]]] = {
    "fp32": {"avx512": _AVX512, "avx2": _AVX2, "neon": {"asimd"}},
    "bf16": {"amx": _AMX, "avx512_bf16": _AVX512_BF16, "avx512": _AVX512, "avx2": _AVX2, "neon": {"asimd"}},
    "int8": {
        "amx": _AMX | {"amx_int8"},
        "avx512_bf16": _AVX512_BF16 | {"avx512_vnni"},
        "avx512": _AVX512 | {"avx512_vnni"},
        "avx_vnni": _AVX2 | {"avx_vnni"},
        "avx2": _AVX2,
        "neon_dot": {"asimd", "asimddp"},
        "neon": {"asimd"},
    },
}
#: What of the processor the kernels may use, by the value of ``M2D_EMBED_ISA``.
_LIMITS: dict[str, set[str]] = {
    "off": set(),
    "avx2": _AVX2,
    "avx_vnni": _AVX2 | {"avx_vnni"},
    "avx512": _AVX512,
    "avx512_vnni": _AVX512 | {"avx512_vnni"},
    "avx512_bf16": _AVX512_BF16 | {"avx512_vnni"},
    "amx": _AMX | {"amx_int8", "avx512_vnni"},
    "neon": {"asimd"},
    "neon_dot": {"asimd", "asimddp"},
}


#: Units whose kernels read matrices as tiles.
TILED: frozenset[Unit] = frozenset({"amx", "avx512_bf16"})


def functions_of(kind: Arithmetic, unit: Unit) -> str:
    """What the functions are called by that compute blocks."""
    if unit in TILED:
        return f"{unit.removesuffix('_bf16')}_tiles"
    return f"{unit}_{'int8' if kind == 'int8' else 'float'}"


class Kernels:
    """The library, and the runtime whose threads it runs in."""

    def __init__(self, library: ctypes.CDLL, runtime: Runtime, file: Path):
        self.library = library
        self.runtime = runtime
        self.file = file

    def features(self) -> set[str]:
        """What the processor says that it has and the system lets programs use, by Linux's names."""
        names = ctypes.create_string_buffer(_NAMES)
        self.library.m2d_processor(names, c_int64(len(names)))
        return set(names.value.decode().split())

    def request_amx(self) -> bool:
        """Ask the system for the use of the matrix unit, which is granted to whole processes."""
        return bool(self.library.m2d_request_amx() == 0)

    def faults(self, products: Mapping[Arithmetic, Unit]) -> dict[Arithmetic, str]:
        """What is wrong with kernels for kinds of products in units, in words, as tried in a child process."""
        trials = {kind: Trial(f"m2d_{functions_of(kind, unit)}_probe", _BYTES[kind]) for kind, unit in products.items()}
        found = faults(self.file, self.features(), [*trials.values()])
        return {kind: found[trial] for kind, trial in trials.items() if trial in found}


class LoadError(Exception):
    """Why there is no library to call."""


def kernels() -> Kernels | None:
    """The library, or None where there is none to call."""
    found = _attempt()
    return found if isinstance(found, Kernels) else None


def why_no_kernels() -> str:
    """Why there is no library to call, in words; "" if there is one."""
    found = _attempt()
    return str(found) if isinstance(found, LoadError) else ""


@cache
def _attempt() -> Kernels | LoadError:
    try:
        return load(_LIBRARY)
    except LoadError as error:
        if _LIBRARY.exists():
            log.warning("%s PyTorch does what they would do.", error)
        return error


def load(file: Path) -> Kernels:
    """The library of a file.

    Raises:
        LoadError: if it is not there, is no library, or was built of other sources than these; or torch has no OpenMP.
    """
    if not file.exists():
        raise LoadError("The kernels were not compiled when this package was installed; with a C compiler they are.")
    again = "install m2d-embed again to compile its kernels."
    try:
        library = ctypes.CDLL(str(file))
    except OSError as error:
        raise LoadError(f"{file} is no library for this system ({error}); {again}") from error
    if not hasattr(library, "m2d_abi"):
        raise LoadError(f"{file} is not of these sources, it states no ABI number; {again}")
    library.m2d_abi.argtypes, library.m2d_abi.restype = [], c_uint32
    if library.m2d_abi() != abi_number():
        numbers = f"its ABI number is {library.m2d_abi():08x}, not {abi_number():08x}"
        raise LoadError(f"{file} is not of these sources, {numbers}; {again}")
    return Kernels(library, openmp(), file)


def openmp() -> Runtime:
    """The OpenMP runtime that torch has loaded.

    Raises:
        LoadError: if there is none that speaks GNU's interface.
    """
    names = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
    # On macOS what it has loaded may not be seen from everywhere.
    for place in (None, *map(str, Path(torch.__file__).parent.glob("lib/lib*omp.dylib"))):
        loaded = ctypes.CDLL(place)
        if all(hasattr(loaded, name) for name in names):
            return Runtime(*(ctypes.cast(getattr(loaded, name), c_void_p).value for name in names))
    raise LoadError("torch runs without an OpenMP runtime of an interface known to the kernels.")


def isa_limit() -> str | None:
    """The value of ``M2D_EMBED_ISA``: the most of the processor that kernels may use; None if it is not set.

    Raises:
        ConfigError: if it is none of those that there are.
    """
    value = os.environ.get(ISA_VARIABLE, "").strip().lower()
    if value and value not in _LIMITS:
        raise ConfigError(
            f"{ISA_VARIABLE}={os.environ[ISA_VARIABLE]} is not possible; choose one of {', '.join(_LIMITS)}, "
            "or unset it for all that the processor can do."
        )
    return value or None


@cache
def available() -> Mapping[Arithmetic, Unit]:
    """The kinds of products that there are kernels for on this machine, and what computes them.

    The first time on a machine, a child process tries them.

    Raises:
        ConfigError: as ``isa_limit``.
    """
    limit = isa_limit()
    allowed = None if limit is None else _LIMITS[limit]
    compiled = kernels() if allowed is None or allowed else None
    if compiled is None:
        return MappingProxyType({})
    flags = compiled.features() if allowed is None else compiled.features() & allowed
    missing = set() if flags >= _AMX and compiled.request_amx() else {"amx"}
    possible: dict[Arithmetic, list[Unit]] = {
        kind: [unit for unit, features in units.items() if features <= flags and unit not in missing]
        for kind, units in _FEATURES.items()
    }
    return MappingProxyType(_working(compiled, possible))


def _working(compiled: Kernels, possible: Mapping[Arithmetic, list[Unit]]) -> dict[Arithmetic, Unit]:
    """The first unit of each kind whose kernels work; what is wrong with those before is said, once."""
    excluded: list[str] = []
    while True:
        chosen = {kind: units[0] for kind, units in possible.items() if units}
        wrong = compiled.faults(chosen)
        if not wrong:
            break
        for kind, fault in wrong.items():
            excluded.append(f"{kind} {possible[kind].pop(0)} {fault}")
    if excluded:
        log.warning(
            "This processor does not do all that it says it can; kernels that are not used: %s. %s caps what is tried.",
            "; ".join(excluded),
            ISA_VARIABLE,
        )
    return chosen


def in_large_pages(size: int) -> Tensor:
    """(size,) uint8 of unset memory on the CPU, in pages of 2 MiB where the system has them to give.

    Matrix products read so much memory that looking up where its pages are takes some time.
    """
    memory = torch.empty(size, dtype=torch.uint8, device="cpu")
    if size >= _LARGE_PAGE and sys.platform == "linux":
        start, stop = memory.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE, memory.data_ptr() + size
        # It is advice: whether or not it is taken, the memory can be used.
        ctypes.CDLL(None).madvise(c_void_p(start), c_size_t(stop - start), mmap.MADV_HUGEPAGE)
    return memory


class Scratch(threading.local):
    """Memory of a thread for what a kernel has between its input and its output."""

    def __init__(self) -> None:
        self.memory = torch.empty(0, dtype=torch.uint8, device="cpu")

    def address(self, size: int) -> int:
        """Where ``size`` bytes are."""
        if len(self.memory) < size:
            self.memory = in_large_pages(size)
        return self.memory.data_ptr()
