"""The log-mel spectrogram as a kernel (``log_mel.c``): 16 frames at a time, and of each band only its own bins."""

from __future__ import annotations

import ctypes
import math
from ctypes import byref
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from m2d_embed.backends.native.blocks import Functions
from m2d_embed.backends.native.library import Kernels, Scratch, available, kernels
from m2d_embed.backends.native.structures import LogMel, LogMelCall

_RADICES = (5, 4, 3, 2)
_MOST_SAMPLES = 4096
_LANES = 16

_SCRATCH = Scratch()

Floats = npt.NDArray[np.float32]


class NativeLogMel:
    """The kernel with its tables.

    Args:
        window: (n_fft,).
        filterbank: (n_fft / 2 + 1, mels).
        hop: samples from one frame to the next.
        eps: added to the power of each band before its logarithm.
        norm_stats: mean and standard deviation that the logarithms are normalised with.
    """

    def __init__(self, window: Tensor, filterbank: Tensor, hop: int, eps: float, norm_stats: tuple[float, float]):
        n_fft, mels = len(window), filterbank.shape[1]
        radices = factors(n_fft // 2)
        assert radices is not None
        self._made_of = _identity(window, filterbank), hop, eps, norm_stats
        twiddles = np.concatenate(list(_twiddles(radices)))
        first, count, weights = _bands(filterbank.numpy())
        split = _roots(n_fft, np.arange(n_fft // 2 + 1))
        # The structure points to these.
        self._tables = [
            np.ascontiguousarray(table)
            for table in (window.numpy(), np.array(radices, np.int32), twiddles, split, first, count, weights)
        ]
        addresses = [table.ctypes.data for table in self._tables]
        self._settings = LogMel(n_fft, hop, mels, len(radices), *addresses, eps, *norm_stats)
        self._mels = mels
        compiled = cast(Kernels, kernels())
        self._runtime = ctypes.pointer(compiled.runtime)
        self._functions = Functions.of(compiled.library, f"{available()['fp32']}_log_mel", LogMelCall)

    def is_of(self, window: Tensor, filterbank: Tensor, hop: int, eps: float, norm_stats: tuple[float, float]) -> bool:
        """Whether its tables were made of these, which nobody has written to."""
        return self._made_of == (_identity(window, filterbank), hop, eps, norm_stats)

    @staticmethod
    def fits(n_fft: int) -> bool:
        """Whether the kernel transforms frames of so many samples, where there is one."""
        return n_fft % _LANES == 0 and n_fft <= _MOST_SAMPLES and factors(n_fft // 2) is not None

    def __call__(self, frames: Tensor) -> Tensor:
        """Frames (B, n, n_fft) float32, a view of clips, each ``hop`` samples after the last -> (B, mels, n)."""
        out = torch.empty(frames.shape[0], self._mels, frames.shape[1], dtype=torch.float32, device="cpu")
        call = LogMelCall(
            settings=ctypes.pointer(self._settings),
            samples=frames.data_ptr(),
            clips=frames.shape[0],
            clip_stride=frames.stride(0),
            frames=frames.shape[1],
            out=out.data_ptr(),
            runtime=self._runtime,
            threads=max(1, min(torch.get_num_threads(), frames.shape[0] * frames.shape[1] // _LANES)),
        )
        call.scratch = _SCRATCH.address(self._functions.scratch(byref(call)))
        self._functions.run(byref(call))
        return out


def _identity(*tensors: Tensor) -> list[tuple[int, int]]:
    """Where they are, and how often they were written to."""
    return [(tensor.data_ptr(), -1 if tensor.is_inference() else tensor._version) for tensor in tensors]


def factors(n: int) -> list[int] | None:
    """``n`` as a product of radices, or None."""
    found = []
    for radix in _RADICES:
        while n > 1 and n % radix == 0:
            found.append(radix)
            n //= radix
    return found if n == 1 else None


def _twiddles(radices: list[int]) -> list[Floats]:
    """For each stage, and each j and k in it from 1 on, the root that its k-th value is turned by."""
    n, tables = math.prod(radices), []
    for radix in radices:
        j = np.arange(n // radix)[:, None]
        tables.append(_roots(n, (j * np.arange(1, radix)).ravel()))
        n //= radix
    return tables


def _roots(n: int, powers: npt.NDArray[np.int64]) -> Floats:
    """exp(-2 pi i / n) to these powers: (len, 2), cosines and sines."""
    angles = -2 * np.pi * (powers % n) / n
    return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


def _bands(filterbank: Floats) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32], Floats]:
    """For each band the first bin that is not 0, how many there are to the last, and the weights of all these."""
    first, count, weights = [], [], []
    for band in filterbank.T:
        bins = np.flatnonzero(band)
        start, stop = (bins[0], bins[-1] + 1) if len(bins) else (0, 0)
        first.append(start)
        count.append(stop - start)
        weights.append(band[start:stop])
    return np.array(first, np.int32), np.array(count, np.int32), np.concatenate(weights)
