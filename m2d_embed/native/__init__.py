"""Transformer blocks as compiled kernels: AMX for bfloat16 and int8, AVX-512 for float32 (``amx.c``, ``fp32.c``).

They are compiled when the package is built, if there is a C compiler, for Linux on x86 (``hatch_build.py``). Where they
are missing, or the processor lacks the instructions, ``packed.py`` does the same through oneDNN.

The library is plain C, called through ctypes, which lets go of the GIL; it holds no state and no threads of its own. It
runs in the threads of the OpenMP runtime that torch has loaded, as many as ``torch.get_num_threads()``.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from ctypes import POINTER, Structure, byref, c_float, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

#: What a block's products are computed in.
Kind = Literal["fp32", "bf16", "int8"]

_LIBRARY = Path(__file__).with_name("kernels.so")
_CPUINFO = Path("/proc/cpuinfo")
_FEATURES: dict[Kind, set[str]] = {
    "fp32": {"avx512f", "avx512bw", "avx512vl", "avx512dq", "fma"},
    "bf16": {"avx512f", "avx512bw", "avx512vl", "avx512dq", "fma", "avx512_bf16", "amx_tile", "amx_bf16"},
    "int8": {"avx512f", "avx512bw", "avx512vl", "avx512dq", "fma", "avx512_bf16", "amx_tile", "amx_bf16", "amx_int8"},
}
#: Widths must be multiples of these: of a block's vectors, of those of one head.
_MULTIPLES: dict[Kind, tuple[int, int]] = {"fp32": (64, 32), "bf16": (32, 32), "int8": (64, 32)}
_INT8_LARGEST = 127
_SMALLEST_SCALE = 1e-12


# --- what blocks.h declares -------------------------------------------------------------------------------------------


class _Linear(Structure):
    _fields_ = (("weight", c_void_p), ("scales", c_void_p), ("bias", c_void_p), ("bias_is_bf16", c_int32))


class _Norm(Structure):
    _fields_ = (("weight", c_void_p), ("bias", c_void_p), ("eps", c_float))


class _Block(Structure):
    _fields_ = (
        *((name, c_int32) for name in ("dim", "hidden", "heads", "quantized")),
        *((name, _Norm) for name in ("norm1", "norm2")),
        *((name, _Linear) for name in ("qkv", "proj", "fc1", "fc2")),
    )


class _Runtime(Structure):
    _fields_ = (("parallel", c_void_p), ("thread_number", c_void_p), ("num_threads", c_void_p))


class _Call(Structure):
    _fields_ = (
        ("block", POINTER(_Block)),
        ("x", c_void_p),
        ("windows", c_int64),
        ("tokens", c_int64),
        ("scratch", c_void_p),
        ("runtime", POINTER(_Runtime)),
        ("threads", c_int32),
    )


# --- what a block is made of ------------------------------------------------------------------------------------------


class AttentionLike(Protocol):
    """What is read of a block's attention."""

    num_heads: int
    qkv: nn.Linear
    proj: nn.Linear


class MlpLike(Protocol):
    """What is read of a block's MLP."""

    fc1: nn.Linear
    fc2: nn.Linear


class BlockLike(Protocol):
    """What is read of a block."""

    norm1: nn.LayerNorm
    norm2: nn.LayerNorm
    attn: AttentionLike
    mlp: MlpLike

    def __call__(self, x: Tensor, attended: Tensor | None) -> Tensor: ...


# --- the library ------------------------------------------------------------------------------------------------------


class Kernels:
    """The library's functions, and the runtime whose threads they run in."""

    def __init__(self, library: ctypes.CDLL, runtime: _Runtime):
        self.runtime = runtime
        self.request_amx = library.m2d_request_amx
        self.run = {"fp32": library.m2d_fp32_run, "bf16": library.m2d_amx_run, "int8": library.m2d_amx_run}
        amx, fp32 = library.m2d_amx_scratch, library.m2d_fp32_scratch
        self.scratch = {"fp32": fp32, "bf16": amx, "int8": amx}
        for function in (*self.run.values(), amx, fp32):
            function.argtypes = [POINTER(_Call)]
        for function in self.run.values():
            function.restype = None
        amx.restype = fp32.restype = c_int64


@cache
def kernels() -> Kernels | None:
    """The library, or None where it was not built, or torch runs without an OpenMP runtime of a known interface."""
    if not _LIBRARY.exists():
        return None
    try:
        everything = ctypes.CDLL(None)
        names = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
        addresses = [ctypes.cast(getattr(everything, name), c_void_p).value for name in names]
        return Kernels(ctypes.CDLL(str(_LIBRARY)), _Runtime(*addresses))
    except (OSError, AttributeError):
        return None


@cache
def available() -> tuple[Kind, ...]:
    """The kinds of products that there are kernels for on this machine."""
    library = kernels()
    if library is None:
        return ()
    flags = _processor_flags()
    kinds = [kind for kind, features in _FEATURES.items() if features <= flags]
    granted = not any("amx_tile" in _FEATURES[kind] for kind in kinds) or library.request_amx() == 0
    return tuple(kind for kind in kinds if granted or "amx_tile" not in _FEATURES[kind])


def _processor_flags() -> set[str]:
    lines = _CPUINFO.read_text().splitlines() if _CPUINFO.exists() else []
    return next((set(line.partition(":")[2].split()) for line in lines if line.startswith("flags")), set())


