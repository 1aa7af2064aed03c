"""What is learned: one class an objective, all around the same ``Encoder`` that inference uses.

* M2D: Niizumi et al., "Masked Modeling Duo" (arXiv 2210.14648, section 3).
* M2D-X, M2D-S and M2D-AS: Niizumi et al., "Masked Modeling Duo: Towards a Universal Audio Pre-training Framework"
  (arXiv 2404.06095, section 3). M2D-CLAP: Niizumi et al. (arXiv 2406.02032, section 2).
* MSM-MAE: Niizumi et al., "Masked Spectrogram Modeling using Masked Autoencoders" (arXiv 2204.12260, section 3).
* The data2vec style is M2D's own comparison (arXiv 2210.14648, section 4.3), after Baevski et al., "data2vec"
  (arXiv 2202.03555).
* SALT: Li et al., "Rethinking JEPA: Compute-Efficient Video SSL with Frozen Teachers" (arXiv 2509.24317).

An objective takes an ``Example`` and returns a dict of tensors: ``"loss"`` to minimise, ``"loss/..."`` its parts,
``"target"`` what was predicted, before standardisation, and ``"prediction"``, both (B, M, D) for the masked patches in
the order of ``Example.order``, ``"latent"`` (B, 1 + V, d) of the visible ones with the class token first.
"""

from __future__ import annotations

import abc
import copy
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from m2d_embed.config import ClapConfig, ModelConfig
from m2d_embed.model.encoder import Encoder, init_linears
from m2d_embed.model.heads.clap import ClapHead
from m2d_embed.pretrain.predictor import Predictor, PredictorConfig

Outputs = dict[str, Tensor]


@dataclass
class Example:
    """A batch as an objective sees it.

    ``log_mel`` is (B, 1, mels, frames), normalised; ``order`` (B, N) a permutation of the patches, of which the first
    ``visible`` are shown. ``offline`` is what the additional task of an objective learns: frame features (B, T, D),
    multi-hot labels (B, C), or text embeddings (B, D); of SALT the latents of all patches by its teacher (B, N, D).
    """

    log_mel: Tensor
    order: Tensor
    visible: int
    offline: Tensor | None = None


class Objective(nn.Module, abc.ABC):
    """An encoder, a predictor, and a loss over masked patches."""

    def __init__(self, config: ModelConfig, predictor: PredictorConfig, output_dim: int):
        super().__init__()
        self.encoder = Encoder(config)
        self.predictor = Predictor(predictor, config.embed_dim, output_dim, config.grid_size, config.norm_eps)

    def init_weights(self) -> None:
        """Draw fresh weights for everything."""
        self.encoder.init_weights()
        self.predictor.init_weights()

    def no_weight_decay(self) -> set[str]:
        """Names of parameters with more than one dimension that are not decayed.

        None: the published pre-training decays the class token and the mask token, too.
        """
        return set()

    def reset_target(self) -> None:
        """Make the target network a copy of the online one, if there is a target network."""

    def update_target(self, decay: float) -> None:
        """Move the target network towards the online one, if there is a target network."""

    @abc.abstractmethod
    def forward(self, example: Example) -> Outputs:
        """Loss, prediction, target and latent of a batch, as described at the top of this file."""


class MSMMAE(Objective):
    """Masked spectrogram modelling: predict the pixels of masked patches, standardised patch by patch."""

    def __init__(self, config: ModelConfig, predictor: PredictorConfig):
        super().__init__(config, predictor, output_dim=config.patch_size[0] * config.patch_size[1])
        self.patch_size = config.patch_size

    def forward(self, example: Example) -> Outputs:
        visible, masked = split(example)
        tokens = self.encoder.embed(example.log_mel)
        [latent] = self.encoder.encode(take(tokens, visible))
        predicted = self.predictor(latent, visible, masked)
        target = take(patch_pixels(example.log_mel, self.patch_size), masked)
        return {"loss": pixel_loss(predicted, target), "target": target, "prediction": predicted, "latent": latent}


class MSMMAES(Objective):
    """MSM-MAE with the additional task of M2D-S: ``loss = weights[0] * MSM-MAE + weights[1] * offline``.

    Ours, for short runs: pixels give a good start, and there is no target encoder to compute. For every masked patch
    the predictor predicts its pixels, and beside them a latent that stands for it in the additional task.
    """

    def __init__(self, config: ModelConfig, predictor: PredictorConfig, offline_dim: int, weights: tuple[float, float]):
        self.pixels = config.patch_size[0] * config.patch_size[1]
        super().__init__(config, predictor, output_dim=self.pixels + config.embed_dim)
        self.patch_size = config.patch_size
        self.weights = weights
        self.offline = nn.Linear(config.grid_size[0] * config.embed_dim, offline_dim)

    def init_weights(self) -> None:
        super().init_weights()
        init_linears(self.offline)

    def forward(self, example: Example) -> Outputs:
        visible, masked = split(example)
        tokens = self.encoder.embed(example.log_mel)
        [latent] = self.encoder.encode(take(tokens, visible))
        predicted, filled_in = self.predictor(latent, visible, masked).split(
            [self.pixels, latent.shape[-1]], dim=-1
        )  # (B, M, pixels), (B, M, dim)
        target = take(patch_pixels(example.log_mel, self.patch_size), masked)
        columns = stack_columns(example.order, latent[:, 1:], filled_in, self.encoder.grid_size)
        offline = cosine_loss(self.offline(columns), wanted(example))
        outputs = {"target": target, "prediction": predicted, "latent": latent}
        return with_offline({**outputs, "loss": pixel_loss(predicted, target)}, offline, self.weights)


