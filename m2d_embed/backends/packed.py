"""Transformer blocks as a CPU runs them fastest: kernels of our own, or copies of the weights for oneDNN; int8.

``backends.py`` chooses. Blocks go through the kernels of ``native`` where these were compiled, suit the processor and
fit the shape. What follows is about the others.

A matrix product of oneDNN spends a good part of its time on rearranging the weights, in every call anew
(``benchmarks/speed.py`` measures products with weights as they are and rearranged before, and whole models). The
rearranged copies belong to inference without gradients, and are made anew when weights have changed, so the blocks they
were made from stay the only truth. Half-precision weights that the processor does not multiply any faster have copies
in float32.

int8: weights are rounded with a scale for each output, inputs with a scale for each token; products are summed in
int32, and all between them stays in float32 or bfloat16. A token's scale depends on that token alone, so that a clip's
result does not depend on the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m2d_embed.backends import native
from m2d_embed.backends.native import Arithmetic, BlockLike, NativeBlocks
from m2d_embed.backends.selection import Backend

_MOST_PACKED = 280_000_000  # bytes of copies; beyond it the second layers of MLPs, the last first, stay as they are
_SAMPLES = 16  # elements of a matrix that are compared to find out whether it has changed
_ZERO_POINT = 128  # of uint8 inputs; oneDNN has no fast product of two signed matrices here
_LARGEST = 127
_HIDDEN_BYTES = 8 << 20  # of float32 between the layers of an int8 MLP: what the processor's cache can hold
_SMALLEST_SCALE = 1e-12
_FEW_SCORES = 30_000  # of attention: as many as a single clip of 1 to 3 s has


Product = Callable[[Tensor], Tensor]
#: (B, tokens, dim) float32 and the mask of ``encoder.attend`` -> the same, perhaps changed in place.
PackedBlock = Callable[[Tensor, Tensor | None], Tensor]
#: The same of a run of blocks, whose indices come second.
RunBlocks = Callable[[Tensor, range, Tensor | None], Tensor]
#: A layer and its float32 or bfloat16 dtype -> the layer with a copy of its weights; perhaps with a GELU after it.
MakeProduct = Callable[[nn.Linear, torch.dtype, Literal["none", "gelu"]], Product]


def run_each(blocks: nn.ModuleList | list[PackedBlock], x: Tensor, which: range, attended: Tensor | None) -> Tensor:
    """(B, tokens, dim) -> the same, through a run of blocks; ``attended`` as in ``encoder.attend``."""
    for index in which:
        x = blocks[index](x, attended)
    return x


class PackedBlocks:
    """Packed copies of blocks.

    Args:
        blocks: the encoder's, of the types that it was built of.
        norm: what the encoder's features are read through.
        quantize: int8 was asked for.
        backend: who computes them; not "modules".

    Attributes:
        kernel: of our own, or None.
        copies: for oneDNN or PyTorch, if there is no kernel.
    """

    def __init__(self, blocks: nn.ModuleList, norm: nn.Module, quantize: bool, backend: Backend):
        self.backend = backend
        self._quantize = quantize
        self._norm = norm
        self._blocks = blocks
        self._num_blocks = len(blocks)
        # Dictionaries, as looking up modules by name takes longer than a small matrix product.
        self._children = [(m._modules, name, child) for m in blocks.modules() for name, child in m._modules.items()]
        self._layers = list(_layers(blocks))
        dtype = torch.bfloat16 if backend.kind == "bf16" else torch.float32
        biases = [layer.bias for layer in self._layers if layer.bias is not None]
        are_converted = any(bias.dtype != dtype for bias in biases)  # once, as in every call it would take time
        self._copied = ("weight", "bias") if are_converted else ("weight",)
        self._identities = self._current_identities()
        parameters = [layer._parameters.get(name) for layer in self._layers for name in self._copied]
        self._views = [_spread(parameter) for parameter in parameters if parameter is not None]
        self._samples = torch.cat(self._views)
        layers, kind = list(_as_blocks(blocks)), cast(Arithmetic, backend.kind)
        is_usual = type(norm) is nn.LayerNorm and norm.normalized_shape == (layers[0].attn.qkv.in_features,)
        self._readable = cast(nn.LayerNorm, norm) if is_usual else None
        self.kernel = NativeBlocks(layers, self._readable, kind) if backend.engine == "native" else None
        self.copies = [] if self.kernel else _copies(blocks, backend)

    def __call__(self, x: Tensor, blocks: range, attended: Tensor | None) -> Tensor:
        """(B, tokens, dim) float32 through a run of blocks, perhaps in place; ``attended`` as in ``encoder.attend``."""
        if self.kernel is not None and attended is None:
            return self.kernel(x, blocks)
        return run_each(self.copies or self._blocks, x, blocks, attended)

    @property
    def can_read(self) -> bool:
        """Whether there are ``features``: there is a kernel, and the norm is a plain one that nothing hooks into."""
        norm = self._readable
        if self.kernel is None or norm is None or not is_unhooked(norm):
            return False
        return all(p is None or p.dtype == torch.float32 for p in norm._parameters.values())

    def features(self, x: Tensor, layers: Sequence[int], rows: int) -> list[Tensor]:
        """As ``NativeBlocks.features``."""
        assert self.kernel is not None
        return self.kernel.features(x, layers, rows)

    def _current_identities(self) -> list[tuple[type, int, int]]:
        return [_identity(layer, name) for layer in self._layers for name in self._copied]

    def is_current(self, blocks: nn.ModuleList, norm: nn.Module, quantize: bool) -> bool:
        """Whether the blocks are still those that were packed, with the same weights, and nothing hooks into them.

        A change through ``.data`` leaves no trace in the tensor, so some elements of each matrix are compared as well;
        one that misses them all is not seen (``M2D.repack``).
        """
        return (
            blocks is self._blocks
            and norm is self._norm
            and quantize == self._quantize
            and len(blocks) == self._num_blocks
            and all(siblings.get(name) is module for siblings, name, module in self._children)
            and all(is_unhooked(module) for _, _, module in self._children)
            and self._current_identities() == self._identities
            and torch.equal(torch.cat(self._views), self._samples)
        )


def _copies(blocks: nn.ModuleList, backend: Backend) -> list[PackedBlock]:
    if backend.kind == "int8":
        return [_QuantizedBlock(block) for block in _as_blocks(blocks)]
    dtype = torch.bfloat16 if backend.kind == "bf16" else torch.float32
    make: MakeProduct = packed_layer if backend.engine == "onednn" else _widened_layer
    is_wider = dtype != next(_layers(blocks)).weight.dtype  # then there is no using the second layers as they are
    whole = len(blocks) - (0 if is_wider else _num_too_large(blocks))
    return [_PackedBlock(block, dtype, make, index < whole) for index, block in enumerate(_as_blocks(blocks))]


def is_unhooked(module: nn.Module | None) -> bool:
    """Whether calling a module does what its class says, and nothing else."""
    return module is None or not (module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


class _PackedBlock:
    """A block whose products are float32 or bfloat16; the residual stream is float32.

    ``wholly`` says whether the second layer of the MLP, which gains least from it, is copied like all others.
    """

    def __init__(self, block: BlockLike, dtype: torch.dtype, make: MakeProduct, wholly: bool):
        self.block = block
        self.dtype = dtype
        attention, mlp = block.attn, block.mlp
        self.qkv, self.proj = make(attention.qkv, dtype, "none"), make(attention.proj, dtype, "none")
        self.fc1 = make(mlp.fc1, dtype, "gelu")
        self.fc2: Product = make(mlp.fc2, dtype, "none") if wholly else mlp.fc2

    def __call__(self, x: Tensor, attended: Tensor | None) -> Tensor:
        qkv = self.qkv(_normalize(x, self.block.norm1).to(self.dtype))
        x.add_(self.proj(_attend(qkv, self.block.attn.num_heads, attended)))
        return x.add_(self.fc2(self.fc1(_normalize(x, self.block.norm2).to(self.dtype))))


class _QuantizedBlock:
    """A block whose products are int8; attention is bfloat16, all else float32."""

    def __init__(self, block: BlockLike):
        self.block = block
        attention, mlp = block.attn, block.mlp
        self.qkv, self.proj, self.fc1, self.fc2 = map(_quantized, (attention.qkv, attention.proj, mlp.fc1, mlp.fc2))
        self.rows_at_a_time = max(1, _HIDDEN_BYTES // (4 * mlp.fc1.out_features))

    def __call__(self, x: Tensor, attended: Tensor | None) -> Tensor:
        qkv = self.qkv(_normalize(x, self.block.norm1)).bfloat16()
        x.add_(self.proj(_attend(qkv, self.block.attn.num_heads, attended).float()))
        for part in torch.split(x.view(-1, x.shape[-1]), self.rows_at_a_time):  # views: they change x
            part.add_(self.fc2(torch.ops.aten.gelu_(self.fc1(_normalize(part, self.block.norm2)))))
        return x


# --- parts ------------------------------------------------------------------------------------------------------------


def packed_layer(linear: nn.Linear, dtype: torch.dtype, followed_by: Literal["none", "gelu"]) -> Product:
    """The layer with its matrix in ``dtype`` and laid out for oneDNN, and perhaps an exact GELU after it."""
    packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach().to(dtype), None)
    bias = _converted_bias(linear, dtype)

    def product(x: Tensor) -> Tensor:
        b = linear.bias if bias is None else bias
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, b, followed_by, [], "none")
        return y

    return product


def _converted_bias(linear: nn.Linear, dtype: torch.dtype) -> Tensor | None:
    """A copy of the bias in ``dtype``, or None if it can be used as it is."""
    return None if linear.bias is None or linear.bias.dtype == dtype else linear.bias.detach().to(dtype)


def _widened_layer(linear: nn.Linear, dtype: torch.dtype, followed_by: Literal["none", "gelu"]) -> Product:
    """The layer with a copy of its matrix in ``dtype``, and perhaps an exact GELU after it."""
    weight, bias = linear.weight.detach().to(dtype), _converted_bias(linear, dtype)

    def product(x: Tensor) -> Tensor:
        y = F.linear(x, weight, linear.bias if bias is None else bias)
        return F.gelu(y) if followed_by == "gelu" else y

    return product


def _quantized(linear: nn.Linear) -> Product:
    """The layer with an int8 matrix: float32 in and out. It writes into its input."""
    rounded, scales = native.rounded_to_int8(linear.weight)
    packed = torch.ops.onednn.qlinear_prepack(rounded, None)
    zero_points = torch.zeros(len(scales), dtype=torch.int64)

    def product(x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        largest = torch.maximum(rows.amax(dim=1, keepdim=True), rows.amin(dim=1, keepdim=True).neg_())
        steps = largest.div_(_LARGEST).clamp_min_(_SMALLEST_SCALE)  # (rows, 1)
        # Half more than the zero point, as the cast to integers rounds down.
        levels = rows.mul_(steps.reciprocal()).add_(_ZERO_POINT + 0.5).to(torch.uint8)
        y: Tensor = torch.ops.onednn.qlinear_pointwise(
            levels, 1.0, _ZERO_POINT, packed, scales, zero_points, None, 1.0, 0, torch.float32, "none", [], ""
        )
        y.mul_(steps)
        if linear.bias is not None:
            y.add_(linear.bias)
        return y.view(*x.shape[:-1], -1)

    return product


def _normalize(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def _attend(qkv: Tensor, num_heads: int, attended: Tensor | None) -> Tensor:
    """(B, tokens, 3 * dim) -> (B, tokens, dim): self-attention.

    In bfloat16 as matrix products, which take about half the time of PyTorch's fused kernel here, unless there is so
    little to do that calls are what costs; in float32 fused.
    """
    batch, tokens, width = qkv.shape
    fused = qkv.dtype == torch.float32 or attended is not None or batch * num_heads * tokens**2 <= _FEW_SCORES
    head_dim = width // 3 // num_heads
    heads = qkv.view(batch, tokens, 3, num_heads, head_dim).permute(2, 0, 3, 1, 4)  # (3, B, heads, tokens, head_dim)
    if fused:
        q, k, v = heads.unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=attended)
    else:
        q, k, v = heads.contiguous().flatten(1, 2).unbind(0)  # (B * heads, tokens, head_dim)
        scores = torch.baddbmm(q.new_empty(()), q, k.transpose(1, 2), beta=0, alpha=float(head_dim) ** -0.5)
        mixed = (scores.softmax(dim=-1) @ v).view(batch, num_heads, tokens, head_dim)
    return mixed.transpose(1, 2).reshape(batch, tokens, width // 3)


def _num_too_large(blocks: nn.ModuleList) -> int:
    """In how many blocks the second layer of the MLP is left as it is, so that the copies take no more memory."""
    surplus = sum(layer.weight.nbytes for layer in _layers(blocks)) - _MOST_PACKED
    sizes = [block.mlp.fc2.weight.nbytes for block in _as_blocks(blocks)]
    return min(len(sizes), max(0, math.ceil(surplus / max(sizes))))


def _as_blocks(blocks: nn.ModuleList) -> Iterator[BlockLike]:
    for block in blocks:
        yield cast(BlockLike, block)


def _layers(blocks: nn.ModuleList) -> Iterator[nn.Linear]:
    for block in _as_blocks(blocks):
        yield block.attn.qkv
        yield block.attn.proj
        yield block.mlp.fc1
        yield block.mlp.fc2


def _identity(layer: nn.Linear, name: str) -> tuple[type, int, int]:
    """What a layer is, where the memory of a parameter of it is, and how often that has been written to."""
    weight = layer._parameters.get(name)  # faster than layer.weight
    if weight is None:  # it is computed from something else, as with a parametrization
        return type(layer), 0, 0
    return type(layer), weight.data_ptr(), -1 if weight.is_inference() else weight._version


def _spread(parameter: Tensor) -> Tensor:
    """A view of some elements, from all over a matrix; or of a whole bias."""
    flat = parameter.detach().view(-1)
    return flat if parameter.ndim == 1 else flat[:: max(1, len(flat) // _SAMPLES)]
