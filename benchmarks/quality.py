"""How good embeddings are: probes of several models on labelled sets, in one table.

    python -m benchmarks.quality ../shared/data/*/metadata.csv     # writes benchmarks/quality.json
    python -m benchmarks.render                                    # puts it into the README

Rows are the bundled model, also with the mean alone as its scene embedding, log-mel statistics, random weights, and
whatever ``--model`` (any that ``load_model`` loads) and ``--module`` (any importable HEAR module) name; columns the
labelled sets, each a CSV or a folder of labels as ``m2d-embed probe`` takes them. A set of the file ``metadata.csv`` is
named by its folder.
"""

import importlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from tqdm.auto import tqdm

from benchmarks.timing import machine
from m2d_embed.audio import load_audio
from m2d_embed.config import FeatureConfig
from m2d_embed.errors import ConfigError
from m2d_embed.evaluate.embedding_cache import embed_cached, hash_files
from m2d_embed.evaluate.features import Vectors
from m2d_embed.evaluate.labelled import LabelledClips, check_duplicates, read_labelled
from m2d_embed.evaluate.probes import PROBES, ProbeResult, probe_embeddings
from m2d_embed.evaluate.scores import Score, score_predictions
from m2d_embed.model import M2D

RESULT = Path(__file__).with_suffix(".json")
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


def main(
    data: Annotated[list[Path], typer.Argument(help="Labelled sets: CSV files or folders of labels.")],
    model: Annotated[list[str] | None, typer.Option(help="A further model that load_model loads; repeatable.")] = None,
    module: Annotated[list[str] | None, typer.Option(help="A further HEAR module; repeatable.")] = None,
    probe: Annotated[list[str] | None, typer.Option(help="linear, knn, mlp; all of them by default.")] = None,
    output: Annotated[Path, typer.Option(help="The JSON to write.")] = RESULT,
) -> None:
    """Probe, print, and write the JSON."""
    names = [set_name(path) for path in data]
    if len(set(names)) < len(names):
        raise ConfigError(f"two sets have one name: {', '.join(names)}; rename a CSV.")
    rows: dict[str, Embed] = {"m2d-embed, bundled": embed_by_model("")}
    rows["m2d-embed, bundled, mean alone"] = embed_by_model("", FeatureConfig(scene_pooling="mean"))
    rows |= {row: embed_by_module(name) for row, name in BASELINES.items()}
    rows |= {name: embed_by_model(name) for name in model or ()}
    rows |= {name: embed_by_module(name) for name in module or ()}
    sets: dict[str, Any] = {}
    scores: dict[str, dict[str, Any]] = {row: {} for row in rows}
    for path, name in zip(data, names, strict=True):
        clips = read_labelled(path)
        hashes = hash_files(clips.files)
        check_duplicates(clips.files, clips.folds, hashes, path)
        folds = clips.test_folds()
        sets[name] = {"clips": len(clips), "labels": len(clips.label_names), "test folds": len(folds)}
        for row, embed in rows.items():
            scores[row][name] = measure(embed, clips, hashes, probe or PROBES)
            print(f"{name}, {row}: {scores[row][name]}")
    further = [f"--model {name}" for name in model or ()] + [f"--module {name}" for name in module or ()]
    chosen = [f"--probe {name}" for name in probe or ()]
    command = " ".join(["python -m benchmarks.quality", *map(shown, data), *further, *chosen])
    result = {
        "command": command,
        "machine": machine(),
        "sets": sets,
        "scores in % with 95 % intervals": scores,
    }
    output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
