"""The statistics that the head of a trained classifier normalises with: those of clips as they are.

In training they follow augmented crops, batch by batch, and so lie elsewhere than those of the whole clips that the
classifier is for. Taken anew with the weights as they are, "PreciseBN" (Wu and Johnson, arXiv 2105.07576, section 3).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from m2d_embed.finetune.crops import EvaluationClips
from m2d_embed.labelled.clips import Integers
from m2d_embed.m2d import M2D
from m2d_embed.model.heads.tagging import TaggingHead


@torch.no_grad()
def take_statistics(model: M2D, clips: EvaluationClips, per_column: bool) -> None:
    """Set mean and variance of the head's batch norm to those of what it sees of clips.

    Args:
        model: with a head, in evaluation mode; its ``features`` become those of the head.
        clips: to take them of.
        per_column: of the time columns, as for events; else of whole clips.
    """
    count, total, squares = 0, torch.zeros(()), torch.zeros(())
    for _, seen in seen_by_head(model, clips, per_column):
        count, total, squares = count + len(seen), total + seen.sum(dim=0), squares + seen.square().sum(dim=0)
    mean = total / count
    set_statistics(model.tagging_head(), mean, (squares / count - mean.square()).clamp_min(0))


def set_statistics(head: TaggingHead, mean: Tensor, variance: Tensor) -> None:
    """Have a head normalise with this mean and this variance, (D,) each."""
    assert head.norm.running_mean is not None and head.norm.running_var is not None  # they are kept, by default
    head.norm.running_mean.copy_(mean)
    head.norm.running_var.copy_(variance)


def seen_by_head(model: M2D, clips: EvaluationClips, per_column: bool) -> Iterator[tuple[Integers, Tensor]]:
    """Rows of clips, and what the head sees of them, (n, D) float64 on the CPU: a row a clip, or a row a column."""
    model.features = model.head_features()
    for rows, log_mel in clips:
        moved = log_mel.to(model.device)
        yield rows, (model.encode_frames(moved).flatten(0, 1) if per_column else model.scene(moved)).double().cpu()
