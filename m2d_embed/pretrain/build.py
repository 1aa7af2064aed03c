"""A recipe -> the objective, its optimiser, and what makes its offline targets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from m2d_embed import m2d as inference
from m2d_embed.config import ClapConfig, ModelConfig
from m2d_embed.errors import UnsupportedError
from m2d_embed.pretrain import inputs, objectives
from m2d_embed.pretrain.inputs import Captions, OfflineTarget, PatchTeacher, Teacher
from m2d_embed.pretrain.objectives import Objective
from m2d_embed.pretrain.recipe import WITH_FEATURES, Recipe

#: Of the objectives in ``WITH_TEACHER``.
TEACHERS = {"m2d_x": Teacher, "salt": PatchTeacher}


class Task(NamedTuple):
    """An objective with fresh weights, and what makes its offline targets."""

    objective: Objective
    offline: OfflineTarget | None


def build_task(
    recipe: Recipe, config: ModelConfig, device: torch.device, label_names: Sequence[str], feature_dim: int
) -> Task:
    """Build what a recipe trains; weights are drawn by its seed.

    Args:
        recipe: the run's.
        config: the encoder's.
        device: of the training; the teacher and the text encoder go there.
        label_names: for m2d_as.
        feature_dim: size of precomputed frame features, for m2d_s.

    Raises:
        ConfigError, ModelNotFoundError, UnsupportedError: if the teacher or the text encoder cannot be had.
    """
    offline: OfflineTarget | None = None
    clap: ClapConfig | None = None
    offline_dim = 0
    if recipe.objective in TEACHERS:
        model = inference.M2D.from_pretrained(recipe.offline.teacher, device=device)
        teacher = TEACHERS[recipe.objective](model, config)
        offline, offline_dim = teacher, teacher.dim
    elif recipe.objective in WITH_FEATURES:
        offline, offline_dim = inputs.precomputed_features, feature_dim
    elif recipe.objective == "m2d_as":
        offline, offline_dim = inputs.labels, len(label_names)
    elif recipe.objective == "m2d_clap":
        clap, offline = _captions(recipe, config, device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.training.seed)
        objective = _objective(recipe, config, offline_dim, clap)
        objective.init_weights()
    return Task(objective, offline)


def build_optimizers(objective: Objective, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """AdamW in one fused kernel a step, no weight decay on biases and norms; with it Muon, if the recipe says so.

    Muon (Jordan et al., https://kellerjordan.github.io/posts/muon) takes the matrices of transformer blocks, its steps
    scaled to the size of AdamW's, so that one learning rate serves both (Liu et al., arXiv 2502.16982, section 2.2).

    Raises:
        UnsupportedError: if this PyTorch has no Muon.
    """
    training, rate = recipe.training, recipe.training.peak_lr
    trained = {name: p for name, p in objective.named_parameters() if p.requires_grad}
    by_muon = {}
    if training.optimizer == "muon":
        by_muon = {name: p for name, p in trained.items() if p.ndim == 2 and ".blocks." in name}
    by_adamw, exempt = {name: p for name, p in trained.items() if name not in by_muon}, objective.no_weight_decay()
    decayed = {name for name, p in by_adamw.items() if p.ndim > 1 and name not in exempt}
    groups = [
        {"params": [p for name, p in by_adamw.items() if name in decayed], "weight_decay": training.weight_decay},
        {"params": [p for name, p in by_adamw.items() if name not in decayed], "weight_decay": 0.0},
    ]
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, lr=rate, betas=training.betas, fused=True)]
    if by_muon:
        optimizers.append(_muon(list(by_muon.values()), rate, training.weight_decay))
    return optimizers


def _muon(matrices: list[nn.Parameter], rate: float, weight_decay: float) -> torch.optim.Optimizer:
    if not hasattr(torch.optim, "Muon"):
        raise UnsupportedError(
            f"training.optimizer muon needs PyTorch 2.9 or later, and this is {torch.__version__}; "
            "upgrade it, or take adamw."
        )
    return torch.optim.Muon(matrices, rate, weight_decay, momentum=0.95, adjust_lr_fn="match_rms_adamw")


def _objective(recipe: Recipe, config: ModelConfig, offline_dim: int, clap: ClapConfig | None) -> Objective:
    predictor, weights = recipe.predictor, recipe.offline.weights
    if clap is not None:
        return objectives.M2DCLAP(config, predictor, clap, weights)
    plain = {"m2d": objectives.M2D, "data2vec": objectives.Data2Vec, "msm_mae": objectives.MSMMAE}
    if recipe.objective in plain:
        return plain[recipe.objective](config, predictor)
    if recipe.objective == "salt":
        return objectives.SALT(config, predictor, offline_dim)
    if recipe.objective == "msm_mae_s":
        return objectives.MSMMAES(config, predictor, offline_dim, weights)
    kinds = {"m2d_x": objectives.M2DX, "m2d_s": objectives.M2DS, "m2d_as": objectives.M2DAS}
    return kinds[recipe.objective](config, predictor, offline_dim, weights)


def _captions(recipe: Recipe, config: ModelConfig, device: torch.device) -> tuple[ClapConfig, Captions]:
    section = recipe.offline
    joint = section.joint_dim

    def clap_config(text_dim: int) -> ClapConfig:
        return ClapConfig(
            audio_projector="mlp",
            audio_layers=(config.embed_dim, joint, joint),
            text_layers=(text_dim, joint),
            text_encoder=section.text_encoder,
            text_pooling=section.text_pooling,
        )

    captions = Captions(clap_config(joint), device)  # the projection in this one is not used
    return clap_config(captions.encoder.model.config.hidden_size), captions
