r"""Short runs that differ from one recipe in one thing each, as ``trials.yaml`` beside this file lists them.

    python -m benchmarks.pretraining.trials joined/manifest.csv joined-2/manifest.csv ../shared/data \
        --runs runs/trials --cache runs/log-mels

The manifests are those of the two stages of the bundled model, of the same clips. What is recorded already is not run
again, and a run that was interrupted goes on.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.pretraining.record import TRIALS, keep
from m2d_embed.pretrain.loop import pretrain
from m2d_embed.pretrain.recipe import Recipe, load_recipe
from m2d_embed.training.settings import read_yaml

PLAN = Path(__file__).with_name("trials.yaml")


@dataclass(frozen=True)
class Places:
    """Where things are; ``trials.yaml`` has the fields' names in capitals."""

    source: Path
    spectrum: Path
    runs: Path
    cache: Path

    def fill_in(self, text: str) -> str:
        """A setting of the plan with the paths in place of their names."""
        for name, path in vars(self).items():
            text = text.replace(name.upper(), str(path))
        return text


def recipe_of(name: str, plan: dict[str, Any], places: Places) -> Recipe:
    """The recipe of one trial of a plan."""
    trial = plan["trials"][name]
    names = [f"name={name}", f"about={trial['about']}"]
    common = [f"data.source={places.source}", f"data.cache={places.cache}", f"output={places.runs / name}"]
    changes = [places.fill_in(text) for text in trial["set"]]
    return load_recipe(
        str(PLAN.with_name("recipes") / f"{plan['recipe']}.yaml"), [*names, *common, *plan["common"], *changes]
    )


def chosen(plan: dict[str, Any], only: list[str]) -> list[str]:
    """Names of the trials to run, in the order of the plan, which runs first what others start from."""
    unknown = [name for name in only if name not in plan["trials"]]
    if unknown:
        raise SystemExit(f"--only {unknown[0]}: {PLAN} has {', '.join(plan['trials'])}.")
    return [name for name in plan["trials"] if not only or name in only]


def main(
    source: Annotated[Path, typer.Argument(help="Manifest with the targets of both teachers.")],
    spectrum: Annotated[Path, typer.Argument(help="Manifest with the fine spectrum among the targets, too.")],
    data: Annotated[Path, typer.Argument(help="A folder of labelled sets.")],
    runs: Annotated[Path, typer.Option(help="Where the runs are kept.")] = Path("runs/trials"),
    cache: Annotated[Path, typer.Option(help="Log-mels of the manifest's clips.")] = Path("runs/log-mels"),
    only: Annotated[list[str] | None, typer.Option(help="Name of a trial; repeatable.")] = None,
) -> None:
    """Run, probe and record the trials that have no record yet."""
    plan, places = read_yaml(PLAN), Places(source, spectrum, runs, cache)
    for name in chosen(plan, only or []):
        if (TRIALS / f"{name}.json").exists():
            continue
        if pretrain(recipe_of(name, plan, places)) is None:
            return
        print(name, json.dumps(keep(runs / name, data, TRIALS)), flush=True)


if __name__ == "__main__":
    typer.run(main)
