"""The classification head of fine-tuned checkpoints, and AudioSet's class names.

The labels (``audioset_labels.csv``) are from the AudioSet ontology, Google, CC BY 4.0.
"""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources

from torch import Tensor, nn

from m2d_embed.config import HeadConfig


@dataclass(frozen=True)
class Tag:
    """A label with its probability, 0 to 1."""

    label: str
    score: float


class _Float32Statistics(nn.BatchNorm1d):
    """Batch norm whose running statistics stay in float32, where those of a model cast to half precision would stall.

    Each batch moves them by a tenth of their distance to it at most, which half precision rounds to nothing.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Float32Statistics:
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch has no types for it
        for name, buffer in self._buffers.items():
            old = before[name]
            if buffer is not None and old is not None and buffer.dtype != old.dtype:
                self._buffers[name] = old.to(buffer.device)
        return self


class TaggingHead(nn.Module):
    """BatchNorm without affine, then Linear: features of width ``dim`` -> one logit a label."""

    def __init__(self, dim: int, config: HeadConfig):
        super().__init__()
        self.config = config
        self.norm = _Float32Statistics(dim, affine=False)
        self.linear = nn.Linear(dim, len(config.labels))

    def init_weights(self) -> None:
        """Draw fresh weights, N(0, 0.02), and zero biases: with features of unit variance, first logits are small."""
        nn.init.normal_(self.linear.weight, std=0.02)
        nn.init.zeros_(self.linear.bias)

    def forward(self, features: Tensor) -> Tensor:
        """(..., dim) -> (..., labels) logits, float32."""
        normalised: Tensor = self.norm(features.float().reshape(-1, features.shape[-1])).view_as(features)
        logits: Tensor = self.linear(normalised.to(self.linear.weight.dtype))
        return logits.float()

    def probabilities(self, logits: Tensor) -> Tensor:
        """Sigmoid for multi-label heads, softmax over the labels for the others."""
        return logits.sigmoid() if self.config.multi_label else logits.softmax(-1)

    def top_tags(self, logits: Tensor, top_k: int) -> list[Tag]:
        """The ``top_k`` most probable labels of one clip or column, (labels,), best first."""
        scores, indices = self.probabilities(logits).topk(min(top_k, len(self.config.labels)))
        return [Tag(self.config.labels[i], s) for i, s in zip(indices.tolist(), scores.tolist(), strict=True)]


def audioset_labels() -> tuple[str, ...]:
    """AudioSet's 527 class names in the order of the published heads: sorted by MID, not by AudioSet's index."""
    text = resources.files(__package__).joinpath("audioset_labels.csv").read_text(encoding="utf-8")
    rows = sorted(csv.DictReader(text.splitlines()), key=lambda row: row["mid"])
    return tuple(row["display_name"] for row in rows)
