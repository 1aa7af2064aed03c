"""The audio and text sides of M2D-CLAP (Niizumi et al., arXiv 2406.02032): projections into one joint space."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from m2d_embed.config import ClapConfig
from m2d_embed.errors import CheckpointError, ModelNotFoundError, UnsupportedError
from m2d_embed.model.encoder import Block

TEXT_ENCODER_FILE = "text_encoder.safetensors"

#: Where the learned temperature starts: log(1 / 0.07).
FIRST_LOGIT_SCALE = 2.6593

_RUN_FOREIGN_CODE = ("nvidia/NV-Embed-v2",)


class SemanticProjector(nn.Module):
    """A learned token that gathers a clip: prepended to its patch features, through blocks, normalised."""

    def __init__(self, dim: int, depth: int, mlp_dim: int):
        super().__init__()
        self.sem_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.sem_blocks = nn.ModuleList(Block(dim, 1, mlp_dim, norm_eps=1e-5) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-5)

    def forward(self, patches: Tensor) -> Tensor:
        """(B, N, dim) flat features -> (B, dim)."""
        x = torch.cat([self.sem_token.expand(len(patches), -1, -1), patches], dim=1)
        for block in self.sem_blocks:
            x = block(x)
        token: Tensor = self.norm(x[:, 0])
        return token


class ClapHead(nn.Module):
    """Audio projector, text projector and the learned temperature."""

    def __init__(self, config: ClapConfig):
        super().__init__()
        self.config = config
        self.audio_proj = _mlp(config.audio_layers) if config.audio_projector == "mlp" else _semantic(config)
        self.text_proj = _mlp(config.text_layers)
        self.logit_scale = nn.Parameter(torch.tensor(FIRST_LOGIT_SCALE))

    def project_audio(self, patches: Tensor) -> Tensor:
        """(B, N, dim) flat patch features -> (B, joint), not normalised."""
        if self.config.audio_projector == "mlp":
            patches = patches.float().mean(dim=1)
        projected: Tensor = self.audio_proj(patches.to(self.logit_scale.dtype))
        return projected.float()

    def project_text(self, embeddings: Tensor) -> Tensor:
        """(B, text_dim) outputs of the text encoder -> (B, joint), not normalised.

        Raises:
            UnsupportedError: if the checkpoint has no text projector.
        """
        _require_text_side(self.config)
        projected: Tensor = self.text_proj(embeddings.to(self.logit_scale.dtype))
        return projected.float()

    def similarity(self, audio: Tensor, text: Tensor) -> Tensor:
        """Scaled cosine similarity, (A, joint) x (B, joint) -> (A, B): logits over the texts."""
        audio, text = nn.functional.normalize(audio, dim=-1), nn.functional.normalize(text, dim=-1)
        return self.logit_scale.exp().clamp(max=100.0) * audio @ text.T


class TextEncoder:
    """A transformers model that turns sentences into vectors; needs the extra ``clap``.

    ``weights`` are the fine-tuned ones of a checkpoint that has its own text encoder, or their file; None takes those
    of the text encoder's repository.

    Raises:
        UnsupportedError: if transformers is not installed, or the text encoder would need code from its repository.
        ModelNotFoundError: if the text encoder's repository cannot be had.
        CheckpointError: if ``weights`` are damaged or do not fit it.
    """

    def __init__(self, config: ClapConfig, weights: Path | Mapping[str, Tensor] | None, device: torch.device):
        _require_text_side(config)
        if config.text_encoder in _RUN_FOREIGN_CODE:
            raise _runs_foreign_code(config)
        try:
            import transformers
        except ImportError as error:
            raise UnsupportedError("encode_text needs transformers: pip install 'm2d-embed[clap]'") from error
        self.pooling = config.text_pooling
        self.device = device
        try:
            self.tokenizer, self.model = _from_repository(transformers, config.text_encoder, weights is None)
        except OSError as error:
            raise ModelNotFoundError(f"the text encoder {config.text_encoder} cannot be loaded: {error}") from error
        except ValueError as error:
            if "trust_remote_code" in str(error):
                raise _runs_foreign_code(config) from error
            raise
        if weights is not None:
            _load_text_weights(self.model, weights)
        self.model.to(device).float().eval()

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Sentences -> (B, text_dim) float32; padding is masked, so a batch changes nothing.

        Raises:
            UnsupportedError: if ``texts`` is a single text, or one is longer than the encoder can take.
        """
        if isinstance(texts, str):
            raise UnsupportedError(f"encode_text takes a list of texts, not a single one: [{texts[:40]!r}]")
        if not texts:
            return torch.empty(0, self.model.config.hidden_size, device=self.device)
        tokens = self.tokenizer(list(texts), padding=True, return_tensors="pt").to(self.device)
        limit = self.model.config.max_position_embeddings
        if tokens["input_ids"].shape[1] > limit:
            longest = max(texts, key=len)
            raise UnsupportedError(f"the text {longest[:40]!r}... is longer than the {limit} tokens the encoder takes.")
        hidden: Tensor = self.model(**tokens).last_hidden_state.float()  # (B, tokens, text_dim)
        if self.pooling == "cls":
            return hidden[:, 0]
        mask = tokens["attention_mask"].unsqueeze(-1).float()
        mean: Tensor = (hidden * mask).sum(1) / mask.sum(1)
        return mean


