"""Offline targets for M2D-S: hidden states of Resemblyzer's voice encoder (Apache-2.0), trained to tell speakers apart.

    pip download --no-deps resemblyzer==0.1.4
    unzip Resemblyzer-0.1.4-py3-none-any.whl resemblyzer/pretrained.pt
    python -m benchmarks.pretraining.resemblyzer_features corpus/manifest.csv resemblyzer/pretrained.pt voice

An LSTM of three layers over 40 mel bands (Wan et al., "Generalized End-to-End Loss for Speaker Verification", arXiv
1710.10467). Its last layer tells more of a voice than the speaker: moods and words, too. Writes a ``.npy`` of
(frames, 256) float16 a clip, the mean over a second around every frame, and a manifest with the column ``features``.
Files that are there already are kept, so a run that was stopped goes on.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import torch
import typer
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm

from benchmarks.pretraining.targets import Job, save, todo, write_manifest
from m2d_embed.audio.clips import load_audio

_RATE = 16_000
_FRAME = 160  # samples
_LOUDNESS = 10 ** (-30 / 20)  # root mean square that it was trained with
_SEGMENT = 1_600  # frames heard at a time
_CONTEXT = 160  # frames heard before them, for the state; it was trained on as many
_AROUND = 48  # frames averaged on both sides of a time
_BATCH = 64  # segments

Floats = npt.NDArray[np.float32]


class VoiceEncoder(nn.Module):
    """Audio -> hidden states of the last layer."""

    def __init__(self, weights: Path):
        from nnAudio.features.mel import MelSpectrogram

        super().__init__()
        self.mel = MelSpectrogram(
            sr=_RATE, n_fft=400, hop_length=_FRAME, n_mels=40, power=2.0, norm=1, pad_mode="constant", verbose=False
        )
        self.lstm = nn.LSTM(40, 256, 3, batch_first=True)
        state: dict[str, Any] = torch.load(weights, map_location="cpu", weights_only=True)["model_state"]
        self.lstm.load_state_dict({k.removeprefix("lstm."): v for k, v in state.items() if k.startswith("lstm.")})
        # Twice as fast; means over a second of speech have a cosine of 0.9998 with those of float32.
        self.lstm.bfloat16()
        self.requires_grad_(False)

    def mels(self, audio: Floats) -> Tensor:
        """(frames, 40) of a stretch at the loudness that the encoder expects."""
        loudness = np.sqrt(np.square(audio).mean()) + 1e-9
        scaled = torch.from_numpy(audio * np.float32(min(_LOUDNESS / loudness, 1000)))
        mels: Tensor = self.mel(scaled[None])[0].T
        return mels

    def forward(self, mels: Sequence[Tensor]) -> list[Tensor]:
        """(frames, 40) each -> (frames, 256) each."""
        hidden, _ = self.lstm(pad_sequence(list(mels), batch_first=True).bfloat16())
        return [rows[: len(stretch)] for rows, stretch in zip(hidden, mels, strict=True)]


@dataclass
class Segment:
    """Mels of a part of a clip, the first ``context`` of them only heard for the state."""

    job: Job
    mels: Tensor
    context: int
    last: bool


def segments(jobs: Sequence[Job], encoder: VoiceEncoder) -> Iterator[Segment]:
    """Every clip in parts, in order."""
    for job in jobs:
        mels = encoder.mels(load_audio(job.source, _RATE))
        for start in range(0, len(mels), _SEGMENT):
            context = min(start, _CONTEXT)
            part = mels[start - context : start + _SEGMENT]
            yield Segment(job, part, context, last=start + _SEGMENT >= len(mels))


def around(hidden: Tensor, hop_ms: float) -> npt.NDArray[np.float16]:
    """Means of (frames, 256) around the times ``(j + 0.5) * hop_ms``; at least one."""
    hop = hop_ms / 10  # frames
    sums = torch.cat([torch.zeros(1, hidden.shape[1], dtype=torch.float64), hidden.double().cumsum(0)])
    centres = ((torch.arange(max(1, round(len(hidden) / hop))) + 0.5) * hop).round().long()
    first = (centres - _AROUND).clamp(0, max(0, len(hidden) - _AROUND))
    stop = (centres + _AROUND).clamp(max=len(hidden))
    means = (sums[stop] - sums[first]) / (stop - first)[:, None]
    return means.to(torch.float16).numpy()


def main(
    manifest: Path,
    weights: Path,
    output: Path,
    hop: Annotated[float, typer.Option(help="Milliseconds between frames.")] = 480.0,
) -> None:
    """Embed every file of a manifest."""
    encoder = VoiceEncoder(weights)
    jobs = sorted(todo(manifest, output), key=lambda job: job.seconds)  # alike in length: little padding
    stream = segments(jobs, encoder)
    parts: list[Tensor] = []
    with tqdm(total=len(jobs), unit="clip") as bar:
        while batch := list(islice(stream, _BATCH)):
            for segment, hidden in zip(batch, encoder([s.mels for s in batch]), strict=True):
                parts.append(hidden[segment.context :])
                if segment.last:
                    save(segment.job.target, around(torch.cat(parts), hop))
                    parts.clear()
                    bar.update()
    write_manifest(manifest, output)


if __name__ == "__main__":
    typer.run(main)