class TargetEncoder(nn.Module):
    """The exponential moving average of an encoder's blocks and final norm. It has no gradient."""

    def __init__(self, encoder: Encoder):
        super().__init__()
        self.blocks = copy.deepcopy(encoder.blocks)
        self.norm = copy.deepcopy(encoder.norm)
        self.requires_grad_(False)

    @torch.no_grad()
    def forward(self, tokens: Tensor) -> Tensor:
        """(B, 1 + N, dim) tokens, the class token first -> (B, N, dim) without it."""
        x = tokens
        for block in self.blocks:
            x = block(x)
        target: Tensor = self.norm(x[:, 1:])
        return target

    @torch.no_grad()
    def follow(self, encoder: Encoder, decay: float) -> None:
        """``target = decay * target + (1 - decay) * online``."""
        online = [*encoder.blocks.parameters(), *encoder.norm.parameters()]
        torch._foreach_lerp_(list(self.parameters()), [p.detach() for p in online], 1.0 - decay)


class M2D(Objective):
    """Masked Modeling Duo: predict what a slowly following target encoder makes of the masked patches alone."""

    def __init__(self, config: ModelConfig, predictor: PredictorConfig):
        super().__init__(config, predictor, output_dim=config.embed_dim)
        self.target = TargetEncoder(self.encoder)

    def init_weights(self) -> None:
        super().init_weights()
        self.reset_target()

    def reset_target(self) -> None:
        self.target.follow(self.encoder, decay=0.0)

    def update_target(self, decay: float) -> None:
        self.target.follow(self.encoder, decay)

    def forward(self, example: Example) -> Outputs:
        visible, masked = split(example)
        tokens = self.encoder.embed(example.log_mel)
        [latent] = self.encoder.encode(take(tokens, visible))
        predicted = self.predictor(latent, visible, masked)
        target = self.encode_target(tokens.detach(), masked)
        loss = cosine_loss(predicted, target)
        return {"loss": loss, "target": target, "prediction": predicted, "latent": latent}

    @torch.no_grad()
    def encode_target(self, tokens: Tensor, masked: Tensor) -> Tensor:
        """Targets of the masked patches, (B, M, dim), from the tokens of all, (B, N, dim)."""
        target: Tensor = self.target(self.encoder.with_class_token(take(tokens, masked)))
        return target


class Data2Vec(M2D):
    """As M2D, but the target encoder sees all patches, not only the masked ones."""

    @torch.no_grad()
    def encode_target(self, tokens: Tensor, masked: Tensor) -> Tensor:
        return take(self.target(self.encoder.with_class_token(tokens)), masked)


class SALT(Objective):
    """Predict what a frozen encoder, trained before by masked spectrogram modelling, makes of the masked patches.

    It sees all patches. The loss is that of M2D.
    """

    def __init__(self, config: ModelConfig, predictor: PredictorConfig, teacher_dim: int):
        super().__init__(config, predictor, output_dim=teacher_dim)

    def forward(self, example: Example) -> Outputs:
        visible, masked = split(example)
        tokens = self.encoder.embed(example.log_mel)
        [latent] = self.encoder.encode(take(tokens, visible))
        predicted = self.predictor(latent, visible, masked)
        target = take(wanted(example), masked)
        loss = cosine_loss(predicted, target)
        return {"loss": loss, "target": target, "prediction": predicted, "latent": latent}


class M2DX(M2D):
    """M2D and an additional task: ``loss = weights[0] * M2D + weights[1] * offline``.

    Visible latents and predictions, put back in place and stacked per time column, are projected to the size of
    ``Example.offline``, here the frame features (B, T, D) of a frozen teacher; the offline loss is the standardised
    cosine loss of M2D.
    """

    def __init__(self, config: ModelConfig, predictor: PredictorConfig, offline_dim: int, weights: tuple[float, float]):
        super().__init__(config, predictor)
        self.weights = weights
        self.offline = nn.Linear(config.grid_size[0] * config.embed_dim, offline_dim)

    def init_weights(self) -> None:
        super().init_weights()
        init_linears(self.offline)

    def forward(self, example: Example) -> Outputs:
        outputs = super().forward(example)
        return with_offline(outputs, self.offline_loss(example, outputs), self.weights)

    def offline_loss(self, example: Example, outputs: Outputs) -> Tensor:
        """The loss of the additional task, a scalar."""
        return cosine_loss(self.offline(self.columns(example, outputs)), wanted(example))

    def columns(self, example: Example, outputs: Outputs) -> Tensor:
        """Latents and predictions in place, stacked per time column: (B, T, F * dim)."""
        return stack_columns(example.order, outputs["latent"][:, 1:], outputs["prediction"], self.encoder.grid_size)


