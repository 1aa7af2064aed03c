"""The network: waveform or log-mel in, features out; an ``nn.Module`` with no files, threads or batching in it.

The features are those of Niizumi et al., arXiv 2210.14648, section 4.1: the patch embeddings of one time column,
stacked over frequency, are a frame feature; the mean over time is the scene embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Literal, Self

import torch
from torch import Tensor, nn

from m2d_embed.backends.devices import check_int8, stored_dtype
from m2d_embed.config import FeatureConfig, HeadConfig, ModelConfig, ScenePooling
from m2d_embed.errors import AudioError, ConfigError, UnsupportedError
from m2d_embed.model.compiled import CompiledEncoder
from m2d_embed.model.encoder import Encoder
from m2d_embed.model.frontend import LogMel
from m2d_embed.model.heads.clap import ClapHead
from m2d_embed.model.heads.tagging import TaggingHead
from m2d_embed.model.pooling import Timestamps, frame_features, pool_scene, stack_rows
from m2d_embed.model.resample import resample
from m2d_embed.model.windows import column_times, cut, interleave, pad_to_patch

# What is encoded at a time bounds the memory of activations.
_CPU_ACTIVATIONS = 2_400_000  # between the layers of an MLP: more is no faster, half of it slower for a ViT-Tiny
_GPU_WINDOWS = 256


class Network(nn.Module):
    """Log-mel, encoder and heads; windows of long clips joined in time.

    Differentiable throughout, with no state besides its weights. Every method that takes ``x`` takes either a
    waveform, (B, samples) in [-1, 1] on the model's device, or what ``log_mel`` returns, (B, 1, mels, frames). A
    waveform of another rate than the model's is resampled where it is, differentiably, if its ``sample_rate`` in Hz is
    given (``resample.py``).
    Embeddings are float32 whatever the dtype of the matrices.

    Attributes:
        config: shape, front end and origin (``ModelConfig``).
        features: which features are returned; may be set.
        sample_rate: Hz.
        scene_embedding_size, timestamp_embedding_size: embedding sizes, for HEAR.
    """

    def __init__(self, config: ModelConfig, features: FeatureConfig | None = None):
        super().__init__()
        self.config = config
        self.features = features or FeatureConfig()
        self.frontend = LogMel(config)
        self.encoder = Encoder(config)
        if not self.encoder.cls_token.is_meta:  # to load weights into; drawing numbers there imports half of torch
            self.encoder.init_weights()
        self.head = TaggingHead(config.head_dim, config.head) if config.head is not None else None
        self.clap = ClapHead(config.clap) if config.clap is not None else None
        self._compiled: CompiledEncoder | None = None

    # --- what HEAR asks for -------------------------------------------------------------------------------------

    @property
    def sample_rate(self) -> int:
        """Sample rate of the audio the model takes, in Hz."""
        return self.config.sample_rate

    @property
    def features(self) -> FeatureConfig:
        """Which features embeddings are made of: those set, with the model's own (``config``) where they say None.

        Raises:
            ConfigError: when features are set that this model cannot give.
        """
        return self._features

    @features.setter
    def features(self, features: FeatureConfig) -> None:
        features.check(self.config)
        self._features = features.resolved(self.config)

    @property
    def scene_embedding_size(self) -> int:
        """Size of a scene embedding."""
        return self.features.scene_dim(self.config)

    @property
    def timestamp_embedding_size(self) -> int:
        """Size of a timestamp embedding."""
        return self.features.frame_dim(self.config)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.encoder.cls_token.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype that the matrices of the blocks are multiplied in."""
        if self.encoder.quantize:
            return torch.int8
        return next(m.weight.dtype for m in self.encoder.blocks.modules() if isinstance(m, nn.Linear))

    # --- waveform or log-mel in, features out -------------------------------------------------------------------

    def log_mel(self, audio: Tensor, sample_rate: int | None = None) -> Tensor:
        """Normalised log-mel: (B, samples) -> (B, 1, mels, 1 + samples // hop), float32."""
        log_mel: Tensor = self.frontend(self._at_own_rate(audio, sample_rate))
        return log_mel

    def forward(self, x: Tensor, sample_rate: int | None = None) -> Tensor:
        """Frame features, one a patch, (B, T, D); as ``encode_frames``."""
        return self.encode_frames(x, sample_rate)

    def encode_frames(self, x: Tensor, sample_rate: int | None = None) -> Tensor:
        """Frame features, one a patch, whatever ``features.hop_ms`` is.

        Args:
            x: waveform (B, samples) or log-mel (B, 1, mels, frames).
            sample_rate: of the waveform in Hz; None means the model's.

        Returns:
            (B, T, D) float32; D is ``timestamp_embedding_size``.
        """
        return self._frames(self._as_log_mel(x, sample_rate), self.features)

    def scene(self, x: Tensor, sample_rate: int | None = None) -> Tensor:
        """Scene embedding, (B, ``scene_embedding_size``) float32: the mean of the frame features over time.

        With ``scene_pooling`` ``"mean_std"`` their standard deviation over time (of the population) stands after it.
        """
        return pool_scene(self.encode_frames(x, sample_rate), self.features.pooling(self.config))

    def timestamps(self, x: Tensor, sample_rate: int | None = None) -> Timestamps:
        """Embeddings over time at ``features.hop_ms``.

        Returns:
            Embeddings (B, T, D) and the centre of each in ms, (B, T), both float32. No centre lies after the end of the
            clip; for a log-mel its last frame counts as the end.
        """
        x = self._at_own_rate(x, sample_rate)
        log_mel = self._as_log_mel(x)
        num_samples = x.shape[-1] if x.ndim == 2 else (x.shape[-1] - 1) * self.config.hop_length
        hop_frames = self.features.hop_frames(self.config)
        shifts = range(0, self.config.patch_size[1], hop_frames)
        frames = interleave([self._frames(log_mel, self.features, shift) for shift in shifts])
        times = column_times(frames.shape[1], hop_frames, self.config, 1000.0 * num_samples / self.sample_rate).float()
        return Timestamps(frames[:, : len(times)], times.to(frames.device).expand(len(frames), -1))

    def intermediates(self, x: Tensor, layers: Sequence[int], sample_rate: int | None = None) -> list[Tensor]:
        """Stacked frame features of single transformer blocks, each read through the final norm.

        Args:
            x: waveform (B, samples) or log-mel (B, 1, mels, frames).
            layers: block indices, 0 the first, -1 the last.
            sample_rate: of the waveform in Hz; None means the model's.

        Returns:
            One (B, T, F * d) float32 tensor a layer.

        Raises:
            ConfigError: if a layer does not exist.
        """
        log_mel = self._as_log_mel(x, sample_rate)
        return [stack_rows(patches) for patches in self._patches(log_mel, layers)]

    def patches(self, x: Tensor, sample_rate: int | None = None) -> Tensor:
        """Patch features of the last layer, (B, F, T, d) float32: F rows in mel, T columns in time."""
        return self._patches(self._as_log_mel(x, sample_rate), (-1,))[0]

    def window_frames(self, log_mel: Tensor, features: FeatureConfig) -> Tensor:
        """Frame features of single windows.

        Args:
            log_mel: (N, 1, mels, frames) normalised; ``frames`` a multiple of the patch and at most one window.
            features: which features.

        Returns:
            (N, T, D) float32.
        """
        features = features.resolved(self.config)
        return frame_features(self._encode_windows(log_mel, features.blocks(self.config)), features).float()

    def most_windows(self, frames: int) -> int:
        """How many windows of so many frames (whole patches) are encoded in one call at most."""
        if self.device.type != "cpu":
            return _GPU_WINDOWS
        patches = self.config.grid_size[0] * (frames // self.config.patch_size[1])
        return max(1, int(_CPU_ACTIVATIONS / (patches * self.config.embed_dim * self.config.mlp_ratio)))

    # --- training -----------------------------------------------------------------------------------------------

    def with_head(
        self,
        labels: Iterable[str],
        *,
        multi_label: bool = False,
        features: Literal["stacked", "flat"] = "stacked",
        scene_pooling: ScenePooling | None = None,
    ) -> Self:
        """Give the model a tagging head for labels of your own, with random weights, in place of one it may have.

        ``logits`` and ``frame_logits`` then are of these labels, and ``save_pretrained`` keeps the head with the model.

        Args:
            labels: names of the outputs, in order.
            multi_label: any number of labels at once (sigmoid), else exactly one (softmax).
            features: what the head sees: "stacked" patches of a time column, or their mean, "flat".
            scene_pooling: what it sees of a clip: the "mean" over time, or "mean_std"; None is the model's own.

        Returns:
            This model.

        Raises:
            ConfigError: if there are no labels, one is there twice, or they are a single string.

        Example::

            model = M2D.from_pretrained().with_head(["dog", "cat"])
            loss = F.cross_entropy(model.train().logits(audio), targets)
        """
        names = () if isinstance(labels, str) else tuple(labels)
        if not names or len(set(names)) < len(names):
            raise ConfigError(f"labels are one or more different names, not {labels!r}.")
        head = HeadConfig(names, features, multi_label, scene_pooling or self.config.scene_pooling)
        self.config = replace(self.config, head=head)
        self.head = TaggingHead(self.config.head_dim, head).to(self.device).train(self.training)
        self.head.init_weights()
        return self

    def set_drop_path(self, rate: float) -> None:
        """Stochastic depth of the encoder in training; see ``Encoder.set_drop_path``."""
        self.encoder.set_drop_path(rate)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Less memory for more computation in training; see ``Encoder.set_grad_checkpointing``."""
        self.encoder.set_grad_checkpointing(enable)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters and buffers with more than one dimension that optimisers should not decay."""
        return {f"encoder.{name}" for name in self.encoder.no_weight_decay()}

    # --- heads --------------------------------------------------------------------------------------------------

    def logits(self, x: Tensor, sample_rate: int | None = None) -> Tensor:
        """Class logits of a fine-tuned checkpoint, (B, labels); the labels are ``config.head.labels``.

        Raises:
            UnsupportedError: if the model has no tagging head.
        """
        head = self.tagging_head()
        frames = self._frames(self._as_log_mel(x, sample_rate), self.head_features())
        return head.forward(pool_scene(frames, head.config.scene_pooling))

    def frame_logits(self, x: Tensor, sample_rate: int | None = None) -> Tensor:
        """Class logits of every time column, (B, T, labels): the head applied before the mean over time.

        Raises:
            UnsupportedError: if the model has no tagging head, or one that takes standard deviations over time.
        """
        frames = self._frames(self._as_log_mel(x, sample_rate), self.head_features())
        return self.column_head().forward(frames)

    def tagging_head(self) -> TaggingHead:
        """The classification head, or UnsupportedError if there is none."""
        if self.head is None:
            raise UnsupportedError(
                f"{self.config.name or 'This model'} has no tagging head; take a fine-tuned checkpoint, "
                "e.g. m2d_as_vit_base-80x1001p16x16-240213_AS-FT_enconly."
            )
        return self.head

    def column_head(self) -> TaggingHead:
        """The classification head for single time columns, or UnsupportedError if there is none that takes them."""
        head = self.tagging_head()
        if head.config.scene_pooling != "mean":
            raise UnsupportedError(
                f"The head of {self.config.name or 'this model'} takes standard deviations over time, which a single "
                "time column has not; fine-tune one with model.scene_pooling=mean for labels over time."
            )
        return head

    def head_features(self) -> FeatureConfig:
        """The features the tagging head was trained on, one a patch."""
        head = self.tagging_head().config
        flat, hop_ms = head.features == "flat", self.config.column_ms
        return FeatureConfig((-1,), "mean", flat, hop_ms, head.scene_pooling)

    def encode_audio_clap(self, x: Tensor, sample_rate: int | None = None) -> Tensor:
        """Audio in the joint space of a CLAP checkpoint, (B, joint) float32, not normalised.

        Raises:
            UnsupportedError: if the model has no CLAP projectors.
        """
        return self.clap_head().project_audio(self.patches(x, sample_rate).flatten(1, 2))

    def clap_head(self) -> ClapHead:
        """The CLAP projectors, or UnsupportedError if there are none."""
        if self.clap is None:
            raise UnsupportedError(
                f"{self.config.name or 'This model'} has no audio-text projectors; take a CLAP checkpoint, "
                "e.g. m2d_clap_vit_base-80x608p16x16-240128."
            )
        return self.clap

    # --- how it is computed ---------------------------------------------------------------------------------------

    def set_dtype(self, dtype: torch.dtype) -> Self:
        """Store and multiply the matrices of the blocks in ``dtype``; norms, positions and log-mel stay in float32.

        int8 is stored as bfloat16, and multiplied in int8 by inference on a CPU; gradients are those of bfloat16.

        Raises:
            ConfigError: for int8 on another device than a CPU.
            UnsupportedError: if this CPU cannot multiply in int8.
        """
        if dtype == torch.int8:
            check_int8(self.device)
        self.encoder.quantize = dtype == torch.int8
        stored = stored_dtype(dtype)
        for block in self.encoder.blocks:
            for module in block.modules():
                if isinstance(module, nn.Linear):
                    module.to(stored)
        return self

    def repack(self) -> Self:
        """Forget every copy of the weights that inference on a CPU made; the next call makes them anew.

        Only for weights that were changed in a way that leaves no trace, through ``.data``, NumPy or other processes
        that share their memory: all other changes are seen. ``eval()`` and ``train()`` do it, too.
        """
        self.encoder.repack()
        self.frontend.repack()
        return self

    def compile_encoder(self) -> Self:
        """Run the encoder through ``torch.compile`` in inference without gradients (``compiled.py``).

        The first clips of each new length and batch size take long. On a CPU it replaces the packed blocks, which are
        usually faster; it is meant for GPUs.
        """
        self._compiled = CompiledEncoder(self.encoder)
        return self

    # --- inside -------------------------------------------------------------------------------------------------

    def _encode_windows(self, log_mel: Tensor, layers: Sequence[int]) -> list[Tensor]:
        """(N, 1, mels, frames) of one window at most -> one (N, F, T, d) tensor a layer."""
        encode: Callable[[Tensor, Sequence[int]], list[Tensor]] = self.encoder
        if self._compiled is not None and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            encode = self._compiled
        calls = max(1, -(-len(log_mel) // self.most_windows(log_mel.shape[-1])))
        parts = [encode(part, layers) for part in log_mel.tensor_split(calls)]
        return parts[0] if len(parts) == 1 else [torch.cat(outputs) for outputs in zip(*parts, strict=True)]

    def _at_own_rate(self, x: Tensor, sample_rate: int | None) -> Tensor:
        """A waveform at the model's rate; None says that it has it."""
        if sample_rate is None:
            return x
        if x.ndim == 2 and x.is_floating_point() and x.numel() > 0:
            return resample(x, sample_rate, self.sample_rate)
        if sample_rate == self.sample_rate:
            return x
        raise AudioError(
            f"sample_rate={sample_rate} is for a floating waveform (batch, samples), not for {x.dtype} of shape "
            f"{tuple(x.shape)}; a log-mel is made at the model's {self.sample_rate} Hz."
        )

    def _as_log_mel(self, x: Tensor, sample_rate: int | None = None) -> Tensor:
        x = self._at_own_rate(x, sample_rate)
        if not x.is_floating_point():
            raise AudioError(f"expected floating-point audio in [-1, 1], but got {x.dtype}; scale integers first.")
        if x.ndim == 2 and x.numel() > 0:
            return self.log_mel(x)
        if x.ndim == 4 and x.shape[1:3] == (1, self.config.input_size[0]) and x.numel() > 0:
            return x
        raise AudioError(
            "expected a waveform (batch, samples) or a normalised log-mel "
            f"(batch, 1, {self.config.input_size[0]}, frames), neither empty, but got shape {tuple(x.shape)}."
        )

    def _frames(self, log_mel: Tensor, features: FeatureConfig, shift: int = 0) -> Tensor:
        """(B, 1, mels, frames) -> (B, T, D), leaving out the first ``shift`` frames."""
        batch, features = len(log_mel), features.resolved(self.config)
        encoded = self._encode_clips(log_mel, features.blocks(self.config), shift)
        joined = [
            frame_features(per_layer, features).reshape(batch, -1, features.frame_dim(self.config))
            for per_layer in encoded
        ]
        return joined[0] if len(joined) == 1 else torch.cat(joined, dim=1)

    def _patches(self, log_mel: Tensor, layers: Sequence[int], shift: int = 0) -> list[Tensor]:
        """Encode window by window and join the kept columns: one (B, F, T, d) float32 tensor a layer."""
        batch = len(log_mel)
        joined: list[list[Tensor]] = [[] for _ in layers]
        for per_layer in self._encode_clips(log_mel, layers, shift):
            for layer, patches in enumerate(per_layer):
                joined[layer].append(patches.unflatten(0, (batch, -1)).transpose(1, 2).flatten(2, 3))
        return [torch.cat(parts, dim=2) for parts in joined]

    def _encode_clips(self, log_mel: Tensor, layers: Sequence[int], shift: int) -> Iterator[list[Tensor]]:
        """The kept columns of all full windows of all clips, then of the last, shorter ones.

        Each time one (B * n, F, T, d) float32 tensor a layer, the n windows of a clip one after the other.
        """
        windows = cut(log_mel.shape[-1], self.config, shift)
        if not windows:
            yield [log_mel.new_empty(len(log_mel), self.config.grid_size[0], 0, self.config.embed_dim) for _ in layers]
        for width in sorted({w.stop - w.start for w in windows}, reverse=True):
            group = [w for w in windows if w.stop - w.start == width]
            stacked = torch.stack([pad_to_patch(log_mel[..., w.start : w.stop], self.config) for w in group], dim=1)
            outputs = self._encode_windows(stacked.flatten(0, 1), layers)
            yield [output[..., : group[0].columns, :].float() for output in outputs]
