"""The encoder through ``torch.compile``: a few static shapes, and CUDA graphs for small batches.

Clips come in all lengths, and compiled code is fastest for shapes that are known. So windows are padded at the end to
one of four widths, whose padding no token attends to, and batches to a power of two: a model is compiled a few dozen
times at most, each time at its first use. Results differ from the plain encoder's by rounding alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from m2d_embed.model.encoder import Encoder

_WIDTHS = 4
_MAX_SHAPES = 256  # compiled for one function before torch would give up and run it as it is
#: With fewer tokens in a batch, a GPU takes less time to compute a layer than a CPU to launch it.
_GRAPHED_TOKENS = 8192


class CompiledEncoder:
    """Stands in for ``Encoder.forward`` in inference without gradients.

    Args:
        encoder: whose weights are used, whatever they are at the time of a call.
        backend: of ``torch.compile``.
    """

    def __init__(self, encoder: Encoder, backend: str = "inductor"):
        self.encoder = encoder
        self._backend = backend
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _MAX_SHAPES)
        self._run = torch.compile(_features, backend=backend, dynamic=False, fullgraph=True)
        self._run_graphed = self._run
        if backend == "inductor":
            self._run_graphed = torch.compile(_features, mode="reduce-overhead", dynamic=False, fullgraph=True)

    def __reduce__(self) -> tuple[type[CompiledEncoder], tuple[Encoder, str]]:
        return CompiledEncoder, (self.encoder, self._backend)  # compiled code is neither copied nor pickled

    def __call__(self, log_mel: Tensor, layers: Sequence[int] = (-1,)) -> list[Tensor]:
        """Patch features of one window: arguments and results as of ``Encoder.forward``."""
        encoder = self.encoder
        rows, grid_columns = encoder.grid_size
        patch_frames = encoder.patch_embed.proj.kernel_size[1]
        count, columns = len(log_mel), log_mel.shape[-1] // patch_frames
        width = padded_width(columns, grid_columns)
        batch = 1 << (count - 1).bit_length()
        padded = F.pad(log_mel, (0, (width - columns) * patch_frames, 0, 0, 0, 0, 0, batch - count))
        is_audio = None
        if width > columns:
            is_audio = (torch.arange(width, device=log_mel.device) < columns).expand(batch, rows, width).flatten(1)
        graphed = log_mel.is_cuda and batch * rows * width <= _GRAPHED_TOKENS
        if graphed:
            torch.compiler.cudagraph_mark_step_begin()
        features = (self._run_graphed if graphed else self._run)(encoder, padded, tuple(layers), is_audio)
        kept = [x.view(batch, rows, width, -1)[:count, :, :columns] for x in features]
        return [x.clone() for x in kept] if graphed else kept  # the next replay writes to the same memory


def padded_width(columns: int, grid_columns: int) -> int:
    """The least of a quarter, a half, three quarters and the whole of the grid that holds so many columns."""
    step = -(-grid_columns // _WIDTHS)
    return min(-(-columns // step) * step, grid_columns)


def _features(encoder: Encoder, log_mel: Tensor, layers: tuple[int, ...], is_audio: Tensor | None) -> list[Tensor]:
    """(B, 1, mels, frames) -> one (B, F * T, dim) tensor a layer."""
    return [x[:, 1:] for x in encoder.encode(encoder.embed(log_mel), layers, is_audio)]
