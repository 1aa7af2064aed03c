"""Transformer blocks as kernels: ``amx.c`` or ``avx512.c`` for bfloat16 and int8, ``fp32.c`` for float32."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from ctypes import POINTER, Structure, byref, c_float, c_int32, c_int64, c_void_p
from functools import cache
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn

from m2d_embed.native.library import Kernels, Kind, Runtime, available, kernels

#: Widths must be multiples of these: of a block's vectors, of those of one head.
_MULTIPLES: dict[Kind, tuple[int, int]] = {"fp32": (32, 32), "bf16": (32, 32), "int8": (64, 32)}
_INT8_LARGEST = 127
_SMALLEST_SCALE = 1e-12


# --- what blocks.h declares -------------------------------------------------------------------------------------------


class Linear(Structure):
    """A layer, laid out as its kernel reads it."""

    _fields_ = (("weight", c_void_p), ("scales", c_void_p), ("bias", c_void_p), ("bias_is_bf16", c_int32))


class _Norm(Structure):
    _fields_ = (("weight", c_void_p), ("bias", c_void_p), ("eps", c_float))


class _Block(Structure):
    """``kept`` are the tensors that it points to."""

    kept: list[Tensor]
    _fields_ = (
        *((name, c_int32) for name in ("dim", "hidden", "heads", "quantized")),
        *((name, _Norm) for name in ("norm1", "norm2")),
        *((name, Linear) for name in ("qkv", "proj", "fc1", "fc2")),
    )


class Call(Structure):
    """The residual stream, and what works on it."""

    _fields_ = (
        ("block", POINTER(_Block)),
        ("x", c_void_p),
        ("windows", c_int64),
        ("tokens", c_int64),
        ("scratch", c_void_p),
        ("runtime", POINTER(Runtime)),
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


# --- the kernels ------------------------------------------------------------------------------------------------------


class Functions(NamedTuple):
    """A kernel, and how many bytes of scratch it needs for a call."""

    run: Any
    scratch: Any

    @classmethod
    def of(cls, library: ctypes.CDLL, name: str, call: type[Structure]) -> Functions:
        """Those of a name, which take a pointer to a structure."""
        functions = cls(library[f"m2d_{name}_run"], library[f"m2d_{name}_scratch"])
        for function in functions:
            function.argtypes = [POINTER(call)]
        functions.run.restype, functions.scratch.restype = None, c_int64
        return functions


@cache
def _functions(library: ctypes.CDLL, name: str) -> Functions:
    return Functions.of(library, name, Call)


def fits(block: BlockLike, kind: Kind) -> bool:
    """Whether there is a kernel for a block of this shape on this machine."""
    multiple, head_multiple = _MULTIPLES[kind]
    dim, hidden, heads = block.attn.qkv.in_features, block.mlp.fc1.out_features, block.attn.num_heads
    return kind in available() and dim % multiple == 0 and hidden % multiple == 0 and dim % (heads * head_multiple) == 0


# --- a block ----------------------------------------------------------------------------------------------------------


class Scratch(threading.local):
    """Memory of a thread for what is between the layers of a block; blocks share it, as they run one after another."""

    def __init__(self) -> None:
        self.memory = torch.empty(0, dtype=torch.uint8, device="cpu")

    def address(self, size: int) -> int:
        """Where ``size`` bytes are."""
        if len(self.memory) < size:
            self.memory = torch.empty(size, dtype=torch.uint8, device="cpu")
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
        compiled = cast(Kernels, kernels())
        self._functions = _functions(compiled.library, "fp32" if kind == "fp32" else available()[kind])
        self._runtime = ctypes.pointer(compiled.runtime)
        self._norms = (block.norm1, block.norm2)
        self._layers = (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2)
        self._matrices = [] if kind == "fp32" else [_lay_out(layer.weight, kind) for layer in self._layers]
        self._pointed: tuple[list[int | None], _Block] = ([], _Block())  # to what, as one: threads may exchange it

    def __call__(self, x: Tensor, attended: Tensor | None) -> Tensor:
        """(B, tokens, dim) float32 -> the same. With a mask of tokens the block itself is called."""
        if attended is not None:
            return self.block(x, attended)
        x = x.contiguous()
        addresses = [None if p is None else p.data_ptr() for p in self._parameters()]
        pointed_to, structure = self._pointed
        if addresses != pointed_to:
            structure = self._point()
            in_place = {a for a in addresses if a is not None} == {values.data_ptr() for values in structure.kept}
            self._pointed = (addresses if in_place else [], structure)  # copies are for this call alone
        call = Call(
            block=ctypes.pointer(structure),
            x=x.data_ptr(),
            windows=x.shape[0],
            tokens=x.shape[1],
            runtime=self._runtime,
            threads=torch.get_num_threads(),
        )
        call.scratch = self._scratch.address(self._functions.scratch(byref(call)))
        self._functions.run(byref(call))
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

    def _point(self) -> _Block:
        """A structure that points to the parameters where they are now, or to what a kernel can read in their place."""
        kept: list[Tensor] = []

        def readable(parameter: Tensor | None, dtype: torch.dtype = torch.float32) -> int | None:
            if parameter is None:
                return None
            kept.append(parameter.detach().to(dtype).contiguous())
            return kept[-1].data_ptr()

        def linear(index: int, layer: nn.Linear) -> Linear:
            is_bf16 = self.kind != "fp32" and layer.bias is not None and layer.bias.dtype == torch.bfloat16
            bias = readable(layer.bias, torch.bfloat16 if is_bf16 else torch.float32)
            if self.kind == "fp32":
                return Linear(readable(layer.weight), None, bias, is_bf16)
            matrix, scales = self._matrices[index]
            return Linear(matrix.data_ptr(), None if scales is None else scales.data_ptr(), bias, is_bf16)

        qkv, _, fc1, _ = self._layers
        linears = [linear(index, layer) for index, layer in enumerate(self._layers)]
        norms = [_Norm(readable(norm.weight), readable(norm.bias), norm.eps) for norm in self._norms]
        shape = (qkv.in_features, fc1.out_features, self.block.attn.num_heads, int(self.kind == "int8"))
        structure = _Block(*shape, *norms, *linears)
        structure.kept = kept
        return structure


def _lay_out(weight: Tensor, kind: Kind) -> tuple[Tensor, Tensor | None]:
    """(out, in) -> tiles of B as ``tiles.h`` describes them; of int8 also what a step of each row is worth."""
    if kind == "bf16":
        return _tiles(weight.detach().to(torch.bfloat16), 2), None
    rounded, scales = rounded_to_int8(weight)
    return _tiles(rounded, 4), scales


def rounded_to_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix, (out, in), in int8, and what a step of each of its rows is worth, (out,) float32."""
    weight = weight.detach().float()
    scales = (weight.abs().amax(dim=1) / _INT8_LARGEST).clamp_min(_SMALLEST_SCALE)
    return (weight / scales[:, None]).round().to(torch.int8), scales


def _tiles(weight: Tensor, together: int) -> Tensor:
    """(out, in) -> (out / 16, in / (16 * together), 16, 16, together)."""
    rows, columns = weight.shape
    cut = weight.view(rows // 16, 16, columns // (16 * together), 16, together)
    return cut.permute(0, 2, 3, 1, 4).contiguous()
