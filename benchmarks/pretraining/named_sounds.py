"""Labelled sets out of a corpus whose instruments are named by what they play: notes, and parts of drum kits.

    python -m benchmarks.pretraining.named_sounds corpus/manifest.csv named
    m2d-embed probe named/notes.csv
    m2d-embed probe named/drums.csv

For comparing settings: their labels teach nothing, but the clips themselves may be trained on. Of notes the label is
the pitch class, as libraries disagree on the octave of middle C. Instruments of one name (its first word) are in one
fold, and so are kits.
"""

import csv
import hashlib
import re
from collections.abc import Callable
from pathlib import Path

import typer

from benchmarks.pretraining.targets import read_rows

_NOTE = re.compile(r"(?P<instrument>.*?)[ _-](?P<name>[A-G])(?P<accidental>[#b]?)(?P<octave>-?\d)[ _.(]")
_SEMITONES = {"C": 0, "D": 2, "E": 4, "F": 5, "G": 7, "A": 9, "B": 11}
_CLASSES = ("C", "C#", "D", "D#", "E", "F", "F#", "G", "G#", "A", "A#", "B")
_ACCIDENTALS = {"#": 1, "b": -1, "": 0}
_LOWEST, _HIGHEST = 36, 90  # MIDI numbers; beyond, a spectrum or 8 kHz tells little of a note
_DRUMS = {
    "kick": ("kick", "bd_", "bass drum"),
    "snare": ("snare", "sn_"),
    "hi-hat": ("hihat", "hat"),
    "tom": ("tom",),
    "crash": ("cras",),
    "ride": ("ride",),
    "clap": ("clap",),
    "bell": ("bell",),
    "rim": ("rim", "stick"),
}
_KITS = ("hydrogen", "avldrums", "sonic-pi", "lmms", "chuck", "exadrums")
_FOLDS = 5

#: The label and the group of a row, or None.
Naming = Callable[[dict[str, str]], tuple[str, str] | None]


def note(row: dict[str, str]) -> tuple[str, str] | None:
    """The pitch class of a soundfont's sample, and its instrument."""
    found = _NOTE.match(row["member"].rpartition("/")[2])
    if found is None or ("soundfont" not in row["package"] and row["package"] != "minuet-data"):
        return None
    semitones = _SEMITONES[found["name"]] + _ACCIDENTALS[found["accidental"]]
    midi = 12 * (int(found["octave"]) + 1) + semitones
    words = found["instrument"].lower().lstrip("0123456789-").split()
    if not _LOWEST <= midi <= _HIGHEST or not words:
        return None
    return _CLASSES[semitones % 12], words[0]


def drum(row: dict[str, str]) -> tuple[str, str] | None:
    """The part of a drum kit, and the kit."""
    folder, _, name = row["member"].lower().rpartition("/")
    if not row["package"].startswith(_KITS):
        return None
    for label, words in _DRUMS.items():
        if any(word in name for word in words):
            return label, folder or row["package"]
    return None


def write(rows: list[dict[str, str]], corpus: Path, naming: Naming, output: Path) -> int:
    """Write the clips that have a name as a labelled CSV; returns how many."""
    count = 0
    with output.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["file", "label", "fold"])
        for row in rows:
            named = naming(row) if row["kind"] == "instrument" else None
            if named is not None:
                label, group = named
                fold = int(hashlib.sha256(group.encode()).hexdigest(), 16) % _FOLDS + 1
                writer.writerow([(corpus / row["file"]).resolve(), label, fold])
                count += 1
    return count


def main(manifest: Path, output: Path) -> None:
    """Write ``notes.csv`` and ``drums.csv`` of a corpus."""
    rows = read_rows(manifest)
    output.mkdir(parents=True, exist_ok=True)
    for name, naming in (("notes", note), ("drums", drum)):
        print(f"{output / name}.csv: {write(rows, manifest.parent, naming, output / f'{name}.csv')} clips")


if __name__ == "__main__":
    typer.run(main)
