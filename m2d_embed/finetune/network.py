"""What is fine-tuned: an encoder, perhaps with adapters, and a classification head.

In evaluation mode a padded crop has the logits that ``M2D.logits`` gives for its audio alone: padding takes no part in
attention, in mean and standard deviation over time, or in the statistics of the batch.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from m2d_embed.config import ModelConfig
from m2d_embed.errors import ConfigError, UnsupportedError
from m2d_embed.finetune.recipe import LoraSection
from m2d_embed.m2d import M2D
from m2d_embed.model.encoder import Encoder
from m2d_embed.model.heads.tagging import TaggingHead
from m2d_embed.model.pooling import pool_scene
from m2d_embed.training.positions import resize_positions

if TYPE_CHECKING:
    from m2d_embed.finetune.augment import KeptPatches

_ADAPTER = "default"  # peft's name for the only adapter
HEAD_FILE = "head.safetensors"


class Classifier(nn.Module):
    """An encoder with a head: crops in, logits out. Names in its state dict are those of ``M2D``.

    Args:
        config: of the model, with its head.
        per_column: logits of every time column, for events; else of the clip.
    """

    def __init__(self, config: ModelConfig, per_column: bool):
        super().__init__()
        if config.head is None:
            raise ConfigError("a classifier needs a configuration with a head.")
        self.config = config
        self.per_column = per_column
        self.encoder = Encoder(config)
        self.head = TaggingHead(config.head_dim, config.head)
        self.encoder_frozen = False

    def forward(self, log_mel: Tensor, frames: Tensor, mask: Tensor, kept: KeptPatches | None = None) -> Tensor:
        """Logits of crops.

        Args:
            log_mel: (B, 1, mels, n) normalised; n is a multiple of the patch, and at most the window.
            frames: (B,) int64: how many of them are audio.
            mask: (B, T) bool: the columns that inference would give for so many frames.
            kept: the patches that are encoded; None means all.

        Returns:
            (B, labels) float32; or (B, T', labels) for each of the T' columns kept, zeros where ``mask`` is False.
        """
        grid = self.config.grid_size[0], mask.shape[1]
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.encoder_frozen):
            tokens = self.encoder.embed(log_mel)
            columns = torch.arange(grid[1], device=log_mel.device)
            # The last column may be half audio: inference attends to it, though it may not give it.
            is_audio = columns < -(-frames[:, None] // self.config.patch_size[1])  # (B, T)
            if kept is not None:
                tokens = tokens[:, kept.tokens.to(tokens.device)]
                columns = kept.columns.to(tokens.device)
                is_audio, mask = is_audio[:, columns], mask[:, columns]
                grid = len(kept.rows), len(kept.columns)
            every = None if bool(is_audio.all()) else is_audio.repeat(1, grid[0])  # frequency-major, as the tokens
            patches = self.encoder.encode(tokens, is_audio=every)[0][:, 1:].view(len(tokens), *grid, -1)
        with torch.autocast(log_mel.device.type, enabled=False):
            return self._logits(patches.float(), mask)

    def train(self, mode: bool = True) -> Classifier:
        """As in ``nn.Module``; a frozen encoder stays in evaluation mode."""
        super().train(mode)
        if self.encoder_frozen:
            self.encoder.eval()
        return self

    def _logits(self, patches: Tensor, mask: Tensor) -> Tensor:
        """(B, F, T, d) -> logits, in float32."""
        assert self.config.head is not None
        stacked = self.config.head.features == "stacked"
        features = patches.transpose(1, 2).flatten(2) if stacked else patches.mean(dim=1)  # (B, T, D)
        if self.per_column:
            return self._normalised_logits(features, mask)
        scenes = pool_scene(features, self.config.head.scene_pooling, mask)
        return self._normalised_logits(scenes, mask.any(dim=1))

    def _normalised_logits(self, features: Tensor, mask: Tensor) -> Tensor:
        """Logits of the rows of (..., D) features that ``mask`` (...) selects, and zeros for the others.

        Several processes normalise with the statistics of the whole batch, as one would.
        """
        shared = self.training and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        if not shared:
            chosen: Tensor = self.head(features[mask])
        else:
            everyone = _gather(features)
            masks = [torch.empty_like(mask) for _ in range(dist.get_world_size())]
            dist.all_gather(masks, mask.contiguous())
            logits = self.head(torch.cat([f[m] for f, m in zip(everyone, masks, strict=True)]))
            before = sum(int(m.sum()) for m in masks[: dist.get_rank()])
            chosen = logits[before : before + int(mask.sum())]
        filled: Tensor = chosen.new_zeros(*mask.shape, chosen.shape[-1])
        return filled.masked_scatter(mask[..., None], chosen)


def build_classifier(base: M2D, config: ModelConfig, per_column: bool, seed: int) -> Classifier:
    """A classifier with the encoder of a model, and a fresh head drawn by ``seed``.

    Positions of another window are computed anew if they are the fixed ones, else interpolated.

    Args:
        base: the model to start from, in float32.
        config: of what is trained: that of ``base`` but for window and head.
        per_column: as in ``Classifier``.
        seed: of the head.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = Classifier(config, per_column)
        network.head.init_weights()
    tensors = {name: tensor.detach().float().cpu() for name, tensor in base.encoder.state_dict().items()}
    tensors["pos_embed"] = resize_positions(
        tensors["pos_embed"], base.config.grid_size, network.encoder.pos_embed, config.grid_size
    )
    network.encoder.load_state_dict(tensors)
    return network


def freeze(network: Classifier, encoder: bool, patch_embed: bool) -> None:
    """Keep the encoder, or its patch embedding, as it is."""
    if encoder:
        network.encoder.requires_grad_(False)
        network.encoder_frozen = True
    if patch_embed:
        network.encoder.patch_embed.requires_grad_(False)


# --- adapters ---------------------------------------------------------------------------------------------------------


def add_lora(network: Classifier, section: LoraSection, seed: int) -> None:
    """Put low-rank adapters beside the matrices of the blocks; the rest of the encoder is frozen.

    Raises:
        UnsupportedError: if peft is not installed.
    """
    try:
        from peft import inject_adapter_in_model
    except ImportError as error:
        raise UnsupportedError("lora needs peft: pip install 'm2d-embed[finetune]'") from error
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(_lora_config(section), network.encoder, adapter_name=_ADAPTER)
    for name, parameter in network.encoder.named_parameters():
        parameter.requires_grad_("lora_" in name)


def merged_tensors(network: Classifier, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by the names of ``M2D.state_dict()``, adapters merged into the weights that they change.

    Args:
        network: what they are of.
        tensors: a state dict of it, perhaps averaged.
    """
    if not any("lora_" in name for name in tensors):
        return dict(tensors)
    from peft.tuners.lora import LoraLayer

    merged = copy.deepcopy(network)
    merged.load_state_dict(tensors)
    for module in merged.modules():
        if isinstance(module, LoraLayer):
            module.merge()
    return {
        name.replace(".base_layer.", "."): tensor for name, tensor in merged.state_dict().items() if "lora_" not in name
    }


def save_adapter(network: Classifier, tensors: dict[str, Tensor], section: LoraSection, folder: Path) -> None:
    """Write the adapters as peft's own files, and the head beside them.

    They are put back by ``inject_adapter_in_model`` and ``set_peft_model_state_dict`` on the encoder they were trained
    with.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    encoder = {n.removeprefix("encoder."): t for n, t in tensors.items() if n.startswith("encoder.")}
    adapters = get_peft_model_state_dict(network.encoder, state_dict=encoder, adapter_name=_ADAPTER)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: t.contiguous() for name, t in adapters.items()}, folder / "adapter_model.safetensors")
    save_file({n: t.contiguous() for n, t in tensors.items() if n.startswith("head.")}, folder / HEAD_FILE)
    _lora_config(section).save_pretrained(str(folder))


def _lora_config(section: LoraSection) -> Any:
    from peft import LoraConfig

    # A regular expression: "proj" would name the patch embedding, too.
    targets = rf"blocks\.\d+\.(attn|mlp)\.({'|'.join(section.targets)})"
    return LoraConfig(r=section.rank, lora_alpha=section.alpha, target_modules=targets, lora_dropout=0.0, bias="none")


# --- several processes ------------------------------------------------------------------------------------------------


def _gather(features: Tensor) -> list[Tensor]:
    """The features of every process, through which gradients flow back to where they came from."""
    from torch.distributed.nn.functional import all_gather

    whole = features.contiguous()
    gathered: tuple[Tensor, ...] = all_gather(whole)
    return list(gathered)
