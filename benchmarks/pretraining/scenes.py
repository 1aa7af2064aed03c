"""Scenes made of the clips of a corpus, for teachers to listen to: more kinds of sound than the corpus itself has.

    python -m benchmarks.pretraining.scenes corpus/manifest.csv corpus/with-scenes.csv --without overlap.json --hours 30

The sounds of games are short, dry and clean, recordings of the world are neither. A scene is five seconds with one
sound or two, once or several times, at another speed, with another balance of high and low, in a room, over a noise or
another recording. As teachers hear the scenes themselves, their answers fit whatever was done. Writes scenes as FLAC
into a folder beside the new manifest, named like it; the new manifest has the clips of the old one, too. Each scene
depends on the seed and its number alone, and those that are there are not written again.
"""

import csv
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import numpy.typing as npt
import soundfile
import soxr
import typer
from scipy.signal import fftconvolve
from tqdm.auto import tqdm

from benchmarks.pretraining.join_features import overlapping
from benchmarks.pretraining.targets import read_rows
from m2d_embed.files import atomic_write

RATE = 16_000
SECONDS = 5
PACKAGE = "scenes"  # in the manifest
_KINDS = {"effects": 0.6, "speech": 0.15, "ambience": 0.1, "instrument": 0.1, "music": 0.05}  # of what is in front
_OCTAVES = 0.5  # that speed, and so pitch, goes up or down at most
_SPEECH_OCTAVES = 0.2
_TILT = 4.0  # dB an octave at most
_ROOM = (0.1, 1.2)  # s until an echo has fallen by 60 dB

Floats = npt.NDArray[np.float32]

_corpora: list["Corpus"] = []  # of a process that writes scenes: sent once, not with every scene


@dataclass(frozen=True)
class Corpus:
    """Where clips are, and their rows by kind and package."""

    folder: Path
    rows: dict[str, dict[str, list[dict[str, str]]]]

    def draw(self, rng: np.random.Generator, kind: str) -> dict[str, str]:
        """A clip of a kind. Packages of many clips are drawn more often, but only by the root of their number."""
        packages = self.rows[kind]
        likely = np.sqrt([len(rows) for rows in packages.values()])
        rows = list(packages.values())[rng.choice(len(packages), p=likely / likely.sum())]
        return rows[rng.integers(len(rows))]

    def read(self, rng: np.random.Generator, row: dict[str, str]) -> Floats:
        """A clip, or as much of it as fits a scene, from anywhere in it."""
        file, wanted = self.folder / row["file"], SECONDS * RATE
        frames = soundfile.info(file).frames
        start = int(rng.integers(max(1, frames - wanted)))
        audio, rate = soundfile.read(file, frames=wanted, start=start, dtype="float32")
        if rate != RATE or audio.ndim != 1:
            raise SystemExit(f"{file}: {rate} Hz, {audio.ndim} channels; scenes are made of mono at {RATE} Hz.")
        mono: Floats = audio
        return mono


def scene(corpus: Corpus, seed: int, number: int) -> tuple[Floats, list[dict[str, str]]]:
    """The samples of a scene, and the rows of the clips in it, the one in front first."""
    rng = np.random.default_rng([seed, number])
    kinds = [kind for kind in _KINDS if kind in corpus.rows]
    shares = np.array([_KINDS[kind] for kind in kinds])
    first, second, behind = (kinds[i] for i in rng.choice(len(kinds), size=3, p=shares / shares.sum()))
    rows = [corpus.draw(rng, first)]
    mix = normalised(event(rng, corpus, rows[0]))
    if rng.random() < 0.4:
        rows.append(corpus.draw(rng, second))
        mix += level(rng, -20, 0) * normalised(event(rng, corpus, rows[1]))
    ground = rng.random()
    if ground < 0.4:
        mix += level(rng, -50, -15) * normalised(noise(rng, len(mix)))
    elif ground < 0.7:
        rows.append(corpus.draw(rng, "ambience" if "ambience" in corpus.rows and rng.random() < 0.5 else behind))
        mix += level(rng, -30, -10) * normalised(np.resize(corpus.read(rng, rows[-1]), len(mix)))
    return level(rng, -25, -1) * mix / max(1e-9, float(np.abs(mix).max())), rows


