"""``python -m benchmarks.hear``: the real hear-eval-kit over HEAR modules, and tasks for it."""

from __future__ import annotations

import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.hear.convert import TaskOptions, convert, read_task
from m2d_embed.errors import ConfigError, M2DEmbedError

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

Labelled = Annotated[
    Path,
    typer.Argument(help="CSV of clips (file, label), or a folder with one sub-folder a label."),
]
Seed = Annotated[int, typer.Option(help="Of everything drawn.")]


class Grid(StrEnum):
    """hear-eval-kit's grids."""

    default = "default"
    fast = "fast"
    faster = "faster"


@app.command(name="run")
def run_command(
    module: Annotated[str, typer.Option(help="Import name of a HEAR module.")],
    tasks_dir: Annotated[Path, typer.Option(help="Folder of tasks.")],
    output: Annotated[Path, typer.Option(help="Folder for embeddings, predictions and results of all runs.")],
    model: Annotated[str, typer.Option(help="Path given to the module's load_model.")] = "",
    model_options: Annotated[str, typer.Option(help="Keyword arguments of load_model, as JSON.")] = "{}",
    task: Annotated[list[str] | None, typer.Option(help="Name of a task; repeatable. Default: all.")] = None,
    grid: Annotated[Grid, typer.Option(help="Which of hear-eval-kit's grids.")] = Grid.default,
    grid_points: Annotated[int, typer.Option(help="Settings drawn from the grid.", min=1)] = 8,
) -> None:
    """Evaluate a HEAR module with hear-eval-kit; what is finished is not done again. Then as `report`."""
    from benchmarks.hear.run import RunOptions, find_tasks, run

    options = RunOptions(module, model, parse_options(model_options, "--model-options"), grid.value, grid_points)
    run(options, find_tasks(tasks_dir, task or ()), output)
    report_command(output, output / "results.json")


@app.command(name="report")
def report_command(
    output: Annotated[Path, typer.Argument(help="The output folder of any number of runs.")],
    result: Annotated[Path, typer.Argument(help="The JSON file to write.")],
    quality: Annotated[
        Path | None, typer.Option(help="Result of benchmarks.quality, to set its MLP probe beside.", exists=True)
    ] = None,
) -> None:
    """Print what runs found, and write it as JSON."""
    from benchmarks.hear.report import collect, comparison, tables, write_report

    collected = collect(output)
    write_report(collected, result)
    beside = ["", *comparison(collected, json.loads(quality.read_text(encoding="utf-8")))] if quality else []
    print("\n".join([*tables(collected), *beside, "", f"written to {result}"]))


@app.command(name="convert")
def convert_command(
    data: Annotated[
        Path,
        typer.Argument(
            help="CSV of clips (file, label) or of events (file, label, onset, offset in seconds), or a folder with "
            "one sub-folder a label."
        ),
    ],
    tasks_dir: Annotated[Path, typer.Argument(help="Folder of tasks; the task becomes a folder in it.")],
    name: Annotated[str, typer.Option(help="Name of the task.")],
    rate: Annotated[
        list[int] | None, typer.Option(help="Sample rate in Hz that models ask for; repeatable. Default: 16000.")
    ] = None,
    duration: Annotated[
        float | None,
        typer.Option(help="Trim or zero-pad clips to so many seconds, to embed them in batches. Default: as they are."),
    ] = None,
    param_grid: Annotated[
        str,
        typer.Option(help='Replaces values of hear-eval-kit\'s grid for this task, as JSON: {"max_epochs": [100]}.'),
    ] = "{}",
    label_column: Annotated[str, typer.Option(help="Column of the labels, if it has another name.")] = "",
    limit: Annotated[int | None, typer.Option(help="At most so many clips, of all labels and folds.")] = None,
    seed: Seed = 0,
) -> None:
    """Make a HEAR task of labelled clips or events."""
    options = TaskOptions(name, tuple(rate or [16_000]), duration, parse_options(param_grid, "--param-grid"))
    for line in convert(read_task(data, seed, limit, label_column), tasks_dir, options).describe(options):
        print(line)


@app.command(name="timestamps")
def timestamps_command(
    data: Labelled,
    out: Annotated[Path, typer.Argument(help="Folder to make: events.csv and audio.")],
    label: Annotated[
        list[str] | None, typer.Option(help="Label of events; repeatable. Default: all but the background's.")
    ] = None,
    background: Annotated[
        list[str] | None, typer.Option(help="Label of clips for the background; repeatable. Default: pink noise.")
    ] = None,
    counts: Annotated[tuple[int, int, int], typer.Option(help="Soundscapes for training, validation and test.")] = (
        24,
        12,
        36,
    ),
    seconds: Annotated[float, typer.Option(help="Length of a soundscape.")] = 10.0,
    events: Annotated[tuple[int, int], typer.Option(help="Fewest and most events in one.")] = (4, 8),
    snr_db: Annotated[
        tuple[float, float], typer.Option(help="Least and greatest level of an event above the background.")
    ] = (6.0, 30.0),
    longest: Annotated[float, typer.Option(help="Seconds after which a sound is cut.")] = 2.0,
    rate: Annotated[int, typer.Option(help="Sample rate in Hz.")] = 16_000,
    seed: Seed = 0,
) -> None:
    """Make soundscapes with known events of labelled clips, for `convert` and `m2d-embed finetune`."""
    from benchmarks.hear.timestamps import EVENTS_FILE, SoundscapeOptions, make_soundscapes

    options = SoundscapeOptions(
        tuple(label or ()), tuple(background or ()), counts, seconds, events, snr_db, longest, rate, seed
    )
    found = make_soundscapes(data, out, options)
    made = ", ".join(f"{split} {count} with {found[split]} events" for split, count in zip(found, counts, strict=True))
    print(f"{out / EVENTS_FILE}: soundscapes of {seconds:g} s: {made}")


def parse_options(text: str, option: str) -> dict[str, Any]:
    """What a JSON object given as an option states.

    Raises:
        ConfigError: if it is not one.
    """
    try:
        options = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{option}: not JSON ({error}).") from error
    if not isinstance(options, dict):
        raise ConfigError(f"{option}: a JSON object is needed, not {text}.")
    return options


def main() -> None:
    """Run the command line; errors of ours are printed without a traceback."""
    try:
        app()
    except M2DEmbedError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
