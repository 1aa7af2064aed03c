"""What fine-tuning is worth: the bundled model fine-tuned, against the linear probe of the same model.

    python -m benchmarks.finetuning ../shared/data/esc50/metadata.csv --fold 1
    python -m benchmarks.finetuning ../shared/data/emodb/metadata.csv
    python -m benchmarks.render                                  # puts it into the README

Each call puts its set into benchmarks/finetuning.json. Both are trained on the same clips, all that the tested fold
leaves, and tested on the same ones. A run that was stopped goes on; one that is done is tested again.
"""

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from benchmarks.quality import in_percent, set_name, shown
from benchmarks.timing import machine
from m2d_embed.evaluate.embedding_cache import embed_cached, hash_files
from m2d_embed.evaluate.probes import probe_embeddings
from m2d_embed.evaluate.scores import score_predictions
from m2d_embed.finetune.export import RESULTS_FILE
from m2d_embed.finetune.loop import finetune
from m2d_embed.finetune.recipe import ALL_FOLDS, FinetuneRecipe, load_recipe
from m2d_embed.labelled.clips import TRAIN_ONLY, LabelledClips, read_labelled
from m2d_embed.m2d import M2D

RESULT = Path(__file__).with_suffix(".json")


def only_fold(clips: LabelledClips, fold: str) -> LabelledClips:
    """The same clips, of which no other fold is tested."""
    if fold == ALL_FOLDS:
        return clips
    return dataclasses.replace(clips, folds=np.where(clips.folds == int(fold), clips.folds, TRAIN_ONLY))


def linear_probe(model: M2D, clips: LabelledClips) -> list[float]:
    """Accuracy in percent with its interval."""
    embeddings = embed_cached(model, clips.files, hash_files(clips.files), show_progress=True)
    (result,) = probe_embeddings(embeddings, clips, ["linear"], show_progress=True)
    return in_percent(score_predictions(clips, result.scores)["accuracy"])


def training_minutes(recipe: FinetuneRecipe) -> float:
    """Of all runs below the folder together."""
    files = recipe.folder.rglob(RESULTS_FILE)
    seconds = [float(json.loads(file.read_text()).get("training_seconds", 0.0)) for file in files]
    return round(sum(seconds) / 60, 1)


def main(
    data: Annotated[Path, typer.Argument(help="A labelled set, one label a clip, with folds.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="As for finetune.")] = None,
    fold: Annotated[str, typer.Option(help="The fold to test, or 'all'.")] = ALL_FOLDS,
    output: Annotated[Path, typer.Option(help="Folder of the runs.")] = Path("runs/finetuning"),
) -> None:
    """Fine-tune, probe, print, and write the JSON."""
    name = set_name(data)
    places = [f"data.source={data}", f"data.fold={fold}", f"output={output / name}"]
    recipe = load_recipe("", [*(overrides or ()), *places])
    scores = finetune(recipe)
    if scores is None:
        raise SystemExit("stopped; give the same command again to go on")
    accuracy = scores["accuracy"]
    clips = only_fold(read_labelled(data), fold)
    measured: dict[str, Any] = {
        "command": " ".join(["python -m benchmarks.finetuning", shown(data), f"--fold {fold}", *(overrides or ())]),
        "machine": machine(),
        "fold": fold,
        "tested clips": int((clips.folds >= 0).sum()),
        "training minutes": training_minutes(recipe),
        "accuracy in % with 95 % interval": {
            "linear probe": linear_probe(M2D.from_pretrained(recipe.start.model), clips),
            "fine-tuned": [round(100 * accuracy[key], 2) for key in ("value", "low", "high")],
        },
    }
    known = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    RESULT.write_text(json.dumps({**known, name: measured}, indent=1) + "\n")
    print(json.dumps(measured, indent=1))


if __name__ == "__main__":
    typer.run(main)
