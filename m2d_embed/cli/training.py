"""Commands that train: ``probe``, ``finetune``, ``pretrain``, ``masks``."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from m2d_embed.cli.app import app
from m2d_embed.cli.options import (
    BatchSize,
    Concat,
    Device,
    Dtype,
    Flat,
    Layers,
    Model,
    Probe,
    Scenes,
    Threads,
    features_of,
    load_model,
    require_extra,
)
from m2d_embed.errors import ConfigError

if TYPE_CHECKING:
    from m2d_embed.training.settings import RunRecipe

T = TypeVar("T")
R = TypeVar("R", bound="RunRecipe")

Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Settings, e.g. data.source=sounds/ training.epochs=20 training.lr=5e-4"),
]
RecipeName = Annotated[str, typer.Option("--recipe", help="A YAML file, or the name of a recipe of the package.")]
Show = Annotated[bool, typer.Option("--show", help="Print the whole recipe, defaults included, and stop.")]
ListRecipes = Annotated[bool, typer.Option("--list", help="List the recipes of the package.")]


@app.command()
def probe(
    data: Annotated[Path, typer.Argument(help="A folder with one sub-folder a label, or a CSV (file, label, fold).")],
    model: Model = "",
    probe: Annotated[list[Probe] | None, typer.Option(help="Which classifiers; repeatable. All by default.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder of the report; probe-<data>-<model> by default.")
    ] = None,
    label_column: Annotated[str, typer.Option(help="The CSV's column of labels; 'label' or 'labels' by default.")] = "",
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many clips, some of every label.")] = None,
    draw_map: Annotated[bool, typer.Option("--map", help="Also write map.html: all clips to see and hear.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of what is drawn: folds, if the data has none, the MLP ...")] = 0,
    layers: Layers = None,
    concat: Concat = None,
    flat: Flat = None,
    scene_pooling: Scenes = None,
    device: Device = None,
    dtype: Dtype = None,
    threads: Threads = None,
    batch_size: BatchSize = 32,
) -> None:
    """Score embeddings on labelled clips: linear, nearest-neighbour and MLP probe. Needs the extra 'eval'.

    Prints a table, and writes results.json, predictions.csv and confusion.png. Embeddings are kept in the cache, so a
    second look at the same clips is quick, and a run that was stopped goes on where it was.
    """
    require_extra("eval", "sklearn")
    from m2d_embed.evaluate.probe_run import ProbeOptions, data_name, run_probe
    from m2d_embed.evaluate.report import format_report

    features = features_of(layers, concat, flat, scene_pooling)
    loaded = load_model(model, device, dtype, features, threads)
    name = loaded.config.name or Path(model).name
    output = output or Path(f"probe-{data_name(data, label_column)}-{name}")
    probes = tuple(chosen.value for chosen in probe or Probe)
    options = ProbeOptions(probes, label_column, limit, seed, batch_size, draw_map, show_progress=True)
    report, files = run_probe(loaded, data, output, options)
    print(format_report(report))
    print(f"-> {output}: {', '.join(file.name for file in files)}")


@app.command()
def pretrain(
    name: Annotated[str, typer.Argument(metavar="RECIPE", help="The same as --recipe.")] = "",
    overrides: Overrides = None,
    recipe: RecipeName = "",
    export: Annotated[
        bool, typer.Option("--export", help="Export the newest checkpoint of the run, without training further.")
    ] = False,
    show: Show = False,
    list_recipes: ListRecipes = False,
) -> None:
    """Pre-train a model. Needs the extra 'pretrain'.

    Give the same command again to go on with a run that was stopped. On several devices: torchrun --nproc-per-node N
    -m m2d_embed pretrain ..., or accelerate launch.
    """
    require_extra("pretrain", "accelerate", "yaml", "tensorboard", "webdataset", "braceexpand", "sklearn")
    from m2d_embed.pretrain.recipe import RECIPES, load_recipe

    if list_recipes:
        _print_recipes(RECIPES)
        return
    name, settings = _split_settings(name, overrides)
    if name and recipe:
        raise ConfigError(f"two recipes, {name} and {recipe}; give one.")
    if not (name or recipe):
        raise ConfigError("which recipe? Give a YAML file, or one of the names that --list shows.")
    loaded = load_recipe(recipe or name, settings)
    if show:
        print(loaded.to_yaml(), end="")
        return
    from m2d_embed.pretrain import loop

    if export:
        print(loop.export_latest(loaded))
        return
    done = _train(loop.pretrain, loaded)
    if done is not None:
        print(done)


@app.command()
def finetune(
    data: Annotated[
        str, typer.Argument(help="A folder with a sub-folder a label, or a CSV of clips or of events (data.source).")
    ] = "",
    overrides: Overrides = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Which model; the bundled one by default (start.model).")
    ] = None,
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="Folder of the run; runs/finetune-<data>-<model> by default.")
    ] = None,
    fold: Annotated[
        str | None,
        typer.Option(help="The fold to test; the lowest by default. 'all': each in turn; 'none': no test (data.fold)."),
    ] = None,
    recipe: RecipeName = "",
    show: Show = False,
    list_recipes: ListRecipes = False,
) -> None:
    """Train a classifier on labelled clips or events, from a pretrained model. Needs the extra 'finetune'.

    Give the same command again to go on with a run that was stopped. The model is in <output>/export; 'tag' takes it.
    On several devices: torchrun --nproc-per-node N -m m2d_embed finetune ..., or accelerate launch.
    """
    require_extra("finetune", "accelerate", "yaml", "tensorboard", "sklearn")
    from m2d_embed.finetune.recipe import RECIPES, load_recipe

    if list_recipes:
        _print_recipes(RECIPES)
        return
    data, settings = _split_settings(data, overrides)
    given = {"data.source": data or None, "start.model": model, "output": output, "data.fold": fold}
    settings += [f"{key}={value}" for key, value in given.items() if value is not None]
    loaded = load_recipe(recipe, settings)
    if show:
        print(loaded.to_yaml(), end="")
        return
    from m2d_embed.finetune.evaluate import describe
    from m2d_embed.finetune.loop import finetune as run

    scores = _train(run, loaded)
    if scores is not None:
        print(f"{loaded.folder}: {describe(scores) if scores else 'trained on all clips, not tested'}")


def _split_settings(first: str, others: list[str] | None) -> tuple[str, list[str]]:
    """A first argument that is none of KEY=VALUE, "" if there is none, and those that are."""
    is_setting = re.match(r"[a-z_.]+=", first) is not None and not Path(first).exists()
    return ("", [first, *(others or ())]) if is_setting else (first, list(others or ()))


def _print_recipes(folder: Path) -> None:
    from m2d_embed.training.settings import known_recipes

    for name, about in known_recipes(folder).items():
        print(f"{name:<20}{about}")


def _train(run: Callable[[R], T | None], recipe: R) -> T | None:
    """What a run comes to, in the main process; None elsewhere and if it was stopped, which is said."""
    from m2d_embed.training.processes import is_main_process

    try:
        done = run(recipe)
    except KeyboardInterrupt as error:  # before the first step, or a second one
        print("interrupted; what is done is kept, try again to go on", file=sys.stderr)
        raise typer.Exit(130) from error
    if not is_main_process():
        return None
    if done is None:
        print(f"stopped and saved in {recipe.folder}; give the same command again to go on")
    return done


@app.command()
def masks(
    output: Annotated[Path, typer.Option("--output", "-o", help="The PNG.")] = Path("masks.png"),
    input_size: Annotated[tuple[int, int], typer.Option(help="Mels and frames of the window.")] = (80, 608),
    patch_size: Annotated[tuple[int, int], typer.Option(help="Mels and frames of a patch.")] = (16, 16),
    mask_ratio: Annotated[float, typer.Option(help="Share of patches masked.")] = 0.7,
    seed: Annotated[int, typer.Option(help="Other examples.")] = 0,
) -> None:
    """Draw a sheet of example masks, a row for each strategy of pre-training."""
    from m2d_embed.config import ModelConfig
    from m2d_embed.pretrain.mask_sheet import draw_sheet

    grid = ModelConfig(input_size=input_size, patch_size=patch_size).grid_size
    draw_sheet(output, grid, mask_ratio, seed)
    print(output)
