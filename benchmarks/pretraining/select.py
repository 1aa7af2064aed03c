"""One manifest of some clips of others: what a stage of the bundled model is trained on, before targets are made.

    python -m benchmarks.pretraining.select corpus/thinned.csv corpus/manifest.csv --source debian --one-in music=3
    python -m benchmarks.pretraining.select corpus/github.csv corpus/manifest.csv --source github
    python -m benchmarks.pretraining.select corpus/all.csv corpus/with-scenes.csv corpus/github-scenes.csv

Clips come in the order of the manifests, one that several have comes once. Which of a kind stay is told from a hash of
the file's name: the same clips on every machine, and still the same when others are added to the corpus.
"""

import csv
import zlib
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.pretraining.join_features import overlapping
from benchmarks.pretraining.scenes import PACKAGE
from benchmarks.pretraining.targets import read_rows


class Source(StrEnum):
    """Where a corpus has its clips from."""

    DEBIAN = "debian"
    GITHUB = "github"
    SCENES = "scenes"


def source_of(row: dict[str, str]) -> Source:
    """Repositories are named OWNER/NAME; names of Debian's packages have no slash."""
    if row["package"] == PACKAGE:
        return Source.SCENES
    return Source.GITHUB if "/" in row["package"] else Source.DEBIAN


def divisors(given: list[str], kinds: set[str]) -> dict[str, int]:
    """``KIND=NUMBER`` as numbers by kind."""
    found = {}
    for text in given:
        kind, _, number = text.partition("=")
        if kind not in kinds or not number.isascii() or not number.isdigit() or int(number) < 1:
            raise SystemExit(f"--one-in {text}: write KIND=NUMBER, of {', '.join(sorted(kinds))}, 1 or more.")
        found[kind] = int(number)
    return found


def main(
    output: Annotated[Path, typer.Argument(help="The manifest to write, in the same folder.")],
    manifests: Annotated[list[Path], typer.Argument(help="Of the clips.")],
    source: Annotated[Source | None, typer.Option(help="Only clips of it.")] = None,
    one_in: Annotated[list[str] | None, typer.Option(help="KIND=NUMBER: one clip in so many; repeatable.")] = None,
    without: Annotated[Path | None, typer.Option(help="The report of benchmarks.pretraining.overlap.")] = None,
) -> None:
    """Write a manifest of the clips of others."""
    folder = output.resolve().parent
    for manifest in manifests:
        if manifest.resolve().parent != folder:
            raise SystemExit(f"{output} must be in the folder of {manifest}, to which its files are relative.")
        if manifest.resolve() == output.resolve():
            raise SystemExit(f"{output} would be lost: write the chosen clips to another manifest.")
    rows = {row["file"]: row for manifest in manifests for row in read_rows(manifest)}
    divisor = divisors(one_in or [], {row["kind"] for row in rows.values()})
    unwanted = set() if without is None else overlapping(without)
    chosen = [
        row
        for row in rows.values()
        if source in (None, source_of(row))
        and zlib.crc32(row["file"].encode()) % divisor.get(row["kind"], 1) == 0
        and (folder / row["file"]).resolve() not in unwanted
    ]
    if not chosen:
        raise SystemExit("no clip is left.")
    if any(row.keys() != chosen[0].keys() for row in chosen):
        raise SystemExit("the manifests have different columns.")
    with output.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(chosen[0]))
        writer.writeheader()
        writer.writerows(chosen)
    print(f"{len(chosen)} of {len(rows)} clips")


if __name__ == "__main__":
    typer.run(main)
