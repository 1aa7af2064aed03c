"""Waveform -> normalised log-mel spectrogram, in one piece or streamed block by block with the same numbers.

Settings of the published models (arXiv 2210.14648, section 4.1): Hann window, centred frames (reflected at the ends of
the clip), power spectrum, Slaney mel scale and area norm, ``log(x + eps)``, then ``(x - mean) / std``.

The spectrogram is an ``unfold`` and an FFT rather than nnAudio's convolution: the same numbers in half the time on
a CPU, and by the kernel of ``native``, where there is one, in a fraction of it. The mel filterbank is nnAudio's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from nnAudio.librosa_functions import get_mel
from torch import Tensor, nn

from m2d_embed.audio.clips import Samples
from m2d_embed.backends import selection
from m2d_embed.backends.native import NativeLogMel
from m2d_embed.config import ModelConfig

#: Frames of a clip transformed at a time, at most: keeps the spectrogram of a long clip out of memory.
_BLOCK_FRAMES = 4096
#: On a CPU, frames of all clips together: what is between samples and log-mel stays in the processor's cache.
_CACHED_FRAMES = 1024


class LogMel(nn.Module):
    """Log-mel spectrogram of mono audio, normalised with the model's statistics.

    Always computes in float32, and stays so when the model around it is cast: a bfloat16 log-mel is off by several
    nats, a float16 one overflows on loud input.
    """

    window: Tensor
    filterbank: Tensor

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.n_fft = config.n_fft
        self.hop_length = config.hop_length
        self.mean, self.std = config.norm_stats
        self.eps = torch.finfo(torch.float32).eps
        filterbank = get_mel(config.sample_rate, config.n_fft, config.input_size[0], config.f_min, config.f_max)
        # On the CPU whatever the default device is: building a model on "meta" must not lose these constants.
        self.register_buffer(
            "window", torch.hann_window(config.n_fft, dtype=torch.float32, device="cpu"), persistent=False
        )
        self.register_buffer("filterbank", torch.from_numpy(filterbank).float().T.contiguous(), persistent=False)
        self._kernel: NativeLogMel | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kernel": None}  # it holds addresses, and is made anew

    def train(self, mode: bool = True) -> LogMel:
        """As of any module; and ``repack``."""
        self.repack()
        return super().train(mode)

    def repack(self) -> None:
        """Forget tables made of the buffers; the next clip makes them anew."""
        self._kernel = None

    @classmethod
    def unnormalized(cls, config: ModelConfig) -> LogMel:
        """The log-mel as it is before it is normalised."""
        return cls(dataclasses.replace(config, norm_stats=(0.0, 1.0)))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LogMel:
        # .half(), .bfloat16() and .to(dtype) reach every buffer through here; only the device may change.
        for name, buffer in self._buffers.items():
            if buffer is not None:
                self._buffers[name] = buffer.to(fn(buffer[:0]).device)
        return self

    def num_frames(self, num_samples: int) -> int:
        """Frames of a clip of ``num_samples`` samples: one at each multiple of the hop, the start included."""
        return 1 + num_samples // self.hop_length

    def forward(self, audio: Tensor) -> Tensor:
        """Return the normalised log-mel of whole clips.

        Args:
            audio: (B, samples), in [-1, 1]; any floating dtype, computed in float32.

        Returns:
            (B, 1, mels, frames) float32 with ``frames = 1 + samples // hop_length``.
        """
        num_frames = self.num_frames(audio.shape[-1])
        padded = self._reflect(audio.float())
        frames = padded.unfold(-1, self.n_fft, self.hop_length)[:, :num_frames]  # (B, frames, n_fft), a view
        return self._log_mel(frames).unsqueeze(1)

    def stream(self, blocks: Iterable[Tensor]) -> Iterator[Tensor]:
        """Yield the log-mel of one clip piece by piece, equal to ``forward`` on the whole.

        Args:
            blocks: consecutive 1-D pieces of the clip, of any lengths, on the CPU and without gradients.

        Yields:
            (mels, n) float32 normalised frames, in order. Nothing if there are no samples.
        """
        for piece in self.framed(block.float().numpy() for block in blocks):
            yield self.of_frames(torch.from_numpy(piece).to(self.window.device))

    def framed(self, blocks: Iterable[Samples]) -> Iterator[Samples]:
        """Turn consecutive blocks of a clip, of any lengths, into pieces of whole frames, which ``of_frames`` takes.

        Each piece begins with the last samples of the one before; the clip's ends are mirrored. A clip of less than
        40 s is one piece. Torch is not used, so this may run in threads beside the model: each would start torch's own
        threads once more.

        Yields:
            (n_fft + (n - 1) * hop,) float32 for n frames, at least one. Nothing if there are no samples.
        """
        half = self.n_fft // 2
        enough = max(_BLOCK_FRAMES * self.hop_length, self.n_fft)
        held: list[Samples] = []
        new = start = 0  # samples held that are in no piece yet; samples before the next piece
        begun = False
        for block in blocks:
            held.append(block)
            new += len(block)
            if new < enough:
                continue
            joined = np.concatenate(held)
            if not begun:
                joined = np.concatenate([joined[half:0:-1], joined])
                begun = True
            stop = start + self._whole_frames(len(joined) - start)
            yield joined[start:stop]
            start = stop - self.n_fft + self.hop_length
            keep = min(start, len(joined) - half - 1)  # the end of the clip is mirrored from these
            held, new, start = [joined[keep:]], 0, start - keep
        joined = np.concatenate([*held, np.empty(0, np.float32)])
        if begun:
            joined = np.concatenate([joined, joined[-2 : -half - 2 : -1]])
            stop = start + self._whole_frames(len(joined) - start)
        elif len(joined):
            stop = self.n_fft + (self.num_frames(len(joined)) - 1) * self.hop_length
            joined = np.pad(np.pad(joined, (0, max(0, half + 1 - len(joined)))), half, mode="reflect")
        else:
            return
        if stop > start:
            yield joined[start:stop]

    def of_frames(self, samples: Tensor) -> Tensor:
        """A piece that ``framed`` yields, (n_fft + (n - 1) * hop,), -> its normalised log-mel, (mels, n) float32."""
        frames = samples.unfold(0, self.n_fft, self.hop_length)
        return self._log_mel(frames.unsqueeze(0))[0]

    def normalize(self, log_mel: Tensor) -> Tensor:
        """``(log_mel - mean) / std`` with the statistics of the training data."""
        return (log_mel - self.mean) / self.std

    def _reflect(self, audio: Tensor) -> Tensor:
        """Mirror half a window at both ends; a clip too short to be mirrored is zero-padded first."""
        half = self.n_fft // 2
        if audio.shape[-1] <= half:
            audio = F.pad(audio, (0, half + 1 - audio.shape[-1]))
        before, after = audio[:, 1 : half + 1], audio[:, -half - 1 : -1]
        return torch.cat([before.flip(-1), audio, after.flip(-1)], dim=-1)  # faster than F.pad

    def _log_mel(self, frames: Tensor) -> Tensor:
        """(B, n, n_fft) samples -> (B, mels, n) normalised log-mel."""
        strides = (self.hop_length, 1)
        if frames.stride()[1:] == strides and selection.chooses_native_log_mel(frames, self.n_fft):
            made_of = (self.window, self.filterbank, self.hop_length, self.eps, (self.mean, self.std))
            if self._kernel is None or not self._kernel.is_of(*made_of):
                self._kernel = NativeLogMel(*made_of)
            return self._kernel(frames)
        size = max(1, _CACHED_FRAMES // max(1, len(frames))) if frames.device.type == "cpu" else _BLOCK_FRAMES
        blocks = [self._log_mel_of(block) for block in torch.split(frames, size, dim=1)]
        return self.normalize(blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=-1))

    def _log_mel_of(self, frames: Tensor) -> Tensor:
        with torch.autocast(frames.device.type, enabled=False):
            spectrum = torch.fft.rfft(frames * self.window)  # (B, n, n_fft / 2 + 1)
            power = torch.addcmul(spectrum.real.square(), spectrum.imag, spectrum.imag)
            return torch.log(power @ self.filterbank + self.eps).transpose(-1, -2)

    def _whole_frames(self, num_samples: int) -> int:
        """Samples of the whole frames among so many."""
        if num_samples < self.n_fft:
            return 0
        return self.n_fft + (num_samples - self.n_fft) // self.hop_length * self.hop_length
