"""M2D, the model that users hold: the network, loaded and saved, and clips of any kind and length as its input."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Literal, TypeGuard, get_args, overload

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from huggingface_hub import ModelCard, ModelHubMixin
from torch import Tensor
from tqdm.auto import tqdm

from m2d_embed.audio.clips import Clip, ClipLike, open_clip
from m2d_embed.backends import native
from m2d_embed.backends.devices import best_device, check_int8, parse_device, parse_dtype, stored_dtype
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
from m2d_embed.errors import AudioError, ConfigError
from m2d_embed.model.heads.clap import TEXT_ENCODER_FILE, TextEncoder
from m2d_embed.model.network import Network
from m2d_embed.model.pooling import Timestamps
from m2d_embed.model.resample import resample
from m2d_embed.runtime import batching

log = logging.getLogger("m2d_embed")

#: What ``encode`` does about a clip that cannot be embedded.
OnError = Literal["raise", "skip"]

_HALF = (torch.bfloat16, torch.float16)


class M2D(Network, ModelHubMixin, library_name="m2d-embed", tags=["audio", "embeddings"]):
    """A pretrained audio encoder: waveform in, embeddings out.

    What it computes of tensors is in ``Network``; this adds loading and saving, and ``encode`` of files and arrays.

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
        super().__init__(config, features)
        self.origin = "random weights"
        self._text_encoder: TextEncoder | None = None
        self._text_weights: Path | dict[str, Tensor] | None = None
        self._text_stamp: tuple[int, int, int] | None = None

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
        target = parse_device(best_device() if device is None else device)
        if compute_dtype == torch.int8:
            check_int8(target)
        prefer_half = [d for d in _HALF if d == stored_dtype(compute_dtype)]
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
        if checkpoint.file_dtype not in (stored_dtype(dtype), torch.float32):
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
