"""Transformer blocks as kernels: ``amx.c`` or ``avx512.c`` where weights are tiles, else ``blocks.c``."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from ctypes import POINTER, Array, Structure, byref, c_int64, c_void_p
from functools import cache
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn

from m2d_embed.backends.native.library import (
    TILED,
    Arithmetic,
    Kernels,
    Scratch,
    Unit,
    available,
    functions_of,
    in_large_pages,
    kernels,
)
from m2d_embed.backends.native.structures import Block, Call, Linear, Norm

#: Widths must be multiples of these: of a block's vectors, of those of one head.
_MULTIPLES: dict[Arithmetic, tuple[int, int]] = {"fp32": (32, 32), "bf16": (32, 32), "int8": (64, 32)}
#: What vector kernels read matrices and biases in, as ``blocks.h`` numbers it.
_FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_INT8_LARGEST = 127
_AVX2_LARGEST = 63  # 7 bits, as AVX2's sums of two products saturate (``vec_avx2.h``)
_SMALLEST_SCALE = 1e-12


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


class Shape(NamedTuple):
    """Widths of a block: its residual stream, between the layers of its MLP; and its heads."""

    dim: int
    hidden: int
    heads: int

    @classmethod
    def of(cls, block: BlockLike) -> Shape:
        """That of a block."""
        return cls(block.attn.qkv.in_features, block.mlp.fc1.out_features, block.attn.num_heads)


def fits(shape: Shape, kind: Arithmetic) -> bool:
    """Whether the kernels compute blocks of this shape, where there are any."""
    multiple, head_multiple = _MULTIPLES[kind]
    whole_heads = shape.dim % (shape.heads * head_multiple) == 0
    return shape.dim % multiple == 0 and shape.hidden % multiple == 0 and whole_heads


# --- blocks -----------------------------------------------------------------------------------------------------------


class _Pointed(NamedTuple):
    """Structures that point to parameters."""

    addresses: list[float | None]  # of parameters, then each norm's eps; empty if ``kept`` are copies of some
    blocks: Array[Block]
    norm: Norm
    kept: list[Tensor]  # what they point to


class NativeBlocks:
    """Blocks that run as a kernel, one after the other.

    In float32 it reads the blocks' own weights. Otherwise it holds a copy of the matrices, laid out for the kernel (and
    rounded, in int8; or in float32, if they are in half precision), while biases and norms are read anew in every call.

    Args:
        blocks: that ``fit``.
        norm: what features are read through; None if none are.
        kind: what products are computed in.
    """

    def __init__(self, blocks: Sequence[BlockLike], norm: nn.LayerNorm | None, kind: Arithmetic):
        self.kind = kind
        self.scratch = Scratch()
        compiled, unit = cast(Kernels, kernels()), available()[kind]
        self._functions = _functions(compiled.library, functions_of(kind, unit))
        self._runtime = ctypes.pointer(compiled.runtime)
        self._norm = norm
        self._shape = Shape.of(blocks[0])
        self._parts = [
            ((block.norm1, block.norm2), (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2))
            for block in blocks
        ]
        self._norms = [*([] if norm is None else [norm]), *(norm for norms, _ in self._parts for norm in norms)]
        self._bias_dtypes = {torch.float32, torch.bfloat16} if unit in TILED else _FORMATS.keys()
        weights = [layer.weight for _, layers in self._parts for layer in layers]
        self._matrices = _lay_out(weights, kind, unit, _packing(compiled.library, kind, unit))
        self._pointed = _Pointed([], (Block * 0)(), Norm(), [])  # replaced as a whole: threads may exchange it

    def __call__(self, x: Tensor, blocks: range) -> Tensor:
        """(B, tokens, dim) float32 -> the same, changed in place if it is contiguous, by a run of blocks."""
        x = x.contiguous()
        self._run(x, blocks, 1, None)
        return x

    def features(self, x: Tensor, layers: Sequence[int], rows: int) -> list[Tensor]:
        """Normalised outputs of some layers for all tokens but the first.

        Args:
            x: (B, 1 + F * T, dim) float32, frequency-major, which is changed if it is contiguous.
            layers: indices of blocks, from 0 on.
            rows: F.

        Returns:
            One (B, T, F, dim) tensor a layer.
        """
        x = x.contiguous()
        windows, tokens, dim = x.shape
        read = (c_void_p * (max(layers) + 1))()
        found: dict[int, Tensor] = {}
        for layer in layers:
            found[layer] = torch.empty(windows, (tokens - 1) // rows, rows, dim, dtype=torch.float32, device="cpu")
            read[layer] = found[layer].data_ptr()
        self._run(x, range(len(read)), rows, read)
        return [found[layer] for layer in layers]

    def _run(self, x: Tensor, blocks: range, rows: int, features: Array[c_void_p] | None) -> None:
        pointed = self._pointed
        addresses: list[float | None] = [None if p is None else p.data_ptr() for p in self._parameters()]
        addresses += [norm.eps for norm in self._norms]
        if addresses != pointed.addresses:
            self._pointed = pointed = self._point(addresses)
        call = Call(
            blocks=ctypes.pointer(pointed.blocks[blocks.start]),
            num_blocks=len(blocks),
            x=x.data_ptr(),
            windows=x.shape[0],
            tokens=x.shape[1],
            runtime=self._runtime,
            threads=torch.get_num_threads(),
            rows=rows,
            features=features,
            norm=ctypes.pointer(pointed.norm),
        )
        call.scratch = self.scratch.address(self._functions.scratch(byref(call)))
        self._functions.run(byref(call))

    def _parameters(self) -> Iterator[Tensor | None]:
        """What is read in every call."""
        for norm in self._norms:
            yield norm._parameters["weight"]  # faster than norm.weight
            yield norm._parameters["bias"]
        for _, layers in self._parts:
            for layer in layers:
                yield layer._parameters["bias"]
                if not self._matrices:
                    yield layer._parameters["weight"]

    def _point(self, addresses: list[float | None]) -> _Pointed:
        """Structures that point to the parameters, or to what a kernel can read in their place."""
        kept: list[Tensor] = []

        def readable(parameter: Tensor | None, dtype: torch.dtype = torch.float32) -> int | None:
            if parameter is None:
                return None
            kept.append(parameter.detach().to(dtype).contiguous())
            return kept[-1].data_ptr()

        def linear(layer: nn.Linear) -> Linear:
            stored = torch.float32 if layer.bias is None else layer.bias.dtype
            bias_dtype = stored if stored in self._bias_dtypes else torch.float32
            bias = readable(layer.bias, bias_dtype), _FORMATS[bias_dtype]
            if not self._matrices:
                weight = readable(layer.weight, layer.weight.dtype)
                return Linear(weight, None, *bias, _FORMATS[layer.weight.dtype])
            matrix, scales = next(matrices)
            steps = None if scales is None else scales.data_ptr()
            return Linear(matrix.data_ptr(), steps, *bias, _FORMATS.get(matrix.dtype, 0))

        def structure(norm: nn.LayerNorm) -> Norm:
            return Norm(readable(norm.weight), readable(norm.bias), norm.eps)

        matrices = iter(self._matrices)
        blocks = (Block * len(self._parts))()
        for index, (norms, layers) in enumerate(self._parts):
            blocks[index] = Block(*self._shape, self.kind == "int8", *map(structure, norms), *map(linear, layers))
        norm = Norm() if self._norm is None else structure(self._norm)
        in_place = {p.data_ptr() for p in self._parameters() if p is not None} == {p.data_ptr() for p in kept}
        return _Pointed(addresses if in_place else [], blocks, norm, kept)


class _Matrix(NamedTuple):
    weight: Tensor  # (out, in), or packed
    scales: Tensor | None  # int8: the scale of each row


class _Packing(NamedTuple):
    """Which weights lie side by side: those of some outputs, and of each of these some inputs."""

    outputs: int
    inputs: int

    def of(self, weight: Tensor) -> Tensor:
        """(out, in) -> (out / ``outputs``, in / ``inputs``, ``outputs``, ``inputs``), a view."""
        rows, columns = weight.shape
        split = weight.view(rows // self.outputs, self.outputs, columns // self.inputs, self.inputs)
        return split.transpose(1, 2)


def _packing(library: ctypes.CDLL, kind: Arithmetic, unit: Unit) -> _Packing | None:
    """How a kernel wants its weights; None if it is as they are."""
    if unit in TILED:  # rows of tiles are 64 bytes, 4 of each output
        return _Packing(16, 4 if kind == "int8" else 2)
    if kind != "int8":
        return None
    name = f"m2d_{functions_of(kind, unit)}"
    return _Packing(library[f"{name}_outputs_together"](), library[f"{name}_inputs_together"]())


def _lay_out(weights: list[Tensor], kind: Arithmetic, unit: Unit, packing: _Packing | None) -> list[_Matrix]:
    """Matrices, (out, in), as a kernel reads them; nothing if it reads them as they are."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}[kind]
    if packing is None and {weight.dtype for weight in weights} <= _FORMATS.keys():
        return []
    sizes = [weight.numel() * dtype.itemsize for weight in weights]
    outputs = [len(weight) for weight in weights]
    # All in one piece each: small ones between large ones would keep those from being given back to the system.
    memories, kept = in_large_pages(sum(sizes)).split(sizes), torch.empty(sum(outputs), device="cpu").split(outputs)
    largest = _AVX2_LARGEST if unit == "avx2" else _INT8_LARGEST
    found = []
    for weight, memory, scales in zip(weights, memories, kept, strict=True):
        rounded, scale = (weight.detach().to(dtype), None) if kind != "int8" else rounded_to_int8(weight, largest)
        arranged = rounded if packing is None else packing.of(rounded)
        laid_out = memory.view(dtype).view(arranged.shape).copy_(arranged)
        found.append(_Matrix(laid_out, None if scale is None else scales.copy_(scale)))
    return found


def rounded_to_int8(weight: Tensor, levels: int = _INT8_LARGEST) -> tuple[Tensor, Tensor]:
    """A matrix, (out, in), in int8, from -levels to levels, and the scale of each row, (out,) float32."""
    values = weight.detach().to(torch.float32, copy=True)  # changed in place, for memory's sake
    largest = torch.maximum(values.amax(dim=1), -values.amin(dim=1))
    scales = (largest / levels).clamp_min(_SMALLEST_SCALE)
    return values.div_(scales[:, None]).round_().to(torch.int8), scales
