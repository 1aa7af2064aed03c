"""Runs hear-eval-kit's two steps, embeddings and predictions, for one HEAR module over tasks.

Every combination of module, weights, options and grid has a folder of its own below the output folder, which is
hear-eval-kit's ``--embeddings-dir``; what it finished there it does not do again. What it prints goes to ``log.txt``
there: it is much.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import click

from benchmarks.hear.compat import checkpoints_readable, load_heareval
from benchmarks.hear.convert import METADATA_FILE
from m2d_embed.errors import ConfigError
from m2d_embed.labelled.clips import named

SETTINGS_FILE = "settings.json"
LOG_FILE = "log.txt"
DONE_FILE = "prediction-done.json"
_LIGHTNING_LOGGERS = ("pytorch_lightning", "lightning_fabric")
Grid = Literal["default", "fast", "faster"]


@dataclass(frozen=True)
class RunOptions:
    """What is evaluated, and how its predictor is chosen.

    Attributes:
        module: the import name of a HEAR module.
        model: a path given to its ``load_model``; "" calls it without one.
        model_options: keyword arguments of its ``load_model``.
        grid: of settings, as hear-eval-kit names it.
        grid_points: so many settings are drawn from the grid.
    """

    module: str
    model: str = ""
    model_options: dict[str, Any] = field(default_factory=dict)
    grid: Grid = "default"
    grid_points: int = 8

    def settings(self) -> dict[str, Any]:
        """The options and a hash of what ``model`` holds: what tells one run from another."""
        return {**dataclasses.asdict(self), "model sha256": _content_hash(Path(self.model)) if self.model else None}

    def folder(self, output: Path) -> Path:
        """Where the results of these options lie."""
        digest = hashlib.sha256(json.dumps(self.settings(), sort_keys=True).encode()).hexdigest()
        return output / f"{self.module}-{digest[:8]}"


def run(options: RunOptions, tasks: Sequence[Path], output: Path) -> list[Path]:
    """Evaluate a module on tasks.

    Args:
        options: what, and how.
        tasks: folders of tasks, as ``convert`` makes them.
        output: where results of any number of runs are kept.

    Returns:
        For each task the folder of its results.

    Raises:
        ConfigError: if there are results of another task of the same name, or a module or model does not exist.
        UnsupportedError: if hear-eval-kit is not installed.
    """
    heareval = load_heareval()
    _check_module(options.module)
    folder = options.folder(output)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SETTINGS_FILE).write_text(json.dumps(options.settings(), indent=1) + "\n", encoding="utf-8")
    results = []
    for task in tasks:
        check_same_task(task, folder)
        print(f"{task.name}: hear-eval-kit writes to {folder / LOG_FILE}", flush=True)
        with _quietly(folder / LOG_FILE):
            _call(heareval.embeddings.runner, _embedding_arguments(options, task, folder))
            result = embedded(task, folder)
            with checkpoints_readable(), _own_log(task):
                _call(heareval.predictions.runner, _prediction_arguments(options, result))
        results.append(result)
    return results


def find_tasks(tasks_dir: Path, names: Sequence[str] = ()) -> list[Path]:
    """The tasks in a folder, or those named.

    Raises:
        ConfigError: if there are none, or one does not exist.
    """
    found = sorted(file.parent for file in tasks_dir.glob(f"[!.]*/{METADATA_FILE}"))
    if not found:
        raise ConfigError(f"{tasks_dir}: no tasks here, that is, folders with a {METADATA_FILE}.")
    unknown = sorted(set(names) - {task.name for task in found})
    if unknown:
        raise ConfigError(f"{tasks_dir}: no task {named(unknown)}; there are {named([task.name for task in found])}.")
    return [task for task in found if not names or task.name in names]


def embedded(task: Path, folder: Path) -> Path:
    """Where hear-eval-kit put the embeddings of a task: below a folder named after module and options."""
    (found,) = (below for below in folder.glob(f"*/{task.name}") if below.is_dir())
    return found.resolve()  # its logs go below the working directory otherwise


def check_same_task(task: Path, folder: Path) -> None:
    """Raise ConfigError if results in a folder are of another task of this name: they would be taken as finished."""
    for copied in folder.glob(f"*/{task.name}/{METADATA_FILE}"):
        if copied.read_bytes() != (task / METADATA_FILE).read_bytes():
            raise ConfigError(f"{copied.parent}: results of another task named {task.name}; remove that folder.")


def _check_module(name: str) -> None:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ConfigError(f"{name}: cannot be imported as a HEAR module ({error}).") from error


def _embedding_arguments(options: RunOptions, task: Path, folder: Path) -> list[str]:
    arguments = [options.module, "--tasks-dir", str(task.parent), "--task", task.name, "--embeddings-dir", str(folder)]
    arguments += ["--model-options", json.dumps(options.model_options)]
    return arguments + (["--model", options.model] if options.model else [])


def _prediction_arguments(options: RunOptions, result: Path) -> list[str]:
    return [str(result), "--grid", options.grid, "--grid-points", str(options.grid_points)]


def _call(command: Any, arguments: list[str]) -> None:
    try:
        command.main(arguments, standalone_mode=False)
    except click.ClickException as error:
        raise ConfigError(f"hear-eval-kit: {error.format_message()}") from error
    except AssertionError as error:  # its way to say, e.g., that a task lacks the sample rate of a model
        raise ConfigError(f"hear-eval-kit: {error or 'an assertion failed'}.") from error


@contextlib.contextmanager
def _quietly(log: Path) -> Iterator[None]:
    """Within this, what is printed and logged goes to a file."""
    loggers = [logging.getLogger(name) for name in _LIGHTNING_LOGGERS]
    handlers = [h for logger in loggers for h in logger.handlers if isinstance(h, logging.StreamHandler)]
    with log.open("a", encoding="utf-8") as stream, contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(stream))
        stack.enter_context(contextlib.redirect_stderr(stream))
        for handler in handlers:  # Lightning logs to the stderr it was imported with
            before = handler.setStream(stream)
            stack.callback(handler.setStream, before)
        yield


@contextlib.contextmanager
def _own_log(task: Path) -> Iterator[None]:
    """Close what hear-eval-kit logs a task to: the next run of a task of this name would write there, too."""
    name = json.loads((task / METADATA_FILE).read_text(encoding="utf-8"))["task_name"]
    logger = logging.getLogger(name)
    try:
        yield
    finally:
        for handler in [*logger.handlers]:
            logger.removeHandler(handler)
            handler.close()


def _content_hash(path: Path) -> str:
    """Of a file, or of all files of a folder and their names."""
    if not path.exists():
        raise ConfigError(
            f"{path}: no such file or folder; hear-eval-kit takes only these as a model. For a name on a hub use "
            '--model-options, e.g. \'{"model_file_path": "org/name"}\'.'
        )
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            digest.update(file.relative_to(path).as_posix().encode() + hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