def event(rng: np.random.Generator, corpus: Corpus, row: dict[str, str]) -> Floats:
    """A scene in which a clip sounds, a short one perhaps several times."""
    sound = changed(rng, corpus.read(rng, row), _SPEECH_OCTAVES if row["kind"] == "speech" else _OCTAVES)
    total = SECONDS * RATE
    out = np.zeros(total, np.float32)
    times = int(rng.integers(1, 5)) if len(sound) < 2.5 * RATE else 1
    for _ in range(times):
        start = int(rng.integers(max(1, total - len(sound) // 2)))
        part = sound[: total - start]
        out[start : start + len(part)] += level(rng, -6, 0) * part
    return out


def changed(rng: np.random.Generator, sound: Floats, octaves: float) -> Floats:
    """A sound, perhaps at another speed, of another balance, and in a room."""
    if rng.random() < 0.7:
        sound = np.asarray(soxr.resample(sound, RATE, RATE * 2 ** rng.uniform(-octaves, octaves)), np.float32)
    if rng.random() < 0.5:
        sound = tilted(sound, rng.uniform(-_TILT, _TILT))
    if rng.random() < 0.5:
        sound = in_room(rng, sound)
    return sound


def tilted(sound: Floats, slope: float) -> Floats:
    """A sound whose spectrum rises by ``slope`` dB an octave more than before; none at 1 kHz."""
    spectrum = np.fft.rfft(sound)
    frequencies = np.maximum(50, np.arange(len(spectrum)) * RATE / max(1, len(sound)))
    spectrum *= 10 ** (slope * np.log2(frequencies / 1000) / 20)
    return np.fft.irfft(spectrum, n=len(sound)).astype(np.float32)


def in_room(rng: np.random.Generator, sound: Floats) -> Floats:
    """A sound with an echo of noise that dies away."""
    length = float(np.exp(rng.uniform(*np.log(_ROOM))))
    time = np.arange(int(length * RATE)) / RATE
    echo = rng.standard_normal(len(time)) * np.exp(-6.9 * time / length)
    echo *= level(rng, -20, 3) / np.sqrt((echo**2).sum())
    echo[0] += 1
    return np.asarray(fftconvolve(sound, echo), np.float32)


def noise(rng: np.random.Generator, length: int) -> Floats:
    """Noise between white and brown."""
    spectrum = np.fft.rfft(rng.standard_normal(length))
    spectrum *= np.maximum(1, np.arange(len(spectrum))) ** -rng.uniform(0, 1)
    return np.fft.irfft(spectrum, n=length).astype(np.float32)


def normalised(sound: Floats) -> Floats:
    """A sound whose loudest sample is 1."""
    return sound / max(1e-9, float(np.abs(sound).max()))


def level(rng: np.random.Generator, lowest: float, highest: float) -> np.float32:
    """A factor drawn evenly in decibels."""
    return np.float32(10 ** (rng.uniform(lowest, highest) / 20))


def write(number: int, seed: int, folder: Path) -> dict[str, str]:
    """Write a scene of this process's corpus if it is not there; its row for the manifest."""
    file = folder / f"{number // 1000:03}" / f"{number % 1000:03}.flac"
    samples, rows = scene(_corpora[0], seed, number)
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(file) as partial:
            soundfile.write(partial, samples, RATE, format="FLAC", subtype="PCM_16")
    return {
        "file": str(file.relative_to(folder.parent)),
        "seconds": f"{SECONDS:.3f}",
        "kind": rows[0]["kind"],
        "package": PACKAGE,
        "version": "",
        "member": "; ".join(row["file"] for row in rows),
        "licence": " and ".join(dict.fromkeys(row["licence"] for row in rows)),
    }


def by_kind_and_package(rows: Sequence[dict[str, str]]) -> dict[str, dict[str, list[dict[str, str]]]]:
    """Rows of a manifest, by kind and then by package."""
    sorted_rows: dict[str, dict[str, list[dict[str, str]]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        sorted_rows[row["kind"]][row["package"]].append(row)
    return {kind: dict(packages) for kind, packages in sorted_rows.items()}


def main(
    manifest: Annotated[Path, typer.Argument(help="Of the clips.")],
    output: Annotated[Path, typer.Argument(help="The manifest to write, in the same folder.")],
    hours: Annotated[float, typer.Option(min=0.01, help="Of scenes.")] = 30.0,
    without: Annotated[Path | None, typer.Option(help="The report of benchmarks.pretraining.overlap.")] = None,
    seed: int = 0,
    workers: Annotated[int, typer.Option(min=1)] = 2,
) -> None:
    """Make scenes of the clips of a corpus."""
    folder = output.resolve().parent
    if folder != manifest.resolve().parent:
        raise SystemExit(f"{output} must be in the folder of {manifest}, to which its files are relative.")
    unwanted = set() if without is None else overlapping(without)
    rows = [row for row in read_rows(manifest) if (folder / row["file"]).resolve() not in unwanted]
    corpus = Corpus(folder, by_kind_and_package(rows))
    make = partial(write, seed=seed, folder=folder / output.stem)
    numbers = range(round(hours * 3600 / SECONDS))
    with ProcessPoolExecutor(workers, initializer=_corpora.append, initargs=(corpus,)) as pool:
        made = list(tqdm(pool.map(make, numbers, chunksize=20), total=len(numbers), desc="scenes", unit=" scenes"))
    with output.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows([*rows, *({key: row[key] for key in rows[0]} for row in made)])


if __name__ == "__main__":
    typer.run(main)
