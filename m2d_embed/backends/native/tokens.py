"""Tokens as a kernel: patches cut, embedded and given their positions in one pass (``blocks.c``)."""

from __future__ import annotations

import ctypes
from ctypes import byref
from functools import cache
from typing import cast

import torch
from torch import Tensor, nn

from m2d_embed.backends.native.blocks import Functions
from m2d_embed.backends.native.library import Kernels, Scratch, Unit, available, functions_of, kernels
from m2d_embed.backends.native.structures import Call, Linear, TokensCall

_OUTPUTS, _INPUTS = 32, 16  # a width, and the values of a patch, must be multiples of these
_SCRATCH = Scratch()


@cache
def _functions(library: ctypes.CDLL, unit: Unit) -> Functions:
    return Functions.of(library, f"{functions_of('fp32', unit)}_tokens", TokensCall)


def fits_tokens(projection: nn.Conv2d) -> bool:
    """Whether the kernel embeds patches of this shape, where there is one."""
    return (
        projection.out_channels % _OUTPUTS == 0
        and projection.weight.shape[1:].numel() % _INPUTS == 0
        and projection.weight.dtype == torch.float32
    )


def make_tokens(
    log_mel: Tensor, projection: nn.Conv2d, class_token: Tensor, positions: Tensor, grid_columns: int
) -> Tensor:
    """What goes into the first block of a vision transformer. The values of a window do not depend on the others.

    Args:
        log_mel: (B, 1, mels, frames) float32 on the CPU, both whole patches.
        projection: of patches, that ``fits_tokens``.
        class_token: (1, 1, dim).
        positions: (1, 1 + F * ``grid_columns``, dim), of which a shorter log-mel takes the first columns.
        grid_columns: at least the patches that the log-mel is long.

    Returns:
        (B, 1 + F * T, dim) float32, frequency-major after the class token.
    """
    height, width = cast("tuple[int, int]", projection.kernel_size)
    batch, _, mels, frames = log_mel.shape
    log_mel = log_mel if log_mel.stride(3) == 1 else log_mel.contiguous()
    rows, columns, dim = mels // height, frames // width, projection.out_channels
    x = torch.empty(batch, 1 + rows * columns, dim, dtype=torch.float32, device="cpu")
    read = [None if p is None else p.detach().float().contiguous() for p in (projection.weight, projection.bias)]
    weight, bias = (None if p is None else p.data_ptr() for p in read)
    first, added = class_token.detach().float().contiguous(), positions.float().contiguous()
    compiled = cast(Kernels, kernels())
    call = TokensCall(
        Call(
            x=x.data_ptr(),
            windows=batch,
            tokens=x.shape[1],
            runtime=ctypes.pointer(compiled.runtime),
            threads=torch.get_num_threads(),
        ),
        log_mel.data_ptr(),
        *(log_mel.stride(0), log_mel.stride(2)),
        *(rows, columns, height, width, dim, grid_columns),
        Linear(weight, None, bias, False),
        *(first.data_ptr(), added.data_ptr()),
    )
    functions = _functions(compiled.library, available()["fp32"])
    call.call.scratch = _SCRATCH.address(functions.scratch(byref(call)))
    functions.run(byref(call))
    return x
