r"""How good embeddings are: probes of several models on labelled sets, in one table.

    python -m benchmarks.quality ../shared/data/*/metadata.csv     # writes benchmarks/quality.json
    python -m benchmarks.render                                    # puts it into the README

Rows are the bundled model, also with the mean alone as its scene embedding, log-mel statistics, random weights, and
whatever ``--model`` (any that ``load_model`` loads) and ``--module`` (any importable HEAR module) name; columns the
labelled sets, each a CSV or a folder of labels as ``m2d-embed probe`` takes them. A set of the file ``metadata.csv`` is
named by its folder. After a change of the bundled model its rows alone are measured anew, and all others kept:

    python -m benchmarks.quality ../shared/data/*/metadata.csv --again "m2d-embed, bundled" \
        --again "m2d-embed, bundled, mean alone"

Rows end in the JSON one after the other, each with the machine that measured it.
"""

import importlib
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from tqdm.auto import tqdm

from benchmarks.timing import machine
from m2d_embed.audio.clips import load_audio
from m2d_embed.config import FeatureConfig
from m2d_embed.errors import ConfigError
from m2d_embed.evaluate.embedding_cache import embed_cached, hash_files
from m2d_embed.evaluate.features import Vectors
from m2d_embed.evaluate.probes import PROBES, ProbeResult, probe_embeddings
from m2d_embed.evaluate.scores import Score, score_predictions
from m2d_embed.files import write_json
from m2d_embed.labelled.clips import LabelledClips, check_duplicates, read_labelled
from m2d_embed.m2d import M2D

RESULT = Path(__file__).with_suffix(".json")
SCORES = "scores in % with 95 % intervals"
MACHINES = "machines"  # by row
BASELINES = {
    "log-mel mean and std": "benchmarks.hear.logmel_stats",
    "random weights": "benchmarks.hear.random_weights",
}

Embed = Callable[[Sequence[Path], Sequence[str]], Vectors]


def embed_by_model(name: str, features: FeatureConfig | None = None) -> Embed:
    """Scene embeddings of a model of ours, through the cache of ``m2d-embed probe``."""
    model = M2D.from_pretrained(name, device="cuda" if torch.cuda.is_available() else "cpu", features=features)
    return lambda files, hashes: embed_cached(model, files, hashes, show_progress=True)


def embed_by_module(name: str) -> Embed:
    """Scene embeddings of a HEAR module with its default weights, clip by clip."""
    module = importlib.import_module(name)
    model = module.load_model()

    def embed(files: Sequence[Path], _: Sequence[str]) -> Vectors:
        rows = []
        for file in tqdm(files, desc=name, unit="clip", disable=None):
            audio = torch.from_numpy(load_audio(file, model.sample_rate))[None]
            rows.append(module.get_scene_embeddings(audio, model)[0].float().cpu().numpy())
        return np.stack(rows)

    return embed


def measure(embed: Embed, clips: LabelledClips, hashes: Sequence[str], probes: Sequence[str]) -> dict[str, Any]:
    """Every score of every probe, in percent, with its interval."""
    embeddings = embed(clips.files, hashes)
    results = probe_embeddings(embeddings, clips, probes, show_progress=True)
    return {"dimensions": embeddings.shape[1], **{result.probe: scored(clips, result) for result in results}}


def scored(clips: LabelledClips, result: ProbeResult) -> dict[str, list[float]]:
    scores = score_predictions(clips, result.scores)
    return {name: in_percent(score) for name, score in scores.items()}


def in_percent(score: Score) -> list[float]:
    return [round(100 * part, 2) for part in (score.value, score.low, score.high)]


def set_name(path: Path) -> str:
    return path.parent.resolve().name if path.name == "metadata.csv" else path.stem


def shown(path: Path) -> str:
    """A labelled set in a command, without the folder that it lies in."""
    return f"DATA/{set_name(path)}/{path.name}" if path.name == "metadata.csv" else f"DATA/{path.name}"