def fits(block: BlockLike, kind: Kind) -> bool:
    """Whether there is a kernel for a block of this shape on this machine."""
    multiple, head_multiple = _MULTIPLES[kind]
    dim, hidden, heads = block.attn.qkv.in_features, block.mlp.fc1.out_features, block.attn.num_heads
    return kind in available() and dim % multiple == 0 and hidden % multiple == 0 and dim % (heads * head_multiple) == 0


# --- a block ----------------------------------------------------------------------------------------------------------


class Scratch(threading.local):
    """Memory of a thread for what is between the layers of a block; blocks share it, as they run one after another."""

    def __init__(self) -> None:
        self.memory = torch.empty(0, dtype=torch.uint8)

    def address(self, size: int) -> int:
        """Where ``size`` bytes are."""
        if len(self.memory) < size:
            self.memory = torch.empty(size, dtype=torch.uint8)
        return self.memory.data_ptr()


class NativeBlock:
    """A block that runs as a kernel; the residual stream is float32, and changed in place.

    In float32 it reads the block's own weights. Otherwise it holds a copy of the matrices, laid out for the kernel (and
    rounded, in int8), while biases and norms are read anew in every call.

    Args:
        block: of a shape that ``fits``.
        kind: what its products are computed in.
        scratch: shared by all blocks of an encoder.
    """

    def __init__(self, block: BlockLike, kind: Kind, scratch: Scratch):
        self.block = block
        self.kind = kind
        self._scratch = scratch
        self._library = kernels()
        self._norms = (block.norm1, block.norm2)
        self._layers = (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2)
        self._matrices = [] if kind == "fp32" else [_lay_out(layer.weight, kind) for layer in self._layers]
        self._addresses: list[int | None] = []
        self._kept: list[Tensor] = []  # what the structure points to
        self._structure = _Block()

    def __call__(self, x: Tensor, attended: Tensor | None) -> Tensor:
        """(B, tokens, dim) float32 -> the same. With a mask of tokens the block itself is called."""
        if attended is not None:
            return self.block(x, attended)
        x = x.contiguous()
        addresses = [None if p is None else p.data_ptr() for p in self._parameters()]
        if addresses != self._addresses:
            self._addresses = addresses
            self._point()
        library = self._library
        assert library is not None
        call = _Call(
            block=ctypes.pointer(self._structure),
            x=x.data_ptr(),
            windows=x.shape[0],
            tokens=x.shape[1],
            runtime=ctypes.pointer(library.runtime),
            threads=torch.get_num_threads(),
        )
        call.scratch = self._scratch.address(library.scratch[self.kind](byref(call)))
        library.run[self.kind](byref(call))
        return x

    def _parameters(self) -> Iterator[Tensor | None]:
        """What is read in every call."""
        for norm in self._norms:
            yield norm._parameters["weight"]  # faster than norm.weight
            yield norm._parameters["bias"]
        for layer in self._layers:
            yield layer._parameters["bias"]
            if not self._matrices:
                yield layer._parameters["weight"]

    def _point(self) -> None:
        """Have the structure point to the parameters where they are now."""
        self._kept = []
        qkv, _, fc1, _ = self._layers
        linears = [self._linear(index, layer) for index, layer in enumerate(self._layers)]
        norms = [_Norm(self._readable(n.weight), self._readable(n.bias), n.eps) for n in self._norms]
        quantized = int(self.kind == "int8")
        self._structure = _Block(
            qkv.in_features, fc1.out_features, self.block.attn.num_heads, quantized, *norms, *linears
        )

    def _linear(self, index: int, layer: nn.Linear) -> _Linear:
        bias, scales = layer.bias, None
        keeps_bf16 = bias is not None and bias.dtype == torch.bfloat16 and self.kind != "fp32"
        if self.kind == "fp32":
            weight = self._readable(layer.weight)
        else:
            matrix, of_rows = self._matrices[index]
            weight, scales = matrix.data_ptr(), None if of_rows is None else of_rows.data_ptr()
        return _Linear(
            weight, scales, self._readable(bias, torch.bfloat16 if keeps_bf16 else torch.float32), keeps_bf16
        )

    def _readable(self, parameter: Tensor | None, dtype: torch.dtype = torch.float32) -> int | None:
        """The address of the parameter; if a kernel cannot read it as it is, of a copy for this call alone."""
        if parameter is None:
            return None
        values = parameter.detach().to(dtype).contiguous()
        if values.data_ptr() != parameter.data_ptr():
            self._addresses = []
        self._kept.append(values)
        return values.data_ptr()


def _lay_out(weight: Tensor, kind: Kind) -> tuple[Tensor, Tensor | None]:
    """(out, in) -> tiles of B as ``amx.c`` describes them; of int8 also what a step of each row is worth."""
    weight = weight.detach()
    if kind == "bf16":
        return _tiles(weight.to(torch.bfloat16), 2), None
    scales = (weight.float().abs().amax(dim=1) / _INT8_LARGEST).clamp_min(_SMALLEST_SCALE)
    return _tiles((weight.float() / scales[:, None]).round().to(torch.int8), 4), scales


def _tiles(weight: Tensor, together: int) -> Tensor:
    """(out, in) -> (out / 16, in / (16 * together), 16, 16, together)."""
    rows, columns = weight.shape
    cut = weight.view(rows // 16, 16, columns // (16 * together), 16, together)
    return cut.permute(0, 2, 3, 1, 4).contiguous()
