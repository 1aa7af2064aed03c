"""Offline targets without a teacher: a spectrum that is finer in frequency than the log-mel, fine enough for notes.

    python -m benchmarks.pretraining.spectrum_features corpus/manifest.csv spectrum

Bands three to a semitone, from 33 Hz to 6.5 kHz (below some 100 Hz they blur); of each how much its log amplitude
stands out from the half octave around it, so that loudness and colour of a sound matter little. From mel bands this can
only be inferred, by their changes and the harmonics. Writes a ``.npy`` of (frames, 276) float16 a clip, means around
every frame, and a manifest with the column ``features``. Files that are there already are kept, so a run that was
stopped goes on.
"""

from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import numpy.typing as npt
import typer
from tqdm.auto import tqdm

from benchmarks.pretraining.targets import Job, save, todo, write_manifest
from m2d_embed.audio.clips import load_audio

_RATE = 16_000
_FFT = 4096  # samples
_STEP = 1280  # samples between spectra
_LOWEST = 32.703  # Hz, the note C1
_PER_OCTAVE = 36
BANDS = 276
_AROUND = _PER_OCTAVE // 2 + 1  # bands
_FLOOR = 1e-2  # of amplitudes of a spectrum: far below the noise of 16 bits

Floats = npt.NDArray[np.float32]


def bands() -> Floats:
    """Weights of the bands on the bins of a spectrum, (BANDS, bins); each sums to 1."""
    width = _RATE / _FFT
    centres = _LOWEST * 2 ** (np.arange(BANDS) / _PER_OCTAVE)
    bins = np.maximum(np.arange(_FFT // 2 + 1) * width, 1.0)
    distance = np.abs(np.log2(bins / _LOWEST) * _PER_OCTAVE - np.arange(BANDS)[:, None])
    weights = np.maximum(0, 1 - distance)
    for band in np.flatnonzero(weights.sum(axis=1) < 0.5):  # narrower than a bin: between the two nearest
        lower, share = divmod(centres[band] / width, 1)
        weights[band] = 0
        weights[band, int(lower) : int(lower) + 2] = 1 - share, share
    normed: Floats = (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
    return normed


_BANDS = bands()
_WINDOW = np.hanning(_FFT).astype(np.float32)


def prominence(audio: Floats) -> Floats:
    """How much each band stands out, (spectra, BANDS), one spectrum every 80 ms, the first at the start."""
    padded = np.pad(audio, _FFT // 2)
    frames = np.lib.stride_tricks.sliding_window_view(padded, _FFT)[::_STEP]
    amplitudes = np.abs(np.fft.rfft(frames * _WINDOW, axis=1)).astype(np.float32)
    levels = np.log(amplitudes @ _BANDS.T + np.float32(_FLOOR))
    sums = np.cumsum(np.pad(levels, ((0, 0), (_AROUND // 2 + 1, _AROUND // 2)), mode="edge"), axis=1)
    mean = (sums[:, _AROUND:] - sums[:, :-_AROUND]) / _AROUND
    above: Floats = np.maximum(levels - mean, 0)
    return above


def around(spectra: Floats, seconds: float, hop_ms: float) -> npt.NDArray[np.float16]:
    """Means of spectra within half a hop of the times ``(j + 0.5) * hop_ms``; at least one."""
    hop = hop_ms / 1000 * _RATE / _STEP
    centres = (np.arange(max(1, round(seconds * 1000 / hop_ms))) + 0.5) * hop
    first = np.clip(np.round(centres - hop / 2), 0, len(spectra) - 1).astype(int)
    stop = np.maximum(np.round(centres + hop / 2).astype(int) + 1, first + 1)
    return np.stack([spectra[a:b].mean(axis=0) for a, b in zip(first, stop, strict=True)]).astype(np.float16)


def make(job: Job, hop: float) -> None:
    """Write the features of a clip."""
    audio = load_audio(job.source, _RATE)
    save(job.target, around(prominence(audio), len(audio) / _RATE, hop))


def main(
    manifest: Path,
    output: Path,
    hop: Annotated[float, typer.Option(help="Milliseconds between frames.")] = 480.0,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; by default one a core.")] = None,
) -> None:
    """Write the features of every file of a manifest."""
    jobs = todo(manifest, output)
    with ProcessPoolExecutor(workers) as pool:
        for _ in tqdm(pool.map(partial(make, hop=hop), jobs, chunksize=32), total=len(jobs), unit="clip"):
            pass
    write_manifest(manifest, output)


if __name__ == "__main__":
    typer.run(main)
