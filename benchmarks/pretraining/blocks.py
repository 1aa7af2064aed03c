"""How many of an encoder's blocks to keep: linear probes of what a run made, cut after some of its blocks.

python -m benchmarks.pretraining.blocks runs/NAME ../shared/data --keep 8 --keep 9 --keep 10

The last blocks of an encoder may serve its objective more than those who use it. Scene embeddings are means and
standard deviations over time, in bfloat16; the accuracies go into the run's record, and from there into the card.
"""

import json
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from benchmarks.pretraining.record import FOLDER
from m2d_embed.config import FeatureConfig
from m2d_embed.evaluate.embedding_cache import embed_cached, hash_files
from m2d_embed.evaluate.features import Vectors
from m2d_embed.evaluate.probes import linear_probe_accuracy
from m2d_embed.labelled.clips import LabelledClips, read_labelled
from m2d_embed.m2d import M2D
from m2d_embed.training.settings import read_yaml

BY_BLOCKS = "linear probe by blocks kept, accuracy in %"


def scenes_by_blocks(model: M2D, clips: LabelledClips) -> list[Vectors]:
    """Scene embeddings of the layers that a model's features are made of, each (clips, 2 x values of a frame)."""
    joint = embed_cached(model, clips.files, hash_files(clips.files), show_progress=True)
    layers = len(model.features.blocks(model.config))
    parts = np.split(joint, 2 * layers, axis=1)  # means of every layer, then standard deviations
    return [np.concatenate([parts[layer], parts[layers + layer]], axis=1) for layer in range(layers)]


def main(
    run: Annotated[Path, typer.Argument(help="The run's folder; it must have a record.")],
    data: Annotated[Path, typer.Argument(help="Labelled sets in a folder, each with a metadata.csv.")],
    keep: Annotated[list[int], typer.Option(min=1, help="A number of blocks; repeatable.")],
) -> None:
    """Probe a run's encoder after each number of blocks, and add that to the run's record."""
    file = FOLDER / f"{read_yaml(run / 'recipe.yaml')['name']}.json"
    if not file.is_file():
        raise SystemExit(f"{file}: no such record; python -m benchmarks.pretraining.record {run} makes it.")
    counts = sorted(set(keep))
    depth = M2D.from_pretrained(str(run / "export")).config.depth
    if counts[-1] > depth:
        raise SystemExit(f"--keep {counts[-1]}: the encoder of {run} has {depth} blocks.")
    layers = tuple(count - 1 for count in counts)
    features = FeatureConfig(layers=layers, layer_pooling="concat", scene_pooling="mean_std")
    model = M2D.from_pretrained(str(run / "export"), dtype="bf16", features=features)
    found: dict[str, dict[str, float]] = {str(count): {} for count in counts}
    for metadata in sorted(data.glob("*/metadata.csv")):
        clips, name = read_labelled(metadata), metadata.parent.name
        for count, scenes in zip(counts, scenes_by_blocks(model, clips), strict=True):
            found[str(count)][name] = round(100 * linear_probe_accuracy(scenes, clips), 2)
            print(f"{name}, {count} blocks: {found[str(count)][name]}", flush=True)
    record = json.loads(file.read_text())
    file.write_text(json.dumps({**record, BY_BLOCKS: found}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