def known_rows(models: Sequence[str], modules: Sequence[str]) -> dict[str, Callable[[], Embed]]:
    """What makes the embeddings of each row."""
    bundled = "m2d-embed, bundled"
    return {
        bundled: partial(embed_by_model, ""),
        f"{bundled}, mean alone": partial(embed_by_model, "", FeatureConfig(scene_pooling="mean")),
        **{row: partial(embed_by_module, name) for row, name in BASELINES.items()},
        **{name: partial(embed_by_model, name) for name in models},
        **{name: partial(embed_by_module, name) for name in modules},
    }


def rows_to_keep(
    earlier: Mapping[str, Any], again: Sequence[str], rows: Sequence[str], sets: object, probes: Sequence[str]
) -> dict[str, Any]:
    """What an earlier run measured of the rows that are not to be measured again.

    Raises:
        ConfigError: if there is no such row, the earlier run lacks another row, or was of other sets or probes.
    """
    unknown = [row for row in again if row not in rows]
    if unknown:
        raise ConfigError(f"--again {unknown[0]!r}: the rows are {', '.join(map(repr, rows))}.")
    kept = {row: earlier.get(SCORES, {}).get(row) for row in rows if row not in again}
    missing = [row for row, scores in kept.items() if scores is None]
    if missing:
        raise ConfigError(f"--again: nothing was measured yet of {', '.join(missing)}; measure all rows first.")
    if kept and earlier["sets"] != sets:
        raise ConfigError(f"--again: the other rows are of {earlier['sets']}, not of {sets}; measure all rows.")
    for row, scores in kept.items():
        for name, found in scores.items():
            done = found.keys() & PROBES
            if done != set(probes):
                raise ConfigError(
                    f"--again: {row!r} has {', '.join(sorted(done))} of {name}; name the same with --probe, "
                    f"not {', '.join(probes)}, or measure all rows."
                )
    return kept


def write(result: Mapping[str, Any], output: Path) -> None:
    """Write the JSON whole or not at all: measuring a row takes minutes."""
    write_json(output, result)


def main(
    data: Annotated[list[Path], typer.Argument(help="Labelled sets: CSV files or folders of labels.")],
    model: Annotated[list[str] | None, typer.Option(help="A further model that load_model loads; repeatable.")] = None,
    module: Annotated[list[str] | None, typer.Option(help="A further HEAR module; repeatable.")] = None,
    probe: Annotated[list[str] | None, typer.Option(help="linear, knn, mlp; all of them by default.")] = None,
    again: Annotated[list[str] | None, typer.Option(help="Measure this row, keep all others; repeatable.")] = None,
    output: Annotated[Path, typer.Option(help="The JSON to write.")] = RESULT,
) -> None:
    """Probe, print, and write the JSON."""
    names = [set_name(path) for path in data]
    if len(set(names)) < len(names):
        raise ConfigError(f"two sets have one name: {', '.join(names)}; rename a CSV.")
    rows = known_rows(model or (), module or ())
    clips = {name: read_labelled(path) for name, path in zip(names, data, strict=True)}
    hashes = {name: hash_files(of.files) for name, of in clips.items()}
    for name, path in zip(names, data, strict=True):
        check_duplicates(clips[name].files, clips[name].folds, hashes[name], path)
    sets = {
        name: {"clips": len(of), "labels": len(of.label_names), "test folds": len(of.test_folds())}
        for name, of in clips.items()
    }
    probes = probe or PROBES
    earlier = json.loads(output.read_text()) if again and output.is_file() else {}
    scores: dict[str, Any] = rows_to_keep(earlier, again, list(rows), sets, probes) if again else {}
    machines = dict(earlier.get(MACHINES, {}))
    further = [f"--model {name}" for name in model or ()] + [f"--module {name}" for name in module or ()]
    chosen = [f"--probe {name}" for name in probe or ()]
    command = " ".join(["python -m benchmarks.quality", *map(shown, data), *further, *chosen])
    for row in again or rows:
        embed = rows[row]()
        scores[row] = {name: measure(embed, clips[name], hashes[name], probes) for name in names}
        machines[row] = machine()
        print(f"{row}: {scores[row]}")
        done = [name for name in rows if name in scores]
        result = {
            **earlier,
            "command": command,
            "sets": sets,
            MACHINES: {name: machines[name] for name in done if name in machines},
            SCORES: {name: scores[name] for name in done},
        }
        write(result, output)


if __name__ == "__main__":
    typer.run(main)
