"""Bundle what a run made: ``weights/`` with the model in float16, its configuration, loss curve and model card.

python -m benchmarks.pretraining.record runs/NAME ../shared/data
python -m benchmarks.pretraining.blocks runs/NAME ../shared/data --keep 8 --keep 9
python -m benchmarks.pretraining.release runs/NAME joined/manifest.csv --after FIRST --blocks 9 --layer -2 --layer -1
python -m benchmarks.quality --model ../shared/seed-weights ../shared/data/*/metadata.csv
python -m benchmarks.render                        # puts the probes into the card, too
"""

import dataclasses
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.pretraining.average import average
from benchmarks.pretraining.blocks import BY_BLOCKS
from benchmarks.pretraining.encoders import read_encoder
from benchmarks.pretraining.record import FOLDER as RECORDS
from benchmarks.pretraining.scenes import PACKAGE as SCENES
from benchmarks.pretraining.targets import read_rows
from benchmarks.render import CARD, on_cores, replace_section
from m2d_embed.checkpoints.layouts import WEIGHT_FILES, Checkpoint, write_native
from m2d_embed.checkpoints.registry import BUNDLED_NAME
from m2d_embed.config import ScenePooling, resolve_layers
from m2d_embed.training.settings import read_yaml

_SOURCE = "m2d_embed.pretrain, recipe {recipe}: {hours:.0f} h of free audio, teachers YAMNet and Resemblyzer"
_LICENCE = "Apache-2.0"
_SCENE_POOLING: ScenePooling = "mean_std"  # benchmarks.quality shows both
_BEGUN = {"encoder": "encoder", "predictor": "encoder and predictor", "all": "encoder, predictor and head"}
_MANY = 0.05  # hours of audio under a licence that is named by itself


def hours(rows: list[dict[str, str]], column: str) -> dict[str, float]:
    """Hours of audio for each value of a column of a manifest, the most first."""
    counted: dict[str, float] = {}
    for row in rows:
        counted[row[column]] = counted.get(row[column], 0.0) + float(row["seconds"]) / 3600
    return dict(sorted(counted.items(), key=lambda item: -item[1]))