class M2DS(M2DX):
    """M2D-S: M2D-X whose teacher's frame features were computed beforehand."""


class M2DAS(M2DX):
    """M2D-AS: the additional task is multi-label classification of the mean over time, by binary cross entropy."""

    def offline_loss(self, example: Example, outputs: Outputs) -> Tensor:
        logits = self.offline(self.columns(example, outputs)).mean(dim=1)
        return F.binary_cross_entropy_with_logits(logits.float(), wanted(example).float())


class M2DCLAP(M2D):
    """M2D-CLAP: the additional task pulls a clip's visible latents and its caption's embedding together (InfoNCE).

    The negatives are those of one micro-batch of every process.
    """

    def __init__(self, config: ModelConfig, predictor: PredictorConfig, clap: ClapConfig, weights: tuple[float, float]):
        super().__init__(config, predictor)
        self.weights = weights
        self.clap = ClapHead(clap)

    def init_weights(self) -> None:
        super().init_weights()
        init_linears(self.clap)

    def forward(self, example: Example) -> Outputs:
        outputs = super().forward(example)
        audio = gather_rows(self.clap.project_audio(outputs["latent"][:, 1:]))
        text = gather_rows(self.clap.project_text(wanted(example)))
        logits = self.clap.similarity(audio, text)
        diagonal = torch.arange(len(logits), device=logits.device)
        offline = (F.cross_entropy(logits, diagonal) + F.cross_entropy(logits.T, diagonal)) / 2
        return with_offline(outputs, offline, self.weights)


# --- pieces --------------------------------------------------------------------------------------------------------


def split(example: Example) -> tuple[Tensor, Tensor]:
    """Indices of visible (B, V) and masked (B, M) patches."""
    return example.order[:, : example.visible], example.order[:, example.visible :]


def take(tokens: Tensor, indices: Tensor) -> Tensor:
    """Rows ``indices`` (B, M) of ``tokens`` (B, N, dim) -> (B, M, dim)."""
    return tokens.gather(1, indices.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


def stack_columns(order: Tensor, latent: Tensor, filled_in: Tensor, grid_size: tuple[int, int]) -> Tensor:
    """Latents (B, V, dim) of visible and (B, M, dim) of masked patches, in place, stacked per time column.

    Returns:
        (B, T, F * dim).
    """
    rows, columns = grid_size
    shuffled = torch.cat([latent, filled_in.to(latent.dtype)], dim=1)  # (B, N, dim)
    patches = take(shuffled, order.argsort(dim=1))
    grid = patches.view(len(patches), rows, columns, -1).transpose(1, 2)  # (B, T, F, dim)
    return grid.flatten(2)


def with_offline(outputs: Outputs, offline: Tensor, weights: tuple[float, float]) -> Outputs:
    """Outputs whose loss is the weighted sum of the one they had and of that of the additional task."""
    online = outputs["loss"]
    loss = weights[0] * online + weights[1] * offline
    return {**outputs, "loss": loss, "loss/online": online, "loss/offline": offline}


def wanted(example: Example) -> Tensor:
    """What the additional task learns."""
    if example.offline is None:
        raise ValueError("this objective needs Example.offline")
    return example.offline


def patch_pixels(log_mel: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """(B, 1, mels, frames) -> (B, F * T, pixels), frequency-major, the pixels of a patch row by row."""
    height, width = patch_size
    rows, columns = log_mel.shape[2] // height, log_mel.shape[3] // width
    whole = log_mel[:, 0, : rows * height, : columns * width]
    image = whole.reshape(-1, rows, height, columns, width).transpose(2, 3)  # (B, F, T, h, w)
    return image.reshape(-1, rows * columns, height * width)


def standardize(x: Tensor) -> Tensor:
    """Zero mean and unit variance over the last dimension."""
    variance, mean = torch.var_mean(x, dim=-1, keepdim=True)
    return (x - mean) / (variance + 1e-6).sqrt()


def pixel_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error between predictions and pixels standardised patch by patch, (..., pixels)."""
    return F.mse_loss(prediction.float(), standardize(target.float()))


def cosine_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """``2 - 2 cos`` between predictions and standardised targets, (..., D), averaged over all rows."""
    prediction, target = prediction.float(), standardize(target.float())
    return (2 - 2 * F.cosine_similarity(prediction, target, dim=-1)).mean()


def gather_rows(x: Tensor) -> Tensor:
    """Rows of every process, (B, D) -> (processes * B, D), with the exact gradient for our own.

    Every process computes the loss of all rows; data-parallel training then averages gradients over processes, where
    the contributions of their own rows should be summed. So they are scaled by the number of processes.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return x
    count, rank = dist.get_world_size(), dist.get_rank()
    everyone = [torch.empty_like(x) for _ in range(count)]
    dist.all_gather(everyone, x.detach().contiguous())
    everyone[rank] = count * x - (count - 1) * x.detach()
    return torch.cat(everyone)
