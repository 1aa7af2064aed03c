r"""How much a teacher knows before anything is trained on it: linear probes of its features, averaged over time.

    python -m benchmarks.pretraining.yamnet_features DATA/esc50/metadata.csv yamnet.tflite features \
        --layer 12 --layer 13
    python -m benchmarks.pretraining.probe_features features/manifest.csv --part 1024 --part 512 --part 1024

The manifest is that of a labelled set, as ``m2d-embed probe`` takes them, with the column ``features``. ``--part`` cuts
the values of a frame into parts, each probed alone before all together.
"""

from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from benchmarks.pretraining.targets import read_rows
from m2d_embed.evaluate.features import Vectors
from m2d_embed.evaluate.probes import linear_probe_accuracy
from m2d_embed.labelled.clips import read_labelled


def clip_means(manifest: Path) -> Vectors:
    """The mean over time of every clip's features, (clips, values) float32."""
    files = [manifest.parent / row["features"] for row in read_rows(manifest)]
    return np.stack([np.load(file, allow_pickle=False).astype(np.float32).mean(axis=0) for file in files])


def main(
    manifest: Annotated[Path, typer.Argument(help="Of a labelled set and its features.")],
    part: Annotated[list[int] | None, typer.Option(min=1, help="So many values, in order; repeatable.")] = None,
) -> None:
    """Print the accuracy of every part, and of all values."""
    clips, means = read_labelled(manifest), clip_means(manifest)
    ends = np.cumsum(part or [means.shape[1]])
    if ends[-1] != means.shape[1]:
        raise SystemExit(f"--part: the parts have {ends[-1]} values together, a frame has {means.shape[1]}.")
    spans = [(end - size, end) for end, size in zip(ends, part or ends, strict=True)]
    if len(spans) > 1:
        spans.append((0, means.shape[1]))
    for start, end in spans:
        accuracy = linear_probe_accuracy(np.ascontiguousarray(means[:, start:end]), clips)
        print(f"values {start} to {end - 1}: {100 * accuracy:.1f} %", flush=True)


if __name__ == "__main__":
    typer.run(main)
