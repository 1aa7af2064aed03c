"""How weights are changed: learning rates layer by layer, losses of the kinds of targets, an average of the weights."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_AVERAGED_SHARE = 0.05  # of a run, over which weights are averaged unless the recipe says otherwise


def layer_groups(model: nn.Module, lr: float, layer_decay: float, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups for an optimiser, with lower learning rates for lower layers.

    Layer-wise decay of the learning rate (Clark et al., arXiv 2003.10555, section 3; with the layers numbered as in
    BEiT, arXiv 2106.08254): the head and the final norm have ``lr``, block ``i`` of ``depth`` has
    ``lr * layer_decay ** (depth - i)``, the patch embedding and the class token, the lowest, have
    ``lr * layer_decay ** (depth + 1)``. Biases, norms and tokens have no weight decay.

    Args:
        model: an ``M2D`` with a head, or anything else with ``encoder`` and ``head``. Frozen parameters are left out.
        lr: the highest learning rate.
        layer_decay: 0 < layer_decay <= 1.
        weight_decay: of matrices.

    Returns:
        Dicts with ``params``, ``lr``, ``lr_scale`` (``lr`` as a share of the highest) and ``weight_decay``, the lowest
        layer first.
    """
    depth = len(model.get_submodule("encoder.blocks")._modules)
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        level, decayed = _level(name, depth), parameter.ndim > 1 and not name.endswith("cls_token")
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


class Average:
    """Exponential moving average of a module's weights and buffers, the statistics of batch norm included.

    The first averages forget faster, ``(1 + t) / (10 + t)``, so that the start of the run does not linger.

    Args:
        module: whose tensors are averaged.
        decay: share of the average that a step keeps; 0 is the module as it is.
    """

    def __init__(self, module: nn.Module, decay: float):
        self.decay = decay
        self.tensors = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Take in the module as it is after ``step`` steps."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, tensor in module.state_dict().items():
            if tensor.is_floating_point():
                self.tensors[name].lerp_(tensor, 1 - decay)
            else:
                self.tensors[name].copy_(tensor)

    def to(self, device: torch.device) -> None:
        """Move the average to where the module is."""
        self.tensors = {name: tensor.to(device) for name, tensor in self.tensors.items()}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Go on with an average of an earlier process."""
        for name, tensor in self.tensors.items():
            tensor.copy_(tensors[name])


def scaled_decay(decay: float | None, total: int) -> float:
    """The decay of the average: as given, or so that it reaches over about a twentieth of ``total`` steps."""
    return decay if decay is not None else 1 - 1 / max(1.0, _AVERAGED_SHARE * total)
