"""How weights are changed: learning rates layer by layer, losses of the kinds of targets."""

from __future__ import annotations

from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn

from m2d_embed.model.encoder import Encoder


def layer_groups(model: nn.Module, lr: float, layer_decay: float, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups for an optimiser, with lower learning rates for lower layers.

    Layer-wise decay of the learning rate (Clark et al., arXiv 2003.10555, section 3; with the layers numbered as in
    BEiT, arXiv 2106.08254): the head and the final norm have ``lr``, block ``i`` of ``depth`` has
    ``lr * layer_decay ** (depth - i)``, the patch embedding and the class token, the lowest, have
    ``lr * layer_decay ** (depth + 1)``. Biases, norms and ``Encoder.no_weight_decay`` have no weight decay.

    Args:
        model: an ``M2D`` with a head, or anything else with ``encoder`` and ``head``. Frozen parameters are left out.
        lr: the highest learning rate.
        layer_decay: 0 < layer_decay <= 1.
        weight_decay: of matrices.

    Returns:
        Dicts with ``params``, ``lr``, ``lr_scale`` (``lr`` as a share of the highest) and ``weight_decay``, the lowest
        layer first.
    """
    encoder = cast(Encoder, model.get_submodule("encoder"))
    depth, exempt = len(encoder.blocks), {f"encoder.{name}" for name in encoder.no_weight_decay()}
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        level, decayed = _level(name, depth), parameter.ndim > 1 and name not in exempt
        scale = layer_decay ** (depth + 1 - level)
        group = {"params": [], "lr": lr * scale, "lr_scale": scale, "weight_decay": weight_decay if decayed else 0.0}
        groups.setdefault((level, decayed), group)["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]


def _level(name: str, depth: int) -> int:
    """0 for what comes before the blocks, ``i + 1`` for block ``i``, ``depth + 1`` for what comes after."""
    if name.startswith(("encoder.patch_embed.", "encoder.cls_token")):
        return 0
    if name.startswith("encoder.blocks."):
        return int(name.split(".")[2]) + 1
    return depth + 1


def loss_per_row(logits: Tensor, targets: Tensor, multi_label: bool, label_smoothing: float) -> Tensor:
    """Cross-entropy of each clip or time column.

    Args:
        logits: (..., L).
        targets: (..., L) float32 in [0, 1], mixed ones included.
        multi_label: any number of labels (sigmoid, binary cross-entropy, mean over the labels), or exactly one
            (softmax).
        label_smoothing: share of a target that is spread evenly: over all labels, or over yes and no.

    Returns:
        (...) float32.
    """
    if multi_label:
        smooth = targets * (1 - label_smoothing) + label_smoothing / 2
        return F.binary_cross_entropy_with_logits(logits, smooth, reduction="none").mean(dim=-1)
    smooth = targets * (1 - label_smoothing) + label_smoothing / targets.shape[-1]
    return -(smooth * logits.log_softmax(dim=-1)).sum(dim=-1)
