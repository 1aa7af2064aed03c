"""The structures that Python and the kernels agree on, as ``parallel.h``, ``blocks.h`` and ``log_mel.h`` declare them.

``abi_number`` is what ``abi.c`` computes of the compiler's offsets and sizes: equal numbers, equal structures.
"""

from __future__ import annotations

from collections.abc import Iterator
from ctypes import POINTER, Structure, c_float, c_int32, c_int64, c_void_p, sizeof

_MEANING = 3  # as in abi.c


class Runtime(Structure):
    """The entry points of OpenMP."""

    _fields_ = (("parallel", c_void_p), ("thread_number", c_void_p), ("num_threads", c_void_p))


class Linear(Structure):
    """A layer, laid out as its kernel reads it."""

    _fields_ = (
        ("weight", c_void_p),
        ("scales", c_void_p),
        ("bias", c_void_p),
        ("bias_format", c_int32),
        ("weight_format", c_int32),
    )


class Norm(Structure):
    """A layer norm; weight and bias may be NULL."""

    _fields_ = (("weight", c_void_p), ("bias", c_void_p), ("eps", c_float))


class Block(Structure):
    """A transformer block."""

    _fields_ = (
        *((name, c_int32) for name in ("dim", "hidden", "heads", "quantized")),
        *((name, Norm) for name in ("norm1", "norm2")),
        *((name, Linear) for name in ("qkv", "proj", "fc1", "fc2")),
    )


class Call(Structure):
    """The residual stream, and what works on it."""

    _fields_ = (
        ("blocks", POINTER(Block)),
        ("num_blocks", c_int64),
        ("x", c_void_p),
        ("windows", c_int64),
        ("tokens", c_int64),
        ("scratch", c_void_p),
        ("runtime", POINTER(Runtime)),
        ("threads", c_int32),
        ("rows", c_int32),
        ("features", POINTER(c_void_p)),
        ("norm", POINTER(Norm)),
    )


class TokensCall(Structure):
    """What goes into the first block."""

    _fields_ = (
        ("call", Call),
        ("log_mel", c_void_p),
        *((name, c_int64) for name in ("window_stride", "mel_stride")),
        *((name, c_int32) for name in ("rows", "columns", "height", "width", "dim", "grid_columns")),
        ("projection", Linear),
        *((name, c_void_p) for name in ("class_token", "positions")),
    )


class LogMel(Structure):
    """The tables of a log-mel."""

    _fields_ = (
        *((name, c_int32) for name in ("n_fft", "hop", "mels", "stages")),
        *((name, c_void_p) for name in ("window", "radices", "twiddles", "split", "first_bins", "num_bins", "weights")),
        *((name, c_float) for name in ("eps", "mean", "std")),
    )


class LogMelCall(Structure):
    """Clips, and where their log-mels go."""

    _fields_ = (
        ("settings", POINTER(LogMel)),
        ("samples", c_void_p),
        ("clips", c_int64),
        ("clip_stride", c_int64),
        ("frames", c_int64),
        ("out", c_void_p),
        ("runtime", POINTER(Runtime)),
        ("scratch", c_void_p),
        ("threads", c_int32),
    )


_ALL: tuple[type[Structure], ...] = (Runtime, Linear, Norm, Block, Call, TokensCall, LogMel, LogMelCall)


def abi_number() -> int:
    """FNV-1a, of 32 bits, of what ``_layout`` yields."""
    number = 2166136261
    for value in _layout():
        number = (number ^ value) * 16777619 % 2**32
    return number


def _layout() -> Iterator[int]:
    """The size of each structure, and after it offset and size of its fields, in their order."""
    yield _MEANING
    for structure in _ALL:
        yield sizeof(structure)
        for name, *_ in structure._fields_:
            field = getattr(structure, name)
            yield from (field.offset, field.size)
