"""A transformer for scikit-learn: sounds in, embeddings out.

>>> from sklearn.linear_model import LogisticRegression
>>> from sklearn.pipeline import make_pipeline
>>> pipeline = make_pipeline(M2DFeatures(), LogisticRegression(max_iter=1000))
>>> pipeline.fit(["a.wav", "b.wav", ...], ["dog", "cat", ...])
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

import numpy as np
import numpy.typing as npt
import torch

from m2d_embed.audio.clips import ClipLike
from m2d_embed.config import ScenePooling
from m2d_embed.errors import AudioError, UnsupportedError
from m2d_embed.hear import load_model
from m2d_embed.m2d import M2D

try:
    from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
    from sklearn.utils.validation import check_is_fitted, validate_data
except ImportError as error:
    raise UnsupportedError(
        f"m2d_embed.adapters.sklearn needs scikit-learn 1.6 or newer ({error}): pip install 'm2d-embed[eval]'"
    ) from error


class M2DFeatures(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """Scene embeddings of sounds, the same as ``M2D.encode`` returns.

    ``X`` is a sequence of clips: paths, or 1-d arrays and tensors at the model's rate, of any length; or a 2-d array of
    waveforms, (n, samples). As everywhere in scikit-learn, the rows of a 2-d array must be as long in ``transform`` as
    they were in ``fit``; for clips of other lengths pass ``list(X)``.

    Nothing is learned: ``fit`` loads the model. Neither a clone nor a pickle has its weights in it, which are loaded
    again where they are needed.

    Args:
        model: which one, as for ``load_model``; "" is the bundled one.
        layers: the transformer block to read, or several, which are averaged; -1 is the last; None is the model's
            own.
        flat: average the patches of a time column instead of stacking them; None is the model's own choice.
        scene_pooling: "mean" over time, or "mean_std", followed by the standard deviation; None is the model's own.
        batch_size: windows encoded at a time, at most.
        device: where to put the model; None is a GPU if there is one, else the CPU.
        dtype: of the matrices: "fp32", "bf16" or "fp16"; None as for ``load_model``.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] = "",
        layers: int | Sequence[int] | None = None,
        flat: bool | None = None,
        scene_pooling: ScenePooling | None = None,
        batch_size: int = 32,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
    ):
        self.model = model
        self.layers = layers
        self.flat = flat
        self.scene_pooling = scene_pooling
        self.batch_size = batch_size
        self.device = device
        self.dtype = dtype

    def fit(self, X: Any, y: Any = None) -> M2DFeatures:  # noqa: N803  (scikit-learn's naming)
        """Load the model; of ``X`` only look at what needs no file to be opened.

        Raises:
            AudioError: if ``X`` is empty, a single path or a table of paths, or rows hold NaN or infinity.
            ValueError: scikit-learn's own, if ``X`` is nothing of the kind.
            ConfigError: on an impossible option.
            ModelNotFoundError: if the model's name leads nowhere or access is refused.
            CheckpointError: if files are damaged, unsafe, or contradict their configuration.
        """
        for left_over in ("n_features_in_", "feature_names_in_"):  # from a fit to rows, where this one is to paths
            self.__dict__.pop(left_over, None)
        self._as_clips(X, reset=True)
        self._model = self._load()
        self._n_features_out = self._model.scene_embedding_size
        return self

    def transform(self, X: Any) -> npt.NDArray[np.float32]:  # noqa: N803
        """Embed clips: n of them -> (n, D) float32.

        Raises:
            AudioError: for a clip that cannot be embedded; it names the file, or the index.
            NotFittedError: before ``fit``.
        """
        check_is_fitted(self)
        clips = self._as_clips(X, reset=False)
        if self._model is None:  # this is the copy of a fitted estimator
            self._model = self._load()
        return np.asarray(self._model.encode(clips, batch_size=self.batch_size), dtype=np.float32)

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "_n_features_out")

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.string = True  # one_d_array would say that a 1-d array of numbers is n clips
        tags.transformer_tags.preserves_dtype = ["float32"]
        return tags

    def __getstate__(self) -> dict[str, Any]:
        state = dict(super().__getstate__())
        return state | {"_model": None} if "_model" in state else state

    def _load(self) -> M2D:
        return load_model(
            os.fspath(self.model),
            device=self.device,
            dtype=self.dtype,
            layers=self.layers,
            layer_pooling=None if self.layers is None else "mean",
            flat=self.flat,
            scene_pooling=self.scene_pooling,
        )

    def _as_clips(self, X: Any, reset: bool) -> list[ClipLike]:  # noqa: N803
        """The clips of ``X``; ``reset`` says that this is ``fit``, which decides how long rows are."""
        if isinstance(X, str | os.PathLike):
            raise AudioError(f"X is a single path, {os.fspath(X)!r}; pass a list of paths.")
        if _is_sequence_of_clips(X):
            if len(X) == 0:
                raise AudioError("X is empty; pass at least one clip.")
            return list(X)
        if _is_table_of_paths(X):
            raise AudioError(
                f"X is a table of paths, its shape is {X.shape}; pass one column of it, e.g. X[:, 0] or frame['file']."
            )
        # Finite or not is checked below, where the message can say which clip is bad.
        rows = validate_data(self, X, reset=reset, dtype="numeric", ensure_all_finite=False)
        bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
        if len(bad):
            raise AudioError(f"X[{bad[0]}] has samples that are NaN or infinite.")
        return list(rows)


def _is_sequence_of_clips(X: Any) -> TypeGuard[Sequence[ClipLike]]:  # noqa: N803
    """Whether ``X`` is a list, tuple, 1-d array or Series that holds a path or waveform, or nothing at all.

    A single one will do: an item that is no clip is then refused by its index.
    """
    if not isinstance(X, list | tuple) and getattr(X, "ndim", None) != 1:
        return False
    return len(X) == 0 or any(_is_clip(x) for x in X)


def _is_clip(x: Any) -> bool:
    """Whether this is a clip rather than a number: a path, samples of any length, or an object with sound in it."""
    if isinstance(x, str | os.PathLike | bytes | Mapping) or getattr(x, "ndim", 0) > 0:
        return True
    return hasattr(x, "read") or hasattr(x, "get_all_samples")


def _is_table_of_paths(X: Any) -> bool:  # noqa: N803
    """Whether ``X`` is a 2-d array or DataFrame that begins with a path."""
    return getattr(X, "ndim", None) == 2 and any(isinstance(x, str | os.PathLike) for x in np.asarray(X).flat[:1])
