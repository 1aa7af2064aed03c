"""The average of the weights over the last steps of a run, which scores better than the weights as they are."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_AVERAGED_SHARE = 0.05  # of a run, over which weights are averaged unless the recipe says otherwise


class Average:
    """Exponential moving average of a module's weights and buffers, the statistics of batch norm included.

    The first averages forget faster, ``(1 + t) / (10 + t)``, so that the start of the run does not linger.

    Args:
        module: whose tensors are averaged; the average is on its device.
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

    def on_cpu(self) -> dict[str, Tensor]:
        """The average as a state dict, which may share memory with it."""
        return {name: tensor.cpu() for name, tensor in self.tensors.items()}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Go on with an average of an earlier process."""
        for name, tensor in self.tensors.items():
            tensor.copy_(tensors[name])


def scaled_decay(decay: float | None, total: int) -> float:
    """The decay of the average: as given, or so that it reaches over about a twentieth of ``total`` steps."""
    return decay if decay is not None else 1 - 1 / max(1.0, _AVERAGED_SHARE * total)
