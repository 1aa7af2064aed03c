"""A run -> a model that ``load_model`` reads: encoder, configuration, model card with the loss curve."""

from __future__ import annotations

from pathlib import Path

import torch

from m2d_embed.checkpoints.layouts import Checkpoint, model_card, write_native
from m2d_embed.config import ModelConfig
from m2d_embed.files import write_text
from m2d_embed.pretrain.recipe import Recipe
from m2d_embed.training.monitor import RunLog, plot_curve
from m2d_embed.training.run_state import RunState

EXPORT_FOLDER = "export"
CURVE_FILE = "loss.png"
_INFERENCE_PARTS = ("encoder.", "clap.")


def export(folder: Path, state: RunState, recipe: Recipe) -> Path:
    """Write ``<folder>/export``: config.json, float32 and bfloat16 weights, README.md, loss.png.

    Args:
        folder: the run's.
        state: the checkpoint to export.
        recipe: the run's.

    Returns:
        The folder written.
    """
    destination = folder / EXPORT_FOLDER
    destination.mkdir(parents=True, exist_ok=True)
    rows = [row for row in RunLog.read(folder) if row["step"] <= state.step]
    if rows:
        plot_curve(rows, destination / CURVE_FILE, f"{recipe.name}: {recipe.objective}")
    tensors = {name: t for name, t in state.model.items() if name.startswith(_INFERENCE_PARTS)}
    write_native(destination, Checkpoint(state.config, tensors), [torch.float32, torch.bfloat16])
    write_text(destination / "README.md", card(state, recipe, rows))
    return destination


def card(state: RunState, recipe: Recipe, rows: list[dict[str, float]]) -> str:
    """The model card: what the model is, what it was trained on and how, and how the loss went."""
    training = recipe.training
    crops = state.step * training.batch_size
    seconds = (state.config.input_size[1] - 1) * state.config.hop_length / state.config.sample_rate
    hours = crops * seconds / 3600
    mean, std = state.config.norm_stats
    curve = f"\n![loss]({CURVE_FILE})\n" if rows else ""
    return f"""{model_card(state.config)}
## Training

* Objective: `{recipe.objective}`, masks `{recipe.masking.strategy}` at a ratio of {recipe.masking.mask_ratio:g}.
* Data: {state.data}
* {state.step:,} steps of {training.batch_size:,} crops of {seconds:.2f} s: {crops:,} crops, {hours:,.1f} h.
* Statistics of the log-mel, for normalisation: mean {mean:.4f}, standard deviation {std:.4f}.
* Start: {recipe.start.model or "random weights"}.
{_last_values(rows)}{curve}
## Recipe

```yaml
{recipe.to_yaml()}```
"""


def describe_model(config: ModelConfig) -> str:
    """One line on the shape of an encoder."""
    (mels, frames), (patch_mels, patch_frames) = config.input_size, config.patch_size
    return (
        f"{config.embed_dim}-d, {config.depth} layers, {config.num_heads} heads; window {mels}x{frames}, "
        f"patches {patch_mels}x{patch_frames}"
    )


def _last_values(rows: list[dict[str, float]]) -> str:
    """The last loss, and the last result of each probe."""
    last: dict[str, float] = {}
    for row in rows:
        last |= {key: value for key, value in row.items() if key == "loss" or key.startswith("probe/")}
    return "".join(f"* Last `{key}`: {value:.4f}\n" for key, value in last.items())
