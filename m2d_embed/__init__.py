"""Audio embeddings from Masked Modeling Duo (M2D). This module is itself a HEAR module.

>>> import m2d_embed
>>> model = m2d_embed.load_model()  # the bundled model
>>> embeddings = model.encode(["a.wav", "b.flac"])  # (2, model.scene_embedding_size)
"""

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from m2d_embed.checkpoints import registry
from m2d_embed.config import FeatureConfig, ModelConfig
from m2d_embed.errors import (
    AudioError,
    CheckpointError,
    ConfigError,
    M2DEmbedError,
    ModelNotFoundError,
    UnsupportedError,
)
from m2d_embed.hear import get_scene_embeddings, get_timestamp_embeddings, load_model

if TYPE_CHECKING:
    from m2d_embed.jobs.embed import embed_files
    from m2d_embed.m2d import M2D

try:
    __version__ = version("m2d-embed")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

__all__ = [
    "M2D",
    "AudioError",
    "CheckpointError",
    "ConfigError",
    "FeatureConfig",
    "M2DEmbedError",
    "ModelConfig",
    "ModelNotFoundError",
    "UnsupportedError",
    "__version__",
    "embed_files",
    "get_scene_embeddings",
    "get_timestamp_embeddings",
    "load_model",
    "registry",
]


def __getattr__(name: str) -> Any:
    if name == "M2D":  # loaded where used: it brings in huggingface_hub
        from m2d_embed.m2d import M2D

        return M2D
    if name == "embed_files":
        from m2d_embed.jobs.embed import embed_files

        return embed_files
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