def _mlp(sizes: Sequence[int]) -> nn.Module:
    """Linear layers of these sizes with ReLU between them; indices as in the published checkpoints (0, 2, ...)."""
    layers: list[nn.Module] = []
    for d_in, d_out in pairwise(sizes):
        layers += [nn.Linear(d_in, d_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _semantic(config: ClapConfig) -> nn.Module:
    return SemanticProjector(config.audio_layers[0], config.semantic_depth, config.semantic_mlp_dim)


def _require_text_side(config: ClapConfig) -> None:
    if not config.text_layers:
        raise UnsupportedError("this CLAP checkpoint has the audio projector only, so it cannot embed texts.")


def _runs_foreign_code(config: ClapConfig) -> UnsupportedError:
    return UnsupportedError(
        f"The text encoder {config.text_encoder} runs code from its repository, which m2d-embed never does. "
        "Compute its embeddings yourself and pass them to model.clap.project_text()."
    )


def _from_repository(transformers: Any, repository: str, with_weights: bool) -> tuple[Any, Any]:
    """Tokenizer and model; ``trust_remote_code=False`` refuses where transformers would ask on the terminal."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(repository, trust_remote_code=False)
    if with_weights:
        model = transformers.AutoModel.from_pretrained(repository, trust_remote_code=False, use_safetensors=True)
    else:
        config = transformers.AutoConfig.from_pretrained(repository, trust_remote_code=False)
        model = transformers.AutoModel.from_config(config, trust_remote_code=False)
    return tokenizer, model


def _load_text_weights(model: nn.Module, weights: Path | Mapping[str, Tensor]) -> None:
    """Load weights whose names may carry a prefix of the module that held the text encoder in training."""
    try:
        tensors = load_file(weights) if isinstance(weights, Path) else weights
    except SafetensorError as error:
        raise CheckpointError(f"{weights}: damaged or not a safetensors file ({error}).") from error
    anchor = "embeddings.word_embeddings.weight"
    prefix = next((name.removesuffix(anchor) for name in tensors if name.endswith(anchor)), "")
    try:
        result = model.load_state_dict({n.removeprefix(prefix): t for n, t in tensors.items()}, strict=False)
    except RuntimeError as error:
        raise CheckpointError(f"the checkpoint's text encoder does not fit its configuration: {error}") from error
    missing = [n for n in result.missing_keys if not n.startswith("pooler.") and not n.endswith("position_ids")]
    if missing:
        raise CheckpointError(f"the checkpoint's text encoder lacks {', '.join(missing[:3])} ({len(missing)} in all).")
