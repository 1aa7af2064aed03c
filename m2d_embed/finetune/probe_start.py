"""A head that begins as the linear probe of the encoder it sits on, so that fine-tuning begins where the probe ends.

From a head of random weights the first gradients say more of that head than of the sounds, and distort what the encoder
knows: "linear probing then fine-tuning" (LP-FT; Kumar et al., arXiv 2202.10054, sections 3 and 4).
"""

from __future__ import annotations

import numpy as np
import torch

from m2d_embed.evaluate.linear_probe import STRENGTHS, choose_strength, fit_layer, rotate
from m2d_embed.finetune.crops import EvaluationClips
from m2d_embed.finetune.head_statistics import seen_by_head, set_statistics
from m2d_embed.finetune.task import Parts
from m2d_embed.labelled.clips import LabelledClips
from m2d_embed.m2d import M2D


@torch.no_grad()
def probe_head(model: M2D, clips: EvaluationClips, labelled: LabelledClips, parts: Parts, fold: int | None) -> float:
    """Set the head of a model to the logistic regression of what it will see, chosen and fitted as the linear probe.

    Args:
        model: whose head is set, statistics included; in evaluation mode.
        clips: at least all that are trained on or validated on.
        labelled: the data.
        parts: of it; the head is fitted to those that are trained on.
        fold: that is tested; None is none, and the regularisation is then that of the lowest.

    Returns:
        The strength chosen, scikit-learn's ``C``.
    """
    head = model.tagging_head().cpu()
    seen = torch.zeros(len(labelled), model.config.head_dim, dtype=torch.float64)
    for rows, scenes in seen_by_head(model, clips, per_column=False):
        seen[rows] = scenes
    variance, mean = torch.var_mean(seen[parts.train], dim=0, correction=0)
    set_statistics(head, mean, variance)
    known = np.concatenate([parts.train, parts.valid])
    x = head.norm(seen[known].float()).numpy()
    held_out = np.isin(known, labelled.hold_out(labelled.test_folds()[0] if fold is None else fold)[1])
    labels, count = labelled.labels, len(labelled.label_names)
    strength = choose_strength(rotate(x, x)[0], labels[known], held_out, STRENGTHS, count)
    weight, bias = fit_layer(x[: len(parts.train)], labels[parts.train], strength, count)
    head.linear.weight.copy_(torch.from_numpy(weight))
    head.linear.bias.copy_(torch.from_numpy(bias))
    head.to(model.device)
    return strength
