"""Where the weights of a run start: fresh, from a checkpoint of an encoder, or from a full one of pre-training.

Full checkpoints are the upstream ``.pth`` files with predictor ("decoder") and target network, and our own runs'.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from m2d_embed.checkpoints import hub
from m2d_embed.checkpoints.layouts import WEIGHT_FILES, load_checkpoint, read_full_state
from m2d_embed.config import ModelConfig
from m2d_embed.errors import CheckpointError
from m2d_embed.pretrain.objectives import Objective
from m2d_embed.pretrain.recipe import StartSection
from m2d_embed.training.positions import resize_positions
from m2d_embed.training.run_state import RunState

log = logging.getLogger("m2d_embed")

#: Parts of a full upstream checkpoint -> ours; what is not listed belongs to the encoder.
PUBLISHED_PARTS = {
    "mask_token": "predictor.mask_token",
    "decoder_pos_embed": "predictor.pos_embed",
    "decoder_embed": "predictor.embed",
    "decoder_blocks": "predictor.blocks",
    "decoder_norm": "predictor.norm",
    "decoder_pred": "predictor.out",
    "target_blocks": "target.blocks",
    "target_norm": "target.norm",
    "offline_predictor": "offline",
}
#: What a full checkpoint need not hold.
_MAY_BE_FRESH = ("target", "offline", "clap")
_ENCODER_PARTS = ("cls_token", "pos_embed", "patch_embed", "blocks", "norm")


@dataclass(frozen=True)
class Start:
    """A checkpoint to start from: its configuration, and its tensors by the names of ``Objective.state_dict()``."""

    config: ModelConfig
    tensors: dict[str, Tensor]
    origin: str


def read_start(section: StartSection) -> Start | None:
    """Read the checkpoint that a recipe starts from; None for fresh weights.

    Raises:
        ModelNotFoundError: if the name leads nowhere.
        CheckpointError: if it cannot be read, or holds no predictor where more than the encoder is asked for.
    """
    if not section.model:
        return None
    path = Path(section.model).expanduser()
    if path.suffix == ".ckpt":
        state = RunState.read(path)
        return Start(state.config, state.model, str(path))
    location = hub.locate(section.model, [WEIGHT_FILES[torch.float32]], [], hub.HubOptions())
    checkpoint = load_checkpoint(location)
    tensors = {name: t for name, t in checkpoint.tensors.items() if name.startswith("encoder.")}
    if section.parts != "encoder":
        if location.release is not None:
            raise CheckpointError(
                f"start.model {section.model}: a release is kept without its predictor; "
                "download its .zip and give the path."
            )
        tensors |= our_names(read_full_state(location.path))
    return Start(checkpoint.config, {name: t.float() for name, t in tensors.items()}, location.origin)


def our_names(published: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a full upstream checkpoint by the names of ``Objective.state_dict()``; other keys are left out."""
    renamed = {}
    for name, tensor in published.items():
        part, dot, rest = name.partition(".")
        if part in PUBLISHED_PARTS:
            renamed[PUBLISHED_PARTS[part] + dot + rest] = tensor
        elif part in _ENCODER_PARTS:
            renamed[f"encoder.{name}"] = tensor
    return renamed


def apply_start(objective: Objective, start: Start, parts: str) -> None:
    """Load a checkpoint into an objective whose other weights are fresh.

    A target network that is not loaded becomes a copy of the encoder; of "all" parts the head of an additional task may
    be new, too, where the checkpoint has none.
    Positions of another window are rebuilt if they are the fixed ones, else interpolated.

    Raises:
        CheckpointError: if tensors are missing or of another shape; it names them.
    """
    expected = objective.state_dict()
    held = {name.partition(".")[0] for name in start.tensors}
    fresh = {part for part in _MAY_BE_FRESH if part not in held}
    wanted_parts = {
        "encoder": {"encoder"},
        "predictor": {"encoder", "predictor"},
        "all": {name.partition(".")[0] for name in expected} - fresh,
    }[parts]
    wanted = [name for name in expected if name.partition(".")[0] in wanted_parts]
    tensors = dict(start.tensors)
    for name in [n for n in wanted if n.endswith("pos_embed")]:
        fixed, grids = expected[name].cpu(), (start.config.grid_size, objective.encoder.grid_size)
        held_positions = tensors.get(name)  # some checkpoints leave out what is fixed
        tensors[name] = fixed if held_positions is None else resize_positions(held_positions, grids[0], fixed, grids[1])
    problems = [f"{n} is missing" for n in wanted if n not in tensors]
    problems += [
        f"{n} has shape {tuple(tensors[n].shape)}, not {tuple(expected[n].shape)}"
        for n in wanted
        if n in tensors and tensors[n].shape != expected[n].shape
    ]
    if problems:
        more = f", and {len(problems) - 4} more" if len(problems) > 4 else ""
        hint = " Set start.parts=encoder to take the encoder alone." if parts != "encoder" else ""
        raise CheckpointError(f"{start.origin}: does not fit the run: {'; '.join(problems[:4])}{more}.{hint}")
    objective.load_state_dict({name: tensors[name] for name in wanted}, strict=False)
    if "target" not in wanted_parts:
        objective.reset_target()
    left = sorted(held - {name.partition(".")[0] for name in wanted})
    log.info("started from %s%s", start.origin, f"; left out: {', '.join(left)}" if left else "")
