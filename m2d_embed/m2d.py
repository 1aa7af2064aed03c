"""M2D: log-mel, encoder and heads in one ``nn.Module``; windows joined in time; loading and saving.

The features are those of Niizumi et al., arXiv 2210.14648, section 4.1: the patch embeddings of one time column,
stacked over frequency, are a frame feature; the mean over time is the scene embedding.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Literal, TypeGuard, get_args, overload

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from huggingface_hub import ModelCard, ModelHubMixin
from torch import Tensor, nn
from tqdm.auto import tqdm

from m2d_embed.audio.clips import Clip, ClipLike, open_clip
from m2d_embed.backends import native, selection
from m2d_embed.backends.threads import choose_threads
from m2d_embed.checkpoints import hub
from m2d_embed.checkpoints.layouts import (
    WEIGHT_FILES,
    Checkpoint,
    check_unchanged,
    load_checkpoint,
    model_card,
    summarise_unused,
    write_native,
)
from m2d_embed.config import FeatureConfig, ModelConfig
from m2d_embed.errors import AudioError, ConfigError, UnsupportedError
from m2d_embed.model.compiled import CompiledEncoder
from m2d_embed.model.encoder import Encoder
from m2d_embed.model.frontend import LogMel
from m2d_embed.model.heads.clap import TEXT_ENCODER_FILE, ClapHead, TextEncoder
from m2d_embed.model.heads.tagging import TaggingHead
from m2d_embed.model.resample import resample
from m2d_embed.model.windows import column_times, cut, interleave, pad_to_patch
from m2d_embed.runtime import batching
from m2d_embed.runtime.batching import Timestamps
from m2d_embed.runtime.collectors import pool_scene

log = logging.getLogger("m2d_embed")

#: What ``encode`` does about a clip that cannot be embedded.
OnError = Literal["raise", "skip"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.int8}
_HALF = (torch.bfloat16, torch.float16)

# What is encoded at a time bounds the memory of activations.
_CPU_ACTIVATIONS = 2_400_000  # between the layers of an MLP: more is no faster, half of it slower for a ViT-Tiny
_GPU_WINDOWS = 256


class M2D(nn.Module, ModelHubMixin, library_name="m2d-embed", tags=["audio", "embeddings"]):
    """A pretrained audio encoder: waveform in, embeddings out.

    Differentiable throughout, with no state besides its weights. Every method that takes ``x`` takes either a
    waveform, (B, samples) in [-1, 1] on the model's device, or what ``log_mel`` returns, (B, 1, mels, frames). A
    waveform of another rate than the model's is resampled where it is, differentiably, if its ``sample_rate`` in Hz is
    given (``resample.py``).
    Embeddings are float32 whatever the dtype of the matrices.

    Attributes:
        config: shape, front end and origin (``ModelConfig``).
        features: which features ``scene``, ``timestamps``, ``encode`` and the HEAR functions return; may be set, and
            is saved with the model.
        sample_rate: Hz.
        scene_embedding_size, timestamp_embedding_size: embedding sizes, for HEAR.
        origin: where the weights came from, in words.

    Example::

        model = M2D.from_pretrained("m2d_vit_base-80x608p16x16-221006-mr7")
        frames = model(torch.randn(2, 16000, device=model.device))  # (2, 6, 3840)
        embeddings = model.encode(["a.wav", "b.flac"])  # (2, 3840)
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
        self.origin = "random weights"
        self._compiled: CompiledEncoder | None = None
        self._text_encoder: TextEncoder | None = None
        self._text_weights: Path | dict[str, Tensor] | None = None
        self._text_stamp: tuple[int, int, int] | None = None

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
        return [_stack(patches) for patches in self._patches(log_mel, layers)]

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
                "time column has not; fine-tune one with scene_pooling=mean for labels over time."
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

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Sentences in the joint space of a CLAP checkpoint, (B, joint) float32, not normalised.

        The first call loads the text encoder; it needs the extra ``clap`` (transformers).

        Raises:
            UnsupportedError: without CLAP projectors or transformers, or for a text encoder that runs foreign code.
        """
        clap = self.clap_head()
        if self._text_encoder is None or self._text_encoder.device != self.device:
            check_unchanged(self._text_weights, self._text_stamp)
            self._text_encoder = TextEncoder(clap.config, self._text_weights, self.device)
        return clap.project_text(self._text_encoder(texts))

    def clap_head(self) -> ClapHead:
        """The CLAP projectors, or UnsupportedError if there are none."""
        if self.clap is None:
            raise UnsupportedError(
                f"{self.config.name or 'This model'} has no audio-text projectors; take a CLAP checkpoint, "
                "e.g. m2d_clap_vit_base-80x608p16x16-240128."
            )
        return self.clap

    # --- many clips ---------------------------------------------------------------------------------------------

    def encode(
        self,
        clips: ClipLike | Iterable[ClipLike],
        batch_size: int = 32,
        sample_rate: int | None = None,
        show_progress_bar: bool = False,
        output: Literal["numpy", "torch"] = "numpy",
        *,
        normalize_embeddings: bool = False,
        on_error: OnError = "raise",
    ) -> npt.NDArray[np.float32] | Tensor:
        """Scene embeddings of clips of any length, rate and number of channels.

        Files are streamed, so memory is bounded by the window; clips are sorted by length and their order is restored;
        the result for a clip does not depend on the others.

        Args:
            clips: paths, arrays or tensors, (samples,) or (channels, samples), and whatever else ``open_clip`` takes,
                in a list, a column of pandas, polars or pyarrow, or a 1-d array of paths; or a single one of them.
            batch_size: windows encoded at a time, at most.
            sample_rate: rate of arrays and tensors in Hz; None means the model's. Files state their own. Tensors on
                another device than the CPU are resampled there (``resample.py``), everything else by soxr.
            show_progress_bar: show one on stderr.
            output: "numpy" or "torch".
            normalize_embeddings: divide each embedding by its length, so that dot products are cosines.
            on_error: what to do about a clip that cannot be embedded: "raise" its error, or "skip" it. A skipped clip's
                row is NaN, so that rows stay those of ``clips``, and a warning is logged that says what is wrong.

        Returns:
            (clips, D) float32 on the CPU, or (D,) for a single clip.

        Raises:
            AudioError: for a clip that cannot be embedded; it names the file, or the index in ``clips``.
            ConfigError: on an impossible ``batch_size``, ``output`` or ``on_error``.
        """
        if output not in ("numpy", "torch"):
            raise ConfigError(f'output is "numpy" or "torch", not {output!r}.')
        many, single = _as_list(clips)
        opened = self._opened(many, sample_rate, on_error)
        with torch.no_grad(), closing(batching.encode_scenes(self, opened, self.features, batch_size)) as encoded:
            scenes = _in_order(encoded, len(many), show_progress_bar, on_error)
        size = self.scene_embedding_size
        rows = [torch.full((size,), torch.nan) if scene is None else scene for scene in scenes]
        stacked = torch.stack(rows) if rows else torch.empty(0, size)
        if normalize_embeddings:
            stacked = F.normalize(stacked, dim=-1)
        result = stacked[0] if single else stacked
        return result.numpy() if output == "numpy" else result

    @overload
    def encode_timestamps(
        self,
        clips: str | os.PathLike[str],
        batch_size: int = ...,
        sample_rate: int | None = ...,
        show_progress_bar: bool = ...,
        *,
        normalize_embeddings: bool = ...,
        on_error: OnError = ...,
    ) -> Timestamps: ...

    @overload
    def encode_timestamps(
        self,
        clips: ClipLike | Iterable[ClipLike],
        batch_size: int = ...,
        sample_rate: int | None = ...,
        show_progress_bar: bool = ...,
        *,
        normalize_embeddings: bool = ...,
        on_error: OnError = ...,
    ) -> list[Timestamps] | Timestamps: ...

    def encode_timestamps(
        self,
        clips: ClipLike | Iterable[ClipLike],
        batch_size: int = 32,
        sample_rate: int | None = None,
        show_progress_bar: bool = False,
        *,
        normalize_embeddings: bool = False,
        on_error: OnError = "raise",
    ) -> list[Timestamps] | Timestamps:
        """Timestamp embeddings of clips of any length; arguments and errors as in ``encode``.

        Returns:
            For each clip ``(embeddings (T, D) float32, timestamps (T,) float64 in ms)``, tensors on the CPU; for a
            single clip just that. Of a skipped clip T is 0.
        """
        many, single = _as_list(clips)
        opened = self._opened(many, sample_rate, on_error)
        with torch.no_grad(), closing(batching.encode_timestamps(self, opened, self.features, batch_size)) as encoded:
            found = _in_order(encoded, len(many), show_progress_bar, on_error)
        none = Timestamps(torch.empty(0, self.timestamp_embedding_size), torch.empty(0, dtype=torch.float64))
        results = [none if timed is None else timed for timed in found]
        if normalize_embeddings:
            results = [Timestamps(F.normalize(embeddings, dim=-1), times) for embeddings, times in results]
        return results[0] if single else results

    def open_clips(
        self, clips: Iterable[ClipLike], sample_rate: int | None = None, raise_errors: bool = False
    ) -> Iterator[Clip | AudioError]:
        """Look at each clip without reading its samples; yield its error if there is something wrong with it."""
        for index, clip in enumerate(clips):
            try:
                yield self._open_clip(clip, sample_rate, f"clips[{index}]")
            except AudioError as error:
                if raise_errors:
                    raise
                yield error

    def _open_clip(self, clip: ClipLike, sample_rate: int | None, name: str) -> Clip:
        if sample_rate is not None and _is_on_device(clip):
            mono = clip.detach() if clip.ndim == 1 else clip.detach().mean(0)
            clip, sample_rate = resample(mono, sample_rate, self.sample_rate), None
        return open_clip(clip, sample_rate, self.sample_rate, name)

    def _opened(self, clips: Sequence[ClipLike], sample_rate: int | None, on_error: OnError) -> list[Clip | AudioError]:
        if on_error not in get_args(OnError):
            raise ConfigError(f'on_error is "raise" or "skip", not {on_error!r}.')
        return list(self.open_clips(clips, sample_rate, raise_errors=on_error == "raise"))

    # --- loading and saving -------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(  # type: ignore[override]  # the mixin's takes any keyword on top; ours are listed
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str] | None = "",
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        features: FeatureConfig | None = None,
        threads: int | None = None,
        compile: bool = False,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
    ) -> M2D:
        """Load a model, in evaluation mode.

        Args:
            pretrained_model_name_or_path: "" or None (the bundled model), a folder, a published ``.pth`` or ``.zip``,
                a Hub repository (``org/name`` or ``org/name@revision``), or the name of an official M2D release.
            device: where to put it; None is a CUDA GPU if there is one, else the CPU. Others, e.g. "mps", are taken
                when they are named.
            dtype: of the matrices: "fp32", "bf16", "fp16", "int8" (CPU only) or a torch.dtype; None is float32. A
                half-precision file is read where it has what is asked for, and with a warning where there is no other.
            features: which features it returns; None is what it was saved with.
            threads: how many threads compute on the CPU, for the whole process, as with ``torch.set_num_threads``:
                other models, and torch elsewhere, compute with as many; only threads of Python that have computed
                before keep their number. None leaves what ``OMP_NUM_THREADS`` or an earlier ``torch.set_num_threads``
                chose; else it is torch's own number, mostly one a core, but no more than the cores that this process
                may use by its affinity and its container's CPU quota.
            compile: run the encoder through ``torch.compile`` (see ``compile_encoder``); for GPUs.
            revision, token, cache_dir: as in huggingface_hub, for a Hub repository.
            force_download, local_files_only: as in huggingface_hub, for a Hub repository or an official release.

        Raises:
            ModelNotFoundError: if the name leads nowhere or access is refused.
            CheckpointError: if files are damaged, unsafe, or contradict their configuration.
            ConfigError: on an impossible option.
            UnsupportedError: if this machine cannot multiply in the dtype.
        """
        native.isa_limit()  # an impossible value ends here, and not in the middle of a run
        choose_threads(threads)
        compute_dtype = torch.float32 if dtype is None else parse_dtype(dtype)
        target = _parse_device(best_device() if device is None else device)
        if compute_dtype == torch.int8:
            _check_int8(target)
        prefer_half = [d for d in _HALF if d == compute_dtype]
        folder = None if cache_dir is None else Path(cache_dir)
        exact = [WEIGHT_FILES[d] for d in (*prefer_half, torch.float32)]
        location = hub.locate(
            pretrained_model_name_or_path or "",
            weight_files=exact,
            rounded_files=[WEIGHT_FILES[d] for d in _HALF if WEIGHT_FILES[d] not in exact],
            optional_files=[TEXT_ENCODER_FILE],
            options=hub.HubOptions(revision, token, folder, force_download, local_files_only),
        )
        checkpoint = load_checkpoint(location, prefer_half)
        model = cls._from_checkpoint(checkpoint, location.origin, target, compute_dtype, features)
        return model.compile_encoder() if compile else model

    @classmethod
    def _from_checkpoint(
        cls,
        checkpoint: Checkpoint,
        origin: str,
        device: torch.device,
        dtype: torch.dtype,
        features: FeatureConfig | None,
    ) -> M2D:
        if checkpoint.file_dtype not in (dtype, torch.float32):
            stored = str(checkpoint.file_dtype).removeprefix("torch.")
            log.warning("%s: there is no float32 file; the weights are those of %s, rounded.", origin, stored)
        if checkpoint.unused:
            log.info("%s: not part of the model: %s", origin, summarise_unused(checkpoint.unused))
        with torch.device("meta"):  # no memory and no random numbers for weights that are replaced at once
            model = cls(checkpoint.config, features)
        model.set_dtype(dtype)
        dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
        tensors = {name: t.to(device=device, dtype=dtypes[name]) for name, t in checkpoint.tensors.items()}
        model.load_state_dict(tensors, assign=True)
        model.origin = origin
        model._text_weights, model._text_stamp = checkpoint.text_encoder, checkpoint.text_stamp
        return model.to(device).eval()

    def set_dtype(self, dtype: torch.dtype) -> M2D:
        """Store and multiply the matrices of the blocks in ``dtype``; norms, positions and log-mel stay in float32.

        int8 is stored as bfloat16, and multiplied in int8 by inference on a CPU; gradients are those of bfloat16.

        Raises:
            ConfigError: for int8 on another device than a CPU.
            UnsupportedError: if this CPU cannot multiply in int8.
        """
        if dtype == torch.int8:
            _check_int8(self.device)
        self.encoder.quantize = dtype == torch.int8
        stored = torch.bfloat16 if dtype == torch.int8 else dtype
        for block in self.encoder.blocks:
            for module in block.modules():
                if isinstance(module, nn.Linear):
                    module.to(stored)
        return self

    def repack(self) -> M2D:
        """Forget every copy of the weights that inference on a CPU made; the next call makes them anew.

        Only for weights that were changed in a way that leaves no trace, through ``.data``, NumPy or other processes
        that share their memory: all other changes are seen. ``eval()`` and ``train()`` do it, too.
        """
        self.encoder.repack()
        self.frontend.repack()
        return self

    def compile_encoder(self) -> M2D:
        """Run the encoder through ``torch.compile`` in inference without gradients (``compiled.py``).

        The first clips of each new length and batch size take long. On a CPU it replaces the packed blocks, which are
        usually faster; it is meant for GPUs.
        """
        self._compiled = CompiledEncoder(self.encoder)
        return self

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *,
        repo_id: str | None = None,
        push_to_hub: bool = False,
        **push_to_hub_kwargs: Any,
    ) -> str | None:
        """Write the model and its features into a folder, in our layout, in place of a model that is there.

        Whatever happens meanwhile, the folder holds the old model, the new one, or none that loads.

        Args:
            save_directory: made if it is missing.
            repo_id: of the Hub, if it is pushed there, too; None is the folder's name.
            push_to_hub: whether it is.
            push_to_hub_kwargs: for ``push_to_hub``.

        Returns:
            The URL of the commit, if there is one.
        """
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        self._save_pretrained(folder)
        return self.push_to_hub(repo_id or folder.name, **push_to_hub_kwargs) if push_to_hub else None

    def push_to_hub(self, repo_id: str, *, delete_patterns: str | Sequence[str] | None = None, **kwargs: Any) -> str:
        """Upload the model, in one commit; arguments as in ``huggingface_hub.ModelHubMixin.push_to_hub``.

        Weights that the repository has of an earlier model, such as half-precision files, are deleted with it.
        """
        more = [delete_patterns] if isinstance(delete_patterns, str) else list(delete_patterns or ())
        earlier = [*WEIGHT_FILES.values(), TEXT_ENCODER_FILE]
        commit = super().push_to_hub(repo_id, delete_patterns=[*earlier, *more], **kwargs)
        return str(getattr(commit, "commit_url", commit))  # before 1.0 it is a string of something else

    def _save_pretrained(self, save_directory: Path) -> None:
        tensors = {name: tensor.detach().cpu() for name, tensor in self.state_dict().items()}
        config = self.features.as_own(self.config)
        write_native(save_directory, Checkpoint(config, tensors, self._text_weights, text_stamp=self._text_stamp))

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """The model card that ``push_to_hub`` writes."""
        return ModelCard(model_card(self.features.as_own(self.config)))

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


def parse_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """``"fp32"``, ``"bf16"``, ``"fp16"``, torch's names for them, or the torch.dtype itself.

    Raises:
        ConfigError: on anything else.
    """
    names = DTYPES | {str(known).removeprefix("torch."): known for known in DTYPES.values()}
    parsed = names.get(dtype) if isinstance(dtype, str) else dtype
    if parsed is None or parsed not in DTYPES.values():
        raise ConfigError(f"dtype {dtype!r} is not possible; choose one of {', '.join(DTYPES)}.")
    return parsed


def best_device() -> str:
    """Where a model goes if nobody says: "cuda" if there is such a GPU, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def _check_int8(device: torch.device) -> None:
    """ConfigError or UnsupportedError if int8 is impossible; "meta" is where weights are about to be loaded."""
    if device.type not in ("cpu", "meta"):
        raise ConfigError(f"int8 is for CPUs; on {device} take bf16 or fp16.")
    if not selection.supports_int8():
        raise UnsupportedError(
            "int8 needs kernels of this package, of which none runs here, or an x86 CPU with AVX-512 VNNI; "
            f"on this one take {selection.fastest_float()}."
        )


