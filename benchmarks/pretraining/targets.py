"""What the makers of offline targets share: which clips are still to do, and the files they end in."""

import csv
import os
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import numpy.typing as npt
import soundfile

from m2d_embed.files import atomic_write


@dataclass(frozen=True)
class Job:
    """A clip, how long it is, and the file of its features."""

    source: Path
    seconds: float
    target: Path


def read_rows(manifest: Path) -> list[dict[str, str]]:
    """The rows of a manifest."""
    with manifest.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def todo(manifest: Path, output: Path) -> list[Job]:
    """The clips of a manifest whose features are not there yet. SystemExit if files lie elsewhere than below it."""
    jobs = [
        Job(manifest.parent / row["file"], _seconds(manifest.parent, row), output / _features(row))
        for row in read_rows(manifest)
    ]
    return [job for job in jobs if not job.target.exists()]


def _seconds(folder: Path, row: dict[str, str]) -> float:
    """As the manifest says; labelled sets have no such column."""
    return float(row["seconds"]) if "seconds" in row else float(soundfile.info(folder / row["file"]).duration)


def save(target: Path, features: npt.NDArray[Any]) -> None:
    """Write a ``.npy``, wholly or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(target) as partial, partial.open("wb") as stream:
        np.save(stream, features)


def write_manifest(manifest: Path, output: Path) -> None:
    """The manifest again, in the folder of the features, with where they are."""
    rows = read_rows(manifest)
    with (output / "manifest.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, [*rows[0], "features"])
        writer.writeheader()
        for row in rows:
            file = os.path.relpath(manifest.parent / row["file"], output)
            writer.writerow({**row, "file": file, "features": _features(row)})


def _features(row: dict[str, str]) -> str:
    """Where in the output folder the features of a clip are; nowhere else, whatever a manifest says."""
    file = PurePath(row["file"])
    if file.is_absolute() or ".." in file.parts:
        raise SystemExit(
            f"{file}: the files of a manifest must lie below it, as their features will lie in the output folder the "
            "same way; give the manifest of the corpus itself, with paths relative to it."
        )
    return f"{file}.npy"
