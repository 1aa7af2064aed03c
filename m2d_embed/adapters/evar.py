"""An audio representation for EVAR, NTT's evaluation package (https://github.com/nttcslab/eval-audio-repr).

EVAR finds representations as modules of its own package, imported by its scripts. In a checkout that is set up as its
README says, with m2d-embed installed:

1. A file ``evar/ar_m2d_embed.py`` of one line::

       from m2d_embed.adapters.evar import AR_M2DEmbed

2. One more line among the imports of ``lineareval.py``, which ``2pass_lineareval.py`` and ``finetune.py`` use, too::

       import evar.ar_m2d_embed

3. A file ``config/m2d_embed.yaml``::

       audio_repr: ar_m2d_embed.AR_M2DEmbed
       weight_file: m2d_vit_base-80x608p16x16-221006-mr7  # as for load_model; '' is the bundled model
       feature_d: 3840       # 960 with the bundled model; must be the size of an embedding
       sample_rate: 16000    # must be the model's

       output_layers: [-1]   # several are stacked; feature_d grows with them. Without it, the model's own
       flat_features: False  # True averages the patches of a time column instead of stacking them
       # temporal_pooling_type: mean_max  # mean (the default), max or mean_max

       batch_size: 128
       lr_lineareval: 0.00003
       report_per_epochs: 50
       early_stop_epochs: 20

4. Then, from the checkout, ``python lineareval.py config/m2d_embed.yaml cremad``, and another model by
   ``--options=weight_file=org/name,feature_d=3840``.

``finetune.py`` wants the settings of fine-tuning in the YAML file besides, as in EVAR's own examples; its augmentation
of spectrograms is applied to the normalised log-mel. ``precompute`` does nothing: a checkpoint has its own statistics.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from m2d_embed.audio.clips import check_batch
from m2d_embed.errors import ConfigError, UnsupportedError
from m2d_embed.hear import load_model
from m2d_embed.m2d import M2D

try:
    from evar.ar_base import BaseAudioRepr, temporal_pooling
except ImportError as error:
    raise UnsupportedError(
        f"m2d_embed.adapters.evar needs EVAR, which cannot be imported here ({error}). Clone "
        "https://github.com/nttcslab/eval-audio-repr, install its requirements, and run from that folder or put it on "
        "PYTHONPATH."
    ) from error


class AR_M2DEmbed(BaseAudioRepr):  # noqa: N801  # EVAR finds it by this name
    """Any model of this package as EVAR's ``ar``.

    Reads from EVAR's settings ``weight_file``, ``sample_rate`` and ``feature_d``, and where they are given
    ``output_layers``, ``flat_features`` and ``temporal_pooling_type``.

    Raises:
        ConfigError: if ``sample_rate`` or ``feature_d`` is not the model's, or an option is impossible.
        ModelNotFoundError: if ``weight_file`` leads nowhere or access is refused.
        CheckpointError: if files are damaged, unsafe, or contradict their configuration.
    """

    def __init__(self, cfg: Mapping[str, Any]):
        super().__init__(cfg=cfg)
        layers = cfg.get("output_layers")
        self.model = load_model(
            cfg.get("weight_file") or "",
            device="cpu",  # EVAR moves it
            layers=layers,
            layer_pooling=None if layers is None else "concat",
            flat=cfg.get("flat_features"),
            scene_pooling="mean",  # EVAR pools frames itself, and has one size for both
        )
        _check(cfg, self.model)

    def encode_frames(self, batch_audio: Tensor) -> Tensor:
        """Frame features at the model's own hop.

        Args:
            batch_audio: (B, samples) in [-1, 1].

        Returns:
            (B, D, T) float32.

        Raises:
            AudioError: if ``batch_audio`` is not of rank 2, is empty, or holds NaN or infinity.
        """
        log_mel = self.augment_if_training(self.model.log_mel(check_batch(batch_audio)))
        return self.model.encode_frames(log_mel).transpose(1, 2)

    def forward(self, batch_audio: Tensor) -> Tensor:
        """Embeddings of whole clips, (B, samples) -> (B, D) float32; errors as in ``encode_frames``."""
        frames = self.encode_frames(batch_audio)
        if self.cfg.get("temporal_pooling_type") is None:
            return frames.mean(dim=-1)
        pooled: Tensor = temporal_pooling(self, frames)
        return pooled


def _check(cfg: Mapping[str, Any], model: M2D) -> None:
    """Raise ConfigError where EVAR would go by another rate or size than the model has."""
    for key, value in (("sample_rate", model.sample_rate), ("feature_d", model.scene_embedding_size)):
        if cfg.get(key) != value:
            raise ConfigError(
                f"{key} is {cfg.get(key)!r} in EVAR's configuration, but {value} with this model and these features; "
                f"set {key}: {value}."
            )
