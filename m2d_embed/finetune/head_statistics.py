"""The statistics that the head of a trained classifier normalises with: those of clips as they are.

In training they follow augmented crops, batch by batch, and so lie elsewhere than those of the whole clips that the
classifier is for. Taken anew with the weights as they are, "PreciseBN" (Wu and Johnson, arXiv 2105.07576, section 3).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from m2d_embed.finetune.crops import EvaluationClips
from m2d_embed.model import M2D


@torch.no_grad()
def take_statistics(model: M2D, clips: EvaluationClips, per_column: bool) -> None:
    """Set mean and variance of the head's batch norm to those of what it sees of clips.

    Args:
        model: with a head, in evaluation mode; its ``features`` become those of the head.
        clips: to take them of.
        per_column: of the time columns, as for events; else of whole clips.
    """
    norm = model.tagging_head().norm
    count, total, squares = 0, torch.zeros(()), torch.zeros(())
    for seen in _seen(model, clips, per_column):
        count, total, squares = count + len(seen), total + seen.sum(dim=0), squares + seen.square().sum(dim=0)
    mean = total / count
    assert norm.running_mean is not None and norm.running_var is not None  # they are kept, by default
    norm.running_mean.copy_(mean)
    norm.running_var.copy_((squares / count - mean.square()).clamp_min(0))


def _seen(model: M2D, clips: EvaluationClips, per_column: bool) -> Iterator[Tensor]:
    """What the head sees of clip after clip, (n, D) float64 on the CPU."""
    model.features = model.head_features()
    for _, log_mel in clips:
        moved = log_mel.to(model.device)
        yield (model.encode_frames(moved).flatten(0, 1) if per_column else model.scene(moved)).double().cpu()
