"""Waveform -> normalised log-mel spectrogram, in one piece or streamed block by block with the same numbers.

Settings of the published models (arXiv 2210.14648, section 4.1): Hann window, centred frames (reflected at the ends of
the clip), power spectrum, Slaney mel scale and area norm, ``log(x + eps)``, then ``(x - mean) / std``.

The spectrogram is an ``unfold`` and an FFT rather than nnAudio's convolution: the same numbers in half the time on
a CPU. The mel filterbank is nnAudio's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F
from nnAudio.librosa_functions import get_mel
from torch import Tensor, nn

from m2d_embed.config import ModelConfig

#: Frames transformed at a time: keeps the spectrogram of a long clip out of memory, and in the processor's cache.
_BLOCK_FRAMES = 4096


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
        blocks = [self._log_mel(block) for block in torch.split(frames, _BLOCK_FRAMES, dim=1)]
        return self.normalize(blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=-1)).unsqueeze(1)

    def stream(self, blocks: Iterable[Tensor]) -> Iterator[Tensor]:
        """Yield the log-mel of one clip piece by piece, equal to ``forward`` on the whole.

        Args:
            blocks: consecutive 1-D pieces of the clip, of any lengths.

        Yields:
            (mels, n) float32 normalised frames, in order. Nothing if there are no samples.
        """
        half = self.n_fft // 2
        pending = torch.empty(0, device=self.window.device)
        start = 0  # samples of `pending` before its first unread frame
        begun = False
        for block in blocks:
            pending = torch.cat([pending, block.float()])
            if not begun and len(pending) > half:
                pending = torch.cat([pending[1 : half + 1].flip(0), pending])
                begun = True
            count = (len(pending) - start - self.n_fft) // self.hop_length + 1
            if begun and count > 0:
                yield self._stream_frames(pending[start:], count)
                start += count * self.hop_length
                keep = min(start, len(pending) - half - 1)  # the end of the clip is mirrored from these
                pending, start = pending[keep:], start - keep
        if not begun:
            if len(pending):
                yield self(pending.unsqueeze(0))[0, 0]
            return
        pending = torch.cat([pending, pending[-half - 1 : -1].flip(0)])
        count = (len(pending) - start - self.n_fft) // self.hop_length + 1
        if count > 0:
            yield self._stream_frames(pending[start:], count)

    def normalize(self, log_mel: Tensor) -> Tensor:
        """``(log_mel - mean) / std`` with the statistics of the training data."""
        return (log_mel - self.mean) / self.std

    def _reflect(self, audio: Tensor) -> Tensor:
        """Mirror half a window at both ends; a clip too short to be mirrored is zero-padded first."""
        half = self.n_fft // 2
        if audio.shape[-1] <= half:
            audio = F.pad(audio, (0, half + 1 - audio.shape[-1]))
        return F.pad(audio.unsqueeze(1), (half, half), mode="reflect").squeeze(1)

    def _log_mel(self, frames: Tensor) -> Tensor:
        """(B, n, n_fft) samples -> (B, mels, n) log-mel."""
        with torch.autocast(frames.device.type, enabled=False):
            spectrum = torch.fft.rfft(frames * self.window)  # (B, n, n_fft / 2 + 1)
            power = spectrum.real.square() + spectrum.imag.square()
            return torch.log(power @ self.filterbank + self.eps).transpose(-1, -2)

    def _stream_frames(self, samples: Tensor, count: int) -> Tensor:
        frames = samples.unfold(0, self.n_fft, self.hop_length)[:count]
        return self.normalize(self._log_mel(frames.unsqueeze(0)))[0]
