"""A fine-tuned run -> a model that ``load_model`` reads, with a card that says what it is and how good."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from m2d_embed.checkpoints.layouts import Checkpoint, model_card, write_native
from m2d_embed.config import ModelConfig
from m2d_embed.errors import ConfigError
from m2d_embed.files import write_json, write_text
from m2d_embed.finetune.evaluate import describe
from m2d_embed.finetune.recipe import FinetuneRecipe
from m2d_embed.training.monitor import RunLog, plot_curve

EXPORT_FOLDER = "export"
RESULTS_FILE = "results.json"
CURVE_FILE = "curve.png"
ADAPTER_FOLDER = "adapter"


def export(
    recipe: FinetuneRecipe, config: ModelConfig, tensors: Mapping[str, Tensor], results: Mapping[str, Any]
) -> Path:
    """Write ``results.json``, ``curve.png`` and ``export/`` into the run's folder.

    Args:
        recipe: the run's.
        config: with the head.
        tensors: by the names of ``M2D.state_dict()``.
        results: what ``results.json`` holds.

    Returns:
        The folder of the model.
    """
    folder = recipe.folder
    destination = folder / EXPORT_FOLDER
    destination.mkdir(parents=True, exist_ok=True)
    write_native(destination, Checkpoint(config, dict(tensors)), [torch.float32])
    write_text(destination / "README.md", card(recipe, config, results))
    try:
        plot_curve(RunLog.read(folder), folder / CURVE_FILE, config.name)
    except ConfigError:  # the run was shorter than the interval of its log
        (folder / CURVE_FILE).unlink(missing_ok=True)
    write_json(folder / RESULTS_FILE, results)
    return destination


def card(recipe: FinetuneRecipe, config: ModelConfig, results: Mapping[str, Any]) -> str:
    """The model card: what it was made from, on which data, how, and its scores."""
    assert config.head is not None
    kind, found = results["task"], results["scores"]
    frames = " --frames" if kind == "events" else ""
    shown = ", ".join(config.head.labels[:20]) + (" ..." if len(config.head.labels) > 20 else "")
    tested = f"fold {results['fold']}: {describe(found)}" if found else "not tested: it was trained on all clips"
    return f"""{model_card(config)}
## Fine-tuning

A classifier ({kind}) with {len(config.head.labels)} label{"s" if len(config.head.labels) > 1 else ""}: {shown}.

* Begun from: {results["base"]}. Its licence holds for these weights, too.
* Data: `{recipe.data_name}`, {results["parts"]}.
* {results["steps"]:,} steps of {recipe.training.batch_size} clips{_best(results)}.
* Scores: {tested}.

```sh
m2d-embed tag sound.wav --model path-or-repository-of-this-model{frames}
```

## Recipe

```yaml
{recipe.to_yaml()}```
"""


def _best(results: Mapping[str, Any]) -> str:
    best = results["best"]
    if not best:
        return ""
    return f"; the weights after step {best['step']:,}, with the best validation score ({best['score']:.4f})"