def recorded(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """The rows of a manifest that are recordings, not scenes made of them."""
    return [row for row in rows if row["package"] != SCENES]


def data_section(rows: list[dict[str, str]]) -> str:
    """What the corpus consists of: kinds, sources, licences; scenes made of it are told of apart."""
    made, rows = [row for row in rows if row["package"] == SCENES], recorded(rows)
    packages: dict[str, set[str]] = {}
    clips = Counter(row["kind"] for row in rows)
    for row in rows:
        packages.setdefault(row["kind"], set()).add(row["package"])
    kinds = hours(rows, "kind")
    licences = hours(rows, "licence")
    named = [f"{name} {length:.1f} h" for name, length in licences.items() if length >= _MANY]
    rest = len(licences) - len(named)
    lines = ["| kind | hours | files | sources |", "| --- | ---: | ---: | ---: |"]
    lines += [f"| {kind} | {length:.1f} | {clips[kind]:,} | {len(packages[kind])} |" for kind, length in kinds.items()]
    total = sum(kinds.values())
    lines.append(f"| all | {total:.1f} | {len(rows):,} | {len({row['package'] for row in rows})} |")
    lines += ["", f"Licences, by what each source states of a file: {', '.join(named)}, and {rest} others."]
    if made:
        length = sum(hours(made, "kind").values())
        lines += ["", f"And {length:.1f} hours of scenes made of these sounds (`benchmarks/pretraining/scenes.py`)."]
    return "\n".join(lines)


def stage(recipe: str, record: dict[str, Any]) -> str:
    """Settings, compute and loss of one run, as an item of a list."""
    settings, machine = record["settings"], record["machine"]
    training, predictor = settings["training"], settings["predictor"]
    pixels, offline = settings["offline"]["weights"]
    start = settings["start"]
    begun = f"begins with the {_BEGUN[start['parts']]} of the stage before;" if start["model"] else "from scratch;"
    optimizer = "Muon and AdamW" if training.get("optimizer") == "muon" else "AdamW"
    batch, last = training["batch_size"], record["curve"][-1]
    lines = [
        f"* [`{recipe}`](../m2d_embed/pretrain/recipes/{recipe}.yaml): objective `{settings['objective']}`,",
        begun,
        f"{settings['masking']['mask_ratio']:.0%} of the patches masked at random;",
        f"the loss is {pixels:g} x pixels + {offline:g} x offline targets;",
        f"a predictor of {predictor['depth']} layers, {predictor['dim']}-d;",
        f"{training['steps']:,} steps of {batch} crops of 3.04 s, {record['crops']:,} in all;",
        f"{optimizer}, peak learning rate {training['lr'] or 3e-4 * batch / 256:g} after a warm-up of",
        f"{training['warmup']:.0%}, then a cosine; weight decay {training['weight_decay']:g};",
        f"{training['precision']}; seed {training['seed']}.",
        f"{record['minutes']:.0f} minutes on {on_cores(machine)}.",
        f"Losses at the end: {last['loss/online']:.3f} (pixels), {last['loss/offline']:.3f} (targets, 2 - 2 cos).",
    ]
    return "\n  ".join(lines)


def training_section(
    stages: dict[str, dict[str, Any]], averaged: list[str], trained: int, kept: int, layers: tuple[int, ...]
) -> str:
    """The runs that made the encoder, by their recipes and in order; which of them it is the mean of; blocks kept, and
    those that embeddings are made of.
    """
    runs = "\n".join(stage(recipe, record) for recipe, record in stages.items())
    mean = f"\n\nThe weights are the mean of those of {_listed(averaged)}." if len(averaged) > 1 else ""
    left = "" if kept == trained else f"\n\nOf the {trained} blocks trained, the first {kept} are kept."
    if len(layers) > 1:
        numbers = ", ".join(str(number + 1) for number in resolve_layers(layers, kept))
        left += f"\n\nEmbeddings are the mean of blocks {numbers}, each after the final norm."
    left += blocks_table(list(stages.values())[-1].get(BY_BLOCKS, {}))
    return f"""{runs}{mean}{left}

![loss](loss.png)

`m2d-embed pretrain RECIPE.yaml` with each of these recipes, one after the other, does it again, with the commands that
they name. What else was tried is in
[benchmarks/pretraining](../benchmarks/pretraining/README.md)."""


def blocks_table(found: dict[str, dict[str, float]]) -> str:
    """Accuracies by blocks kept, as a paragraph and a table; nothing if none were measured."""
    if not found:
        return ""
    sets = list(next(iter(found.values())))
    lines = [
        "",
        "",
        "The last run's encoder, cut after some of its blocks (linear probes of mean and standard deviation, "
        "bfloat16, accuracy in %):",
        "",
        f"| blocks kept | {' | '.join(sets)} | mean |",
        f"| ---: |{' ---: |' * len(sets)} ---: |",
    ]
    for count, scores in found.items():
        cells = [scores[name] for name in sets]
        lines.append(f"| {count} | {' | '.join(f'{cell:.1f}' for cell in [*cells, sum(cells) / len(cells)])} |")
    return "\n".join(lines)


def _listed(names: list[str]) -> str:
    """`` `a`, `b` and `c` ``."""
    *first, last = [f"`{name}`" for name in names]
    return f"{', '.join(first)} and {last}" if first else last


def first_blocks(checkpoint: Checkpoint, count: int) -> Checkpoint:
    """An encoder without its last blocks; the final norm stays."""
    dropped = [f"encoder.blocks.{index}." for index in range(count, checkpoint.config.depth)]
    tensors = {name: t for name, t in checkpoint.tensors.items() if not name.startswith(tuple(dropped))}
    return Checkpoint(dataclasses.replace(checkpoint.config, depth=count, layers=(-1,)), tensors)


def write_weights(checkpoint: Checkpoint, source: str, folder: Path, layers: tuple[int, ...] = (-1,)) -> None:
    """An encoder as ``model.safetensors`` in float16, and its configuration, which says what its embeddings are of."""
    config = dataclasses.replace(
        checkpoint.config,
        name=BUNDLED_NAME,
        source=source,
        license=_LICENCE,
        layers=layers,
        scene_pooling=_SCENE_POOLING,
    )
    write_native(folder, Checkpoint(config, checkpoint.tensors), [torch.float16])
    (folder / WEIGHT_FILES[torch.float16]).replace(folder / WEIGHT_FILES[torch.float32])


def main(
    run: Annotated[Path, typer.Argument(help="The run's folder.")],
    manifest: Annotated[Path, typer.Argument(help="Of the clips that it was trained on: kind, package, licence.")],
    after: Annotated[
        list[str] | None, typer.Option(help="Recipe of a stage before, the first first; repeatable.")
    ] = None,
    blocks: Annotated[int | None, typer.Option(min=1, help="Keep only the encoder's first so many blocks.")] = None,
    layer: Annotated[
        list[int] | None,
        typer.Option(help="Block whose features, averaged, embeddings are; repeatable; by default the last."),
    ] = None,
    mean_with: Annotated[
        list[Path] | None, typer.Option(help="A run whose weights are averaged with this one's; repeatable.")
    ] = None,
) -> None:
    """Write ``weights/``; the card's other sections stay as they are."""
    runs = [*(mean_with or []), run]
    *_, recipe = averaged = [str(read_yaml(folder / "recipe.yaml")["name"]) for folder in runs]
    rows = read_rows(manifest)
    stages = {name: json.loads((RECORDS / f"{name}.json").read_text()) for name in [*(after or []), recipe]}
    source = _SOURCE.format(recipe=recipe, hours=sum(hours(recorded(rows), "kind").values()))
    exported = run / "export"
    trained = average([read_encoder(str(folder / "export")) for folder in runs])
    kept = blocks or trained.config.depth
    if kept > trained.config.depth:
        raise SystemExit(f"--blocks {kept}: {exported} has {trained.config.depth}.")
    layers = tuple(layer or (-1,))
    write_weights(first_blocks(trained, kept), source, CARD.parent, layers)
    shutil.copyfile(exported / "loss.png", CARD.parent / "loss.png")
    card = CARD.read_text(encoding="utf-8")
    card = replace_section(card, "data", data_section(rows))
    card = replace_section(card, "training", training_section(stages, averaged, trained.config.depth, kept, layers))
    CARD.write_text(card, encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