def _parse_device(device: str | torch.device) -> torch.device:
    """The device, if it exists and works here."""
    try:
        target = torch.device(device)
        torch.empty(0, device=target)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device {str(device)!r} cannot be used here ({str(error).splitlines()[0]}).") from error
    return target


def _stack(patches: Tensor) -> Tensor:
    """(B, F, T, d) -> (B, T, F * d)."""
    return patches.transpose(1, 2).flatten(2)


def frame_features(per_layer: Sequence[Tensor], features: FeatureConfig) -> Tensor:
    """Patches of each layer, (B, F, T, d), -> frame features (B, T, D)."""
    if features.layer_pooling == "mean" and len(per_layer) > 1:
        per_layer = [sum(per_layer[1:], per_layer[0]) / len(per_layer)]
    frames = [patches.mean(dim=1) if features.flat else _stack(patches) for patches in per_layer]
    return frames[0] if len(frames) == 1 else torch.cat(frames, dim=-1)


def _is_on_device(clip: object) -> TypeGuard[Tensor]:
    """Whether this is a waveform in another memory than the CPU's."""
    if not isinstance(clip, Tensor) or clip.device.type == "cpu":
        return False
    return clip.is_floating_point() and clip.ndim in (1, 2) and clip.numel() > 0


def _as_list(clips: Any) -> tuple[list[Any], bool]:
    """The clips, and whether there was only one, not in a sequence."""
    if _is_one_clip(clips):
        is_boxed = isinstance(clips, np.ndarray) and clips.ndim == 0 and clips.dtype.kind in "UOT"
        return [clips.item() if is_boxed else clips], True
    if getattr(clips, "ndim", 1) == 2:
        if not isinstance(clips, Tensor) and (not isinstance(clips, np.ndarray) or clips.dtype.kind in "USOT"):
            raise AudioError(
                f"a table of shape {tuple(clips.shape)} is not a list of clips; pass one column of it, "
                "e.g. frame['file'] or array[:, 0]."
            )
        raise AudioError(
            f"an array of shape {tuple(clips.shape)} may be one clip of several channels or several clips; "
            "pass [array] for one, list(array) for several."
        )
    listed = clips.to_pylist() if hasattr(clips, "to_pylist") else list(clips)  # of pyarrow, else it gives scalars
    if isinstance(clips, np.ndarray) and clips.dtype.kind == "S":
        listed = [os.fsdecode(path) for path in listed]
    return listed, False


def _is_one_clip(clips: Any) -> bool:
    """Whether this is a clip, not several: a path, samples, or an object with sound in it."""
    if isinstance(clips, str | os.PathLike | bytes | bytearray | memoryview | Mapping):
        return True
    if isinstance(clips, np.ndarray) and clips.dtype.kind in "USOT":  # of paths, or of clips of any kind
        return clips.ndim == 0
    if isinstance(clips, np.ndarray | Tensor):
        return clips.ndim < 2
    return hasattr(clips, "read") or hasattr(clips, "get_all_samples") or not isinstance(clips, Iterable)


def _in_order(
    encoded: Iterator[tuple[int, Any]], total: int, show_progress_bar: bool, on_error: OnError
) -> list[Any | None]:
    """Put results back in the clips' order; raise the first error, or say what is skipped and leave None there."""
    results: list[Any | None] = [None] * total
    for index, result in tqdm(encoded, total=total, unit="clip", disable=not show_progress_bar):
        if not isinstance(result, AudioError):
            results[index] = result
        elif on_error == "raise":
            raise result
        else:
            log.warning("skipped: %s", result)
    return results
