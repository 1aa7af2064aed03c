"""Keep what a run of pre-training was and what came of it: settings, curve, compute, linear probes.

    python -m benchmarks.pretraining.record runs/tiny-cpu ../shared/data

writes ``records/tiny-cpu.json`` beside this file, and the table of all runs kept anew (``README.md`` there). The second
argument is a folder of labelled sets, each with a ``metadata.csv``; nothing in it is trained on. Without it nothing is
probed: for a run that was stopped, as another went on with it.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.quality import embed_by_model, measure
from benchmarks.timing import machine
from m2d_embed.config import FeatureConfig
from m2d_embed.evaluate.embedding_cache import hash_files
from m2d_embed.labelled.clips import read_labelled
from m2d_embed.training.monitor import RunLog
from m2d_embed.training.settings import read_yaml

FOLDER = Path(__file__).with_name("records")
TRIALS = FOLDER / "trials"
TABLE = Path(__file__).with_name("README.md")
_POINTS = 60  # of a curve
_PATHS = ("source", "cache", "noise", "model", "teacher")
_NOT_SETTINGS = ("name", "about", "license", "output", "probe")
_RUNS = """Every run kept, best first: linear probes of its mean embeddings over time, accuracy in % with 95 % \
bootstrap intervals, on labelled sets that were not trained on. Settings and loss curves are in `records/`; written by \
`python -m benchmarks.pretraining.record`.

"""
_TRIALS = """## Trials

Short runs on one budget, each unlike the first of [trials.yaml](trials.yaml) in one thing; by \
`python -m benchmarks.pretraining.trials`. What is best after minutes need not be so after hours. Minutes are those of \
one thread beside other work. `fine-spectrum` and the two mask ratios had all of the bundled model's clips, the others \
two thirds of the music less; `salt` and `m2d-warm` have the crops of `pixels` behind them.

"""


def settings(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe without what holds for one machine alone: of paths the last two parts."""

    def portable(section: Any) -> Any:
        if not isinstance(section, Mapping):
            return section
        return {
            key: "/".join(Path(value).parts[-2:]) if key in _PATHS and isinstance(value, str) else value
            for key, value in section.items()
        }

    return {key: portable(value) for key, value in recipe.items() if key not in _NOT_SETTINGS}


def curve(rows: list[dict[str, float]]) -> list[dict[str, float]]:
    """Points of the losses, evenly spread over the steps."""
    every = max(1, len(rows) // _POINTS)
    kept = [row for number, row in enumerate(rows) if number % every == 0 or number == len(rows) - 1]
    names = [key for key in kept[0] if key == "step" or key.startswith("loss")]
    return [{name: round(row[name], 4) for name in names if name in row} for row in kept]


def minutes(rows: list[dict[str, float]], batch: int) -> float:
    """Time that the steps took, by the rates logged."""
    seconds, before = 0.0, 0.0
    for row in rows:
        seconds += (row["step"] - before) * batch / row["clips_per_second"]
        before = row["step"]
    return seconds / 60


def probes(model: Path, data: Path) -> dict[str, list[float]]:
    """Accuracy of a linear probe of means over time, in percent, with its interval, on every labelled set."""
    embed, scores = embed_by_model(str(model), FeatureConfig(scene_pooling="mean")), {}
    for metadata in sorted(data.glob("*/metadata.csv")):
        clips = read_labelled(metadata)
        measured = measure(embed, clips, hash_files(clips.files), ["linear"])
        scores[metadata.parent.name] = measured["linear"]["accuracy"]
    return scores


def mean(record: Mapping[str, Any]) -> float:
    """Of the sets' accuracies; 0 for a run that was not probed."""
    scores: list[float] = [score[0] for score in record["linear probe, accuracy in %"].values()]
    return sum(scores) / len(scores) if scores else 0.0


def table(records: Mapping[str, Mapping[str, Any]], folder: str) -> str:
    """The records of a folder as a table, the best on average first."""
    best_first = sorted(records.items(), key=lambda item: -mean(item[1]))
    sets = list(best_first[0][1]["linear probe, accuracy in %"])
    lines = [
        f"| run | objective | mask ratio | crops | minutes | {' | '.join(sets)} | mean |",
        f"| --- | --- | ---: | ---: | ---: |{' ---: |' * len(sets)} ---: |",
    ]
    for name, record in best_first:
        recipe, scores = record["settings"], record["linear probe, accuracy in %"]
        cells = [f"{scores[s][0]:.1f} ({scores[s][1]:.1f}-{scores[s][2]:.1f})" for s in sets if s in scores]
        cells = [*cells, f"{mean(record):.1f}"] if cells else ["not probed", *[""] * len(sets)]
        lines.append(
            f"| [{name}]({folder}/{name}.json): {record['about']} | `{recipe['objective']}` | "
            f"{recipe['masking']['mask_ratio']} | {record['crops']:,} | {record['minutes']:.0f} | "
            f"{' | '.join(cells)} |"
        )
    return "\n".join(lines) + "\n"


def read_records(folder: Path) -> dict[str, dict[str, Any]]:
    """The records of a folder, by name."""
    return {file.stem: json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))}


def readme(runs: Mapping[str, Mapping[str, Any]], trials: Mapping[str, Mapping[str, Any]]) -> str:
    """The text of ``README.md``: a table of the runs, and one of the trials, where there are any."""
    sections = [_RUNS + table(runs, FOLDER.name)] if runs else []
    sections += [_TRIALS + table(trials, f"{FOLDER.name}/{TRIALS.name}")] if trials else []
    return "# Runs of pre-training\n\n" + "\n".join(sections)


def keep(run: Path, data: Path | None, folder: Path) -> dict[str, list[float]]:
    """Probe a run, if there is data, write its record into a folder and the table of all anew; returns the scores."""
    recipe = read_yaml(run / "recipe.yaml")
    rows = [row for row in RunLog.read(run) if "loss" in row]
    batch = recipe["training"]["batch_size"]
    scores = probes(run / "export", data) if data else {}
    record = {
        "about": recipe["about"],
        "settings": settings(recipe),
        "machine": machine(),
        "crops": int(rows[-1]["step"]) * batch,
        "minutes": round(minutes(rows, batch), 1),
        "linear probe, accuracy in %": scores,
        "curve": curve(rows),
    }
    folder.mkdir(exist_ok=True, parents=True)
    (folder / f"{recipe['name']}.json").write_text(json.dumps(record, indent=1) + "\n")
    TABLE.write_text(readme(read_records(FOLDER), read_records(TRIALS)))
    return scores


def main(
    run: Annotated[Path, typer.Argument(help="The run's folder.")],
    data: Annotated[Path | None, typer.Argument(help="Labelled sets in a folder, to probe the export on.")] = None,
) -> None:
    """Keep the record of a run, with probes of it."""
    print(json.dumps(keep(run, data, FOLDER)))


if __name__ == "__main__":
    typer.run(main)
