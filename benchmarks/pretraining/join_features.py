r"""One manifest for M2D-S from the targets of several teachers, and how often each kind of sound is drawn.

    python -m benchmarks.pretraining.join_features joined yamnet/manifest.csv voice/manifest.csv \
        --without overlap.json \
        --share speech=0.3 --share music=0.23 --share effects=0.3 --share instrument=0.1 --share ambience=0.07 \
        --parts speech=0.5,1 --parts music=1,0.5 --parts effects=1,0.5 --parts instrument=1,0.5 --parts ambience=1,0.5

Every value of a teacher is standardised over the corpus, as what all sounds have in common teaches nothing, and each
teacher has the same part in the joint target, however many values it gives, but for the kinds of sound named with
``--parts``. Shares become the weights of clips. Clips that ``benchmarks.pretraining.overlap`` reports are left out.
"""

import csv
import json
import os
from collections import Counter
from pathlib import Path
from typing import Annotated

import numpy as np
import numpy.typing as npt
import typer
from tqdm.auto import tqdm

from benchmarks.pretraining.targets import read_rows, save

_LIMIT = 6.0  # standard deviations; what goes beyond is cut
_STATISTICS_OF = 4000  # clips

Floats = npt.NDArray[np.float32]


def statistics(files: list[Path]) -> tuple[Floats, Floats]:
    """Mean and standard deviation of every value; of values that hardly change, a tenth of the usual one at least."""
    step = max(1, len(files) // _STATISTICS_OF)
    frames = np.concatenate([np.load(file).astype(np.float32) for file in files[::step]])
    std = frames.std(axis=0)
    return frames.mean(axis=0), np.maximum(std, 0.1 * np.median(std))


def standardised(file: Path, mean: Floats, std: Floats) -> Floats:
    """(frames, values) whose squares add up to about one a frame."""
    frames: Floats = ((np.load(file).astype(np.float32) - mean) / std).clip(-_LIMIT, _LIMIT)
    return frames / np.float32(len(mean) ** 0.5)


def by_kind(option: str, given: list[str], kinds: set[str], count: int) -> dict[str, list[float]]:
    """``KIND=NUMBER,NUMBER,...`` of every kind of a corpus, ``count`` numbers each."""
    numbers = {}
    for text in given:
        kind, _, values = text.partition("=")
        try:
            numbers[kind] = [float(value) for value in values.split(",")]
        except ValueError:
            numbers[kind] = []
        if len(numbers[kind]) != count or min(numbers[kind]) < 0 or not sum(numbers[kind]):
            raise SystemExit(f"{option} {text}: write KIND={','.join(['NUMBER'] * count)}, 0 or more and not all 0.")
    if numbers.keys() != kinds:
        raise SystemExit(f"{option}: the corpus has the kinds {', '.join(sorted(kinds))}; give one for each.")
    return numbers


def weights(kinds: list[str], shares: list[str]) -> list[float]:
    """A weight for every clip, 1 on average, so that kinds are drawn in these shares; equal ones without shares."""
    if not shares:
        return [1.0] * len(kinds)
    counts = Counter(kinds)
    wanted = {kind: share for kind, [share] in by_kind("--share", shares, set(counts), 1).items()}
    total = sum(wanted.values())
    return [wanted[kind] / total * len(kinds) / counts[kind] for kind in kinds]


def overlapping(report: Path) -> set[Path]:
    """The files of a corpus that share a name or a stretch of sound with a labelled clip."""
    found = json.loads(report.read_text(encoding="utf-8"))
    names = [*found["same name"], *(overlap["corpus"] for overlap in found["same sound"])]
    return {Path(name).resolve() for name in names}


def main(
    output: Path,
    manifests: list[Path],
    share: Annotated[list[str] | None, typer.Option(help="KIND=SHARE of the clips drawn; repeatable.")] = None,
    parts: Annotated[
        list[str] | None, typer.Option(help="KIND=PART,PART of the teachers, in order, in such clips; repeatable.")
    ] = None,
    without: Annotated[Path | None, typer.Option(help="The report of benchmarks.pretraining.overlap.")] = None,
) -> None:
    """Join the features of manifests of one corpus."""
    unwanted = set() if without is None else overlapping(without)
    tables = [
        [row for row in read_rows(manifest) if (manifest.parent / row["file"]).resolve() not in unwanted]
        for manifest in manifests
    ]
    sources = [[(m.parent / row["file"]).resolve() for row in rows] for m, rows in zip(manifests, tables, strict=True)]
    if any(other != sources[0] for other in sources):
        raise SystemExit("the manifests are not of the same clips in the same order")
    files = [[m.parent / row["features"] for row in rows] for m, rows in zip(manifests, tables, strict=True)]
    scales = [statistics(teacher) for teacher in files]
    first = tables[0]
    names = [f"features/{number // 1000:03}/{number % 1000:03}.npy" for number in range(len(first))]
    kinds = [row.get("kind", "") for row in first]
    equal = [f"{kind}={','.join('1' for _ in manifests)}" for kind in set(kinds)]
    part_of = by_kind("--parts", parts or equal, set(kinds), len(manifests))
    drawn = weights(kinds, share or [])
    for name, kind, *targets in zip(tqdm(names, unit="clip"), kinds, *files, strict=True):
        blocks = [
            np.float32(part) * standardised(file, *scale)
            for part, file, scale in zip(part_of[kind], targets, scales, strict=True)
        ]
        lengths = [len(block) for block in blocks]
        frames = min(lengths)
        if max(lengths) > frames + 1:  # by one, teachers may round the end of a clip differently
            raise SystemExit(f"{targets[0]}: teachers have {lengths} frames of this clip; give all one --hop")
        save(output / name, np.concatenate([block[:frames] for block in blocks], axis=1).astype(np.float16))
    with (output / "manifest.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(dict.fromkeys([*first[0], "weight"])))
        writer.writeheader()
        for row, source, name, weight in zip(first, sources[0], names, drawn, strict=True):
            file = os.path.relpath(source, output.resolve())
            writer.writerow({**row, "file": file, "features": name, "weight": f"{weight:.4f}"})


if __name__ == "__main__":
    typer.run(main)
