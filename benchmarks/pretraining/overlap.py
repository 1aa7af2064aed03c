"""Is a labelled clip in the corpus? By name, and by acoustic fingerprint: nothing of a test may have been trained on.

    python -m benchmarks.pretraining.overlap corpus/manifest.csv ../shared/data     # prints what is in both

Fingerprints are pairs of spectral peaks (Wang, "An Industrial-Strength Audio Search Algorithm", ISMIR 2003): a stretch
of a clip is found again at any place, at another loudness, and after a lossy codec; not at another pitch or speed.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import numpy.typing as npt
import typer
from scipy.ndimage import maximum_filter
from scipy.signal import stft
from tqdm.auto import tqdm

from benchmarks.pretraining.targets import read_rows
from m2d_embed.audio.clips import load_audio
from m2d_embed.labelled.clips import read_labelled

_RATE = 16_000
_FFT, _HOP = 1024, 256
_NEIGHBOURHOOD = (21, 9)  # bins and frames within which a peak is the highest
_SILENCE = float(np.log(2e-6))  # digital silence has no peaks
_PEAKS = 40  # a second, the loudest
_ZONE = 60  # of the peaks that follow one, so many may make a pair with it
_FAN = 6  # of those, the loudest do
_MAX_FRAMES, _MAX_BINS = 63, 120  # between the peaks of a pair
_MIN_MATCHES = 8  # pairs at the same distance in time
_MIN_SHARE = 0.04  # of the pairs of the shorter clip
_CONTRAST = 2  # times as many as at any other distance: steady tones and loops match at many

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Overlap:
    """Two files that share a stretch: ``matches`` pairs of peaks lie ``seconds`` apart, ``share`` of the shorter's."""

    corpus: str
    labelled: str
    matches: int
    share: float
    seconds: float


def landmarks(audio: npt.NDArray[np.float32]) -> tuple[Ints, Ints]:
    """Hashes of the pairs of peaks of a clip at 16 kHz, and the frame that each begins at."""
    bins, frames, levels = peaks(audio)
    following = np.arange(len(bins))[:, None] + np.arange(1, _ZONE + 1)
    exists = following < len(bins)
    following = np.minimum(following, len(bins) - 1)
    gap = frames[following] - frames[:, None]
    near = exists & (gap > 0) & (gap <= _MAX_FRAMES) & (abs(bins[following] - bins[:, None]) <= _MAX_BINS)
    # The loudest of them, not the next: a weak peak more or less, from noise or a codec, then changes nothing.
    best = np.argsort(np.where(near, -levels[following], np.inf), axis=1)[:, :_FAN]
    chosen = np.take_along_axis(near, best, axis=1)
    second, gaps = (np.take_along_axis(x, best, axis=1)[chosen] for x in (bins[following], gap))
    first, starts = (np.broadcast_to(x[:, None], best.shape)[chosen] for x in (bins, frames))
    return (first << 15) | (second << 6) | gaps, starts


def peaks(audio: npt.NDArray[np.float32]) -> tuple[Ints, Ints, npt.NDArray[np.float32]]:
    """Bins, frames and levels of the loudest local maxima of every second, in order of time."""
    padded = np.pad(audio, (0, max(0, _FFT - len(audio))))
    _, _, spectrum = stft(padded, nperseg=_FFT, noverlap=_FFT - _HOP, boundary=None, padded=False)
    level = np.log(np.abs(spectrum[: _FFT // 2]) + 1e-6)  # (bins, frames)
    bins, frames = np.nonzero((level == maximum_filter(level, _NEIGHBOURHOOD)) & (level > _SILENCE))
    levels = level[bins, frames]
    seconds = frames * _HOP // _RATE
    order = np.lexsort((-levels, seconds))  # second by second, the loudest first
    rank = np.arange(len(order)) - np.searchsorted(seconds[order], seconds[order])
    kept = order[rank < _PEAKS]
    kept = kept[np.lexsort((bins[kept], frames[kept]))]
    return bins[kept].astype(np.int64), frames[kept].astype(np.int64), levels[kept]


class Index:
    """Landmarks of the labelled clips, sorted by hash."""

    def __init__(self, files: list[Path]):
        found = [landmarks(load_audio(file, _RATE)) for file in tqdm(files, unit="clip", desc="labelled")]
        self.files = files
        self.counts = np.array([len(hashes) for hashes, _ in found])
        hashes = np.concatenate([hashes for hashes, _ in found])
        order = np.argsort(hashes, kind="stable")
        self.hashes = hashes[order]
        self.starts = np.concatenate([starts for _, starts in found])[order]
        self.clips = np.repeat(np.arange(len(files)), self.counts)[order]

    def search(self, file: Path) -> list[Overlap]:
        """What of the labelled clips is in a file."""
        hashes, starts = landmarks(load_audio(file, _RATE))
        left, right = np.searchsorted(self.hashes, hashes, "left"), np.searchsorted(self.hashes, hashes, "right")
        lengths = right - left
        if not lengths.sum():
            return []
        rows = np.repeat(left - np.concatenate([[0], lengths.cumsum()[:-1]]), lengths) + np.arange(lengths.sum())
        shift = np.repeat(starts, lengths) - self.starts[rows]
        # Frames of the two files need not begin at the same sample: neighbouring shifts are one.
        keys, counts = np.unique(np.stack([self.clips[rows], shift // 2]), axis=1, return_counts=True)
        shorter = np.minimum(self.counts, len(hashes))
        overlaps = []
        for clip in np.unique(keys[0, counts >= np.maximum(_MIN_MATCHES, _MIN_SHARE * shorter[keys[0]])]):
            halves, matches = keys[1, keys[0] == clip], counts[keys[0] == clip]
            best = matches.argmax()
            others = matches[abs(halves - halves[best]) > 1]
            if matches[best] >= _CONTRAST * others.max(initial=_MIN_MATCHES / _CONTRAST):
                share = round(float(matches[best] / shorter[clip]), 3)
                seconds = float(2 * halves[best] * _HOP / _RATE)
                overlaps.append(Overlap(str(file), str(self.files[clip]), int(matches[best]), share, seconds))
        return overlaps


def labelled_files(data: Path) -> list[Path]:
    """Every clip of the sets in a folder, by their ``metadata.csv``."""
    return [file for metadata in sorted(data.glob("*/metadata.csv")) for file in read_labelled(metadata).files]


def search_all(index: Index, files: list[Path], processes: int) -> Iterator[list[Overlap]]:
    """``index.search`` of every file, in order."""
    with get_context("fork").Pool(processes) as pool:  # the index is shared, not copied
        yield from pool.imap(partial(Index.search, index), files, chunksize=64)


def main(manifest: Path, data: Path, processes: int = 2, limit: int | None = None) -> None:
    """Compare a corpus with the labelled sets in a folder, and print JSON."""
    files = list(islice((manifest.parent / row["file"] for row in read_rows(manifest)), limit))
    clips = labelled_files(data)
    names = {clip.stem.lower() for clip in clips}
    same_name = [str(file) for file in files if file.stem.lower() in names]
    found = [o for overlaps in tqdm(search_all(Index(clips), files, processes), total=len(files)) for o in overlaps]
    report = {
        "files": len(files),
        "labelled clips": len(clips),
        "same name": same_name,
        "same sound": [vars(overlap) for overlap in found],
    }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    typer.run(main)
