"""Short runs that differ from one recipe in one thing each, as ``trials.yaml`` beside this file lists them.

    python -m benchmarks.pretraining.trials joined/manifest.csv ../shared/data --runs runs/trials --cache runs/log-mels

What is recorded already is not run again, and a run that was interrupted goes on.
"""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.pretraining.record import TRIALS, keep
from m2d_embed.pretrain.loop import pretrain
from m2d_embed.pretrain.recipe import Recipe, load_recipe
from m2d_embed.training.settings import read_yaml

PLAN = Path(__file__).with_name("trials.yaml")


def recipe_of(name: str, plan: dict[str, Any], source: Path, runs: Path, cache: Path) -> Recipe:
    """The recipe of one trial of a plan."""
    trial = plan["trials"][name]
    names = [f"name={name}", f"about={trial['about']}"]
    places = [f"data.source={source}", f"data.cache={cache}", f"output={runs / name}"]
    changes = [text.replace("RUNS", str(runs)).replace("SOURCE", str(source)) for text in trial["set"]]
    return load_recipe(plan["recipe"], [*names, *places, *plan["common"], *changes])


def chosen(plan: dict[str, Any], only: list[str]) -> list[str]:
    """Names of the trials to run, in the order of the plan, which runs first what others start from."""
    unknown = [name for name in only if name not in plan["trials"]]
    if unknown:
        raise SystemExit(f"--only {unknown[0]}: {PLAN} has {', '.join(plan['trials'])}.")
    return [name for name in plan["trials"] if not only or name in only]


def main(
    source: Annotated[Path, typer.Argument(help="Manifest with the targets of both teachers.")],
    data: Annotated[Path, typer.Argument(help="A folder of labelled sets.")],
    runs: Annotated[Path, typer.Option(help="Where the runs are kept.")] = Path("runs/trials"),
    cache: Annotated[Path, typer.Option(help="Log-mels of the manifest's clips.")] = Path("runs/log-mels"),
    only: Annotated[list[str] | None, typer.Option(help="Name of a trial; repeatable.")] = None,
) -> None:
    """Run, probe and record the trials that have no record yet."""
    plan = read_yaml(PLAN)
    for name in chosen(plan, only or []):
        if (TRIALS / f"{name}.json").exists():
            continue
        if pretrain(recipe_of(name, plan, source, runs, cache)) is None:
            return
        print(name, json.dumps(keep(runs / name, data, TRIALS)), flush=True)


if __name__ == "__main__":
    typer.run(main)
