"""What a short pre-training from scratch is worth: probes of an encoder before and after it.

    python -m benchmarks.short_run corpus/manifest.csv ../shared/data     # writes benchmarks/short_run.json
    python -m benchmarks.render                                           # puts it into the README

The second argument is a folder of labelled sets, each with a ``metadata.csv`` as ``read_labelled`` takes it; nothing
in it is trained on. Warm-up and cosine are laid out for the steps given.
"""

import json
import time
from pathlib import Path
from typing import Any

import torch
import typer

from benchmarks.timing import machine
from m2d_embed.evaluate.probes import embed_clips, knn_accuracy, linear_probe_accuracy
from m2d_embed.labelled.clips import read_labelled
from m2d_embed.m2d import M2D
from m2d_embed.pretrain.loop import pretrain
from m2d_embed.pretrain.recipe import load_recipe

RESULT = Path(__file__).with_suffix(".json")
SETTINGS = ["data.cache=null", "training.batch_size=64", "training.micro_batch=64", "training.lr=1e-3"]


def probe(model: M2D, data: Path) -> dict[str, dict[str, float]]:
    """Accuracy of kNN and linear probe, in percent, on every labelled set in a folder."""
    scores = {}
    for folder in sorted(file.parent for file in data.glob("*/metadata.csv")):
        clips = read_labelled(folder / "metadata.csv")
        embeddings = embed_clips(model.eval(), clips)
        scores[folder.name] = {
            "clips": len(clips),
            "knn": round(100 * knn_accuracy(embeddings, clips), 1),
            "linear": round(100 * linear_probe_accuracy(embeddings, clips), 1),
        }
    return scores


def main(corpus: str, data: Path, steps: int = 1000, output: Path = Path("runs/short")) -> None:
    """Train, probe, print, and write the JSON."""
    recipe = load_recipe(
        "tiny-cpu", [*SETTINGS, f"data.source={corpus}", f"training.steps={steps}", f"output={output}"]
    )
    started = time.perf_counter()
    exported = pretrain(recipe)
    minutes = (time.perf_counter() - started) / 60
    if exported is None:
        raise SystemExit("stopped; give the same command again to go on (the time is then that of the last part)")
    trained = M2D.from_pretrained(exported)
    torch.manual_seed(recipe.training.seed)
    scores: dict[str, Any] = {"random weights": probe(M2D(trained.config), data)}
    scores[f"after {steps} steps"] = probe(trained, data)
    result = {
        "command": f"python -m benchmarks.short_run CORPUS DATA --steps {steps}",
        "machine": machine(),
        "recipe": f"tiny-cpu with {' '.join(SETTINGS)}",
        "minutes": round(minutes, 1),
        "crops": steps * recipe.training.batch_size,
        "accuracy in %": scores,
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    typer.run(main)
