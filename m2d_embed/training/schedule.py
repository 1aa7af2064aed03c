"""Learning rate and EMA decay as functions of the step (arXiv 2210.14648, section 4.1)."""

from __future__ import annotations

import math


def learning_rate(step: int, total: int, warmup: float, peak: float) -> float:
    """Linear warm-up over the share ``warmup`` of the run, then a cosine to zero.

    Args:
        step: the step about to be taken, from 0.
        total: steps of the run.
        warmup: share of the run, 0 <= warmup < 1.
        peak: the highest learning rate.
    """
    warm = warmup * total
    if step < warm:
        return peak * (step + 1) / (math.floor(warm) + 1)
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warm) / (total - warm)))


def ema_decay(step: int, total: int, first: float, last: float) -> float:
    """Linear from ``first`` at step 0 to ``last`` at the final step."""
    return first + (last - first) * step / max(total - 1, 1)
